"""State of policy and optimizer as named tensors: to undo an update, and to save a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Undo", "load_optimizer_tensors", "optimizer_tensors"]


class Undo(NamedTuple):
    """Copies of all tensors of policy and optimizer, to go back to if an update fails."""

    policy: dict[str, Tensor]
    optimizer: dict[str, Tensor]

    @classmethod
    def take(cls, policy: nn.Module, optimizer: torch.optim.Optimizer) -> Undo:
        """Copy the present state."""
        parameters = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        return cls(parameters, optimizer_tensors(optimizer))

    def apply(self, policy: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Go back to the copied state."""
        policy.load_state_dict(self.policy)
        load_optimizer_tensors(optimizer, self.optimizer)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of the optimizer's tensors, named `<number of the parameter>.<name>`."""
    state: dict[Any, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": value.clone()
        for index, values in state.items()
        for name, value in values.items()
        if isinstance(value, Tensor)
    }


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned.

    Raises:
        ValueError: The names are not those of this optimizer's parameters.
    """
    state: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = optimizer.state_dict()["param_groups"]
    count = sum(len(group["params"]) for group in groups)
    if not set(state) <= set(range(count)):
        raise ValueError(f"optimizer state is for other parameters: {sorted(state)} of {count}")
    optimizer.load_state_dict({"state": state, "param_groups": groups})
