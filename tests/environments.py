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


def announced(fault):
    """The fault, before which the standard output gets the number of the process."""

    def happen(env):
        os.write(1, b"%d\n" % os.getpid())
        return fault(env)

    return happen


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


def sample(space, rng):
    """One element of a space, from that generator alone; containers as Gymnasium gives them."""
    if isinstance(space, spaces.Dict):
        return {key: sample(item, rng) for key, item in space.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sample(item, rng) for item in space)
    if isinstance(space, spaces.Discrete):
        return space.dtype.type(space.start + rng.integers(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + rng.integers(space.nvec)).astype(space.dtype)
    if isinstance(space, spaces.MultiBinary):
        return rng.integers(0, 2, space.shape).astype(space.dtype)
    if np.issubdtype(space.dtype, np.integer):
        return np.asarray(rng.integers(space.low, space.high, endpoint=True), space.dtype)
    low = np.where(np.isfinite(space.low), space.low, np.minimum(space.high, 10.0) - 9.0)
    high = np.where(np.isfinite(space.high), space.high, low + 9.0)
    return np.asarray(np.clip(rng.uniform(low, high), space.low, space.high), space.dtype)


def draw_mask(space, rng):
    """A mask as environments tell it, half of the actions legal; None for a Box.

    For a MultiDiscrete one array per position, or all of them one after the other.
    """
    if isinstance(space, spaces.Dict):
        masks = {key: draw_mask(item, rng) for key, item in space.items()}
        # A leaf without mask may be left out.
        return {key: mask for key, mask in masks.items() if mask is not None or rng.random() < 0.5}
    if isinstance(space, spaces.Tuple):
        return tuple(draw_mask(item, rng) for item in space)
    if isinstance(space, spaces.Discrete):
        return _some(rng, int(space.n))
    if isinstance(space, spaces.MultiDiscrete):
        positions = tuple(_some(rng, int(count)) for count in space.nvec.reshape(-1))
        return positions if rng.random() < 0.5 else np.concatenate(positions)
    if isinstance(space, spaces.MultiBinary):
        return np.stack([_some(rng, 2) for _ in range(int(np.prod(space.shape)))])
    return None


def _some(rng, count):
    legal = rng.random(count) < 0.5
    legal[rng.integers(count)] = True
    return legal


def assert_member(space, action, path="action"):
    """The action is of exactly the type, dtype and shape that its space declares, and in it."""
    if isinstance(space, spaces.Dict):
        assert type(action) is dict, f"{path}: {type(action)}"
        assert list(action) == list(space.keys()), f"{path}: keys {list(action)}"
        for key, item in space.items():
            assert_member(item, action[key], f"{path}/{key}")
    elif isinstance(space, spaces.Tuple):
        assert type(action) is tuple, f"{path}: {type(action)}"
        assert len(action) == len(space), f"{path}: {len(action)} items"
        for index, item in enumerate(space):
            assert_member(item, action[index], f"{path}/{index}")
    elif isinstance(space, spaces.Discrete):
        assert type(action) is space.dtype.type, f"{path}: {type(action)}"
    else:
        assert type(action) is np.ndarray, f"{path}: {type(action)}"
        assert action.dtype == space.dtype, f"{path}: {action.dtype}"
        assert action.shape == space.shape, f"{path}: {action.shape}"
    assert space.contains(action), f"{path}: {action} is not in {space}"


def assert_legal(space, action, mask, path="action"):
    """The action is legal under a mask as `draw_mask` gives it."""
    if mask is None:
        return
    if isinstance(space, spaces.Dict):
        for key, part in mask.items():
            assert_legal(space[key], action[key], part, f"{path}/{key}")
    elif isinstance(space, spaces.Tuple):
        for index, part in enumerate(mask):
            assert_legal(space[index], action[index], part, f"{path}/{index}")
    elif isinstance(space, spaces.Discrete):
        assert mask[action - space.start], f"{path}: {action} under {mask}"
    else:
        chosen = action.reshape(-1)
        if isinstance(space, spaces.MultiDiscrete):
            chosen = (action - space.start).reshape(-1)
            if not isinstance(mask, tuple):
                mask = np.split(mask, np.cumsum(space.nvec.reshape(-1))[:-1])
        for legal, value in zip(mask, chosen, strict=True):
            assert legal[value], f"{path}: {action} under {mask}"


class RandomSpacesEnv(gymnasium.Env):
    """Observes samples of a space and takes nothing but legal actions of exactly the right type.

    Everything that it does is a function of its seed. Whoever offends it gets an AssertionError.

    Args:
        observation_space: Of Box, Discrete, MultiDiscrete and MultiBinary, nested in any way.
        action_space: Likewise.
        masks: Draw a mask in every step and tell it as `info["action_mask"]`.
        length: Steps of an episode; every other one is truncated instead of terminated.
    """

    metadata = {"render_modes": []}  # noqa: RUF012

    def __init__(self, observation_space, action_space, masks=False, length=5):
        self.observation_space, self.action_space = observation_space, action_space
        self.masks, self.length, self.episodes = masks, length, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.episodes = 0, self.episodes + 1
        return self.observe()

    def step(self, action):
        assert_member(self.action_space, action)
        assert_legal(self.action_space, action, self.mask)
        self.count += 1
        over, truncates = self.count >= self.length, self.episodes % 2 == 0
        obs, info = self.observe()
        reward = float(self.np_random.normal())
        return obs, reward, over and not truncates, over and truncates, info

    def observe(self):
        self.mask = draw_mask(self.action_space, self.np_random) if self.masks else None
        info = {} if self.mask is None else {"action_mask": self.mask}
        return sample(self.observation_space, self.np_random), info
