"""Whether torch would do more with an operation than execute it. The private names that it takes are all here."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["transforms_active", "write_count"]


def transforms_active() -> bool:
    """Whether this thread is under a functorch transform, forward-mode AD, or a torch function or dispatch mode.

    Compiled machine code is opaque to all of these: it would skip the mode, or fail inside the transform.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._len_torch_function_stack()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def write_count(tensor: torch.Tensor) -> int:
    """How often `tensor`, or an alias of it that autograd knows, has been written in place."""
    return tensor._version
