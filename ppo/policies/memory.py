"""Memory behind a body: cores that step through episodes and replay them whole.

A memory's state is one flat vector `[K]` per environment; zeros begin an episode. `step` is what
acting calls, once per time step; `replay` is what learning calls: whole sequences from the states
before their first rows, without a loop over time.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ppo.policies.bodies import orthogonal_linear, with_memory
from ppo.policies.gru_layer import GRULayer

__all__ = ["AttentionMemory", "GRUMemory", "LSTMMemory", "SequencesLike", "make_memory"]


class SequencesLike(Protocol):
    """How rows make up sequences.

    Attributes:
        lengths: Number of rows of each sequence; the sequences lie one after the other.
        states: State before the first row of each sequence, `[S, K]`.
    """

    @property
    def lengths(self) -> tuple[int, ...]: ...  # noqa: D102

    @property
    def states(self) -> Tensor: ...  # noqa: D102


class _Recurrent(nn.Module):
    """One layer of torch's, with orthogonal weights for each gate and zero biases.

    Args:
        num_inputs: Width of the features.
        size: Width of the output.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.
    """

    _layer: ClassVar[Any]
    _parts: ClassVar[int]  # vectors that make up a state; the first one is the output

    def __init__(self, num_inputs: int, size: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.num_features = size
        self.state_size = self._parts * size
        # Made on the meta device, it does not draw on the global generator.
        self.core: nn.RNNBase = self._layer(num_inputs, size, device="meta")
        if generator is not None:
            with_memory(self.core)
            with torch.no_grad():
                for weight in (self.core.weight_ih_l0, self.core.weight_hh_l0):
                    for gate in cast("Tensor", weight).split(size):
                        nn.init.orthogonal_(gate, generator=generator)
                nn.init.zeros_(cast("Tensor", self.core.bias_ih_l0))
                nn.init.zeros_(cast("Tensor", self.core.bias_hh_l0))

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[B, H]` and next states `[B, K]` of features `[B, F]` and states `[B, K]`."""
        raise NotImplementedError

    def replay(self, features: Tensor, sequences: SequencesLike) -> Tensor:
        """Outputs `[B, H]` of features `[B, F]`, the rows of sequences one after the other."""
        padded, rows = _padded(features, sequences.lengths)  # [L, S, F]
        parts = sequences.states.unsqueeze(0).chunk(self._parts, dim=-1)  # [1, S, H] each
        start = tuple(part.contiguous() for part in parts)
        with _scattered_weights(features.device):
            outputs, _ = self.core(padded, start if len(start) > 1 else start[0])
        return _unpadded(outputs, rows)

    def _gates(self, features: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What the features and what the state contribute to every gate, `[B, gates * H]`."""
        core: Any = self.core
        return (
            F.linear(features, core.weight_ih_l0, core.bias_ih_l0),
            F.linear(hidden, core.weight_hh_l0, core.bias_hh_l0),
        )


class LSTMMemory(_Recurrent):
    r"""Long short-term memory; its state is the output h and the cell c, `[2H]`.

    .. math::

        c' = \sigma(f)\,c + \sigma(i)\tanh(g), \qquad h' = \sigma(o)\tanh(c'), \qquad
        (i, f, g, o) = W x + U h + b

    Args:
        num_inputs: Width of the features.
        size: Width H of the output.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.

    Example:
        >>> memory = LSTMMemory(3, 8, torch.Generator().manual_seed(0))
        >>> outputs, state = memory.step(torch.ones(5, 3), torch.zeros(5, memory.state_size))
        >>> outputs.shape, state.shape
        (torch.Size([5, 8]), torch.Size([5, 16]))

    Source:
        Hochreiter and Schmidhuber, "Long Short-Term Memory", 1997; the forget gate: Gers,
        Schmidhuber and Cummins, "Learning to Forget", 2000.
    """

    _layer = nn.LSTM
    _parts = 2

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[B, H]` and next states `[B, 2H]` of features `[B, F]` and states `[B, 2H]`."""
        hidden, cell = state.chunk(2, dim=-1)
        given, kept = self._gates(features, hidden)
        gates = given + kept
        # By plain operations, which can be recorded; one call of sigmoid costs less than three.
        add, keep, _, show = gates.sigmoid().chunk(4, dim=-1)
        new = gates.chunk(4, dim=-1)[2].tanh()
        cell = keep * cell + add * new
        hidden = show * cell.tanh()
        return hidden, torch.cat([hidden, cell], dim=-1)


class GRUMemory(_Recurrent):
    r"""Gated recurrent unit; its state is its output h, `[H]`.

    .. math::

        h' = (1 - z)\,n + z\,h, \qquad n = \tanh(W_n x + b_n + r\,(U_n h + d_n)), \qquad
        (r, z) = \sigma(W x + U h + b)

    Args:
        num_inputs: Width of the features.
        size: Width H of the output.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.

    Source:
        Cho et al., "Learning Phrase Representations using RNN Encoder–Decoder", 2014.
    """

    _layer = GRULayer
    _parts = 1

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[B, H]` and next states `[B, H]` of features `[B, F]` and states `[B, H]`."""
        size = self.num_features
        given, kept = self._gates(features, state)
        reset, keep = (given + kept)[:, : 2 * size].sigmoid().chunk(2, dim=-1)
        new = (given[:, 2 * size :] + reset * kept[:, 2 * size :]).tanh()
        hidden = new + keep * (state - new)
        return hidden, hidden


class AttentionMemory(nn.Module):
    r"""One block of a transformer that looks back over a window of steps.

    .. math::

        x' = x + \mathrm{softmax}\bigl(q K^\top / \sqrt{d} + b_{age}\bigr) V, \qquad
        y = x' + \mathrm{MLP}(x')

    Queries, keys, values and the MLP see normalised rows. Each head learns what an age is worth
    to it, so nothing depends on when an episode began. The state holds the rows x of the last
    steps and, as its last number, how many of them are real.

    Args:
        num_inputs: Width of the features.
        size: Width of the rows and of the output; a multiple of `heads`.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.
        window: Steps that an output may depend on, the present one among them.
        heads: Number of attention heads.

    Source:
        Vaswani et al., "Attention Is All You Need", 2017; normalised first, as in Parisotto et al.,
        "Stabilizing Transformers for Reinforcement Learning", 2020; biases by age: Raffel et al.,
        "Exploring the Limits of Transfer Learning", 2020, section 2.1.
    """

    def __init__(
        self,
        num_inputs: int,
        size: int,
        generator: torch.Generator | None,
        window: int = 16,
        heads: int = 4,
    ) -> None:
        super().__init__()
        if size % heads:
            raise ValueError(f"size must be a multiple of heads={heads}, got {size}")
        self.num_features = size
        self.state_size = (window - 1) * size + 1
        self._window, self._heads = window, heads
        device = "meta" if generator is None else "cpu"
        self.entry = orthogonal_linear(num_inputs, size, 1.0, generator)
        self.norm = nn.LayerNorm(size, device=device)
        self.query, self.key, self.value, self.mix = (
            orthogonal_linear(size, size, 1.0, generator) for _ in range(4)
        )
        self.age_bias = nn.Parameter(torch.zeros(heads, window, device=device))
        self.mlp = nn.Sequential(
            nn.LayerNorm(size, device=device),
            orthogonal_linear(size, 2 * size, 2.0**0.5, generator),
            nn.GELU(),
            orthogonal_linear(2 * size, size, 1.0, generator),
        )

    def step(self, features: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs `[B, H]` and next states `[B, K]` of features `[B, F]` and states `[B, K]`."""
        rows = self._rows(self.entry(features).unsqueeze(1), state)
        real = (state[:, -1:] + 1.0).clamp(max=self._window - 1)
        after = torch.cat([rows[:, 1:].flatten(1), real], dim=-1)
        return self._attend(rows, state[:, -1]).squeeze(1), after

    def replay(self, features: Tensor, sequences: SequencesLike) -> Tensor:
        """Outputs `[B, H]` of features `[B, F]`, the rows of sequences one after the other."""
        padded, places = _padded(self.entry(features), sequences.lengths)  # [L, S, H]
        rows = self._rows(padded.transpose(0, 1), sequences.states)
        outputs = self._attend(rows, sequences.states[:, -1])  # [S, L, H]
        return _unpadded(outputs.transpose(0, 1), places)

    def _rows(self, new: Tensor, states: Tensor) -> Tensor:
        """Rows `[S, window - 1 + L, H]`: those of the states, then the new ones `[S, L, H]`."""
        old = states[:, :-1].reshape(len(states), self._window - 1, self.num_features)
        return torch.cat([old, new], dim=1)

    def _attend(self, rows: Tensor, real: Tensor) -> Tensor:
        """Outputs `[S, L, H]` of rows `[S, J, H]`, `real [S]` of the old ones being real."""
        past = self._window - 1
        seen = self.norm(rows)
        query, key, value = (
            layer(x).unflatten(-1, (self._heads, -1)).transpose(1, 2)  # [S, heads, L or J, d]
            for layer, x in ((self.query, seen[:, past:]), (self.key, seen), (self.value, seen))
        )
        columns = torch.arange(rows.shape[1], device=rows.device)
        age = columns[past:, None] - columns  # [L, J]
        inside = (age >= 0) & (age <= past)
        known = (columns - past + real[:, None] >= 0)[:, None, None]  # [S, 1, 1, J]
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        scores = scores + self.age_bias[:, age.clamp(0, past)]
        weights = scores.masked_fill(~(inside & known), -torch.inf).softmax(-1)
        mixed = self.mix((weights @ value).transpose(1, 2).flatten(2))
        mixed = rows[:, past:] + mixed
        outputs: Tensor = mixed + self.mlp(mixed)
        return outputs


def _padded(features: Tensor, lengths: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
    """Sequences `[L, S, F]` of rows `[B, F]`, zeros behind short ones; places of the rows `[B]`.

    No places where the sequences are equally long: the rows are then only transposed.
    """
    longest, count = max(lengths), len(lengths)
    if min(lengths) == longest:
        return features.unflatten(0, (count, longest)).transpose(0, 1).contiguous(), None
    ends = np.cumsum(lengths)
    step = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)
    places = _to_device(step * count + np.repeat(np.arange(count), lengths), features.device)
    padded = features.new_zeros(longest * count, features.shape[1])
    return padded.index_copy(0, places, features).unflatten(0, (longest, count)), places


def _unpadded(outputs: Tensor, places: Tensor | None) -> Tensor:
    """The rows `[B, H]` of sequences `[L, S, H]`; inverse of `_padded`."""
    if places is None:
        return outputs.transpose(0, 1).flatten(0, 1)
    return outputs.flatten(0, 1).index_select(0, places)


@contextlib.contextmanager
def _scattered_weights(device: torch.device) -> Iterator[None]:
    """Let cuDNN copy weights that lie among those of other layers, and not advise against it.

    The optimizer keeps all parameters in one vector. Next to the steps of a sequence a copy of its
    weights is little work.
    """
    if device.type == "cpu":
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single")
        yield


def _to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Numbers on a device, for which the host does not wait."""
    tensor = torch.from_numpy(numbers)
    if device.type == "cpu":
        return tensor
    if device.type == "mps":  # which shares its memory with the CPU
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


Memory = LSTMMemory | GRUMemory | AttentionMemory

_RECURRENT: dict[str, type[LSTMMemory] | type[GRUMemory]] = {"lstm": LSTMMemory, "gru": GRUMemory}


def make_memory(
    kind: str,
    num_features: int,
    size: int,
    generator: torch.Generator | None,
    *,
    window: int = 16,
) -> Memory:
    """Build a memory of that kind.

    Args:
        kind: `"lstm"`, `"gru"` or `"attention"`.
        num_features: Width of the features that it gets.
        size: Width of its output.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.
        window: Steps that `"attention"` looks back over, with the present one.
    """
    if kind == "attention":
        return AttentionMemory(num_features, size, generator, window)
    return _RECURRENT[kind](num_features, size, generator)
