"""A policy as a file that runs without this library: ONNX, or a program of `torch.export`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo.errors import MissingExtraError, PPOError
from ppo.policies.bodies import NatureCNN
from ppo.policies.protocol import takes
from ppo.policies.state import frame_stack_of, state_size_of
from ppo.spaces import MASK_KEY, ActionMasks, ObservationLayout, Space, sub_spaces
from ppo.trees import leaves, leaves_with_paths, map_tree, rebuild

__all__ = ["DeterministicPolicy", "export_policy"]


class DeterministicPolicy(nn.Module):
    """What `PPOAgent.act` computes, from the environment's observations to its actions, in torch.

    Args:
        policy: Any module that meets the `Policy` protocol.
        observation_space: Of one environment.
        action_space: Of one environment.
    """

    def __init__(self, policy: Any, observation_space: Space, action_space: Space) -> None:
        super().__init__()
        self.policy = policy
        self._given, self._chosen = sub_spaces(observation_space), sub_spaces(action_space)
        dtypes = [leaf.dtype for leaf in leaves(ObservationLayout(observation_space).leaves)]
        self.inputs = nn.ModuleList(map(_Stored, leaves(self._given), dtypes))
        squash = getattr(policy, "squashed", False)
        self.outputs = nn.ModuleList(
            _Numbers(leaf, squash) if isinstance(leaf, spaces.Box) else _Classes(leaf)
            for leaf in leaves(self._chosen)
        )
        lies_there = ActionMasks(action_space).lie_in(observation_space)
        self._mask_in_obs = lies_there and takes(policy.act, "action_mask")
        self._stacked = frame_stack_of(policy) > 1

    def forward(
        self, obs: Any, *, action_mask: Tensor | None = None, state: Tensor | None = None
    ) -> Any:
        """Actions `[B, ...]`, or a pair of them and the next state `[B, K]`.

        Args:
            obs: Observations `[B, ...]`, or `[B, k, ...]` for a policy that stacks `k` frames.
            action_mask: Legal actions, bool `[B, M]`; None: all, or as the observation says.
            state: For a policy with memory: what it remembers, `[B, K]`.
        """
        seen = _by_leaf(self.inputs, self._given, obs)
        if action_mask is None and self._mask_in_obs:
            newest = seen[MASK_KEY][:, -1] if self._stacked else seen[MASK_KEY]
            action_mask = newest.flatten(1) != 0
        optional = {"action_mask": action_mask, "state": state}
        passed = {name: tensor for name, tensor in optional.items() if tensor is not None}
        result = self.policy.act(seen, deterministic=True, **passed)
        if state is None:
            return _by_leaf(self.outputs, self._chosen, result)
        raw, memory = result
        return _by_leaf(self.outputs, self._chosen, raw), memory


def _by_leaf(modules: nn.ModuleList, structure: Any, tree: Any) -> Any:
    """A tree of leaves `[B, ...]`, each sent through its module."""
    return map_tree(lambda module, leaf: module(leaf), rebuild(structure, list(modules)), tree)


class _Stored(nn.Module):
    """Observations of one leaf as policies get them: what `ObservationLayout` does with arrays."""

    start: Tensor

    def __init__(self, space: Space, dtype: np.dtype[Any]) -> None:
        super().__init__()
        self._dtype = _torch_dtype(dtype)
        start = np.array(getattr(space, "start", 0), np.int64)
        self._moved = bool(np.any(start))
        self.register_buffer("start", torch.from_numpy(start))

    def forward(self, given: Tensor) -> Tensor:
        stored = given.to(self._dtype)
        return stored - self.start if self._moved else stored


class _Classes(nn.Module):
    """Raw classes of one leaf as the environment counts them: as `make_action_adapter` does it."""

    start: Tensor

    def __init__(self, space: Space) -> None:
        super().__init__()
        self._dtype = _torch_dtype(space.dtype)
        start = np.array(getattr(space, "start", 0), np.int64)
        self.register_buffer("start", torch.from_numpy(start))

    def forward(self, raw: Tensor) -> Tensor:
        return (raw + self.start).to(self._dtype)


class _Numbers(nn.Module):
    """Raw numbers of one Box between its bounds: as `make_action_adapter` does it."""

    low: Tensor
    high: Tensor
    width: Tensor

    def __init__(self, space: spaces.Box, squash: bool) -> None:
        super().__init__()
        self._dtype, self._squash = _torch_dtype(space.dtype), squash
        # float32 runs everywhere, but an environment that asks for more gets more.
        between = np.promote_types(space.dtype, np.float32)
        with np.errstate(over="ignore"):  # infinite bounds, which nothing is squashed to
            width = space.high.astype(np.float64) - space.low
            for name, array in (("low", space.low), ("high", space.high), ("width", width)):
                # A difference of arrays without axes is no array.
                self.register_buffer(name, torch.from_numpy(np.array(array, between)))

    def forward(self, raw: Tensor) -> Tensor:
        raw = raw.to(self.low.dtype)
        if self._squash:
            raw = self.low + self.width * (0.5 * torch.tanh(raw) + 0.5)
        return torch.minimum(torch.maximum(raw, self.low), self.high).to(self._dtype)


def _torch_dtype(dtype: Any) -> torch.dtype:
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def export_policy(
    policy: Any,
    observation_space: Space,
    action_space: Space,
    path: str | Path,
    *,
    masked: bool = False,
) -> list[Path]:
    """What `PPOAgent.export` does; see there."""
    path = Path(path)
    formats: dict[str, Callable[[torch.export.ExportedProgram, list[str], list[str]], bytes]]
    formats = {".onnx": _onnx, ".pt2": _pt2}
    if path.suffix and path.suffix not in formats:
        raise ValueError(
            f"path ends in {path.suffix!r}, wanted '.onnx', '.pt2', or no ending for both: {path}"
        )
    if masked and not (ActionMasks(action_space).size and takes(policy.act, "action_mask")):
        raise ValueError(
            "masked=True, but nothing can be masked: the actions have no discrete leaf, or the "
            "policy's act has no argument action_mask; leave masked out"
        )
    suffixes = [path.suffix] if path.suffix else list(formats)
    if ".onnx" in suffixes:
        _require_onnx()
    remembers = state_size_of(policy) > 0
    inputs = [*_names("obs", observation_space), *["action_mask"] * masked, *["state"] * remembers]
    outputs = [*_names("action", action_space), *["next_state"] * remembers]
    try:
        program = _trace(policy, observation_space, action_space, masked)
        contents = {
            path.with_suffix(suffix): formats[suffix](program, inputs, outputs)
            for suffix in suffixes
        }
    except Exception as error:  # whatever a policy that cannot be followed leads to
        raise PPOError(
            f"the policy cannot be exported: {error}\nIts act(obs, deterministic=True) must be "
            "made of operations that torch.export can follow, for any number of rows and without "
            "decisions by the values of tensors."
        ) from error
    for name, data in contents.items():
        _write(name, data)
    return list(contents)


def _require_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "an ONNX file needs onnx and onnxscript; install the extra: "
            "pip install 'ppo-gae[export]', or export to a path that ends in .pt2"
        ) from error


def _names(root: str, space: Space) -> list[str]:
    """Names of the leaves: `obs`, or `obs/camera`."""
    paths = [path for path, _ in leaves_with_paths(sub_spaces(space))]
    return [f"{root}/{path}" if path else root for path in paths]


def _trace(
    policy: Any, observation_space: Space, action_space: Space, masked: bool
) -> torch.export.ExportedProgram:
    """The operations of a policy, for any number of rows."""
    rows, frames, size = 2, frame_stack_of(policy), state_size_of(policy)
    stack = (frames,) if frames > 1 else ()

    def example(leaf: Space) -> Tensor:
        return torch.zeros(rows, *stack, *(leaf.shape or ()), dtype=_torch_dtype(leaf.dtype))

    obs = map_tree(example, sub_spaces(observation_space))
    optional: dict[str, Tensor] = {}
    if masked:
        optional["action_mask"] = torch.ones(rows, ActionMasks(action_space).size).bool()
    if size:
        optional["state"] = torch.zeros(rows, size)
    # The limit is for PyTorch 2.6, which else finds that a batch might have 2^63 - 1 rows.
    batch = {0: torch.export.Dim("batch", min=1, max=2**31)}
    shapes = {"obs": map_tree(lambda _: batch, obs), **dict.fromkeys(optional, batch)}
    module = DeterministicPolicy(copy.deepcopy(policy).cpu(), observation_space, action_space)
    for part in module.modules():
        if isinstance(part, NatureCNN):
            part.precision = "float32"  # few runtimes have convolutions in half precision
    with torch.no_grad():
        # Strictly, which reads the bytecode: the other way takes `len(obs)` for a constant.
        return torch.export.export(
            module.eval(), (obs,), optional, dynamic_shapes=shapes, strict=True
        )


def _pt2(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> bytes:
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


def _onnx(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str]) -> bytes:
    with _quiet_exporter():
        exported: Any = torch.onnx.export(
            program, input_names=inputs, output_names=outputs, dynamo=True, verbose=False
        )
    model = exported.model_proto
    # The exporter calls the batch axis "s27" or so.
    symbol = model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:
                axis.dim_param = axis.dim_param.replace(symbol, "batch")
    data: bytes = model.SerializeToString()
    return data


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Keep to itself what torch's exporter says about torch and about packages it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated", FutureWarning)
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _write(path: Path, data: bytes) -> None:
    """Write a file, or leave what is there."""
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PPOError(f"{path} cannot be written: {error}") from error
