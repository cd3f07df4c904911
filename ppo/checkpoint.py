"""Saving and loading without pickle: one safetensors file with JSON beside the tensors.

The file holds named tensors and one JSON document in the header's metadata, with a format version
and a SHA-256 over tensors and document. Loading runs no code from the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ppo._version import __version__
from ppo.errors import CheckpointError

__all__ = ["FORMAT_VERSION", "read_checkpoint", "read_counts", "versions", "write_checkpoint"]

FORMAT_VERSION = 1
_FORMAT = "ppo checkpoint"


def versions() -> dict[str, str]:
    """Versions that numerical results depend on."""
    return {
        "ppo": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "gymnasium": gymnasium.__version__,
    }


def _digest(tensors: Mapping[str, Tensor], document: str) -> str:
    digest = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_checkpoint(
    path: str | Path, groups: Mapping[str, Mapping[str, Tensor]], document: Mapping[str, Any]
) -> None:
    """Write groups of tensors and a JSON document to `path`, atomically.

    A reader sees the old file or the new one, never a part: the data goes to a temporary file
    in the same folder, is flushed to the disk, is read back, and then takes the place of the old
    one.

    Args:
        path: The file; its folder must exist.
        groups: Tensors by group and name, stored as `group/name`; finite.
        document: JSON-serialisable values.

    Raises:
        CheckpointError: A floating tensor holds NaN or infinity, or the disk refuses or does not
            give back what it was given. The old file is as it was.
    """
    path = Path(path)
    cpu = {
        f"{group}/{name}": tensor.detach().cpu().contiguous().clone()
        for group, tensors in groups.items()
        for name, tensor in tensors.items()
    }
    for name, tensor in cpu.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} is not finite; a checkpoint of it would be useless")
    try:
        text = json.dumps(document, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"a setting cannot be stored: {error}; use plain numbers, text, lists and mappings "
            "in the configuration (env_kwargs, wrappers)"
        ) from error
    metadata = {
        "format": _FORMAT,
        "format_version": str(FORMAT_VERSION),
        "document": text,
        "sha256": _digest(cpu, text),
    }
    data = safetensors.torch.save(cpu, metadata)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if temporary.read_bytes() != data:
            raise OSError("the disk does not give back what was written; look for its faults")
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _sync_folder(folder: Path) -> None:
    """Make the new name durable, where the platform can open folders."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def read_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Returns:
        The tensors by group and name, and the document.

    Raises:
        CheckpointError: The file is missing, damaged, foreign or of a newer format.
    """
    path = Path(path)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise CheckpointError(f"{path} is a safetensors file, but not a checkpoint of ppo")
            version = metadata.get("format_version", "")
            if version != str(FORMAT_VERSION):
                raise CheckpointError(
                    f"{path} has checkpoint format {version!r}; this version of ppo reads format "
                    f"{FORMAT_VERSION}; install the version of ppo that wrote it, or a newer one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint at {path}") from None
    except Exception as error:
        raise CheckpointError(f"{path} is not a readable checkpoint: {error}") from error
    text = metadata.get("document", "")
    if metadata.get("sha256") != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its contents do not match their checksum")
    try:
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError(f"its document is a {type(document).__name__}")
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    groups: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = tensor
    return groups, document


def read_counts(document: Mapping[str, Any], *names: str) -> list[int]:
    """Whole numbers of a document, 0 or more; `ValueError` for anything else."""
    counts = [document[name] for name in names]
    if not all(isinstance(count, int) and count >= 0 for count in counts):
        raise ValueError(f"{' and '.join(names)} must be 0 or more, got {counts}")
    return counts
