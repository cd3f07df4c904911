"""What NumPy does with flags on the CPU in a fraction of torch's time."""

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

ArrayT = TypeVar("ArrayT", Tensor, npt.NDArray[Any])


def all_of(flags: Tensor) -> bool:
    """Whether all of these flags are set.

    Example:
        >>> import torch
        >>> all_of(torch.tensor([True, False]))
        False
    """
    return bool(flags.numpy().all() if flags.is_cpu else flags.all())


def zero_where_(x: ArrayT, flags: ArrayT) -> ArrayT:
    """Set ``x`` to 0 where ``flags``, in place, and return it.

    What stood there does not matter, NaN and inf included. No gradient flows.

    Args:
        x: Floating, of any shape, the caller's own.
        flags: Bool, of the shape of ``x``.

    Example:
        >>> import torch
        >>> zero_where_(torch.tensor([1.0, torch.nan]), torch.tensor([False, True]))
        tensor([1., 0.])
    """
    if not isinstance(x, Tensor):
        np.copyto(x, 0.0, where=flags)
    elif x.is_cpu:
        # On half a million entries torch.where takes 4 times as long, masked_fill_ 6 times.
        zero_where_(x.numpy(), flags.numpy())
    else:
        x.masked_fill_(flags, 0.0)
    return x
