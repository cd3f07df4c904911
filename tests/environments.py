"""Environments whose every number is known, and environments that break in every known way.

All are deterministic given their seed.
"""

import ctypes
import os
import resource
import signal
import time
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

VECTOR = spaces.Box(-1e6, 1e6, (2,), np.float32)
TWO = spaces.Discrete(2)
SYMMETRIC = spaces.Box(-1.0, 1.0, (2,), np.float32)


class CountingEnv(gymnasium.Env):
    """Counts its steps: the observation is [step, tag], the reward of the n-th step n + tag.

    The tag is drawn anew in each reset, so that no two episodes look alike. Actions change
    nothing.

    Args:
        length: Steps of an episode; None draws 1 to 6 in each reset.
        ending: "terminated", "truncated" or "both"; None draws one in each reset.
    """

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space = VECTOR
    action_space = TWO

    def __init__(self, length=None, ending=None):
        self.length, self.ending = length, ending

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.tag = float(self.np_random.integers(1, 1000))
        drawn = int(self.np_random.integers(1, 7))
        self.episode_length = self.length or drawn
        drawn = ("terminated", "truncated", "both")[self.np_random.integers(3)]
        self.episode_ending = self.ending or drawn
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        done = self.count >= self.episode_length
        return (
            self.observe(),
            self.count + self.tag,
            done and self.episode_ending in ("terminated", "both"),
            done and self.episode_ending in ("truncated", "both"),
            {},
        )

    def observe(self):
        return np.array([self.count, self.tag], np.float32)


class WalkEnv(CountingEnv):
    """A counting environment with two real actions whose sum moves the tag and is paid."""

    action_space = SYMMETRIC

    def step(self, action):
        assert self.action_space.contains(action)
        move = float(action.sum())
        self.tag += move
        obs, _, terminated, truncated, info = super().step(action)
        return obs, move, terminated, truncated, info


class AliasingEnv(CountingEnv):
    """Returns the same array and the same dict from every call, as some simulators do."""

    def __init__(self, length=None, ending=None):
        super().__init__(length, ending)
        self.buffer = np.zeros(2, np.float32)
        self.info = {}

    def reset(self, *, seed=None, options=None):
        obs, _ = super().reset(seed=seed, options=options)
        return obs, self.info

    def step(self, action):
        return *super().step(action)[:-1], self.info

    def observe(self):
        self.buffer[:] = self.count, self.tag
        return self.buffer


class ImageEnv(CountingEnv):
    """Pixels: one bright square that moves with the count."""

    observation_space = spaces.Box(0, 255, (3, 40, 44), np.uint8)

    def observe(self):
        image = np.zeros(self.observation_space.shape, np.uint8)
        image[:, 5 * self.count : 5 * self.count + 5, : int(self.tag) % 40] = 200 + self.count
        return image


class WithSpaces(CountingEnv):
    """A counting environment that declares whatever it is told; observations are samples."""

    def __init__(self, observation_space=VECTOR, action_space=TWO):
        super().__init__()
        self.observation_space, self.action_space = observation_space, action_space

    def observe(self):
        self.observation_space.seed(self.count)
        return self.observation_space.sample()


class Recorder(gymnasium.Wrapper):
    """Writes down what reaches the environment."""

    def __init__(self, env):
        super().__init__(env)
        self.actions, self.seeds, self.closed = [], [], 0

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        self.actions.append(action)
        return super().step(action)

    def close(self):
        self.closed += 1
        super().close()


class FaultyEnv(CountingEnv):
    """Does something terrible in the n-th step, or in the n-th reset, of its life.

    Args:
        fault: Called with the environment; what it returns, if anything, is the step's result.
        step: The step it happens in, counted from 1 over all episodes.
        reset: The reset it happens in, counted from 1.
        length: Steps of an episode.
    """

    def __init__(self, fault, *, step=0, reset=0, length=1000):
        super().__init__(length, "terminated")
        self.fault, self.at_step, self.at_reset = fault, step, reset
        self.steps = self.resets = 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        result = super().reset(seed=seed, options=options)
        return (self.resets == self.at_reset and self.fault(self)) or result

    def step(self, action):
        self.steps += 1
        result = super().step(action)
        return (self.steps == self.at_step and self.fault(self)) or result


def crash(env):
    raise RuntimeError("the physics exploded")


def hang(env):
    time.sleep(60)


def hang_holding_the_gil(env):
    ctypes.PyDLL(None).sleep(60)


def hang_ignoring_sigterm(env):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def leave(env):
    os._exit(7)


def kill(env):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(env):
    os.kill(os.getpid(), signal.SIGSTOP)


def segfault(env):
    ctypes.string_at(0)


def loop_holding_the_gil(env):
    """A loop in C that gives the interpreter's lock to nobody for minutes."""
    sum(range(10**11))


def eat_memory(env):
    """Raises MemoryError, as nothing else in the process needs to allocate."""
    used = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**24, used[1]))
    try:
        bytearray(2**30)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, used)


def nan_obs(env):
    return np.array([env.count, np.nan], np.float32), 1.0, False, False, {}


def nan_final_obs(env):
    return np.array([env.count, np.nan], np.float32), 1.0, False, True, {}


def nan_terminal_obs(env):
    return np.array([env.count, np.nan], np.float32), 1.0, True, False, {}


def nan_reset_obs(env):
    return np.array([0.0, np.nan], np.float32), {}


def infinite_reward(env):
    return env.observe(), float("-inf"), False, False, {}


def narrow_obs(env):
    return np.zeros(1, np.float32), 1.0, False, False, {}


class ProbeEnv(gymnasium.Env):
    """Base of the probes: environments so small that the values are known exactly."""

    observation_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space = TWO

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        self.sign = float(self.np_random.choice([-1.0, 1.0]))
        return self.observe(), {}

    def observe(self):
        return np.array([self.sign], np.float32)


class OneStepProbe(ProbeEnv):
    """One step, reward 1: V = 1."""

    def step(self, action):
        return self.observe(), 1.0, True, False, {}


class SignProbe(ProbeEnv):
    """One step, reward is the observation: V(s) = s."""

    def step(self, action):
        return self.observe(), self.sign, True, False, {}


class DelayProbe(ProbeEnv):
    """Two steps, 1 paid at the end: V(0) = gamma, V(1) = 1."""

    def step(self, action):
        self.count += 1
        return self.observe(), float(self.count == 2), self.count == 2, False, {}

    def observe(self):
        return np.array([self.count], np.float32)


class ActionProbe(ProbeEnv):
    """One step that pays 1 for action 1 and 0 for action 0."""

    def step(self, action):
        return self.observe(), float(action), True, False, {}


class MatchProbe(ProbeEnv):
    """One step that pays 1 if the action is 1 exactly where the observation is positive."""

    def step(self, action):
        return self.observe(), float((action == 1) == (self.sign > 0)), True, False, {}


class EndlessProbe(ProbeEnv):
    """Pays 1 for ever and is truncated after `length` steps: V = 1 / (1 - gamma)."""

    def __init__(self, length=10):
        self.length = length

    def step(self, action):
        self.count += 1
        return self.observe(), 1.0, False, self.count >= self.length, {}

    def observe(self):
        return np.zeros(1, np.float32)
