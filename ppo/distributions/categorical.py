"""One class out of n."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppo._checks import check_flags, check_same_shape

__all__ = ["Categorical"]

# The lowest log-probability, also of what a mask forbids: sums of many stay finite.
_NEVER = -1e30
_TINY = np.finfo(np.float32).tiny


class Categorical:
    r"""Distribution over `n` classes given unnormalised log-probabilities.

    Sampling is the Gumbel-max trick, :math:`a = \arg\max_i (l_i + g_i)` with standard Gumbel
    noise :math:`g` (Maddison et al. 2014, section 2): one addition and one argmax per draw.

    A class that the mask forbids has probability zero (its log-probability is a finite -1e30), is
    never drawn, and its logit has no gradient (Huang and Ontañón 2022, section 3).

    Args:
        logits: `[B, n]`, any finite numbers.
        mask: bool `[B, n]`, True for the classes that are legal, at least one in each row. None:
            all are.

    Raises:
        TypeError: The mask is not bool.
        ValueError: The mask does not have the shape of the logits.

    Example:
        >>> dist = Categorical(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
        >>> dist.mode().tolist(), [round(h, 3) for h in dist.entropy().tolist()]
        ([0, 0], [0.693, 0.0])
        >>> mask = torch.tensor([[True, True, False]])
        >>> Categorical(torch.tensor([[0.0, 0.0, 9.0]]), mask).log_p.exp().tolist()
        [[0.5, 0.5, 0.0]]
    """

    def __init__(self, logits: Tensor, mask: Tensor | None = None) -> None:
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if mask is not None:
            check_flags("mask", mask)
            check_same_shape("mask", mask, "logits", logits)
            logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
        # The difference of two finite logits may overflow, and 0 * -inf is NaN.
        self.log_p = torch.log_softmax(logits, -1).clamp(min=_NEVER)
        if mask is not None:
            # Once more, for legal logits that are as low as the filling.
            self.log_p = self.log_p.masked_fill(~mask, _NEVER)

    @property
    def noise_size(self) -> int:
        """One number per class."""
        return self.log_p.shape[-1]

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise, float32, of the given shape (`[..., n]`)."""
        exponential = rng.standard_exponential(shape, dtype=np.float32)
        return -np.log(np.maximum(exponential, _TINY))

    def sample(self, noise: Tensor) -> Tensor:
        """Classes `[B]` (int64) for Gumbel noise `[B, n]`."""
        return (self.log_p + noise).argmax(-1)

    def mode(self) -> Tensor:
        """Most likely class, `[B]`, the first among equals."""
        return self.log_p.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of classes `[B]`."""
        return self.log_p.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats; every log-probability is finite, so zeros add nothing."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other) `[B]` in nats."""
        return (self.log_p.exp() * (self.log_p - other.log_p)).sum(-1)
