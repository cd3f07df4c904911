"""Does it learn? Environments so small that every value is known, solved in seconds.

The first five are Andy Jones' ("Debugging RL, Without the Agonizing Pain", 2021): each adds one
thing that can be wrong. Below them, what else goes wrong in silence.
"""

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from ppo import (
    Evaluation,
    Linear,
    PolicyConfig,
    PPOAgent,
    PPOConfig,
    RolloutCollector,
    evaluate,
    gae,
    make_policy,
    normalize,
    ppo_loss,
)
from ppo.probes.environments import (
    ConstantReward,
    DelayedReward,
    Endless,
    MatchingAction,
    PayingAction,
    SeenReward,
    Target,
)

# Rewards as they are, so that values can be compared; else the defaults but for size and speed.
CONFIG = PPOConfig(
    num_envs=4,
    num_steps=32,
    num_epochs=5,
    minibatch_size=32,
    learning_rate=1e-2,
    normalize_rewards=False,
    policy=PolicyConfig(hidden_sizes=(16,)),
)


def values(agent, *observations):
    obs = torch.tensor(observations, dtype=torch.float32).unsqueeze(-1)
    return agent.policy.value(obs).tolist()


def learn(env, steps, seed=0, **changes):
    return PPOAgent(config=CONFIG.replace(**changes), seed=seed).learn(env, steps)


def test_a_constant_reward_is_its_value():
    agent = learn(ConstantReward, 2_000)
    assert values(agent, -1.0, 1.0) == pytest.approx([1.0, 1.0], abs=0.05)


def test_a_reward_that_is_seen_is_its_value():
    agent = learn(SeenReward, 2_000)
    assert values(agent, -1.0, 1.0) == pytest.approx([-1.0, 1.0], abs=0.05)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
def test_a_delayed_reward_is_discounted(gamma):
    agent = learn(DelayedReward, 2_000, gamma=gamma)
    assert values(agent, 0.0, 1.0) == pytest.approx([gamma, 1.0], abs=0.05)


def test_an_action_that_pays_is_taken():
    agent = learn(PayingAction, 3_000)
    assert agent.evaluate(PayingAction, 20).mean_return == 1.0
    assert agent.evaluate(PayingAction, 100, deterministic=False).mean_return > 0.95
    assert values(agent, 1.0) == pytest.approx([1.0], abs=0.1)


def test_an_action_that_depends_on_the_observation_is_taken():
    agent = learn(MatchingAction, 3_000)
    assert agent.evaluate(MatchingAction, 20).mean_return == 1.0
    assert agent.evaluate(MatchingAction, 100, deterministic=False).mean_return > 0.95


# Truncation


@pytest.mark.parametrize("length", [1, 7])
def test_a_time_limit_does_not_change_the_value_of_an_endless_task(length):
    agent = learn(lambda: Endless(length), 4_000, gamma=0.9)
    assert values(agent, 0.0) == pytest.approx([10.0], rel=0.05)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_nor_does_it_in_a_vector_environment(mode):
    env = SyncVectorEnv([lambda: Endless(3)] * 4, autoreset_mode=mode)
    agent = learn(env, 4_000, gamma=0.9)
    assert values(agent, 0.0) == pytest.approx([10.0], rel=0.05)


class FiniteProbe(Endless):
    """The same task, but its end is the end."""

    def step(self, action):
        obs, reward, _, ended, info = super().step(action)
        return obs, reward, ended, False, info


def test_a_real_end_does_change_it():
    agent = learn(lambda: FiniteProbe(1), 2_000, gamma=0.9)
    assert values(agent, 0.0) == pytest.approx([1.0], abs=0.05)


def test_scaled_rewards_are_values_in_other_units():
    agent = learn(lambda: Endless(3), 4_000, gamma=0.9, normalize_rewards=True)
    unit = float(agent._reward_scaler.moments.std)
    assert values(agent, 0.0)[0] * unit == pytest.approx(10.0, rel=0.1)


# Continuous actions


def actions(agent):
    return agent.act(np.array([[-1.0], [1.0]], np.float32))[:, 0].tolist()


def learn_target(targets, **bounds):
    return learn(lambda: Target(targets, **bounds), 4_000, learning_rate=Linear(1e-2, 0.0))


def test_a_continuous_action_finds_its_place_and_stops_exploring():
    agent = learn_target((-0.3, 0.5))
    assert actions(agent) == pytest.approx([-0.3, 0.5], abs=0.05)
    assert agent.policy.action_head.log_std.item() < CONFIG.policy.log_std_init - 1.0


def test_an_optimum_at_a_bound_is_reached():
    assert actions(learn_target((-1.0, 1.0))) == pytest.approx([-1.0, 1.0], abs=0.02)


def test_an_optimum_at_a_bound_beyond_the_first_actions_is_reached():
    agent = learn_target((1.0, 2.0), low=1.0, high=2.0)
    assert actions(agent) == pytest.approx([1.0, 2.0], abs=0.05)


# What must not matter


class Rescaled(gymnasium.Wrapper):
    """Observations and rewards in absurd units."""

    observation_space = spaces.Box(-np.inf, np.inf, (1,), np.float32)

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        return 1e4 + 1e-1 * obs, info

    def step(self, action):
        obs, reward, *rest = self.env.step(action)
        return 1e4 + 1e-1 * obs, 1e5 * reward, *rest


def test_units_do_not_matter_with_the_normalisers_of_the_defaults():
    agent = learn(lambda: Rescaled(MatchingAction()), 3_000, normalize_rewards=True)
    assert agent.evaluate(lambda: Rescaled(MatchingAction()), 20).mean_return == 1e5


