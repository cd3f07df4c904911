"""Adam over flat vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.learner.flat_optimizer import FlatOptimizer, copy_state, in_shared_memory

__all__ = ["FlatAdam"]

_BETAS = (0.9, 0.999)


class FlatAdam(FlatOptimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), all networks of a type in one call of torch.

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
        # Counted once for all: they take every step together.
        self._step_count = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)
        self._counter = self._step_count.numpy() if self._on_cpu else self._step_count
        parts = zip(self.parameters, self.gradients, self._exp_avg, self._exp_avg_sq, strict=True)
        self._by_network = [[*([x] for x in part), [], [self._step_count]] for part in parts]
        self._whole = _joined(self._by_network)

    def _descend(self, learning_rate: float | list[float]) -> None:
        self._counter += 1.0
        if not isinstance(learning_rate, list):
            self._update(*self._whole, lr=learning_rate)
            return
        for lists, rate in zip(self._by_network, learning_rate, strict=True):
            self._update(*lists, lr=rate)

    @property
    def step_count(self) -> float:
        """Steps taken so far."""
        return float(self._step_count)

    @step_count.setter
    def step_count(self, steps: float) -> None:
        self._step_count.fill_(steps)

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
        self._step_count.copy_(other._step_count)
        theirs = {id(p): state for p, *state in other._split(other._exp_avg, other._exp_avg_sq)}
        for parameter, *state in self._split(self._exp_avg, self._exp_avg_sq):
            for ours, old in zip(state, theirs.get(id(parameter), ()), strict=False):
                ours.copy_(old)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the moments and step counts, named `<network>.<name>`."""
        return {name: tensor.clone() for name, tensor in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """
        copy_state(state, self._state())

    def _state(self) -> dict[str, Tensor]:
        kinds = {
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "step": [self._step_count] * len(self.names),
        }
        return {
            f"{name}.{kind}": tensors[index]
            for kind, tensors in kinds.items()
            for index, name in enumerate(self.names)
        }


def _joined(calls: Sequence[Sequence[list[Tensor]]]) -> list[list[Tensor]]:
    """The arguments of several calls as those of one, which treats each network by itself."""
    return [[tensor for part in parts for tensor in part] for parts in zip(*calls, strict=True)]
