"""How long a process polls for a signal of another one."""

from ppo.collector.signals import Patience


def test_who_waited_in_vain_sleeps_at_once_until_waits_are_brief_again():
    patience = Patience(0.25)
    assert patience.seconds == 0.25
    patience.learn(0.5)
    assert patience.seconds == 0.0
    patience.learn(0.49)
    assert patience.seconds == 0.25


def test_who_never_polls_does_not_begin_to():
    patience = Patience(0.0)
    patience.learn(0.0)
    assert patience.seconds == 0.0
