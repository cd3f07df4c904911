"""Learning curves as pictures; matplotlib is imported when one is drawn, and not before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ppo.cli.folders import check_folder_of
from ppo.cli.runs import RunFolder, target_return
from ppo.errors import ConfigError, MissingExtraError, PPOError

__all__ = ["plot_runs"]

# Settings that do not make two runs different experiments.
_NEUTRAL = {"num_workers", "target_return"}
_POINTS = 400  # of a curve
_WINDOW = 0.05  # of a run: what a point of its curve is the mean of ...
_LEAST = 10  # ... but not of fewer episodes


class _Episodes(NamedTuple):
    """When the episodes of a run ended, and what they returned, in order."""

    steps: np.ndarray
    returns: np.ndarray


class _Group(NamedTuple):
    """Runs that differ in nothing but their seed."""

    settings: Mapping[str, Any]
    runs: list[RunFolder]
    episodes: list[_Episodes]


def plot_runs(runs: Sequence[RunFolder], path: str | Path) -> Path:
    """Draw the learning curves of some runs into one picture.

    A curve is the mean of the episodes around each point: a window of a twentieth of the run, and
    of ten episodes at least. A single run shows its episodes too. Of several, those that differ
    in nothing but their seed are drawn as their mean in a band from the lowest to the highest.

    Args:
        runs: At least one.
        path: Where the picture goes; the ending names the format (`.png`, `.svg`, `.pdf`).

    Returns:
        The path.

    Raises:
        MissingExtraError: matplotlib is not installed.
        ConfigError: The format is unknown, or the folder does not exist.
        PPOError: No episode has finished in one of the runs.
        ValueError: `runs` is empty.
    """
    if not runs:
        raise ValueError("runs must hold at least one run, got none")
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter
    except ImportError as error:
        raise MissingExtraError(
            "plotting needs matplotlib; install the extra: pip install 'ppo-gae[plot]'"
        ) from error
    check_folder_of(Path(path))
    groups = _group(runs)
    figure = Figure(figsize=(8.0, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for index, (group, label) in enumerate(zip(groups, _labels(groups), strict=True)):
        _draw(axes, group, label, f"C{index % 10}", alone=len(runs) == 1)
    environments = list(dict.fromkeys(str(group.settings["env"]) for group in groups))
    if len(environments) == 1:
        threshold = target_return(runs[0].config)
        if threshold is not None:
            text = f"target {threshold:g}"
            axes.axhline(threshold, color="0.4", linestyle="--", linewidth=1.0, label=text)
    axes.set_title(", ".join(environments))
    axes.set_xlabel("environment steps")
    axes.set_ylabel("episode return")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlim(left=0)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(
        loc="lower right" if len(runs) == 1 else "best", framealpha=0.9, edgecolor="none"
    )
    for handle in filter(None, legend.legend_handles):
        handle.set_alpha(1.0)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:
        raise ConfigError(f"cannot draw {str(path)!r}: {error}") from error
    return Path(path)


def _draw(axes: Any, group: _Group, label: str, color: str, *, alone: bool) -> None:
    steps, returns = _curves(group.episodes)
    if alone:
        (episodes,) = group.episodes
        count = len(episodes.steps)
        axes.plot(
            *episodes,
            linestyle="none",
            marker=".",
            markersize=4.0,
            markeredgewidth=0.0,
            alpha=float(np.clip(300 / count, 0.15, 0.6)),
            color=color,
            label="single episodes",
            rasterized=True,
        )
    elif len(returns) > 1:
        band = (returns.min(axis=0), returns.max(axis=0))
        axes.fill_between(steps, *band, color=color, alpha=0.2, linewidth=0.0)
    axes.plot(steps, returns.mean(axis=0), color=color, linewidth=2.0, label=label)


def _curves(runs: Sequence[_Episodes]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all runs cover, `[points]`, and their smoothed returns there, `[runs, points]`."""
    start = max(run.steps[0] for run in runs)
    stop = max(start, min(run.steps[-1] for run in runs))
    points = np.linspace(start, stop, _POINTS)
    return points, np.stack([_smooth(run, points) for run in runs])


def _smooth(run: _Episodes, points: np.ndarray) -> np.ndarray:
    """Mean return of the episodes around each point."""
    count, half = len(run.steps), 0.5 * _WINDOW * run.steps[-1]
    low = np.searchsorted(run.steps, points - half)
    high = np.searchsorted(run.steps, points + half, side="right")
    least = min(_LEAST, count)
    nearest = np.clip(np.searchsorted(run.steps, points) - least // 2, 0, count - least)
    few = high - low < least
    low, high = np.where(few, nearest, low), np.where(few, nearest + least, high)
    total = np.concatenate([[0.0], np.cumsum(run.returns)])
    return np.asarray((total[high] - total[low]) / (high - low))


def _read(run: RunFolder) -> _Episodes:
    steps: list[float] = []
    returns: list[float] = []
    before = 0
    for row in run.metrics():
        count = len(row["episodes"])
        # A row does not say when in its rollout an episode ended: spread them evenly.
        steps += np.linspace(before, row["steps"], count + 1)[1:].tolist()
        returns += [episode[0] for episode in row["episodes"]]
        before = row["steps"]
    if not steps:
        raise PPOError(f"there is nothing to plot in {run.path}: no episode has finished yet")
    return _Episodes(np.asarray(steps), np.asarray(returns))


def _group(runs: Sequence[RunFolder]) -> list[_Group]:
    groups: dict[str, _Group] = {}
    for run in runs:
        settings = {k: v for k, v in _flat(run.config.to_dict()).items() if k not in _NEUTRAL}
        group = groups.setdefault(repr(settings), _Group(settings, [], []))
        group.runs.append(run)
        group.episodes.append(_read(run))
    return list(groups.values())


def _flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value and key == "policy":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _labels(groups: Sequence[_Group]) -> list[str]:
    """What tells the groups apart: the settings in which they differ, or else the folders."""
    if len(groups) == 1:
        alone = len(groups[0].runs) == 1
        return ["running mean" if alone else _counted("mean", groups[0])]
    first = groups[0].settings
    varying = [name for name in first if any(g.settings[name] != first[name] for g in groups)]
    labels = [", ".join(f"{n}={_text(g.settings[n])}" for n in varying) for g in groups]
    if "env" in varying:
        labels = [str(group.settings["env"]) for group in groups]
    if len(set(labels)) < len(labels) or max(map(len, labels)) > 60:
        labels = [group.runs[0].path.name for group in groups]
    return [_counted(label, group) for label, group in zip(labels, groups, strict=True)]


def _counted(label: str, group: _Group) -> str:
    count = len(group.runs)
    return f"{label} ({count} runs, lowest to highest)" if count > 1 else label


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
