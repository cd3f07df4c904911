"""The progress bar of `learn`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ppo.report import Report

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(steps: int, goal: int, show: bool | None) -> Iterator[Callable[[Report], None]]:
    """Show steps, steps per second, time left and the mean return, updated by each report.

    None shows them on a terminal only.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield lambda report: None
        return
    with tqdm(initial=steps, total=goal, unit=" steps", unit_scale=True, dynamic_ncols=True) as bar:

        def update(report: Report) -> None:
            bar.set_postfix_str(f"return {report.metrics['episode_return']:.1f}", refresh=False)
            bar.update(min(report.steps, goal) - bar.n)

        yield update
