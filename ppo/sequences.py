"""Where the parts of episodes lie in a rollout, for policies that remember."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

__all__ = ["Sequences", "cut_sequences"]


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Consecutive steps of one episode each: rows of a batch, sequence after sequence.

    Attributes:
        lengths: Steps of each sequence; their sum is the number of rows.
        states: Memory of the policy before the first step of each sequence, `[S, K]`.
    """

    lengths: tuple[int, ...]
    states: Tensor

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> Sequences:
        """The same on another device."""
        return Sequences(self.lengths, self.states.to(device))

    @functools.cached_property
    def steps(self) -> np.ndarray:
        """The lengths as an array `[S]`."""
        return np.array(self.lengths, np.int64)

    def split(self, counts: Iterable[int]) -> list[Sequences]:
        """The first so many sequences, the next ones, and so on."""
        parts, first = [], 0
        for count in counts:
            own = slice(first, first + count)
            parts.append(Sequences(self.lengths[own], self.states[own]))
            first += count
        return parts

    def rows(self, chosen: np.ndarray) -> tuple[np.ndarray, Sequences]:
        """Choose sequences; returns the positions of their rows, and them."""
        lengths, first = self.steps[chosen], _starts(self.steps)[chosen]
        # Within a sequence positions go up by one; between sequences they jump.
        positions = np.arange(lengths.sum()) + np.repeat(first - _starts(lengths), lengths)
        states = self.states[torch.from_numpy(chosen).to(self.states.device)]
        return positions, Sequences(tuple(lengths.tolist()), states)

    def deal(self, chosen: np.ndarray, count: int) -> tuple[Tensor, list[int], list[Sequences]]:
        """Deal sequences in this order to `count` minibatches of about the same number of rows.

        Returns the order of all rows, rows per minibatch, and the sequences of each.
        """
        lengths = self.steps[chosen]
        ends = np.cumsum(lengths)
        # A sequence goes to the minibatch in which its middle row falls.
        home = np.minimum(((ends - lengths / 2) * count / ends[-1]).astype(np.int64), count - 1)
        first = np.flatnonzero(np.diff(home, prepend=-1))  # of each minibatch; none is empty
        order, dealt = self.rows(chosen)
        counts = np.diff(first, append=len(chosen)).tolist()
        return (
            torch.from_numpy(order),
            np.add.reduceat(lengths, first).tolist(),
            dealt.split(counts),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """Number of sequences, and length of the longest."""
        return len(self), max(self.lengths)

    @property
    def extended_shape(self) -> tuple[int, int]:
        """The `shape` of what `extended` returns."""
        count, longest = self.shape
        return _recurring(count), _recurring(longest)

    def extended(self) -> tuple[np.ndarray, Sequences, np.ndarray]:
        """Sequences of one length, in a shape that recurs, of which these are the beginnings.

        What looks ahead from no step computes the same for these ones in them.

        Returns:
            Positions of the rows they are made of (a sequence stays at its last row, and whole
            sequences more are the first row), they themselves, and where the rows of these ones
            lie among theirs, `[B]`.
        """
        count, longest = self.extended_shape
        lengths, step = self.steps, np.arange(longest)
        positions = np.zeros((count, longest), np.int64)
        last = lengths[:, None] - 1
        np.add(_starts(lengths)[:, None], np.minimum(step, last), out=positions[: len(self)])
        places = np.flatnonzero(step <= last)
        states = self.states.new_zeros(count, self.states.shape[1])
        states[: len(self)] = self.states
        return positions.ravel(), Sequences((longest,) * count, states), places


def _recurring(number: int) -> int:
    """The next of the numbers that are at most an eighth apart."""
    apart = 1 << max(0, number.bit_length() - 4)
    return -(-number // apart) * apart


def _starts(lengths: np.ndarray) -> np.ndarray:
    starts: np.ndarray = np.cumsum(lengths) - lengths
    return starts


def cut_sequences(
    ended: np.ndarray, valid: np.ndarray, longest: int | None = None
) -> tuple[np.ndarray, tuple[int, ...]]:
    """Cut a rollout into sequences at the ends of episodes, and where they become too long.

    Args:
        ended: Bool `[T, N]`: an episode ended with this step.
        valid: Bool `[T, N]`: the row is a transition; other rows are left out, and memory starts
            anew behind them.
        longest: Steps a sequence may have; None for no limit.

    Returns:
        Positions `t * N + n` of the rows, environment after environment, and the lengths of the
        sequences they make.

    Example:
        >>> ended = np.array([[False], [True], [False]])
        >>> cut_sequences(ended, np.ones((3, 1), bool))
        (array([0, 1, 2]), (2, 1))
    """
    num_steps, num_envs = ended.shape
    starts = np.ones_like(ended)
    starts[1:] = ended[:-1] | ~valid[:-1]
    time = np.arange(num_steps)[:, None]
    if longest is not None:
        since = time - np.maximum.accumulate(np.where(starts, time, 0), axis=0)
        starts |= since % longest == 0
    positions = time * num_envs + np.arange(num_envs)
    rows = positions.T[valid.T]
    (first,) = np.nonzero(starts.T[valid.T])
    lengths = np.diff(np.append(first, len(rows)))
    return rows, tuple(lengths.tolist())
