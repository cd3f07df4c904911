"""Watching a policy: in a window or as a video."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gymnasium
from gymnasium.wrappers import RecordVideo, RenderCollection

from ppo.cli.folders import check_folder_of
from ppo.collector.env_columns import mask_source
from ppo.config import PPOConfig
from ppo.envs import Env
from ppo.errors import ConfigError, EnvCreationError, MissingExtraError, PPOError
from ppo.rollout import Episode

__all__ = ["open_video", "open_window", "play"]

Act = Callable[[Any, Any, Any], tuple[Any, Any]]

_FORMATS = (".mp4", ".gif")


def play(act: Act, env: Env, episodes: int = 1, *, seed: int | None = None) -> Iterator[Episode]:
    """Play whole episodes in one environment.

    Args:
        act: From an observation, the mask of its legal actions (None: all are legal) and the
            policy's state (None at the beginning of an episode) to an action and the next state.
        env: The environment; it is not closed.
        episodes: How many episodes.
        seed: Of the first episode; the others follow from it.

    Yields:
        Each episode when it has ended.
    """
    for index in range(episodes):
        obs, info = env.reset(seed=seed if index == 0 else None)
        legal = mask_source(env, info)
        total, length, over, state = 0.0, 0, False, None
        while not over:
            mask = None if legal is None else legal(obs, info)
            action, state = act(obs, mask, state)
            obs, reward, terminated, truncated, info = env.step(action)
            total, length, over = total + float(reward), length + 1, terminated or truncated
        yield Episode(total, length, 0)


@contextmanager
def open_window(config: PPOConfig, warn: Callable[[str], object]) -> Iterator[Env]:
    """The configured environment, shown in a window while it is stepped.

    Args:
        config: Names the environment.
        warn: Told if there is no display to show it on.

    Raises:
        EnvCreationError: The environment, or this machine, cannot show a window.
        MissingExtraError: What draws the window is not installed.
    """
    env = _make(config, "human")
    try:
        try:
            env.reset()
        except gymnasium.error.DependencyNotInstalled as error:
            raise MissingExtraError(
                f"{config.env} cannot be shown: {error}; the extra `video` brings pygame: "
                "pip install 'ppo-gae[video]'"
            ) from error
        except Exception as error:
            raise EnvCreationError(
                f"{config.env} cannot be shown in a window: {error}; use --video out.mp4"
            ) from error
        pygame = sys.modules.get("pygame")
        if pygame is not None and pygame.display.get_driver() in ("offscreen", "dummy"):
            warn("there is no display, so nothing can be seen; use --video out.mp4")
        yield env
    finally:
        env.close()


@contextmanager
def open_video(config: PPOConfig, path: str | Path) -> Iterator[Env]:
    """The configured environment, recorded by Gymnasium into one file until the block ends.

    Args:
        config: Names the environment.
        path: The file, `.mp4` or `.gif`; its folder must exist.

    Raises:
        EnvCreationError: The environment cannot draw pictures.
        MissingExtraError: moviepy is not installed.
        ConfigError: The format is unknown, or the folder does not exist.
    """
    path = Path(path)
    if path.suffix not in _FORMATS:
        raise ConfigError(f"a video must end in .mp4 or .gif, got {str(path)!r}")
    check_folder_of(path)
    try:
        import moviepy  # noqa: F401  (Gymnasium's recorder needs it)
    except ImportError as error:
        raise MissingExtraError(
            "recording needs moviepy; install the extra: pip install 'ppo-gae[video]'"
        ) from error
    env = _make(config, "rgb_array")
    if env.render_mode != "rgb_array":
        env.close()
        raise EnvCreationError(
            f"{config.env} draws no pictures: its render_mode is {env.render_mode!r} although "
            "'rgb_array' was asked for; set it in the environment"
        )
    record = _record_gif if path.suffix == ".gif" else _record_mp4
    with record(env, path) as recorded:
        yield recorded


@contextmanager
def _record_mp4(env: Env, path: Path) -> Iterator[Env]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "video"
        recorded: Env = RecordVideo(
            env,
            str(folder),
            episode_trigger=lambda index: index == 0,
            video_length=sys.maxsize,  # not 0, with which a file would end with its episode
        )
        try:
            yield recorded
        finally:
            recorded.close()  # writes the file
        video = next(folder.iterdir(), None)
        if video is None:
            raise _no_pictures(env)
        shutil.move(video, path)


@contextmanager
def _record_gif(env: Env, path: Path) -> Iterator[Env]:
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    collected: Env = RenderCollection(env, reset_clean=False)
    try:
        yield collected
        pictures: Any = collected.render()
    finally:
        env.close()
    if not pictures:
        raise _no_pictures(env)
    clip = ImageSequenceClip(pictures, fps=env.metadata.get("render_fps", 30))
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / path.name
        clip.write_gif(str(whole), logger=None)
        shutil.move(whole, path)


def _no_pictures(env: Env) -> EnvCreationError:
    name = env.spec.id if env.spec else str(env)
    return EnvCreationError(f"{name} drew no pictures in render mode 'rgb_array'")


def _make(config: PPOConfig, render_mode: str) -> Env:
    shown = config.replace(env_kwargs={**config.env_kwargs, "render_mode": render_mode})
    try:
        env: Env = shown.env_factory()()
        return env
    except PPOError:
        raise
    except ValueError as error:
        raise EnvCreationError(f"{config.env} cannot be shown: {error}") from error
