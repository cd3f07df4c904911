"""Whose environment is closed by whom, what is refused, and environments that break."""

import os
import re
import sys
import warnings
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from collecting import assert_counts, assert_identical, collect
from environments import (
    SYMMETRIC,
    TWO,
    VECTOR,
    CountingEnv,
    FaultyEnv,
    Recorder,
    WalkEnv,
    WithSpaces,
    crash,
    infinite_reward,
    nan_final_obs,
    nan_obs,
    nan_reset_obs,
    nan_terminal_obs,
    narrow_obs,
)
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from known_policies import CountPolicy, SnapshotCountPolicy
from parallel_environments import CountingAgents
from processes import children, wait_until

import ppo
from ppo import PPOAgent, PPOConfig
from ppo.collector import RolloutCollector
from ppo.errors import ClosedError, EnvError, NonFiniteError, SpaceError
from ppo.learner import learner
from ppo.policies import Evaluation, make_policy

MODES = pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda mode: mode.name)
POLICIES = pytest.mark.parametrize("policy", [CountPolicy(), SnapshotCountPolicy()], ids=type)


# --- the caller's own environments


def test_the_callers_environments_are_never_closed():
    single = Recorder(CountingEnv())
    vector = SyncVectorEnv([CountingEnv])
    spec = gymnasium.make("CartPole-v1")
    wrapped = Recorder(spec.unwrapped)
    for env in (single, vector, spec, wrapped):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            collect(env, (3,), num_envs=2)
    assert single.closed == wrapped.closed == 0
    assert not vector.closed
    spec.reset(seed=0)
    spec.step(0)
    for env in (vector, spec):
        env.close()


def test_the_callers_environments_are_not_closed_by_a_failure_either():
    env = Recorder(FaultyEnv(crash, step=2))
    with pytest.raises(EnvError):
        collect(env, (5,), CountPolicy(), num_envs=1)
    assert env.closed == 0


def test_an_instance_with_a_spec_is_one_of_the_environments():
    env = gymnasium.make("CartPole-v1")
    recorder = env.unwrapped
    with RolloutCollector(env, num_envs=3, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        rollout = collector.collect(policy, 4)
    assert rollout.rewards.shape == (4, 3)
    assert recorder.state is not None
    (reference,) = collect("CartPole-v1", (4,), policy)
    assert torch.equal(rollout.obs, reference.obs)
    env.close()


def test_an_instance_without_a_spec_is_collected_alone_and_the_caller_is_pointed_at():
    with pytest.warns(UserWarning, match="num_envs is 1, not 8") as caught:
        collector = RolloutCollector(CountingEnv(), num_envs=8, num_workers=2, seed=0)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert collector.num_envs == 1
    collector.close()


def test_environments_made_here_are_closed_once():
    made = []

    def make():
        made.append(Recorder(CountingEnv()))
        return made[-1]

    with RolloutCollector(make, num_envs=3, seed=0) as collector:
        collector.collect(CountPolicy(), 2)
        collector.close()
    assert [env.closed for env in made] == [1, 1, 1]


def test_one_environment_that_fails_to_close_does_not_keep_the_others():
    made = []

    class Stuck(Recorder):
        def close(self):
            super().close()
            raise RuntimeError("cannot close")

    def make():
        made.append(Stuck(CountingEnv()))
        return made[-1]

    collect(make, (2,), CountPolicy())
    assert [env.closed for env in made] == [1, 1, 1]


def failing_factories():
    def third(made):
        if len(made) == 2:
            raise RuntimeError("no more licences")
        return CountingEnv()

    def third_differs(made):
        return CountingEnv() if len(made) < 2 else WalkEnv()

    def unsupported_action(made):
        return WithSpaces(action_space=spaces.Text(2))

    def unsupported_obs(made):
        return WithSpaces(observation_space=spaces.Text(2))

    def no_observation_space(made):
        return CountingEnv() if len(made) < 2 else gymnasium.Env()

    def no_env(made):
        return CountingEnv() if len(made) < 2 else "an environment"

    return [
        (third, EnvError, r"factory of environment 2 raised RuntimeError: no more licences"),
        (third_differs, SpaceError, "environment 2 has other spaces than environment 0"),
        (unsupported_action, SpaceError, "action space Text"),
        (unsupported_obs, SpaceError, "observation space Text"),
        (no_observation_space, SpaceError, r"environment 2 \(Env\) has no observation_space; set"),
        (no_env, TypeError, "factory of environment 2 must return a gymnasium.Env, got str"),
    ]


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [pytest.param(*c, id=c[0].__name__) for c in failing_factories()],
)
def test_a_failed_start_closes_what_was_made(factory, error, message):
    made = []

    def make():
        env = factory(made)
        if isinstance(env, gymnasium.Env):
            env = Recorder(env)
            made.append(env)
        return env

    with pytest.raises(error, match=message):
        RolloutCollector(make, num_envs=3, seed=0)
    assert len(made) >= 2
    assert [env.closed for env in made] == [1] * len(made)


