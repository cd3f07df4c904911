"""Every example runs, at a small size. The custom loop is the README's and runs there."""

import runpy
from pathlib import Path

import pytest

from ppo import PPOAgent

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = ["--steps", "512", "--episodes", "2"]
ARGUMENTS = {
    "quickstart": SMALL,
    "custom_environment": [*SMALL, "--workers", "2"],
    # Long enough for an episode to end: only then is there a best policy.
    "continuous_control": ["--steps", "4096", "--episodes", "2"],
    "memory": SMALL,
    "multi_agent": SMALL,
    "pixels": SMALL,
    "soak": ["--minutes", "0.05", "--every", "1", "--episodes", "2"],
    "run_ppo": ["small.yaml", "num_epochs=1", "--episodes", "2", "--play"],
}
SETTINGS = "{env: CartPole-v1, steps: 512, num_envs: 2, num_steps: 64}"


@pytest.fixture
def run_example(tmp_path, monkeypatch, capsys):
    """Run an example in a folder of its own and return what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    (tmp_path / "small.yaml").write_text(SETTINGS, encoding="utf-8")

    def run(name):
        path = str(EXAMPLES / f"{name}.py")
        monkeypatch.setattr("sys.argv", [path, *ARGUMENTS[name]])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_example_runs(name, run_example):
    assert "over 2 episodes" in run_example(name)


def test_every_example_is_run():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*ARGUMENTS, "custom_loop"}


def test_the_yaml_runner_applies_overrides_and_leaves_a_checkpoint(run_example, tmp_path):
    run_example("run_ppo")
    agent = PPOAgent.load(tmp_path / "agent.safetensors")
    assert (agent.steps, agent.config.num_epochs) == (512, 1)
