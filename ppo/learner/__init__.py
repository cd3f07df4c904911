"""The gradient steps of an update behind one small interface."""

from ppo.learner.learner import Learner

__all__ = ["Learner"]
