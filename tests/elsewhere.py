"""A device that is not there: tensors that say they are elsewhere, and are computed on the CPU.

As on a GPU, no operation mixes them with tensors of the CPU, and NumPy cannot see them. What is
copied, and what the host would wait for, is written down. So code is proven to keep its tensors
together, and to let a device work, on a machine that has none.
"""

import contextlib
from typing import ClassVar
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
"""What the tensors say of themselves: the one other device for which torch needs no driver."""

aten = torch.ops.aten
READING = {
    aten._local_scalar_dense.default,  # .item(), bool(), float()
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Elsewhere(Tensor):
    """A tensor that is elsewhere; `here` is what it holds."""

    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(
            cls,
            here.shape,
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=DEVICE,
        )

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is Tensor.data_ptr:
            return args[0].here.data_ptr()
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func == Tensor.is_meta.__get__:
            return False
        if func == Tensor.data.__set__:
            assert args[0].stride() == args[1].stride()
            args[0].here = args[1].here
            return None
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: what is elsewhere is computed inside of `elsewhere` only")


class Generator(torch.Generator):
    """What stands for torch's own; it may be elsewhere."""

    there: ClassVar[dict[int, torch.Generator]] = {}

    def __new__(cls, device="cpu"):
        generator = super().__new__(cls)
        if torch.device(device) == DEVICE:
            cls.there[generator._cdata] = generator
        return generator


class Traffic(TorchDispatchMode):
    """Computes with tensors that are elsewhere, and writes down what passes.

    Attributes:
        sent: Shape of every tensor that was copied there.
        waits: Every operation for which the host would have waited, such copies among them.
    """

    def __init__(self):
        super().__init__()
        self.sent, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there, here = [], []
        _map(lambda x: (there if isinstance(x, Elsewhere) else here).append(x), (args, kwargs))
        wanted = kwargs.get("device")
        stays = bool(there) if wanted is None else wanted == DEVICE
        if func == aten.copy_.default:
            stays = isinstance(args[0], Elsewhere)
        if not (there or stays):
            return func(*args, **kwargs)
        if func in (aten.copy_.default, aten._to_copy.default):
            self._copied(func, args, kwargs, stays)
        else:
            self._computed(func, args, here)
        generator = kwargs.get("generator")
        if generator is not None and generator._cdata not in Generator.there:
            raise RuntimeError(f"{func} is elsewhere and draws from a generator of the CPU")
        if wanted == DEVICE:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        results = func(*_map(_here, args), **_map(_here, kwargs))
        known = {id(tensor.here): tensor for tensor in there}  # what was changed in place

        def there_again(tensor):
            return known[id(tensor)] if id(tensor) in known else Elsewhere(tensor)

        return _map(there_again, results) if stays else results

    def _copied(self, func, args, kwargs, stays):
        source = args[1] if func == aten.copy_.default else args[0]
        if isinstance(source, Elsewhere) == stays:
            return
        if stays:
            self.sent.append(tuple(source.shape))
        if not (stays and kwargs.get("non_blocking")):
            self.waits.append(func)

    def _computed(self, func, args, here):
        indices = [index for index in args[1] if index is not None] if func in INDEXING else []
        if func in READING or any(index.dtype == torch.bool for index in indices):
            self.waits.append(func)
        numbers = torch.Tag.pointwise in func.tags or func in INDEXING
        for tensor in here:
            if any(tensor is index for index in indices):  # torch copies it by itself
                self.sent.append(tuple(tensor.shape))
                self.waits.append(func)
            elif tensor.ndim > 0 or not numbers:
                raise RuntimeError(f"{func} mixes a tensor of the CPU with one that is elsewhere")


def _here(tensor):
    return tensor.here if isinstance(tensor, Elsewhere) else tensor


def _map(function, value):
    """Every tensor in arguments or results, through a function."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)([_map(function, item) for item in value])
    if type(value) is dict:
        return {key: _map(function, item) for key, item in value.items()}
    return value


AUTOCAST = torch.autocast


def _autocast(device_type, *args, **options):
    """Without half precision: torch knows of none for this device."""
    return AUTOCAST("cpu" if device_type == DEVICE.type else device_type, *args, **options)


class FromData(TorchFunctionMode):
    """What makes tensors of Python's numbers makes them here, and sends them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = func in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor)
        if made and kwargs.get("device") == DEVICE:
            return func(*args, **{**kwargs, "device": "cpu"}).to(DEVICE)
        return func(*args, **kwargs)


@contextlib.contextmanager
def elsewhere():
    """Where `DEVICE` is a device to compute on; gives the `Traffic` with it."""
    traffic = Traffic()
    with (
        mock.patch.object(torch, "Generator", Generator),
        mock.patch.object(torch, "autocast", _autocast),
        mock.patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        traffic,
        FromData(),
    ):
        yield traffic
