"""What a collector returns: `Rollout` in `[T, N]`, `Batch` in `[B]`, and finished episodes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppo._masks import all_of
from ppo.errors import NonFiniteError
from ppo.frames import to_tensor
from ppo.sequences import Sequences
from ppo.trees import leaves, map_tree

__all__ = ["Batch", "Episode", "Finals", "Rollout"]


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


class Finals(NamedTuple):
    """Successors that are the observation of no row, in the order of their values.

    Attributes:
        obs: Observations `[K, ...]`: first those of truncated steps, then for every environment
            the one after the last row.
        steps: Row each one follows, `[K]`.
        env_indices: Column of that row, `[K]`.
        states: Memory of the policy there, `[K, S]`; None without.
    """

    obs: Any
    steps: Tensor
    env_indices: Tensor
    states: Tensor | None = None

    def to(self, device: torch.device | str) -> Finals:
        """The same on another device."""
        states = None if self.states is None else self.states.to(device)
        obs = map_tree(lambda tensor: tensor.to(device), self.obs)
        return Finals(obs, self.steps.to(device), self.env_indices.to(device), states)


class Batch:
    """Transitions without order: named tensors with one common first axis `[B]`.

    Every field is an attribute: `batch.obs`, `batch.actions`, and whatever was passed to
    `Rollout.flatten`. Fields may be trees of tensors (see `ppo.trees`), as nested observations
    are.

    Args:
        sequences: For policies with memory: the rows are whole sequences, one after the other.
        **fields: Tensors `[B, ...]` by name, or trees of them.

    Attributes:
        sequences: Which rows belong together; None if each stands for itself.

    Raises:
        ValueError: There are no fields, or their first axes differ.

    Example:
        >>> batch = Batch(obs=torch.zeros(10, 4), actions=torch.zeros(10))
        >>> [len(m) for m in batch.minibatches(4, torch.Generator().manual_seed(0))]
        [4, 3, 3]
    """

    sequences: Sequences | None = None

    def __init__(self, *, sequences: Sequences | None = None, **fields: Any) -> None:
        sizes = {name: leaf.shape[0] for name, tree in fields.items() for leaf in leaves(tree)}
        if not sizes or len(set(sizes.values())) != 1:
            raise ValueError(f"all fields of a Batch need one common first axis, got {sizes}")
        self.__dict__ = fields
        if sequences is not None:
            object.__setattr__(self, "sequences", sequences)

    @classmethod
    def _unchecked(cls, fields: dict[str, Any], sequences: Sequences | None) -> Batch:
        batch = cls.__new__(cls)
        batch.__dict__ = fields
        if sequences is not None:
            fields["sequences"] = sequences
        return batch

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"this Batch has no field {name!r}; it has {sorted(self.fields)}")

    def __len__(self) -> int:
        first = next(iter(self.__dict__.values()))  # `sequences` are the last, if any
        return int(leaves(first)[0].shape[0])

    @property
    def fields(self) -> dict[str, Any]:
        """The tensors, or trees of them, by name."""
        return {name: tree for name, tree in self.__dict__.items() if name != "sequences"}

    @property
    def context(self) -> dict[str, Any]:
        """What `policy.evaluate` needs besides observations and actions, by argument."""
        context = {"action_masks": self.__dict__.get("action_masks"), "sequences": self.sequences}
        return {name: value for name, value in context.items() if value is not None}

    def __getitem__(self, rows: Tensor | slice) -> Batch:
        if self.sequences is not None:
            raise TypeError("rows of a Batch with sequences belong together; use minibatches")
        return self._map(lambda tensor: tensor[rows], None)

    def replace(self, **fields: Any) -> Batch:
        """Return the batch with some fields exchanged or added."""
        return Batch(sequences=self.sequences, **{**self.fields, **fields})

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch on another device."""
        sequences = None if self.sequences is None else self.sequences.to(device)
        return self._map(lambda tensor: tensor.to(device), sequences)

    def detach(self) -> Batch:
        """Return the batch without history: its rows are constants."""
        return self._map(lambda tensor: tensor.detach(), self.sequences)

    def _map(self, function: Callable[[Any], Any], sequences: Sequences | None) -> Batch:
        fields = {name: map_tree(function, tree) for name, tree in self.fields.items()}
        return Batch(sequences=sequences, **fields)

    def minibatches(
        self,
        minibatch_size: int,
        generator: torch.Generator | None = None,
        *,
        arrays: bool = False,
    ) -> Iterator[Batch]:
        """Yield every row exactly once, in random order and balanced minibatches.

        The number of minibatches is `ceil(B / minibatch_size)`; their sizes differ by at most
        one, so no stray tiny minibatch with a noisy gradient is left at the end. A single one has
        the rows in their order. With sequences, whole sequences are drawn: there are at most as
        many minibatches, and their sizes differ by no more than sequences do.

        Args:
            minibatch_size: Largest number of rows in a minibatch, at least 1; with sequences, the
                number they come close to.
            generator: CPU generator that draws the permutation; torch's global one if None.
            arrays: Yield NumPy's views of tensors on the CPU; what uses those needs no time to get
                them then.

        Yields:
            Batches of about `minibatch_size` rows, of tensors (or arrays).

        Raises:
            ValueError: `minibatch_size` is below 1.
        """
        if minibatch_size < 1:
            raise ValueError(f"minibatch_size must be at least 1, got {minibatch_size}")
        if 0 < len(self) <= minibatch_size:
            yield self._of_tensors(arrays)  # one minibatch needs no order
        elif len(self):
            yield from self._dealt(*self._shuffled(minibatch_size, generator), arrays)

    def minibatch_sequences(
        self, minibatch_size: int, generator: torch.Generator
    ) -> Sequence[Sequences | None]:
        """The sequences of each of the `minibatches` with such a generator, and nothing else."""
        if len(self) <= minibatch_size:
            return [self.sequences]
        return self._shuffled(minibatch_size, generator)[2]

    def _shuffled(
        self, minibatch_size: int, generator: torch.Generator | None
    ) -> tuple[Tensor, list[int], Sequence[Sequences | None]]:
        things = len(self) if self.sequences is None else len(self.sequences)
        chosen = torch.randperm(things, generator=generator)
        return self._deal(chosen, -(-len(self) // minibatch_size))

    def parts(self, size: int) -> Iterator[Batch]:
        """Yield the rows in order, in parts of about `size` rows, of tensors."""
        rows = len(self)
        if 0 < rows <= size:
            yield self._of_tensors()
        elif self.sequences is not None and rows:
            yield from self._dealt(*self._deal(torch.arange(len(self.sequences)), -(-rows // size)))
        elif rows:
            fields = self.fields
            pieces = [_pieces(tree, None, size) for tree in fields.values()]
            for values in zip(*pieces, strict=True):
                yield Batch._unchecked(dict(zip(fields, values, strict=True)), None)

    def _of_tensors(self, arrays: bool = False) -> Batch:
        """All rows, with stacked frames as tensors (or arrays)."""
        convert = _to_array if arrays else to_tensor
        fields = {name: map_tree(convert, tree) for name, tree in self.fields.items()}
        return Batch._unchecked(fields, self.sequences)

    def _deal(
        self, chosen: Tensor, count: int
    ) -> tuple[Tensor, list[int], Sequence[Sequences | None]]:
        """Deal rows or, if there are any, sequences, in this order to `count` batches.

        Returns the order of all rows, rows per batch, and the sequences of each.
        """
        if self.sequences is not None:
            return self.sequences.deal(chosen.numpy(), count)
        small, extra = divmod(len(chosen), count)
        return chosen, [small + 1] * extra + [small] * (count - extra), [None] * count

    def _dealt(
        self,
        order: Tensor,
        sizes: list[int],
        parts: Sequence[Sequences | None],
        arrays: bool = False,
    ) -> Iterator[Batch]:
        """One gather for all of these batches, which are views of it."""
        fields = self.fields
        order = order.to(leaves(next(iter(fields.values())))[0].device)
        pieces = [_pieces(tree, order, sizes, arrays) for tree in fields.values()]
        for sequences, values in zip(parts, zip(*pieces, strict=True), strict=True):
            yield Batch._unchecked(dict(zip(fields, values, strict=True)), sequences)


def _to_array(leaf: Any) -> np.ndarray:
    array: np.ndarray = to_tensor(leaf).numpy()
    return array


def _pieces(
    tree: Any, order: Tensor | None, sizes: int | list[int], arrays: bool = False
) -> Iterable[Any]:
    """A tree's rows in this order (None: theirs), cut into pieces of these sizes."""
    if isinstance(tree, Mapping):
        items = [_pieces(item, order, sizes, arrays) for item in tree.values()]
        return (dict(zip(tree, row, strict=True)) for row in zip(*items, strict=True))
    if isinstance(tree, tuple):
        return zip(*(_pieces(item, order, sizes, arrays) for item in tree), strict=True)
    if not isinstance(tree, Tensor):
        parts = (tree if order is None else tree[order]).split(sizes)
        return map(_to_array if arrays else to_tensor, parts)
    rows = tree if order is None else tree.index_select(0, order)
    if arrays and isinstance(sizes, list):
        array, ends = rows.numpy(), [*itertools.accumulate(sizes)]
        return [array[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    pieces: Iterable[Any] = rows.split(sizes)
    return pieces


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
        action_masks: Which actions were legal, bool `[T, N, M]` (see `ppo.spaces.ActionMasks`);
            None where the environments say nothing of it.
        finals: The successors that no row holds: of truncated steps and of the last row.
        sequences: For a policy with memory: what belongs together when it is evaluated again.
        order: With `sequences`: positions `t * N + n` of their rows, `[B]`.

    Nested observations and actions are trees of tensors; stacked ones are `FrameStack`, which
    store each frame once.
    """

    obs: Any
    actions: Any
    log_probs: Tensor
    values: Tensor
    rewards: Tensor
    next_values: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor
    episodes: tuple[Episode, ...] = ()
    action_masks: Tensor | None = None
    finals: Finals | None = None
    sequences: Sequences | None = None
    order: Tensor | None = None

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
            if math.isfinite(getattr(self, name).sum()):  # and so is every number in it
                continue
            matters = self.valid & ~self.terminated if name == "next_values" else self.valid
            finite = torch.isfinite(getattr(self, name)) | ~matters
            if not bool(finite.all()):
                t, index = (~finite).nonzero()[0].tolist()
                raise NonFiniteError(
                    f"{name} is not finite at rollout step {t} of environment {index}; nothing "
                    "was learned from this rollout. Look for huge rewards or observations, and "
                    "for NaN among the policy's parameters."
                )

    def flatten(self, **extra: Tensor) -> Batch:
        """Drop the rows that are no transition and merge time and environments.

        Args:
            **extra: Further `[T, N, ...]` tensors to carry along, e.g. `advantages`, `returns`.

        Returns:
            A `Batch` `[B]` with the fields `obs, actions, log_probs, values`, `action_masks` where
            there are any, and `extra`; for a policy with memory its rows are whole sequences.

        Raises:
            ValueError: An extra does not start with `[T, N]`.
        """
        fields = {
            "obs": self.obs,
            "actions": self.actions,
            "log_probs": self.log_probs,
            "values": self.values,
        }
        if self.action_masks is not None:
            fields["action_masks"] = self.action_masks
        for name, tensor in extra.items():
            if tensor.shape[:2] != self.rewards.shape:
                raise ValueError(
                    f"{name} must start with [T, N] = {list(self.rewards.shape)}, "
                    f"got {list(tensor.shape)}"
                )
            fields[name] = tensor
        return self._flat(fields)

    def questions(self) -> Batch:
        """What `policy.evaluate` is asked, in the rows of `flatten`: `obs, actions` and masks."""
        fields = {"obs": self.obs, "actions": self.actions}
        if self.action_masks is not None:
            fields["action_masks"] = self.action_masks
        return self._flat(fields)

    def _flat(self, fields: dict[str, Any]) -> Batch:
        everything = self.order is None and all_of(self.valid)

        def select(tensor: Any) -> Any:
            if everything:
                return tensor.flatten(0, 1)
            return tensor[self.valid] if self.order is None else tensor.flatten(0, 1)[self.order]

        flat = {name: map_tree(select, tree) for name, tree in fields.items()}
        return Batch._unchecked(flat, self.sequences)

    def unflatten(self, rows: Tensor) -> Tensor:
        """Put rows `[B]` in the order of `flatten` back into `[T, N]`; 0 elsewhere."""
        if self.order is None and len(rows) == self.valid.numel():
            return rows.view(self.valid.shape)
        tensor = torch.zeros_like(self.rewards, dtype=rows.dtype)
        if self.order is None:
            tensor[self.valid] = rows
        else:
            tensor.view(-1)[self.order] = rows
        return tensor

    def to(self, device: torch.device | str) -> Rollout:
        """Return the rollout on another device."""

        def move(value: Any) -> Any:
            return value.to(device) if hasattr(value, "to") else value

        moved = {
            field.name: map_tree(move, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if field.name not in ("episodes", "finals")
        }
        moved["finals"] = move(self.finals)
        return dataclasses.replace(self, **moved)
