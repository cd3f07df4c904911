"""What a collector asks of a policy in this process: to act, step after step.

A step of light environments takes less time than torch needs to choose their actions, nearly all
of it between its operations. Acting is therefore recorded where it can be repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo.collector.buffers import Buffers
from ppo.collector.stacking import Stacks
from ppo.errors import SpaceError
from ppo.policies.protocol import generator_on, takes
from ppo.policies.state import PolicyState, frame_stack_of, state_size_of
from ppo.recording import Fingerprint, RecordedCall
from ppo.trees import leaves, rebuild

__all__ = ["PolicyCalls"]


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
        draws = not (self.takes_noise or deterministic) and takes(policy.act, "generator")
        self._generators = [generator] if draws else []
        self._names: tuple[str, ...] = ()
        self._obs: Any = None  # the structure of observations
        self._act = RecordedCall(policy, self._choose, device, self._generators)

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

    def follow(self, buffers: Buffers, num_steps: int) -> None:
        """Take over what an actor remembered and saw that acted for a whole rollout."""
        if self.remembers:
            self.state.memory = buffers.remembered(num_steps)
        if self.frame_stack > 1:
            stacks = Stacks(buffers, slice(None))
            self.state.frames = stacks.at(num_steps - 1)
            self.state.age = stacks.ages(num_steps)

    def _choose(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(tensors) - len(self._names)
        arguments: dict[str, Any] = dict(zip(self._names, tensors[count:], strict=True))
        obs = rebuild(self._obs, tensors[:count])
        if self._generators:
            arguments["generator"] = generator_on(self._device, *self._generators)
        result = self.policy.act(obs, **arguments, **self._fixed)
        if self.remembers:
            actions, state = result
            return (*self._checked(actions), state)
        return tuple(self._checked(result))

    def _checked(self, actions: Any) -> list[Tensor]:
        """The leaves of what `act` returned, if they are tensors of the shapes they should have."""
        chosen = leaves(actions)
        found = [(_kind(leaf), tuple(getattr(leaf, "shape", ()))) for leaf in chosen]
        wanted = [(len(self.state), *leaf.shape) for leaf in leaves(self._actions)]
        if found != [(Tensor, shape) for shape in wanted]:
            got = ", ".join(f"{kind.__name__} {list(shape)}" for kind, shape in found)
            raise ValueError(
                f"act of {type(self.policy).__name__} returned {got}, wanted "
                f"{', '.join(f'Tensor {list(shape)}' for shape in wanted)}: raw actions, one row "
                "for each observation"
            )
        return chosen

    def check_masks(self, in_observation: bool) -> None:
        """Raise `SpaceError` if masks would be ignored."""
        if not self.takes_masks and not in_observation:
            raise SpaceError(
                f"the environments give action masks, but act of {type(self.policy).__name__} "
                "takes no action_mask; add the argument (and action_masks to evaluate), or use "
                "make_policy"
            )


def _kind(leaf: object) -> type:
    return Tensor if isinstance(leaf, Tensor) else type(leaf)
