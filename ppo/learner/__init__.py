"""The gradient steps of an update behind one small interface."""

from ppo.learner.learner import Learner
from ppo.learner.settings import LearnerSettings

__all__ = ["Learner", "LearnerSettings"]
