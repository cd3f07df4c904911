"""Torch's modes, of which a caller's own must not change what the library computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

__all__ = ["ordinary_mode"]


@contextlib.contextmanager
def ordinary_mode() -> Iterator[None]:
    """Compute in this block as if no mode were on: with gradients, tensors of full precision.

    Under `no_grad` and `inference_mode` nothing can be learned. Under `autocast` weights are
    converted once and remembered until its block ends, whatever happens to them meanwhile.
    """
    kinds = [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    with contextlib.ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            # Nor may an autocast of the policy's own, in this block, remember what it converts.
            stack.enter_context(torch.autocast(kind, enabled=False, cache_enabled=False))
        try:
            yield
        finally:
            if kinds:
                torch.clear_autocast_cache()  # the parameters may have changed
