"""Operations recorded once and repeated on the memory they were recorded in.

A small network costs torch more between its operations than in them: dispatch, autograd's graph,
a new tensor for every result. A `Tape` keeps each operation of one run, forward and backward, with
the very tensors it read and wrote; a `Program` repeats them in place, as a CUDA graph does on its
device. Views cost nothing then, and most of the rest runs in NumPy (see `ppo.recording.kernels`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ppo.recording.kernels import CONSTANTS, KERNELS, Step

__all__ = ["Program", "Tape", "UnsupportedError"]

_FORBIDDEN = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
    torch.Tag.inplace_view,
}
_aten = torch.ops.aten
# Their schemas do not say that they move the running statistics.
_TRAINS_IN_PLACE = {_aten.native_batch_norm.default, _aten._batch_norm_impl_index.default}
# Their last result is for their backward pass alone, which needs it with gradients only.
_KEEPS_FOR_BACKWARD = {_aten.mkldnn_rnn_layer.default}

# Which arguments the result may lie in place of: kernels write it before they read others again.
_IN_PLACE = {
    _aten.add.Tensor: (0, 1),
    _aten.sub.Tensor: (0, 1),
    _aten.mul.Tensor: (0, 1),
    _aten.div.Tensor: (0, 1),
    _aten.neg.default: (0,),
    _aten.exp.default: (0,),
    _aten.tanh.default: (0,),
    _aten.relu.default: (0,),
    _aten.tanh_backward.default: (1,),
    _aten.threshold_backward.default: (0, 1),
}


class UnsupportedError(Exception):
    """The recorded operations cannot be repeated."""


class _Call(NamedTuple):
    operator: Any  # torch._ops.OpOverload
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    result: Any
    with_grad: bool


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tape = tape

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else the first call imports the whole compiler, for a second

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._tape.call(func, args, kwargs or {})


class _Guard(TorchFunctionMode):
    """Refuses what hands values to Python without an operation that a recorder would see."""

    _readers = (Tensor.numpy, Tensor.__array__, Tensor.tolist)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self._readers:
            raise UnsupportedError(f"{func.__name__} hands values to Python")
        return func(*args, **kwargs or {})


class Program:
    """Steps that compute again, from what the recorded inputs hold now, what was recorded.

    Results appear in the tensors that the recorded operations returned.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = steps

    def __call__(self) -> None:
        """Compute everything again."""
        for function, args in self._steps:
            function(*args)

    def __len__(self) -> int:
        return len(self._steps)


