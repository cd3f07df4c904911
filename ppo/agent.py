"""`PPOAgent`: a thin assembly of collector, returns, loss and gradient step."""

from __future__ import annotations

import contextlib
import functools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from ppo import assembly
from ppo._checks import as_device, check_callable, whole_number
from ppo._modes import ordinary_mode
from ppo.acting import act
from ppo.collector import CollectorState, RolloutCollector
from ppo.config import PPOConfig
from ppo.diagnostics import explained_variance
from ppo.envs import EnvLike
from ppo.errors import PPOError
from ppo.evaluation import EvaluationResult, evaluate
from ppo.export import export_policy
from ppo.frames import newest
from ppo.learner import Learner, LearnerSettings
from ppo.persistence import read_agent, write_agent
from ppo.policies.actor_critic import make_policy
from ppo.policies.protocol import frozen_parameters
from ppo.policies.state import PolicyState
from ppo.progress import progress_bar
from ppo.report import Callback, Report, asks_to_stop, episode_means
from ppo.revaluation import revalue
from ppo.rollout import Batch, Episode, Rollout
from ppo.spaces import Space, check_policy_spaces
from ppo.statistics import RewardScaler
from ppo.trees import map_tree

__all__ = ["PPOAgent"]


class PPOAgent:
    """Proximal Policy Optimization (Schulman et al. 2017, algorithm 1).

    Args:
        policy: Any module that meets the `Policy` protocol; None builds the default one from the
            environment's spaces at the first `learn`.
        config: Hyperparameters.
        seed: Seeds initial weights, environments, actions and minibatches. No global generator
            is read or written.
        device: Where policy and rollouts live.
        logger: Called with a `Report` after every update.

    Attributes:
        policy: The policy; None until it is built. Another one that is put there is trained with
            an optimizer of its own.
        config: The hyperparameters.
        steps: Transitions trained on so far.
        goal: Transitions at which the latest `learn` ends, or was to end.
        left_off: Where the episodes of an interrupted `learn` are; None after a finished one.
        updates: Updates so far.
        observation_space: Of one environment; None until known.
        action_space: Of one environment; None until known.

    Example:
        >>> from ppo import PPOAgent, PPOConfig
        >>> agent = PPOAgent(config=PPOConfig(num_envs=2, num_steps=32))
        >>> agent.learn("CartPole-v1", steps=128).steps
        128
        >>> int(agent.act(np.zeros(4, np.float32))) in (0, 1)
        True
    """

    def __init__(
        self,
        policy: nn.Module | None = None,
        *,
        config: PPOConfig = PPOConfig(),
        seed: int = 0,
        device: torch.device | str = "cpu",
        logger: Callable[[Report], object] | None = None,
    ) -> None:
        assembly.check_arguments(policy, config, seed, logger)
        self.config = config
        self.seed = int(seed)
        self.device = as_device(device)
        self.policy: Any = None
        self._trained: nn.Module | None = None
        self.steps = self.updates = self.goal = 0
        self.observation_space: Space | None = None
        self.action_space: Space | None = None
        self.left_off: CollectorState | None = None
        self._logger = logger
        self._learn_calls = 0
        self._generator = torch.Generator().manual_seed(self._child_seed(0))
        self._act_generator = torch.Generator().manual_seed(self._child_seed(1))
        self._reward_scaler: RewardScaler | None = None
        self._between_rollouts: RolloutCollector | None = None  # of the running `learn`
        self._recent: deque[Episode] = deque(maxlen=100)
        if policy is not None:
            self._adopt(policy)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a running `learn` as `save` has it, without its collector."""
        return vars(self) | {"left_off": self._episodes(), "_between_rollouts": None}

    def _child_seed(self, key: int) -> int:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(key,))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1

    def _adopt(self, policy: nn.Module) -> None:
        """Make it the policy that is trained, unless it is."""
        if policy is self._trained:
            return
        self._learner = Learner(policy.to(self.device), LearnerSettings.of(self.config))
        self.policy = self._trained = policy
        self.observation_space = getattr(policy, "observation_space", self.observation_space)
        self.action_space = getattr(policy, "action_space", self.action_space)
        self._frozen = frozen_parameters(policy)

    def _build(self, observation_space: Space, action_space: Space) -> None:
        """Make the policy for these spaces, or check that it is for them."""
        # The agent knows the spaces of its training also where the policy names none.
        check_policy_spaces(self, observation_space, action_space)
        policy, config, seed = self.policy, self.config.policy, self._child_seed(2)
        if policy is None:
            policy = make_policy(observation_space, action_space, config, seed=seed)
        self._adopt(policy)
        self.observation_space, self.action_space = observation_space, action_space

    def learn(
        self,
        env: EnvLike,
        steps: int,
        *,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Train for at least `steps` further transitions; calling it again continues.

        Schedules run over all transitions from the first to the end of this call. If the call
        before was interrupted, its episodes go on where they were; else new ones begin.

        Args:
            env: As for `RolloutCollector`; the id in the config brings the config's arguments
                and wrappers. With `num_workers="auto"` an environment given by its id is stepped in
                one process per processor, if the policy can act there or looks at images, and the
                critic may be trained in another; any other is stepped in this one.
            steps: Transitions over all environments, at least 1; rounded up to whole rollouts.
            callback: Called with a `Report` after each update; returning False stops.
            progress: Show a progress bar; None shows one on a terminal.

        Returns:
            The agent itself.

        Raises:
            NonFiniteError: NaN or infinity was met; the agent is as it was before the update.
            PPOError: As for `RolloutCollector`, and for an environment with other spaces.
            TypeError, ValueError: `callback` is no function; `steps` is below 1.
        """
        check_callable("callback", callback)
        goal = self.steps + whole_number("steps", steps)
        with (
            ordinary_mode(),
            assembly.configured_collector(
                env,
                self.config,
                self.policy,
                seed=np.random.SeedSequence(self.seed, spawn_key=(3, self._learn_calls)),
                device=self.device,
            ) as collector,
            progress_bar(self.steps, goal, progress) as bar,
            self._noting_episodes(),
        ):
            self._begin(collector, goal)
            with self._learner.helped(assembly.chooses_processes(env, self.config)):
                while self.steps < goal:
                    start = perf_counter()
                    self._between_rollouts = None
                    rollout = collector.collect(self.policy, self.config.num_steps)
                    metrics = self.update(rollout)
                    self._between_rollouts = collector
                    metrics["steps_per_second"] = rollout.num_transitions / (perf_counter() - start)
                    if self.config.on_fault == "restart":
                        metrics["restarts"] = collector.restarts
                    report = self._report(rollout, metrics)
                    bar(report)
                    if self._logger is not None:
                        self._logger(report)
                    if callback is not None and asks_to_stop(callback(report)):
                        break
        return self

    def _begin(self, collector: RolloutCollector, goal: int) -> None:
        """Begin a call of `learn`, or go on with one that was interrupted, where it was."""
        self._build(collector.observation_space, collector.action_space)
        self.goal = goal
        scaler = self._reward_scaler
        if self.left_off is not None and collector.fits(self.left_off):
            playing = collector.load_state_dict(self.left_off)
            if scaler is not None:
                scaler.forget(~torch.from_numpy(playing))
        else:
            self._learn_calls += 1
            if scaler is not None:
                scaler.reset(collector.num_envs)
        self.left_off = None

    @contextlib.contextmanager
    def _noting_episodes(self) -> Iterator[None]:
        """However `learn` ends, keep where its episodes are, if it is to be gone on with."""
        try:
            yield
        finally:
            with contextlib.suppress(PPOError):  # a worker is gone, and its episodes with it
                self.left_off = self._episodes()
            self._between_rollouts = None

    def _episodes(self) -> CollectorState | None:
        if self._between_rollouts is None:
            return self.left_off
        return self._between_rollouts.state_dict() if self.steps < self.goal else None

    def _report(self, rollout: Rollout, metrics: dict[str, float]) -> Report:
        self._recent.extend(rollout.episodes)
        where = {"steps": self.steps, "goal": self.goal, "updates": self.updates}
        known = metrics | episode_means(self._recent)
        return Report(**where, metrics=known, episodes=rollout.episodes)

    @ordinary_mode()
    def update(self, rollout: Rollout) -> dict[str, float]:
        """Improve the policy on one rollout: the whole of PPO.

        Args:
            rollout: Collected with `agent.policy` as it is now.

        Returns:
            `policy_loss, value_loss, entropy, approx_kl, clip_fraction, grad_norm` (means over
            all minibatches), `explained_variance` and `learning_rate`.

        Raises:
            NonFiniteError: A value, advantage, loss or gradient is not finite. Policy and
                optimizer are as they were before the call.
            PPOError: There is no policy yet.
        """
        if self.policy is None:
            raise PPOError("update needs a policy: pass one to PPOAgent, or call learn first")
        rollout.check_finite()
        config = self.config
        self._adopt(self.policy)  # the caller may have put another one there
        scaler, rewards = assembly.scaled_rewards(self._reward_scaler, rollout, config)
        batch, returns = assembly.batch_with_advantages(rollout, rewards, config)
        explained = explained_variance(rollout.values, returns, rollout.valid)

        def refreshed() -> Batch:
            return assembly.batch_with_advantages(revalue(self.policy, rollout), rewards, config)[0]

        progress = min(self.steps / self.goal, 1.0) if self.goal else 0.0
        self._frozen = frozen_parameters(self.policy)
        metrics = self._learner.improve(
            batch,
            self._generator,
            refreshed=refreshed if config.recompute_advantages else None,
            **config.at(progress),
        )
        if hasattr(self.policy, "update_normalizer"):
            self.policy.update_normalizer(map_tree(newest, batch.obs))
        self._reward_scaler = scaler
        self.steps += rollout.num_transitions
        self.updates += 1
        return metrics | {"explained_variance": float(explained)}

    def act(
        self,
        obs: Any,
        *,
        deterministic: bool = True,
        action_mask: Any = None,
        state: PolicyState | None = None,
    ) -> Any:
        """Choose actions an environment can take, for one observation or a batch.

        Args:
            obs: One observation, or a batch `[B, ...]` of them, as the environment gives them.
            deterministic: Take the most likely action instead of sampling.
            action_mask: Which actions are legal, as the environment says it; for a batch one for
                each row. A mask in the observation is found there.
            state: For a policy with memory (or stacked frames): what the call before returned;
                None at the beginning of an episode. `state.reset(ended)` forgets single rows.

        Returns:
            One action, or a batch `[B, ...]`, in the type the action space declares. For a policy
            with memory (or stacked frames): a pair of that and the new state.

        Raises:
            PPOError: There is no policy, or its spaces are not known yet.
            ValueError: `obs` has neither the shape of an observation nor of a batch, or a mask
                does not fit.
        """
        if self.policy is None or self.observation_space is None or self.action_space is None:
            raise PPOError("act needs a trained agent: call learn or load first")
        return act(
            self.policy,
            obs,
            self.observation_space,
            self.action_space,
            generator=self._act_generator,
            deterministic=deterministic,
            action_mask=action_mask,
            state=state,
        )

    def evaluate(
        self, env: EnvLike, episodes: int = 100, *, deterministic: bool = True, seed: int = 0
    ) -> EvaluationResult:
        """Play whole episodes with the policy as it is; nothing of the training moves.

        Args:
            env: As for `learn`.
            episodes: Number of episodes.
            deterministic: Take the most likely actions instead of sampling.
            seed: Seeds the episodes, independently of the training's.

        Returns:
            Return and length of every episode.
        """
        if self.policy is None:
            raise PPOError("evaluate needs a policy: call learn or load first")
        source = assembly.configured_env(env, self.config)
        root = np.random.SeedSequence(self.seed, spawn_key=(4, seed))
        return evaluate(self.policy, source, episodes, deterministic=deterministic, seed=root)

    def export(self, path: str | Path, *, masked: bool = False) -> list[Path]:
        """Write the deterministic policy to files that run without this library.

        Normalisation and the bounds of the actions are inside: the program takes batches of what
        the environment gives, and returns what it takes, as `act` does.

        Args:
            path: Ends in `.onnx` (ONNX), in `.pt2` (`torch.export`), or has no ending, for both.
            masked: Give the program an input for the legal actions, bool `[B, M]`. A mask in the
                observation is found there.

        Returns:
            The files.

        Raises:
            MissingExtraError: ONNX is asked for, and the extra `export` is not installed.
            PPOError: There is no policy, its operations cannot be followed, or the disk refuses.
            ValueError: Another ending, or `masked` where there is nothing to mask.
        """
        if self.policy is None or self.observation_space is None or self.action_space is None:
            raise PPOError("there is nothing to export yet: call learn first")
        spaces = self.observation_space, self.action_space
        return export_policy(self.policy, *spaces, path, masked=masked)

    def save(self, path: str | Path) -> None:
        """Write all that a later `learn` depends on to one file, atomically; also from a callback.

        Raises:
            CheckpointError: The file cannot be written, or a parameter is not finite.
            PPOError: There is no policy yet.
        """
        if self.policy is None or self.observation_space is None or self.action_space is None:
            raise PPOError("there is nothing to save yet: call learn first")
        self._adopt(self.policy)
        write_agent(path, self, self._episodes())

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        policy: nn.Module | None = None,
        device: torch.device | str = "cpu",
        logger: Callable[[Report], object] | None = None,
    ) -> PPOAgent:
        """Read an agent back; no code in the file is run.

        Args:
            path: A file written by `save`.
            policy: For an agent with a policy of your own: such a policy, whose parameters are
                overwritten; if loading fails, they are as they were.
            device: Where policy and rollouts live.
            logger: As for `PPOAgent`.

        Raises:
            CheckpointError: The file is missing, damaged, of another version, or does not fit.

        Warns:
            UserWarning: It was written with other versions, threads or another processor.
        """
        make = functools.partial(cls, device=device, logger=logger)
        with ordinary_mode():
            agent: PPOAgent = read_agent(path, policy, make)
        return agent
