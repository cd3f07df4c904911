"""From the leaves of an observation to one vector of features: a class for each kind of leaf."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo.errors import ConfigError, SpaceError
from ppo.nearest import NearestError
from ppo.policies.bodies import MLP, NatureCNN, without_values
from ppo.policies.options import EncoderConfig, PolicyConfig
from ppo.spaces import is_image, sub_spaces
from ppo.trees import leaves_with_paths

__all__ = [
    "Chain",
    "EmbeddingEncoder",
    "FlatEncoder",
    "OneHotEncoder",
    "TreeEncoder",
    "encoder_kind",
    "make_body",
    "make_encoder",
]

Space = gymnasium.Space[Any]

_USUAL_FEATURES = {"embedding": 16, "mlp": 64}


class FlatEncoder(nn.Module):
    """The numbers of a leaf as they are, float32, in one row.

    Args:
        size: Numbers in one leaf, those of all its frames.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.num_features = size

    def forward(self, leaf: Tensor) -> Tensor:
        """Features `[B, size]` of a leaf `[B, ...]` of any type."""
        leaf = leaf if leaf.is_floating_point() else leaf.float()
        return leaf.reshape(len(leaf), self.num_features)


class _Codes(nn.Module):
    """Counts the classes of several numbers on: those of the second follow on the first's."""

    offsets: Tensor

    def __init__(self, sizes: Sequence[int], frames: int) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self._frames = frames
        self.register_buffer("offsets", self._counted(), persistent=False)

    def _counted(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.sizes[:-1])])

    def forward(self, classes: Tensor) -> Tensor:
        """Codes `[B, frames, P]` below `sum(sizes)` of classes `[B, ...]`."""
        return classes.reshape(len(classes), self._frames, len(self.sizes)) + self.offsets

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        # A policy that is loaded into has memory without values until then.
        super()._load_from_state_dict(*args, **kwargs)
        self.offsets.copy_(self._counted())


class OneHotEncoder(nn.Module):
    """One number for each class, 1 where it is the case.

    Args:
        sizes: Number of classes of each position: one for Discrete, all for MultiDiscrete.
        frames: Number of frames in one leaf.

    Example:
        >>> OneHotEncoder((2, 3))(torch.tensor([[1, 2]]))
        tensor([[0., 1., 0., 0., 1.]])
    """

    def __init__(self, sizes: Sequence[int], frames: int = 1) -> None:
        super().__init__()
        self.codes = _Codes(sizes, frames)
        self.num_features = frames * sum(sizes)
        self._shape = frames, sum(sizes)

    def forward(self, classes: Tensor) -> Tensor:
        """Features `[B, num_features]` of classes `[B, ...]`, counted from 0."""
        zeros = torch.zeros(len(classes), *self._shape, device=classes.device)
        return zeros.scatter(-1, self.codes(classes), 1.0).flatten(1)


class EmbeddingEncoder(nn.Module):
    """A learned vector for each class, initially standard normal.

    Args:
        sizes: Number of classes of each position: one for Discrete, all for MultiDiscrete.
        width: Length of a vector.
        generator: As for `MLP`.
        frames: Number of frames in one leaf.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        width: int,
        generator: torch.Generator | None,
        frames: int = 1,
    ) -> None:
        super().__init__()
        self.codes = _Codes(sizes, frames)
        self.num_features = frames * len(sizes) * width
        device = "meta" if generator is None else "cpu"
        # The positions' tables one below the other: one look-up serves them all.
        self.table = without_values(nn.Embedding, sum(sizes), width, device=device)
        if generator is not None:
            nn.init.normal_(self.table.weight, generator=generator)

    def forward(self, classes: Tensor) -> Tensor:
        """Features `[B, num_features]` of classes `[B, ...]`, counted from 0."""
        features: Tensor = self.table(self.codes(classes))  # [B, frames, P, width]
        return features.flatten(1)


class Chain(nn.Sequential):
    """Layers on top of an encoder.

    Args:
        encoder: From observations `[B, ...]` to features `[B, F]`.
        layers: What takes these features.
    """

    def __init__(self, encoder: nn.Module, layers: MLP) -> None:
        super().__init__(encoder, layers)
        self.num_features = layers.num_features


class TreeEncoder(nn.Module):
    """The features of all leaves of an observation, side by side.

    Args:
        encoders: Encoder by the path of its leaf, in the order of the features. Leaves that have
            none are not looked at, and need not be there.

    Attributes:
        paths: Paths of the leaves.
        encoders: Their encoders, in the same order.
        num_features: Width of all features together.

    Example:
        >>> encoder = TreeEncoder({"at": OneHotEncoder([3]), "speed": FlatEncoder(1)})
        >>> encoder({"speed": torch.tensor([0.5]), "at": torch.tensor([1])})
        tensor([[0.0000, 1.0000, 0.0000, 0.5000]])
    """

    def __init__(self, encoders: Mapping[str, Any]) -> None:
        super().__init__()
        self.paths = tuple(encoders)
        self.encoders = nn.ModuleList(encoders.values())
        self.num_features = sum(int(encoder.num_features) for encoder in encoders.values())

    def forward(self, obs: Any) -> Tensor:
        """Features `[B, num_features]` of a tree of leaves `[B, ...]`."""
        found = dict(leaves_with_paths(obs))
        parts = zip(self.paths, self.encoders, strict=True)
        return torch.cat([encoder(found[path]) for path, encoder in parts], dim=1)


def encoder_kind(path: str, space: Space, options: EncoderConfig) -> str:
    """The kind of encoder for a leaf: the one that is asked for, or what suits its space.

    Raises:
        SpaceError: There is no encoder for this space.
        ConfigError: What is asked for does not fit the space.
    """
    fitting = _fitting_kinds(space)
    if not fitting:
        where = f" at {path!r}" if path else ""
        raise SpaceError(
            f"no encoder for the observation{where}: got {type(space).__name__}, wanted Box, "
            "Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of them; wrap the "
            "environment, for example with gymnasium.wrappers.TransformObservation"
        )
    kind = options.kind or fitting[0]
    if kind not in fitting:
        known = ", ".join(map(repr, fitting))
        raise ConfigError(f"encoders: {path!r} is {space}: {kind!r} does not fit, use {known}")
    if options.features is not None and kind in ("flat", "one_hot"):
        raise ConfigError(
            f"encoders: {path!r} has features={options.features}, but {kind!r} has no width to "
            "choose; leave it out, or use 'mlp'"
        )
    return kind


def _fitting_kinds(space: Space) -> tuple[str, ...]:
    """Kinds of encoders for a space, the usual one first."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return "one_hot", "embedding", "mlp"
    if is_image(space):
        return "cnn", "flat", "mlp"
    return ("flat", "mlp") if isinstance(space, spaces.Box | spaces.MultiBinary) else ()


