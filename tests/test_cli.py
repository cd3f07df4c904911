"""The command `ppo`, typed as a user would: what it leaves, what it says, how it ends."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import gymnasium
import pytest
import torch
from environments import CountingEnv, FaultyEnv, crash, nan_obs
from forging import edit_document
from gymnasium.envs.registration import EnvSpec
from processes import wait_until

import ppo
from ppo import PPOAgent, PPOConfig
from ppo.cli import commands, main
from ppo.cli.playing import play
from ppo.cli.runs import RunFolder
from ppo.config import tuned_names
from ppo.probes.environments import MaskedTMaze

TINY = ["num_envs=2", "num_steps=32", "num_epochs=1", "steps=128"]
NEEDS_MUON = pytest.mark.skipif(
    not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon since 2.9"
)
TRAIN = ["train", "cartpole", *TINY, "--eval-episodes", "2"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run; tests that change it take a copy."""
    out = tmp_path_factory.mktemp("runs")
    assert main([*TRAIN, "--out", str(out), "--name", "run", "--quiet"]) == 0
    return out / "run"


@pytest.fixture
def copied(trained):
    return shutil.copytree(trained, Path("copy"))


@pytest.fixture
def register(monkeypatch):
    def register(name, factory):
        monkeypatch.setitem(gymnasium.registry, name, EnvSpec(name, factory))

    return register


def steps_of(run):
    return [row["steps"] for row in RunFolder.open(run).metrics()]


# What a run leaves


