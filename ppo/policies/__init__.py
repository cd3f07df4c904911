"""Policies: the protocol, the default `ActorCritic` and its parts."""

from ppo.policies.actor_critic import ActorCritic, make_policy
from ppo.policies.bodies import MLP, NatureCNN
from ppo.policies.encoders import (
    EmbeddingEncoder,
    FlatEncoder,
    OneHotEncoder,
    TreeEncoder,
    make_body,
    make_encoder,
)
from ppo.policies.memory import AttentionMemory, GRUMemory, LSTMMemory, make_memory
from ppo.policies.normalizer import ObservationNormalizer, TreeNormalizer, make_normalizer
from ppo.policies.options import EncoderConfig, PolicyConfig
from ppo.policies.protocol import Actor, Evaluation, Policy, RecurrentActor

__all__ = [
    "MLP",
    "Actor",
    "ActorCritic",
    "AttentionMemory",
    "EmbeddingEncoder",
    "EncoderConfig",
    "Evaluation",
    "FlatEncoder",
    "GRUMemory",
    "LSTMMemory",
    "NatureCNN",
    "ObservationNormalizer",
    "OneHotEncoder",
    "Policy",
    "PolicyConfig",
    "RecurrentActor",
    "TreeEncoder",
    "TreeNormalizer",
    "make_body",
    "make_encoder",
    "make_memory",
    "make_normalizer",
    "make_policy",
]
