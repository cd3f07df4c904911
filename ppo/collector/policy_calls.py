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

from ppo.errors import SpaceError
from ppo.policies.protocol import Evaluation, takes
from ppo.policies.state import PolicyState, frame_stack_of, state_size_of
from ppo.recording import Fingerprint, RecordedCall
from ppo.rollout import Batch
from ppo.trees import leaves, rebuild

__all__ = ["PolicyCalls"]

_NUMBERS_AT_ONCE = 2**23  # of observations; what is inside of a policy may be many times as much


class PolicyCalls:
    """Calls of one policy, which acts in `num_envs` episodes side by side.

    Args:
        policy: As in `Policy`.
        device: Where it lives, and where results are wanted.
        generator: For actions, if the policy neither takes noise nor does without.
        num_envs: Environments `N` it acts in.
        actions: How raw actions are stored, a tree of `Leaf`.
        deterministic: Take modes instead of sampling.

    Attributes:
        state: What the policy remembers.
        takes_noise: Actions are a function of observations and noise.
    """

    def __init__(
        self,
        policy: Any,
        device: torch.device,
        generator: torch.Generator,
        num_envs: int,
        actions: Any,
        *,
        deterministic: bool = False,
    ) -> None:
        self.policy = policy
        self.takes_noise = hasattr(policy, "draw_noise") and not deterministic
        self.takes_masks = takes(policy.act, "action_mask")
        self.frame_stack = frame_stack_of(policy)
        self.remembers = state_size_of(policy) > 0
        self.state = PolicyState.begin(policy, num_envs)
        self._device = device
        self._actions = actions
        self._fixed: dict[str, Any] = {"deterministic": True} if deterministic else {}
        generators: list[torch.Generator] = []
        if not (self.takes_noise or deterministic) and takes(policy.act, "generator"):
            self._fixed["generator"] = generator
            generators.append(generator)
        self._names: tuple[str, ...] = ()
        self._obs: Any = None  # the structure of observations
        self._act = RecordedCall(policy, self._choose, device, generators)

    def begin(self) -> None:
        """Take note that a rollout begins: the policy may have changed since the last one."""
        known = isinstance(self.policy, nn.Module) and self._device.type == "cpu"
        self._act.begin(Fingerprint(self.policy) if known else None)

    def act(self, obs: Any, noise: np.ndarray | None, mask: np.ndarray | None) -> Any:
        """Actions `[N, ...]` for observations `[N, ...]`, noise `[N, k]` and legal ones `[N, M]`.

        Moves the memory on; `ended` must follow.
        """
        given = {
            "noise": noise if self.takes_noise else None,
            "action_mask": mask if self.takes_masks else None,
            "state": self.state.memory if self.remembers else None,
        }
        arrays = {name: array for name, array in given.items() if array is not None}
        self._obs = self.state.see(obs, self.frame_stack)
        self._names = tuple(arrays)
        results = self._act(*leaves(self._obs), *arrays.values())
        if self.remembers:
            *results, memory = results
            self.state.memory = memory.copy()
        return rebuild(self._actions, results)

    def ended(self, ended: np.ndarray) -> None:
        """Take note of a step, and of the episodes `[N]` that it ended."""
        self.state.after(ended)

    def _choose(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) - len(self._names)
        arguments = dict(zip(self._names, tensors[count:], strict=True))
        obs = rebuild(self._obs, tensors[:count])
        result = self.policy.act(obs, **arguments, **self._fixed)
        if self.remembers:
            actions, state = result
            return (*leaves(actions), state)
        return tuple(leaves(result))

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values `[B]` of the rows of a batch.

        By the policy itself, in parts: a recording would give the same up to rounding, and the
        first ratio of a rollout is to be 1 for whoever evaluates it again.
        """
        parts = [
            Evaluation(*self.policy.evaluate(part.obs, part.actions, **self._context(part)))
            for part in batch.parts(_rows_at_once(batch.obs))
        ]
        if not parts:
            nothing = torch.zeros(0, device=self._device)
            return nothing, nothing
        log_probs, values = (torch.cat([part[index] for part in parts]) for index in (0, 2))
        return log_probs.float(), values.float()

    def _context(self, batch: Batch) -> dict[str, Any]:
        context = batch.context
        if not self.takes_masks:
            context.pop("action_masks", None)
        return context

    def value(self, obs: Any, states: Tensor | None) -> Tensor:
        """Values `[B]` of observations `[B, ...]`, with memories `[B, K]` if it has one."""
        fields = {"obs": obs} if states is None else {"obs": obs, "state": states}
        parts = []
        for part in Batch(**fields).parts(_rows_at_once(obs)):
            arguments = {name: tree for name, tree in part.fields.items() if name != "obs"}
            parts.append(self.policy.value(part.obs, **arguments))
        return torch.cat(parts).float()

    def check_masks(self, in_observation: bool) -> None:
        """Raise `SpaceError` if masks would be ignored."""
        if not self.takes_masks and not in_observation:
            raise SpaceError(
                f"the environments give action masks, but act of {type(self.policy).__name__} "
                "takes no action_mask; add the argument (and action_masks to evaluate), or use "
                "make_policy"
            )


def _rows_at_once(obs: Any) -> int:
    numbers: int = sum(math.prod(leaf.shape[1:]) for leaf in leaves(obs))
    return max(1, _NUMBERS_AT_ONCE // max(1, numbers))