def test_training_leaves_a_run_folder_that_can_be_used(capsys):
    assert main(TRAIN) == 0
    (run,) = Path("runs").iterdir()
    assert run.name.startswith("cartpole-")
    assert run.name.endswith("-seed0")
    assert steps_of(run) == [64, 128]
    assert PPOConfig.from_yaml(run / "config.yaml") == PPOConfig.tuned("cartpole", TINY)
    assert PPOAgent.load(run / "final.safetensors").steps == 128
    assert (run / "curve.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads((run / "run.json").read_text())
    assert about["seed"] == 0
    assert about["command"] == ["ppo", *TRAIN]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert len(evaluation["episode_returns"]) == 2
    assert evaluation["solved"] is False
    out = capsys.readouterr().out
    for words in ("trained 128 steps", f"run folder: {run}", f"ppo play {run}", "not solved"):
        assert words in out


def test_a_script_that_follows_the_progress_gets_short_lines(capsys):
    main([*TRAIN, "steps=640"])
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [str(64 * count) for count in range(1, 11)]


def test_quiet_says_the_result_and_nothing_else(capsys):
    assert main([*TRAIN, "--quiet"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first_words = [line.split()[0] for line in out.splitlines()]
    assert first_words == ["trained", "run", "evaluation:", "not"]


def test_no_evaluation_where_none_is_wanted(capsys):
    assert main(["train", "cartpole", *TINY, "--eval-episodes", "0", "--name", "run"]) == 0
    assert "evaluation" not in capsys.readouterr().out
    assert not Path("runs/run/evaluation.json").exists()


def test_a_run_without_a_target_is_not_called_solved(capsys):
    words = ["train", "pendulum", "target_return=null", *TINY, "--eval-episodes", "1"]
    assert main(words) == 0
    assert "solved" not in capsys.readouterr().out


def test_overrides_and_options_may_stand_in_any_order():
    words = ["--seed", "3", "steps=64", "--name", "run", "policy.activation=relu", "num_envs=1"]
    assert main(["train", "cartpole", *words, "--eval-episodes", "0", "num_steps=64"]) == 0
    run = RunFolder.open("runs/run")
    assert run.info["seed"] == 3
    assert run.config.policy.activation == "relu"
    assert steps_of(run.path) == [64]


@pytest.mark.parametrize("words", [["--seed", "5"], ["seed=5"]])
def test_the_seed_is_an_option_or_an_override(words):
    assert main([*TRAIN, *words, "--name", "run"]) == 0
    assert RunFolder.open("runs/run").info["seed"] == 5
    assert PPOAgent.load("runs/run/final.safetensors").seed == 5


@pytest.mark.parametrize("name", ["pendulum", "Pendulum-v1", "pendulum.yaml"])
def test_a_shipped_configuration_has_several_names(name):
    assert main(["train", name, *TINY, "--eval-episodes", "0", "--name", "run"]) == 0
    assert RunFolder.open("runs/run").config == PPOConfig.tuned("pendulum", TINY)


def test_a_file_goes_before_a_shipped_configuration_of_that_name():
    Path("pendulum.yaml").write_text("env: CartPole-v1\nsteps: 64\nnum_envs: 1\nnum_steps: 64\n")
    assert main(["train", "pendulum.yaml", "--eval-episodes", "0", "--name", "run"]) == 0
    assert RunFolder.open("runs/run").config.env == "CartPole-v1"


def test_an_environment_of_ones_own_is_found_in_the_current_folder():
    Path("my_envs.py").write_text(
        "import gymnasium\n"
        "from gymnasium.envs.classic_control import CartPoleEnv\n"
        "gymnasium.register('Mine-v0', CartPoleEnv, max_episode_steps=10)\n"
    )
    Path("my.yaml").write_text("env: my_envs:Mine-v0\n")
    try:
        assert main(["train", "my.yaml", *TINY, "--eval-episodes", "1"]) == 0
    finally:
        gymnasium.registry.pop("Mine-v0", None)
        sys.modules.pop("my_envs", None)


def test_the_same_seed_gives_the_same_run():
    for name in ("a", "b"):
        assert main([*TRAIN, "--name", name, "--quiet"]) == 0
    clocks = {"seconds", "steps_per_second"}
    a, b = (
        [{k: v for k, v in row.items() if k not in clocks} for row in RunFolder(path).metrics()]
        for path in ("runs/a", "runs/b")
    )
    assert a == b


# Bad input


def yaml(text):
    Path("bad.yaml").write_text(text)
    return "bad.yaml"


BAD = "env: CartPole-v1\nsteps: 64\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BAD + "learning_rat: 1\n", "bad.yaml:3: unknown setting 'learning_rat'.*'learning_rate'"),
        (BAD + "steps: 32\n", "bad.yaml:3: 'steps' is given twice"),
        (BAD + "gamma: high\n", "bad.yaml:3: gamma must be a number, got 'high'"),
        (BAD + "gamma: 1.5\n", r"bad.yaml:3: gamma must be in \[0, 1\], got 1.5"),
        (BAD + "policy: {activation: foo}\n", "bad.yaml:3: activation must be one of"),
        ("env: [CartPole-v1\nsteps: 64\n", "bad.yaml is not valid YAML"),
        ("steps: 64\n", "env is not set"),
        ("env: CartPole-v1\n", "steps is not set"),
        (BAD + "wrappers: [TimeLimi]\n", "'TimeLimi'; did you mean 'TimeLimit'"),
    ],
)
def test_a_bad_file_is_one_line_that_names_file_and_line(text, words, capsys):
    assert main(["train", yaml(text)]) == 2
    assert_one_error(capsys, words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "pendlum"], "'pendlum'; did you mean 'pendulum'"),
        (["train", "missing.yaml"], "no file 'missing.yaml'"),
        (["train", "missing/my.yaml"], "missing/my.yaml cannot be read"),
        (["train", "cartpole", "stepz=3"], "'stepz'; did you mean 'steps'"),
        (["train", "cartpole", "steps=many"], "steps must be .*got 'many'"),
        (["train", "cartpole", "steps=0"], "steps must be at least 1, got 0"),
        (["train", "cartpole", "nonsense"], "key=value, got 'nonsense'"),
        (["train", "cartpole", "--nonsense"], "--nonsense; see `ppo train --help`"),
        (["evaluate", "run", "steps=3"], "steps=3; see `ppo evaluate --help`"),
        (["train", "cartpole", "seed=x"], "seed must be a whole number .* got 'x'"),
        (["train", "cartpole", "seed=1", "--seed", "2"], "seed is given twice"),
        (["train", "cartpole", "--name", "../x"], "plain folder name"),
        (["resume", "missing"], "'missing': there is no such folder"),
        (["evaluate", "missing"], "'missing': there is no such folder"),
        (["play", "missing"], "'missing': there is no such folder"),
        (["export", "missing"], "'missing': there is no such folder"),
        (["plot", "."], "it is no run folder"),
        (["resume", __file__], "it is a file, not a run folder"),
        (["train", "cartpole", "--out", __file__], "no folder for runs"),
        (["train", "cartpole", "--out", f"{__file__}/runs"], "no folder for runs"),
        (["check", "missing.py"], "no Python file 'missing.py'"),
        (["check", "--only", "nonsense"], "no probe 'nonsense'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(arguments, words, capsys):
    assert main(arguments) == 2
    assert_one_error(capsys, words)
    assert not any(Path().iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["trian"], "'trian'"),
        (["train"], "CONFIG"),
        (["train", "cartpole", "--seed", "-1"], "--seed"),
        (["train", "cartpole", "--device", "nonsense"], "'nonsense' cannot be used"),
        (["resume", "run", "--steps", "0"], "--steps"),
    ],
)
def test_wrong_usage_is_shown_the_right_one(arguments, words, capsys):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("usage: ppo")
    assert words in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["env=CratPole-v1"], "'CratPole-v1'.*CartPole"),
        (["env=no_module:CartPole-v1"], "No module named 'no_module'"),
        (["env_kwargs={lenght: 3}"], "does not take the arguments {'lenght': 3}"),
        (["env_kwargs={lenght: 3}", "num_workers=2"], "does not take the arguments {'lenght': 3}"),
        (["wrappers=[{TimeLimit: {steps: 3}}]"], r"TimeLimit\({'steps': 3}\) failed"),
        (["env=Words-v0"], "Text"),
        (["policy.encoders={arm: {kind: mlp}}"], "'arm' leads nowhere"),
        (["learning_rates.encoder=1e-3"], "'encoder'.*it has actor, critic"),
        pytest.param(["optimizer=Muon"], "matrices only", marks=NEEDS_MUON),
    ],
)
def test_what_only_the_environment_tells_is_named_and_leaves_no_run(
    settings, words, register, capsys
):
    register("Words-v0", WordsEnv)
    assert main(["train", "cartpole", *TINY, *settings]) == 2
    assert_one_error(capsys, words, before=1)
    assert not any(Path("runs").iterdir())


