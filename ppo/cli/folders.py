"""Where runs are: making their folders, and refusing those that point elsewhere."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from ppo.errors import ConfigError, PPOError

__all__ = ["check_folder_of", "check_links", "make_folder"]

_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "metrics.csv",
    "final.safetensors",
    "evaluation.json",
    "curve.png",
)
_FOLDERS = ("checkpoints", "tensorboard")


def make_folder(out: Path, stem: str, seed: int, name: str | None) -> Path:
    """Make a folder that was not there, named after stem, time and seed, or just `name`.

    Raises:
        ConfigError: `name` is taken, or `out` is a file.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{out} is no folder for runs, but a file or in one") from error
    if name is None:
        stem = re.sub(r"[^\w.-]+", "-", stem).strip("-.") or "run"
        name = f"{stem}-{datetime.now():%Y%m%d-%H%M%S}-seed{seed}"
        names = [name, *(f"{name}-{count}" for count in range(2, 1000))]
    else:
        names = [name]
    for candidate in names:
        try:
            (out / candidate).mkdir()
        except FileExistsError:
            continue
        return out / candidate
    raise ConfigError(
        f"{out / name} exists already; choose another name, or go on with `ppo resume`"
    )


def check_folder_of(path: Path) -> None:
    """Refuse a file that is to be written where there is no folder.

    Raises:
        ConfigError: There is none.
    """
    if not path.parent.is_dir():
        raise ConfigError(f"there is no folder {str(path.parent)!r} to put {path.name} in; make it")


def check_links(folder: Path) -> None:
    """Refuse a run folder of which a file, read or written there, would lie elsewhere.

    Raises:
        PPOError: A link leads out of it.
    """
    root = folder.resolve()
    paths = [folder / name for name in (*_FILES, *_FOLDERS)]
    paths += [path for name in _FOLDERS for path in (folder / name).glob("*")]
    for path in paths:
        try:
            end = path.resolve()
            # A link to itself leads nowhere; Python says so only before 3.13.
            inside = end.is_relative_to(root) and not end.is_symlink()
        except (OSError, RuntimeError):
            inside = False
        if not inside:
            raise PPOError(
                f"{path} is a link that leads out of the run folder; put there what it leads to"
            )
