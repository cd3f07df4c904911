"""Proximal Policy Optimization: exact at episode boundaries, easy to take apart.

Two lines are enough::

    agent = PPOAgent().learn("Pendulum-v1", steps=200_000)
    agent.save("pendulum.safetensors")
"""

from ppo import errors
from ppo._version import __version__
from ppo.advantages import (
    AdvantageEstimate,
    discounted_returns,
    gae,
    lambda_returns,
    n_step_returns,
    normalize,
)
from ppo.agent import PPOAgent
from ppo.collector import RolloutCollector
from ppo.config import PPOConfig
from ppo.diagnostics import explained_variance
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
from ppo.errors import PPOError
from ppo.evaluation import EvaluationResult, evaluate
from ppo.losses import PPOLoss, approximate_kl, ppo_loss
from ppo.policies import (
    ActorCritic,
    EncoderConfig,
    Evaluation,
    Policy,
    PolicyConfig,
    make_policy,
)
from ppo.policies.state import PolicyState
from ppo.report import Report
from ppo.revaluation import revalue
from ppo.rollout import Batch, Episode, Rollout
from ppo.schedules import Constant, Linear, Schedule
from ppo.statistics import RewardScaler

__all__ = [
    "GSDE",
    "ActorCritic",
    "AdvantageEstimate",
    "Batch",
    "Bernoulli",
    "Beta",
    "Categorical",
    "Constant",
    "DiagonalGaussian",
    "EncoderConfig",
    "Episode",
    "Evaluation",
    "EvaluationResult",
    "Joint",
    "Linear",
    "MultiCategorical",
    "PPOAgent",
    "PPOConfig",
    "PPOError",
    "PPOLoss",
    "Policy",
    "PolicyConfig",
    "PolicyState",
    "Report",
    "RewardScaler",
    "Rollout",
    "RolloutCollector",
    "Schedule",
    "SquashedGaussian",
    "__version__",
    "approximate_kl",
    "discounted_returns",
    "errors",
    "evaluate",
    "explained_variance",
    "gae",
    "lambda_returns",
    "make_policy",
    "n_step_returns",
    "normalize",
    "ppo_loss",
    "revalue",
]
