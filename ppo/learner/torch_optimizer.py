"""Any optimizer of `torch.optim` in place of the built-in Adam."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from ppo.errors import ConfigError
from ppo.learner.flat_optimizer import FlatOptimizer, copy_state, run_lengths

__all__ = ["UNFIT", "TorchOptimizer", "check_options", "check_parameters", "optimizer_names"]

UNFIT = {
    "LBFGS": "it evaluates the loss several times per step",
    "SparseAdam": "it takes sparse gradients only",
}
"""Optimizers of `torch.optim` that no update of PPO can use, and why."""

_BY_NUMBER = frozenset(
    (
        *("ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop"),
        *("Rprop", "SGD"),
    )
)
"""Those that treat every number by itself, and so a vector as they would its parts."""


_FIRST_COUNTS = {"step": 0.0, "mu_product": 1.0}
"""What is kept of a parameter before its first step, where that is not what is kept after one."""


def optimizer_names() -> list[str]:
    """Names of the optimizers of `torch.optim` that can be used."""
    return sorted(
        name
        for name, kind in vars(torch.optim).items()
        if inspect.isclass(kind)
        and issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and name not in UNFIT
    )


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raise `ConfigError` unless the optimizer works here and takes these options."""
    if name in UNFIT:
        raise ConfigError(
            f"optimizer {name} cannot be used here: {UNFIT[name]}; take adam or AdamW"
        )
    if "lr" in options or "params" in options:
        raise ConfigError("optimizer_kwargs has lr or params; the rate is set by learning_rate")
    try:
        getattr(torch.optim, name)([torch.zeros(1, 1)], lr=0.0, **options)
    except Exception as error:  # whatever torch makes of the options
        raise ConfigError(f"optimizer_kwargs do not fit {name}: {error}") from error


def check_parameters(name: str, policy: nn.Module) -> None:
    """Raise `ConfigError` unless the optimizer takes every parameter that is to be trained."""
    if name != "Muon":
        return
    others = [
        f"{where} {list(parameter.shape)}"
        for where, parameter in policy.named_parameters()
        if parameter.requires_grad and parameter.ndim != 2
    ]
    if others:
        raise ConfigError(
            f"optimizer Muon takes matrices only, and the policy has {', '.join(others)}; freeze "
            "them, or take another optimizer"
        )


