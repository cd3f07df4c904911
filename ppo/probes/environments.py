"""The environments of the probes: so small that every value and every best action is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

__all__ = [
    "BothLeaves",
    "ConstantReward",
    "DelayedReward",
    "Endless",
    "EndlessAfterStart",
    "HybridAction",
    "MaskedOrder",
    "MaskedOrderByMethod",
    "MaskedOrderInObservation",
    "MaskedTMaze",
    "MatchingAction",
    "PayingAction",
    "ProbeEnv",
    "SeenReward",
    "TMaze",
    "Target",
]

Space = gymnasium.Space[Any]
Step = tuple[Any, float, bool, bool, dict[str, Any]]


class ProbeEnv(gymnasium.Env[Any, Any]):
    """What they share: a sign, -1 or 1, drawn in each reset and observed; two actions."""

    metadata = {"render_modes": []}  # noqa: RUF012
    observation_space: Space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    action_space: Space = spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode."""
        super().reset(seed=seed)
        self.count = 0
        self.draw()
        return self.observe(), self.info()

    def draw(self) -> None:
        """Draw what the episode, or the next step, is about."""
        self.sign = float(self.np_random.choice([-1.0, 1.0]))

    def observe(self) -> Any:
        """The observation as things stand."""
        return np.array([self.sign], np.float32)

    def info(self) -> dict[str, Any]:
        """What is told beside the observation."""
        return {}


class ConstantReward(ProbeEnv):
    """One step, reward 1: V = 1."""

    def step(self, action: Any) -> Step:
        """End."""
        return self.observe(), 1.0, True, False, {}


class SeenReward(ProbeEnv):
    """One step, the reward is the observation: V(s) = s."""

    def step(self, action: Any) -> Step:
        """End."""
        return self.observe(), self.sign, True, False, {}


class DelayedReward(ProbeEnv):
    """Two steps, 1 paid at the end; the observation counts them: V(0) = γ, V(1) = 1."""

    def step(self, action: Any) -> Step:
        """Go on, then end."""
        self.count += 1
        return self.observe(), float(self.count == 2), self.count == 2, False, {}

    def observe(self) -> np.ndarray:
        """The steps taken."""
        return np.array([self.count], np.float32)


class PayingAction(ProbeEnv):
    """One step that pays 1 for action 1 and 0 for action 0."""

    def step(self, action: Any) -> Step:
        """End."""
        return self.observe(), float(action), True, False, {}


class MatchingAction(ProbeEnv):
    """One step that pays 1 if the action is 1 exactly where the observation is positive."""

    def step(self, action: Any) -> Step:
        """End."""
        return self.observe(), float((action == 1) == (self.sign > 0)), True, False, {}


