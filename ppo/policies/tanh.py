"""`Tanh`: PyTorch's layer, computed by NumPy where that gives the same and is faster.

Of 65,536 numbers PyTorch takes the hyperbolic tangent in 136 µs and NumPy in 10, on a processor
with AVX-512. A recorded gradient and the actors of worker processes take NumPy's as well
(docs/decisions/0007-where-the-time-goes.rst).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

__all__ = ["Tanh"]

_FEW = 2**12  # numbers; fewer take torch less time than it takes to find out all that is asked here


class Tanh(nn.Tanh):
    """The hyperbolic tangent; its numbers do not depend on whether gradients are wanted.

    PyTorch's own operation is left to up to 4,096 numbers, to tensors that are not float32 in the
    memory of the CPU, and to whatever looks at operations: a compiler, an export, `torch.func`, a
    dispatch mode.

    Example:
        >>> Tanh()(torch.tensor([0.0, 100.0]))
        tensor([0., 1.])
    """

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs in (-1, 1), of the inputs' shape."""
        if torch._jit_internal.is_scripting():
            return torch.tanh(inputs)
        else:  # what follows a return would be compiled for a script, this branch is not
            return _tanh(inputs)


def _tanh(inputs: Tensor) -> Tensor:
    if not _is_plain(inputs):
        return torch.tanh(inputs)
    if inputs.requires_grad and torch.is_grad_enabled():
        apply: Callable[[Tensor], Tensor] = _Tanh.apply
        return apply(inputs)
    return _numpy_tanh(inputs)


def _is_plain(inputs: Tensor) -> bool:
    """True for numbers that lie in memory, of which nobody but autograd takes note."""
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and type(inputs) is Tensor
        and inputs.numel() > _FEW  # what is traced would be bound to it
        and inputs.dtype is torch.float32
        and inputs.device.type == "cpu"
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _numpy_tanh(inputs: Tensor) -> Tensor:
    inputs = inputs.detach()
    outputs = torch.empty_like(inputs)
    np.tanh(inputs.numpy(), out=outputs.numpy())
    return outputs


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor) -> Tensor:
        outputs = _numpy_tanh(inputs)
        ctx.save_for_backward(outputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Tensor:
        (outputs,) = ctx.saved_tensors
        slopes_of_inputs: Tensor = torch.ops.aten.tanh_backward(slopes, outputs)
        return slopes_of_inputs