class TorchOptimizer(FlatOptimizer):
    """An optimizer of `torch.optim`, with one group of parameters per network.

    One that works number by number is handed the vectors of the networks, which it treats as it
    would their parts; where parameters have taken different numbers of steps, spans of the vectors.
    Any other may look at shapes: it is handed each parameter in its own.

    Args:
        groups: Parameters by network, see `FlatOptimizer`.
        name: One of `optimizer_names`.
        options: Keyword arguments of the class, without the learning rate.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[nn.Parameter]],
        name: str,
        options: Mapping[str, Any],
    ) -> None:
        super().__init__(groups)
        self._name, self._options = name, options
        self._by_network = name in _BY_NUMBER
        self._cut([[len(members)] for members in self._members])

    def _cut(self, lengths: list[list[int]]) -> None:
        """Make the optimizer anew, over spans of so many neighbouring parameters."""
        self._lengths = lengths
        self._tensors = self._handed(self.parameters, lengths)
        self._optimizer = self._make(self._tensors, 0.0)
        handed = self._handed(self.gradients, lengths)
        for own, gradients in zip(self._tensors, handed, strict=True):
            for tensor, gradient in zip(own, gradients, strict=True):
                tensor.grad = gradient

    def _handed(
        self, vectors: Sequence[Tensor], lengths: Sequence[Sequence[int]]
    ) -> list[list[Tensor]]:
        """What the optimizer is handed of each network's vector: spans of it, or its parameters."""
        if self._by_network:
            return self._spans(vectors, lengths)
        parts = (part.view(parameter.shape) for parameter, part in self._split(vectors))
        return [list(itertools.islice(parts, len(members))) for members in self._members]

    def _make(self, tensors: Sequence[list[Tensor]], learning_rate: float) -> torch.optim.Optimizer:
        """The optimizer, with one group of parameters per network."""
        optimizer: torch.optim.Optimizer = getattr(torch.optim, self._name)(
            [{"params": own} for own in tensors], lr=learning_rate, **self._options
        )
        return optimizer

    def _descend(self, learning_rate: float | list[float]) -> None:
        groups = self._optimizer.param_groups
        rates = learning_rate if isinstance(learning_rate, list) else [learning_rate] * len(groups)
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self._optimizer.step()

    def take_over(self, other: Self) -> None:
        """Continue with another optimizer's state where a parameter is its too."""
        old = other._states()
        if not any(old):
            return  # it keeps nothing, or has not taken a step
        after_a_step = self._states_after_a_step(other._optimizer.param_groups[0]["lr"])
        known = dict(other._by_parameter(old))
        new = []
        for key, begun in self._by_parameter(after_a_step):
            state = {kind: tensor.clone() for kind, tensor in begun.items()}
            for kind, ours in state.items():
                if key in known:
                    ours.copy_(known[key][kind])
                elif kind in _FIRST_COUNTS:
                    ours.fill_(_FIRST_COUNTS[kind])
            new.append(state)
        self._go_on_with(new)

    def _by_parameter(
        self, states: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """What is kept of every parameter, by its id; with the counts of its span."""
        if not self._by_network:
            yield from zip(map(id, self.members), map(dict, states), strict=True)
            return
        members = iter(self.members)
        for length, state in zip(itertools.chain(*self._lengths), states, strict=True):
            span = list(itertools.islice(members, length))
            sizes = [parameter.numel() for parameter in span]
            parts = {kind: x.split(sizes) for kind, x in state.items() if x.ndim}
            counts = {kind: x for kind, x in state.items() if x.ndim == 0}
            for index, parameter in enumerate(span):
                yield id(parameter), counts | {kind: x[index] for kind, x in parts.items()}

    def _go_on_with(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Have this state of every parameter; neighbours of the same counts are one span."""
        if self._by_network:
            counts = iter(
                [{k: float(x) for k, x in state.items() if not x.ndim} for state in states]
            )
            self._cut([run_lengths([*itertools.islice(counts, len(m))]) for m in self._members])
            rest = iter(states)
            runs = [[*itertools.islice(rest, n)] for n in itertools.chain(*self._lengths)]
            states = [
                {k: torch.cat([s[k] for s in run]) if x.ndim else x for k, x in run[0].items()}
                for run in runs
            ]
        for tensor, state in zip(itertools.chain(*self._tensors), states, strict=True):
            self._optimizer.state[tensor] = dict(state)

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of what the optimizer keeps.

        They are named `<network>.<name>`, or `<network>.<number>.<name>` of a single parameter. A
        network's count is one number, or one per parameter where they differ.
        """
        tensors: dict[str, Tensor] = {}
        several = {name: len(own) > 1 for name, own in zip(self.names, self._lengths, strict=True)}
        for label, group in self._labelled(self._states()):
            joined = {k: _joined(group, k, several.get(label, False)) for k in group[0]}
            tensors |= {f"{label}.{kind}": tensor for kind, tensor in joined.items()}
        return tensors

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_dict` returned.

        Raises:
            ValueError: Names or shapes are not those of this optimizer.
        """
        fresh = _states_of(self._make(self._tensors, 0.0), self._tensors)
        later = self._states_after_a_step()
        homes = [self._room(fresh, state), self._room(later, state)]
        home = copy_state(state, *homes)
        loaded: list[dict[str, Tensor]] = []
        for label, group in self._labelled(fresh if home is homes[0] else later):
            loaded += _parted(group, {kind: home[f"{label}.{kind}"] for kind in group[0]})
        self._go_on_with(loaded)

    def _room(
        self, states: Sequence[Mapping[str, Tensor]], given: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What `state_dict` would return of these states, with counts as the given ones are."""
        return {
            (name := f"{label}.{kind}"): _joined(
                group, kind, name in given and given[name].ndim > 0
            )
            for label, group in self._labelled(states)
            for kind in group[0]
        }

    def _states(self) -> list[dict[str, Tensor]]:
        return _states_of(self._optimizer, self._tensors)

    def _states_after_a_step(self, learning_rate: float = 0.0) -> list[dict[str, Tensor]]:
        """What the optimizer keeps of each tensor after a step without a gradient.

        Most make their state in the first step, and only then is known what belongs to it.
        """
        tensors = [[torch.zeros_like(tensor) for tensor in own] for own in self._tensors]
        optimizer = self._make(tensors, learning_rate)
        for tensor in itertools.chain(*tensors):
            tensor.grad = torch.zeros_like(tensor)
        optimizer.step()
        return _states_of(optimizer, tensors)

    def _labelled(
        self, states: Sequence[Mapping[str, Tensor]]
    ) -> Iterator[tuple[str, list[dict[str, Tensor]]]]:
        """The states of the parameters of each network, or of each parameter, with their names."""
        rest = iter([state for _, state in self._by_parameter(states)])
        for name, members in zip(self.names, self._members, strict=True):
            own = list(itertools.islice(rest, len(members)))
            if self._by_network:
                yield name, own
            else:
                yield from ((f"{name}.{number}", [state]) for number, state in enumerate(own))


def _joined(group: Sequence[Mapping[str, Tensor]], kind: str, several: bool) -> Tensor:
    """A copy of what is kept of a network's parameters; of a count one number, or several."""
    parts = [state[kind] for state in group]
    if parts[0].ndim:
        return torch.cat(parts)
    return torch.stack(parts) if several else parts[0].clone()


def _parted(
    group: Sequence[Mapping[str, Tensor]], joined: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """What `_joined` made one, for each parameter."""
    parts = {
        kind: x.split([len(state[kind]) for state in group])
        if group[0][kind].ndim
        else x.expand(len(group)).unbind()
        for kind, x in joined.items()
    }
    return [{kind: parts[kind][index] for kind in parts} for index in range(len(group))]


def _states_of(
    optimizer: torch.optim.Optimizer, tensors: Sequence[Sequence[Tensor]]
) -> list[dict[str, Tensor]]:
    return [
        {kind: x for kind, x in optimizer.state.get(tensor, {}).items() if isinstance(x, Tensor)}
        for tensor in itertools.chain(*tensors)
    ]
