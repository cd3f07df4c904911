"""What a `Learner` is told once, in one object."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, Literal

from typing_extensions import Self

__all__ = ["LearnerSettings"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """The settings of a learner; names and meanings are those of `PPOConfig`.

    Attributes:
        num_epochs: Passes over the batch.
        minibatch_size: Rows per gradient step.
        value_coef: Weight of the value loss.
        value_clip_range: ε of the value clip, or None.
        dual_clip: c of the dual clip, or None.
        max_grad_norm: Limit on the gradient norm of each network.
        target_kl: Stop after an epoch whose mean KL exceeds this, or None.
        adaptive_kl: KL per update for which the learning rate is adapted, or None.
        normalize_advantages: `"minibatch"` to normalise those of each minibatch by itself.
        optimizer: `"adam"`, or the name of a class in `torch.optim`.
        optimizer_kwargs: Arguments of that class.
        adam_eps: Denominator floor of `"adam"`.
        weight_decay: Decoupled weight decay of `"adam"`.
        learning_rates: Groups of parameters that have a learning rate of their own.
    """

    num_epochs: int
    minibatch_size: int
    value_coef: float
    value_clip_range: float | None
    dual_clip: float | None = None
    max_grad_norm: float
    target_kl: float | None
    adaptive_kl: float | None = None
    normalize_advantages: Literal["rollout", "minibatch", "none"]
    optimizer: str = "adam"
    optimizer_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adam_eps: float
    weight_decay: float = 0.0
    learning_rates: Collection[str] = ()

    @classmethod
    def of(cls, config: object) -> Self:
        """Take the settings from an object that has them under the same names."""
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: getattr(config, name) for name in names})