class Unspeakable(CountingEnv):
    """Ends with its first step, on an observation that is not finite."""

    def __init__(self, ending):
        super().__init__(1, ending)

    def observe(self):
        return np.full(2, np.nan if self.count else 0.0, np.float32)


@MODES
def test_what_follows_a_termination_is_nobodys_successor_and_may_be_anything(mode):
    policy = CountPolicy()
    for num_steps in (4, 5):  # the last row is an end, or it is not
        vector = SyncVectorEnv([lambda: Unspeakable("terminated")], autoreset_mode=mode)
        for rollout in collect(vector, (num_steps, num_steps), policy, num_envs=1):
            assert rollout.next_values[rollout.valid].eq(0.0).all()
        vector = SyncVectorEnv([lambda: Unspeakable("truncated")], autoreset_mode=mode)
        with pytest.raises(NonFiniteError, match=r"environment 0 .*observation at rollout step 0"):
            collect(vector, (num_steps,), policy, num_envs=1)


# --- wrong arguments and wrong order


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_envs": 0}, "num_envs"),
        ({"num_envs": 2.5}, "num_envs"),
        ({"num_workers": -1}, "num_workers"),
        ({"num_workers": 1.5}, "num_workers"),
        ({"step_timeout": 0.0}, "step_timeout"),
        ({"step_timeout": -1.0}, "step_timeout"),
        ({"step_timeout": float("nan")}, "step_timeout"),
        ({"start_method": "teleport"}, "start_method"),
        ({"start_method": "teleport", "num_workers": 1}, "start_method"),
        ({"device": "quantum"}, "device"),
        ({"seed": -1}, "seed"),
        ({"seed": "zero"}, "seed"),
        ({"seed": 1.5}, "seed"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(options, name):
    with pytest.raises((ValueError, TypeError), match=name):
        RolloutCollector("CartPole-v1", **{"num_envs": 2, **options})


@pytest.mark.parametrize("num_steps", [0, -1, 2.0, "3", None], ids=str)
def test_a_wrong_number_of_steps_is_named_and_costs_nothing(num_steps):
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        collector.collect(CountPolicy(), 1)
        with pytest.raises((ValueError, TypeError), match="num_steps"):
            collector.collect(CountPolicy(), num_steps)
        assert collector.collect(CountPolicy(), 2).rewards.shape == (2, 2)


def test_a_policy_for_other_spaces_is_refused_and_costs_nothing():
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        for policy in (make_policy(VECTOR, SYMMETRIC), make_policy(SYMMETRIC, TWO)):
            with pytest.raises(SpaceError, match=r"policy was built for .*make_policy"):
                collector.collect(policy, 3)
        assert collector.collect(make_policy(VECTOR, TWO), 3).num_transitions == 6


def test_a_closed_collector_says_so():
    collector = RolloutCollector(CountingEnv, num_envs=2, seed=0)
    rollout = collector.collect(CountPolicy(), 3)
    collector.close()
    collector.close()
    with pytest.raises(ClosedError, match=r"closed: close\(\) was called; make a new one"):
        collector.collect(CountPolicy(), 3)
    assert rollout.rewards.isfinite().all()


def test_leaving_the_with_block_closes():
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        pass
    with pytest.raises(ClosedError):
        collector.collect(CountPolicy(), 1)


class Interrupting(CountPolicy):
    """Raises in the n-th call of one of its methods."""

    def __init__(self, method, error, call=3):
        self.method, self.error, self.calls_left = method, error, call

    def tick(self, method):
        if method == self.method:
            self.calls_left -= 1
            if self.calls_left == 0:
                raise self.error

    def act(self, obs, **arguments):
        self.tick("act")
        return super().act(obs, **arguments)

    def evaluate(self, obs, actions):
        self.tick("evaluate")
        return super().evaluate(obs, actions)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("bug"), SystemExit(3)])