class Tape:
    """Records torch operations, in one or several parts.

    Args:
        known: Tensors whose values the programs may read anew; any other from before the recording
            is refused, since it may be the result of something torch has not seen. None: all.
        random: Also record operations that draw random numbers; repeated, they draw new ones from
            the generator they drew from.

    Example:
        >>> x, tape = torch.zeros(3), Tape()
        >>> with tape.record():
        ...     y = (x + 1.0).exp().sum()
        >>> (program,) = tape.programs()
        >>> _ = x.fill_(-1.0)
        >>> program()
        >>> y
        tensor(3.)
    """

    def __init__(self, known: Iterable[Tensor] | None = None, *, random: bool = False) -> None:
        self._known = None if known is None else _storages(list(known))
        self._forbidden = _FORBIDDEN - {torch.Tag.nondeterministic_seeded} if random else _FORBIDDEN
        self._parts: list[list[_Call]] = []
        self._made: set[int] = set()  # memory of results
        self._changed: set[int] = set()  # of it, what is written to once more

    @contextmanager
    def record(self) -> Iterator[None]:
        """Record what torch computes in this block, also inside autograd, as the next part.

        Raises:
            UnsupportedError: An operation draws random numbers (without `random`), lets a value
                decide on a shape or on what Python does, reads a tensor that is not known, changes
                one from before the recording, or is not of dense tensors on the CPU. It has not
                been carried out.
        """
        self._parts.append([])
        with _Guard(), _Recorder(self):
            yield

    def call(self, operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Carry an operation out and keep it."""
        inputs = _tensors((args, kwargs))
        if self._forbidden & set(operator.tags) and not _has_fixed_shape(operator, inputs):
            raise UnsupportedError(f"{operator} gives another result each time")
        if not all(_is_plain(tensor) for tensor in inputs):
            raise UnsupportedError(f"{operator} is not of dense tensors on the CPU")
        if operator == _aten.lift_fresh.default:
            self._made |= _storages(inputs)  # numbers written in the code
        if not all(self.owns(tensor) for tensor in inputs):
            raise UnsupportedError(f"{operator} reads a tensor that comes from nowhere known")
        if operator._schema.is_mutable:
            written = _storages(_written(operator, args, kwargs))
            if not written <= self._made:
                raise UnsupportedError(f"{operator} changes a tensor from before the recording")
            self._changed |= written
        if operator in _TRAINS_IN_PLACE and args[5] and args[3] is not None:
            raise UnsupportedError(f"{operator} changes running statistics")
        result = operator(*args, **kwargs)
        if not all(_is_plain(tensor) for tensor in _tensors(result)):
            raise UnsupportedError(f"{operator} does not make dense tensors on the CPU")
        self._made |= _storages(_tensors(result)) - _storages(inputs)
        with_grad = torch.is_grad_enabled()
        self._parts[-1].append(_Call(operator, args, kwargs, result, with_grad))
        return result

    def know(self, tensors: Iterable[Tensor]) -> None:
        """Let the programs read these tensors too."""
        if self._known is not None:
            self._known |= _storages(list(tensors))

    def owns(self, tensor: Tensor) -> bool:
        """True if the tensor was made in the recording, or was known before."""
        place = tensor.untyped_storage().data_ptr()
        return self._known is None or place in self._made or place in self._known

    def can_move(self, tensor: Tensor) -> bool:
        """True for a contiguous result of the recording that fills its memory."""
        storage = tensor.untyped_storage()
        alone = storage.data_ptr() in self._made and storage.nbytes() == tensor.nbytes
        return alone and tensor.is_contiguous()

    def programs(
        self,
        homes: Sequence[tuple[Tensor, Tensor]] = (),
        only: Sequence[Tensor] | None = None,
    ) -> list[Program]:
        """One program for each part, to be run in the order of recording.

        Args:
            homes: Pairs of a recorded result and a tensor of its shape, both contiguous. The
                programs write the result to the other tensor and leave its own memory as it is.
            only: Results that are wanted; what does not lead to them is left out. None: all.

        Raises:
            ValueError: A result does not have its memory for itself (see `can_move`).
        """
        moved = {}
        for result, home in homes:
            if not (self.can_move(result) and home.is_contiguous()):
                raise ValueError("only a contiguous result with memory of its own can be moved")
            moved[result.untyped_storage().data_ptr()] = home
        parts = self._parts
        if only is not None:
            parts = self._leading_to(only)[0]
            moved |= self._in_place([*itertools.chain(*parts)], _storages(only) | moved.keys())
        for call in itertools.chain(*parts):
            if call.operator in _KEEPS_FOR_BACKWARD:
                kept = call.result[-1]
                moved[kept.untyped_storage().data_ptr()] = torch.empty_like(kept)
        return [
            Program([step for call in part for step in self._steps(call, moved)]) for part in parts
        ]

    def _in_place(self, calls: Sequence[_Call], fixed: set[int]) -> dict[int, Tensor]:
        """Results that go to the memory of an argument which nothing reads any more.

        The less memory a program goes through, the more of it stays in the processor's cache.
        """
        read = [_storages(_tensors((call.args, call.kwargs))) for call in calls]
        last = {place: index for index, places in enumerate(read) for place in places}
        fixed = fixed | self._changed
        moved: dict[int, Tensor] = {}
        fresh: set[int] = set()  # memory that is written in every run
        for index, call in enumerate(calls):
            memory = _storages(_tensors(call.result))
            for position in _IN_PLACE.get(call.operator, ()):
                argument, result = call.args[position], call.result
                if not isinstance(argument, Tensor) or memory & fixed:
                    continue
                place = argument.untyped_storage().data_ptr()
                free = place in fresh - fixed and last[place] == index
                alone = sum(place in _storages([x]) for x in _tensors(call.args)) == 1
                alike = argument.shape == result.shape and argument.dtype == result.dtype
                movable = self.can_move(argument) and self.can_move(result)
                if free and alone and alike and movable:
                    moved[result.untyped_storage().data_ptr()] = moved.get(place, argument.detach())
                    break
            if read[index] and call.operator not in CONSTANTS and not memory & read[index]:
                fresh |= memory
        return moved

    def depends(self, results: Sequence[Tensor], source: Tensor) -> bool:
        """True if any of the recorded results was computed from this tensor."""
        return source.untyped_storage().data_ptr() in self._leading_to(results)[1]

    def _leading_to(self, results: Sequence[Tensor]) -> tuple[list[list[_Call]], set[int]]:
        """The calls, part by part, that these results come from, and all memory they read."""
        wanted = _storages(results)
        kept: list[list[_Call]] = []
        for part in reversed(self._parts):
            kept.append([])
            for call in reversed(part):
                if wanted & _storages(_tensors(call.result)) or wanted & _storages(
                    _written(call.operator, call.args, call.kwargs)
                ):
                    wanted |= _storages(_tensors((call.args, call.kwargs)))
                    kept[-1].append(call)
        return [part[::-1] for part in kept[::-1]], wanted

    def _steps(self, call: _Call, moved: Mapping[int, Tensor]) -> list[Step]:
        memory = _storages(_tensors(call.result))
        mutable = call.operator._schema.is_mutable
        if not mutable and memory <= _storages(_tensors((call.args, call.kwargs))):
            return []  # views, of what other steps write
        fresh = torch.Tag.nondeterministic_seeded in call.operator.tags
        constant = call.operator in CONSTANTS or not _tensors((call.args, call.kwargs))
        if constant and not fresh and not memory & (self._changed | moved.keys()):
            return []
        operator = call.operator
        args, kwargs, result = _map_tensors(
            functools.partial(_move, moved), [call.args, call.kwargs, call.result]
        )
        if mutable:
            return [(functools.partial(operator, **kwargs), args)]
        results = _tensors(result)
        kernel = KERNELS.get(operator)
        # The layout of a result is that of its memory; of other options kernels know one.
        options = {name: value for name, value in kwargs.items() if name != "memory_format"}
        if kernel is not None and options.keys() <= {"generator"}:
            steps = kernel(*results, *args, **options)
            if steps is not None:
                return steps
        if operator in _KEEPS_FOR_BACKWARD:
            return [(functools.partial(_keep, operator, results, call.with_grad), args)]
        return [_call_again(operator, args, kwargs, results)]


def _call_again(
    operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any], results: list[Tensor]
) -> Step:
    """The operator itself, into its old results."""
    wanted = [(argument.name, str(argument.type)) for argument in operator._schema.arguments]
    for name in operator.overloadpacket.overloads():
        variant = getattr(operator.overloadpacket, name)
        arguments = variant._schema.arguments
        outs = [argument.name for argument in arguments if argument.is_out]
        others = [(a.name, str(a.type)) for a in arguments if not a.is_out]
        if len(outs) == len(results) and others == wanted:
            into = dict(zip(outs, results, strict=True))
            return functools.partial(variant, **kwargs, **into), args

    def copy(*args: Any) -> None:
        for result, new in zip(results, _tensors(operator(*args, **kwargs)), strict=True):
            result.copy_(new)

    return copy, args


def _keep(operator: Any, results: Sequence[Tensor], with_grad: bool, *args: Any) -> None:
    """Call an operator of `_KEEPS_FOR_BACKWARD`; what it keeps is large, and not copied."""
    with torch.set_grad_enabled(with_grad):
        *found, kept = operator(*args)
    for result, new in zip(results[:-1], found, strict=True):
        result.copy_(new)
    results[-1].set_(kept)


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _leaves(item)
    elif isinstance(tree, dict):
        yield from _leaves(list(tree.values()))
    else:
        yield tree


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in _leaves(tree) if isinstance(leaf, Tensor)]


def _map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, list | tuple):
        return type(tree)(_map_tensors(function, item) for item in tree)
    if isinstance(tree, Mapping):
        return {name: _map_tensors(function, item) for name, item in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree


def _move(moved: Mapping[int, Tensor], tensor: Tensor) -> Tensor:
    """The tensor without its history; where its memory was moved, the same view of the new one."""
    tensor = tensor.detach()
    home = moved.get(tensor.untyped_storage().data_ptr())
    if home is None:
        return tensor
    if tensor.shape == home.shape and tensor.is_contiguous():
        return home  # itself, as it may be set to other memory
    offset = home.storage_offset() + tensor.storage_offset()
    return home.as_strided(tensor.shape, tensor.stride(), offset)


def _storages(tensors: Sequence[Tensor]) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def _written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among an operation's arguments that it writes to."""
    arguments = operator._schema.arguments
    given = {argument.name: value for argument, value in zip(arguments, args, strict=False)}
    given |= kwargs
    names = [a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write]
    return _tensors([given[name] for name in names if name in given])


def _has_fixed_shape(operator: Any, inputs: Sequence[Tensor]) -> bool:
    """True for indexing by numbers; only a mask lets values decide on the shape."""
    masks = (torch.bool, torch.uint8)
    return bool(operator == _aten.index.Tensor) and all(i.dtype not in masks for i in inputs[1:])


def _is_plain(tensor: Tensor) -> bool:
    """True for what NumPy can view; a complex tensor's conjugate is no view to it."""
    on_cpu = tensor.device.type == "cpu" and tensor.layout == torch.strided
    return on_cpu and not tensor.is_complex()
