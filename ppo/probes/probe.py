"""`Probe`: an environment with a known answer, what it asks for, and what a wrong answer means."""

from __future__ import annotations

import abc
import dataclasses
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import gymnasium
import numpy as np
import torch
from torch import nn

from ppo.agent import PPOAgent
from ppo.collector import RolloutCollector
from ppo.config import PPOConfig
from ppo.envs import Env
from ppo.errors import SpaceError
from ppo.evaluation import evaluate
from ppo.policies import make_policy as make_default_policy
from ppo.policies.protocol import Policy

__all__ = ["BLIND_CRITIC", "Answer", "PolicyMaker", "Probe", "ProbeResult", "Return", "Values"]

PolicyMaker = Callable[[gymnasium.Space[Any], gymnasium.Space[Any]], nn.Module]
"""Makes a policy for an observation space and an action space; `SpaceError` where it cannot."""

Outcome = Literal["solved", "failed", "not applicable"]

BLIND_CRITIC = "the critic does not see the observation"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What came of a probe.

    Attributes:
        name: Name of the probe.
        outcome: `"solved"`, `"failed"` or `"not applicable"`.
        measured: The numbers measured; empty if it did not come to that.
        explanation: What the failure usually means, or why the probe is not applicable.
        seconds: Time taken.
        error: What the policy, or training it, raised.
    """

    name: str
    outcome: Outcome
    measured: str = ""
    explanation: str = ""
    seconds: float = 0.0
    error: Exception | None = None

    def __str__(self) -> str:
        said = [text for text in (self.measured, self.explanation) if text]
        return f"{self.name}: {self.outcome}" + (f" ({'; '.join(said)})" if said else "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer(abc.ABC):
    """Numbers that a trained policy must show.

    Attributes:
        expected: The right numbers.
        mistakes: Wrong numbers that have a usual cause, and that cause.
        otherwise: What other wrong numbers usually mean.
        tolerance: Deviation that is still right.
    """

    expected: tuple[float, ...]
    mistakes: Mapping[tuple[float, ...], str]
    otherwise: str
    tolerance: float

    @abc.abstractmethod
    def measure(self, policy: Policy, env: Callable[[], Env], seed: int) -> tuple[float, ...]:
        """The policy's numbers."""

    @abc.abstractmethod
    def describe(self, numbers: tuple[float, ...]) -> str:
        """These numbers, in words."""

    @abc.abstractmethod
    def right(self, numbers: tuple[float, ...]) -> bool:
        """Whether they are those expected."""

    def explain(self, numbers: tuple[float, ...]) -> str:
        """What wrong numbers usually mean."""
        for wrong, meaning in self.mistakes.items():
            if _distance(numbers, wrong) <= 0.3 * _distance(self.expected, wrong):
                return meaning
        return self.otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Values(Answer):
    """The values of these observations, as the policy says them while it collects.

    Attributes:
        at: Observations.
    """

    at: tuple[float, ...]

    def measure(self, policy: Policy, env: Callable[[], Env], seed: int) -> tuple[float, ...]:
        """Mean value of the rows with each observation."""
        with RolloutCollector(env, seed=seed) as collector:
            rollout = collector.collect(policy, 16)
        obs, values = rollout.obs[..., -1][rollout.valid], rollout.values[rollout.valid]
        newest = obs if obs.ndim == 1 else obs[:, -1]  # of stacked frames
        return tuple(float(values[newest == number].mean()) for number in self.at)

    def describe(self, numbers: tuple[float, ...]) -> str:
        """`V(0) = 0.9, V(1) = 1`."""
        told = zip(self.at, numbers, strict=True)
        return ", ".join(f"V({at:g}) = {number:.3g}" for at, number in told)

    def explain(self, numbers: tuple[float, ...]) -> str:
        """What wrong values usually mean."""
        listed = super().explain(numbers)
        alike = len(numbers) > 1 and np.ptp(numbers) < 0.2 * np.ptp(self.expected)
        return BLIND_CRITIC if alike and listed == self.otherwise else listed

    def right(self, numbers: tuple[float, ...]) -> bool:
        """Near enough, both ways."""
        return _distance(numbers, self.expected) <= self.tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Return(Answer):
    """The mean return over 100 episodes, which has a known best.

    Attributes:
        sampled: Of sampled actions, where the likeliest may be right by chance.
    """

    sampled: bool = False

    def measure(self, policy: Policy, env: Callable[[], Env], seed: int) -> tuple[float, ...]:
        """Play."""
        result = evaluate(policy, env, 100, deterministic=not self.sampled, seed=seed)
        return (result.mean_return,)

    def describe(self, numbers: tuple[float, ...]) -> str:
        """`return 0.5`."""
        return f"return {numbers[0]:.3g}"

    def right(self, numbers: tuple[float, ...]) -> bool:
        """High enough."""
        return numbers[0] >= self.expected[0] - self.tolerance


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """An environment with a known answer, to be learned in seconds.

    Attributes:
        name: Short name.
        tests: What it tests, in a sentence.
        env: Makes the environment.
        answer: What a trained policy must show.
        config: Settings to train with, the default policy's among them.
        steps: Transitions to train for.
        needs: What a policy must have for it: `"memory"`, `"mask"`.
        option: A value of `PolicyConfig.distribution` that it is about; None for every policy.

    Example:
        >>> from ppo.probes import find_probes
        >>> (probe,) = find_probes(["paying-action"])
        >>> probe.answer.describe(probe.answer.expected)
        'return 1'
        >>> probe.run().outcome
        'solved'
    """

    name: str
    tests: str
    env: Callable[[], Env]
    answer: Answer
    config: PPOConfig
    steps: int
    needs: tuple[Literal["memory", "mask"], ...] = ()
    option: str | None = None

    def run(
        self,
        make_policy: PolicyMaker | None = None,
        *,
        config: PPOConfig | None = None,
        seed: int = 0,
    ) -> ProbeResult:
        """Train a policy and judge it.

        Args:
            make_policy: Makes the policy, as `(observation_space, action_space) -> nn.Module`;
                None makes the default one.
            config: Settings to train with; None takes those of the probe. The discount, and that
                rewards are not scaled, belong to the question and stay.
            seed: Seeds weights, training and judgement. No global generator is left changed.

        Returns:
            A `ProbeResult`. What the policy raises is a failure, except for a `SpaceError` of
            `make_policy`: the probe is then not applicable.
        """
        start = time.perf_counter()
        settings = self.config
        if config is not None:
            settings = config.replace(gamma=settings.gamma, normalize_rewards=False)
        try:
            result = self._run(make_policy, settings, seed)
        except Exception as error:  # a policy under test may do anything
            explanation = f"{type(error).__name__}: {error}"
            result = self._result("failed", explanation=explanation, error=error)
        return dataclasses.replace(result, seconds=time.perf_counter() - start)

    def judge(self, policy: Policy, *, seed: int = 0) -> ProbeResult:
        """Judge a policy that was trained on `env`, by a loop of your own for example."""
        numbers = self.answer.measure(policy, self.env, seed)
        measured = self.answer.describe(numbers)
        if self.answer.right(numbers):
            return self._result("solved", measured=measured)
        wanted = f"{measured}, expected {self.answer.describe(self.answer.expected)}"
        return self._result("failed", measured=wanted, explanation=self.answer.explain(numbers))

    def _run(self, make_policy: PolicyMaker | None, config: PPOConfig, seed: int) -> ProbeResult:
        other = make_policy is not None or config.policy.distribution != self.option
        if self.option is not None and other:
            reason = f"it is about the default policy with distribution={self.option!r}"
            return self._result("not applicable", explanation=reason)
        env = self.env()
        try:
            policy = _make(make_policy, env, config, seed)
        except SpaceError as error:
            return self._result("not applicable", explanation=str(error))
        finally:
            env.close()
        missing = [_MISSING[need] for need in self.needs if not _HAS[need](policy)]
        if missing:
            return self._result("not applicable", explanation="; ".join(missing))
        agent = PPOAgent(policy, config=config, seed=seed)
        agent.learn(self.env, self.steps, progress=False)
        return self.judge(agent.policy, seed=seed)

    def _result(self, outcome: Outcome, **said: Any) -> ProbeResult:
        return ProbeResult(name=self.name, outcome=outcome, **said)


def _distance(numbers: tuple[float, ...], others: tuple[float, ...]) -> float:
    return float(np.abs(np.subtract(numbers, others)).max())


def _make(make_policy: PolicyMaker | None, env: Env, config: PPOConfig, seed: int) -> nn.Module:
    if make_policy is None:
        return make_default_policy(
            env.observation_space, env.action_space, config.policy, seed=seed
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        policy: nn.Module | None = make_policy(env.observation_space, env.action_space)
    if policy is None:  # which stands for the default policy elsewhere
        raise TypeError("make_policy returned None, wanted a policy; is its return missing?")
    return policy


def _has_memory(policy: Any) -> bool:
    return getattr(policy, "state_size", 0) > 0


def _has_masks(policy: Any) -> bool:
    return "action_mask" in inspect.signature(policy.act).parameters


_HAS: dict[str, Callable[[Any], bool]] = {"memory": _has_memory, "mask": _has_masks}
_MISSING = {
    "memory": "the policy keeps no state: its state_size is 0 or missing",
    "mask": "the policy takes no masks: its act has no argument action_mask",
}
