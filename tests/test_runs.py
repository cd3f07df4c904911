"""Run folders: what stands in them, what is kept, and what a resumed run finds."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from forging import edit_document

from ppo import PPOAgent, PPOConfig, PPOError
from ppo.checkpoint import fingerprint, read_checkpoint
from ppo.cli import main
from ppo.cli.runs import RunFolder, target_return
from ppo.errors import CheckpointError
from ppo.rollout import Episode

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
    kept = {"step-000000320.safetensors", "step-000000256.safetensors", run.best().name}
    assert {path.name for path in run.checkpoints()} == kept
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
    assert copied.checkpoints()[0].name == "step-000000128.safetensors"
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


# The best checkpoint


def save_with_return(run, agent, steps, episode_return):
    """Save the agent as if it had these steps and, unless None, just played such an episode."""
    agent.steps = steps
    agent._recent.clear()
    if episode_return is not None:
        agent._recent.append(Episode(episode_return, 10, 0))
    return run.save(agent)


def kept(run):
    return [int(path.name[5:14]) for path in run.checkpoints()]


@pytest.fixture
def scored(tmp_path, trained):
    """A folder that keeps two, and a function that saves into it."""
    run = RunFolder.create(CONFIG, out=tmp_path)
    run.keep = 2
    agent = trained.load()
    return run, lambda steps, score: save_with_return(run, agent, steps, score)


def test_the_latest_and_the_best_are_kept(scored):
    run, save = scored
    history = []
    for steps, score in [(10, 1.0), (20, 7.0), (30, 3.0), (40, 2.0), (50, 6.0), (60, 8.0), (70, 0)]:
        save(steps, score)
        history.append((kept(run), run.best().name[-14:-12]))
    assert history == [
        ([10], "10"),
        ([20, 10], "20"),
        ([30, 20], "20"),
        ([40, 30, 20], "20"),
        ([50, 40, 20], "20"),
        ([60, 50], "60"),
        ([70, 60], "60"),
    ]


def test_a_resumed_run_remembers_which_is_the_best(scored):
    run, save = scored
    for steps, score in [(10, 9.0), (20, 1.0), (30, 2.0), (40, 3.0)]:
        save(steps, score)
    again = RunFolder.open(run.path)
    again.keep = 2
    agent = again.resume()
    save_with_return(again, agent, 50, 4.0)
    assert kept(again) == [50, 40, 10]
    assert again.load(best=True).steps == 10
    assert again.load().steps == 50


def test_of_equals_the_latest_is_the_best(scored):
    run, save = scored
    for steps in (10, 20, 30):
        save(steps, 5.0)
    assert run.best().name == "step-000000030.safetensors"


def test_without_a_finished_episode_nothing_is_the_best(scored):
    run, save = scored
    for steps in (10, 20, 30):
        save(steps, None)
    assert run.best() is None
    assert kept(run) == [30, 20]
    with pytest.raises(CheckpointError, match="no checkpoint with a finished episode"):
        run.load(best=True)
    save(40, -5.0)
    assert run.load(best=True).steps == 40


def test_a_checkpoint_that_is_written_again_is_scored_again(scored):
    run, save = scored
    save(10, 9.0)
    save(20, 5.0)
    save(10, 1.0)
    assert run.best().name == "step-000000020.safetensors"


def test_a_damaged_checkpoint_is_not_the_best(scored):
    run, save = scored
    save(10, 9.0)
    save(20, 5.0)
    damage(run.checkpoints()[1])
    again = RunFolder.open(run.path)
    assert again.load(best=True).steps == 20


def test_the_best_is_one_to_go_back_to_when_all_later_ones_are_damaged(scored):
    run, save = scored
    for steps, score in [(10, 9.0), (20, 1.0), (30, 2.0), (40, 3.0)]:
        save(steps, score)
    for path in run.checkpoints()[:2]:
        damage(path)
    messages = []
    assert RunFolder.open(run.path).resume(warn=messages.append).steps == 10
    assert "going back to 10 steps" in messages[-1]


# Folders that somebody has been at


def test_a_checkpoint_under_another_number_is_skipped_loudly(copied):
    newest = copied.checkpoints()[0]
    shutil.copy(copied.checkpoints()[2], newest.with_name("step-999999999.safetensors"))
    messages = []
    assert copied.load(warn=messages.append).steps == 192
    assert "step-999999999.safetensors is not what its name says" in messages[0]


LINKABLE = [
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "metrics.csv",
    "checkpoints",
    "checkpoints/step-000000192.safetensors",
    "tensorboard",
    "tensorboard/events",
    "final.safetensors",
    "evaluation.json",
    "curve.png",
]


@pytest.mark.parametrize("name", LINKABLE)
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_folder_is_refused_and_nothing_outside_moves(
    copied, tmp_path, name, relative
):
    inside, outside = copied.path / name, tmp_path / "outside"
    outside.mkdir()
    target = outside / inside.name
    if inside.exists():
        shutil.move(inside, target)
    elif name == "tensorboard":
        target.mkdir()
    else:
        target.write_text("mine")
        inside.parent.mkdir(exist_ok=True)
    inside.symlink_to(os.path.relpath(target, inside.parent) if relative else target)
    before = contents(tmp_path)
    with pytest.raises(PPOError, match="leads out of the run folder"):
        RunFolder.open(copied.path)
    for command in ("resume", "evaluate", "play", "plot"):
        assert main([command, str(copied.path)]) == 1
    assert contents(tmp_path) == before


def test_a_link_to_itself_is_refused(copied):
    (copied.path / "metrics.jsonl").unlink()
    (copied.path / "metrics.jsonl").symlink_to("metrics.jsonl")
    with pytest.raises(PPOError, match="link"):
        RunFolder.open(copied.path)


def test_a_link_to_the_folder_and_links_inside_of_it_are_no_trouble(copied, tmp_path):
    (tmp_path / "latest").symlink_to(copied.path)
    shutil.move(copied.path / "checkpoints", copied.path / "more")
    (copied.path / "checkpoints").symlink_to("more")
    assert RunFolder.open(tmp_path / "latest").resume().steps == 192


def test_what_is_planted_as_a_temporary_file_is_not_written_through(copied, tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("mine")
    run = RunFolder.open(copied.path)
    names = ["run.json", "metrics.jsonl", "metrics.csv", "evaluation.json", "final.safetensors"]
    for name in [*names, "checkpoints/step-000000192.safetensors"]:
        path = copied.path / name
        for temporary in (f".{path.name}.tmp", f".{path.name}.{os.getpid()}.tmp"):
            (path.parent / temporary).symlink_to(outside)
    with run:
        agent = run.load()
        run.finish(agent)
        run.resume()
        run.save_evaluation(agent.evaluate(CONFIG.env, 1))
    assert outside.read_text() == "mine"


@pytest.mark.parametrize("name", ["final.safetensors", "checkpoints/step-000000999.safetensors"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(copied, name):
    os.mkfifo(copied.path / name)
    messages = []
    assert copied.load(warn=messages.append).steps == 192
    assert all("is not a file" in message for message in messages[:1])
    (copied.path / "metrics.jsonl").unlink()
    os.mkfifo(copied.path / "metrics.jsonl")
    assert RunFolder.open(copied.path).metrics() == []


def test_what_resume_does_is_in_the_checkpoint_and_not_in_the_other_files(copied):
    for name in ("config.yaml", "run.json"):
        (copied.path / name).write_text("!!python/object/apply:os.system ['true']")
    agent = RunFolder.open(copied.path).resume()
    assert agent.config == CONFIG
    assert agent.steps == 192


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, "\xff"])
def test_a_run_json_that_is_no_object_is_named(copied, text):
    (copied.path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PPOError, match=r"run\.json is damaged"):
        _ = copied.info


# The machine


def test_the_folder_and_every_checkpoint_know_the_machine(trained):
    assert trained.info["machine"] == fingerprint()["machine"]
    _, document = read_checkpoint(trained.checkpoints()[0])
    assert {"versions": document["versions"], "machine": document["machine"]} == fingerprint()


def test_resuming_elsewhere_is_said_once(copied):
    for path in copied.checkpoints():
        edit_document(path, lambda document: document["machine"].update(cpu="Abacus"))
    messages = []
    copied.resume(warn=messages.append)
    (message,) = messages
    assert "cpu Abacus" in message
    with pytest.warns(UserWarning, match="cpu Abacus") as caught:
        copied.load()
    assert len(caught) == 1


def test_the_target_is_the_configured_return_or_gymnasiums_threshold():
    assert target_return(CONFIG) == 475.0
    assert target_return(CONFIG.replace(target_return=-200.0)) == -200.0
    assert target_return(CONFIG.replace(env="Pendulum-v1")) is None
    assert target_return(CONFIG.replace(env="Unknown-v0")) is None
    assert target_return(PPOConfig()) is None


def test_a_run_that_keeps_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep"):
        RunFolder(tmp_path, keep=0)
