"""Adam over one flat vector per network.

The parameters of a network become views of one vector, its gradients views of another. Clipping a
network's gradient is then one norm and one product, and the optimizer one call, whatever the
number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["FlatAdam"]

_BETAS = (0.9, 0.999)


class FlatAdam:
    """Adam (Kingma and Ba 2015, algorithm 1) with a gradient clip for each network.

    The module keeps its parameters: they only move into shared storage. Loading a state dict
    writes through to it; a parameter that was re-allocated since (`module.to(...)`) is taken up
    again by `bind`.

    Args:
        groups: Parameters by network; each network is clipped on its own.
        eps: Floor of the denominator.

    Attributes:
        parameters: One vector `[P]` per network.
        gradients: One vector `[P]` per network.
    """

    def __init__(self, groups: Mapping[str, Sequence[nn.Parameter]], eps: float) -> None:
        self._eps = eps
        self._members: list[list[nn.Parameter]] = []
        self._names: list[str] = []
        for name, members in groups.items():
            # Vectors need one type and device; a network of several is clipped in parts.
            kinds = {(p.dtype, p.device): None for p in members if p.requires_grad}
            for number, kind in enumerate(kinds):
                self._names.append(name if number == 0 else f"{name}{number}")
                self._members.append(
                    [p for p in members if p.requires_grad and (p.dtype, p.device) == kind]
                )
        if not self._members:
            raise ValueError("the policy has no parameters to train")
        self.parameters = [
            torch.cat([p.detach().reshape(-1) for p in group]) for group in self._members
        ]
        self.gradients = [torch.zeros_like(vector) for vector in self.parameters]
        self._exp_avg = [torch.zeros_like(vector) for vector in self.parameters]
        self._exp_avg_sq = [torch.zeros_like(vector) for vector in self.parameters]
        self._steps = [
            torch.zeros((), dtype=torch.float32, device=vector.device) for vector in self.parameters
        ]
        self.bind()

    def bind(self) -> None:
        """Make every parameter and gradient a view of its vector, keeping its present value."""
        for group, vector, gradient in zip(
            self._members, self.parameters, self.gradients, strict=True
        ):
            start = 0
            for parameter in group:
                part = slice(start, start + parameter.numel())
                view = vector[part].view(parameter.shape)
                if parameter.data_ptr() != view.data_ptr():
                    view.copy_(parameter.detach())
                    parameter.data = view
                parameter.grad = gradient[part].view(parameter.shape)
                start = part.stop

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(vector.numel() for vector in self.parameters)

    def is_finite(self) -> bool:
        """True if no parameter is NaN or infinite."""
        return all(bool(torch.isfinite(vector).all()) for vector in self.parameters)

    def zero_grad(self) -> None:
        """Set all gradients to 0, in place."""
        for gradient in self.gradients:
            gradient.zero_()

    @torch.no_grad()
    def step(self, learning_rate: float, max_grad_norm: float) -> Tensor:
        """Clip each network's gradient and take one step; nothing is read back to the host.

        Args:
            learning_rate: Step size.
            max_grad_norm: Limit on the norm of each vector's gradient.

        Returns:
            Norm of the whole gradient before clipping, without axes.
        """
        norms = torch._foreach_norm(self.gradients)
        for gradient, norm in zip(self.gradients, norms, strict=True):
            gradient.mul_((max_grad_norm / (norm + 1e-6)).clamp_(max=1.0))
        torch._foreach_add_(self._steps, 1.0)
        torch._fused_adam_(
            self.parameters,
            self.gradients,
            self._exp_avg,
            self._exp_avg_sq,
            [],
            self._steps,
            lr=learning_rate,
            beta1=_BETAS[0],
            beta2=_BETAS[1],
            weight_decay=0.0,
            eps=self._eps,
            amsgrad=False,
            maximize=False,
        )
        return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))

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
        kinds = {"exp_avg": self._exp_avg, "exp_avg_sq": self._exp_avg_sq, "step": self._steps}
        return {
            f"{name}.{kind}": tensors[index]
            for kind, tensors in kinds.items()
            for index, name in enumerate(self._names)
        }
