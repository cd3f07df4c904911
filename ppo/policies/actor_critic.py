"""The default policy: normaliser, bodies and heads, and `make_policy` that assembles them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from ppo.distributions import Distribution
from ppo.errors import SpaceError
from ppo.policies.bodies import MLP, NatureCNN, orthogonal_linear
from ppo.policies.heads import make_action_head
from ppo.policies.normalizer import ObservationNormalizer
from ppo.policies.options import PolicyConfig
from ppo.policies.protocol import Actor, Evaluation
from ppo.policies.snapshot import snapshot
from ppo.spaces import check_observation_space, is_image

__all__ = ["ActorCritic", "blank_policy", "make_policy"]


class ActorCritic(nn.Module):
    """Actor and critic over one observation, with separate or shared bodies.

    Usually made by `make_policy`. Observations go in raw: normalisation is part of the module.

    Args:
        observation_space: Box, vector or image.
        action_space: Discrete or Box.
        config: Sizes and options.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        space = check_observation_space(observation_space)
        image = is_image(space)
        self.normalizer: nn.Module = (
            ObservationNormalizer(space.shape, config.observation_clip)
            if config.normalize_observations and not image
            else nn.Identity()
        )

        def make_body() -> nn.Module:
            sizes, activation = config.hidden_sizes, config.activation
            if not image:
                return MLP(math.prod(space.shape), sizes, activation, generator)
            encoder = NatureCNN(space.shape, generator, config.cnn_features, config.precision)
            if not sizes:
                return encoder
            mlp = MLP(encoder.num_features, sizes, activation, generator)
            return nn.Sequential(encoder, mlp)

        width = config.hidden_sizes[-1] if config.hidden_sizes else math.prod(space.shape)
        if image and not config.hidden_sizes:
            width = config.cnn_features
        self.shared = config.shared
        self.actor_body = make_body()
        self.action_head = make_action_head(action_space, width, config, generator)
        self.critic_body = self.actor_body if config.shared else make_body()
        self.value_head = orthogonal_linear(width, 1, 1.0, generator)
        self.observation_space = observation_space
        self.action_space = action_space
        self._image = image
        self._vector_actions = isinstance(action_space, gymnasium.spaces.Box)

    def _features(self, obs: Tensor) -> Tensor:
        if obs.shape[1:] != self.observation_space.shape:
            raise SpaceError(
                f"obs must be [B, ...] with rows of shape {self.observation_space.shape}, "
                f"got {tuple(obs.shape)}"
            )
        # Images stay uint8 until the encoder.
        features: Tensor = obs if self._image else self.normalizer(obs.float())
        return features.unsqueeze(-1) if features.ndim == 1 else features

    def distribution(self, obs: Tensor) -> Distribution:
        """Distribution over raw actions for observations `[B, ...]`."""
        distribution: Distribution = self.action_head(self.actor_body(self._features(obs)))
        return distribution

    @torch.no_grad()
    def act(
        self,
        obs: Tensor,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
    ) -> Tensor:
        """Raw actions `[B, ...]` for observations `[B, ...]`.

        Args:
            obs: Raw observations `[B, ...]`.
            noise: Noise from `draw_noise`, one row per observation, `[B, k]`.
            generator: CPU generator to seed such noise from, where none is given.
            deterministic: Take the mode of the distribution; no randomness is used.

        Returns:
            Classes `[B]` for Discrete, unclipped vectors `[B, ...]` for Box.
        """
        distribution = self.distribution(obs)
        if deterministic:
            actions: Tensor = distribution.mode()
        else:
            if noise is None:
                noise = self._noise_from(generator, len(obs)).to(obs.device)
            actions = distribution.sample(noise)
        return actions.reshape(len(obs), *(self.action_space.shape or ()))

    def _noise_from(self, generator: torch.Generator | None, num_rows: int) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.from_numpy(self.draw_noise(np.random.default_rng(seed), num_rows))

    def evaluate(self, obs: Tensor, actions: Tensor) -> Evaluation:
        """Log-probabilities, entropies and values `[B]` of given observations and actions.

        Args:
            obs: Raw observations `[B, ...]`.
            actions: Raw actions `[B, ...]`, as returned by `act`.
        """
        features = self._features(obs)
        actor_features = self.actor_body(features)
        critic_features = actor_features if self.shared else self.critic_body(features)
        distribution: Distribution = self.action_head(actor_features)
        if self._vector_actions:
            actions = actions.reshape(len(actions), math.prod(self.action_space.shape or ()))
        return Evaluation(
            distribution.log_prob(actions),
            distribution.entropy(),
            self.value_head(critic_features).squeeze(-1),
        )

    def value(self, obs: Tensor) -> Tensor:
        """State values `[B]`."""
        values: Tensor = self.value_head(self.critic_body(self._features(obs))).squeeze(-1)
        return values

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Noise `[num_steps, k]` for that many actions of one environment."""
        return self.action_head.draw_noise(rng, num_steps)

    def snapshot(self) -> Actor | None:
        """A NumPy copy of the actor for worker processes, or None where torch should act."""
        if type(self) is not ActorCritic:
            return None  # its methods may say anything
        shape = (self.action_space.shape or ()) if self._vector_actions else ()
        return snapshot(self.normalizer, self.actor_body, self.action_head, shape)

    def update_normalizer(self, obs: Tensor) -> None:
        """Fold raw observations `[B, ...]` into the running moments, if there are any."""
        if isinstance(self.normalizer, ObservationNormalizer):
            self.normalizer.update(obs)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by network: `actor` and `critic`, or `policy` where they share a body."""
        if self.shared:
            return {"policy": list(self.parameters())}
        actor = [*self.actor_body.parameters(), *self.action_head.parameters()]
        critic = [*self.critic_body.parameters(), *self.value_head.parameters()]
        return {"actor": actor, "critic": critic}


