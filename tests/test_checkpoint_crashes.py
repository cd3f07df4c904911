"""A run's folder after crashes, kills and full disks, in processes of their own."""

import shutil
import sys

import pytest
from processes import run_script

from ppo import PPOAgent, PPOConfig
from ppo._files import remove_leftovers, replace_file
from ppo.cli import main
from ppo.cli.runs import RunFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="fork, kill and limits")

CONFIG = PPOConfig(
    env="CartPole-v1",
    steps=256,
    num_envs=2,
    num_steps=32,
    num_epochs=1,
    num_workers=0,
    policy={"hidden_sizes": [4]},
)
# Scripts fork: what they need is imported once, and no thread is there to be lost.
HEAD = """
import os, random, resource, shutil, signal, sys, time, traceback
sys.modules["torch.utils.tensorboard"] = None
from pathlib import Path
import pytest
from breaking import break_at
from ppo import PPOAgent, Report
from ppo.cli.runs import RunFolder
from ppo.errors import CheckpointError

def fail(text):
    raise AssertionError(text)

def in_a_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def break_at_every_call(action, check):
    number, code = 0, None
    while code != 0:
        def broken():
            break_at(pytest.MonkeyPatch(), number, lambda: os._exit(9))
            action()
        code = in_a_child(broken)
        assert code in (0, 9), code
        check(number, finished=code == 0)
        number += 1
    print(number)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with checkpoints at 64, 128 and 192 steps; the agent of 256 steps is in a file."""
    with RunFolder.create(CONFIG, out=tmp_path_factory.mktemp("runs"), name="run") as run:
        run.checkpoint_seconds = 0.0
        agent = PPOAgent(config=CONFIG, logger=run.log)
        agent.learn(
            CONFIG.env, 256, callback=lambda report: report.steps < 256 and run.checkpoint(agent)
        )
    agent.save(run.path.parent / "newest.safetensors")
    assert [path.name[-15:-12] for path in run.checkpoints()] == ["192", "128", "064"]
    return run


@pytest.fixture
def script(tmp_path):
    def script(code, *arguments):
        status, out, err = run_script(tmp_path / "script.py", HEAD + code, *arguments)
        assert status == 0, err
        print(out)
        return out

    return script


SAVE = """
template, folder, newest = map(Path, sys.argv[1:])
agent = PPOAgent.load(newest)

def save():
    run = RunFolder.open(folder)
    run.keep = 1
    run.save(agent)

def check(number, finished):
    run = RunFolder.open(folder)
    names = [path.name for path in run.checkpoints()]
    assert names[0] in ("step-000000192.safetensors", "step-000000256.safetensors"), names
    resumed = run.resume(warn=fail)
    assert f"step-{resumed.steps:09d}.safetensors" == names[0]
    assert [row["steps"] for row in run.metrics()] == list(range(64, resumed.steps + 1, 64))
    assert not list(folder.rglob("*.tmp"))
    if finished:
        best = run.best()
        assert set(run.checkpoints()) == {run.checkpoints()[0], best}, run.checkpoints()
    shutil.rmtree(folder)
    shutil.copytree(template, folder)

shutil.copytree(template, folder)
break_at_every_call(save, check)
"""


def test_a_process_that_ends_at_any_call_of_a_save_leaves_a_run_that_goes_on(run, script, tmp_path):
    newest = run.path.parent / "newest.safetensors"
    # Opened, written, flushed, synced, renamed, the folder synced, older ones removed.
    assert int(script(SAVE, run.path, tmp_path / "run", newest)) > 10


RESUME = """
template, folder = map(Path, sys.argv[1:])

def copy():
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    newest = RunFolder.open(folder).checkpoints()[0]
    newest.write_bytes(newest.read_bytes()[:-1])
    (folder / "checkpoints" / ".step-000000192.safetensors.12.tmp").write_bytes(b"half")

def resume():
    RunFolder.open(folder).resume(warn=lambda text: None)

def state():
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*") if path.is_file()
    }

copy()
assert in_a_child(resume) == 0
wanted = state()
assert "checkpoints/step-000000192.safetensors.skipped" in wanted

def check(number, finished):
    resume()
    assert state() == wanted, number
    copy()

copy()
break_at_every_call(resume, check)
"""


def test_a_resume_that_ends_at_any_call_is_made_good_by_the_next(run, script, tmp_path):
    assert int(script(RESUME, run.path, tmp_path / "run")) > 15