@pytest.mark.parametrize(("method", "call"), [("act", 1), ("act", 3), ("evaluate", 1)])
def test_after_an_exception_in_collect_the_collector_refuses(method, call, error):
    """What the environments were doing is unknown then; no stale row may come out."""
    with RolloutCollector(CountingEnv, num_envs=2, seed=0) as collector:
        with pytest.raises(type(error)):
            collector.collect(Interrupting(method, error, call), 5)
        with pytest.raises(ClosedError, match=f"{type(error).__name__} in collect"):
            collector.collect(CountPolicy(), 5)


class Interrupt(BaseException):
    """Like KeyboardInterrupt, and nobody else's."""


PACKAGE = str(Path(ppo.__file__).parent)


def interrupted_after(lines, call, part="/collector/"):
    """Raise `Interrupt` in the n-th line that modules of a part run, here, during a call."""
    left, process = lines, os.getpid()

    def trace(frame, event, arg):
        nonlocal left
        if not frame.f_code.co_filename.startswith(PACKAGE + part):
            return None
        if event == "line":
            left -= 1
            if left == 0 and os.getpid() == process:  # a fork is traced, too
                raise Interrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    finally:
        sys.settrace(previous)


@pytest.mark.parametrize("num_workers", [0, 2])
@POLICIES
def test_an_interrupt_at_any_line_never_leads_to_a_stale_row(num_workers, policy):
    """Afterwards the collector refuses, or goes on exactly where it was."""
    reference = collect(CountingEnv, (3, 3, 3, 3), policy, num_envs=2)
    refused = 0
    rng = np.random.default_rng(0)
    for _ in range(40 if num_workers == 0 else 12):
        lines = int(rng.integers(1, 500))
        with RolloutCollector(
            CountingEnv, num_envs=2, num_workers=num_workers, seed=0
        ) as collector:
            done = 0
            rollouts = [collector.collect(policy, 3)]
            try:
                interrupted_after(lines, lambda: collector.collect(policy, 3))
                done = 1
            except Interrupt:
                pass
            assert torch.is_grad_enabled()
            try:
                rollouts.append(collector.collect(policy, 3))
            except ClosedError:
                refused += 1
                continue
        if done or not torch.equal(rollouts[1].obs, reference[1].obs):
            assert_identical([rollouts[1]], [reference[2]])  # the one between had been complete
        else:
            assert_identical(rollouts, reference[:2])
    assert refused > 4


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_interrupt_at_any_line_of_learn_leaves_an_agent_that_goes_on_and_no_process(monkeypatch):
    """With workers, and with the process that trains the critic."""
    monkeypatch.setattr(learner, "_MOST_SLOWER", 10**9)
    config = PPOConfig(num_envs=4, num_steps=16, num_epochs=4, minibatch_size=32)
    before, goal = children(), 5 * 64
    rng = np.random.default_rng(1)
    for lines in rng.integers(1000, 60000, 6):
        agent = PPOAgent(config=config, seed=0)
        with pytest.raises(Interrupt):
            interrupted_after(int(lines), lambda a=agent: a.learn("CartPole-v1", goal), "/")
        assert wait_until(lambda: children() <= before)
        steps = agent.steps
        assert steps < goal
        assert agent.learn("CartPole-v1", 64).steps == steps + 64
        assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())


# --- environments that break


def test_an_error_in_step_names_environment_seed_step_and_action():
    seen = {}

    def fault(env):
        seen["count"] = env.count
        crash(env)

    recorders = []

    def make():
        fault_at = 5 if len(recorders) == 1 else 0
        recorders.append(Recorder(FaultyEnv(fault, step=fault_at, length=3)))
        return recorders[-1]

    with RolloutCollector(make, num_envs=3, seed=0) as collector:
        with pytest.raises(EnvError) as caught:
            collector.collect(CountPolicy(), 9)
        text = str(caught.value)
        culprit = recorders[1]
        assert "environment 1 raised RuntimeError in step: the physics exploded" in text
        assert f"episode seed {culprit.seeds[-1]}" in text
        assert f"episode step {seen['count'] - 1}" in text
        assert "rollout step 4" in text
        assert f"action {culprit.actions[-1]!r}" in text
        assert "Traceback" in text
        assert "in crash" in text
        assert isinstance(caught.value.__cause__, RuntimeError)
        with pytest.raises(ClosedError, match="the physics exploded"):
            collector.collect(CountPolicy(), 1)
    assert [env.closed for env in recorders] == [1, 1, 1]


