"""Run folders: what stands in them, what is kept, and what a resumed run finds."""

import json
import shutil

import numpy as np
import pytest
import torch

from ppo import PPOAgent, PPOConfig, PPOError
from ppo.cli.runs import RunFolder, target_return
from ppo.errors import CheckpointError

CONFIG = PPOConfig(env="CartPole-v1", steps=192, num_envs=2, num_steps=32, num_epochs=1)


def train(run, steps, config=CONFIG):
    agent = PPOAgent(config=config, logger=run.log)
    agent.learn(config.env, steps, callback=lambda report: run.checkpoint(agent))
    return agent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three updates with a checkpoint after each; tests that change it take a copy."""
    with RunFolder.create(CONFIG, out=tmp_path_factory.mktemp("runs"), seed=0) as run:
        run.checkpoint_seconds = 0.0
        train(run, 192)
    return run


@pytest.fixture
def copied(trained, tmp_path):
    return RunFolder.open(shutil.copytree(trained.path, tmp_path / "copy"))


def damage(path):
    path.write_bytes(path.read_bytes()[:500])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_folder_says_how_the_run_was_started(tmp_path):
    run = RunFolder.create(CONFIG, seed=7, out=tmp_path, stem="pole", command=["ppo", "train"])
    assert run.path.parent == tmp_path
    assert run.path.name.startswith("pole-")
    assert run.path.name.endswith("-seed7")
    assert run.config == CONFIG
    assert run.info["seed"] == 7
    assert run.info["command"] == ["ppo", "train"]
    assert run.info["versions"]["torch"] == torch.__version__


def test_two_runs_of_the_same_second_get_two_folders(tmp_path):
    paths = {RunFolder.create(CONFIG, out=tmp_path, stem="pole").path for _ in range(5)}
    assert len(paths) == 5


def test_an_id_with_a_slash_stays_inside_the_folder_for_runs(tmp_path):
    run = RunFolder.create(CONFIG.replace(env="ALE/Pong-v5"), out=tmp_path)
    assert run.path.parent == tmp_path


def test_a_name_that_is_taken_is_never_written_over(tmp_path):
    RunFolder.create(CONFIG, out=tmp_path, name="mine")
    before = (tmp_path / "mine" / "config.yaml").read_text()
    with pytest.raises(PPOError, match="exists already"):
        RunFolder.create(CONFIG.replace(gamma=0.5), out=tmp_path, name="mine")
    assert (tmp_path / "mine" / "config.yaml").read_text() == before


@pytest.mark.parametrize("name", ["a/b", "..", "/etc", "", "."])
def test_a_name_cannot_leave_the_folder_for_runs(tmp_path, name):
    with pytest.raises(PPOError, match="plain folder name"):
        RunFolder.create(CONFIG, out=tmp_path / "runs", name=name)
    assert not any(tmp_path.iterdir())


def test_what_is_no_run_folder_cannot_be_opened(tmp_path):
    with pytest.raises(PPOError, match="no run folder"):
        RunFolder.open(tmp_path)
    with pytest.raises(PPOError, match="no such folder"):
        RunFolder.open(tmp_path / "missing")


def test_a_damaged_run_json_is_named(copied):
    (copied.path / "run.json").write_text("{")
    with pytest.raises(PPOError, match=r"run\.json is damaged"):
        _ = copied.info


def test_the_newest_checkpoint_is_loaded(trained):
    assert [path.name for path in trained.checkpoints()] == [
        f"step-{steps:09d}.safetensors" for steps in (192, 128, 64)
    ]
    assert trained.load().steps == 192


def test_old_checkpoints_are_removed_and_foreign_files_are_not(tmp_path):
    with RunFolder.create(CONFIG, out=tmp_path) as run:
        run.checkpoint_seconds = 0.0
        run.keep = 2
        (run.path / "checkpoints").mkdir()
        foreign = run.path / "checkpoints" / "step-best.safetensors"
        foreign.write_text("mine")
        train(run, 5 * 64)
    assert [path.name[5:14] for path in run.checkpoints()] == ["000000320", "000000256"]
    assert foreign.read_text() == "mine"


def test_the_first_update_is_kept_and_the_next_ones_wait_their_time(tmp_path):
    with RunFolder.create(CONFIG, out=tmp_path) as run:
        run.checkpoint_seconds = 1e9
        train(run, 192)
    assert [path.name for path in run.checkpoints()] == ["step-000000064.safetensors"]


def test_a_damaged_checkpoint_is_skipped_loudly(copied):
    damage(copied.checkpoints()[0])
    messages = []
    assert copied.load(warn=messages.append).steps == 128
    assert "step-000000192" in messages[0]
    assert "128 steps" in messages[1]


def test_skipping_warns_where_nobody_asked_to_be_told(copied):
    damage(copied.checkpoints()[0])
    with pytest.warns(UserWarning, match="step-000000192|going back"):
        copied.load()


def test_nothing_starts_from_scratch_when_no_checkpoint_is_whole(copied):
    for path in copied.checkpoints():
        damage(path)
    before = contents(copied.path)
    with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be read"):
        copied.resume()
    assert contents(copied.path) == before


def test_a_run_without_a_checkpoint_is_an_error(tmp_path):
    run = RunFolder.create(CONFIG, out=tmp_path)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run.load()


def test_the_final_agent_stands_in_for_lost_checkpoints(copied):
    copied.finish(copied.load())
    shutil.rmtree(copied.path / "checkpoints")
    assert copied.load().steps == 192


def test_a_resumed_run_has_every_row_once(copied):
    damage(copied.checkpoints()[0])
    agent = copied.resume(warn=lambda text: None)
    with copied:
        agent.learn(CONFIG.env, 128)
    assert [row["steps"] for row in copied.metrics()] == [64, 128, 192, 256]
    table = np.genfromtxt(copied.path / "metrics.csv", delimiter=",", names=True)
    assert table["steps"].tolist() == [64, 128, 192, 256]
    assert table["updates"].tolist() == [1, 2, 3, 4]


def test_seconds_go_on_where_a_resumed_run_left_off(copied):
    rows = [{**row, "seconds": 1000.0} for row in copied.metrics()]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (copied.path / "metrics.jsonl").write_text(text)
    with RunFolder.open(copied.path) as run:
        run.resume().learn(CONFIG.env, 64)
    assert run.metrics()[-1]["seconds"] >= 1000.0
    assert run.seconds == run.metrics()[-1]["seconds"]


def test_resuming_sets_skipped_checkpoints_aside_so_that_new_ones_are_kept(copied):
    for path in copied.checkpoints()[:2]:
        damage(path)
    agent = copied.resume(warn=lambda text: None)
    copied.keep = 1
    with copied:
        agent.learn(CONFIG.env, 64, callback=lambda report: copied.save(agent))
    assert [path.name for path in copied.checkpoints()] == ["step-000000128.safetensors"]
    assert copied.load().steps == 128
    aside = sorted(path.name for path in (copied.path / "checkpoints").glob("*.skipped"))
    assert aside == [f"step-000000{steps}.safetensors.skipped" for steps in (128, 192)]


def test_discard_removes_a_folder_in_which_nothing_happened(tmp_path):
    run = RunFolder.create(CONFIG, out=tmp_path)
    run.discard()
    assert not run.path.exists()


def test_discard_keeps_a_folder_in_which_something_happened(copied):
    before = sorted(copied.path.rglob("*"))
    copied.discard()
    assert sorted(copied.path.rglob("*")) == before


def test_discard_keeps_what_others_put_there(tmp_path):
    run = RunFolder.create(CONFIG, out=tmp_path)
    (run.path / "notes.txt").write_text("mine")
    run.discard()
    assert (run.path / "notes.txt").read_text() == "mine"


def test_the_evaluation_is_written_whole(copied):
    result = copied.load().evaluate(CONFIG.env, 3)
    copied.save_evaluation(result, solved=False)
    written = json.loads((copied.path / "evaluation.json").read_text())
    assert written["mean_return"] == result.mean_return
    assert written["episode_returns"] == list(result.episode_returns)
    assert written["solved"] is False


def test_logging_and_checkpoints_change_nothing_in_the_training(trained):
    alone = PPOAgent(config=CONFIG).learn(CONFIG.env, 192)
    logged = trained.load()
    for name, value in alone.policy.state_dict().items():
        assert torch.equal(value, logged.policy.state_dict()[name]), name


def test_the_target_is_the_configured_return_or_gymnasiums_threshold():
    assert target_return(CONFIG) == 475.0
    assert target_return(CONFIG.replace(target_return=-200.0)) == -200.0
    assert target_return(CONFIG.replace(env="Pendulum-v1")) is None
    assert target_return(CONFIG.replace(env="Unknown-v0")) is None
    assert target_return(PPOConfig()) is None


def test_a_run_that_keeps_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        RunFolder(tmp_path, keep=0)
