"""Adam over flat vectors."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.learner.flat_optimizer import (
    FlatOptimizer,
    copy_state,
    in_shared_memory,
    run_lengths,
)

__all__ = ["FlatAdam"]

_BETAS = (0.9, 0.999)


class FlatAdam(FlatOptimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), all networks of a type in one call of torch.

    A parameter that is new to it (see `take_over`) counts its steps from 0, as in `torch.optim`.

    Args:
        groups: Parameters by network, see `FlatOptimizer`.
        eps: Floor of the denominator.
        weight_decay: λ of the decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2):
            every step first takes a share `learning rate * λ` from every parameter.
        shared: Keep parameters and moments where forked processes see each other's changes.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        eps: float,
        weight_decay: float = 0.0,
        *,
        shared: bool = False,
    ) -> None:
        super().__init__(groups, shared=shared)
        self._update: Callable[..., None] = functools.partial(
            torch._fused_adamw_ if weight_decay else torch._fused_adam_,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )
        exp_avg = [torch.zeros_like(vector) for vector in self._vectors]
        exp_avg_sq = [torch.zeros_like(vector) for vector in self._vectors]
        if shared:
            exp_avg, exp_avg_sq = (
                [in_shared_memory(vector) for vector in moments]
                for moments in (exp_avg, exp_avg_sq)
            )
        self._exp_avg, self._exp_avg_sq = self._parts_of(exp_avg), self._parts_of(exp_avg_sq)
        self._places: list[list[int]] = []  # in `_steps`, of the count of each parameter
        self._steps: Tensor
        self._count_from([[0.0] * len(members) for members in self._members])

    def _count_from(self, counts: Sequence[Sequence[float]]) -> None:
        """Count on from these steps, given for each parameter of each network.

        Neighbours of the same count are handed to torch as one span of the vectors: as a rule the
        whole network, and all networks share one count, since they take every step together.
        """
        different = sorted({count for own in counts for count in own})
        places = [[different.index(count) for count in own] for own in counts]
        device = self.parameters[0].device
        steps = torch.tensor(different, dtype=torch.float32, device=device)
        if places == self._places:  # the spans are there
            self._steps.copy_(steps)
            return
        self._places, self._steps = places, steps
        self._counter = self._steps.numpy() if self._on_cpu else self._steps
        lengths = [run_lengths(own) for own in places]
        vectors = (self.parameters, self.gradients, self._exp_avg, self._exp_avg_sq)
        spans = zip(*(self._spans(vector, lengths) for vector in vectors), strict=True)
        own_steps = ([steps[i] for i, _ in itertools.groupby(own)] for own in places)
        self._by_network = [[*part, [], own] for part, own in zip(spans, own_steps, strict=True)]
        self._whole = _joined(self._by_network)

    def _descend(self, learning_rate: float | list[float]) -> None:
        self._counter += 1.0
        if not isinstance(learning_rate, list):
            self._update(*self._whole, lr=learning_rate)
            return
        for lists, rate in zip(self._by_network, learning_rate, strict=True):
            self._update(*lists, lr=rate)

    @property
    def step_counts(self) -> list[list[float]]:
        """Steps taken so far with each parameter of each network."""
        steps = self._steps.tolist()
        return [[steps[place] for place in own] for own in self._places]

    @step_counts.setter
    def step_counts(self, counts: list[list[float]]) -> None:
        self._count_from(counts)

    def step_some(
        self, networks: Sequence[int], learning_rate: float | list[float], max_grad_norm: float
    ) -> list[float]:
        """As `step` on the CPU, for some of the networks, in ascending order; returns their norms.

        Another process takes the step for the others, and every network changes as by `step`.
        """
        norms = self._clip([self._gradient_arrays[index] for index in networks], max_grad_norm)
        self._counter += 1.0
        for index in networks:
            rate = learning_rate[index] if isinstance(learning_rate, list) else learning_rate
            self._update(*self._by_network[index], lr=rate)
        return norms

    def take_over(self, other: Self) -> None:
        """Continue with another optimizer's moments where a parameter is its too."""
        counts = dict(zip(map(id, other.members), itertools.chain(*other.step_counts), strict=True))
        self._count_from([[counts.get(id(p), 0.0) for p in group] for group in self._members])
        theirs = {id(p): state for p, *state in other._split(other._exp_avg, other._exp_avg_sq)}
        for parameter, *state in self._split(self._exp_avg, self._exp_avg_sq):
            for ours, old in zip(state, theirs.get(id(parameter), ()), strict=False):
                ours.copy_(old)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the moments and step counts, named `<network>.<name>`.

        A network's step count is one number, or one per parameter where they differ.
        """
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """
        counts = [torch.zeros(len(members)) for members in self._members]
        for index, name in enumerate(self.names):
            if not state.get(f"{name}.step", counts[index]).ndim:
                counts[index] = torch.zeros(())
        copy_state(state, self._state(counts))
        groups = zip(counts, self._members, strict=True)
        self._count_from([own.expand(len(members)).tolist() for own, members in groups])

    def _state(self, counts: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        if counts is None:
            counts = [self._steps[own[0] if len({*own}) == 1 else own] for own in self._places]
        kinds = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": counts}
        return {
            f"{name}.{kind}": tensors[index]
            for kind, tensors in kinds.items()
            for index, name in enumerate(self.names)
        }


def _joined(calls: Sequence[Sequence[list[Tensor]]]) -> list[list[Tensor]]:
    """The arguments of several calls as those of one, which treats each network by itself."""
    return [[tensor for part in parts for tensor in part] for parts in zip(*calls, strict=True)]
