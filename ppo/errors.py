"""Errors of the library: everything it raises beyond `ValueError` and `TypeError`."""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ClosedError",
    "ConfigError",
    "EnvCreationError",
    "EnvError",
    "MissingExtraError",
    "NonFiniteError",
    "PPOError",
    "SpaceError",
    "WorkerError",
]


class PPOError(Exception):
    """Base class of every error that is not a plain wrong argument."""


class ConfigError(PPOError, ValueError):
    """A configuration has an unknown, duplicate, ill-typed or out-of-range setting."""


class SpaceError(PPOError):
    """A space is not supported, or does not match the one a policy was built for."""


class MissingExtraError(PPOError):
    """An optional dependency is not installed; the message names the extra."""


class EnvCreationError(PPOError):
    """An environment cannot be made: unknown id, wrong arguments, missing dependency."""


class EnvError(PPOError):
    """An environment raised; the message carries its index, seed, step, action and traceback."""


class WorkerError(PPOError):
    """A worker process died or did not answer in time."""


class NonFiniteError(PPOError):
    """A NaN or infinity was met; the message names the quantity, the environment and the step."""


class ClosedError(PPOError):
    """A collector was used after it was closed, by the user or by a failure."""


class CheckpointError(PPOError):
    """A checkpoint is damaged, foreign, of another version, or does not fit the agent."""
