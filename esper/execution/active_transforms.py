"""Whether torch would do more with an operation than execute it. The private names that it takes are all here."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

__all__ = ["held_elsewhere", "transforms_active"]


def transforms_active() -> bool:
    """Whether this thread is under a functorch transform, forward-mode AD, jit tracing, or a function or dispatch mode.

    Compiled machine code is opaque to all of these: it would skip the mode, or fail inside the transform. The mode of
    `torch.set_default_device` does not count, since it only concerns factories of tensors.
    """
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or _function_modes_active()
    )


def _function_modes_active() -> bool:
    return any(
        not isinstance(torch._C._get_function_stack_at(index), DeviceContext)
        for index in range(torch._C._len_torch_function_stack())
    )


def write_count(tensor: torch.Tensor) -> int:
    """How often `tensor`, or an alias of it that autograd knows, has been written in place."""
    return tensor._version


def held_elsewhere(tensor: torch.Tensor) -> bool:
    """Whether anything but `tensor`'s Python object may hold its memory: a view, an alias, a graph for a backward.

    Autograd holds a tensor that it saved, or a view of it, and what accumulates the gradient of a leaf holds that leaf.
    """
    holders: int = tensor._use_count()  # type: ignore[attr-defined]  # torch's stubs leave it out
    of_memory = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # counts the storage just asked for, too
    return holders > 1 or of_memory > 2
