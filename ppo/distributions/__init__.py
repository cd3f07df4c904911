"""Action distributions: one class per family, all maths in float32 or better.

A distribution is a batch `[B]` of independent densities over one action each. Randomness has an
owner: `sample` maps *given* noise to actions, `draw_noise` draws such noise from a NumPy generator
that the caller owns, so an action depends on (seed, environment, step) and on nothing else.
"""

from ppo.distributions.bernoulli import Bernoulli
from ppo.distributions.beta import Beta
from ppo.distributions.categorical import Categorical
from ppo.distributions.gaussian import DiagonalGaussian
from ppo.distributions.gsde import GSDE
from ppo.distributions.joint import Joint
from ppo.distributions.multi_categorical import MultiCategorical
from ppo.distributions.protocol import Distribution
from ppo.distributions.squashed import SquashedGaussian

__all__ = [
    "GSDE",
    "Bernoulli",
    "Beta",
    "Categorical",
    "DiagonalGaussian",
    "Distribution",
    "Joint",
    "MultiCategorical",
    "SquashedGaussian",
]
