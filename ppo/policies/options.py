"""`PolicyConfig`: what `make_policy` builds."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

from ppo.config_parsing import check_fields, parse_dataclass
from ppo.errors import ConfigError
from ppo.nearest import names_the_nearest
from ppo.policies.bodies import ACTIVATIONS

__all__ = ["EncoderConfig", "PolicyConfig"]


@names_the_nearest
@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """How one leaf of the observation becomes features.

    Attributes:
        kind: `"flat"` (numbers as they are, normalised; binary ones as 0 and 1), `"one_hot"`,
            `"embedding"` (for Discrete and MultiDiscrete), `"cnn"` (for images), `"mlp"` (a layer
            on top of `"flat"` or `"one_hot"`); None takes what suits the space.
        features: Width of the output of `"embedding"` (per number), `"cnn"` and `"mlp"`; None takes
            the usual one.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> embedded = EncoderConfig(kind="embedding", features=8)
        >>> PolicyConfig(encoders={"room": embedded}).encoder("room").features
        8
    """

    kind: Literal["flat", "one_hot", "embedding", "cnn", "mlp"] | None = None
    features: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.features is not None and self.features < 1:
            raise ConfigError(f"features must be at least 1, got {self.features}")


@names_the_nearest
@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape of the default policy.

    Attributes:
        hidden_sizes: Widths of the hidden layers of each body.
        critic_hidden_sizes: Widths for the critic's body; None takes `hidden_sizes`.
        activation: `"tanh"`, `"relu"`, `"elu"`, `"gelu"` or `"silu"`.
        layer_norm: Normalise the inputs of every activation (Ba et al. 2016).
        shared: One body for actor and critic instead of two.
        encoders: Options for single leaves of the observation, by path (`"camera"`,
            `"arm/joints"`, `"0"`; `""` for an observation that is not nested): an `EncoderConfig`,
            or its settings.
        critic_only: Paths of the leaves (or of the groups of leaves) that only the critic sees
            (Pinto et al. 2018, asymmetric actor-critic).
        cnn_features: Width of the image encoder's output.
        precision: Of the image encoder's products: `"float32"`, or `"bfloat16"`, about twice as
            fast on processors that have it; parameters, losses and advantages stay float32.
        frame_stack: Number of latest observations that the policy sees at once; 1 is the current
            one alone. Before an episode has so many, its first one is repeated.
        memory: What remembers behind each body: `"lstm"`, `"gru"` or `"attention"` (a causal
            transformer layer over the latest steps); None for no memory.
        memory_size: Width of the memory; for attention a multiple of 4.
        memory_window: Steps that attention looks back on, the present one included.
        memory_steps: Steps through which the gradient flows back in time (truncated
            backpropagation); what lies further back still reaches the memory.
        distribution: Family for Box actions: `"gaussian"` (clipped at the environment),
            `"squashed"` (tanh of a Gaussian, scaled to the bounds), `"beta"` (on the bounds) or
            `"gsde"` (state-dependent exploration, Raffin et al. 2021).
        state_dependent_std: The standard deviation is an output of the network instead of a
            parameter (for `"gaussian"` and `"squashed"`).
        gsde_steps: Steps after which `"gsde"` draws its exploration matrix anew; None draws once
            per rollout.
        log_std_init: Initial log standard deviation of Gaussian actions. At exp(-0.5) = 0.6 runs
            start better than at 1 (Andrychowicz et al. 2021, section 3.2).
        log_std_min: Lower bound of the log standard deviation.
        log_std_max: Upper bound of the log standard deviation.
        output_gain: Gain of the policy's last layer; small, so that the first actions do not
            depend on the observation (Andrychowicz et al. 2021, section 3.2).
        normalize_observations: Keep running moments and normalise (not for images).
        observation_clip: Bound on normalised observations, in standard deviations.

    Raises:
        ConfigError: A value is out of range.

    Example:
        >>> PolicyConfig(hidden_sizes=(256, 256), activation="relu").shared
        False
        >>> PolicyConfig(encoders={"camera": {"kind": "cnn", "features": 64}}).encoders["camera"]
        EncoderConfig(kind='cnn', features=64)
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    critic_hidden_sizes: tuple[int, ...] | None = None
    activation: str = "tanh"
    layer_norm: bool = False
    shared: bool = False
    # Mappings have no hash; configs that differ in nothing else may share theirs.
    encoders: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    critic_only: tuple[str, ...] = ()
    cnn_features: int = 512
    precision: Literal["float32", "bfloat16"] = "float32"
    frame_stack: int = 1
    memory: Literal["lstm", "gru", "attention"] | None = None
    memory_size: int = 64
    memory_window: int = 16
    memory_steps: int = 16
    distribution: Literal["gaussian", "squashed", "beta", "gsde"] = "gaussian"
    state_dependent_std: bool = False
    gsde_steps: int | None = None
    log_std_init: float = -0.5
    log_std_min: float = -5.0
    log_std_max: float = 2.0
    output_gain: float = 0.01
    normalize_observations: bool = True
    observation_clip: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("hidden_sizes", "critic_hidden_sizes"):
            if any(size < 1 for size in getattr(self, name) or ()):
                raise ConfigError(f"{name} must be positive integers, got {getattr(self, name)}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )
        sizes = ("cnn_features", "frame_stack", "memory_size", "memory_window", "memory_steps")
        for name in (*sizes, "gsde_steps", "output_gain", "observation_clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {value}")
        if self.memory == "attention" and self.memory_size % 4:
            raise ConfigError(
                f"memory_size must be a multiple of 4 for attention, got {self.memory_size}"
            )
        if self.state_dependent_std and self.distribution not in ("gaussian", "squashed"):
            raise ConfigError(
                f"state_dependent_std is for gaussian and squashed, got {self.distribution!r}, "
                "whose spread depends on the state by itself; leave it out"
            )
        if self.shared and self.critic_hidden_sizes is not None:
            raise ConfigError("critic_hidden_sizes has no meaning for a shared body; leave it out")
        if self.shared and self.critic_only:
            raise ConfigError("critic_only needs bodies of their own; use shared=False")
        if not self.log_std_min <= self.log_std_init <= self.log_std_max:
            raise ConfigError(
                f"log_std_init must lie in [log_std_min, log_std_max] = "
                f"[{self.log_std_min}, {self.log_std_max}], got {self.log_std_init}"
            )
        encoders = {str(path): _encoder(path, given) for path, given in self.encoders.items()}
        object.__setattr__(self, "encoders", encoders)

    def encoder(self, path: str) -> EncoderConfig:
        """Options for the leaf of that path."""
        options: EncoderConfig = self.encoders.get(path, EncoderConfig())
        return options


def _encoder(path: str, given: Any) -> EncoderConfig:
    if isinstance(given, EncoderConfig):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(f"encoders: {path!r} must be a group of settings, got {given!r}")
    try:
        return parse_dataclass(EncoderConfig, given)
    except ConfigError as error:
        raise ConfigError(f"encoders: {path!r}: {error}") from error
