"""`PolicyConfig`: what `make_policy` builds."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ppo.config_parsing import check_fields
from ppo.errors import ConfigError
from ppo.policies.bodies import ACTIVATIONS

__all__ = ["PolicyConfig"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Shape of the default policy.

    Attributes:
        hidden_sizes: Widths of the hidden layers of each body.
        activation: `"tanh"`, `"relu"`, `"elu"`, `"gelu"` or `"silu"`.
        shared: One body for actor and critic instead of two.
        cnn_features: Width of the image encoder's output.
        precision: Of the image encoder's products: `"float32"`, or `"bfloat16"`, about twice as
            fast on processors that have it; parameters, losses and advantages stay float32.
        memory: Recurrent core; only None (no memory) so far.
        memory_size: Width of the recurrent core.
        distribution: Family for Box actions; only `"gaussian"` so far.
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
    """

    hidden_sizes: tuple[int, ...] = (64, 64)
    activation: str = "tanh"
    shared: bool = False
    cnn_features: int = 512
    precision: Literal["float32", "bfloat16"] = "float32"
    memory: Literal["lstm", "gru"] | None = None
    memory_size: int = 64
    distribution: Literal["gaussian", "squashed", "beta", "gsde"] = "gaussian"
    log_std_init: float = -0.5
    log_std_min: float = -5.0
    log_std_max: float = 2.0
    output_gain: float = 0.01
    normalize_observations: bool = True
    observation_clip: float = 10.0

    def __post_init__(self) -> None:
        check_fields(self)
        if any(size < 1 for size in self.hidden_sizes):
            raise ConfigError(f"hidden_sizes must be positive integers, got {self.hidden_sizes}")
        if self.activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation must be one of {sorted(ACTIVATIONS)}, got {self.activation!r}"
            )
        if self.memory is not None:
            raise ConfigError(f"memory={self.memory!r} is not available yet; use None")
        if self.distribution != "gaussian":
            raise ConfigError(
                f"distribution={self.distribution!r} is not available yet; use 'gaussian'"
            )
        for name in ("cnn_features", "memory_size", "output_gain", "observation_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be positive and finite, got {getattr(self, name)}")
        if not self.log_std_min <= self.log_std_init <= self.log_std_max:
            raise ConfigError(
                f"log_std_init must lie in [log_std_min, log_std_max] = "
                f"[{self.log_std_min}, {self.log_std_max}], got {self.log_std_init}"
            )
