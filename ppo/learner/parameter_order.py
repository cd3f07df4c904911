"""In which order an optimizer's vectors hold the parameters, for files that another order reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppo.learner.flat_optimizer import FlatOptimizer

__all__ = ["ParameterOrder", "in_order", "parameter_order"]

ParameterOrder = dict[str, list[list[Any]]]
"""`[name, size]` of every parameter, by network."""


def parameter_order(policy: nn.Module, optimizer: FlatOptimizer) -> ParameterOrder | None:
    """The parameters of each network as the optimizer has them.

    None if the policy does not have one of them any more: it was exchanged since the last update.
    """
    names = {id(parameter): name for name, parameter in policy.named_parameters()}
    if not all(id(parameter) in names for parameter in optimizer.members):
        return None
    return {
        network: [[names[id(parameter)], parameter.numel()] for parameter in members]
        for network, members in zip(optimizer.names, optimizer.networks, strict=True)
    }


def in_order(
    tensors: Mapping[str, Tensor], given: ParameterOrder, wanted: ParameterOrder
) -> dict[str, Tensor]:
    """An optimizer's `state_dict` with the parameters of each network in another order.

    What has not the size of a network is left as it is.

    Raises:
        ValueError: The two orders are not of the same parameters.
    """
    for network in sorted(given.keys() | wanted.keys()):
        theirs, ours = given.get(network, []), wanted.get(network, [])
        if sorted(theirs) != sorted(ours):
            lost, new = (
                [f"{name} ({size})" for name, size in one if [name, size] not in other]
                for one, other in ((theirs, ours), (ours, theirs))
            )
            raise ValueError(
                f"the optimizer's state of {network} is of other parameters (and sizes): it has "
                f"{lost}, the policy has {new}"
            )
        if theirs != ours:
            tensors = _network_in_order(tensors, network, theirs, ours)
    return dict(tensors)


def _network_in_order(
    tensors: Mapping[str, Tensor], network: str, theirs: list[list[Any]], ours: list[list[Any]]
) -> dict[str, Tensor]:
    places = [theirs.index(entry) for entry in ours]
    sizes = [size for _, size in theirs]
    result = {}
    for key, tensor in tensors.items():
        owner, _, kind = key.rpartition(".")
        whole, _, number = owner.rpartition(".")
        if owner == network:
            result[key] = _moved(tensor, places, sizes)
        elif whole == network and number.isdecimal() and int(number) < len(places):
            result[f"{network}.{places.index(int(number))}.{kind}"] = tensor
        else:
            result[key] = tensor
    return result


def _moved(tensor: Tensor, places: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """A vector over all numbers of a network, or a count of each parameter, in the new order."""
    if tensor.shape == (sum(sizes),):
        parts = tensor.split([*sizes])
    elif tensor.shape == (len(sizes),):
        parts = tensor.split(1)
    else:
        return tensor
    return torch.cat([parts[place] for place in places])
