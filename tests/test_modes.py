"""Whatever mode of torch surrounds the library, it computes the same."""

import contextlib

import numpy as np
import pytest
import torch
from environments import ImageEnv
from small_policies import assert_bitwise_equal, build, improve, make_batch, parts
from torch import nn

from ppo import PolicyConfig, PPOAgent, PPOConfig, RolloutCollector
from ppo._modes import ordinary_mode

SMALL = PPOConfig(num_envs=2, num_steps=32, num_epochs=2, minibatch_size=32, num_workers=0)

MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def an_image():
    return ImageEnv(length=5)


IMAGES = SMALL.replace(
    num_steps=8, minibatch_size=8, policy=PolicyConfig(cnn_features=16, precision="bfloat16")
)
SETTINGS = {
    "vector": ("CartPole-v1", SMALL),
    "continuous": ("Pendulum-v1", SMALL),
    "image": (an_image, IMAGES),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_training_is_bit_for_bit_that_without_a_mode(mode, setting):
    env, config = SETTINGS[setting]
    steps = 3 * config.num_envs * config.num_steps
    agents, played, chosen = [], [], []
    for surrounding in (contextlib.nullcontext, mode):
        agent = PPOAgent(config=config)
        with surrounding():
            agent.learn(env, steps)
            played.append(agent.evaluate(env, episodes=2))
            obs = np.ones(agent.observation_space.shape, agent.observation_space.dtype)
            chosen.append(agent.act(obs))
        agents.append(agent.learn(env, steps))
    assert_bitwise_equal(*(parts(agent.policy, agent._learner) for agent in agents))
    assert played[0] == played[1]
    assert np.array_equal(*chosen)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_a_loop_of_ones_own_may_run_in_any_mode(mode, tmp_path):
    agents = []
    for surrounding in (contextlib.nullcontext, mode):
        agent = PPOAgent(config=SMALL).learn("CartPole-v1", 64)
        agent.save(tmp_path / "agent")
        with surrounding():
            agent = PPOAgent.load(tmp_path / "agent")
            with RolloutCollector("CartPole-v1", num_envs=2, seed=0) as collector:
                rollouts = [collector.collect(agent.policy, 32)]
                agent.update(rollouts[0])
                rollouts.append(collector.collect(agent.policy, 32))
        agent.update(rollouts[1])
        agents.append(agent)
    assert_bitwise_equal(*(parts(agent.policy, agent._learner) for agent in agents))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_agent_that_is_made_in_a_mode_learns_without_it(mode):
    agents = []
    for surrounding in (contextlib.nullcontext, mode):
        policy = build()
        with surrounding():
            agents.append(PPOAgent(policy, config=SMALL))
        learner = agents[-1]._learner
        for seed in range(2):
            improve(learner, make_batch(policy, seed=seed))
    assert_bitwise_equal(*(parts(agent.policy, agent._learner) for agent in agents))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_mode_is_as_it_was_behind_the_block(mode):
    def state():
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_cache_enabled(),
        )

    outside = state()
    with mode():
        inside = state()
        with ordinary_mode():
            assert state()[:3] == (True, False, False)
        assert state() == inside
        with pytest.raises(KeyError), ordinary_mode():
            raise KeyError
        assert state() == inside
    assert state() == outside


def test_weights_that_change_are_converted_again_within_and_behind_the_block():
    layer, row = nn.Linear(1, 1, bias=False), torch.ones(1, 1)

    def seen(weight):
        with torch.no_grad():
            layer.weight.fill_(weight)
        with torch.autocast("cpu", torch.bfloat16):
            return layer(row).item()

    with torch.autocast("cpu", torch.bfloat16):
        assert layer(row).dtype == torch.bfloat16  # the weight is remembered
        with ordinary_mode():
            assert [seen(1.0), seen(2.0)] == [1.0, 2.0]
        assert layer(row).item() == 2.0