def make_encoder(
    space: Space,
    config: PolicyConfig,
    generator: torch.Generator | None,
    *,
    skip: Collection[str] = (),
) -> Any:
    """Build what turns observations of a space into features.

    Args:
        space: Of one observation, nested or not.
        config: Options of the encoders; `frame_stack` says how many frames a leaf has.
        generator: As for `MLP`.
        skip: Paths of leaves, or of groups of leaves, that do not enter.

    Returns:
        A module from (normalised) leaves `[B, ...]` to features `[B, num_features]`: a
        `TreeEncoder` for nested observations, else the encoder of the only leaf.

    Raises:
        SpaceError: There is no encoder for a leaf.
        ConfigError: An option does not fit its leaf, a path leads nowhere, or nothing is left.

    Example:
        >>> space = spaces.Dict(at=spaces.Discrete(3), speed=spaces.Box(-1.0, 1.0))
        >>> encoder = make_encoder(space, PolicyConfig(), torch.Generator().manual_seed(0))
        >>> encoder.paths, encoder.num_features
        (('at', 'speed'), 4)
    """
    tree = sub_spaces(space)
    named = list(leaves_with_paths(tree))
    _check_paths([path for path, _ in named], config)
    encoders = {
        path: _leaf_encoder(path, leaf, config, generator)
        for path, leaf in named
        if not any(entry in ("", path) or path.startswith(f"{entry}/") for entry in skip)
    }
    if not encoders:
        raise ConfigError(f"critic_only leaves nothing to see for the actor, got {list(skip)}")
    return TreeEncoder(encoders) if isinstance(tree, dict | tuple) else encoders[""]


def _check_paths(paths: Sequence[str], config: PolicyConfig) -> None:
    if len(set(paths)) < len(paths):
        raise SpaceError(
            f"two leaves of the observation space have the same path, got {list(paths)}; "
            "use keys without slashes"
        )
    ends = [(path, position) for path in paths for position, c in enumerate(path) if c == "/"]
    groups = [path[:position] for path, position in ends]
    for setting, given, known in (
        ("encoders", config.encoders, paths),
        ("critic_only", config.critic_only, [*paths, *groups]),
    ):
        for path in given:
            if path not in known and list(paths) == [""]:
                raise ConfigError(
                    f"{setting}: {path!r} leads nowhere, since the observation is not nested; "
                    "the path of the whole is ''"
                )
            if path not in known:
                raise NearestError(path, sorted(set(known)), f"path in {setting}")


def _leaf_encoder(
    path: str, space: Any, config: PolicyConfig, generator: torch.Generator | None
) -> nn.Module:
    options, frames = config.encoder(path), config.frame_stack
    kind = encoder_kind(path, space, options)
    if kind == "cnn":
        width = options.features or config.cnn_features
        try:
            return NatureCNN(space.shape, generator, width, config.precision, frames)
        except ValueError as error:
            raise ConfigError(f"encoders: {path!r}: {error}") from error
    width = options.features or _USUAL_FEATURES.get(kind, 0)
    if kind == "embedding":
        return EmbeddingEncoder(_num_classes(space), width, generator, frames)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        encoder: Any = OneHotEncoder(_num_classes(space), frames)
    else:
        encoder = FlatEncoder(frames * math.prod(space.shape))
    if kind == "mlp":
        encoder = Chain(encoder, _layers(encoder.num_features, (width,), config, generator))
    return cast("nn.Module", encoder)


def _num_classes(space: Any) -> list[int]:
    """Number of classes of each position of a Discrete or MultiDiscrete."""
    sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
    return [int(size) for size in np.ravel(sizes)]


def _layers(
    width: int,
    sizes: Sequence[int],
    config: PolicyConfig,
    generator: torch.Generator | None,
) -> MLP:
    return MLP(width, sizes, config.activation, generator, config.layer_norm)


def make_body(
    space: Space,
    config: PolicyConfig,
    hidden_sizes: Sequence[int],
    generator: torch.Generator | None,
    *,
    skip: Collection[str] = (),
) -> Any:
    """Build encoder and hidden layers; arguments and errors are those of `make_encoder`.

    Returns:
        A module from (normalised) leaves `[B, ...]` to features `[B, num_features]`: an `MLP` for
        an observation that is one vector, else an encoder with an `MLP` behind it, or alone where
        there are no hidden layers.
    """
    encoder = make_encoder(space, config, generator, skip=skip)
    if not hidden_sizes and not isinstance(encoder, FlatEncoder):
        return encoder
    layers = _layers(encoder.num_features, hidden_sizes, config, generator)
    # An MLP flattens its input by itself.
    return layers if isinstance(encoder, FlatEncoder) else Chain(encoder, layers)
