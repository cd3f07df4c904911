"""`PPOAgent`: a thin assembly of collector, returns, loss and gradient step."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.acting import act
from ppo.advantages import gae, normalize
from ppo.checkpoint import read_checkpoint, read_counts, versions, write_checkpoint
from ppo.collector import RolloutCollector
from ppo.config import PPOConfig
from ppo.diagnostics import explained_variance
from ppo.envs import EnvLike
from ppo.errors import CheckpointError, PPOError
from ppo.evaluation import EvaluationResult, evaluate
from ppo.frames import newest
from ppo.learner import Learner, LearnerSettings
from ppo.policies.actor_critic import blank_policy, make_policy
from ppo.policies.protocol import freeze_exactly, frozen_parameters
from ppo.policies.snapshot import acts_in_workers
from ppo.policies.state import PolicyState
from ppo.progress import progress_bar
from ppo.report import Callback, Report, asks_to_stop, episode_means
from ppo.revaluation import revalue
from ppo.rollout import Batch, Episode, Rollout
from ppo.spaces import Space, check_policy_spaces, space_from_dict, space_to_dict
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
        policy: The policy; None until it is built.
        config: The hyperparameters.
        steps: Transitions trained on so far.
        goal: Transitions at which the latest `learn` ends, or was to end.
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
        self.config = config
        self.seed = seed
        self.device = torch.device(device)
        self.policy: Any = None
        self.steps = 0
        self.updates = 0
        self.observation_space: Space | None = None
        self.action_space: Space | None = None
        self._logger = logger
        self.goal = 0
        self._learn_calls = 0
        self._generator = torch.Generator().manual_seed(self._child_seed(0))
        self._act_generator = torch.Generator().manual_seed(self._child_seed(1))
        self._reward_scaler: RewardScaler | None = None
        self._recent: deque[Episode] = deque(maxlen=100)
        if policy is not None:
            self._adopt(policy)

    def _child_seed(self, key: int) -> int:
        sequence = np.random.SeedSequence(self.seed, spawn_key=(key,))
        return int(sequence.generate_state(1, np.uint64)[0]) >> 1

    def _adopt(self, policy: nn.Module) -> None:
        self._learner = Learner(policy.to(self.device), LearnerSettings.of(self.config))
        self.policy = policy
        self.observation_space = getattr(policy, "observation_space", None)
        self.action_space = getattr(policy, "action_space", None)
        self._frozen = frozen_parameters(policy)

    def _build(self, observation_space: Space, action_space: Space) -> None:
        """Make the policy for these spaces, or check that it is for them."""
        # The agent knows the spaces of its training also where the policy names none.
        check_policy_spaces(self, observation_space, action_space)
        if self.policy is None:
            seed = self._child_seed(2)
            self._adopt(make_policy(observation_space, action_space, self.config.policy, seed=seed))
        self.observation_space, self.action_space = observation_space, action_space

    def _env(self, env: EnvLike) -> EnvLike:
        """The configured environment where its id is given, with its arguments and wrappers."""
        return self.config.env_factory() if isinstance(env, str) and env == self.config.env else env

    def learn(
        self,
        env: EnvLike,
        steps: int,
        *,
        callback: Callback | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Train for at least `steps` further transitions; calling it again continues.

        Schedules run over all transitions from the first to the end of this call.

        Args:
            env: As for `RolloutCollector`; the id in the config brings the config's arguments
                and wrappers. With `num_workers="auto"` an environment given by its id is stepped
                in one process per processor, if the policy can act there, and the critic may be
                trained in another; any other is stepped in this one.
            steps: Transitions over all environments, at least 1; rounded up to whole rollouts.
            callback: Called with a `Report` after each update; returning False stops.
            progress: Show a progress bar; None shows one on a terminal.

        Returns:
            The agent itself.

        Raises:
            NonFiniteError: NaN or infinity was met; the agent is as it was before the update.
            PPOError: As for `RolloutCollector`, and for an environment with other spaces.
            ValueError: `steps` is below 1.
        """
        if not steps >= 1:  # NaN too
            raise ValueError(f"steps must be at least 1, got {steps}")
        goal = self.steps + steps
        with self._collector(env) as collector, progress_bar(self.steps, goal, progress) as bar:
            self._build(collector.observation_space, collector.action_space)
            self.goal = goal
            self._learn_calls += 1
            if self._reward_scaler is not None:
                self._reward_scaler.reset(collector.num_envs)
            with self._learner.helped(self._num_workers(env) == "auto"):
                while self.steps < goal:
                    start = time.perf_counter()
                    rollout = collector.collect(self.policy, self.config.num_steps)
                    metrics = self.update(rollout)
                    seconds = time.perf_counter() - start
                    metrics["steps_per_second"] = rollout.num_transitions / seconds
                    report = self._report(rollout, metrics)
                    bar(report)
                    if self._logger is not None:
                        self._logger(report)
                    if callback is not None and asks_to_stop(callback(report)):
                        break
        return self

    def _num_workers(self, env: EnvLike) -> int | Literal["auto"]:
        chosen = self.config.num_workers
        # Nobody misses an environment made from its id in this process; see docs/guide/workers.
        shared = isinstance(env, str) and acts_in_workers(self.policy, self.config.policy)
        return 0 if chosen == "auto" and not shared else chosen

    def _collector(self, env: EnvLike) -> RolloutCollector:
        return RolloutCollector(
            self._env(env),
            num_envs=self.config.num_envs,
            num_workers=self._num_workers(env),
            seed=np.random.SeedSequence(self.seed, spawn_key=(3, self._learn_calls)),
            device=self.device,
        )

    def _report(self, rollout: Rollout, metrics: dict[str, float]) -> Report:
        self._recent.extend(rollout.episodes)
        metrics |= episode_means(self._recent)
        return Report(
            steps=self.steps,
            goal=self.goal,
            updates=self.updates,
            metrics=metrics,
            episodes=rollout.episodes,
        )

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
        scaler = copy.deepcopy(self._reward_scaler)  # kept only if the update succeeds
        rewards = rollout.rewards
        if config.normalize_rewards:
            scaler = scaler or RewardScaler(config.gamma, rewards.shape[1])
            if scaler.num_envs != rewards.shape[1]:  # other environments: their returns start anew
                scaler.reset(rewards.shape[1])
            rewards = scaler(rewards, rollout.terminated, rollout.truncated, rollout.valid)
        batch, returns = self._with_advantages(rollout, rewards)
        explained = explained_variance(rollout.values, returns, rollout.valid)

        def refreshed() -> Batch:
            return self._with_advantages(revalue(self.policy, rollout), rewards)[0]

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
        metrics["explained_variance"] = float(explained)
        return metrics

    def _with_advantages(self, rollout: Rollout, rewards: Tensor) -> tuple[Batch, Tensor]:
        """The rows of a rollout with advantages and returns, `[T, N]` -> `[B]`; and the returns."""
        config = self.config
        advantages, returns = gae(
            rewards,
            rollout.values,
            rollout.next_values,
            rollout.terminated,
            rollout.truncated,
            gamma=config.gamma,
            gae_lambda=config.gae_lambda,
        )
        if config.normalize_advantages == "rollout":
            advantages = normalize(advantages, rollout.valid)
        return rollout.flatten(advantages=advantages, returns=returns), returns

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
        """
        if self.policy is None:
            raise PPOError("evaluate needs a policy: call learn or load first")
        source, root = self._env(env), np.random.SeedSequence(self.seed, spawn_key=(4, seed))
        return evaluate(self.policy, source, episodes, deterministic=deterministic, seed=root)

    def save(self, path: str | Path) -> None:
        """Write policy, optimizer, normalisers, generators and counters to one file, atomically.

        Raises:
            CheckpointError: The file cannot be written, or a parameter is not finite.
            PPOError: There is no policy yet.
        """
        if self.policy is None or self.observation_space is None or self.action_space is None:
            raise PPOError("there is nothing to save yet: call learn first")
        groups = {
            "policy": self.policy.state_dict(),
            "optimizer": self._learner.state_dict(),
            "reward_scaler": self._reward_scaler.state_dict() if self._reward_scaler else {},
            "generators": {
                "minibatches": self._generator.get_state(),
                "acting": self._act_generator.get_state(),
            },
        }
        document = {
            "config": self.config.to_dict(),
            "observation_space": space_to_dict(self.observation_space),
            "action_space": space_to_dict(self.action_space),
            "seed": self.seed,
            "steps": self.steps,
            "updates": self.updates,
            "goal": self.goal,
            "learn_calls": self._learn_calls,
            "recent_episodes": [list(episode) for episode in self._recent],
            "frozen": frozen_parameters(self.policy),
            # Since the latest update others may have been frozen, of which it has no notion yet.
            "frozen_in_optimizer": self._frozen,
            "versions": versions(),
        }
        write_checkpoint(path, groups, document)

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
                overwritten.
            device: Where policy and rollouts live.
            logger: As for `PPOAgent`.

        Raises:
            CheckpointError: The file is missing, damaged, of another version, or does not fit.
        """
        groups, document = read_checkpoint(path)
        try:
            config = PPOConfig.from_dict(document["config"])
            spaces = (
                space_from_dict(document["observation_space"]),
                space_from_dict(document["action_space"]),
            )
            if policy is None:
                policy = blank_policy(*spaces, config.policy, groups["policy"])
            frozen = document.get("frozen", frozen_parameters(policy))
            freeze_exactly(policy, document.get("frozen_in_optimizer", frozen))
            agent = cls(policy, config=config, seed=document["seed"], device=device, logger=logger)
            agent._build(*spaces)
            agent.policy.load_state_dict(groups["policy"])
            agent._learner.load_state_dict(groups.get("optimizer", {}))
            freeze_exactly(policy, frozen)
            if "reward_scaler" in groups:
                state = groups["reward_scaler"]
                agent._reward_scaler = RewardScaler(config.gamma, len(state["returns"]))
                agent._reward_scaler.load_state_dict(state)
            agent._generator.set_state(groups["generators"]["minibatches"])
            agent._act_generator.set_state(groups["generators"]["acting"])
            agent.steps, agent.updates = read_counts(document, "steps", "updates")
            agent.goal, agent._learn_calls = read_counts(document, "goal", "learn_calls")
            agent._recent.extend(Episode(*episode) for episode in document["recent_episodes"])
        except Exception as error:  # whatever a document that makes no sense leads to
            raise CheckpointError(
                f"{path} does not fit this agent: {error}. For a policy of your own pass "
                "policy=..., built for the same spaces."
            ) from error
        return agent
