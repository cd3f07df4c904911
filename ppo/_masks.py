"""What NumPy does with flags on the CPU in a fraction of torch's time."""

import numpy as np
from torch import Tensor


def all_of(flags: Tensor) -> bool:
    """Whether all of these flags are set.

    Example:
        >>> import torch
        >>> all_of(torch.tensor([True, False]))
        False
    """
    return bool(flags.numpy().all() if flags.is_cpu else flags.all())


def zero_where_(x: Tensor, flags: Tensor) -> Tensor:
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
    if x.is_cpu:
        # On half a million entries torch.where takes 4 times as long, masked_fill_ 6 times.
        np.copyto(x.numpy(), 0.0, where=flags.numpy())
    else:
        x.masked_fill_(flags, 0.0)
    return x
