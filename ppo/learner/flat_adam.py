"""Adam over flat vectors.

The parameters of all networks become views of one vector, their gradients views of another.
Clipping a network's gradient is then one norm and one product, and the optimizer one call,
whatever the number of layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["FlatAdam"]

_BETAS = (0.9, 0.999)
_ONE_THREAD = 8192  # numbers


class FlatAdam:
    """Adam (Kingma and Ba 2015, algorithm 1) with a gradient clip for each network.

    The module keeps its parameters: they only move into shared storage. Loading a state dict
    writes through to it; a parameter that was re-allocated since (`module.to(...)`) is taken up
    again by `bind`.

    Args:
        groups: Parameters by network; each network is clipped on its own. A network of several
            types is clipped in parts.
        eps: Floor of the denominator.

    Attributes:
        parameters: One vector `[P]` per network.
        gradients: One vector `[P]` per network.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]], eps: float) -> None:
        self._eps = eps
        networks: dict[tuple[torch.dtype, torch.device], dict[str, list[nn.Parameter]]] = {}
        for name, members in groups.items():
            kinds = {(p.dtype, p.device): None for p in members if p.requires_grad}
            for number, kind in enumerate(kinds):
                part = name if number == 0 else f"{name}{number}"
                networks.setdefault(kind, {})[part] = [
                    p for p in members if p.requires_grad and (p.dtype, p.device) == kind
                ]
        if not networks:
            raise ValueError("the policy has no parameters to train")
        # One vector for all networks of a type, and each network's part of it.
        self._vectors = [_Vectors(list(parts.values())) for parts in networks.values()]
        self._names = [name for parts in networks.values() for name in parts]
        self._members = [members for parts in networks.values() for members in parts.values()]
        self.parameters = [part for v in self._vectors for part in v.parts(v.parameters)]
        self.gradients = [part for v in self._vectors for part in v.parts(v.gradients)]
        self._exp_avg = [part for v in self._vectors for part in v.parts(v.exp_avg)]
        self._exp_avg_sq = [part for v in self._vectors for part in v.parts(v.exp_avg_sq)]
        # Counted once for all: they take every step together.
        self._step_count = torch.zeros((), dtype=torch.float32, device=self.parameters[0].device)
        self._state_lists = [
            [v.parameters for v in self._vectors],
            [v.gradients for v in self._vectors],
            [v.exp_avg for v in self._vectors],
            [v.exp_avg_sq for v in self._vectors],
            [],
            [self._step_count] * len(self._vectors),
        ]
        self._on_cpu = all(v.parameters.device.type == "cpu" for v in self._vectors)
        self._parts = list(self._split(self.parameters, self.gradients))
        self.bind()

    def bind(self) -> None:
        """Make every parameter and gradient a view of its vector, keeping its present value."""
        for parameter, part, gradient in self._parts:
            if parameter.data_ptr() != part.data_ptr():
                part.copy_(parameter.detach().reshape(-1))
                parameter.data = part.view(parameter.shape)
            # Always anew: whoever converts a module changes the data of its gradients, too.
            parameter.grad = gradient.view(parameter.shape)

    def take_over(self, other: FlatAdam) -> None:
        """Continue with another optimizer's moments where a parameter is its too."""
        self._step_count.copy_(other._step_count)
        theirs = {id(p): state for p, *state in other._split(other._exp_avg, other._exp_avg_sq)}
        for parameter, *state in self._split(self._exp_avg, self._exp_avg_sq):
            for ours, old in zip(state, theirs.get(id(parameter), ()), strict=False):
                ours.copy_(old)

    def _split(
        self, one: Sequence[Tensor], other: Sequence[Tensor]
    ) -> Iterator[tuple[nn.Parameter, Tensor, Tensor]]:
        """Every parameter with its part `[p]` of two vectors per network."""
        for group, *vectors in zip(self._members, one, other, strict=True):
            sizes = [parameter.numel() for parameter in group]
            yield from zip(group, *(vector.split(sizes) for vector in vectors), strict=True)

    @property
    def members(self) -> list[nn.Parameter]:
        """The parameters, network after network."""
        return [parameter for group in self._members for parameter in group]

    def is_finite(self) -> bool:
        """True if no parameter is NaN or infinite."""
        # A finite sum is one of finite numbers; only one that overflows needs a second look.
        return all(
            math.isfinite(v.parameters.sum()) or bool(torch.isfinite(v.parameters).all())
            for v in self._vectors
        )

    def zero_grad(self) -> None:
        """Set all gradients to 0, in place."""
        for vectors in self._vectors:
            vectors.gradients.zero_()

    def step(self, learning_rate: float, max_grad_norm: float) -> float | Tensor:
        """Clip each network's gradient and take one step; nothing is read back from a GPU.

        Args:
            learning_rate: Step size.
            max_grad_norm: Limit on the norm of each network's gradient.

        Returns:
            Norm of the whole gradient before clipping: a number on the CPU, else a tensor `[]`.
        """
        if self._on_cpu:
            norm: float | Tensor = math.hypot(
                *[_clip_on_cpu(gradient.numpy(), max_grad_norm) for gradient in self.gradients]
            )
            self._step_count.numpy()[...] += 1.0
        else:
            norm = _clip(self.gradients, max_grad_norm)
            self._step_count.add_(1.0)
        torch._fused_adam_(
            *self._state_lists,
            lr=learning_rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the moments and step counts, named `<network>.<name>`."""
        return {f"{name}": tensor.clone() for name, tensor in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """
        ours = self._state()
        if {name: t.shape for name, t in state.items()} != {n: t.shape for n, t in ours.items()}:
            raise ValueError(
                f"optimizer state is of another policy: has {sorted(state)}, wanted {sorted(ours)} "
                "with the sizes of its networks"
            )
        for name, tensor in ours.items():
            tensor.copy_(state[name])

    def _state(self) -> dict[str, Tensor]:
        kinds = {
            "exp_avg": self._exp_avg,
            "exp_avg_sq": self._exp_avg_sq,
            "step": [self._step_count] * len(self._names),
        }
        return {
            f"{name}.{kind}": tensors[index]
            for kind, tensors in kinds.items()
            for index, name in enumerate(self._names)
        }


class _Vectors:
    """Parameters, gradients and moments of networks of one type, each in one vector `[P]`."""

    def __init__(self, networks: list[list[nn.Parameter]]) -> None:
        flat = [p.detach().reshape(-1) for members in networks for p in members]
        self._sizes = [sum(p.numel() for p in members) for members in networks]
        self.parameters = torch.cat(flat)
        self.gradients = torch.zeros_like(self.parameters)
        self.exp_avg = torch.zeros_like(self.parameters)
        self.exp_avg_sq = torch.zeros_like(self.parameters)

    def parts(self, vector: Tensor) -> Sequence[Tensor]:
        """The networks' own parts of one of the vectors."""
        parts: Sequence[Tensor] = torch.split(vector, self._sizes)
        return parts


def _clip(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Clip each gradient by itself; returns the norm of them all before."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    for gradient, norm in zip(gradients, norms, strict=True):
        gradient.mul_((limit / (norm + 1e-6)).clamp_(max=1.0))
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return total


def _clip_on_cpu(gradient: np.ndarray, limit: float) -> float:
    """The same for one gradient, in few calls: what is on the host can be looked at."""
    # NumPy's product of longer vectors would start threads.
    short = gradient.size <= _ONE_THREAD
    square = np.dot(gradient, gradient) if short else np.add.reduce(gradient * gradient)
    norm = math.sqrt(float(square))
    if norm + 1e-6 > limit:
        gradient *= limit / (norm + 1e-6)
    return norm