class WordsEnv(CountingEnv):
    observation_space = gymnasium.spaces.Text(5)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["play", "--video", "out.txt"], r"must end in .mp4 or .gif, got 'out.txt'"),
        (["play", "--video", "missing/out.gif"], "no folder 'missing' to put out.gif in"),
        (["plot", "--out", "out.txt"], "'out.txt': Format 'txt' is not supported"),
        (["plot", "--out", "missing/out.png"], "no folder 'missing' to put out.png in"),
        (["export", "--out", "out.txt"], "path ends in '.txt', wanted '.onnx', '.pt2'"),
        (["export", "--out", "missing/out.pt2"], "no folder 'missing' to put out.pt2 in"),
    ],
)
def test_a_file_that_cannot_be_is_named_before_the_work(command, words, trained, capsys):
    name, *options = command
    assert main([name, str(trained), *options]) == 2
    assert_one_error(capsys, words)
    assert not any(Path().iterdir())


def test_a_name_that_is_taken_is_wrong_usage(trained, capsys):
    words = ["--out", str(trained.parent), "--name", "run"]
    assert main([*TRAIN, *words]) == 2
    assert_one_error(capsys, "run exists already; choose another name")


def test_a_file_is_offered_whose_ending_was_left_out(capsys):
    Path("mine.yaml").write_text(BAD)
    assert main(["train", "mine"]) == 2
    assert_one_error(capsys, "unknown tuned configuration 'mine'.*the file mine.yaml")


def assert_one_error(capsys, words, before=0):
    out, err = capsys.readouterr()
    *earlier, line = err.splitlines()
    assert len(earlier) == before
    assert out == ""
    assert line.startswith("ppo: error: ") or "error: unknown:" in line
    assert pytest.raises(AssertionError, match=words).matches(AssertionError(line)), line


