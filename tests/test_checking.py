"""`ppo check`: what it says of a policy in a file, and how it ends."""

import sys
from pathlib import Path

import pytest

from ppo.cli import main
from ppo.cli.checking import load_function
from ppo.errors import ConfigError
from ppo.probes import PROBES

POLICY = """\
import torch
from torch import nn

from ppo import Categorical, Evaluation
from ppo.errors import SpaceError


class Mine(nn.Module):
    def __init__(self, num_inputs, num_actions):
        super().__init__()
        self.actor = nn.Linear(num_inputs, num_actions)
        self.critic = nn.Linear(num_inputs, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        logits = self.actor(obs)
        if deterministic:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        distribution = Categorical(self.actor(obs))
        return Evaluation(distribution.log_prob(actions), distribution.entropy(), self.value(obs))

    def value(self, obs):
        return self.critic(obs).squeeze(-1)


def make_policy(observation_space, action_space):
    if not hasattr(action_space, "n"):
        raise SpaceError("one choice at a time")
    return Mine(observation_space.shape[0], int(action_space.n))


def blind(observation_space, action_space):
    policy = make_policy(observation_space, action_space)
    for layer in (policy.actor, policy.critic):
        layer.weight.requires_grad_(False).zero_()
    return policy


def unfinished(observation_space, action_space):
    raise NotImplementedError("tomorrow")
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("my_policy.py").write_text(POLICY, encoding="utf-8")


def check(*words):
    return main(["check", *words])


def test_a_sound_policy_passes_with_a_line_for_each_probe(capsys):
    assert check("my_policy.py", "--only", "matching-action", "seen-reward", "bound") == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [
        ["seen-reward", "solved"],
        ["matching-action", "solved"],
        ["bound", "not"],
    ]
    assert "V(-1) = " in lines[0]
    assert lines[2].endswith("one choice at a time")
    assert lines[3:] == ["2 solved, 0 failed, 1 not applicable"]
    assert err == ""


def test_a_failure_is_explained_and_is_the_exit_status(capsys):
    words = ["constant-reward", "matching-action"]
    assert check("my_policy.py:blind", "--only", *words) == 1
    out = capsys.readouterr().out
    assert "constant-reward  solved" in out
    assert "matching-action  failed" in out
    assert "it tests: The actor sees" in out
    assert "usually means: the observation is ignored" in out
    assert "1 solved, 1 failed, 0 not applicable" in out


def test_what_a_policy_raises_keeps_its_traceback(capsys):
    assert check("my_policy.py:unfinished", "--only", "constant-reward") == 1
    out, err = capsys.readouterr()
    assert "NotImplementedError: tomorrow" in out
    assert 'my_policy.py", line ' in err


def test_nothing_that_applies_is_not_a_pass(capsys):
    assert check("my_policy.py", "--only", "memory") == 1
    assert "0 solved, 0 failed, 1 not applicable" in capsys.readouterr().out


def test_without_a_file_the_default_policy_is_checked(capsys):
    assert check("--only", "truncation", "bound", "--seed", "1") == 0
    assert "2 solved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nothing.py"], "there is no Python file 'nothing.py'"),
        (["nothing.py:make"], "there is no Python file 'nothing.py'"),
        (["my_policy"], "there is no Python file 'my_policy'"),
        (["my_policy.py:mak_policy"], "my_policy.py has no function 'mak_policy'"),
        (["my_policy.py", "--only", "memry"], "there is no probe 'memry'; there are "),
    ],
)
def test_wrong_usage_is_one_line(words, message, capsys):
    assert check(*words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"ppo: error: {message}")
    assert len(err.splitlines()) == 1


def test_a_file_may_import_what_lies_beside_it_and_replaces_no_module():
    folder = Path("elsewhere")
    folder.mkdir()
    (folder / "beside_it.py").write_text("number = 7\n")
    (folder / "random.py").write_text("import beside_it\ndef make_policy(*_): return beside_it\n")
    random = sys.modules["random"]
    assert load_function("elsewhere/random.py")(None, None).number == 7
    assert sys.modules["random"] is random


def test_a_file_without_the_function_says_how_to_write_it():
    Path("empty.py").write_text("make_policy = 3\n")
    with pytest.raises(ConfigError, match=r"define `def make_policy\(observation_space, action_"):
        load_function("empty.py")


def test_help_says_that_the_file_is_run(capsys):
    assert check("--help") == 0
    assert "THE FILE IS RUN" in " ".join(capsys.readouterr().out.split())


def test_every_probe_has_a_name_that_can_be_typed():
    assert all(probe.name.replace("-", "").isalpha() for probe in PROBES)
