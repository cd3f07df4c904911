"""`RolloutCollector`: the time loop, and what makes every row a real transition."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from typing_extensions import Self

from ppo._checks import check_positive_integer
from ppo.collector.backends import Backend, InProcess
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.columns import Columns, EnvColumns
from ppo.collector.policy_calls import PolicyCalls
from ppo.collector.pool import StartMethod, WorkerPool, fitting_number_of_workers
from ppo.collector.raw import RawRollout
from ppo.collector.streams import EPISODES, NOISE, POLICY, stream
from ppo.collector.vector_columns import VectorColumns
from ppo.envs import EnvLike, EnvSource, resolve_env
from ppo.errors import ClosedError, EnvError
from ppo.policies.protocol import Policy
from ppo.rollout import Rollout
from ppo.spaces import (
    ActionMasks,
    ObservationLayout,
    check_observation_space,
    check_policy_spaces,
    make_action_adapter,
)
from ppo.trees import leaves, rebuild

__all__ = ["RolloutCollector", "open_columns"]


def open_columns(source: EnvSource, root: np.random.SeedSequence) -> Columns:
    """Make the environments of a source in this process, seeded from `root`."""
    if source.vector is not None:
        assert source.autoreset_mode is not None
        return VectorColumns(source.vector, source.autoreset_mode, stream(root, EPISODES, 0))
    seeds = [stream(root, EPISODES, index) for index in range(len(source.factories))]
    return EnvColumns(source.factories, seeds, borrowed=source.instance)


def _seed_sequence(seed: int | np.random.SeedSequence | None) -> np.random.SeedSequence:
    if isinstance(seed, np.random.SeedSequence):
        return seed
    if seed is not None and (not isinstance(seed, int | np.integer) or seed < 0):
        raise ValueError(
            f"seed must be an integer of at least 0, a SeedSequence or None, got {seed!r}"
        )
    return np.random.SeedSequence(seed)


class RolloutCollector:
    """Collects rollouts from parallel environments, in this process or in several.

    `num_workers` changes speed, never results: the same seed and `num_envs` give bitwise equal
    rollouts for 0, 1, 2, … workers. A vector environment, and an environment that cannot be
    rebuilt from its spec, are always stepped in this process.

    Any exception inside `collect` closes the collector: what the environments were doing is then
    unknown, and stale rows must never reach a user.

    Args:
        env: An environment id, a factory `() -> gymnasium.Env`, a list of factories, a
            `gymnasium.Env` or a `gymnasium.vector.VectorEnv`. The caller's own environments are
            never closed.
        num_envs: Number of environments `N`; a list or a vector environment brings its own.
        num_workers: Number of worker processes; 0 steps in this process, and "auto" takes as many
            as there are processors and pairs of environments.
        seed: Seeds episodes and action noise; None draws a seed from the system.
        device: Device of the rollouts.
        env_kwargs: For an id, passed to `gymnasium.make`.
        autoreset_mode: For a vector environment whose metadata does not name its mode.
        start_method: `"fork"`, `"forkserver"` or `"spawn"`; None for `fork` on Linux and `spawn`
            elsewhere.
        step_timeout: Seconds a worker may go without finishing a step; None waits for ever.

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
    ) -> None:
        self._closed_because: str | None = "it was never opened"
        if num_workers != "auto" and not (
            isinstance(num_workers, int | np.integer) and num_workers >= 0
        ):
            raise ValueError(
                'num_workers must be an integer, 0 (this process) or more, or "auto", '
                f"got {num_workers!r}"
            )
        methods = multiprocessing.get_all_start_methods()
        if start_method is not None and start_method not in methods:
            raise ValueError(f"start_method must be one of {methods} here, got {start_method!r}")
        if step_timeout is not None and not step_timeout > 0.0:
            raise ValueError(f"step_timeout must be positive seconds or None, got {step_timeout}")
        source = resolve_env(env, num_envs, env_kwargs=env_kwargs, autoreset_mode=autoreset_mode)
        root = _seed_sequence(seed)
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device {device!r} is unknown: {error}") from error
        if num_workers == "auto":
            num_workers = fitting_number_of_workers(len(source.factories), start_method)
        if num_workers == 0 or source.vector is not None or not source.copyable:
            self._backend: Backend = InProcess(open_columns(source, root))
        else:
            seeds = [stream(root, EPISODES, index) for index in range(len(source.factories))]
            self._backend = WorkerPool(
                source.factories, seeds, num_workers, start_method, step_timeout
            )
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
            ValueError: `num_steps` is below 1.
            WorkerError: A worker died or hung.
        """
        if self._closed_because is not None:
            raise ClosedError(f"this collector is closed: {self._closed_because}; make a new one")
        check_positive_integer("num_steps", num_steps)
        check_policy_spaces(policy, self.observation_space, self.action_space)
        with self._closing_on_failure(), torch.no_grad():
            calls = self._calls_of(policy)
            buffers = self._prepare(calls, num_steps)
            raw = RawRollout(buffers, num_steps, calls.state.age.copy(), self._masked)
            try:
                self._run(calls, raw)
            except EnvError:
                # An environment that met NaN often raises a step later; name the cause.
                raw.check_finite()
                raise
            self._last_row = num_steps
            raw.check_finite()
            return raw.evaluated(calls, self.device)

    def _calls_of(self, policy: Policy) -> PolicyCalls:
        if self._calls is None or self._calls.policy is not policy:
            self._calls = PolicyCalls(
                policy, self.device, self._generator, self.num_envs, self._actions
            )
        return self._calls

    @contextmanager
    def _closing_on_failure(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self.close()
            text = str(error).partition("\n")[0]
            self._closed_because = f"{type(error).__name__} in collect: {text}"
            raise

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
        buffers.progress[:] = 0
        if self._masked.any():
            buffers.masks[:, ~self._masked] = True
        if old is not None:
            self._carry_over(old, row, buffers)
        if noise is not None:
            for index, values in enumerate(noise):
                buffers.noise[:num_steps, index] = values
        return buffers

    def _carry_over(self, old: Buffers, row: int, new: Buffers) -> None:
        """Copy what the next action is taken on, with as many frames before it as are there."""
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
            return
        calls.begin()
        self._backend.begin(num_steps)
        obs, actions = leaves(buffers.obs), leaves(buffers.actions)
        for t in range(num_steps):
            if calls.remembers:
                raw.memories.append(calls.state.memory.copy())
            noise = buffers.noise[t] if calls.takes_noise else None
            mask = buffers.masks[t] if masked else None
            chosen = calls.act(rebuild(buffers.obs, [rows[t] for rows in obs]), noise, mask)
            for rows, action in zip(actions, leaves(chosen), strict=True):
                rows[t] = action
            self._backend.step(t)
            if calls.remembers:
                raw.memories_after.append(calls.state.memory.copy())
            if calls.remembers or calls.frame_stack > 1:
                calls.ended(buffers.ended(t))
        raw.memories.append(calls.state.memory.copy())
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
