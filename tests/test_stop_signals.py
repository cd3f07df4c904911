"""Ctrl-C and SIGTERM: the first is a wish, the second is what it always was."""

import os
import signal

import pytest

from ppo.cli.stop_signals import StopSignals


@pytest.fixture(autouse=True)
def _usual_ctrl_c():
    """A shell that starts the tests in the background has them ignore Ctrl-C."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_remembered_and_said(signum, capfd):
    with StopSignals() as stop:
        assert stop.signum is None
        signal.raise_signal(signum)
        assert stop.signum == signum
    assert "stopping" in capfd.readouterr().err


def test_the_second_ctrl_c_interrupts_at_once():
    with StopSignals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("sent", [None, signal.SIGINT, signal.SIGTERM])
def test_the_handlers_are_afterwards_as_they_were(sent):
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(signum) for signum in signals]
    with StopSignals():
        assert [signal.getsignal(signum) for signum in signals] != before
        if sent is not None:
            signal.raise_signal(sent)
    assert [signal.getsignal(signum) for signum in signals] == before


def test_a_signal_that_was_ignored_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with StopSignals() as stop:
        signal.raise_signal(signal.SIGINT)
    assert stop.signum is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
def test_a_forked_child_dies_of_sigterm_as_ever():
    with StopSignals() as stop:
        pid = os.fork()
        if pid == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    assert stop.signum is None
