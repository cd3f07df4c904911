"""From a feature vector to a distribution over actions: one head per kind of action space."""

from ppo.policies.heads.action_head import ActionHead
from ppo.policies.heads.box import BetaHead, GaussianHead, GSDEHead, SquashedGaussianHead
from ppo.policies.heads.discrete import BernoulliHead, CategoricalHead, MultiCategoricalHead
from ppo.policies.heads.joint import JointHead, make_action_head

__all__ = [
    "ActionHead",
    "BernoulliHead",
    "BetaHead",
    "CategoricalHead",
    "GSDEHead",
    "GaussianHead",
    "JointHead",
    "MultiCategoricalHead",
    "SquashedGaussianHead",
    "make_action_head",
]
