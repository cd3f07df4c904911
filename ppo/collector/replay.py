"""Going on in the middle of an episode, in a new environment.

A column's place in its episode is a `Bookmark`. The environment gets there by its own `set_state`,
if it offers one, or by playing the episode again: from its seed, with its actions. An episode that
comes out differently cannot be gone on with.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import gymnasium
import numpy as np
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit

from ppo.envs import Env
from ppo.packing import pack
from ppo.spaces import ActionAdapter, ObservationLayout
from ppo.trees import leaves, leaves_with_paths, map_tree

__all__ = [
    "ActionLog",
    "Bookmark",
    "Place",
    "digest",
    "kind_of",
    "return_to",
    "snapshot_of",
    "stream_at",
]

# Around an environment with states of its own; how far these are is known from the bookmark.
_SEEN_THROUGH = (OrderEnforcing, PassiveEnvChecker, TimeLimit)


@dataclasses.dataclass(frozen=True)
class Bookmark:
    """The place of one column in its episode.

    Attributes:
        kind: What environment it is, with all wrappers; see `kind_of`.
        seeds: State of the generator of its episodes' seeds.
        seed: Seed of the current episode; None where there is none, or none to start it by.
        episode_return: Rewards so far.
        episode_length: Steps so far.
        snapshot: What `get_state` of the environment returned; None without.
    """

    kind: str
    seeds: Mapping[str, Any]
    seed: int | None = None
    episode_return: float = 0.0
    episode_length: int = 0
    snapshot: Any = None


class Place(NamedTuple):
    """All it takes to bring an environment to where its column was.

    Attributes:
        mark: Where it was in its episode.
        actions: Raw actions since the reset, a tree of `[L, ...]`; None for no actions.
        digest: `digest` of the observation there.
    """

    mark: Bookmark
    actions: Any
    digest: str


class ActionLog:
    """Raw actions of the current episode of every column.

    Args:
        num_envs: Number of columns `N`.
    """

    def __init__(self, num_envs: int) -> None:
        self._parts: list[list[Any]] = [[] for _ in range(num_envs)]

    def extend(self, actions: Any, ended: np.ndarray) -> None:
        """Take in a rollout.

        Args:
            actions: Raw actions, a tree of arrays `[T, N, ...]`, which may be longer.
            ended: Where episodes ended, bool `[T, N]`.
        """
        num_steps = len(ended)
        steps, columns = np.nonzero(ended)
        behind = dict(zip(columns.tolist(), (steps + 1).tolist(), strict=True))  # the last ends
        for index, parts in enumerate(self._parts):
            start = behind.get(index, 0)
            if start:
                parts.clear()
            if start < num_steps:
                parts.append(_rows(actions, start, num_steps, index))

    def of_all(self) -> tuple[Any, ...]:
        """Actions of every column, trees of `[L, ...]`; None for an episode without any."""
        for parts in self._parts:
            if len(parts) > 1:
                parts[:] = [map_tree(lambda *arrays: np.concatenate(arrays), *parts)]
        return tuple(parts[0] if parts else None for parts in self._parts)

    def put(self, actions: Sequence[Any], columns: np.ndarray) -> None:
        """Begin with what `of_all` returned, in the chosen columns bool `[N]`."""
        for index, taken in enumerate(actions):
            if columns[index] and taken is not None:
                self._parts[index] = [taken]


def _rows(actions: Any, start: int, stop: int, index: int) -> Any:
    return map_tree(lambda array: array[start:stop, index].copy(), actions)


def kind_of(env: Any) -> str:
    """Id and classes of an environment and its wrappers: the same where replaying makes sense."""
    names = []
    inner = env
    while isinstance(inner, gymnasium.Wrapper):
        names.append(type(inner).__qualname__)
        inner = inner.env
    names.append(type(inner).__qualname__)
    spec = getattr(env, "spec", None)
    return " > ".join([*names, *([spec.id] if spec else [])])


def digest(obs: Any) -> str:
    """SHA-256 over an observation as it is stored, a tree of arrays."""
    found = hashlib.sha256()
    for path, leaf in leaves_with_paths(obs):
        array = np.asarray(leaf)
        found.update(f"{path}:{array.dtype.str}:{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def stream_at(state: Mapping[str, Any]) -> np.random.Generator:
    """A generator in this state; an error of some kind for a state that makes no sense."""
    bits = np.random.PCG64(0)
    bits.state = dict(state)  # type: ignore[assignment]
    return np.random.Generator(bits)


def snapshot_of(env: Env) -> Any:
    """What the environment says its state is, if it offers to set it, in memory of its own."""
    inner = _with_states(env)
    if inner is None:
        return None
    try:
        state = inner.get_state()
        pack(state)
        return copy.deepcopy(state)
    except Exception:  # not what was meant by the name; there is another way
        return None


def _with_states(env: Any) -> Any:
    """The environment that offers `get_state` and `set_state`, if all that is around is known."""
    while not all(callable(getattr(env, name, None)) for name in ("get_state", "set_state")):
        if type(env) not in _SEEN_THROUGH:
            return None
        env = env.env
    return env


def return_to(
    env: Env, place: Place, adapter: ActionAdapter, layout: ObservationLayout
) -> dict[str, Any] | None:
    """Bring an environment to where its column was.

    Args:
        env: The environment, in any state.
        place: Where to.
        adapter: What makes the environment's actions of raw ones.
        layout: How observations are stored.

    Returns:
        `info` of its reset, or None if it did not come out there.
    """
    if place.mark.snapshot is not None:
        info = _set_state(env, place.mark)
        if info is not None:
            return info
    try:
        return _play_again(env, place, adapter, layout)
    except Exception:  # it did not raise the first time
        return None


def _set_state(env: Env, mark: Bookmark) -> dict[str, Any] | None:
    inner = _with_states(env)
    if inner is None:
        return None
    try:
        _, info = env.reset(seed=mark.seed)
        inner.set_state(copy.deepcopy(mark.snapshot))
    except Exception:  # replaying may still do
        return None
    around: Any = env
    while around is not inner:
        if isinstance(around, TimeLimit):
            around._elapsed_steps = mark.episode_length  # type: ignore[assignment]
        around = around.env
    return info


def _play_again(
    env: Env, place: Place, adapter: ActionAdapter, layout: ObservationLayout
) -> dict[str, Any] | None:
    mark, actions = place.mark, place.actions
    obs, first_info = env.reset(seed=mark.seed)
    total = 0.0
    played = 0 if actions is None else len(leaves(actions)[0])
    if played != mark.episode_length:
        return None
    for t in range(played):
        (action,) = adapter.rows(adapter(_step(actions, t)))
        obs, reward, terminated, truncated, _ = env.step(action)
        total += float(reward)
        if terminated or truncated:
            return None
    same = digest(layout.copy(obs)) == place.digest and total == mark.episode_return
    return first_info if same else None


def _step(actions: Any, t: int) -> Any:
    return map_tree(lambda array: array[t : t + 1], actions)
