"""What an *EnvLike* is, and how it becomes environments."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, VectorEnv

from ppo._checks import check_positive_integer
from ppo.atari import AtariSeeding
from ppo.errors import EnvCreationError

__all__ = [
    "AnyEnv",
    "Env",
    "EnvFactory",
    "EnvLike",
    "EnvSource",
    "is_parallel",
    "make_env",
    "resolve_env",
]

Env: TypeAlias = "gymnasium.Env[Any, Any]"
AnyEnv: TypeAlias = Any
"""An `Env`, or a parallel environment of several agents (see `is_parallel`)."""
EnvFactory: TypeAlias = Callable[[], AnyEnv]
EnvLike: TypeAlias = "str | EnvFactory | Sequence[EnvFactory] | Env | VectorEnv[Any, Any, Any]"

# Environment families whose dependencies are extras of this package.
_EXTRAS = {"box2d": "box2d", "mujoco": "mujoco", "ale": "atari", "pygame": "video"}


@dataclasses.dataclass(frozen=True)
class EnvSource:
    """Where the columns of a rollout come from: factories, or one vector environment.

    Attributes:
        factories: One per environment; empty for a vector environment.
        instance: The caller's own environment, used as column 0 when stepping in this process.
        copyable: `factories` can replace `instance`, so worker processes may be used.
        vector: The caller's vector environment.
        autoreset_mode: Its autoreset mode.
    """

    factories: tuple[EnvFactory, ...] = ()
    instance: AnyEnv | None = None
    copyable: bool = True
    vector: VectorEnv[Any, Any, Any] | None = None
    autoreset_mode: AutoresetMode | None = None


def make_env(env: str | EnvSpec, kwargs: Mapping[str, Any] | None = None) -> Env:
    """Make a registered environment; errors say what is missing and how to get it.

    An Atari game of single frames is seeded by `AtariSeeding`.

    Args:
        env: A Gymnasium id, optionally `module:Id-v0`, or a spec.
        kwargs: Passed to `gymnasium.make`.

    Raises:
        EnvCreationError: Unknown id, wrong arguments or a missing dependency.
    """
    env_id = env if isinstance(env, str) else env.id
    if isinstance(env, str):
        _find(env)
    try:
        made = gymnasium.make(env, disable_env_checker=True, **(kwargs or {}))
        return AtariSeeding(made) if AtariSeeding.fits(made) else made
    except gymnasium.error.DependencyNotInstalled as error:
        text = str(error).lower()
        extra = next((extra for word, extra in _EXTRAS.items() if word in text), None)
        remedy = f"install the extra: pip install 'ppo-gae[{extra}]'" if extra else str(error)
        raise EnvCreationError(
            f"environment {env_id!r} needs a package that is not installed ({error}); {remedy}"
        ) from error
    except gymnasium.error.Error as error:
        raise EnvCreationError(f"environment {env_id!r} cannot be made: {error}") from error
    except TypeError as error:
        raise EnvCreationError(
            f"environment {env_id!r} does not take the arguments {dict(kwargs or {})}: {error}"
        ) from error


def is_parallel(env: object) -> bool:
    """True for an environment of several agents that act at the same time.

    By its methods: those of a parallel environment of PettingZoo (Terry et al. 2021).
    """
    return (
        not isinstance(env, type)  # a class makes such an environment
        and hasattr(env, "possible_agents")
        and callable(getattr(env, "observation_space", None))
        and callable(getattr(env, "action_space", None))
    )


def resolve_env(
    env: EnvLike,
    num_envs: int,
    *,
    env_kwargs: Mapping[str, Any] | None = None,
    autoreset_mode: AutoresetMode | str | None = None,
) -> EnvSource:
    """Turn an EnvLike into an `EnvSource`.

    Args:
        env: An id, a factory, a list of factories, an environment or a vector environment.
        num_envs: How many environments to make from an id, a factory or a copyable environment.
        env_kwargs: For an id, passed to `gymnasium.make`.
        autoreset_mode: For a vector environment whose metadata does not name its mode.

    Raises:
        TypeError: `env` is none of these.
        ValueError: `num_envs` is below 1 or contradicts the number of factories.
        EnvCreationError: The id is unknown, or a vector environment does not say how it resets.
    """
    check_positive_integer("num_envs", num_envs)
    if env_kwargs and not isinstance(env, str):
        raise ValueError(f"env_kwargs are for environment ids, got an env of type {type(env)}")
    if isinstance(env, str):
        # A typo is an error here and not in a worker, and a worker need not know the id.
        return EnvSource((functools.partial(make_env, _find(env), env_kwargs),) * num_envs)
    if isinstance(env, VectorEnv):
        return EnvSource(vector=env, autoreset_mode=_autoreset_mode(env, autoreset_mode))
    if isinstance(env, gymnasium.Env):
        return _from_instance(env, num_envs)
    if is_parallel(env):
        return _alone(env, num_envs)
    if isinstance(env, Sequence):
        if not env or not all(callable(factory) for factory in env):
            kinds = ", ".join(dict.fromkeys(type(factory).__name__ for factory in env)) or "none"
            raise TypeError(
                f"a list of environments must hold factories () -> gymnasium.Env, got {kinds}; "
                "write [lambda: MyEnv(), ...]"
            )
        return EnvSource(tuple(cast("Sequence[EnvFactory]", env)))
    if callable(env):
        return EnvSource((env,) * num_envs)
    raise TypeError(
        "env must be an id, a factory () -> gymnasium.Env, a list of factories, a gymnasium.Env "
        f"or a gymnasium.vector.VectorEnv, got {type(env).__name__}"
    )


def _find(env_id: str) -> EnvSpec:
    """Spec of a registered id; `EnvCreationError` for another."""
    remedy = "an id must be registered with Gymnasium; 'module:Id-v0' imports a module first"
    if env_id.startswith("ALE/"):
        remedy = "for Atari install the extra: pip install 'ppo-gae[atari]'"
        with contextlib.suppress(ImportError):
            gymnasium.register_envs(importlib.import_module("ale_py"))
    module, _, name = env_id.rpartition(":")
    try:
        if module:
            importlib.import_module(module)
        return gymnasium.spec(name)
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        raise EnvCreationError(f"unknown environment id {env_id!r}: {error} ({remedy})") from error


def _from_instance(env: Env, num_envs: int) -> EnvSource:
    spec = env.spec
    if spec is not None and all(w.kwargs is not None for w in spec.additional_wrappers):
        factory = functools.partial(gymnasium.make, spec, disable_env_checker=True)
        return EnvSource((factory,) * num_envs, instance=env)
    return _alone(env, num_envs)


def _alone(env: AnyEnv, num_envs: int) -> EnvSource:
    if num_envs > 1:
        warnings.warn(
            f"{env} cannot be rebuilt from its spec, so it is collected alone: num_envs is 1, not "
            f"{num_envs}. Pass a factory that makes it to collect several.",
            stacklevel=5,
        )
    return EnvSource((lambda: env,), instance=env, copyable=False)


def _autoreset_mode(
    env: VectorEnv[Any, Any, Any], given: AutoresetMode | str | None
) -> AutoresetMode:
    said = env.metadata.get("autoreset_mode")
    if said is None and given is None:
        raise EnvCreationError(
            f"{env} does not say in metadata['autoreset_mode'] how it resets; "
            "pass autoreset_mode='next_step', 'same_step' or 'disabled'"
        )
    modes = [_known_mode(mode) for mode in (said, given) if mode is not None]
    if len(set(modes)) > 1:
        raise EnvCreationError(
            f"autoreset_mode is {given!r}, but {env} says {said!r}; leave the argument out"
        )
    return modes[0]


def _known_mode(mode: AutoresetMode | str) -> AutoresetMode:
    name = str(mode.value if isinstance(mode, AutoresetMode) else mode).replace("_", "").lower()
    for known in AutoresetMode:
        if known.value.lower() == name:
            return known
    raise EnvCreationError(
        f"autoreset_mode must be 'next_step', 'same_step' or 'disabled', got {mode!r}"
    )
