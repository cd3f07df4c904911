"""`RolloutCollector`: the time loop, and what makes every row a real transition."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from ppo._checks import check_positive_integer
from ppo.collector.backends import Backend, InProcess
from ppo.collector.buffers import Buffers, Layout
from ppo.collector.columns import Columns, EnvColumns, Final, Harvest
from ppo.collector.policy_calls import PolicyCalls
from ppo.collector.pool import StartMethod, WorkerPool, fitting_number_of_workers
from ppo.collector.streams import EPISODES, NOISE, POLICY, stream
from ppo.collector.vector_columns import VectorColumns
from ppo.envs import EnvLike, EnvSource, resolve_env
from ppo.errors import ClosedError, EnvError, NonFiniteError
from ppo.policies.protocol import Policy
from ppo.rollout import Rollout
from ppo.spaces import (
    check_observation_space,
    check_policy_spaces,
    make_action_adapter,
    observation_dtype,
)

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
            box = check_observation_space(self.observation_space)
            adapter = make_action_adapter(self.action_space)
        except BaseException:
            self.close()
            raise
        self._obs_shape, self._obs_dtype = box.shape, observation_dtype(box)
        self._action_shape, self._action_dtype = adapter.shape, adapter.dtype
        self._noise = [stream(root, NOISE, index) for index in range(self.num_envs)]
        policy_seed = int(stream(root, POLICY, 0).integers(2**63 - 1))
        self._generator = torch.Generator().manual_seed(policy_seed)
        self._calls: PolicyCalls | None = None
        self._buffers: Buffers | None = None
        self._last_row = 0  # of `obs`: what the next action is taken on

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
            buffers = self._prepare(policy, num_steps)
            try:
                harvest = self._run(calls, buffers, num_steps)
            except EnvError:
                # An environment that met NaN often raises a step later; name the cause.
                self._check_finite(buffers, num_steps, [])
                raise
            self._last_row = num_steps
            self._check_finite(buffers, num_steps, harvest.finals)
            return self._finish(calls, buffers, harvest, num_steps)

    def _calls_of(self, policy: Policy) -> PolicyCalls:
        if self._calls is None or self._calls.policy is not policy:
            self._calls = PolicyCalls(policy, self.device, self._generator)
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

    def _prepare(self, policy: Policy, num_steps: int) -> Buffers:
        """Make room, carry the current observations over, and draw the rollout's noise.

        One draw per environment for all steps: an action's noise is then a function of (seed,
        environment, step), whoever acts.
        """
        draw = getattr(policy, "draw_noise", None)
        noise = None if draw is None else [draw(rng, num_steps) for rng in self._noise]
        noise_size = 0 if noise is None else noise[0].shape[1]
        old = self._buffers
        if old is None or old.layout.num_steps < num_steps or old.layout.noise_size != noise_size:
            layout = Layout(
                num_steps,
                self.num_envs,
                self._obs_shape,
                self._obs_dtype,
                self._action_shape,
                self._action_dtype,
                noise_size,
            )
            self._buffers = self._backend.attach(layout)
            if old is None:
                self._backend.reset()
        buffers = self._buffers
        assert buffers is not None
        buffers.progress[:] = 0
        if old is not None:
            buffers.obs[0] = old.obs[self._last_row]
        if noise is not None:
            for index, values in enumerate(noise):
                buffers.noise[:num_steps, index] = values
        return buffers

    def _run(self, calls: PolicyCalls, buffers: Buffers, num_steps: int) -> Harvest:
        """Fill the buffers: let the columns act by themselves, or act here for all of them."""
        make_snapshot = getattr(calls.policy, "snapshot", None)
        actor = None if make_snapshot is None else make_snapshot()
        if actor is not None:
            return self._backend.run(actor, num_steps)
        calls.begin()
        self._backend.begin(num_steps)
        for t in range(num_steps):
            noise = buffers.noise[t] if calls.takes_noise else None
            buffers.actions[t] = calls.act(buffers.obs[t], noise)
            self._backend.step(t)
        return self._backend.harvest()

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A tensor of its own memory on the collector's device."""
        return torch.from_numpy(array.copy()).to(self.device)

    def _check_finite(self, buffers: Buffers, num_steps: int, finals: Sequence[Final]) -> None:
        """Raise `NonFiniteError` for the first NaN or infinity among observations and rewards."""
        rewards = np.isfinite(buffers.rewards[:num_steps])
        obs = buffers.obs[: num_steps + 1]
        if obs.dtype == np.uint8:
            successors = np.ones_like(rewards)
        else:
            finite = np.isfinite(obs).reshape(num_steps + 1, self.num_envs, -1).all(-1)
            successors = finite[1:]
            successors[0] &= finite[0]
            for final in finals:
                successors[final.step, final.env_index] &= np.isfinite(final.obs).all()
        if rewards.all() and successors.all():
            return
        done = np.arange(num_steps)[:, None] < buffers.progress  # later rows are old
        bad = np.argwhere(~(rewards & successors) & done)
        if len(bad) == 0:
            return
        t, index = bad[0]
        if not np.isfinite(buffers.actions[t, index]).all():
            raise NonFiniteError(
                f"the policy chose a non-finite action for environment {index} at rollout step "
                f"{t}; nothing was learned from this rollout. Its parameters or its normaliser "
                "hold NaN or infinity."
            )
        field = "reward" if successors[t, index] else "observation"
        raise NonFiniteError(
            f"environment {index} returned a non-finite {field} at rollout step {t}; nothing was "
            "learned from this rollout. Check the environment, or clip its actions."
        )

    def _finish(
        self, calls: PolicyCalls, buffers: Buffers, harvest: Harvest, num_steps: int
    ) -> Rollout:
        """Copy the rows out and ask the policy, in two batched calls, what it thinks of them."""
        rows = {
            name: self._tensor(getattr(buffers, name)[:num_steps])
            for name in ("obs", "actions", "rewards", "terminated", "truncated", "valid")
        }
        valid = rows["valid"]
        everything = bool(valid.all())

        def select(tensor: Tensor) -> Tensor:
            return tensor.flatten(0, 1) if everything else tensor[valid]

        log_probs, values = torch.zeros_like(rows["rewards"]), torch.zeros_like(rows["rewards"])
        evaluation = calls.evaluate(select(rows["obs"]), select(rows["actions"]))
        log_probs[valid], values[valid] = evaluation

        successors = [*(final.obs for final in harvest.finals), *buffers.obs[num_steps]]
        successor_values = calls.value(self._tensor(np.stack(successors)))
        count = len(harvest.finals)
        final_values, last_values = successor_values[:count], successor_values[count:]
        next_values = torch.cat([values[1:], last_values.unsqueeze(0)])
        next_values[rows["terminated"]] = 0.0
        if harvest.finals:
            steps = torch.tensor([final.step for final in harvest.finals], device=self.device)
            envs = torch.tensor([final.env_index for final in harvest.finals], device=self.device)
            next_values[steps, envs] = final_values
        return Rollout(
            **rows,
            log_probs=log_probs,
            values=values,
            next_values=next_values,
            episodes=tuple(episode for _, episode in harvest.episodes),
        )

    def close(self) -> None:
        """End workers and close the environments made here; a second call does nothing."""
        if self._closed_because is None:
            self._closed_because = "close() was called"
            self._backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
