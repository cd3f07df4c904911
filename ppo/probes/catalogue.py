"""All probes, in the order in which to look at them, and `run_probes`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from ppo.config import PPOConfig
from ppo.policies import PolicyConfig
from ppo.probes import environments as envs
from ppo.probes.probe import BLIND_CRITIC, PolicyMaker, Probe, ProbeResult, Return, Values
from ppo.schedules import Linear

__all__ = ["PROBES", "find_probes", "run_probes"]

GAMMA = 0.5  # of the values asked for; small, so that no critic has to go far
_HORIZON = 1.0 / (1.0 - GAMMA)
_SMALL = PolicyConfig(hidden_sizes=(16,))
# Rewards as they are, so that values can be compared; else small and fast.
_CONFIG = PPOConfig(
    num_envs=4,
    num_workers=0,
    num_steps=32,
    num_epochs=5,
    minibatch_size=32,
    learning_rate=Linear(1e-2, 0.0),
    gamma=0.9,
    normalize_rewards=False,
    policy=_SMALL,
)
_CRITIC_CONFIG = _CONFIG.replace(gamma=GAMMA)
# Entropy, lest a body that actor and critic share, still wrong about values, settles on an action.
_ACTOR_CONFIG = _CONFIG.replace(num_envs=8, learning_rate=Linear(5e-3, 0.0), entropy_coef=0.05)
# Whole episodes of a maze, and more of them.
_MEMORY = _CONFIG.replace(
    num_envs=16,
    num_steps=64,
    minibatch_size=256,
    policy=PolicyConfig(hidden_sizes=(16,), memory="lstm", memory_size=16),
)


def _values(
    expected: Mapping[float, float],
    mistakes: Mapping[tuple[float, ...], str],
    otherwise: str,
) -> Values:
    largest = max(map(abs, expected.values()))
    return Values(
        at=tuple(expected),
        expected=tuple(expected.values()),
        mistakes=mistakes,
        otherwise=otherwise,
        tolerance=0.05 * max(1.0, largest),
    )


def _best(
    best: float,
    mistakes: Mapping[float, str],
    otherwise: str,
    tolerance: float = 0.02,
    sampled: bool = False,
) -> Return:
    return Return(
        expected=(best,),
        mistakes={(number,): meaning for number, meaning in mistakes.items()},
        otherwise=otherwise,
        tolerance=tolerance,
        sampled=sampled,
    )


_CRITIC = "the critic does not learn: look at the value loss, its gradient and the learning rate"
_SIGN = "the opposite is learned: look for a flipped sign in the loss or in the advantages"
_BLIND = "the observation is ignored, or rows of observations and actions are mixed up"
_TERMINATION = "V = 1 instead of 1 / (1 - gamma): truncation is taken for termination"
_UNMASKED = "illegal actions are drawn: the mask does not reach the distribution in act"
_FORGETFUL = (
    "half of the choices are right, as without memory: the state is lost between steps, or the "
    "gradient does not go back in time to the cue"
)
_BOUND = (
    "the bound is not reached: look at how samples are mapped to the bounds, and at log_prob near "
    "them"
)


def _masked(name: str, env: type[envs.MaskedOrder], how: str) -> Probe:
    return Probe(
        name=name,
        tests=f"Masks told {how} are respected, and the best legal action is found.",
        env=env,
        answer=_best(
            1.0,
            {-1.0: _UNMASKED},
            "legal actions, but not the best: is the mask that of the step, and applied again "
            "when log_prob is computed for the update?",
        ),
        config=_CONFIG.replace(num_envs=8),
        steps=6_000,
        needs=("mask",),
    )


def _bound(name: str, distribution: Any, option: str | None) -> Probe:
    return Probe(
        name=name,
        tests="The best action lies at a bound of a Box that is not symmetric.",
        env=functools.partial(envs.Target, (-1.0, 3.0), low=-1.0, high=3.0),
        answer=_best(
            0.0,
            {-2.0: _BLIND},
            _BOUND,
            tolerance=0.06,
        ),
        config=_CONFIG.replace(policy=PolicyConfig(hidden_sizes=(16,), distribution=distribution)),
        steps=6_000,
        option=option,
    )


PROBES: tuple[Probe, ...] = (
    Probe(
        name="constant-reward",
        tests="The critic learns a constant: one step that pays 1, so V = 1.",
        env=envs.ConstantReward,
        answer=_values({-1.0: 1.0, 1.0: 1.0}, {(-1.0, -1.0): _SIGN}, _CRITIC),
        config=_CRITIC_CONFIG,
        steps=4_000,
    ),
    Probe(
        name="seen-reward",
        tests="The critic sees: one step that pays what was observed, so V(s) = s.",
        env=envs.SeenReward,
        answer=_values(
            {-1.0: -1.0, 1.0: 1.0},
            {
                (0.0, 0.0): BLIND_CRITIC,
                (1.0, -1.0): _SIGN,
            },
            _CRITIC,
        ),
        config=_CRITIC_CONFIG,
        steps=4_000,
    ),
    Probe(
        name="delayed-reward",
        tests="Rewards are discounted back in time: 1 paid in the second step, so V(0) = gamma.",
        env=envs.DelayedReward,
        answer=_values(
            {0.0: GAMMA, 1.0: 1.0},
            {
                (0.0, 1.0): "the reward does not come back in time: gamma, or the next value, is "
                "lost",
                (1.0, 1.0): "the reward is not discounted: gamma is not used",
                ((GAMMA + 1.0) / 2.0, (GAMMA + 1.0) / 2.0): BLIND_CRITIC,
            },
            _CRITIC,
        ),
        config=_CRITIC_CONFIG,
        steps=4_000,
    ),
    Probe(
        name="paying-action",
        tests="The actor learns: one of two actions pays.",
        env=envs.PayingAction,
        answer=_best(
            1.0,
            {0.0: _SIGN, 0.5: "the actor does not learn: look at the gradient of its loss"},
            "the actor hardly learns: look at the gradient of its loss",
            tolerance=0.1,
            sampled=True,
        ),
        config=_ACTOR_CONFIG,
        steps=6_000,
    ),
    Probe(
        name="matching-action",
        tests="The actor sees: which of two actions pays depends on the observation.",
        env=envs.MatchingAction,
        answer=_best(1.0, {0.5: _BLIND, 0.0: _SIGN}, _BLIND, tolerance=0.1, sampled=True),
        config=_ACTOR_CONFIG,
        steps=6_000,
    ),
    Probe(
        name="truncation",
        tests="A time limit is no end: 1 paid for ever, cut off in each step, V = 1 / (1 - gamma).",
        env=functools.partial(envs.Endless, 1),
        answer=_values({0.0: _HORIZON}, {(1.0,): _TERMINATION}, _CRITIC),
        config=_CRITIC_CONFIG,
        steps=6_000,
    ),
    Probe(
        name="final-observation",
        tests="At a time limit the value of the last state counts, not that of the next episode.",
        env=envs.EndlessAfterStart,
        answer=_values(
            {0.0: GAMMA * _HORIZON, 1.0: _HORIZON},
            {
                (GAMMA, 1.0): _TERMINATION,
                (GAMMA / (1.0 - GAMMA**2), 1.0 / (1.0 - GAMMA**2)): "bootstrapped from the first "
                "observation of the next episode instead of the last one of this",
            },
            _CRITIC,
        ),
        config=_CRITIC_CONFIG,
        steps=5_000,
    ),
    _bound("bound", "gaussian", None),
    _bound("bound-squashed", "squashed", "squashed"),
    _bound("bound-beta", "beta", "beta"),
    Probe(
        name="nested-observation",
        tests="Leaves of a nested observation are joined: two of them tell only together.",
        env=envs.BothLeaves,
        answer=_best(1.0, {0.5: "a leaf is lost, or leaves are not joined", 0.0: _SIGN}, _BLIND),
        config=_CONFIG.replace(num_envs=8),
        steps=6_000,
    ),
    Probe(
        name="hybrid-action",
        tests="A discrete and a continuous leaf agree: their log-probabilities are added.",
        env=envs.HybridAction,
        answer=_best(
            1.0,
            {0.5: "one leaf is learned and the other is not: is log_prob the sum over leaves?"},
            _BLIND,
            tolerance=0.05,
        ),
        config=_CONFIG.replace(num_envs=8),
        steps=6_000,
    ),
    _masked("mask", envs.MaskedOrder, 'as info["action_mask"]'),
    _masked("mask-by-method", envs.MaskedOrderByMethod, "by the method action_masks"),
    _masked("mask-in-observation", envs.MaskedOrderInObservation, "in the observation"),
    Probe(
        name="memory",
        tests="A cue is remembered through a corridor of random length (T-maze).",
        env=envs.TMaze,
        answer=_best(1.0, {0.5: _FORGETFUL, 0.0: _SIGN}, _FORGETFUL),
        config=_MEMORY,
        steps=16_000,
        needs=("memory",),
    ),
    Probe(
        name="memory-and-mask",
        tests="Memory and masks work together: a T-maze with locked doors.",
        env=envs.MaskedTMaze,
        answer=_best(1.0, {0.5: _FORGETFUL, -1.0: _UNMASKED}, _FORGETFUL),
        config=_MEMORY,
        steps=16_000,
        needs=("memory", "mask"),
    ),
)
"""All probes, the simplest first: look at the first that fails."""


def find_probes(names: Sequence[str] | None = None) -> tuple[Probe, ...]:
    """The probes of these names, in their own order; all for None.

    Raises:
        ValueError: There is none of a name.

    Example:
        >>> [probe.name for probe in find_probes(["truncation", "constant-reward"])]
        ['constant-reward', 'truncation']
    """
    known = [probe.name for probe in PROBES]
    for name in names or ():
        if name not in known:
            raise ValueError(f"there is no probe {name!r}; there are {', '.join(known)}")
    return tuple(probe for probe in PROBES if names is None or probe.name in names)


def run_probes(
    make_policy: PolicyMaker | None = None,
    *,
    config: PPOConfig | None = None,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> list[ProbeResult]:
    """Train a policy on each probe and judge it; all together take about half a minute.

    Args:
        make_policy: Makes the policy, as `(observation_space, action_space) -> nn.Module`; None
            makes the default one. It raises `SpaceError` for spaces it is not meant for.
        config: Settings to train with; None takes those of each probe.
        seed: Seeds weights, training and judgement.
        names: Which probes; None runs all.

    Returns:
        One `ProbeResult` per probe, the simplest first.

    Raises:
        ValueError: There is no probe of a name.

    Example:
        >>> run_probes(names=["constant-reward"])[0].outcome
        'solved'
    """
    return [probe.run(make_policy, config=config, seed=seed) for probe in find_probes(names)]