def test_a_bug_keeps_its_traceback(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(PPOAgent, "update", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(TRAIN)
    assert not any(Path("runs").iterdir())


# Stopping, failing, going on


def test_a_failing_environment_leaves_what_was_learned_before(register, capsys):
    register("Faulty-v0", lambda: FaultyEnv(crash, step=40, length=10))
    assert main(["train", yaml("env: Faulty-v0\n"), *TINY, "--name", "run"]) == 1
    err = capsys.readouterr().err
    assert "stopped at 64 of 128 steps; to go on: ppo resume runs/run" in err
    assert "the physics exploded" in err
    assert PPOAgent.load(RunFolder("runs/run").checkpoints()[0]).steps == 64


def test_a_nan_is_named_and_the_run_can_go_on(register, capsys):
    register("Nan-v0", lambda: FaultyEnv(nan_obs, step=40, length=10))
    assert main(["train", yaml("env: Nan-v0\n"), *TINY, "--name", "run"]) == 1
    assert "ppo: error: " in capsys.readouterr().err
    register("Nan-v0", lambda: CountingEnv(length=10))
    assert main(["resume", "runs/run", "--eval-episodes", "0"]) == 0
    assert steps_of("runs/run") == [64, 128]


def test_a_stopped_run_goes_on_to_its_goal(monkeypatch, capfd):
    signal_in_update(monkeypatch, 1, signal.SIGTERM)
    assert main([*TRAIN, "--name", "run"]) == 143
    assert "stopped at 64 of 128 steps; to go on: ppo resume runs/run" in capfd.readouterr().err
    assert steps_of("runs/run") == [64]
    assert not Path("runs/run/final.safetensors").exists()
    assert main(["resume", "runs/run", "--eval-episodes", "1"]) == 0
    assert steps_of("runs/run") == [64, 128]
    assert PPOAgent.load("runs/run/final.safetensors").steps == 128


def test_a_run_that_was_stopped_in_its_last_update_is_finished_by_resume(monkeypatch, capfd):
    signal_in_update(monkeypatch, 2, signal.SIGTERM)
    assert main([*TRAIN, "--name", "run"]) == 143
    assert main(["resume", "runs/run", "--eval-episodes", "1"]) == 0
    assert "goal of 128 steps is reached" in capfd.readouterr().err
    assert PPOAgent.load("runs/run/final.safetensors").steps == 128


def signal_in_update(monkeypatch, number, signum):
    """Send a signal to this process in the middle of the n-th update."""
    update, calls = PPOAgent.update, []

    def interrupted(self, rollout):
        calls.append(None)
        if len(calls) == number:
            signal.raise_signal(signum)
        return update(self, rollout)

    monkeypatch.setattr(PPOAgent, "update", interrupted)


@pytest.mark.parametrize("number", [1, 3])
def test_an_interruption_within_an_update_keeps_the_checkpoints_before_it(
    number, monkeypatch, capsys
):
    update, calls = PPOAgent.update, []

    def interrupted(self, rollout):
        calls.append(None)
        if len(calls) == number:
            raise KeyboardInterrupt
        return update(self, rollout)

    monkeypatch.setattr(PPOAgent, "update", interrupted)
    assert main([*TRAIN, "steps=640", "--name", "run"]) == 130
    assert "interrupted" in capsys.readouterr().err
    if number == 1:
        assert not Path("runs/run").exists()
    else:
        assert RunFolder.open("runs/run").load().steps == 64


def test_more_steps_can_be_trained_than_were_planned(copied):
    assert main(["resume", str(copied), "--steps", "64", "--eval-episodes", "0"]) == 0
    assert steps_of(copied) == [64, 128, 192]


def test_resume_says_loudly_what_it_skipped(copied, capsys):
    newest = RunFolder.open(copied).checkpoints()[0]
    newest.write_bytes(newest.read_bytes()[:-50])
    (copied / "final.safetensors").write_bytes(b"")
    assert main(["resume", str(copied), "--eval-episodes", "0"]) == 0
    err = capsys.readouterr().err
    assert f"ppo: warning: skipped a checkpoint: {newest}" in err
    assert "going on from 64 to 128 steps" in err
    assert steps_of(copied) == [64, 128]


def test_resume_says_what_differs_from_where_the_run_began(copied, capsys):
    for path in copied.rglob("*.safetensors"):
        edit_document(path, lambda document: document["machine"].update(threads="64"))
    assert main(["resume", str(copied), "--eval-episodes", "0"]) == 0
    err = capsys.readouterr().err
    assert err.count("ppo: warning: ") == 1
    assert "threads 64 (here 1)" in err


def test_the_best_checkpoint_can_be_evaluated(copied, capsys):
    first, *_ = RunFolder.open(copied).checkpoints()[::-1]
    edit_document(first, lambda document: document.update(recent_episodes=[[10.0**6, 10, 0]]))
    assert main(["evaluate", str(copied), "--best", "--episodes", "2"]) == 0
    best = capsys.readouterr().out
    result = PPOAgent.load(first).evaluate("CartPole-v1", 2)
    assert str(result) in best
    for path in RunFolder.open(copied).checkpoints():
        if path != first:
            path.write_bytes(b"")
    assert main(["evaluate", str(copied), "--best", "--episodes", "2"]) == 0


@pytest.mark.parametrize("command", ["resume", "evaluate", "play"])
def test_nothing_starts_from_scratch_in_silence(command, copied, capsys):
    for path in copied.rglob("*.safetensors"):
        path.write_bytes(b"nonsense")
    assert main([command, str(copied)]) == 1
    assert "no checkpoint of copy can be read" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="process groups")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_process_group_saves_the_run(signum):
    # A shell that starts the tests in the background has them ignore Ctrl-C, and their children.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    settings = ["steps=1e8", "num_workers=2", "num_envs=8", "num_steps=64"]
    command = ["train", "cartpole", *settings, "--name", "run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ppo", *command],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(ppo.__file__).parents[1]),
            "OMP_NUM_THREADS": "1",
        },
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert wait_until(lambda: len(RunFolder("runs/run").metrics()) >= 2, seconds=60.0)
        os.killpg(process.pid, signum)
        _, err = process.communicate(timeout=60.0)
    finally:
        signal.signal(signal.SIGINT, previous)
        process.kill()
    assert process.returncode == 128 + signum
    assert "ppo resume runs/run" in err
    assert "Traceback" not in err
    run = RunFolder.open("runs/run")
    saved = run.load(warn=pytest.fail).steps
    assert saved == run.metrics()[-1]["steps"]
    assert main(["resume", "runs/run", "--steps", "512", "--eval-episodes", "0"]) == 0
    assert steps_of("runs/run")[-1] == saved + 512


