"""What a collector asks of a policy in this process: to act, and to evaluate a whole rollout.

A step of light environments takes less time than torch needs to choose their actions, nearly all
of it between its operations. Acting is therefore recorded where it can be repeated.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo.policies.protocol import Evaluation, takes_generator
from ppo.recording import Fingerprint, RecordedCall

__all__ = ["PolicyCalls"]

_NUMBERS_AT_ONCE = 2**23  # of observations; what is inside of a policy may be many times as much


class PolicyCalls:
    """Calls of one policy.

    Args:
        policy: As in `Policy`.
        device: Where it lives, and where results are wanted.
        generator: For actions, if the policy neither takes noise nor does without.
    """

    def __init__(self, policy: Any, device: torch.device, generator: torch.Generator) -> None:
        self.policy = policy
        self.takes_noise = hasattr(policy, "draw_noise")
        self._device = device
        self._generator = None
        if not self.takes_noise and takes_generator(policy):
            self._generator = generator
        generators = [] if self._generator is None else [self._generator]
        self._act = RecordedCall(policy, self._choose, device, generators)

    def begin(self) -> None:
        """Take note that a rollout begins: the policy may have changed since the last one."""
        known = isinstance(self.policy, nn.Module) and self._device.type == "cpu"
        self._act.begin(Fingerprint(self.policy) if known else None)

    def act(self, obs: np.ndarray, noise: np.ndarray | None) -> np.ndarray:
        """Actions `[N, ...]` for observations `[N, ...]` and, if it takes any, noise `[N, k]`."""
        (actions,) = self._act(obs) if noise is None else self._act(obs, noise)
        return actions

    def _choose(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        arguments: dict[str, Any] = {}
        if noise is not None:
            arguments["noise"] = noise
        if self._generator is not None:
            arguments["generator"] = self._generator
        actions: Tensor = self.policy.act(obs, **arguments)
        return actions

    def evaluate(self, obs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values `[B]` of observations and actions `[B, ...]`.

        By the policy itself, in parts: a recording would give the same up to rounding, and the
        first ratio of a rollout is to be 1 for whoever evaluates it again.
        """
        size = _rows_at_once(obs)
        parts = [
            Evaluation(*self.policy.evaluate(*part))
            for part in zip(obs.split(size), actions.split(size), strict=True)
        ]
        log_probs, values = (torch.cat([part[index] for part in parts]) for index in (0, 2))
        return log_probs.float(), values.float()

    def value(self, obs: Tensor) -> Tensor:
        """Values `[B]` of observations `[B, ...]`."""
        return torch.cat(
            [self.policy.value(part) for part in obs.split(_rows_at_once(obs))]
        ).float()


def _rows_at_once(obs: Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // max(1, math.prod(obs.shape[1:])))
