"""Atari games that get a seed for every episode, and are loaded once."""

from __future__ import annotations

from typing import Any

import gymnasium
from gymnasium.utils import seeding

__all__ = ["AtariSeeding"]


class AtariSeeding(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Seeds a game of `ale-py` without loading it anew, which takes as long as 200 steps.

    A seed means the state of the emulator as it was just loaded, and a generator. Sticky actions
    (Machado et al. 2018, section 5) are drawn from that generator, by the emulator's own rule: in
    each frame the action that was carried out last is kept with the game's probability.

    Args:
        env: A game that `fits`.
    """

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        self._ale = env.unwrapped.ale
        self._stickiness = self._ale.getFloat("repeat_action_probability")
        self._ale.setFloat("repeat_action_probability", 0.0)  # from when it is loaded next
        self._loaded: Any = None  # state of the emulator
        self._last = 0

    @staticmethod
    def fits(env: Any) -> bool:
        """Whether this is a game whose frames and actions are counted one by one."""
        options = env.spec.kwargs if env.spec else {}
        single = options.get("frameskip") == 1 and not options.get("continuous")
        return single and hasattr(env.unwrapped, "ale")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode that is a function of `seed`; without one, the generator goes on."""
        first = self._loaded is None
        if first:
            self.env.reset(seed=0)
            self._loaded = self._ale.cloneSystemState()
        if first or seed is not None:
            self._ale.restoreSystemState(self._loaded)
            self.unwrapped.np_random, _ = seeding.np_random(seed)
        self._last = 0
        return self.env.reset(options=options)

    def step(self, action: Any) -> Any:
        """Take this action, or the last one again."""
        if self.np_random.random() >= self._stickiness:
            self._last = action
        return self.env.step(self._last)