def make_policy(
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    config: PolicyConfig = PolicyConfig(),
    *,
    seed: int = 0,
) -> ActorCritic:
    """Build the default policy for a pair of spaces.

    Args:
        observation_space: Box: a vector of any shape, or a uint8 image.
        action_space: Discrete, or Box of floating type.
        config: Sizes and options.
        seed: Seeds the initial weights; no global generator is used.

    Returns:
        An `ActorCritic` in float32 on the CPU.

    Raises:
        SpaceError: A space is not supported.

    Example:
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = make_policy(env.observation_space, env.action_space)
        >>> policy.act(torch.zeros(5, 4), deterministic=True).shape
        torch.Size([5])
    """
    generator = torch.Generator().manual_seed(seed)
    return ActorCritic(observation_space, action_space, config, generator)


def blank_policy(
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    config: PolicyConfig,
    tensors: Mapping[str, Tensor],
) -> ActorCritic:
    """Build the policy that `tensors` are to be loaded into; its own are not initialised.

    Names and shapes are compared before memory is taken, so sizes beyond reason cost nothing.

    Raises:
        SpaceError: A space is not supported.
        ValueError: The tensors are not those of such a policy.
    """
    # Even without weights a layer takes a moment to make, and each one has tensors of its own.
    if len(config.hidden_sizes) > len(tensors):
        raise ValueError(
            f"there are {len(tensors)} tensors for {len(config.hidden_sizes)} hidden layers"
        )
    policy = ActorCritic(observation_space, action_space, config, None)
    shapes = {name: list(tensor.shape) for name, tensor in policy.state_dict().items()}
    for name in sorted(shapes.keys() | tensors.keys()):
        given = list(tensors[name].shape) if name in tensors else "missing"
        wanted = shapes.get(name, "no such tensor")
        if given != wanted:
            raise ValueError(f"{name} has shape {given}, the configured policy: {wanted}")
    return policy.to_empty(device="cpu")
