"""Saving and loading without pickle: one safetensors file with JSON beside the tensors.

The file holds named tensors and one JSON document in the header's metadata, with a format version
and a SHA-256 over tensors and document. Loading runs no code from the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import platform
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ppo._files import replace_file
from ppo._version import __version__
from ppo.errors import CheckpointError
from ppo.rollout import Episode
from ppo.statistics import RewardScaler

__all__ = [
    "FORMAT_VERSION",
    "all_or_nothing",
    "check_like",
    "check_moments",
    "fill",
    "fingerprint",
    "read_checkpoint",
    "read_counts",
    "read_episodes",
    "read_reward_scaler",
    "versions",
    "warn_of_differences",
    "write_checkpoint",
]

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


def fingerprint() -> dict[str, dict[str, str]]:
    """What the same seed needs to give the same numbers: `versions`, and the `machine`."""
    machine = {
        "threads": str(torch.get_num_threads()),
        "cpu": _cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    return {"versions": versions(), "machine": machine}


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def warn_of_differences(path: str | Path, document: Mapping[str, Any]) -> None:
    """Warn, once, if a file comes from where the same seed may give other numbers.

    A file that does not know its machine, as the earliest do not, is not compared.

    Raises:
        CheckpointError: The fingerprint makes no sense.
    """
    if "machine" not in document:
        return
    different = []
    for part, here in fingerprint().items():
        there = document.get(part)
        if not isinstance(there, dict) or not all(isinstance(x, str) for x in there.values()):
            raise CheckpointError(f"{path} is damaged: its fingerprint holds {part}={there!r}")
        for name, ours in here.items():
            theirs = there.get(name, "unknown")
            if _numeric(name, theirs) != _numeric(name, ours):
                different.append(f"{name} {theirs} (here {ours})")
    if different:
        warnings.warn(
            f"{path} was written with {', '.join(different)}: training on is as good, but its "
            "numbers may not be those of the run that stayed there",
            stacklevel=4,
        )


def _numeric(name: str, version: str) -> list[str]:
    """What of an entry matters to numbers: a bug-fix release of Python does not."""
    return version.split(".")[:2] if name == "python" else [version]


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

    A reader sees the old file or the new one, never a part; see `replace_file`.

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
    bad = _non_finite(cpu)
    if bad is not None:
        raise CheckpointError(f"{bad} is not finite; a checkpoint of it would be useless")
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
    try:
        replace_file(path, data)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Name of a tensor that holds NaN or infinity."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def read_checkpoint(path: str | Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read what `write_checkpoint` wrote.

    Returns:
        The tensors by group and name, and the document.

    Raises:
        CheckpointError: The file is missing, damaged, foreign or of a newer format.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # reading a pipe would wait for ever
        raise CheckpointError(f"{path} is not a file")
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
    bad = _non_finite(tensors)
    if bad is not None:
        raise CheckpointError(f"{path} is damaged: {bad} is not finite")
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
    if not all(_is_count(count) for count in counts):
        raise ValueError(f"{' and '.join(names)} must be 0 or more, got {counts}")
    return counts


def read_episodes(document: Mapping[str, Any]) -> list[Episode]:
    """The recent episodes of a document; `ValueError` for anything else."""
    rows = document.get("recent_episodes")
    if not isinstance(rows, list):
        raise ValueError(f"recent_episodes must be a list, got {rows!r}")
    for row in rows:
        if not (
            isinstance(row, list)
            and len(row) == 3
            and isinstance(row[0], float | int)
            and math.isfinite(row[0])
            and all(map(_is_count, row[1:]))
        ):
            raise ValueError(f"an episode must be [return, length, env_index], got {row!r}")
    return [Episode(float(total), length, index) for total, length, index in rows]


def _is_count(value: object) -> bool:
    # Quotients of larger numbers would not be floats any more.
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**128


def check_like(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """`ValueError` unless names, shapes and types are the same, so that nothing is converted."""
    for name in sorted(given.keys() | wanted.keys()):
        there, here = (
            f"{tensors[name].dtype} {list(tensors[name].shape)}" if name in tensors else "missing"
            for tensors in (given, wanted)
        )
        if there != here:
            raise ValueError(f"{name} is {there} in the file, and {here} in this agent")


def check_moments(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """`check_like` for what an optimizer has now; mean squares and counts are never negative.

    Names and shapes of what it makes in its first step are for the optimizer itself to check, and
    so is the number of its counts.
    """
    both = [
        {
            name: tensors[name].new_empty(()) if name.endswith(".step") else tensors[name]
            for name in given.keys() & wanted.keys()
        }
        for tensors in (given, wanted)
    ]
    check_like(*both)
    for name, tensor in given.items():
        if name.endswith((".exp_avg_sq", ".step")) and bool((tensor < 0).any()):
            raise ValueError(f"{name} is negative")


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load a module's state; `ValueError` unless the tensors are just those it has.

    What it computes from them must be finite, too: a negative variance is no scale.
    """
    check_like(tensors, module.state_dict())
    module.load_state_dict(tensors)
    bad = _non_finite(dict(module.named_buffers()))
    if bad is not None:
        raise ValueError(f"{bad} would not be finite")


def read_reward_scaler(tensors: Mapping[str, Tensor], gamma: float) -> RewardScaler:
    """The scaler with this state; `ValueError` for a state that none can have."""
    scaler = RewardScaler(gamma, len(tensors["returns"]))
    check_like(tensors, scaler.state_dict())
    scaler.load_state_dict(tensors)
    if not bool(torch.isfinite(scaler.moments.std)):
        raise ValueError("the scale of the rewards would not be finite")
    return scaler


@contextlib.contextmanager
def all_or_nothing(path: str | Path, module: nn.Module | None) -> Iterator[None]:
    """Load inside; if that fails, the caller's module is as it was.

    Raises:
        CheckpointError: For every ordinary error inside, whatever it was.
    """
    parts = list(module.modules()) if module is not None else []
    stores: list[tuple[dict[str, Any], str, Tensor]] = [
        (store, name, tensor)
        for part in parts
        for store in (part._parameters, part._buffers)
        for name, tensor in store.items()
        if tensor is not None
    ]
    before = [(t, t.data, t.detach().clone(), t.requires_grad, t.grad) for _, _, t in stores]
    try:
        yield
    except BaseException as error:
        for (store, name, _), (tensor, data, values, trained, grad) in zip(
            stores, before, strict=True
        ):
            store[name] = tensor
            tensor.data = data.copy_(values)
            tensor.requires_grad_(trained)
            tensor.grad = grad
        if not isinstance(error, Exception):
            raise
        raise CheckpointError(
            f"{path} does not fit this agent: {error}. For a policy of your own pass "
            "policy=..., built for the same spaces."
        ) from error