@pytest.mark.parametrize("reset", [1, 2])
def test_an_error_in_reset_names_environment_and_seed(reset):
    recorders = []

    def make():
        recorders.append(Recorder(FaultyEnv(crash, reset=reset * (len(recorders) == 1), length=3)))
        return recorders[-1]

    with pytest.raises(EnvError) as caught:
        collect(make, (9,), CountPolicy())
    text = str(caught.value)
    assert "environment 1 raised RuntimeError in reset: the physics exploded" in text
    assert f"episode seed {recorders[1].seeds[-1]}" in text
    assert "None" not in text


def test_an_error_can_be_replayed_from_its_seed():
    """The episode seed in the message leads to the same episode."""
    made = []

    def make():
        made.append(Recorder(CountingEnv()))
        return made[-1]

    (rollout,) = collect(make, (1,), CountPolicy(), num_envs=2)
    for column, env in enumerate(made):
        obs, _ = CountingEnv().reset(seed=env.seeds[0])
        assert obs.tolist() == rollout.obs[0, column].tolist()


@pytest.mark.parametrize(
    ("fault", "field"), [(nan_obs, "observation"), (infinite_reward, "reward")]
)
@POLICIES
def test_a_non_finite_number_is_stopped_with_its_environment_step_and_field(fault, field, policy):
    made = []

    def make():
        made.append(FaultyEnv(fault, step=8 * (len(made) == 2)))
        return made[-1]

    with RolloutCollector(make, num_envs=4, seed=0) as collector:
        collector.collect(policy, 5)
        with pytest.raises(
            NonFiniteError, match=f"environment 2 .*non-finite {field} at rollout step 2"
        ):
            collector.collect(policy, 5)
        with pytest.raises(ClosedError):
            collector.collect(policy, 5)


def test_the_first_of_several_non_finite_numbers_is_named():
    made = []

    def make():
        steps = {0: 4, 1: 3, 2: 3}
        made.append(FaultyEnv(nan_obs, step=steps[len(made)]))
        return made[-1]

    with pytest.raises(NonFiniteError, match=r"environment 1 .* at rollout step 2"):
        collect(make, (9,), CountPolicy())


def test_a_non_finite_first_observation_is_stopped():
    with pytest.raises(NonFiniteError, match=r"environment 0 .*observation"):
        collect(lambda: FaultyEnv(nan_reset_obs, reset=1), (3,), CountPolicy())


def test_a_non_finite_observation_after_a_reset_is_stopped():
    with pytest.raises(NonFiniteError, match=r"environment 0 .*observation at rollout step 2"):
        collect(lambda: FaultyEnv(nan_reset_obs, reset=2, length=3), (6,), CountPolicy())


@pytest.mark.parametrize("kind", ["columns", *AutoresetMode], ids=str)
def test_a_non_finite_final_observation_of_a_truncated_step_is_stopped(kind):
    """No row holds it, but its value would be the target of the whole episode."""
    make = lambda: FaultyEnv(nan_final_obs, step=3)  # noqa: E731
    env = make if kind == "columns" else SyncVectorEnv([make], autoreset_mode=kind)
    with pytest.raises(NonFiniteError, match=r"environment 0 .*observation at rollout step 2"):
        collect(env, (6,), make_policy(VECTOR, TWO), num_envs=1)


def test_the_last_observation_of_a_terminated_step_is_used_by_nobody():
    (rollout,) = collect(
        lambda: FaultyEnv(nan_terminal_obs, step=3), (6,), make_policy(VECTOR, TWO), num_envs=1
    )
    assert rollout.terminated[2, 0]
    for tensor in (rollout.obs, rollout.values, rollout.next_values, rollout.log_probs):
        assert tensor.isfinite().all()


def test_an_environment_that_raises_because_of_its_own_nan_is_named_by_the_nan():
    class Picky(FaultyEnv):
        def step(self, action):
            if self.steps == 3:
                raise ValueError("state is NaN")
            return super().step(action)

    with pytest.raises(NonFiniteError, match="non-finite observation at rollout step 2"):
        collect(lambda: Picky(nan_obs, step=3), (6,), CountPolicy(), num_envs=1)


def unpack(env):
    _, _ = range(3)


class Saying(CountingEnv):
    """Answers with one thing exchanged."""

    def __init__(self, **changes):
        super().__init__(4, "truncated")
        self.changes = changes

    def step(self, action):
        names = ("obs", "reward", "terminated", "truncated", "info")
        answer = dict(zip(names, super().step(action), strict=True))
        return tuple({**answer, **self.changes}.values())


