"""What optimizers over flat vectors have in common.

The parameters of all networks become views of one vector, their gradients views of another.
Clipping a network's gradient is then one norm and one product, and the optimizer one call,
whatever the number of layers.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
import mmap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.errors import ConfigError

__all__ = ["FlatOptimizer", "in_shared_memory", "run_lengths"]

_ONE_THREAD = 8192  # numbers


class FlatOptimizer(abc.ABC):
    """A policy's parameters and gradients in flat vectors, with a clip for each network.

    The module keeps its parameters: they only move into shared storage. Loading a state dict
    writes through to it; a parameter that was re-allocated since (`module.to(...)`) is taken up
    again by `bind`. A subclass says how a step is made of a gradient.

    Args:
        groups: Parameters by network; each network is clipped on its own. A network of several
            types is clipped in parts.
        shared: Keep parameters and state where forked processes see each other's changes.

    Attributes:
        parameters: One vector `[P]` per network.
        gradients: One vector `[P]` per network.
        names: Of the networks; of the parts of one, where it has several types.
    """

    def __init__(
        self, groups: Mapping[str, Sequence[nn.Parameter]], *, shared: bool = False
    ) -> None:
        networks: dict[tuple[torch.dtype, torch.device], dict[str, list[nn.Parameter]]] = {}
        self._groups: dict[str, str] = {}  # by name of the network's part
        for name, members in groups.items():
            kinds = {(p.dtype, p.device): None for p in members if p.requires_grad}
            for number, kind in enumerate(kinds):
                part = name if number == 0 else f"{name}{number}"
                self._groups[part] = name
                networks.setdefault(kind, {})[part] = [
                    p for p in members if p.requires_grad and (p.dtype, p.device) == kind
                ]
        if not networks:
            raise ConfigError(
                "the policy has no parameters to train; leave requires_grad True for some of them"
            )
        self.names = [name for parts in networks.values() for name in parts]
        self._members = [members for parts in networks.values() for members in parts.values()]
        # One vector for all networks of a type, and each network's part of it.
        self._vectors = [
            torch.cat([p.detach().reshape(-1) for members in parts.values() for p in members])
            for parts in networks.values()
        ]
        if shared:
            self._vectors = [in_shared_memory(vector) for vector in self._vectors]
        self._sizes = [
            [sum(p.numel() for p in members) for members in parts.values()]
            for parts in networks.values()
        ]
        self._gradient_vectors = [torch.zeros_like(vector) for vector in self._vectors]
        self.parameters = self._parts_of(self._vectors)
        self.gradients = self._parts_of(self._gradient_vectors)
        self._on_cpu = all(vector.device.type == "cpu" for vector in self._vectors)
        self._bound = list(self._split(self.parameters, self.gradients))
        self.bind()

    def _parts_of(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """The networks' own parts of vectors of all networks of a type."""
        pairs = zip(vectors, self._sizes, strict=True)
        return [part for vector, sizes in pairs for part in torch.split(vector, sizes)]

    def _split(self, *vectors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """Every parameter with its part `[p]` of each of the vectors, one vector per network."""
        for group, *own in zip(self._members, *vectors, strict=True):
            sizes = [parameter.numel() for parameter in group]
            yield from zip(group, *(vector.split(sizes) for vector in own), strict=True)

    def _spans(
        self, vectors: Sequence[Tensor], lengths: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        """Views of each network's vector that hold so many neighbouring parameters each."""
        spans = []
        for vector, group, own in zip(vectors, self._members, lengths, strict=True):
            sizes = iter([parameter.numel() for parameter in group])
            spans.append([*vector.split([sum(itertools.islice(sizes, n)) for n in own])])
        return spans

    def bind(self) -> None:
        """Make every parameter and gradient a view of its vector, keeping its present value."""
        for parameter, part, gradient in self._bound:
            if parameter.data_ptr() != part.data_ptr():
                part.copy_(parameter.detach().reshape(-1))
                parameter.data = part.view(parameter.shape)
            # Always anew: whoever converts a module changes the data of its gradients, too.
            parameter.grad = gradient.view(parameter.shape)

    @property
    def networks(self) -> list[list[nn.Parameter]]:
        """The parameters of each network."""
        return self._members

    @property
    def members(self) -> list[nn.Parameter]:
        """The parameters, network after network."""
        return [parameter for group in self._members for parameter in group]

    def is_finite(self) -> bool:
        """True if no parameter is NaN or infinite."""
        # A finite sum is one of finite numbers; only one that overflows needs a second look.
        return all(
            math.isfinite(vector.sum()) or bool(torch.isfinite(vector).all())
            for vector in self._vectors
        )

    def zero_grad(self) -> None:
        """Set all gradients to 0, in place."""
        for vector in self._gradient_vectors:
            vector.zero_()

    def rates(self, learning_rate: float, own: Mapping[str, float]) -> float | list[float]:
        """What `step` takes: one learning rate if all are equal, else one per network.

        Args:
            learning_rate: Of every group that has none of its own.
            own: Learning rates by name of a group.
        """
        rates = [own.get(self._groups[name], learning_rate) for name in self.names]
        return rates[0] if len(set(rates)) == 1 else rates

    def step(self, learning_rate: float | list[float], max_grad_norm: float) -> float | Tensor:
        """Clip each network's gradient and take one step; nothing is read back from a GPU.

        Args:
            learning_rate: Step size, one for all or one per network.
            max_grad_norm: Limit on the norm of each network's gradient.

        Returns:
            Norm of the whole gradient before clipping: a number on the CPU, else a tensor `[]`.
        """
        if self._on_cpu:
            norm: float | Tensor = math.hypot(*self._clip(self._gradient_arrays, max_grad_norm))
        else:
            norm = _clip(self.gradients, max_grad_norm)
        self._descend(learning_rate)
        return norm

    @staticmethod
    def _clip(gradients: Sequence[np.ndarray], max_grad_norm: float) -> list[float]:
        """Clip gradients on the CPU, each by itself; returns their norms before."""
        return [_clip_on_cpu(gradient, max_grad_norm) for gradient in gradients]

    @functools.cached_property
    def _gradient_arrays(self) -> list[np.ndarray]:
        """The gradients on the CPU as NumPy sees them."""
        return [gradient.numpy() for gradient in self.gradients]

    @abc.abstractmethod
    def _descend(self, learning_rate: float | list[float]) -> None:
        """Change the parameters by the clipped gradients."""

    @abc.abstractmethod
    def take_over(self, other: Self) -> None:
        """Continue with another optimizer's state where a parameter is its too."""

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what it keeps between steps, named `<network>.<name>`."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """


def in_shared_memory(tensor: Tensor) -> Tensor:
    """A copy in memory that belongs to this process and to those forked from it."""
    if not tensor.numel():
        return tensor.clone()
    block = mmap.mmap(-1, tensor.nbytes)
    shared = torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel())
    return shared.view(tensor.shape).copy_(tensor)


def run_lengths(values: Sequence[object]) -> list[int]:
    """How many neighbours are equal, from the first to the last."""
    return [len(list(run)) for _, run in itertools.groupby(values)]


def copy_state(state: Mapping[str, Tensor], *homes: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Copy tensors into the first of `homes` that has their names and shapes, and return it.

    Raises:
        ValueError: None has.
    """
    shapes = {name: tensor.shape for name, tensor in state.items()}
    for home in homes:
        if {name: tensor.shape for name, tensor in home.items()} == shapes:
            for name, tensor in home.items():
                tensor.copy_(state[name])
            return home
    raise ValueError(
        f"optimizer state is of another policy: has {sorted(state)}, wanted {sorted(homes[-1])} "
        "with the sizes of its networks"
    )


def _clip(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Clip each gradient by itself; returns the norm of them all before."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    for gradient, norm in zip(gradients, norms, strict=True):
        gradient.mul_((limit / (norm + 1e-6)).clamp_(max=1.0))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _clip_on_cpu(gradient: np.ndarray, limit: float) -> float:
    """The same for one gradient, in few calls: what is on the host can be looked at."""
    # NumPy's product of longer vectors would start threads of its own.
    if gradient.size <= _ONE_THREAD:
        norm = math.sqrt(float(gradient.dot(gradient)))
    else:
        norm = float(torch.linalg.vector_norm(torch.from_numpy(gradient)))
    if norm + 1e-6 > limit:
        gradient *= limit / (norm + 1e-6)
    return norm