# The other commands


def test_evaluate_says_what_the_training_said(trained, capsys):
    assert main(["evaluate", str(trained), "--episodes", "2"]) == 0
    written = json.loads((trained / "evaluation.json").read_text())
    assert f"return {written['mean_return']:.1f} ± " in capsys.readouterr().out


def test_evaluate_takes_a_seed_and_may_sample(trained, capsys):
    lines = set()
    for options in ([], ["--seed", "1"], ["--stochastic"]):
        assert main(["evaluate", str(trained), "--episodes", "20", *options]) == 0
        lines.add(capsys.readouterr().out)
    assert len(lines) == 3


def test_play_shows_each_episode(trained, capsys, monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    assert main(["play", str(trained), "--episodes", "2", "--seed", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].split(" return ")[0] for line in lines] == [
        "episode 1:",
        "episode 2:",
    ]


@pytest.fixture
def _unseen(monkeypatch):
    """Playing opens no window."""
    unseen = contextlib.contextmanager(lambda config, warn: (yield config.env_factory()()))
    monkeypatch.setattr(commands, "open_window", unseen)


@pytest.mark.usefixtures("_unseen")
def test_play_takes_the_likeliest_actions_unless_asked_to_sample(trained, capsys):
    lengths = []
    for options in ([], ["--stochastic"]):
        assert main(["play", str(trained), "--episodes", "5", "--seed", "0", *options]) == 0
        lengths.append(re.findall(r"(\d+) steps", capsys.readouterr().out))
    agent = RunFolder.open(trained).load()
    env = gymnasium.make("CartPole-v1")
    expected = play(lambda obs, mask, state: (agent.act(obs), None), env, 5, seed=0)
    assert lengths[0] == [str(episode.episode_length) for episode in expected]
    assert lengths[1] != lengths[0]


@pytest.mark.usefixtures("_unseen")
@pytest.mark.parametrize("setting", ["memory=gru", "memory=null", "frame_stack=2"])
def test_play_keeps_the_policys_state_and_takes_legal_actions(setting, capsys, register):
    register("Maze-v0", MaskedTMaze)
    settings = [*TINY, "env=Maze-v0", f"policy.{setting}"]
    assert main(["train", "cartpole", *settings, "--name", "run", "--eval-episodes", "2"]) == 0
    capsys.readouterr()
    assert main(["play", "runs/run", "--episodes", "20", "--seed", "0", "--stochastic"]) == 0
    returns = re.findall(r"return (\S+),", capsys.readouterr().out)
    assert len(returns) == 20
    assert all(float(paid) >= 0.0 for paid in returns)  # what is illegal costs 1


def test_play_records_a_video(trained, capsys):
    pytest.importorskip("moviepy")
    assert main(["play", str(trained), "--video", "out.mp4", "--seed", "0"]) == 0
    assert "video: out.mp4" in capsys.readouterr().out
    assert Path("out.mp4").stat().st_size > 0


def test_export_writes_both_files_into_the_run_folder(copied, capsys):
    assert main(["export", str(copied)]) == 0
    written = [copied / "policy.onnx", copied / "policy.pt2"]
    assert capsys.readouterr().out == "".join(f"exported: {path}\n" for path in written)
    assert all(path.stat().st_size > 0 for path in written)


def test_a_missing_extra_is_named(trained, capsys, monkeypatch):
    for package, command, extra in (
        ("matplotlib", ["plot", str(trained)], "ppo-gae[plot]"),
        ("moviepy", ["play", str(trained), "--video", "a.mp4"], "ppo-gae[video]"),
        ("onnxscript", ["export", str(trained), "--out", "a.onnx"], "ppo-gae[export]"),
    ):
        for name in [name for name in sys.modules if name.partition(".")[0] == package]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.setitem(sys.modules, package, None)
        assert main(command) == 1
        assert extra in capsys.readouterr().err


def test_training_needs_no_extra(monkeypatch, capsys):
    names = [name for name in sys.modules if name.partition(".")[0] in ("matplotlib", "moviepy")]
    for name in [*names, "matplotlib", "moviepy", "torch.utils.tensorboard"]:
        monkeypatch.setitem(sys.modules, name, None)
    assert main([*TRAIN, "--name", "run", "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert not Path("runs/run/curve.png").exists()


def test_plot_draws_one_run_into_its_folder_and_several_here(copied, capsys):
    (copied / "curve.png").unlink()
    assert main(["plot", str(copied)]) == 0
    assert (copied / "curve.png").is_file()
    assert main(["plot", str(copied), str(copied)]) == 0
    assert Path("curves.png").is_file()
    assert main(["plot", str(copied), "--out", "picture.svg"]) == 0
    assert Path("picture.svg").read_text().startswith("<?xml")
    assert capsys.readouterr().out.splitlines()[-1] == "picture: picture.svg"


def test_configs_lists_what_is_shipped(capsys):
    assert main(["configs"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == list(tuned_names())
    for name, env, steps in rows:
        assert PPOConfig.tuned(env) == PPOConfig.tuned(name)
        assert PPOConfig.tuned(name).steps == int(steps.replace(",", ""))


def test_help_and_version_end_well(capsys):
    assert main(["--help"]) == 0
    assert "ppo train pendulum" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ppo {ppo.__version__}\n"


def test_a_reader_that_leaves_early_is_no_error():
    # `ppo configs | head -0`
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-m", "ppo", "configs"],
        env={**os.environ, "PYTHONPATH": str(Path(ppo.__file__).parents[1])},
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert result.stderr == ""
