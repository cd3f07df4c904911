"""One small instance of every family of distributions, and what it depends on."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ppo.distributions import (
    GSDE,
    Bernoulli,
    Beta,
    Categorical,
    DiagonalGaussian,
    Joint,
    MultiCategorical,
    SquashedGaussian,
)

ROWS = 3
LOW, HIGH = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 7.0])
MASK = torch.tensor([[True, False, True], [True, True, True], [False, True, False]])
# Of positions with 3, 2 and 2 classes; the last four are also those of two bits.
MULTI_MASK = torch.tensor(
    [
        [True, False, True, True, True, False, True],
        [True, True, True, True, False, True, True],
        [False, True, False, False, True, True, False],
    ]
)


def normal(seed, *shape, scale=1.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape))


def small_joint(logits, mean, log_std, bits):
    gaussian = DiagonalGaussian(mean, log_std)
    return Joint({"b": (Categorical(logits, MASK), gaussian), "a": Bernoulli(bits)})


def above_one(seed, *shape, scale=1.0):
    return normal(seed, *shape, scale=scale).abs() + 1.0


@dataclass(frozen=True)
class Family:
    """`build(*parameters)` is a distribution; `draw` makes parameters of these `shapes`."""

    kind: type
    build: Any
    shapes: tuple[tuple[int, ...], ...]
    draw: Any = normal

    def parameters(self, seed, scale=0.7):
        return [self.draw(seed + k, *shape, scale=scale) for k, shape in enumerate(self.shapes)]

    def dist(self, seed, scale=0.7):
        return self.build(*self.parameters(seed, scale))


WIDE, TALL = (ROWS, 2), (ROWS, 3)
FAMILIES = {
    "categorical": Family(Categorical, Categorical, (TALL,)),
    "masked categorical": Family(Categorical, lambda x: Categorical(x, MASK), (TALL,)),
    "multi-categorical": Family(
        MultiCategorical, lambda x: MultiCategorical(x, (3, 2, 2)), ((ROWS, 7),)
    ),
    "masked multi-categorical": Family(
        MultiCategorical, lambda x: MultiCategorical(x, (3, 2, 2), MULTI_MASK), ((ROWS, 7),)
    ),
    "bernoulli": Family(Bernoulli, Bernoulli, (WIDE,)),
    "masked bernoulli": Family(Bernoulli, lambda x: Bernoulli(x, MULTI_MASK[:, 3:7]), (WIDE,)),
    "gaussian": Family(DiagonalGaussian, DiagonalGaussian, (WIDE, (2,))),
    "gaussian with a std per row": Family(DiagonalGaussian, DiagonalGaussian, (WIDE, WIDE)),
    "squashed": Family(
        SquashedGaussian, lambda m, s: SquashedGaussian(m, s, LOW, HIGH), (WIDE, (2,))
    ),
    "squashed with a std per row": Family(
        SquashedGaussian, lambda m, s: SquashedGaussian(m, s, LOW, HIGH), (WIDE, WIDE)
    ),
    "beta": Family(Beta, lambda a, b: Beta(a, b, LOW, HIGH), (WIDE, WIDE), above_one),
    "gsde": Family(GSDE, GSDE, (WIDE, (ROWS, 4), (4, 2))),
    "joint": Family(Joint, small_joint, (TALL, WIDE, (2,), WIDE)),
}
