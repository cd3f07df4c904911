"""Policies: the protocol, the default `ActorCritic` and its parts."""

from ppo.policies.actor_critic import ActorCritic, make_policy
from ppo.policies.bodies import MLP, NatureCNN
from ppo.policies.normalizer import ObservationNormalizer
from ppo.policies.options import EncoderConfig, PolicyConfig
from ppo.policies.protocol import Actor, Evaluation, Policy

__all__ = [
    "MLP",
    "Actor",
    "ActorCritic",
    "EncoderConfig",
    "Evaluation",
    "NatureCNN",
    "ObservationNormalizer",
    "Policy",
    "PolicyConfig",
    "make_policy",
]
