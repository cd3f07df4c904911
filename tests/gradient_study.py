"""A policy with its recorded and its eager gradient, side by side."""

import torch

from ppo.learner.eager import EagerGradient
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.learner import parameter_groups
from ppo.learner.recorded import RecordedGradient


class GradientStudy:
    """What tests of recordings look at; how close both must be, each of them says itself."""

    def __init__(self, policy):
        self.policy = policy
        self.optimizer = FlatAdam(parameter_groups(policy), 1e-5)
        self.recorded = RecordedGradient(policy, self.optimizer)
        self.eager = EagerGradient(policy, self.optimizer)
        self.begin()

    def begin(self):
        self.optimizer.bind()
        self.recorded.begin()

    def replays(self):
        """How often each recording was replayed; none where autograd does the work."""
        return self.recorded.replays if self.recorded._repeatable else []

    def gradient(self, gradient, batch, loss):
        for vector in self.optimizer.gradients:
            vector.fill_(torch.nan)  # every entry must be written
        metrics = [float(metric) for metric in gradient(batch, loss)]
        return metrics, [vector.clone() for vector in self.optimizer.gradients]


def arrays_of(batch):
    """The batch as one minibatch of arrays."""
    (whole,) = batch.minibatches(len(batch), arrays=True)
    return whole