@pytest.mark.parametrize(
    "changes",
    [
        {"obs": np.zeros(1, np.float32)},
        {"obs": np.zeros((1, 2), np.float32)},
        {"obs": 0.5},
        {"obs": np.zeros(3, np.float32)},
        {"obs": "up"},
        {"reward": "much"},
        {"reward": None},
        {"reward": np.zeros(2)},
        {"extra": 1},
    ],
    ids=str,
)
@POLICIES
def test_an_ill_shaped_answer_is_an_error_that_names_the_environment(changes, policy):
    """Nothing is broadcast into the rollout."""
    with pytest.raises(EnvError, match=r"environment 0 raised .* in step.*episode step 0,"):
        collect(lambda: Saying(**changes), (6,), policy)


class Leaving(CountingEnv):
    """Declares a space and leaves it in the third observation."""

    def __init__(self, space, inside, outside, end="truncated"):
        super().__init__(4, end)
        self.observation_space, self.inside, self.outside = space, inside, outside

    def observe(self):
        return self.outside if self.count == 2 else self.inside


SHORT = PPOConfig(num_envs=1, num_steps=6, num_workers=0)
LEAVING = [
    (spaces.Box(0, 255, (2,), np.uint8), np.zeros(2, np.float32), np.full(2, 0.5, np.float32)),
    (spaces.Discrete(3), 0, 3),
    (spaces.MultiDiscrete([3, 3]), np.array([0, 0]), np.array([1, -1])),
]


@pytest.mark.parametrize("answers", LEAVING, ids=lambda answers: str(answers[0]))
def test_an_observation_outside_its_space_names_environment_seed_step_and_remedy(answers):
    words = (
        r"environment 0 raised ValueError in step: the observation has .* but the space is "
        r".*: wanted .*; declare .* \(episode seed \d+, episode step 1, rollout step 1,"
    )
    with pytest.raises(EnvError, match=words):
        PPOAgent(config=SHORT).learn(lambda: Leaving(*answers), 6)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED], ids=str)
def test_a_final_observation_outside_its_space_names_the_vector_environment(mode):
    class Last(Leaving):
        def observe(self):
            return self.outside if self.count == 4 else self.inside

    answers = spaces.MultiDiscrete([3, 3]), np.array([0, 0]), np.array([1, 5])
    env = SyncVectorEnv([lambda: Last(*answers)], autoreset_mode=mode)
    with pytest.raises(EnvError, match=r"does not return what it declares.* has 5 at \[.*1\]"):
        PPOAgent(config=SHORT).learn(env, 6)


class GrowingLate(CountingEnv):
    """Its observations get a number more in the third step of each episode."""

    def observe(self):
        return np.append(super().observe(), [0.0] * (self.count == 3)).astype(np.float32)


@pytest.mark.parametrize(("horizons", "row"), [((6,), 2), ((1, 1, 6), 0)], ids=str)
def test_an_ill_shaped_observation_names_the_step_that_led_to_it(horizons, row):
    place = rf"in step: .* \(episode seed \d+, episode step 2, rollout step {row},"
    with pytest.raises(EnvError, match=place):
        collect(lambda: GrowingLate(length=4), horizons, CountPolicy())


@pytest.mark.parametrize(
    ("method", "wanted"),
    [("reset", "(obs, info)"), ("step", "(obs, reward, terminated, truncated, info)")],
)
@pytest.mark.parametrize("answer", [lambda given: given[:-1], lambda given: None, lambda given: 3])
def test_the_interface_of_old_environments_is_told_the_present_one(method, wanted, answer):
    class Old(CountingEnv):
        pass

    def old(self, *args, **kwargs):
        return answer(getattr(CountingEnv, method)(self, *args, **kwargs))

    setattr(Old, method, old)
    with pytest.raises(EnvError, match=f"in {method}: .*; it must return {re.escape(wanted)}"):
        collect(Old, (6,), CountPolicy())


@pytest.mark.parametrize("action_space", [TWO, SYMMETRIC], ids=str)
def test_an_old_reset_whose_observation_is_a_pair_is_told_the_present_one(action_space):
    class Old(WithSpaces):
        def reset(self, **kwargs):
            return super().reset(**kwargs)[0]

    space = spaces.Box(-1.0, 1.0, (2,))
    wanted = r"in reset: .* float32, wanted a mapping; it must return \(obs, info\) \(episode seed"
    with pytest.raises(EnvError, match=wanted):
        PPOAgent(config=SHORT).learn(lambda: Old(space, action_space), 6)


