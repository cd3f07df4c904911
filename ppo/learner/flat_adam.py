"""Adam over flat vectors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.learner.flat_optimizer import FlatOptimizer, copy_state

__all__ = ["FlatAdam"]

_BETAS = (0.9, 0.999)


class FlatAdam(FlatOptimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), all networks of a type in one call of torch.

    Args:
        groups: Parameters by network, see `FlatOptimizer`.
        eps: Floor of the denominator.
        weight_decay: λ of the decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2):
            every step first takes a share `learning rate * λ` from every parameter.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups)
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
        self._exp_avg, self._exp_avg_sq = self._parts_of(exp_avg), self._parts_of(exp_avg_sq)
        # Counted once for all: they take every step together.
        self._step_count = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)
        steps = [self._step_count] * len(self._vectors)
        self._whole = [self._vectors, self._gradient_vectors, exp_avg, exp_avg_sq, [], steps]
        parts = zip(self.parameters, self.gradients, self._exp_avg, self._exp_avg_sq, strict=True)
        self._by_network = [[*([x] for x in part), [], [self._step_count]] for part in parts]

    def _descend(self, learning_rate: float | list[float]) -> None:
        if self._on_cpu:
            self._step_count.numpy()[...] += 1.0
        else:
            self._step_count.add_(1.0)
        if not isinstance(learning_rate, list):
            self._update(*self._whole, lr=learning_rate)
            return
        for lists, rate in zip(self._by_network, learning_rate, strict=True):
            self._update(*lists, lr=rate)

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
