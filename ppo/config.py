"""`PPOConfig`: the one place where hyperparameters are documented."""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import gymnasium
import numpy as np

from ppo.config_parsing import (
    check_fields,
    parse_dataclass,
    parse_override,
    read_yaml,
    write_yaml,
)
from ppo.envs import Env, EnvFactory, make_env
from ppo.errors import ConfigError
from ppo.learner.torch_optimizer import UNFIT, check_options, optimizer_names
from ppo.nearest import NearestError, names_the_nearest
from ppo.policies.options import PolicyConfig
from ppo.schedules import Constant, Linear, Schedule

__all__ = ["PPOConfig", "tuned_names"]


@names_the_nearest
@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Everything a run needs to know; the defaults suit continuous control without tuning.

    Attributes:
        env: Environment id, for runs from a file.
        env_kwargs: Passed to `gymnasium.make`: what a file can hold, which is numbers, text, flags,
            None, and lists and mappings of them. NumPy's numbers become Python's, tuples lists.
        wrappers: Names from `gymnasium.wrappers`, innermost first, each alone or as
            `{name: {argument: value}}`.
        steps: Transitions to train for, over all environments, for runs from a file.
        target_return: Mean return at which a run counts as solved, for its summary; None takes
            Gymnasium's reward threshold, where the environment has one.
        num_envs: Parallel environments `N`.
        num_workers: Worker processes; 0 steps in this process, and `"auto"` chooses: see
            `PPOAgent.learn`. Changes speed, never results.
        step_timeout: Seconds a worker may go without finishing a step or a reset; None waits for
            ever.
        on_fault: When an environment raises, or its worker dies or hangs: `"raise"` stops,
            `"restart"` replaces it and goes on; see `RolloutCollector`.
        max_restarts: How many times, in one call of `learn`.
        num_steps: Steps per rollout and environment `T`.
        num_epochs: Passes over each rollout.
        minibatch_size: Transitions per gradient step.
        learning_rate: The optimizer's step size; a number or a schedule.
        learning_rates: Step sizes of single groups of parameters in place of `learning_rate`, each
            a number or a schedule: `{"critic": 1e-3}`. The groups are those of the policy's
            `parameter_groups()`: `actor` and `critic`, or `policy` where they share a body.
        adaptive_kl: Scale the step sizes from update to update so that the KL between the policies
            before and after one is about this, in nats; None is off. See `docs/guide/options`.
        optimizer: `"adam"`, or the name of a class in `torch.optim`, such as `"SGD"`; which, says
            `docs/guide/options`.
        optimizer_kwargs: Arguments of that class; of the kinds of `env_kwargs`.
        adam_eps: Denominator floor of `"adam"` (Huang et al. 2022, detail 3).
        weight_decay: Decoupled weight decay of `"adam"`, of all parameters (Loshchilov and Hutter
            2019).
        gamma: Discount per step, in [0, 1].
        gae_lambda: λ of GAE and of the λ-returns the critic learns, in [0, 1].
        clip_range: ε of the ratio clip; a number or a schedule.
        clip_range_high: The same upwards, where it differs; None takes `clip_range`.
        dual_clip: c > 1 of the second clip, for negative advantages (Ye et al. 2020); None is off.
        value_clip_range: ε of the value clip; None is off, which is better (Andrychowicz et al.
            2021, section 3.4).
        value_coef: Weight of the value loss, which has no factor ½.
        entropy_coef: Weight of the entropy bonus; a number or a schedule.
        max_grad_norm: Limit on the gradient norm of each network (actor, critic) by itself.
        target_kl: Stop the epochs of an update once an epoch's mean KL exceeds this; None is off.
        recompute_advantages: Compute values and advantages anew before every epoch but the first
            (Andrychowicz et al. 2021, section 3.5).
        normalize_advantages: Over the whole `"rollout"`, per `"minibatch"`, or `"none"`.
        normalize_rewards: Divide rewards by the running std of the discounted return.
        policy: Shape of the default policy.

    Raises:
        ConfigError: A value is out of range; the message names the setting.

    Example:
        >>> config = PPOConfig(gamma=0.9, learning_rate={"linear": [1e-3, 0]})
        >>> config.learning_rate(0.5)
        0.0005
        >>> config.replace(num_envs=4).num_envs
        4
    """

    env: str | None = None
    # Mappings have no hash; configs that differ in nothing else may share theirs.
    env_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    wrappers: Sequence[Any] = dataclasses.field(default=(), hash=False)
    steps: int | None = None
    target_return: float | None = None
    num_envs: int = 8
    num_workers: int | Literal["auto"] = "auto"
    step_timeout: float | None = None
    on_fault: Literal["raise", "restart"] = "raise"
    max_restarts: int = 10
    num_steps: int = 256
    num_epochs: int = 10
    minibatch_size: int = 64
    learning_rate: Schedule = Linear(3e-4, 0.0)
    learning_rates: Mapping[str, Schedule] = dataclasses.field(default_factory=dict, hash=False)
    adaptive_kl: float | None = None
    optimizer: str = "adam"
    optimizer_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    adam_eps: float = 1e-5
    weight_decay: float = 0.0
    gamma: float = 0.99
    gae_lambda: float = 0.95
    clip_range: Schedule = Constant(0.2)
    clip_range_high: Schedule | None = None
    dual_clip: float | None = None
    value_clip_range: float | None = None
    value_coef: float = 0.5
    entropy_coef: Schedule = Constant(0.0)
    max_grad_norm: float = 0.5
    target_kl: float | None = None
    recompute_advantages: bool = False
    normalize_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    normalize_rewards: bool = True
    policy: PolicyConfig = PolicyConfig()

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("env_kwargs", "optimizer_kwargs", "wrappers"):
            stored = _storable(getattr(self, name), name)
            object.__setattr__(self, name, tuple(stored) if name == "wrappers" else stored)
        for name in ("num_envs", "num_steps", "num_epochs", "minibatch_size"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        automatic = self.num_workers == "auto"
        known = automatic or int(self.num_workers) >= 0
        _check(self, "num_workers", known, '"auto", 0 (this process) or more')
        _check(self, "steps", self.steps is None or self.steps >= 1, "at least 1")
        for name in ("gamma", "gae_lambda"):
            _check(self, name, 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        for name in ("adam_eps", "max_grad_norm"):
            _check(self, name, getattr(self, name) > 0.0, "positive")
        _check(self, "max_restarts", self.max_restarts >= 0, "0 or more")
        for name in ("value_clip_range", "target_kl", "adaptive_kl"):
            value = getattr(self, name)
            _check(self, name, value is None or value > 0.0, "positive, or None for off")
        patience = self.step_timeout
        known = patience is None or 0.0 < patience < math.inf
        _check(self, "step_timeout", known, "positive and finite, or None to wait for ever")
        clip = self.dual_clip
        _check(self, "dual_clip", clip is None or 1.0 < clip < math.inf, "above 1, or None for off")
        for name in ("value_coef", "adam_eps", "weight_decay"):
            _check(self, name, 0.0 <= getattr(self, name) < math.inf, "0 or more, and finite")
        for name in ("learning_rate", "clip_range", "clip_range_high"):
            _check(self, name, _never_negative(getattr(self, name)), "0 or more")
        rates = self.learning_rates.values()
        _check(self, "learning_rates", all(map(_never_negative, rates)), "0 or more each")
        self._check_optimizer()
        for entry in self.wrappers:
            _wrapper(entry)

    def _check_optimizer(self) -> None:
        name = self.optimizer
        if name == "adam":
            none = not self.optimizer_kwargs
            _check(self, "optimizer_kwargs", none, "empty for adam, which has settings of its own")
            return
        if name not in (known := ["adam", *optimizer_names()]) and name not in UNFIT:
            raise ConfigError(f"optimizer: {NearestError(name, known, what='optimizer')}")
        decay = "0 for any optimizer but adam; it may be one of optimizer_kwargs"
        _check(self, "weight_decay", self.weight_decay == 0.0, decay)
        check_options(name, self.optimizer_kwargs)

    def at(self, progress: float) -> dict[str, Any]:
        """Return what the schedules say when this share of the training is done.

        Example:
            >>> PPOConfig(learning_rate={"linear": [1e-3, 0]}).at(0.5)["learning_rate"]
            0.0005
        """
        high = self.clip_range_high
        return {
            "learning_rate": self.learning_rate(progress),
            "learning_rates": {name: rate(progress) for name, rate in self.learning_rates.items()},
            "clip_range": self.clip_range(progress),
            "clip_range_high": None if high is None else high(progress),
            "entropy_coef": self.entropy_coef(progress),
        }

    def replace(self, **changes: Any) -> PPOConfig:
        """Return a copy with some settings changed; unknown names are a `ConfigError`."""
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PPOConfig:
        """Build a config from plain values, as strictly as from a file.

        Raises:
            ConfigError: A key is unknown, or a value ill-typed or out of range.

        Example:
            >>> PPOConfig.from_dict({"gamma": "0.9", "policy": {"activation": "relu"}}).gamma
            0.9
        """
        return parse_dataclass(cls, data)

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> PPOConfig:
        """Read a YAML file, then apply `key=value` overrides (`policy.shared=true`).

        Numbers such as `3e-4`, `1e6` and `100_000` are numbers. Files run nothing: no tags, no
        anchors' expansion into code, no `eval`.

        Raises:
            ConfigError: The file is missing or damaged, a key is unknown or given twice, or a value
                is ill-typed or out of range; names the file, the line and the nearest valid key.
        """
        data = read_yaml(Path(path))
        for override in overrides:
            parse_override(override, data)
        return parse_dataclass(cls, data, where=str(path))

    @classmethod
    def tuned(cls, name: str, overrides: Sequence[str] = ()) -> PPOConfig:
        """Return a configuration shipped with the package.

        Args:
            name: An environment id (`"Pendulum-v1"`) or the name of a file (`"pendulum"`).
            overrides: `key=value` settings to change.

        Raises:
            ConfigError: There is none of that name; the message lists what there is.

        Example:
            >>> PPOConfig.tuned("Pendulum-v1").gamma
            0.95
        """
        stem = _stem(name)
        if stem not in tuned_names():
            raise NearestError(stem, list(tuned_names()), what="tuned configuration")
        with resources.as_file(_configs() / f"{stem}.yaml") as path:
            known = cls.from_yaml(path).env
            if "-v" in name and name != known:
                raise ConfigError(
                    f"there is no tuned configuration for {name!r}; {stem!r} is for {known}"
                )
            return cls.from_yaml(path, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that `from_dict` reads back to an equal config."""
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, PolicyConfig):
                value = dataclasses.asdict(value)
            data[field.name] = _plain(value)
        return data

    def to_yaml(self, path: str | Path) -> None:
        """Write every setting to a file that `from_yaml` reads back to an equal config."""
        write_yaml(Path(path), self.to_dict())

    def env_factory(self) -> EnvFactory:
        """Return a factory of the configured environment: id, arguments and wrappers.

        Raises:
            ConfigError: No environment is set.
        """
        if self.env is None:
            raise ConfigError("env is not set; give an environment id")
        return functools.partial(_build_env, self.env, dict(self.env_kwargs), self.wrappers)


