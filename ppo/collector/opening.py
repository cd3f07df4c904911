"""Opening a collector: its options checked, its environments made here or in workers."""

from __future__ import annotations

import math
import multiprocessing
from typing import Literal

import numpy as np

from ppo.collector.backends import Backend, InProcess
from ppo.collector.making import episode_streams, open_columns
from ppo.collector.pool import WorkerPool
from ppo.collector.processes import StartMethod, fitting_number_of_workers
from ppo.envs import EnvSource

__all__ = ["check_options", "open_backend", "seed_sequence"]


def open_backend(
    source: EnvSource,
    root: np.random.SeedSequence,
    num_workers: int | Literal["auto"],
    start_method: StartMethod | None,
    step_timeout: float | None,
    max_restarts: int,
) -> Backend:
    """Make the environments of a source, in this process or in workers as they allow it."""
    if max_restarts and source.vector is not None:
        raise ValueError(
            'on_fault="restart" needs environments that can be made anew, and those of a '
            "vector environment cannot; pass a factory"
        )
    if num_workers == "auto":
        num_workers = fitting_number_of_workers(len(source.factories), start_method)
    if num_workers == 0 or source.vector is not None or not source.copyable:
        return InProcess(open_columns(source, root, max_restarts))
    seeds = episode_streams(source, root)
    return WorkerPool(
        source.factories, seeds, num_workers, start_method, step_timeout, max_restarts
    )


def seed_sequence(seed: int | np.random.SeedSequence | None) -> np.random.SeedSequence:
    """The root of all streams of a collector."""
    if isinstance(seed, np.random.SeedSequence):
        return seed
    if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
        raise ValueError(
            f"seed must be an integer of at least 0, a SeedSequence or None, got {seed!r}"
        )
    return np.random.SeedSequence(seed)


def check_options(
    num_workers: int | Literal["auto"],
    start_method: StartMethod | None,
    step_timeout: float | None,
    on_fault: str,
    max_restarts: int,
) -> None:
    """Raise `ValueError` for what no collector can be opened with."""
    if num_workers != "auto" and not (
        isinstance(num_workers, int | np.integer) and num_workers >= 0
    ):
        raise ValueError(
            'num_workers must be an integer, 0 (this process) or more, or "auto", '
            f"got {num_workers!r}"
        )
    methods = multiprocessing.get_all_start_methods()
    if start_method is not None and start_method not in methods:
        raise ValueError(f"start_method must be one of {methods} here, got {start_method!r}")
    if step_timeout is not None and not 0.0 < step_timeout < math.inf:
        raise ValueError(f"step_timeout must be positive seconds or None, got {step_timeout}")
    if on_fault not in ("raise", "restart"):
        raise ValueError(f'on_fault must be "raise" or "restart", got {on_fault!r}')
    if not (isinstance(max_restarts, int | np.integer) and max_restarts >= 0):
        raise ValueError(f"max_restarts must be an integer, 0 or more, got {max_restarts!r}")
