"""Minibatches in shapes that recur, as what is recorded for one shape needs them."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo.rollout import Batch
from ppo.sequences import Sequences
from ppo.trees import leaves, map_tree

__all__ = ["FixedRows", "inputs_of"]

# What is inside of a small policy stays in the processor's cache for so many.
_ROWS_AT_ONCE = 2**10
_ALL = slice(None)


@dataclasses.dataclass(frozen=True)
class FixedRows:
    """What a policy is evaluated on at once, `[R]` rows.

    A minibatch of many rows comes in parts of one size; the last one reaches back to rows of the
    part before it, which do not count again. Minibatches of sequences have hardly ever the same
    lengths twice, and are not parted. Their sequences are made equally long by rows that mean
    nothing: a policy never looks ahead, so what it says of the real ones stays.

    Attributes:
        obs: Observations `[R, ...]`, a tree of arrays.
        actions: Actions `[R, ...]`, a tree of arrays.
        masks: Legal actions `[R, M]`; None: all.
        sequences: Which rows follow one another; None if each stands for itself.
        places: Which of these rows count, in the order of the minibatch.
        counted: The rows of the minibatch that those are.
    """

    obs: Any
    actions: Any
    masks: np.ndarray | None
    sequences: Sequences | None
    places: np.ndarray | slice
    counted: slice

    @classmethod
    def of(cls, batch: Batch) -> list[FixedRows]:
        """The rows of a minibatch of arrays, in parts of one shape."""
        masks = vars(batch).get("action_masks")
        if batch.sequences is None:
            return cls(batch.obs, batch.actions, masks, None, _ALL, _ALL)._parts()
        positions, sequences, places = batch.sequences.extended()

        def chosen(array: np.ndarray) -> np.ndarray:
            return array.take(positions, 0)

        obs, actions = map_tree(chosen, (batch.obs, batch.actions))
        masks = None if masks is None else chosen(masks)
        return [cls(obs, actions, masks, sequences, places, _ALL)]

    @staticmethod
    def num_parts(num_rows: int) -> int:
        """In how many parts so many rows come that stand for themselves."""
        return -(-num_rows // _ROWS_AT_ONCE)

    def _parts(self) -> list[FixedRows]:
        rows = len(self)
        if (count := self.num_parts(rows)) <= 1:
            return [self]
        size, parts = -(-rows // count), []
        for first in range(0, rows, size):
            start = min(first, rows - size)
            held = slice(start, start + size)
            obs, actions = map_tree(operator.itemgetter(held), (self.obs, self.actions))
            masks = None if self.masks is None else self.masks[held]
            places, counted = slice(first - start, size), slice(first, start + size)
            parts.append(FixedRows(obs, actions, masks, None, places, counted))
        return parts

    def __len__(self) -> int:
        return len(self.arrays[0])

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """Everything that changes from minibatch to minibatch, in the order of `inputs_of`."""
        masks = () if self.masks is None else (self.masks,)
        states = () if self.sequences is None else (self.sequences.states.numpy(),)
        return leaves((self.obs, self.actions, masks, states))

    @property
    def shape(self) -> tuple[object, ...]:
        """Equal for rows that can take one another's place."""
        lengths = None if self.sequences is None else self.sequences.lengths
        return (lengths, *((array.shape, array.dtype) for array in self.arrays))

    def copy(self) -> Batch:
        """The rows as tensors in memory of their own."""
        sequences = self.sequences
        if sequences is not None:
            sequences = Sequences(sequences.lengths, sequences.states.clone())
        fields = {"obs": self.obs, "actions": self.actions}
        if self.masks is not None:
            fields["action_masks"] = self.masks
        # Memory of torch's is aligned, which decides how some processors round.
        fields = map_tree(lambda array: torch.from_numpy(array).clone(), fields)
        return Batch(sequences=sequences, **fields)


def inputs_of(rows: Batch) -> list[Tensor]:
    """The tensors of a copy of `FixedRows`, in the order of its arrays."""
    states = () if rows.sequences is None else (rows.sequences.states,)
    return leaves((*rows.fields.values(), *states))