def _check(config: PPOConfig, name: str, ok: bool, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{name} must be {wanted}, got {_plain(getattr(config, name))}")


def _never_negative(schedule: Schedule | None) -> bool:
    return schedule is None or min(schedule(0.0), schedule(1.0)) >= 0.0


def _plain(value: Any) -> Any:
    if isinstance(value, Schedule):
        return value.to_plain()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _storable(value: Any, name: str) -> Any:
    """What a file gives back for a value; `ConfigError` for one that no file can hold."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _storable(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_storable(item, name) for item in value]
    if type(value) in (bool, int, str, type(None)) or (type(value) is float and value == value):
        return value
    instead = (
        "convert it"
        if name.startswith("optimizer")
        else "convert it, or give `learn` a factory of the environment in place of its id"
    )
    raise ConfigError(
        f"{name} is {reprlib.repr(value)} ({type(value).__name__}), which no file can hold; wanted "
        f"numbers, text, True, False, None, or lists and mappings of them: {instead}"
    )


def _wrapper(entry: Any) -> tuple[str, dict[str, Any]]:
    """Name and arguments of one entry of `wrappers`."""
    if isinstance(entry, Mapping) and len(entry) == 1:
        name, kwargs = next(iter(entry.items()))
    else:
        name, kwargs = entry, {}
    known = [known for known in gymnasium.wrappers.__all__ if known[0].isupper()]
    if not isinstance(kwargs, Mapping):
        raise ConfigError(f"wrappers: {name} needs {{argument: value}}, got {kwargs!r}")
    if name == "RecordVideo":
        raise ConfigError(
            "wrappers: RecordVideo would write to whatever folder a file names; record a finished "
            "run with `ppo play RUN --video FILE`, or wrap the environment in code of your own"
        )
    if name not in known:
        unknown = NearestError(str(name), known, what="gymnasium wrapper")
        raise ConfigError(f"wrappers: {unknown}")
    return str(name), dict(kwargs)


def _build_env(env_id: str, kwargs: Mapping[str, Any], wrappers: Sequence[Any]) -> Env:
    env = make_env(env_id, kwargs)
    for entry in wrappers:
        name, arguments = _wrapper(entry)
        try:
            env = getattr(gymnasium.wrappers, name)(env, **arguments)
        except (AssertionError, TypeError, ValueError, gymnasium.error.Error) as error:
            env.close()
            what = str(error) or type(error).__name__
            raise ConfigError(f"wrappers: {name}({arguments}) failed: {what}") from error
    return env


def _configs() -> Any:
    return resources.files("ppo") / "configs"


def _stem(name: str) -> str:
    """`MountainCarContinuous-v0` and `mountaincarcontinuous.yaml` -> `mountaincarcontinuous`."""
    return name.removesuffix(".yaml").split("-v")[0].replace("_", "").replace("-", "").lower()


def tuned_names() -> tuple[str, ...]:
    """Names of the shipped configurations, sorted."""
    files = (entry.name for entry in _configs().iterdir())
    return tuple(sorted(name.removesuffix(".yaml") for name in files if name.endswith(".yaml")))
