"""Run folders: everything a training run leaves on the disk, and the way back from there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import time
import warnings
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import gymnasium
import torch
from typing_extensions import Self

from ppo._files import remove_leftovers, replace_file
from ppo.agent import PPOAgent
from ppo.checkpoint import fingerprint, read_checkpoint, read_episodes
from ppo.cli.folders import check_links, make_folder
from ppo.cli.metrics_log import MetricsLog, read_metrics
from ppo.config import PPOConfig
from ppo.errors import CheckpointError, ConfigError, PPOError
from ppo.evaluation import EvaluationResult
from ppo.report import Report, episode_means
from ppo.rollout import Episode

__all__ = ["RunFolder", "target_return"]


class RunFolder:
    """A folder that holds one training run.

    ========================  ==================================================================
    `config.yaml`             every setting of the run, resolved
    `run.json`                seed, command, versions, start
    `metrics.jsonl`, `.csv`   a row per update; the JSON lines also name the episodes
    `tensorboard/`            the same as events, where TensorBoard is installed
    `checkpoints/`            the latest checkpoints and the best, `step-000123456.safetensors`
    `final.safetensors`       the trained agent
    `evaluation.json`         how good it is
    `curve.png`               learning curve, where matplotlib is installed
    ========================  ==================================================================

    Make one with `create` or `open`.

    Of the checkpoints the latest `keep` stay, and the best: that with the highest mean return of
    its recent episodes, the up to 100 that ended last before it was written. The best has no name
    of its own; when all later ones are damaged, it is one to go back to like any other.

    Args:
        path: The folder.
        checkpoint_seconds: Time between checkpoints; the first update is always kept.
        keep: Number of latest checkpoints that are kept.

    Attributes:
        path: The folder.

    Example:
        >>> import tempfile
        >>> config = PPOConfig(env="CartPole-v1", steps=128, num_envs=2, num_steps=32)
        >>> out = tempfile.TemporaryDirectory()
        >>> with RunFolder.create(config, out=out.name) as run:
        ...     agent = PPOAgent(config=config, logger=run.log)
        ...     _ = agent.learn("CartPole-v1", 128, callback=lambda report: run.checkpoint(agent))
        ...     _ = run.finish(agent)
        >>> RunFolder.open(run.path).load().steps
        128
        >>> out.cleanup()
    """

    def __init__(
        self, path: str | Path, *, checkpoint_seconds: float = 30.0, keep: int = 3
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, got {keep}")
        self.path = Path(path)
        self.checkpoint_seconds = checkpoint_seconds
        self.keep = keep
        self._log = MetricsLog(self.path)
        self._saved_at = -math.inf
        self._scores: dict[Path, float] = {}

    @classmethod
    def create(
        cls,
        config: PPOConfig,
        *,
        seed: int = 0,
        out: str | Path = "runs",
        stem: str | None = None,
        name: str | None = None,
        command: Sequence[str] = (),
    ) -> Self:
        """Make a new folder; an existing one is never written over.

        Args:
            config: The run's settings, written to `config.yaml`.
            seed: The run's seed.
            out: Where run folders go.
            stem: What the folder is called, before date, time and seed; None takes the
                environment's id.
            name: The folder's whole name instead.
            command: What was typed, for the record.

        Raises:
            ConfigError: `name` is not a plain name or is taken, or `out` is a file.
        """
        if name is not None and (Path(name).name != name or name in ("", "..")):
            raise ConfigError(f"a run's name must be a plain folder name, got {name!r}")
        path = make_folder(Path(out), stem or config.env or "run", seed, name)
        run = cls(path)
        config.to_yaml(path / "config.yaml")
        run._write_json(
            "run.json",
            {
                "seed": seed,
                "command": list(command),
                "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                **fingerprint(),
                "system": {
                    "platform": platform.system(),
                    "machine": platform.machine(),
                    "cpus": os.cpu_count(),
                },
            },
        )
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a folder made by `create`.

        Raises:
            ConfigError: There is none at `path`.
            PPOError: A link in it leads out of it.
        """
        path = Path(path)
        if not (path / "config.yaml").is_file() or not (path / "run.json").is_file():
            what = "there is no such folder"
            if path.exists():
                what = "it is no run folder" if path.is_dir() else "it is a file, not a run folder"
            raise ConfigError(
                f"cannot open run {str(path)!r}: {what}; give the path that `ppo train` printed"
            )
        check_links(path)
        return cls(path)

    @property
    def config(self) -> PPOConfig:
        """The settings in `config.yaml`."""
        return PPOConfig.from_yaml(self.path / "config.yaml")

    @property
    def info(self) -> dict[str, Any]:
        """What `run.json` says."""
        try:
            info = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
            if not isinstance(info, dict):
                raise ValueError(f"it holds a {type(info).__name__}")
        except (RecursionError, ValueError) as error:
            raise PPOError(f"{self.path / 'run.json'} is damaged: {error}") from error
        return info

    @property
    def seconds(self) -> float:
        """Time the run has taken so far, pauses left out."""
        return self._log.seconds

    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`; see `read_metrics`."""
        return read_metrics(self.path)

    def log(self, report: Report) -> None:
        """Add an update to the metrics; the `logger` of an agent."""
        self._log.write(report)

    def checkpoint(self, agent: PPOAgent) -> None:
        """Save the agent if the latest checkpoint is older than `checkpoint_seconds`."""
        if time.monotonic() - self._saved_at >= self.checkpoint_seconds:
            self.save(agent)

    def save(self, agent: PPOAgent) -> Path:
        """Save the agent now; of older checkpoints the latest `keep` and the best stay.

        Raises:
            CheckpointError: The disk refuses; older checkpoints are as they were.
        """
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        path = folder / f"step-{agent.steps:09d}.safetensors"
        self._log.sync()  # a checkpoint never knows of updates that the metrics have lost
        agent.save(path)
        self._saved_at = time.monotonic()
        self._scores.pop(path, None)
        best = self.best()
        for old in self.checkpoints()[self.keep :]:
            if old != best:
                with contextlib.suppress(OSError):
                    old.unlink()
        return path

    def finish(self, agent: PPOAgent) -> Path:
        """Save the trained agent, as a checkpoint and as `final.safetensors`."""
        self.save(agent)
        path = self.path / "final.safetensors"
        agent.save(path)
        return path

    def checkpoints(self) -> list[Path]:
        """Checkpoints, newest first; `final.safetensors` is not among them."""
        found = (self.path / "checkpoints").glob("step-*.safetensors")
        return sorted((path for path in found if _steps(path) >= 0), key=_steps, reverse=True)

    def best(self) -> Path | None:
        """The checkpoint with the highest return, the latest of equals; None before an episode."""
        scored = [(self._score(path), _steps(path), path) for path in self.checkpoints()]
        return max((row for row in scored if math.isfinite(row[0])), default=(None,))[-1]

    def _score(self, path: Path) -> float:
        """Mean return of a checkpoint's recent episodes; NaN without any, or without a file."""
        if path not in self._scores:
            episodes: list[Episode] = []
            with contextlib.suppress(CheckpointError, ValueError):
                episodes = read_episodes(read_checkpoint(path)[1])
            self._scores[path] = episode_means(episodes)["episode_return"]
        return self._scores[path]

    def load(
        self,
        *,
        best: bool = False,
        device: torch.device | str = "cpu",
        logger: Callable[[Report], object] | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ) -> PPOAgent:
        """Read the newest checkpoint that is whole.

        Args:
            best: Read the best one instead.
            device: Where policy and rollouts live.
            logger: As for `PPOAgent`.
            warn: Told of each checkpoint that had to be skipped, and why, and of what differs here
                from where the file was written.

        Raises:
            CheckpointError: There is no checkpoint, or none is whole.
        """
        best_path = self.best() if best else None
        if best and best_path is None:
            raise CheckpointError(f"{self.path} holds no checkpoint with a finished episode")
        if best_path is not None:
            return _read(best_path, device, logger, warn)
        agent, skipped = self._newest(device, logger, warn)
        for error in skipped:
            warn(f"skipped a checkpoint: {error}")
        if skipped:
            warn(f"going back to {agent.steps:,} steps")
        return agent

    def resume(
        self,
        *,
        device: torch.device | str = "cpu",
        warn: Callable[[str], object] = warnings.warn,
    ) -> PPOAgent:
        """Read the newest whole checkpoint and make the folder ready to go on from there.

        Rows of the metrics that are later than the checkpoint are dropped, since they will come
        again. Checkpoints that had to be skipped are set aside as `*.skipped`.

        Args:
            device: Where policy and rollouts live.
            warn: As for `load`.

        Returns:
            The agent, which logs to this folder.

        Raises:
            CheckpointError: There is no checkpoint, or none is whole. Nothing was changed.
        """
        agent = self.load(device=device, logger=self.log, warn=warn)
        for path in self.checkpoints():
            if _steps(path) > agent.steps:
                path.rename(path.with_name(path.name + ".skipped"))
        for folder in (self.path, self.path / "checkpoints"):
            remove_leftovers(folder)
        self._log.rewind(agent.steps)
        self._saved_at = time.monotonic()
        return agent

    def _newest(
        self,
        device: torch.device | str,
        logger: Callable[[Report], object] | None,
        warn: Callable[[str], object],
    ) -> tuple[PPOAgent, list[CheckpointError]]:
        skipped: list[CheckpointError] = []
        final = self.path / "final.safetensors"
        for path in [*self.checkpoints(), *([final] if final.is_file() else [])]:
            try:
                return _read(path, device, logger, warn), skipped
            except CheckpointError as error:
                skipped.append(error)
        config = self.path / "config.yaml"
        if not skipped:
            raise CheckpointError(
                f"{self.path} holds no checkpoint; start anew with `ppo train {config}`"
            )
        reasons = "; ".join(str(error) for error in skipped)
        raise CheckpointError(
            f"no checkpoint of {self.path} can be read: {reasons}. Nothing was started; "
            f"to start anew: `ppo train {config}`"
        )

    def save_evaluation(self, result: EvaluationResult, **about: Any) -> None:
        """Write `evaluation.json`: mean, spread, every episode, and what else is given."""
        summary = {"mean_return": result.mean_return, "std_return": result.std_return, **about}
        self._write_json("evaluation.json", {**summary, **dataclasses.asdict(result)})

    def discard(self) -> None:
        """Remove a folder in which nothing has happened yet; any other stays as it is."""
        self.close()
        if not self.metrics() and not self.checkpoints():
            for name in ("config.yaml", "run.json"):
                (self.path / name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self.path.rmdir()

    def close(self) -> None:
        """Close the files of the metrics."""
        self._log.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _write_json(self, name: str, data: Any) -> None:
        replace_file(self.path / name, f"{json.dumps(data, indent=2)}\n".encode())


def _read(
    path: Path,
    device: torch.device | str,
    logger: Callable[[Report], object] | None,
    warn: Callable[[str], object],
) -> PPOAgent:
    """Read a checkpoint of a run; what it warns of goes to `warn`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agent = PPOAgent.load(path, device=device, logger=logger)
    if _steps(path) not in (-1, agent.steps):
        raise CheckpointError(f"{path} is not what its name says: it holds {agent.steps} steps")
    for warning in caught:
        warn(str(warning.message))
    return agent


def target_return(config: PPOConfig) -> float | None:
    """Mean return that counts as solved: the configured target, else Gymnasium's threshold."""
    if config.target_return is not None or config.env is None:
        return config.target_return
    try:
        return gymnasium.spec(config.env).reward_threshold
    except (gymnasium.error.Error, ModuleNotFoundError):
        return None


def _steps(path: Path) -> int:
    match = re.fullmatch(r"step-(\d+)\.safetensors", path.name)
    return int(match[1]) if match else -1
