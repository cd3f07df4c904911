"""What a run writes after every update: JSON lines, a table and TensorBoard events."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ppo._files import replace_file
from ppo.errors import PPOError
from ppo.report import Report

__all__ = ["MetricsLog", "read_metrics"]

_JSON, _CSV, _TENSORBOARD = "metrics.jsonl", "metrics.csv", "tensorboard"


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of a run, oldest first; what is no row, or only half of one, is left out.

    Args:
        folder: A run folder, also of a run that is still going on.

    Returns:
        One dictionary per update: `steps`, `updates`, `seconds`, the metrics of `Report` (None
        where they were not finite) and `episodes`, a list of `[return, length, env_index]`.
    """
    path = Path(folder) / _JSON
    if not path.is_file():
        return []
    rows = []
    # Not `splitlines`, which ends lines at characters that stand inside of JSON strings, too.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if _is_row(row):
                rows.append(row)
    return rows


def _is_row(row: object) -> bool:
    return (
        isinstance(row, dict)
        and isinstance(row.get("steps"), int)
        and isinstance(row.get("seconds"), float | int)
        and isinstance(row.get("episodes"), list)
    )


class MetricsLog:
    """Appends one row per update to `metrics.jsonl` and `metrics.csv`, flushed at once.

    TensorBoard events are written too where the package is installed. Files are opened by the
    first row, so a log that is never written to leaves nothing behind.

    Args:
        folder: Where the files are; rows that are there already are continued.

    Attributes:
        seconds: Time the run has taken up to its latest row, pauses left out.

    Example:
        >>> import tempfile
        >>> from ppo import PPOAgent, PPOConfig
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = MetricsLog(folder)
        ...     agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=32), logger=log.write)
        ...     _ = agent.learn("CartPole-v1", steps=128)
        ...     log.close()
        ...     [row["steps"] for row in read_metrics(folder)]
        [64, 128]
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        rows = read_metrics(self.folder)
        self.seconds: float = rows[-1]["seconds"] if rows else 0.0
        self._columns: list[str] = _columns(rows)
        self._start = time.monotonic() - self.seconds
        self._purge_from: int | None = None
        self._json: IO[str] | None = None
        self._csv: IO[str] | None = None
        self._tensorboard: Any = None

    def write(self, report: Report) -> None:
        """Add the row of an update.

        Raises:
            PPOError: The disk refuses. What was cut off is dropped by `rewind`.
        """
        self.seconds = round(time.monotonic() - self._start, 3)
        head = {"steps": report.steps, "updates": report.updates, "seconds": self.seconds}
        row = {**head, **{name: _finite(value) for name, value in report.metrics.items()}}
        episodes = [list(episode) for episode in report.episodes]
        try:
            if self._json is None or self._csv is None:
                self._columns = self._columns or list(row)
                self._open()
                assert self._json is not None
                assert self._csv is not None
            self._json.write(json.dumps({**row, "episodes": episodes}) + "\n")
            self._json.flush()
            csv.DictWriter(self._csv, self._columns, extrasaction="ignore").writerow(row)
            self._csv.flush()
        except OSError as error:
            raise PPOError(f"the metrics in {self.folder} cannot be written: {error}") from error
        if self._tensorboard is not None:
            for name, value in row.items():
                if name not in head and value is not None:
                    self._tensorboard.add_scalar(f"ppo/{name}", value, report.steps)

    def _open(self) -> None:
        self._json = (self.folder / _JSON).open("a", encoding="utf-8")
        self._csv = (self.folder / _CSV).open("a", encoding="utf-8", newline="")
        if self._csv.tell() == 0:
            csv.writer(self._csv).writerow(self._columns)
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        self._tensorboard = SummaryWriter(
            str(self.folder / _TENSORBOARD), purge_step=self._purge_from, flush_secs=10
        )

    def rewind(self, steps: int) -> None:
        """Drop the rows after `steps`, so that a resumed run has none twice.

        Args:
            steps: Those of the checkpoint the run goes on from.
        """
        self.close()
        rows = [row for row in read_metrics(self.folder) if row["steps"] <= steps]
        self._columns = _columns(rows)
        replace_file(self.folder / _JSON, "".join(f"{json.dumps(r)}\n" for r in rows).encode())
        replace_file(self.folder / _CSV, _table(self._columns, rows).encode() if rows else b"")
        self.seconds = rows[-1]["seconds"] if rows else 0.0
        self._start = time.monotonic() - self.seconds
        self._purge_from = steps + 1

    def sync(self) -> None:
        """Have the rows on the disk before anything that is written later; see `fsync`."""
        for file in (self._json, self._csv):
            if file is not None:
                with contextlib.suppress(OSError):
                    os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files; the next `write` opens them again."""
        files = (self._json, self._csv, self._tensorboard)
        self._json = self._csv = self._tensorboard = None
        for file in files:
            # A row that could not be written was an error then, and would be the same again.
            with contextlib.suppress(OSError):
                if file is not None:
                    file.close()


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [name for name in rows[-1] if name != "episodes"] if rows else []


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _table(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
