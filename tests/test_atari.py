"""Atari games: a seed alone decides what an episode is, and the game is loaded once."""

import gymnasium
import numpy as np
import pytest
import torch
from collecting import assert_identical, collect
from gymnasium.wrappers import AtariPreprocessing

from ppo import PolicyConfig, PPOAgent, PPOConfig, make_policy
from ppo.atari import AtariSeeding
from ppo.envs import make_env

ale_py = pytest.importorskip("ale_py")
gymnasium.register_envs(ale_py)

GAME = "ALE/Breakout-v5"
CONFIG = PPOConfig(
    env=GAME,
    env_kwargs={"frameskip": 1},
    wrappers=["AtariPreprocessing"],
    num_envs=2,
    num_steps=8,
    num_epochs=1,
    minibatch_size=16,
    policy=PolicyConfig(hidden_sizes=(), shared=True, frame_stack=2, cnn_features=8),
)


def spaces_of(env):
    return env.observation_space, env.action_space


def game(**kwargs):
    return make_env(GAME, {"frameskip": 1, **kwargs})


def episode(env, seed, num_frames=60):
    """Frames of an episode of known actions."""
    actions = np.random.default_rng(0).integers(4, size=num_frames)
    frames = [env.reset(seed=seed)[0]]
    frames += [env.step(int(action))[0] for action in actions]
    return np.stack(frames)


def test_preprocessed_pictures_do_not_depend_on_what_the_game_returns():
    def wrapped(**kwargs):
        return AtariPreprocessing(game(**kwargs))

    coloured, gray = (episode(wrapped(**kind), 3) for kind in ({}, {"obs_type": "grayscale"}))
    np.testing.assert_array_equal(gray, coloured)
    assert (coloured[1:] != coloured[:-1]).any()


@pytest.mark.parametrize("name", [GAME, "ALE/Pong-v5", "ALE/MontezumaRevenge-v5"])
def test_an_episode_depends_on_its_seed_and_nothing_before_it(name):
    fresh, used = make_env(name, {"frameskip": 1}), make_env(name, {"frameskip": 1})
    for seed in (3, 4, None, 5):
        episode(used, seed)
    for seed in (7, 3):
        np.testing.assert_array_equal(episode(fresh, seed), episode(used, seed))
        counts = [env.unwrapped.ale.getFrameNumber() for env in (fresh, used)]
        assert counts[0] == counts[1]  # of the emulator, which info shows


def test_other_seeds_are_other_episodes():
    env = game()
    assert not np.array_equal(episode(env, 1), episode(env, 2))


def test_without_a_seed_the_generator_goes_on():
    one, other = game(), game()
    first, second = episode(one, 1), episode(one, None)
    assert not np.array_equal(first, second)
    episode(other, 1)
    np.testing.assert_array_equal(second, episode(other, None))


def test_without_any_seed_games_differ():
    assert not np.array_equal(episode(game(), None), episode(game(), None))


def test_the_game_is_loaded_once(monkeypatch):
    env, loads = game(), []
    load = env.unwrapped.load_game
    monkeypatch.setattr(env.unwrapped, "load_game", lambda: loads.append(1) or load())
    for seed in range(4):
        env.reset(seed=seed)
    assert len(loads) == 1


@pytest.mark.parametrize("stickiness", [0.0, 0.25, 0.6])
def test_actions_stick_as_often_as_the_game_says(monkeypatch, stickiness):
    env, taken = game(repeat_action_probability=stickiness), []
    env.reset(seed=0)
    assert env.unwrapped.ale.getFloat("repeat_action_probability") == 0.0  # not once more

    def carried_out(action):
        taken.append(action)
        return None, 0.0, False, False, {}

    monkeypatch.setattr(env.unwrapped, "step", carried_out)
    for t in range(2000):
        env.step(t)
    new = np.array(taken) == np.arange(2000)
    assert np.mean(~new) == pytest.approx(stickiness, abs=0.04)
    latest = np.maximum.accumulate(np.where(new, np.arange(2000), 0))
    np.testing.assert_array_equal(taken, latest)


def test_an_episode_begins_with_no_action_to_keep():
    env = game(repeat_action_probability=1.0)
    still = game(repeat_action_probability=0.0)
    env.reset(seed=0)
    env._last = 3
    frames = episode(env, 5, 20)
    still.reset(seed=5)
    assert [still.step(0)[0].tolist() for _ in range(20)] == frames[1:].tolist()


@pytest.mark.parametrize(
    ("name", "kwargs", "fits"),
    [
        (GAME, {"frameskip": 1}, True),
        ("BreakoutNoFrameskip-v4", {}, True),
        (GAME, {}, False),
        (GAME, {"frameskip": (2, 5)}, False),
        (GAME, {"frameskip": 1, "continuous": True}, False),
        ("CartPole-v1", {}, False),
    ],
)
def test_only_games_of_single_frames_are_wrapped(name, kwargs, fits):
    made = make_env(name, kwargs)
    wrappers = []
    while isinstance(made, gymnasium.Wrapper):
        wrappers.append(type(made))
        made = made.env
    assert (AtariSeeding in wrappers) is fits


def test_workers_collect_the_same_episodes():
    policy = make_policy(*spaces_of(CONFIG.env_factory()()), CONFIG.policy, seed=0)
    one, other = (
        collect(CONFIG.env_factory(), [12, 8], policy, num_envs=2, num_workers=num_workers)
        for num_workers in (0, 2)
    )
    assert_identical(one, other)


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    path, rollout = tmp_path / "agent", CONFIG.num_envs * CONFIG.num_steps

    def save(report):
        if report.updates == 2:
            agent.save(path)

    agent = PPOAgent(config=CONFIG, seed=0)
    agent.learn(GAME, 4 * rollout, callback=save)
    again = PPOAgent.load(path)
    assert any(mark.episode_length > 0 for mark in again.left_off.bookmarks)
    again.learn(GAME, 2 * rollout)
    for name, tensor in agent.policy.state_dict().items():
        assert torch.equal(tensor, again.policy.state_dict()[name]), name
