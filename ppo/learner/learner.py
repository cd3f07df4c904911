"""`Learner`: several epochs of gradient steps over one batch, undone if they go wrong."""

from __future__ import annotations

import contextlib
import math
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from ppo._allocator import keep_freed_memory
from ppo._modes import ordinary_mode
from ppo._threads import threads
from ppo.errors import ConfigError, NonFiniteError
from ppo.learner.adaptive_rate import MAX_SCALE, MIN_SCALE, adapted_scale
from ppo.learner.critic_process import CriticProcess
from ppo.learner.eager import METRICS, EagerGradient, Gradient, LossSettings
from ppo.learner.flat_adam import FlatAdam
from ppo.learner.flat_optimizer import FlatOptimizer
from ppo.learner.parameter_order import ParameterOrder, in_order, parameter_order
from ppo.learner.recorded import RecordedGradient
from ppo.learner.settings import LearnerSettings
from ppo.learner.torch_optimizer import TorchOptimizer, check_parameters
from ppo.rollout import Batch

__all__ = ["Learner"]

_SCALE = "learning_rate_scale"
_UPDATES_ALONE = 2  # the first one records
_MOST_SLOWER = 5


class Learner:
    """Owns the optimizer and improves a policy on a batch.

    Args:
        policy: The policy, on its device.
        settings: What holds for all updates.

    Raises:
        ConfigError: A learning rate is for a group of parameters that the policy does not have, or
            the optimizer does not take one of its parameters, or all of them are frozen.
    """

    def __init__(self, policy: nn.Module, settings: LearnerSettings) -> None:
        self._policy = policy
        self._settings = settings
        self._rate_scale = 1.0
        self._helped = False
        self._helper: CriticProcess | None = None
        self._num_alone, self._fastest = 0, math.inf  # updates without it, seconds of the fastest
        self._slower = 0  # updates in a row for which it took longer
        groups = parameter_groups(policy)
        for name in settings.learning_rates:
            if name not in groups:
                raise ConfigError(
                    f"learning_rates has {name!r}, which is no group of parameters of the policy: "
                    f"it has {', '.join(groups)}; a body that is shared has one rate"
                )
        self._build()

    def __getstate__(self) -> dict[str, Any]:
        """Copies have no second process."""
        return vars(self) | {"_helped": False, "_helper": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Copied one by one, parameters have left their vector, where they lie otherwise in memory:
        # some processors multiply them with other roundings then.
        vars(self).update(state)
        self._rebuild()

    @ordinary_mode()
    def _build(self) -> None:
        check_parameters(self._settings.optimizer, self._policy)
        groups = parameter_groups(self._policy)
        self._optimizer = make_optimizer(groups, self._settings, shared=self._helped)
        self._trained = _trainable(self._policy)
        self._gradient = _fastest_gradient(self._policy, self._optimizer)

    def _take_up_changes(self) -> None:
        """Follow what the caller did to the policy since the last update.

        Parameters that were re-allocated are bound again. If some were exchanged, converted, moved
        to another device, frozen or released, optimizer and gradient are made anew; parameters that
        stay keep their moments.
        """
        if _trainable(self._policy) == self._trained:
            self._optimizer.bind()
            return
        self._rebuild()

    def _rebuild(self) -> None:
        before = self._optimizer
        self._build()
        self._optimizer.take_over(before)

    @contextlib.contextmanager
    def helped(self, wanted: bool = True) -> Iterator[None]:
        """Let a second process train the critic in this block, where that is faster.

        Results are the same bit for bit. The process ends with the block.

        Args:
            wanted: False: do nothing.
        """
        if not wanted or not CriticProcess.possible(
            self._gradient, self._optimizer, self._settings
        ):
            yield
            return
        self._helped, self._slower = True, 0
        self._num_alone, self._fastest = 0, math.inf
        self._rebuild()  # into shared memory
        try:
            yield
        finally:
            self._dismiss()
            self._rebuild()

    def _dismiss(self) -> None:
        """End the second process; there is none from now on."""
        self._helped = False
        if self._helper is not None:
            self._helper.close()
            self._helper = None

    def improve(
        self,
        batch: Batch,
        generator: torch.Generator,
        *,
        learning_rate: float,
        clip_range: float,
        entropy_coef: float,
        clip_range_high: float | None = None,
        learning_rates: Mapping[str, float] = types.MappingProxyType({}),
        refreshed: Callable[[], Batch] | None = None,
    ) -> dict[str, float]:
        """Take all gradient steps of one update.

        With `adaptive_kl` the learning rates are scaled, and after the update the scale of the
        next one follows from the KL of the last epoch, which is about that of the whole update.

        Args:
            batch: Rows with `obs, actions, log_probs, values, advantages, returns`.
            generator: Draws the minibatches.
            learning_rate: Step size of the optimizer.
            clip_range: ε of the ratio clip.
            entropy_coef: Weight of the entropy bonus.
            clip_range_high: ε of the ratio clip upwards; None for `clip_range`.
            learning_rates: Step sizes of groups of parameters that have their own.
            refreshed: Called before every epoch but the first for the batch to use from then on.

        Returns:
            Means over all gradient steps of `METRICS` and `grad_norm`, and the `learning_rate` as
            scaled, by name.

        Raises:
            NonFiniteError: A loss or gradient is not finite; policy and optimizer are as before.
        """
        self._take_up_changes()
        self._gradient.begin()
        settings = self._settings
        loss = LossSettings(
            clip_range,
            entropy_coef,
            settings.value_coef,
            settings.value_clip_range,
            settings.normalize_advantages == "minibatch",
            clip_range_high,
            settings.dual_clip,
        )
        scale = self._rate_scale
        own = {name: scale * rate for name, rate in learning_rates.items()}
        rates = self._optimizer.rates(scale * learning_rate, own)
        # Rows are constants, also if whoever collected them left their history on.
        batch = batch.detach()
        batches = self._batches(batch, refreshed)
        undo = _Undo(self._policy, self._optimizer)
        # What overflows is found by its metric; NumPy need not warn of it as well.
        with threads(self._gradient.num_threads), np.errstate(all="ignore"):
            if refreshed is None and (found := self._by_two(batch, generator, loss, rates, undo)):
                return found | {"learning_rate": scale * learning_rate}
            start = time.perf_counter()
            metrics, kl = self._run_epochs(batches, generator, loss, rates, undo)
            self._fastest = min(self._fastest, time.perf_counter() - start)
            self._num_alone += 1
        if settings.adaptive_kl is not None:
            self._rate_scale = adapted_scale(scale, kl, settings.adaptive_kl)
        return metrics | {"learning_rate": scale * learning_rate}

    def _by_two(
        self,
        batch: Batch,
        generator: torch.Generator,
        loss: LossSettings,
        rates: float | list[float],
        undo: _Undo,
    ) -> dict[str, float] | None:
        """Take the gradient steps with a second process; None if they were not taken.

        Whatever goes wrong there is undone, and found by one process once more.
        """
        if not self._helped:
            return None
        if self._helper is not None and not self._helper.fits(self._gradient, batch):
            self._helper.close()
            self._helper = None
        if self._helper is None and self._num_alone >= _UPDATES_ALONE:
            self._helper = CriticProcess.where_it_pays(
                self._gradient, self._optimizer, self._settings, batch
            )
        if self._helper is None or not isinstance(self._gradient, RecordedGradient):
            return None
        if not self._helper.knows(batch, generator):
            return None  # it will be recorded now
        if not self._gradient.closed:
            twin = torch.Generator().set_state(generator.get_state())
            first = next(batch.minibatches(self._settings.minibatch_size, twin, arrays=True))
            if not self._gradient.begins_well(first, loss):
                self._helper.close()
                self._helper = None  # it has the same stale recordings
                return None
        state, replays = generator.get_state(), self._gradient.replays
        start = time.perf_counter()
        records = self._helper.improve(batch, generator, loss, rates)
        if records is not None and self._optimizer.is_finite():
            means = _means([[*record] for record in records])
            if all(map(math.isfinite, means.values())):
                longer = time.perf_counter() - start > self._fastest
                self._slower = self._slower + 1 if longer else 0
                if self._slower == _MOST_SLOWER:
                    self._dismiss()  # the other processor is not as free as it seems
                return means
        self._dismiss()
        undo.apply()
        generator.set_state(state)
        self._gradient.replays = replays
        return None

    def _batches(self, batch: Batch, refreshed: Callable[[], Batch] | None) -> Iterator[Batch]:
        """The batch of each epoch."""
        for epoch in range(self._settings.num_epochs if len(batch) else 0):
            if epoch and refreshed is not None:
                batch = refreshed().detach()
            yield batch

    def _run_epochs(
        self,
        batches: Iterator[Batch],
        generator: torch.Generator,
        loss: LossSettings,
        rates: float | list[float],
        undo: _Undo,
    ) -> tuple[dict[str, float], float]:
        """Means of the metrics, and the KL of the last epoch; NaN where there was none."""
        settings, kl = self._settings, math.nan
        records: list[list[float | Tensor]] = []
        for batch in batches:
            first = len(records)
            for mini in batch.minibatches(
                settings.minibatch_size, generator, arrays=self._gradient.takes_arrays
            ):
                metrics = self._gradient(mini, loss)
                norm = self._optimizer.step(rates, settings.max_grad_norm)
                records.append([*metrics, norm])
            epoch = _means(records[first:])
            bad = [name for name, mean in epoch.items() if not math.isfinite(mean)]
            if bad:
                self._give_up(undo, bad)
            kl = epoch["approx_kl"]
            if settings.target_kl is not None and kl > settings.target_kl:
                break
        if not self._optimizer.is_finite():  # before, the next epoch's loss would have told
            self._give_up(undo, ["parameters"])
        return _means(records), kl

    def _give_up(self, undo: _Undo, bad: list[str]) -> NoReturn:
        undo.apply()
        raise NonFiniteError(
            f"{', '.join(bad)} became non-finite during an update; policy and optimizer are as "
            "they were before it. Lower learning_rate or max_grad_norm, or look for huge rewards "
            "and observations."
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The optimizer's tensors, by name, and the scale of an adaptive learning rate."""
        tensors = self._optimizer.state_dict()
        if self._settings.adaptive_kl is not None:
            tensors[_SCALE] = torch.tensor(self._rate_scale, dtype=torch.float64)
        return tensors

    def parameter_order(self) -> ParameterOrder | None:
        """Names and sizes of the parameters, in the order of `state_dict`; see `in_order`."""
        return parameter_order(self._policy, self._optimizer)

    def in_order(self, tensors: Mapping[str, Tensor], given: ParameterOrder) -> dict[str, Tensor]:
        """What a learner with its parameters in the given order returned, in the order of this one.

        Raises:
            ValueError: It was of other parameters.
        """
        own = self.parameter_order()
        return dict(tensors) if own is None else in_order(tensors, given, own)

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned; without a scale it is 1.

        Raises:
            ValueError: They are not of such a learner.
        """
        tensors, scale = dict(tensors), 1.0
        if self._settings.adaptive_kl is not None and _SCALE in tensors:
            scale = float(tensors.pop(_SCALE))
            if not MIN_SCALE <= scale <= MAX_SCALE:
                raise ValueError(f"{_SCALE} is {scale}, wanted {MIN_SCALE} to {MAX_SCALE}")
        self._optimizer.load_state_dict(tensors)
        self._rate_scale = scale


def _trainable(policy: nn.Module) -> list[tuple[object, ...]]:
    return [(id(p), p.requires_grad, p.dtype, p.device) for p in policy.parameters()]


def make_optimizer(
    groups: Mapping[str, Sequence[nn.Parameter]],
    settings: LearnerSettings,
    *,
    shared: bool = False,
) -> FlatOptimizer:
    """The optimizer that the settings name, over these parameters; Adam in shared memory."""
    if settings.optimizer == "adam":
        return FlatAdam(groups, settings.adam_eps, settings.weight_decay, shared=shared)
    return TorchOptimizer(groups, settings.optimizer, settings.optimizer_kwargs)


def _fastest_gradient(policy: nn.Module, optimizer: FlatOptimizer) -> Gradient:
    """A recording where that pays, else autograd; both compute the same gradient."""
    if RecordedGradient.supports(optimizer):
        return RecordedGradient(policy, optimizer)
    if any(parameter.device.type == "cpu" for parameter in optimizer.members):
        keep_freed_memory()  # a network that large has large activations
    return EagerGradient(policy, optimizer)


class _Undo:
    """Copies of all tensors of policy and optimizer, to go back to if an update fails."""

    def __init__(self, policy: nn.Module, optimizer: FlatOptimizer) -> None:
        self._policy, self._optimizer = policy, optimizer
        self._tensors = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
        self._moments = optimizer.state_dict()

    def apply(self) -> None:
        self._policy.load_state_dict(self._tensors)
        self._optimizer.load_state_dict(self._moments)


def _means(records: list[list[float | Tensor]]) -> dict[str, float]:
    """Mean of every metric, with one transfer to the host; NaN without a gradient step."""
    names = (*METRICS, "grad_norm")
    if not records:
        return dict.fromkeys(names, math.nan)
    if isinstance(records[0][0], Tensor):
        rows = torch.stack([torch.stack([torch.as_tensor(x) for x in row]) for row in records])
        return dict(zip(names, rows.mean(0).tolist(), strict=True))
    means: list[float] = np.array(records, np.float64).mean(0).tolist()
    return dict(zip(names, means, strict=True))


def parameter_groups(policy: nn.Module) -> dict[str, list[nn.Parameter]]:
    """The policy's own groups, and all parameters that none of them names as one more."""
    groups = getattr(policy, "parameter_groups", None)
    named: dict[str, list[nn.Parameter]] = groups() if groups else {}
    known = {id(parameter) for group in named.values() for parameter in group}
    rest = [parameter for parameter in policy.parameters() if id(parameter) not in known]
    return {**named, "policy": [*named.get("policy", []), *rest]} if rest else named
