"""Several independent yes-or-no choices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppo._checks import check_flags

__all__ = ["Bernoulli"]

# The highest logit, also of what a mask demands: sums of many stay finite.
_CERTAIN = 1e30


class Bernoulli:
    r"""Independent components that are 1 with probability :math:`\sigma(l)`, else 0.

    .. math:: \log p(a) = \sum_i \log\sigma\left((2 a_i - 1)\, l_i\right)

    Sampling compares with logistic noise: :math:`a_i = [l_i + \epsilon_i > 0]`.

    Args:
        logits: `[B, k]`, any finite numbers.
        mask: bool `[B, 2 k]`, for each component whether 0 and whether 1 is legal; at least one of
            them is. None: both.

    Raises:
        TypeError: The mask is not bool.
        ValueError: The mask is not `[B, 2 k]`.

    Example:
        >>> dist = Bernoulli(torch.tensor([[0.0, 2.0]]))
        >>> dist.mode().tolist(), round(dist.log_prob(torch.tensor([[0, 1]])).item(), 4)
        ([[0, 1]], -0.8201)
        >>> only_zero = torch.tensor([[True, True, True, False]])
        >>> Bernoulli(torch.tensor([[0.0, 2.0]]), only_zero).mode().tolist()
        [[0, 0]]
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        self.logits = logits.clamp(-_CERTAIN, _CERTAIN)
        if mask is not None:
            check_flags("mask", mask)
            wanted = [*logits.shape[:-1], 2 * logits.shape[-1]]
            if list(mask.shape) != wanted:
                raise ValueError(
                    f"mask has shape {list(mask.shape)}, wanted {wanted}: for each component "
                    "whether 0 and whether 1 is legal"
                )
            zero, one = mask.unflatten(-1, (-1, 2)).unbind(-1)
            self.logits = self.logits.masked_fill(zero & ~one, -_CERTAIN)
            self.logits = self.logits.masked_fill(one & ~zero, _CERTAIN)

    @property
    def noise_size(self) -> int:
        """One number per component."""
        return self.logits.shape[-1]

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard logistic noise, float32, of the given shape (`[..., k]`)."""
        return rng.logistic(size=shape).astype(np.float32)

    def sample(self, noise: Tensor) -> Tensor:
        """Zeros and ones `[B, k]` (int64) for logistic noise `[B, k]`."""
        return (self.logits + noise > 0.0).long()

    def mode(self) -> Tensor:
        """Most likely of zero and one, `[B, k]` (int64), zero if they are equal."""
        return (self.logits > 0.0).long()

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of zeros and ones `[B, k]`, summed over components, `[B]`."""
        return logsigmoid((2.0 * action.to(self.logits.dtype) - 1.0) * self.logits).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats: the sum over components."""
        one, zero = torch.sigmoid(self.logits), torch.sigmoid(-self.logits)
        return -(one * logsigmoid(self.logits) + zero * logsigmoid(-self.logits)).sum(-1)

    def kl(self, other: Bernoulli) -> Tensor:
        """KL(self || other) `[B]` in nats: the sum over components."""
        one = torch.sigmoid(self.logits) * (logsigmoid(self.logits) - logsigmoid(other.logits))
        zero = torch.sigmoid(-self.logits) * (logsigmoid(-self.logits) - logsigmoid(-other.logits))
        return (one + zero).sum(-1)
