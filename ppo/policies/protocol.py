"""What the rest of the library asks of a policy, and nothing more."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Actor", "Evaluation", "Policy", "RecurrentActor"]


class Evaluation(NamedTuple):
    """What a policy says about given observations and actions.

    Attributes:
        log_probs: Log-density (or log-mass) of the actions in nats, `[B]`.
        entropy: Entropy of the distribution over actions in nats, `[B]`.
        values: State values, in units of (scaled) return, `[B]`.
    """

    log_probs: Tensor
    entropy: Tensor
    values: Tensor


@runtime_checkable
class Policy(Protocol):
    """An `nn.Module` with these three methods works everywhere in the library.

    A policy may further offer

    - `draw_noise(rng, num_steps)`: float32 noise `[num_steps, k]` for that many actions of one
      environment. It is then called as `act(obs, noise=...)`, which makes the noise a function of
      (seed, environment, step) alone; otherwise `act(obs, generator=...)` gets a torch generator
      of the device of the observations.
    - `snapshot()`: an `Actor` (with memory a `RecurrentActor`), a copy that worker processes run by
      themselves.
    - `update_normalizer(obs)`: fold observations `[B, ...]` into its running statistics; the agent
      calls it between rollouts.
    - `parameter_groups()`: parameters by name of the network they belong to; each group's gradient
      is clipped on its own.
    - `act(..., action_mask=)` and `evaluate(..., action_masks=)`: bool `[B, M]`, which actions are
      legal (see `ppo.spaces.ActionMasks`); given where the environments say so.
    - `evaluate(..., entropy=)`: False where nobody looks at the entropies, which may be anything
      then. So a rollout is evaluated, and for some distributions they are most of the work.
    - `state_size`: numbers `K` in its memory. It is then called as `act(..., state=)` with the
      memory `[B, K]`, zeros at the beginning of an episode, and returns `(actions, state)`; as
      `evaluate(..., sequences=)` with rows in order (see `ppo.sequences.Sequences`); and as
      `value(obs, state=)`. `memory_steps` limits the length of the sequences.
    - `frame_stack`: the number `k` of latest observations it sees at once, `[B, k, ...]`.
    - `squashed`: True if its Box actions are from before a tanh onto the bounds of the space.

    Nested observations and actions are trees of tensors: dictionaries and tuples.
    """

    def act(
        self,
        obs: Any,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        deterministic: bool = False,
    ) -> Any:
        """Raw actions for observations `[B, ...]`: sampled, or the mode if `deterministic`."""

    def evaluate(self, obs: Any, actions: Any) -> Evaluation:
        """Log-probabilities, entropies and values `[B]`, with gradient."""

    def value(self, obs: Any) -> Tensor:
        """State values `[B]`, with gradient."""


class Actor(Protocol):
    """A picklable copy of the acting half of a policy, for environments' processes.

    It always gets the same rows together, whichever process acts for them: 32, or as many as its
    `group_size` says, a divisor of that, if it has one. An attribute `row_wise` that is True says
    that a row's action does not depend, to the last bit, on how many rows there are. One that has a
    method `for_rollout(noise)` is given the noise `[T, G, k]` of a rollout beforehand, and returns
    what is then called with observations, which it must not write to, and the number of the step.
    """

    def __call__(self, obs: np.ndarray, noise: np.ndarray) -> np.ndarray:
        """Raw actions `[G, ...]` for observations `[G, ...]` and noise `[G, k]`."""


class RecurrentActor(Protocol):
    """The same of a policy with memory."""

    def __call__(
        self, obs: np.ndarray, noise: np.ndarray, states: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw actions `[G, ...]` and the next states `[G, K]`, given the present ones."""


def check_methods(policy: object, *names: str) -> None:
    """Raise `TypeError` for what is no policy, as it lacks one of these methods."""
    missing = [name for name in names if not callable(getattr(policy, name, None))]
    if missing:
        raise TypeError(
            f"policy must be a module with the methods {', '.join(names)}, got "
            f"{type(policy).__name__} without {', '.join(missing)}; make_policy builds one"
        )


def takes(method: Callable[..., object], argument: str) -> bool:
    """True if a method has a parameter of that name."""
    function = getattr(method, "__func__", None)
    if isinstance(function, types.FunctionType):
        return argument in _parameters(function)
    return argument in inspect.signature(method).parameters


@functools.lru_cache(maxsize=64)
def _parameters(function: Callable[..., object]) -> frozenset[str]:
    """Asked of the same few methods in every rollout, which to find out takes 50 µs each time."""
    return frozenset(inspect.signature(function).parameters)


class Evaluator:
    """Evaluates rows by a policy, with what it takes besides observations and actions.

    Args:
        policy: As in `Policy`. Masks are kept from one whose `evaluate` has no `action_masks`: it
            looks for them in the observation.
        entropy: False where the entropies are not needed.
    """

    def __init__(self, policy: Any, *, entropy: bool = True) -> None:
        self._policy = policy
        self._takes_masks = takes(policy.evaluate, "action_masks")
        spared = not entropy and takes(policy.evaluate, "entropy")
        self._fixed = {"entropy": False} if spared else {}

    def __call__(self, obs: Any, actions: Any, context: Mapping[str, Any]) -> Evaluation:
        """Log-probabilities, entropies (if they are needed) and values `[B]`.

        Args:
            obs: Observations `[B, ...]`.
            actions: Raw actions `[B, ...]`.
            context: `Batch.context`.
        """
        if not self._takes_masks:
            context = {name: value for name, value in context.items() if name != "action_masks"}
        return Evaluation(*self._policy.evaluate(obs, actions, **context, **self._fixed))


def frozen_parameters(policy: nn.Module) -> list[str]:
    """Names of the parameters that are not to be trained."""
    return [name for name, tensor in policy.named_parameters() if not tensor.requires_grad]


def freeze_exactly(policy: nn.Module, names: Collection[str]) -> None:
    """Freeze these parameters and release all others; `ValueError` for an unknown name."""
    parameters = dict(policy.named_parameters())
    unknown = sorted(set(names) - parameters.keys())
    if unknown:
        raise ValueError(f"it freezes {unknown}, which the policy does not have")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name not in names)


def modules_in(parts: Iterable[nn.Module | None]) -> Iterator[nn.Module]:
    """The parts and all that is in them, depth first; faster than `nn.Module.modules`."""
    for part in parts:
        if part is not None:
            yield part
            if part._modules:
                yield from modules_in(part._modules.values())


def policy_device(policy: object) -> torch.device:
    """Device of the policy's first parameter; the CPU if it has none."""
    parameters = policy.parameters() if isinstance(policy, nn.Module) else iter(())
    return next((parameter.device for parameter in parameters), torch.device("cpu"))


def generator_on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """What draws on a device: on the CPU this generator of it, else one that is seeded by it."""
    if device.type == "cpu":
        return generator
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)
