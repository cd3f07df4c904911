"""Learning curves: what is drawn is what was logged."""

import json
import sys

import numpy as np
import pytest

from ppo import PPOConfig, PPOError
from ppo.cli.plotting import plot_runs
from ppo.cli.runs import RunFolder
from ppo.errors import MissingExtraError

pytest.importorskip("matplotlib")

from matplotlib.axes import Axes

CONFIG = PPOConfig(env="CartPole-v1", steps=1000)


def make_run(out, returns, config=CONFIG, seed=0, episodes_per_row=4):
    """A run whose rows are 100 steps apart and whose episodes return the given numbers."""
    run = RunFolder.create(config, seed=seed, out=out)
    lines = [
        {
            "steps": 100 * (index + 1),
            "seconds": 1.0,
            "episodes": [[value, 25, 0]] * episodes_per_row,
        }
        for index, value in enumerate(returns)
    ]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def drawn(monkeypatch):
    """Lines and bands as they are drawn, by label."""
    lines, bands = {}, []
    plot, fill = Axes.plot, Axes.fill_between

    def spy_plot(self, x, y, *args, **kwargs):
        lines[kwargs.get("label")] = (np.asarray(x), np.asarray(y))
        return plot(self, x, y, *args, **kwargs)

    def spy_fill(self, x, low, high, **kwargs):
        bands.append((np.asarray(low), np.asarray(high)))
        return fill(self, x, low, high, **kwargs)

    monkeypatch.setattr(Axes, "plot", spy_plot)
    monkeypatch.setattr(Axes, "fill_between", spy_fill)
    return lines, bands


def test_a_single_run_shows_every_episode_and_a_running_mean(tmp_path, drawn):
    lines, bands = drawn
    path = plot_runs([make_run(tmp_path, [1.0, 2.0, 3.0])], tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    steps, returns = lines["single episodes"]
    assert steps.tolist() == [25 * count for count in range(1, 13)]
    assert returns.tolist() == [1.0] * 4 + [2.0] * 4 + [3.0] * 4
    assert "running mean" in lines
    assert not bands


def test_the_running_mean_of_equal_returns_is_that_return(tmp_path, drawn):
    lines, _ = drawn
    plot_runs([make_run(tmp_path, [7.5] * 20)], tmp_path / "curve.png")
    np.testing.assert_allclose(lines["running mean"][1], 7.5)


def test_the_running_mean_is_the_mean_of_the_episodes_in_its_window(tmp_path, drawn):
    lines, _ = drawn
    returns = np.random.default_rng(0).normal(size=60)
    plot_runs([make_run(tmp_path, returns, episodes_per_row=25)], tmp_path / "curve.png")
    steps, values = lines["single episodes"]
    half = 0.5 * 0.05 * steps[-1]
    points, means = lines["running mean"]
    for point, mean in zip(points, means, strict=True):
        inside = np.abs(steps - point) <= half
        assert inside.sum() >= 10
        assert mean == pytest.approx(values[inside].mean())


def test_the_running_mean_is_over_ten_episodes_at_least(tmp_path, drawn):
    lines, _ = drawn
    plot_runs([make_run(tmp_path, np.arange(30.0), episodes_per_row=1)], tmp_path / "c.png")
    assert lines["running mean"][1][0] == np.arange(10.0).mean()
    assert lines["running mean"][1][-1] == np.arange(20.0, 30.0).mean()


def test_seeds_of_one_configuration_are_a_mean_within_a_band(tmp_path, drawn):
    lines, bands = drawn
    runs = [make_run(tmp_path, [value] * 10, seed=seed) for seed, value in enumerate((1, 2, 6))]
    plot_runs(runs, tmp_path / "curves.png")
    ((low, high),) = bands
    np.testing.assert_allclose(low, 1.0)
    np.testing.assert_allclose(high, 6.0)
    (label,) = lines
    assert "3 runs" in label
    np.testing.assert_allclose(lines[label][1], 3.0)


def test_seeds_are_compared_only_where_all_of_them_have_been(tmp_path, drawn):
    lines, _ = drawn
    runs = [make_run(tmp_path, [1.0] * count, seed=count) for count in (5, 9)]
    plot_runs(runs, tmp_path / "curves.png")
    ((steps, _),) = lines.values()
    assert steps[-1] == 500


def test_workers_and_target_make_no_other_experiment(tmp_path, drawn):
    lines, _ = drawn
    configs = [CONFIG, CONFIG.replace(num_workers=2), CONFIG.replace(target_return=400.0)]
    runs = [make_run(tmp_path, [1.0] * 5, config) for config in configs]
    plot_runs(runs, tmp_path / "curves.png")
    (label,) = lines
    assert "3 runs" in label


def test_configurations_are_told_apart_by_the_settings_that_differ(tmp_path, drawn):
    lines, _ = drawn
    policy = CONFIG.policy
    configs = [
        CONFIG,
        CONFIG.replace(gamma=0.5),
        CONFIG.replace(policy=type(policy)(activation="relu")),
    ]
    plot_runs([make_run(tmp_path, [1.0] * 5, c) for c in configs], tmp_path / "curves.png")
    assert set(lines) == {
        "gamma=0.99, policy.activation=tanh",
        "gamma=0.5, policy.activation=tanh",
        "gamma=0.99, policy.activation=relu",
    }


def test_environments_are_told_apart_by_their_ids(tmp_path, drawn):
    lines, _ = drawn
    configs = [CONFIG, PPOConfig.tuned("pendulum")]
    plot_runs([make_run(tmp_path, [1.0] * 5, c) for c in configs], tmp_path / "curves.png")
    assert set(lines) == {"CartPole-v1", "Pendulum-v1"}


def test_labels_that_would_be_too_long_or_the_same_are_folder_names(tmp_path, drawn):
    lines, _ = drawn
    configs = [CONFIG, CONFIG.replace(gamma=0.5), PPOConfig.tuned("pendulum")]
    runs = [make_run(tmp_path, [1.0] * 5, c) for c in configs]
    plot_runs(runs, tmp_path / "curves.png")
    assert set(lines) == {run.path.name for run in runs}


def test_the_target_return_is_drawn_where_there_is_one(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **kwargs: drawn.append(y))
    plot_runs([make_run(tmp_path, [1.0])], tmp_path / "a.png")
    pendulum = PPOConfig(env="Pendulum-v1")
    plot_runs([make_run(tmp_path, [1.0], pendulum)], tmp_path / "b.png")
    plot_runs(
        [make_run(tmp_path, [1.0], pendulum.replace(target_return=-200.0))], tmp_path / "c.png"
    )
    assert drawn == [475.0, -200.0]


def test_a_run_without_an_episode_cannot_be_drawn(tmp_path):
    with pytest.raises(PPOError, match="no episode has finished"):
        plot_runs([make_run(tmp_path, [1.0], episodes_per_row=0)], tmp_path / "curve.png")
    assert not (tmp_path / "curve.png").exists()


def test_an_unknown_format_is_named(tmp_path):
    with pytest.raises(PPOError, match=r"curve\.xyz"):
        plot_runs([make_run(tmp_path, [1.0])], tmp_path / "curve.xyz")


def test_no_run_at_all_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plot_runs([], tmp_path / "curve.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"ppo-gae\[plot\]"):
        plot_runs([make_run(tmp_path, [1.0])], tmp_path / "curve.png")
