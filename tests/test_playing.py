"""Playing and recording: whole episodes, one file, clear words where something is missing."""

import sys

import gymnasium
import numpy as np
import pytest
from environments import CountingEnv
from gymnasium.envs.registration import EnvSpec

from ppo import PPOConfig, PPOError
from ppo.cli.playing import open_video, open_window, play
from ppo.errors import EnvCreationError, MissingExtraError
from ppo.probes.environments import MaskedOrder, MaskedOrderByMethod, MaskedOrderInObservation

imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
Image = pytest.importorskip("PIL.Image")

CONFIG = PPOConfig(env="CartPole-v1")


def push_right(obs, mask, state):
    return 1, None


def test_every_episode_is_played_to_its_end():
    env = CountingEnv(length=5)
    episodes = list(play(push_right, env, 3, seed=0))
    assert [episode.episode_length for episode in episodes] == [5, 5, 5]
    assert env.tag > 0
    assert episodes[-1].episode_return == sum(range(1, 6)) + 5 * env.tag


def test_the_same_seed_plays_the_same_episodes():
    first, second = (list(play(push_right, CountingEnv(), 4, seed=3)) for _ in range(2))
    assert first == second
    assert len(set(first)) > 1


def test_the_policy_sees_what_the_environment_shows():
    seen = []

    def act(obs, mask, state):
        seen.append(obs[0])
        return 0, None

    list(play(act, CountingEnv(length=3), 2, seed=0))
    np.testing.assert_array_equal(seen, [0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("kind", [MaskedOrder, MaskedOrderByMethod, MaskedOrderInObservation])
def test_the_policy_is_told_what_is_legal_now(kind):
    env = kind()
    masks = []

    def act(obs, mask, state):
        assert list(mask) == list(env.mask)
        masks.append(tuple(mask))
        return int(np.flatnonzero(mask)[0]), None

    list(play(act, env, 20, seed=0))
    assert len(set(masks)) > 1


def test_a_state_lasts_as_long_as_its_episode():
    given = []

    def act(obs, mask, state):
        given.append(state)
        return 0, len(given)

    list(play(act, CountingEnv(length=3), 2, seed=0))
    assert given == [None, 1, 2, None, 4, 5]


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_all_episodes_are_in_one_video(tmp_path, name):
    pytest.importorskip("moviepy")
    path = tmp_path / name
    with open_video(CONFIG, path) as env:
        lengths = [episode.episode_length for episode in play(push_right, env, 2, seed=0)]
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    # A frame for each observation; moviepy may round the length of the clip by a frame.
    assert abs(count_frames(path) - (sum(lengths) + 2)) <= 1


def count_frames(path):
    if path.suffix == ".mp4":
        return imageio_ffmpeg.count_frames_and_secs(str(path))[0]
    with Image.open(path) as image:
        return image.n_frames


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
def test_a_video_that_was_broken_off_is_not_left_half_written(tmp_path, name):
    pytest.importorskip("moviepy")

    def leave(obs, mask, state):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), open_video(CONFIG, tmp_path / name) as env:
        list(play(leave, env))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["video.avi", "video", "missing/video.mp4"])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_played(tmp_path, name):
    with pytest.raises(PPOError, match="video"), open_video(CONFIG, tmp_path / name):
        pytest.fail("nothing should be played")


def test_without_moviepy_the_extra_is_named(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "moviepy"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    with pytest.raises(MissingExtraError, match=r"ppo-gae\[video\]"):
        open_video(CONFIG, tmp_path / "video.mp4").__enter__()


def test_without_pygame_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)
    with pytest.raises(MissingExtraError, match=r"ppo-gae\[video\]"):
        open_window(CONFIG, pytest.fail).__enter__()


@pytest.mark.filterwarnings("ignore:.*not in the possible render_modes")
def test_an_environment_that_cannot_be_shown_is_named(monkeypatch):
    monkeypatch.setitem(gymnasium.registry, "Blind-v0", EnvSpec("Blind-v0", CountingEnv))
    with pytest.raises(EnvCreationError, match=r"Blind-v0.*render_mode"):
        open_window(PPOConfig(env="Blind-v0"), pytest.fail).__enter__()


class Forgetful(CountingEnv):
    """Takes a render mode and does not keep it."""

    def __init__(self, render_mode):
        super().__init__()


@pytest.mark.parametrize("name", ["video.mp4", "video.gif"])
@pytest.mark.filterwarnings("ignore:.*not in the possible render_modes")
def test_an_environment_that_draws_nothing_is_named(monkeypatch, tmp_path, name):
    monkeypatch.setitem(gymnasium.registry, "Forgetful-v0", EnvSpec("Forgetful-v0", Forgetful))
    with pytest.raises(EnvCreationError, match=r"Forgetful-v0 draws no pictures.*render_mode"):
        open_video(PPOConfig(env="Forgetful-v0"), tmp_path / name).__enter__()


def test_a_window_without_a_display_is_said(monkeypatch):
    pytest.importorskip("pygame")
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    said = []
    with open_window(CONFIG, said.append) as env:
        assert env.render_mode == "human"
    assert "no display" in said[0]