KILL = """
folder = Path(sys.argv[1])
rng = random.Random(0)
hits = 0

def save_for_ever(agent, run, pipe):
    while True:
        agent.steps += 64
        agent.updates += 1
        metrics = {"episode_return": 1.0}
        run.log(
            Report(steps=agent.steps, goal=0, updates=agent.updates, metrics=metrics, episodes=())
        )
        run.save(agent)
        os.write(pipe, agent.steps.to_bytes(8, "little"))

run = RunFolder.open(folder)
agent = run.resume(warn=fail)
for _ in range(60):
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            save_for_ever(agent, run, writer)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    saved = int.from_bytes(os.read(reader, 8), "little")
    time.sleep(rng.uniform(0.0, 0.02))
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    while data := os.read(reader, 8):
        saved = int.from_bytes(data, "little")
    os.close(reader)
    hits += bool(list(folder.rglob("*.tmp")))
    run = RunFolder.open(folder)
    agent = run.resume(warn=fail)
    assert agent.steps in (saved, saved + 64), (agent.steps, saved)
    assert [row["steps"] for row in run.metrics()] == list(range(64, agent.steps + 1, 64))
    assert not list(folder.rglob("*.tmp"))
print(hits)
"""


def test_sixty_kills_in_a_loop_of_saves_lose_nothing_that_was_saved(run, script, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    hits = int(script(KILL, tmp_path / "run"))
    assert hits > 0  # some were in the middle of a file


@pytest.fixture
def unmeasured(monkeypatch):
    """A coverage measurement cannot write its own files where files have a limit."""
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG"):
        monkeypatch.delenv(name, raising=False)


FULL = """
folder, newest = map(Path, sys.argv[1:])
agent = PPOAgent.load(newest)

def contents():
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

before = contents()

def save(limit):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    with pytest.raises(CheckpointError, match="cannot be written"):
        RunFolder.open(folder).save(agent)

size = newest.stat().st_size
for limit in (0, 1, 8, 1000, size // 2, size - 1):
    assert in_a_child(lambda: save(limit)) == 0
    assert contents() == before
"""


@pytest.mark.usefixtures("unmeasured")
def test_a_full_disk_is_an_error_and_changes_no_file(run, script, tmp_path):
    shutil.copytree(run.path, tmp_path / "run")
    script(FULL, tmp_path / "run", run.path.parent / "newest.safetensors")


TRAIN = """
import resource, sys
sys.modules["torch.utils.tensorboard"] = None
from ppo.cli import main

limit, config, out = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
sys.exit(main(["train", config, "steps=6400", "--out", out, "--name", "run"]))
"""


@pytest.fixture
def train(run, unmeasured, tmp_path):
    def train(limit):
        config = run.path / "config.yaml"
        return run_script(tmp_path / "train.py", TRAIN, limit, config, tmp_path)

    return train


def test_a_disk_that_is_full_of_metrics_ends_the_run_which_then_goes_on(train, tmp_path, capsys):
    status, _, err = train(30_000)
    assert status == 1
    assert f"ppo: error: the metrics in {tmp_path / 'run'} cannot be written" in err
    assert "Traceback" not in err
    # The last row is half a row.
    assert not (tmp_path / "run/metrics.jsonl").read_text().endswith("\n")
    stopped = RunFolder.open(tmp_path / "run").load(warn=pytest.fail).steps
    assert stopped > 64
    more = ["--steps", "128", "--eval-episodes", "0", "--quiet"]
    assert main(["resume", str(tmp_path / "run"), *more]) == 0
    rows = RunFolder.open(tmp_path / "run").metrics()
    # What the disk did not take of the last update is not there; nothing else is missing.
    steps = [*range(64, stopped, 64), stopped + 64, stopped + 128]
    assert [row["steps"] for row in rows] == steps
    table = (tmp_path / "run/metrics.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in table] == ["steps", *map(str, steps)]


def test_a_disk_that_is_full_of_the_first_checkpoint_says_so(train, tmp_path, capsys):
    status, _, err = train(2_000)
    assert status == 1
    assert "safetensors cannot be written" in err
    assert "Traceback" not in err
    assert main(["resume", str(tmp_path / "run")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err


# Files in general


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    link = tmp_path / "link"
    link.symlink_to(outside)
    replace_file(link, b"new")
    assert link.read_bytes() == b"new"
    assert not link.is_symlink()
    assert outside.read_bytes() == b"mine"


def test_a_link_in_place_of_the_temporary_file_is_not_followed(tmp_path, monkeypatch):
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    monkeypatch.setattr("os.getpid", lambda: 12)
    (tmp_path / ".file.12.tmp").symlink_to(outside)
    replace_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert outside.read_bytes() == b"mine"


def test_only_what_a_killed_write_left_is_a_leftover(tmp_path):
    names = [".a.safetensors.12.tmp", ".a.tmp", "a.12.tmp", ".x.12.tmp.b"]
    for name in names:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
