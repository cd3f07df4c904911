"""`RolloutCollector`: the time loop, and what makes every row a real transition."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import Self

from ppo._checks import as_device, check_positive_integer
from ppo._modes import ordinary_mode
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.collector_state import CollectorState
from ppo.collector.columns import Restart
from ppo.collector.opening import check_options, open_backend, seed_sequence
from ppo.collector.policy_calls import PolicyCalls
from ppo.collector.processes import StartMethod
from ppo.collector.raw import RawRollout
from ppo.collector.replay import ActionLog, stream_at
from ppo.collector.streams import NOISE, POLICY, stream
from ppo.envs import EnvLike, resolve_env
from ppo.errors import ClosedError, EnvError, WorkerError
from ppo.policies.protocol import Policy, check_methods
from ppo.rollout import Rollout
from ppo.spaces import (
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    check_policy_spaces,
    make_action_adapter,
)
from ppo.trees import leaves, map_tree, rebuild

__all__ = ["RolloutCollector"]


class RolloutCollector:
    """Collects rollouts from parallel environments, in this process or in several.

    `num_workers` changes speed, never results: the same seed and `num_envs` give bitwise equal
    rollouts for 0, 1, 2, … workers. A vector environment, and an environment that cannot be
    rebuilt from its spec, are always stepped in this process.

    Any exception inside `collect` closes the collector: what the environments were doing is then
    unknown, and stale rows must never reach a user.

    Args:
        env: An environment id, a factory `() -> gymnasium.Env`, a list of factories, a
            `gymnasium.Env` or a `gymnasium.vector.VectorEnv`; also a parallel environment of
            several agents, or factories of such, where every agent is a column. The caller's own
            environments are never closed.
        num_envs: Number of environments `N`; a list or a vector environment brings its own, and
            for several agents `N` is that many times their number.
        num_workers: Number of worker processes; 0 steps in this process, and "auto" takes as many
            as there are processors and pairs of environments.
        seed: Seeds episodes and action noise; None draws a seed from the system.
        device: Device of the rollouts.
        env_kwargs: For an id, passed to `gymnasium.make`.
        autoreset_mode: For a vector environment whose metadata does not name its mode.
        start_method: `"fork"`, `"forkserver"` or `"spawn"`; None for `fork` on Linux and `spawn`
            elsewhere.
        step_timeout: Seconds a worker may go without finishing a step or a reset; None waits for
            ever. Starting it may take ten times as long, and a minute in any case.
        on_fault: `"raise"` closes the collector when an environment raises or a worker dies or
            hangs; `"restart"` replaces it, with a warning, and goes on.
        max_restarts: How many times, in the life of the collector.

    Attributes:
        restarts: How many times something was replaced.

    Raises:
        EnvCreationError: An environment cannot be made.
        EnvError: A factory raised.
        SpaceError: A space is not supported.
        TypeError: `env` is not an EnvLike.
        ValueError: `num_envs` or `num_workers` out of range.

    Example:
        >>> from ppo import RolloutCollector, make_policy
        >>> with RolloutCollector("CartPole-v1", num_envs=4, seed=0) as collector:
        ...     policy = make_policy(collector.observation_space, collector.action_space)
        ...     rollout = collector.collect(policy, num_steps=16)
        >>> rollout.obs.shape, rollout.num_transitions
        (torch.Size([16, 4, 4]), 64)
    """

    def __init__(
        self,
        env: EnvLike,
        *,
        num_envs: int = 8,
        num_workers: int | Literal["auto"] = 0,
        seed: int | np.random.SeedSequence | None = None,
        device: torch.device | str = "cpu",
        env_kwargs: Mapping[str, Any] | None = None,
        autoreset_mode: str | None = None,
        start_method: StartMethod | None = None,
        step_timeout: float | None = None,
        on_fault: Literal["raise", "restart"] = "raise",
        max_restarts: int = 10,
    ) -> None:
        self._closed_because: str | None = "it was never opened"
        check_options(num_workers, start_method, step_timeout, on_fault, max_restarts)
        self.restarts = 0
        self._max_restarts = max_restarts
        allowed = max_restarts if on_fault == "restart" else 0
        source = resolve_env(env, num_envs, env_kwargs=env_kwargs, autoreset_mode=autoreset_mode)
        root = seed_sequence(seed)
        self.device = as_device(device)
        self._backend = open_backend(source, root, num_workers, start_method, step_timeout, allowed)
        self._closed_because = None
        try:
            self.num_envs = self._backend.num_envs
            self.observation_space = self._backend.observation_space
            self.action_space = self._backend.action_space
            check_observation_space(self.observation_space)
            self._observations = ObservationLayout(self.observation_space)
            self._actions = make_action_adapter(self.action_space).leaves
            self._masks = ActionMasks(self.action_space)
        except BaseException:
            self.close()
            raise
        self._noise = [stream(root, NOISE, index) for index in range(self.num_envs)]
        policy_seed = int(stream(root, POLICY, 0).integers(2**63 - 1))
        self._generator = torch.Generator().manual_seed(policy_seed)
        self._calls: PolicyCalls | None = None
        self._buffers: Buffers | None = None
        self._last_row = 0  # of `obs`: what the next action is taken on
        self._masked = np.zeros(self.num_envs, np.bool_)  # environments that give masks
        # A vector environment cannot play an episode again.
        self._log = ActionLog(self.num_envs) if source.vector is None else None
        self._restored: CollectorState | None = None  # until the next `collect`
        self._playing = np.zeros(self.num_envs, np.bool_)  # columns that were put back

    def collect(self, policy: Policy, num_steps: int) -> Rollout:
        """Step every environment `num_steps` times; episodes go on across calls.

        Args:
            policy: Acts, and is asked once at the end for log-probabilities and values.
            num_steps: Steps per environment `T`, at least 1.

        Returns:
            A `Rollout` `[T, N]` of its own memory, without gradients.

        Raises:
            ClosedError: The collector was closed, by the user or by an earlier failure.
            EnvError: An environment raised; names it, its seed, step and action.
            NonFiniteError: An observation or reward is NaN or infinite; names env and step.
            SpaceError: The policy was built for other spaces.
            TypeError: It is no policy.
            ValueError: `num_steps` is below 1.
            WorkerError: A worker died or hung.

        With `on_fault="restart"` the last is true of what exceeds `max_restarts` only. Otherwise
        the row of the fault gets `valid=False`, and the row before it, if its episode was going
        on, becomes a truncation.
        """
        self._check_open()
        check_positive_integer("num_steps", num_steps)
        check_methods(policy, "act", "evaluate", "value")
        check_policy_spaces(policy, self.observation_space, self.action_space)
        gradients = torch.is_grad_enabled()
        try:
            with ordinary_mode(), torch.no_grad():
                return self._collect(self._calls_of(policy), num_steps)
        except BaseException as error:
            torch.set_grad_enabled(gradients)  # Ctrl-C may hit the end of no_grad itself
            self._close_because(error)
            raise

    def _collect(self, calls: PolicyCalls, num_steps: int) -> Rollout:
        buffers = self._prepare(calls, num_steps)
        raw = RawRollout(buffers, num_steps, calls.state.age.copy(), self._masked)
        try:
            self._run(calls, raw)
        except EnvError:
            # An environment that met NaN often raises a step later; name the cause.
            raw.check_finite()
            raise
        self._last_row = num_steps
        if self._log is not None:
            self._log.extend(buffers.actions, buffers.ended(slice(num_steps)))
        self._count(raw.harvest.restarts)
        raw.check_finite()
        return raw.evaluated(calls, self.device)

    def _count(self, restarts: Sequence[Restart]) -> None:
        for restart in restarts:
            self.restarts += 1
            if self.restarts > self._max_restarts:
                raise WorkerError(
                    f"max_restarts = {self._max_restarts} restarts are spent; the last fault: "
                    f"{restart.fault}"
                )
            text = f"restarted: {restart.fault}"  # shown and not kept: a registry would grow
            warnings.warn_explicit(text, RuntimeWarning, __file__, 1, __name__, registry={})

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._close_because(error)
            raise

    def _close_because(self, error: BaseException) -> None:
        self.close()
        text = str(error).partition("\n")[0]
        self._closed_because = f"{type(error).__name__} in collect: {text}"

    def _check_open(self) -> None:
        if self._closed_because is not None:
            raise ClosedError(f"this collector is closed: {self._closed_because}; make a new one")

    def state_dict(self) -> CollectorState | None:
        """All that the next rollout depends on besides the policy; None before the first one.

        Another collector of the same environments goes on from there with `load_state_dict`,
        whatever its `num_workers`.

        Raises:
            ClosedError: The collector was closed.
            WorkerError: A worker died or hung.
        """
        self._check_open()
        if self._restored is not None:
            return self._restored
        if self._buffers is None or self._calls is None:
            return None
        with self._closing_on_failure():
            marks = self._backend.bookmarks()
        logs = [None] * self.num_envs if self._log is None else self._log.of_all()
        layout = self._buffers.layout
        rows = slice(self._last_row, self._last_row + layout.history + 1)
        return CollectorState(
            bookmarks=tuple(marks),
            actions=tuple(
                None if mark.seed is None else log for mark, log in zip(marks, logs, strict=True)
            ),
            noise=tuple(rng.bit_generator.state for rng in self._noise),
            generator=self._generator.get_state().numpy(),
            squash=layout.squash,
            frames=map_tree(lambda array: array[rows].copy(), self._buffers.frames),
            masks=self._buffers.masks[self._last_row] | ~self._masked[:, None],
            policy=self._calls.state.copy(),
        )

    def fits(self, state: CollectorState) -> bool:
        """Whether a state is of as many environments of the same kinds and spaces.

        Raises:
            ClosedError: The collector was closed.
        """
        self._check_open()
        with self._closing_on_failure():
            kinds = [mark.kind for mark in self._backend.bookmarks()]
        return kinds == [mark.kind for mark in state.bookmarks] and state.has_leaves(
            self._observations.leaves, self._actions, self._masks.size
        )

    def load_state_dict(self, state: CollectorState) -> np.ndarray:
        """Go on where another collector was: the next rollout is the one it would have collected.

        Args:
            state: What `state_dict` returned, of a collector that this one fits; before the first
                `collect`.

        Returns:
            Columns `[N]` that are in the middle of their episodes again. The others begin new ones,
            which a warning says: those of a vector environment, and those of an environment that
            did something else when its episode was played again.

        Raises:
            ClosedError: The collector was closed.
            ValueError: The state does not fit, or this collector has collected already.
            WorkerError: A worker died or hung.
        """
        if self._buffers is not None or not self.fits(state):
            raise ValueError(
                "a state is for a new collector, with as many environments of the same kinds"
            )
        with self._closing_on_failure():
            there = self._backend.restore(state.places(), state.squash)
        self._playing = np.array(there)
        self._restored = state
        self._noise = [stream_at(noise) for noise in state.noise]
        self._generator.set_state(torch.from_numpy(state.generator))
        if self._log is not None:
            self._log.put(state.actions, self._playing)
        if not self._playing.all():
            warnings.warn(state.new_episodes(self._playing), stacklevel=2)
        return self._playing.copy()

    def _calls_of(self, policy: Policy) -> PolicyCalls:
        if self._calls is None or self._calls.policy is not policy:
            self._calls = PolicyCalls(
                policy, self.device, self._generator, self.num_envs, self._actions
            )
            if self._restored is not None:
                self._calls.state = self._restored.policy_state(self._playing, policy)
        return self._calls

    def _prepare(self, calls: PolicyCalls, num_steps: int) -> Buffers:
        """Make room, carry the current observations over, and draw the rollout's noise.

        One draw per environment for all steps: an action's noise is then a function of (seed,
        environment, step), whoever acts.
        """
        noise = None
        if calls.takes_noise:
            noise = [calls.policy.draw_noise(rng, num_steps) for rng in self._noise]
        layout = Layout(
            num_steps,
            self.num_envs,
            self._observations.leaves,
            self._actions,
            noise_size=0 if noise is None else noise[0].shape[1],
            mask_size=self._masks.size,
            squash=bool(getattr(calls.policy, "squashed", False)),
            history=calls.frame_stack - 1,
            state_size=calls.state.memory.shape[1],
        )
        old, row = self._buffers, self._last_row
        if old is None or old.layout.num_steps < num_steps or not layout.fits(old.layout):
            self._buffers = self._backend.attach(layout)
            if old is None:
                self._masked[:] = self._backend.reset()
                if self._masked.any():
                    calls.check_masks(self._masks.lie_in(self.observation_space))
        buffers = self._buffers
        assert buffers is not None
        buffers.begin()
        buffers.states[0] = calls.state.memory
        buffers.ages[:] = calls.state.age
        if self._masked.any():
            buffers.masks[:, ~self._masked] = True
        if old is not None:
            self._carry_over(old, row, buffers)
        elif self._restored is not None:
            self._restored.put(self._playing, buffers)
            self._restored = None
        if noise is not None:
            for index, values in enumerate(noise):
                buffers.noise[:num_steps, index] = values
        return buffers

    def _carry_over(self, old: Buffers, row: int, new: Buffers) -> None:
        """Copy what the next action is taken on, with as many frames before it as are there."""
        new.episode_seeds[:] = old.episode_seeds
        new.started[:] = old.started - row
        if self._masked.any():
            new.masks[0] = old.masks[row]
        kept = min(old.layout.history + row, new.layout.history) + 1
        last, first = old.layout.history + row + 1, new.layout.history + 1
        for source, target in zip(leaves(old.frames), leaves(new.frames), strict=True):
            target[first - kept : first] = source[last - kept : last].copy()

    def _run(self, calls: PolicyCalls, raw: RawRollout) -> None:
        """Fill the buffers: let the columns act by themselves, or act here for all of them."""
        buffers, num_steps = raw.buffers, raw.num_steps
        make_snapshot = getattr(calls.policy, "snapshot", None)
        masked = bool(self._masked.any())
        actor = None if make_snapshot is None or masked else make_snapshot()
        if actor is not None:
            raw.harvest = self._backend.run(actor, num_steps)
            calls.follow(buffers, num_steps)
            return
        calls.begin()
        self._backend.begin(num_steps)
        obs, actions = leaves(buffers.obs), leaves(buffers.actions)
        for t in range(num_steps):
            noise = buffers.noise[t] if calls.takes_noise else None
            mask = buffers.masks[t] if masked else None
            chosen = calls.act(rebuild(buffers.obs, [rows[t] for rows in obs]), noise, mask)
            for rows, action in zip(actions, leaves(chosen), strict=True):
                rows[t] = action
            if calls.remembers:
                buffers.states[t + 1] = calls.state.memory
            self._backend.step(t)
            if calls.remembers or calls.frame_stack > 1:
                calls.ended(buffers.ended(t))
        raw.harvest = self._backend.harvest()

    def close(self) -> None:
        """End workers and close the environments made here; a second call does nothing."""
        if self._closed_because is None:
            self._closed_because = "close() was called"
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