class Endless(ProbeEnv):
    """Pays 1 for ever and is truncated after `length` steps: V = 1 / (1 - γ)."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def step(self, action: Any) -> Step:
        """Go on; a time limit may come."""
        self.count += 1
        return self.observe(), 1.0, False, self.count >= self.length, {}

    def observe(self) -> np.ndarray:
        """Always the same."""
        return np.zeros(1, np.float32)


class EndlessAfterStart(Endless):
    """Pays nothing at first, then 1 for ever; its first state is like no other.

    The observation is 0 at first and 1 from then on: V(0) = γ / (1 - γ), V(1) = 1 / (1 - γ).
    """

    def __init__(self, length: int = 2) -> None:
        super().__init__(length)

    def step(self, action: Any) -> Step:
        """Go on; a time limit may come."""
        obs, _, *ends, info = super().step(action)
        return obs, float(self.count > 1), *ends, info

    def observe(self) -> np.ndarray:
        """Whether this is the first state no longer."""
        return np.array([self.count > 0], np.float32)


class TMaze(ProbeEnv):
    """A cue at the start, a corridor, and a choice at its end (Bakker 2001).

    The observation is `[cue, at the junction]`; the cue, -1 or 1, is seen in the first step only.
    At the junction action 1 pays 1 where the cue was positive, and action 0 where it was negative;
    what is done before changes nothing. The length of the corridor is drawn, so that nothing but a
    memory can tell: with one the best return is 1, without one 1/2.

    Args:
        lengths: Shortest and longest corridor, in steps.
    """

    observation_space: Space = spaces.Box(-1.0, 1.0, (2,), np.float32)

    def __init__(self, lengths: tuple[int, int] = (1, 4)) -> None:
        self.lengths = lengths

    def draw(self) -> None:
        """Draw the cue and the length of the corridor."""
        super().draw()
        self.junction = 1 + int(self.np_random.integers(*self.lengths, endpoint=True))

    def step(self, action: Any) -> Step:
        """Walk on, or choose."""
        chosen = self.count == self.junction
        self.count += 1
        return self.observe(), float(chosen and self.right(action)), chosen, False, {}

    def right(self, action: Any) -> bool:
        """Whether this choice is the cued one."""
        return bool((action == 1) == (self.sign > 0))

    def observe(self) -> np.ndarray:
        """The cue at the start, the junction at the end, nothing between."""
        return np.array([self.sign * (self.count == 0), self.count == self.junction], np.float32)


class MaskedOrder(ProbeEnv):
    """Of the actions that are legal in this step, take the last, or the first.

    Each step draws which actions are legal and tells it as `info["action_mask"]` alone. Where the
    observation is positive the last legal action pays, else the first: 1 over an episode. An
    illegal action costs 1 and ends it.
    """

    action_space: Space = spaces.Discrete(4)
    length = 4

    def draw(self) -> None:
        """Each action is legal half of the time, and at least one is."""
        super().draw()
        self.mask = self.np_random.random(4) < 0.5
        self.mask[self.np_random.integers(4)] = True

    def step(self, action: Any) -> Step:
        """Pay, and draw sign and mask anew."""
        legal = np.flatnonzero(self.mask)
        illegal = action not in legal
        right = action == (legal[-1] if self.sign > 0 else legal[0])
        reward = -1.0 if illegal else float(right) / self.length
        self.count += 1
        self.draw()
        return self.observe(), reward, illegal or self.count == self.length, False, self.info()

    def info(self) -> dict[str, Any]:
        """The mask."""
        return {"action_mask": self.mask.copy()}


class MaskedOrderByMethod(MaskedOrder):
    """The same, with the mask told by a method."""

    def info(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def action_masks(self) -> np.ndarray:
        """Which actions are legal in the next step."""
        return self.mask.copy()


class MaskedOrderInObservation(MaskedOrder):
    """The same, with the mask as a part of the observation."""

    observation_space: Space = spaces.Dict(
        {"action_mask": spaces.MultiBinary(4), "sign": ProbeEnv.observation_space}
    )

    def info(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def observe(self) -> dict[str, np.ndarray]:
        """The sign and the mask."""
        return {"action_mask": self.mask.astype(np.int8), "sign": super().observe()}


class MaskedTMaze(TMaze):
    """A T-maze with two doors on each side, of which one is locked; in the corridor too.

    Actions 0 and 1 go left, 2 and 3 right. `info["action_mask"]` tells which are open; a locked one
    costs 1 and ends the episode. With memory and mask the best return is 1, without memory 1/2,
    without the mask below 0.
    """

    action_space: Space = spaces.Discrete(4)

    def draw(self) -> None:
        """Draw the cue, the length of the corridor and the first doors."""
        super().draw()
        self.lock()

    def step(self, action: Any) -> Step:
        """Walk on, or choose."""
        locked = not self.mask[action]
        obs, reward, over, _, _ = super().step(action)
        self.lock()
        return obs, -1.0 if locked else reward, locked or over, False, self.info()

    def right(self, action: Any) -> bool:
        """Whether this choice is on the cued side."""
        return bool((action >= 2) == (self.sign > 0))

    def lock(self) -> None:
        """Draw the open door of either side."""
        self.mask = np.zeros(4, np.bool_)
        self.mask[[self.np_random.integers(2), 2 + self.np_random.integers(2)]] = True

    def info(self) -> dict[str, Any]:
        """The mask."""
        return {"action_mask": self.mask.copy()}


class Target(ProbeEnv):
    """One step; costs the distance to a target that depends on the sign observed: 0 at best.

    Args:
        targets: For the negative sign and for the positive one.
        low: Lower bound of the action.
        high: Upper bound of the action.
    """

    def __init__(self, targets: Sequence[float], low: float = -1.0, high: float = 1.0) -> None:
        self.targets = targets
        self.action_space = spaces.Box(low, high, (1,), np.float32)

    def step(self, action: Any) -> Step:
        """End."""
        if not self.action_space.contains(action):
            raise ValueError(f"{action!r} is not in {self.action_space}")
        target = self.targets[self.sign > 0]
        return self.observe(), -abs(float(action[0]) - target), True, False, {}


class HybridAction(ProbeEnv):
    """One step with a choice and a force: both must fit the sign observed, and so each other.

    A wrong side pays nothing; the right one pays 1 less the distance of the push to half the sign.
    """

    action_space: Space = spaces.Dict(
        {"push": spaces.Box(-1.0, 1.0, (1,), np.float32), "side": spaces.Discrete(2)}
    )

    def step(self, action: Any) -> Step:
        """End."""
        distance = abs(float(action["push"][0]) - self.sign / 2)
        right = (action["side"] == 1) == (self.sign > 0)
        return self.observe(), 1.0 - distance if right else 0.0, True, False, {}


class BothLeaves(ProbeEnv):
    """One step; the right action is 1 where sign and class are both high or both low.

    They stand in two leaves of a nested observation, beside one of noise; neither tells alone.
    """

    observation_space: Space = spaces.Dict(
        {
            "sign": ProbeEnv.observation_space,
            "pair": spaces.Tuple(
                (spaces.Discrete(2, start=3), spaces.Box(-1.0, 1.0, (2, 2), np.float32))
            ),
        }
    )

    def draw(self) -> None:
        """Draw the sign and the class."""
        super().draw()
        self.upper = bool(self.np_random.integers(2))

    def step(self, action: Any) -> Step:
        """End."""
        right = (action == 1) == (self.upper == (self.sign > 0))
        return self.observe(), float(right), True, False, {}

    def observe(self) -> dict[str, Any]:
        """Sign, class and noise."""
        noise = self.np_random.uniform(-1.0, 1.0, (2, 2)).astype(np.float32)
        return {"sign": super().observe(), "pair": (np.int64(3 + self.upper), noise)}
