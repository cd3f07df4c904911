"""From the arrays that environments filled to a `Rollout`: checked, copied out, evaluated."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppo.collector.buffers import Buffers
from ppo.collector.columns import Harvest
from ppo.collector.policy_calls import PolicyCalls
from ppo.collector.stacking import FrameIndex
from ppo.errors import NonFiniteError
from ppo.revaluation import evaluate_rollout
from ppo.rollout import Finals, Rollout
from ppo.sequences import Sequences, cut_sequences
from ppo.trees import leaves, map_tree

__all__ = ["RawRollout"]


# Not in a `with`, whose end an interrupt may prevent: NumPy would be silent from then on.
@np.errstate(all="ignore")
def _surely_finite(arrays: list[np.ndarray]) -> bool:
    """Whether all sums are finite: then every number is. One that overflows needs a second look."""
    return all(array.dtype.kind != "f" or math.isfinite(array.sum()) for array in arrays)


@dataclasses.dataclass
class RawRollout:
    """What was collected, before the policy is asked what it thinks of it.

    Attributes:
        buffers: The arrays; rows up to `num_steps` are of this rollout.
        num_steps: Steps `T`.
        age: Steps since the episodes began, at the first row, `[N]`; for stacked frames.
        masked: Environments that give action masks, `[N]`.
        harvest: Final observations and finished episodes.
    """

    buffers: Buffers
    num_steps: int
    age: np.ndarray
    masked: np.ndarray
    harvest: Harvest = dataclasses.field(default_factory=lambda: Harvest([], []))

    def check_finite(self) -> None:
        """Raise `NonFiniteError` for the first NaN or infinity among observations and rewards."""
        buffers, num_steps = self.buffers, self.num_steps
        seen = [rows[: num_steps + 1] for rows in leaves(buffers.obs)]
        finals = [leaf for final in self.harvest.finals for leaf in leaves(final.obs)]
        if _surely_finite([buffers.rewards[:num_steps], *seen, *finals]):
            return
        rewards = np.isfinite(buffers.rewards[:num_steps])
        successors = np.ones_like(rewards)
        # Nobody learns from what a row that is no transition shows, nor from what follows the last
        # one if that is an end: if it begins an episode, the next rollout begins with it.
        unseen = ~np.append(buffers.valid[:num_steps], ~buffers.terminated[None, num_steps - 1], 0)
        for obs in leaves(buffers.obs):
            if not np.issubdtype(obs.dtype, np.floating):
                continue
            finite = np.isfinite(obs[: num_steps + 1]).reshape(*obs[: num_steps + 1].shape[:2], -1)
            fine = finite.all(-1) | unseen
            successors &= fine[1:]
            successors[0] &= fine[0]
        for final in self.harvest.finals:
            found = all(np.isfinite(leaf).all() for leaf in leaves(final.obs))
            successors[final.step, final.env_index] &= found
        if rewards.all() and successors.all():
            return
        done = np.arange(num_steps)[:, None] < buffers.progress  # later rows are old
        bad = np.argwhere(~(rewards & successors) & done)
        if len(bad) == 0:
            return
        t, index = bad[0]
        if not all(np.isfinite(leaf[t, index]).all() for leaf in leaves(buffers.actions)):
            raise NonFiniteError(
                f"the policy chose a non-finite action for environment {index} at rollout step "
                f"{t}; nothing was learned from this rollout. Its parameters or its normaliser "
                "hold NaN or infinity."
            )
        field = "reward" if successors[t, index] else "observation"
        raise NonFiniteError(
            f"environment {index} returned a non-finite {field} at rollout step {t}; nothing was "
            "learned from this rollout. Check the environment, or clip its actions."
        )

    def evaluated(self, calls: PolicyCalls, device: torch.device) -> Rollout:
        """Copy the rows out and ask the policy, in two batched calls, what it thinks of them."""
        buffers, num_steps = self.buffers, self.num_steps

        def copied(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array.copy()).to(device)

        def rows(tree: Any) -> Any:
            return map_tree(lambda array: copied(array[:num_steps]), tree)

        ended = buffers.ended(slice(num_steps))
        stacked = calls.frame_stack > 1
        frames = FrameIndex(self.age, ended, calls.frame_stack) if stacked else None
        rewards = rows(buffers.rewards)
        rollout = Rollout(
            obs=rows(buffers.obs) if frames is None else frames.stacks(buffers.frames, copied),
            actions=rows(buffers.actions),
            log_probs=rewards,  # of that shape; what they are is found out below
            values=rewards,
            rewards=rewards,
            next_values=rewards,
            terminated=rows(buffers.terminated),
            truncated=rows(buffers.truncated),
            valid=rows(buffers.valid),
            episodes=tuple(episode for _, episode in self.harvest.episodes),
            action_masks=rows(buffers.masks) if self.masked.any() else None,
            finals=self._finals(frames, calls.remembers).to(device),
        )
        if calls.remembers:
            longest = getattr(calls.policy, "memory_steps", None)
            rollout = dataclasses.replace(rollout, **self._sequences(ended, longest)).to(device)
        return evaluate_rollout(calls.policy, rollout)

    def _finals(self, frames: FrameIndex | None, remembers: bool) -> Finals:
        """The successors that are in no row: of truncated steps, and of the last row."""
        buffers, finals = self.buffers, self.harvest.finals
        if frames is None:
            single = [final.obs for final in finals]
            last = map_tree(lambda array: array[self.num_steps], buffers.obs)
        else:
            single = [frames.successor(buffers.frames, *final) for final in finals]
            last = frames.last(buffers.frames)
        memory = None
        if remembers:
            known = [buffers.states[final.step + 1, final.env_index] for final in finals]
            memory = torch.from_numpy(np.stack([*known, *buffers.remembered(self.num_steps)]))

        def join(last_rows: np.ndarray, *rows: np.ndarray) -> Tensor:
            return torch.from_numpy(np.concatenate([*(row[None] for row in rows), last_rows]))

        num_envs = len(self.age)
        steps = [final.step for final in finals] + [self.num_steps - 1] * num_envs
        env_indices = [*(final.env_index for final in finals), *range(num_envs)]
        obs = map_tree(join, last, *single)
        rows, columns = (torch.from_numpy(np.array(places)) for places in (steps, env_indices))
        return Finals(obs, rows, columns, memory)

    def _sequences(self, ended: np.ndarray, longest: int | None) -> dict[str, Any]:
        """For a policy with memory: which rows belong together, and what it remembered then."""
        order, lengths = cut_sequences(ended, self.buffers.valid[: self.num_steps], longest)
        first = order[np.cumsum(lengths, dtype=np.int64) - np.array(lengths, np.int64)]
        step, env_index = np.divmod(first, ended.shape[1])
        memory = self.buffers.states[step, env_index]
        memory[(step > 0) & ended[step - 1, env_index]] = 0.0
        sequences = Sequences(lengths, torch.from_numpy(memory))
        return {"sequences": sequences, "order": torch.from_numpy(order)}