@pytest.mark.parametrize(
    "changes",
    [
        {"policy": PolicyConfig(hidden_sizes=(16,), shared=True)},
        {"policy": PolicyConfig(hidden_sizes=(16,), activation="relu")},
        {"policy": PolicyConfig(hidden_sizes=(16,), activation="gelu")},
        {"policy": PolicyConfig(hidden_sizes=(16,), normalize_observations=False)},
        {"normalize_rewards": True},
        {"normalize_advantages": "minibatch"},
        {"normalize_advantages": "none"},
        {"value_clip_range": 0.5},
        {"entropy_coef": 0.01},
        {"target_kl": 0.1},
        {"num_workers": 2},
        {"num_envs": 1},
        {"gamma": 1.0, "gae_lambda": 1.0},
        {"gamma": 0.0, "gae_lambda": 0.0},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_every_option_learns(changes):
    agent = learn(MatchingAction, 1_500, **changes)
    assert agent.evaluate(MatchingAction, 20).mean_return == 1.0


def test_the_defaults_learn():
    agent = PPOAgent().learn(MatchingAction, 6_000)
    assert agent.evaluate(MatchingAction, 20).mean_return == 1.0


class OwnPolicy(nn.Module):
    """A user's policy: three methods, one network."""

    def __init__(self, num_inputs, num_actions, width):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(num_inputs, width), nn.Tanh())
        self.actor, self.critic = nn.Linear(width, num_actions), nn.Linear(width, 1)

    def act(self, obs, *, noise=None, generator=None, deterministic=False):
        logits = self.actor(self.body(obs))
        if deterministic:
            return logits.argmax(-1)
        return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)

    def evaluate(self, obs, actions):
        log_p = self.actor(self.body(obs)).log_softmax(-1)
        chosen = log_p.gather(-1, actions.unsqueeze(-1)).squeeze(-1)
        return Evaluation(chosen, -(log_p.exp() * log_p).sum(-1), self.value(obs))

    def value(self, obs):
        return self.critic(self.body(obs)).squeeze(-1)


def test_a_policy_of_ones_own_learns():
    # Long enough for its gradient to be recorded on the way.
    torch.manual_seed(0)
    agent = PPOAgent(OwnPolicy(1, 2, 16), config=CONFIG).learn(MatchingAction, 4_000)
    assert agent.evaluate(MatchingAction, 20).mean_return == 1.0


def custom_loop(env, steps, config, seed=0):
    """A loop of ones own, from public names; returns the policy."""
    generator = torch.Generator().manual_seed(seed)
    with RolloutCollector(env, num_envs=config.num_envs, seed=seed) as collector:
        policy = make_policy(
            collector.observation_space, collector.action_space, config.policy, seed=seed
        )
        optimizer = torch.optim.Adam(policy.parameters(), eps=config.adam_eps)
        done = 0
        while done < steps:
            progress = done / steps
            optimizer.param_groups[0]["lr"] = config.learning_rate(progress)
            rollout = collector.collect(policy, config.num_steps)
            done += rollout.num_transitions
            advantages, returns = gae(
                rollout.rewards,
                rollout.values,
                rollout.next_values,
                rollout.terminated,
                rollout.truncated,
                gamma=config.gamma,
                gae_lambda=config.gae_lambda,
            )
            batch = rollout.flatten(advantages=advantages, returns=returns)
            for _ in range(config.num_epochs):
                for mini in batch.minibatches(config.minibatch_size, generator):
                    new = policy.evaluate(mini.obs, mini.actions)
                    loss = ppo_loss(
                        new.log_probs,
                        mini.log_probs,
                        normalize(mini.advantages),
                        new.values,
                        mini.returns,
                        clip_range=config.clip_range(progress),
                    )
                    optimizer.zero_grad()
                    loss.total.backward()
                    nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                    optimizer.step()
            policy.update_normalizer(batch.obs)
    return policy


def test_a_loop_of_ones_own_learns():
    policy = custom_loop(MatchingAction, 2_000, CONFIG)
    assert evaluate(policy, MatchingAction, 20).mean_return == 1.0


# Minutes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_cartpole_is_solved_with_the_shipped_settings(seed):
    config = PPOConfig.tuned("CartPole-v1")
    agent = PPOAgent(config=config, seed=seed).learn("CartPole-v1", config.steps)
    assert agent.steps <= 110_000
    assert agent.evaluate("CartPole-v1", 100).mean_return >= 475


@pytest.mark.slow
def test_cartpole_is_solved_by_a_policy_of_ones_own():
    torch.manual_seed(0)
    config = PPOConfig(num_steps=128, learning_rate=Linear(1e-3, 0.0))
    agent = PPOAgent(OwnPolicy(4, 2, 64), config=config).learn("CartPole-v1", 100_000)
    assert agent.evaluate("CartPole-v1", 100).mean_return >= 475


@pytest.mark.slow
def test_cartpole_is_solved_by_a_loop_of_ones_own():
    policy = custom_loop("CartPole-v1", 100_000, PPOConfig.tuned("CartPole-v1"))
    assert evaluate(policy, "CartPole-v1", 100).mean_return >= 475


@pytest.mark.slow
def test_cartpole_is_solved_with_the_defaults():
    agent = PPOAgent().learn("CartPole-v1", 200_000)
    assert agent.evaluate("CartPole-v1", 100).mean_return >= 475
