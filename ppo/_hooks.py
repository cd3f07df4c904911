"""Hooks of all modules at once."""

from torch.nn.modules import module

__all__ = ["any_global_hook"]

# PyTorch has a function that looks at all of them, but not yet in 2.6.
_TABLES = (
    module._global_backward_pre_hooks,
    module._global_backward_hooks,
    module._global_forward_pre_hooks,
    module._global_forward_hooks,
)


def any_global_hook() -> bool:
    """True if something runs before or behind every module, forward or backward."""
    return any(_TABLES)
