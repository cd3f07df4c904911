"""The default policy: normaliser, bodies, memories and heads, and `make_policy` joins them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn

from ppo.distributions import Distribution
from ppo.errors import SpaceError
from ppo.frames import newest
from ppo.policies.bodies import orthogonal_linear, with_memory
from ppo.policies.encoders import make_body
from ppo.policies.heads import make_action_head
from ppo.policies.memory import make_memory
from ppo.policies.normalizer import ObservationNormalizer, TreeNormalizer, make_normalizer
from ppo.policies.options import PolicyConfig
from ppo.policies.protocol import Actor, Evaluation, RecurrentActor
from ppo.policies.snapshot import snapshot
from ppo.sequences import Sequences
from ppo.spaces import (
    MASK_KEY,
    ActionMasks,
    ObservationLayout,
    Space,
    check_observation_space,
    make_action_adapter,
    sub_spaces,
)
from ppo.trees import leaves_with_paths, map_tree

__all__ = ["ActorCritic", "blank_policy", "make_policy"]

_PRECISIONS = {torch.float32, torch.float64}


class ActorCritic(nn.Module):
    """Actor and critic over one observation, with separate or shared bodies.

    Usually made by `make_policy`. Observations go in raw: normalisation is part of the module.
    Its parts compose: whatever encodes the observation (`actor_body`, `critic_body`), an optional
    memory behind each body, and a head for the actions.

    Args:
        observation_space: Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of them.
        action_space: As the observation's.
        config: Sizes and options.
        generator: Draws the initial weights; None leaves them on the `meta` device, without values.

    Attributes:
        observation_space: What it was built for.
        action_space: What it was built for.
        state_size: Numbers in its memory, of actor and critic together; 0 without.
        memory_steps: Steps the gradient flows back through the memory.
        frame_stack: Latest observations it sees at once.
        squashed: Its Box actions are from before a tanh.
    """

    def __init__(
        self,
        observation_space: gymnasium.Space[Any],
        action_space: gymnasium.Space[Any],
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        check_observation_space(observation_space)
        self.observation_space = observation_space
        self.action_space = action_space
        self.shared = config.shared
        self.frame_stack = config.frame_stack
        self.memory_steps = config.memory_steps
        self._layout = ObservationLayout(observation_space).leaves
        self._raw_actions = make_action_adapter(action_space).leaves
        masks = ActionMasks(action_space)
        self._mask_in_obs = masks.lie_in(observation_space)
        hidden = (MASK_KEY,) if self._mask_in_obs else ()  # a mask is no feature
        unseen = (*hidden, *config.critic_only)
        self.normalizer = make_normalizer(observation_space, config, skip=hidden)
        sizes = config.hidden_sizes
        critic_sizes = sizes if config.critic_hidden_sizes is None else config.critic_hidden_sizes

        def remember(width: int) -> Any:
            if config.memory is None:
                return None
            window = config.memory_window
            return make_memory(config.memory, width, config.memory_size, generator, window=window)

        self.actor_body = make_body(observation_space, config, sizes, generator, skip=unseen)
        width = self.actor_body.num_features
        self.actor_memory = remember(width)
        width = config.memory_size if config.memory else width
        self.action_head = make_action_head(action_space, width, config, generator)
        self.critic_body, self.critic_memory = self.actor_body, self.actor_memory
        if not config.shared:
            self.critic_body = make_body(
                observation_space, config, critic_sizes, generator, skip=hidden
            )
            width = self.critic_body.num_features
            self.critic_memory = remember(width)
            width = config.memory_size if config.memory else width
        self.value_head = orthogonal_linear(width, 1, 1.0, generator)
        self.squashed = self.action_head.squashed
        sizes_of_memory = [] if self.actor_memory is None else [self.actor_memory.state_size]
        if self.critic_memory is not None and not config.shared:
            sizes_of_memory.append(self.critic_memory.state_size)
        self.state_size = sum(sizes_of_memory)
        self._state_sizes = sizes_of_memory

    def _features(self, obs: Any) -> Any:
        """Observations as the bodies take them: checked, and normalised."""
        stacked = (self.frame_stack,) if self.frame_stack > 1 else ()
        pairs = map_tree(lambda leaf, tensor: [leaf, tensor], self._layout, obs)
        for path, (leaf, tensor) in leaves_with_paths(pairs):
            if tensor.shape[1:] != (*stacked, *leaf.shape):
                raise SpaceError(
                    f"obs{f' at {path!r}' if path else ''} must be [B, ...] with rows of shape "
                    f"{(*stacked, *leaf.shape)}, got {tuple(tensor.shape)}"
                )
        # Whatever type numbers come in; bytes and classes are the encoders'.
        floats = map_tree(lambda leaf: leaf.float() if leaf.is_floating_point() else leaf, obs)
        return self.normalizer(floats)

    def _mask(self, obs: Any, action_mask: Tensor | None) -> Tensor | None:
        """The mask that was given, or the one in the observation, bool `[B, M]`."""
        if action_mask is None and self._mask_in_obs:
            found = obs[MASK_KEY][:, -1] if self.frame_stack > 1 else obs[MASK_KEY]
            action_mask = found.flatten(1) != 0
        return action_mask

    def distribution(
        self, obs: Any, *, action_mask: Tensor | None = None, state: Tensor | None = None
    ) -> Distribution:
        """Distribution over raw actions for observations `[B, ...]`.

        Args:
            obs: Raw observations.
            action_mask: Legal actions `[B, M]`; None: all, or as the observation says.
            state: Memory `[B, K]`; None at the beginning of episodes.
        """
        features = self.actor_body(self._features(obs))
        if self.actor_memory is not None:
            features, _ = self.actor_memory.step(features, self._states(state, features)[0])
        distribution: Distribution = self.action_head(features, self._mask(obs, action_mask))
        return distribution

    def _states(self, state: Tensor | None, features: Tensor) -> list[Tensor]:
        """Memories of actor and critic, `[B, K]` each; the same one if they share it."""
        if state is None:
            size = len(features), self.state_size
            state = torch.zeros(size, dtype=features.dtype, device=features.device)
        parts = list(state.to(features.dtype).split(self._state_sizes, -1))
        return parts if len(parts) == 2 else [*parts, *parts]

    @torch.no_grad()
    def act(
        self,
        obs: Any,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
        action_mask: Tensor | None = None,
        state: Tensor | None = None,
    ) -> Any:
        """Raw actions `[B, ...]` for observations `[B, ...]`.

        Args:
            obs: Raw observations `[B, ...]`, a tree of tensors for a nested space.
            noise: Noise from `draw_noise`, one row per observation, `[B, k]`.
            generator: CPU generator to seed such noise from, where none is given.
            deterministic: Take the mode of the distribution; no randomness is used.
            action_mask: Legal actions `[B, M]`; None: all, or as the observation says.
            state: Memory `[B, K]`; None at the beginning of episodes.

        Returns:
            Classes for Discrete, unclipped vectors for Box, trees of them for Dict and Tuple; with
            a memory, a pair of these and the new memory `[B, K]`.
        """
        normalized = self._features(obs)
        features = self.actor_body(normalized)
        memory: list[Tensor] = []
        if self.actor_memory is not None:
            before = self._states(state, features)
            features, after = self.actor_memory.step(features, before[0])
            memory.append(after)
            if not self.shared:
                _, after = self.critic_memory.step(self.critic_body(normalized), before[1])
                memory.append(after)
        distribution: Distribution = self.action_head(features, self._mask(obs, action_mask))
        if deterministic:
            flat = distribution.mode()
        else:
            if noise is None:
                noise = self._noise_from(generator, len(features)).to(features.device)
            flat = distribution.sample(noise)
        actions = map_tree(
            lambda leaf, tensor: tensor.reshape(len(tensor), *leaf.shape), self._raw_actions, flat
        )
        return (actions, torch.cat(memory, -1)) if memory else actions

    def _noise_from(self, generator: torch.Generator | None, num_rows: int) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator))
        return torch.from_numpy(self.draw_noise(np.random.default_rng(seed), num_rows))

    def evaluate(
        self,
        obs: Any,
        actions: Any,
        *,
        action_masks: Tensor | None = None,
        sequences: Sequences | None = None,
        entropy: bool = True,
    ) -> Evaluation:
        """Log-probabilities, entropies and values `[B]` of given observations and actions.

        Args:
            obs: Raw observations `[B, ...]`.
            actions: Raw actions `[B, ...]`, as returned by `act`.
            action_masks: Legal actions `[B, M]`; None: all, or as the observation says.
            sequences: With a memory: which rows follow one another; None: each begins an episode.
            entropy: False where entropies are not needed: there are none then, `[0]`.
        """
        normalized = self._features(obs)
        actor = self.actor_body(normalized)
        critic = actor if self.shared else self.critic_body(normalized)
        if self.actor_memory is not None:
            count = len(actor)
            lengths = (1,) * count if sequences is None else sequences.lengths
            states = self._states(None if sequences is None else sequences.states, actor)
            actor = self.actor_memory.replay(actor, Sequences(lengths, states[0]))
            if self.shared:
                critic = actor
            else:
                critic = self.critic_memory.replay(critic, Sequences(lengths, states[1]))
        distribution: Distribution = self.action_head(actor, self._mask(obs, action_masks))
        flat = map_tree(_flat, sub_spaces(self.action_space), actions)
        log_probs, values = distribution.log_prob(flat), self.value_head(critic).squeeze(-1)
        entropies = distribution.entropy() if entropy else values.new_empty(0)
        return Evaluation(log_probs, entropies, values)

    def value(self, obs: Any, *, state: Tensor | None = None) -> Tensor:
        """State values `[B]` of observations `[B, ...]`, with the memory `[B, K]` before them."""
        features = self.critic_body(self._features(obs))
        if self.critic_memory is not None:
            features, _ = self.critic_memory.step(features, self._states(state, features)[1])
        values: Tensor = self.value_head(features).squeeze(-1)
        return values

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Noise `[num_steps, k]` for that many actions of one environment."""
        return self.action_head.draw_noise(rng, num_steps)

    def snapshot(self) -> Actor | RecurrentActor | None:
        """A copy of the actor for worker processes, or None where torch should act for all."""
        # Methods of a subclass, or of this object alone, may say anything.
        if type(self) is not ActorCritic or not vars(self).keys().isdisjoint(vars(ActorCritic)):
            return None
        bodies = [(self.actor_body, self.actor_memory)]
        if self.critic_memory is not None and not self.shared:
            bodies.append((self.critic_body, self.critic_memory))
        box = isinstance(self.action_space, gymnasium.spaces.Box)
        shape = (self.action_space.shape or ()) if box else ()
        return snapshot(self.normalizer, bodies, self.action_head, shape, self.frame_stack)

    def update_normalizer(self, obs: Any) -> None:
        """Fold raw observations `[B, ...]` into the running moments, if there are any."""
        if isinstance(self.normalizer, ObservationNormalizer | TreeNormalizer):
            self.normalizer.update(map_tree(newest, obs))

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by network: `actor` and `critic`, or `policy` where they share a body."""
        if self.shared:
            return {"policy": list(self.parameters())}
        parts = {
            "actor": (self.actor_body, self.actor_memory, self.action_head),
            "critic": (self.critic_body, self.critic_memory, self.value_head),
        }
        return {
            name: [p for module in modules if module is not None for p in module.parameters()]
            for name, modules in parts.items()
        }


def _flat(space: Space, actions: Tensor) -> Tensor:
    """Actions of one leaf as its distribution takes them: `[B]` for Discrete, else `[B, d]`."""
    if isinstance(space, gymnasium.spaces.Discrete):
        return actions
    return actions.reshape(len(actions), math.prod(space.shape or ()))


def make_policy(
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    config: PolicyConfig = PolicyConfig(),
    *,
    seed: int = 0,
) -> ActorCritic:
    """Build the default policy for a pair of spaces.

    Args:
        observation_space: Box (vectors of any shape, uint8 images), Discrete, MultiDiscrete,
            MultiBinary, or a Dict or Tuple of these, nested to any depth.
        action_space: Discrete, MultiDiscrete, MultiBinary, Box of floating type, or a Dict or Tuple
            of these, nested to any depth.
        config: Sizes and options.
        seed: Seeds the initial weights; no global generator is used.

    Returns:
        An `ActorCritic` in float32 on the CPU.

    Raises:
        SpaceError: A space is not supported.
        TypeError: `config` is not a `PolicyConfig`.

    Example:
        >>> env = gymnasium.make("CartPole-v1")
        >>> policy = make_policy(env.observation_space, env.action_space)
        >>> policy.act(torch.zeros(5, 4), deterministic=True).shape
        torch.Size([5])
    """
    if not isinstance(config, PolicyConfig):
        raise TypeError(
            f"config must be a PolicyConfig, got {type(config).__name__}; of a PPOConfig it is "
            "config.policy"
        )
    generator = torch.Generator().manual_seed(seed)
    return ActorCritic(observation_space, action_space, config, generator)


def blank_policy(
    observation_space: gymnasium.Space[Any],
    action_space: gymnasium.Space[Any],
    config: PolicyConfig,
    tensors: Mapping[str, Tensor],
) -> ActorCritic:
    """Build the policy that `tensors` are to be loaded into; its own are not initialised.

    Names and shapes are compared before memory is taken, so sizes beyond reason cost nothing. It is
    of the precision of the tensors: a policy may have been converted, or built in another one.

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
    _convert(policy, tensors)
    return with_memory(policy)


def _convert(policy: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a policy the precision of tensors that are all of one, as `.double()` would."""
    found = {tensors[name].dtype for name, _ in policy.named_parameters()}
    if len(found) > 1 or not found <= _PRECISIONS:
        return
    (precision,) = found
    for name, tensor in itertools.chain(policy.named_parameters(), policy.named_buffers()):
        # A buffer that is computed from others is not among them.
        dtype = tensors[name].dtype if name in tensors else precision
        if tensor.is_floating_point() and dtype in _PRECISIONS:
            tensor.data = tensor.data.to(dtype)
