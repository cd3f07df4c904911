"""Files that are whole or not there, however the process ends."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

__all__ = ["remove_leftovers", "replace_file"]


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new contents, atomically.

    A reader sees the old file or the new one, never a part: the data goes to a temporary file
    in the same folder, is flushed to the disk, is read back, and then takes the place of the old
    one. A link at `path` is replaced, not followed.

    Args:
        path: The file; its folder must exist.
        data: All it is to hold.

    Raises:
        OSError: The disk refuses, or does not give back what it was given. The old file is as it
            was, and no other is left.
    """
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # never through a link that somebody put there
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != data:
            raise OSError("the disk does not give back what was written; look for its faults")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of `replace_file`s that were killed."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name):
            path.unlink()


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the platform can open folders."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
