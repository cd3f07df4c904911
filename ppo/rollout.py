"""What a collector returns: `Rollout` in `[T, N]`, `Batch` in `[B]`, and finished episodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ppo.errors import NonFiniteError

__all__ = ["Batch", "Episode", "Rollout"]


class Episode(NamedTuple):
    """One finished episode.

    Attributes:
        episode_return: Undiscounted sum of the rewards the environment paid.
        episode_length: Number of transitions.
        env_index: Column of the rollout in which it was played.
    """

    episode_return: float
    episode_length: int
    env_index: int


class Batch:
    """Transitions without order: named tensors with one common first axis `[B]`.

    Every field is an attribute: `batch.obs`, `batch.actions`, and whatever was passed to
    `Rollout.flatten`.

    Example:
        >>> batch = Batch(obs=torch.zeros(10, 4), actions=torch.zeros(10))
        >>> [len(m) for m in batch.minibatches(4, torch.Generator().manual_seed(0))]
        [4, 3, 3]
    """

    def __init__(self, **fields: Tensor) -> None:
        sizes = {name: len(tensor) for name, tensor in fields.items()}
        if not sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"all fields of a Batch need one common first axis, got {sizes}")
        self.__dict__ = fields

    @classmethod
    def _unchecked(cls, fields: dict[str, Tensor]) -> Batch:
        batch = cls.__new__(cls)
        batch.__dict__ = fields
        return batch

    def __getattr__(self, name: str) -> Tensor:
        raise AttributeError(f"this Batch has no field {name!r}; it has {sorted(self.__dict__)}")

    def __len__(self) -> int:
        return len(next(iter(self.__dict__.values())))

    @property
    def fields(self) -> dict[str, Tensor]:
        """The tensors by name."""
        return dict(self.__dict__)

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        return Batch(**{name: tensor[rows] for name, tensor in self.__dict__.items()})

    def replace(self, **fields: Tensor) -> Batch:
        """Return the batch with some fields exchanged or added."""
        return Batch(**{**self.__dict__, **fields})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        return Batch(**{name: tensor.to(device) for name, tensor in self.__dict__.items()})

    def minibatches(
        self, minibatch_size: int, generator: torch.Generator | None = None
    ) -> Iterator[Batch]:
        """Yield every row exactly once, in random order and balanced minibatches.

        The number of minibatches is `ceil(B / minibatch_size)`; their sizes differ by at most
        one, so no stray tiny minibatch with a noisy gradient is left at the end.

        Args:
            minibatch_size: Largest number of rows in a minibatch, at least 1.
            generator: CPU generator that draws the permutation; torch's global one if None.

        Yields:
            Batches of at most `minibatch_size` rows.

        Raises:
            ValueError: `minibatch_size` is below 1.
        """
        if minibatch_size < 1:
            raise ValueError(f"minibatch_size must be at least 1, got {minibatch_size}")
        rows = len(self)
        if rows == 0:
            return
        count = -(-rows // minibatch_size)
        device = next(iter(self.__dict__.values())).device
        order = torch.randperm(rows, generator=generator).to(device)
        # One gather for the whole epoch; the minibatches are views of it.
        shuffled = {name: tensor[order] for name, tensor in self.__dict__.items()}
        small, extra = divmod(rows, count)
        sizes = [small + 1] * extra + [small] * (count - extra)
        for parts in zip(*(tensor.split(sizes) for tensor in shuffled.values()), strict=True):
            yield Batch._unchecked(dict(zip(shuffled, parts, strict=True)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """`T` steps of `N` environments, time-major; every valid row is a real transition.

    Attributes:
        obs: Observations the actions were taken on, `[T, N, ...]`, as the environment gave them.
        actions: Actions as sampled (before clipping to the space), `[T, N, ...]`.
        log_probs: Log-density of the actions under the collecting policy, `[T, N]`.
        values: `V(obs)` of the collecting policy, `[T, N]`.
        rewards: What the environment paid, never patched, `[T, N]`.
        next_values: `V` of the true successor, before any reset, `[T, N]`; 0 where terminated.
        terminated: The successor is absorbing, bool `[T, N]`.
        truncated: The episode was cut from outside, bool `[T, N]`.
        valid: False for rows that are no transition (reset rows of NEXT_STEP), bool `[T, N]`.
        episodes: Episodes that finished during this rollout.
    """

    obs: Tensor
    actions: Tensor
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    next_values: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    episodes: tuple[Episode, ...] = ()

    @property
    def num_transitions(self) -> int:
        """Number of valid rows, over all environments."""
        return int(self.valid.sum())

    def check_finite(self) -> None:
        """Raise for the first NaN or infinity in a valid row.

        Raises:
            NonFiniteError: A reward, value or log-probability is not finite; the message names
                the field, the step and the environment.
        """
        for name in ("rewards", "values", "next_values", "log_probs"):
            matters = self.valid & ~self.terminated if name == "next_values" else self.valid
            finite = torch.isfinite(getattr(self, name)) | ~matters
            if not bool(finite.all()):
                t, index = (~finite).nonzero()[0].tolist()
                raise NonFiniteError(
                    f"{name} is not finite at rollout step {t} of environment {index}; nothing "
                    "was learned from this rollout. Look for huge rewards or observations."
                )

    def flatten(self, **extra: Tensor) -> Batch:
        """Drop the rows that are no transition and merge time and environments.

        Args:
            **extra: Further `[T, N, ...]` tensors to carry along, e.g. `advantages`, `returns`.

        Returns:
            A `Batch` `[B]` with the fields `obs, actions, log_probs, values` and `extra`.

        Raises:
            ValueError: An extra does not start with `[T, N]`.
        """
        fields = {
            "obs": self.obs,
            "actions": self.actions,
            "log_probs": self.log_probs,
            "values": self.values,
        }
        for name, tensor in extra.items():
            if tensor.shape[:2] != self.rewards.shape:
                raise ValueError(
                    f"{name} must start with [T, N] = {list(self.rewards.shape)}, "
                    f"got {list(tensor.shape)}"
                )
            fields[name] = tensor
        if bool(self.valid.all()):
            return Batch(**{name: tensor.flatten(0, 1) for name, tensor in fields.items()})
        return Batch(**{name: tensor[self.valid] for name, tensor in fields.items()})

    def to(self, device: torch.device | str) -> Rollout:
        """Return the rollout on another device."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if field.name != "episodes"
        }
        return dataclasses.replace(self, **tensors)
