"""Any optimizer of `torch.optim` over flat vectors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.errors import ConfigError
from ppo.learner.flat_optimizer import FlatOptimizer, copy_state

__all__ = ["UNFIT", "TorchOptimizer", "check_options", "optimizer_names"]

UNFIT = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it takes sparse gradients only",
    "Adafactor": "it depends on the shape of each matrix, which flat vectors do not have",
    "Muon": "it depends on the shape of each matrix, which flat vectors do not have",
}
"""Optimizers of `torch.optim` that do not work on flat vectors, and why."""


def optimizer_names() -> list[str]:
    """Names of the optimizers of `torch.optim` that work on flat vectors."""
    return sorted(
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and name not in UNFIT
    )


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the optimizer works here and takes these options."""
    if name in UNFIT:
        raise ConfigError(
            f"optimizer {name} cannot be used here: {UNFIT[name]}; take adam or AdamW"
        )
    if "lr" in options or "params" in options:
        raise ConfigError("optimizer_kwargs has lr or params; the rate is set by learning_rate")
    try:
        getattr(torch.optim, name)([torch.zeros(1)], lr=0.0, **options)
    except Exception as error:  # whatever torch makes of the options
        raise ConfigError(f"optimizer_kwargs do not fit {name}: {error}") from error


class TorchOptimizer(FlatOptimizer):
    """An optimizer of `torch.optim` whose parameters are the vectors of the networks.

    Those it admits work number by number, so they do to a vector what they do to its parts.

    Args:
        groups: Parameters by network, see `FlatOptimizer`.
        name: One of `optimizer_names`.
        options: Keyword arguments of the class, without the learning rate.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        name: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(groups)
        self._name, self._options = name, options
        self._optimizer = self._make(self.parameters, 0.0)
        for vector, gradient in zip(self.parameters, self.gradients, strict=True):
            vector.grad = gradient

    def _make(self, vectors: Sequence[Tensor], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer, with one group of parameters per network."""
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self._name)(
            [{"params": [vector]} for vector in vectors], lr=learning_rate, **self._options
        )
        return optimizer

    def _descend(self, learning_rate: float | list[float]) -> None:
        groups = self._optimizer.param_groups
        rates = learning_rate if isinstance(learning_rate, list) else [learning_rate] * len(groups)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()

    def take_over(self, other: Self) -> None:
        """Continue with another optimizer's state where a parameter is its too."""
        old = other._states()
        if not any(old):
            return  # it keeps nothing, or has not taken a step
        new = self._states_after_a_step(other._optimizer.param_groups[0]["lr"])
        for name in new[0]:
            ours, theirs = [state[name] for state in new], [state[name] for state in old]
            if ours[0].ndim == 0:  # a count: they take every step together
                for count in ours:
                    count.copy_(theirs[0])
                continue
            known = {id(parameter): part for parameter, part in other._split(theirs)}
            for parameter, part in self._split(ours):
                part.copy_(known.get(id(parameter), part))
        self._use(new)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the optimizer keeps, named `<network>.<name>`."""
        return {name: tensor.clone() for name, tensor in self._named(self._states()).items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """
        fresh = self._states_of(self._make(self.parameters, 0.0), self.parameters)
        later = self._states_after_a_step()
        homes = [self._named(fresh), self._named(later)]
        self._use(fresh if copy_state(state, *homes) is homes[0] else later)

    def _states(self) -> list[dict[str, Tensor]]:
        return self._states_of(self._optimizer, self.parameters)

    def _states_after_a_step(self, learning_rate: float = 0.0) -> list[dict[str, Tensor]]:
        """What the optimizer keeps per network after a step without a gradient.

        Most make their state in the first step, and only then is known what belongs to it.
        """
        vectors = [torch.zeros_like(vector) for vector in self.parameters]
        optimizer = self._make(vectors, learning_rate)
        for vector in vectors:
            vector.grad = torch.zeros_like(vector)
        optimizer.step()
        return self._states_of(optimizer, vectors)

    @staticmethod
    def _states_of(
        optimizer: torch.optim.Optimizer, vectors: Sequence[Tensor]
    ) -> list[dict[str, Tensor]]:
        return [
            {k: x for k, x in optimizer.state.get(vector, {}).items() if isinstance(x, Tensor)}
            for vector in vectors
        ]

    def _named(self, states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            f"{name}.{kind}": tensor
            for name, state in zip(self.names, states, strict=True)
            for kind, tensor in state.items()
        }

    def _use(self, states: Sequence[dict[str, Tensor]]) -> None:
        for vector, state in zip(self.parameters, states, strict=True):
            self._optimizer.state[vector] = state
