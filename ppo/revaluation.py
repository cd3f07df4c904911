"""What a policy thinks of a rollout: log-probabilities and values, also of true successors."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from ppo._masks import zero_where_
from ppo._threads import threads
from ppo.policies.protocol import Evaluator, modules_in
from ppo.rollout import Batch, Rollout
from ppo.trees import leaves

__all__ = ["evaluate_rollout", "revalue"]

_NUMBERS_AT_ONCE = 2**23  # of observations; what is inside of a policy may be many times as much
_ROWS_AT_ONCE = 2**11  # on the CPU: what is inside of a small policy stays in the cache
_SMALL = 2**16  # numbers of a parameter
_FEW = 2**18  # numbers of all observations


def evaluate_rollout(policy: Any, rollout: Rollout) -> Rollout:
    """Return the rollout with the policy's log-probabilities, values and values of successors.

    In parts, and by the code path that learning uses: the first ratio of a rollout is 1 for
    whoever evaluates it again. To be called without gradients.

    Args:
        policy: As in `Policy`.
        rollout: Its `log_probs`, `values` and `next_values` are not looked at.
    """
    batch = rollout.questions()
    evaluate = Evaluator(policy, entropy=False)
    with threads(1 if torch.get_num_threads() > 1 and _is_small(policy, batch) else None):
        parts = [
            evaluate(part.obs, part.actions, part.context)
            for part in batch.parts(_rows_at_once(batch))
        ]
        log_probs = _joined([part.log_probs for part in parts], rollout, "log_probs of evaluate")
        values = _joined([part.values for part in parts], rollout, "values of evaluate")
        log_probs, values = rollout.unflatten(log_probs), rollout.unflatten(values)
        next_values = _next_values(policy, rollout, values)
    return dataclasses.replace(rollout, log_probs=log_probs, values=values, next_values=next_values)


@torch.no_grad()
def revalue(policy: Any, rollout: Rollout) -> Rollout:
    """Return the rollout with values of the policy as it is now; log-probabilities stay.

    Between epochs this gives advantages that follow the critic (Andrychowicz et al. 2021, section
    3.5; `PPOConfig.recompute_advantages`).

    Args:
        policy: As in `Policy`.
        rollout: From a collector.

    Returns:
        The rollout with other `values` and `next_values`.

    Raises:
        ValueError: The rollout does not hold the successors of its last rows (`finals`).

    Example:
        >>> from ppo import RolloutCollector, make_policy
        >>> with RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
        ...     policy = make_policy(collector.observation_space, collector.action_space)
        ...     rollout = collector.collect(policy, num_steps=4)
        >>> torch.equal(revalue(policy, rollout).values, rollout.values)
        True
    """
    if rollout.finals is None:
        raise ValueError("the rollout has no finals; take it from a RolloutCollector")
    return dataclasses.replace(evaluate_rollout(policy, rollout), log_probs=rollout.log_probs)


def _next_values(policy: Any, rollout: Rollout, values: Tensor) -> Tensor:
    """Values of the true successors `[T, N]`: of the next row, or of what no row holds."""
    finals = rollout.finals
    assert finals is not None
    fields = {"obs": finals.obs} | ({} if finals.states is None else {"state": finals.states})
    found = []
    batch = Batch(**fields)
    for part in batch.parts(_rows_at_once(batch)):
        arguments = part.fields
        found.append(policy.value(arguments.pop("obs"), **arguments))
    final_values = _joined(found, rollout, "what value returned")
    num_envs = values.shape[1]
    next_values = torch.cat([values[1:], final_values[-num_envs:].unsqueeze(0)])
    zero_where_(next_values, rollout.terminated)
    if len(final_values) > num_envs:
        cut = slice(len(final_values) - num_envs)
        next_values[finals.steps[cut], finals.env_indices[cut]] = final_values[cut]
    return next_values


def _is_small(policy: Any, batch: Batch) -> bool:
    """True where torch's threads would wait for one another more than they work."""
    if not isinstance(policy, nn.Module) or len(batch) * _numbers_per_row(batch.obs) > _FEW:
        return False
    found = (p for module in modules_in([policy]) for p in module._parameters.values())
    return all(p is None or (p.is_cpu and p.numel() <= _SMALL) for p in found)


def _joined(parts: list[Tensor], rollout: Rollout, what: str) -> Tensor:
    """Rows `[B]` in float32; none at all are none."""
    for part in parts:
        if part.ndim != 1:
            raise ValueError(
                f"the policy's answer has a wrong shape: {what} is {list(part.shape)}, wanted [B], "
                "a number per row; squeeze the last axis, for example"
            )
    return torch.cat(parts).float() if parts else rollout.rewards.new_zeros(0)


def _rows_at_once(batch: Batch) -> int:
    most = max(1, _NUMBERS_AT_ONCE // max(1, _numbers_per_row(batch.obs)))
    # A part of sequences takes as many steps as its longest: the fewer parts, the better.
    in_cache = batch.sequences is None and leaves(batch.obs)[0].device.type == "cpu"
    most = min(most, _ROWS_AT_ONCE) if in_cache else most
    rows = max(1, len(batch))
    return -(-rows // -(-rows // most))  # parts of one size


def _numbers_per_row(obs: Any) -> int:
    return sum(math.prod(leaf.shape[1:]) for leaf in leaves(obs))