def test_an_old_reset_of_two_agents_is_told_the_present_one():
    class Old(CountingAgents):
        def reset(self, seed=None, options=None):
            return super().reset(seed)[0]

    with pytest.raises(EnvError, match=r"in reset: .* type str, .*must return \(obs, info\)"):
        PPOAgent(config=SHORT).learn(Old, 6)


def test_what_an_environment_itself_fails_to_unpack_is_left_as_it_is():
    with pytest.raises(EnvError, match=r"unpack \(expected 2\) \(episode seed"):
        collect(lambda: FaultyEnv(unpack, step=2), (6,), CountPolicy())


@pytest.mark.parametrize(
    "reward", [np.float64(2.0), np.array(2.0), 2, True, torch.tensor(2.0)], ids=repr
)
def test_a_reward_may_be_any_scalar(reward):
    (rollout,) = collect(lambda: Saying(reward=reward), (6,), CountPolicy())
    assert torch.equal(rollout.rewards, torch.full((6, 3), float(reward)))


@pytest.mark.parametrize("kind", [np.bool_, int, lambda flag: np.array([flag])])
@pytest.mark.parametrize("num_workers", [0, 2])
@POLICIES
def test_a_flag_may_be_anything_that_is_true_or_false(kind, num_workers, policy):
    class Flags(CountingEnv):
        def step(self, action):
            obs, reward, *flags, info = super().step(action)
            return obs, reward, *map(kind, flags), info

    with RolloutCollector(Flags, num_envs=3, num_workers=num_workers, seed=0) as collector:
        rollout = collector.collect(policy, 20)
    for column in range(3):
        assert_counts([rollout], column)


def test_a_narrow_observation_of_one_environment_is_not_spread():
    with pytest.raises(EnvError, match="environment 0"):
        collect(lambda: FaultyEnv(narrow_obs, step=2), (6,), CountPolicy())


def test_an_action_that_is_not_finite_is_not_blamed_on_the_environment():
    """A policy that has diverged sends the user to the policy, not to the environment."""
    with RolloutCollector("Pendulum-v1", num_envs=2, seed=0) as collector:
        policy = make_policy(collector.observation_space, collector.action_space)
        with torch.no_grad():
            next(iter(policy.parameters())).fill_(float("nan"))
        with pytest.raises(NonFiniteError, match="policy"):
            collector.collect(policy, 3)


# --- what was learned before stays


def test_the_last_checkpoint_stays_as_it_was(tmp_path):
    agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=8, num_epochs=1))
    agent.learn(CountingEnv, 16)
    path = tmp_path / "agent.safetensors"
    agent.save(path)
    before = path.read_bytes()
    parameters = [parameter.clone() for parameter in agent.policy.parameters()]
    with pytest.raises(NonFiniteError, match=r"environment \d .*observation at rollout step 4"):
        agent.learn(
            lambda: FaultyEnv(nan_obs, step=13), 64, callback=lambda report: agent.save(path)
        )
    between = path.read_bytes()
    assert between != before  # the update before the fault was saved
    assert all(torch.isfinite(parameter).all() for parameter in agent.policy.parameters())
    loaded = PPOAgent.load(path)
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(tensor, loaded.policy.state_dict()[name])
    assert any(
        not torch.equal(old, new)
        for old, new in zip(parameters, agent.policy.parameters(), strict=True)
    )


class Exploding(torch.autograd.Function):
    """Finite forwards, infinite backwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


class OwnPolicy(torch.nn.Module):
    """Its values overflow in the loss, or its gradient does."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.weight = torch.nn.Parameter(torch.ones(2))

    def act(self, obs, *, deterministic=False):
        return torch.zeros(len(obs), dtype=torch.int64)

    def evaluate(self, obs, actions):
        values = self.value(obs)
        if self.fault == "gradient":
            values = Exploding.apply(values)
        return Evaluation(0.0 * values - 0.5, 0.0 * values, values)

    def value(self, obs):
        return (1e30 if self.fault == "loss" else 1.0) * self.weight[0] * obs[:, 0]


@pytest.mark.parametrize(("fault", "name"), [("loss", "value_loss"), ("gradient", "grad_norm")])
def test_a_loss_and_a_gradient_that_are_not_finite_are_named(fault, name):
    policy = OwnPolicy(fault)
    agent = PPOAgent(policy, config=PPOConfig(num_envs=2, num_steps=8, num_epochs=1))
    with pytest.raises(NonFiniteError, match=rf"{name}.* became non-finite during an update"):
        agent.learn(CountingEnv, 16)
    assert torch.equal(policy.weight, torch.ones(2))
