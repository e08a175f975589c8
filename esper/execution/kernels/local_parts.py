"""The part of a tensor that is on this rank, where ranks share it as a `DTensor`."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

__all__ = ["differentiable", "is_shared", "like", "local"]


def is_shared(tensor: object) -> bool:
    """Whether `tensor` is a `DTensor`, which nobody has made as long as nobody imported its module."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Its part on this rank, in the same memory; the tensor itself if it is not shared. Nothing is differentiated."""
    with torch.no_grad():
        part: Tensor = tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]  # a DTensor has it
    return part


def differentiable(tensor: Tensor) -> Tensor:
    """As :func:`local`, with gradients that flow back into the whole."""
    part: Tensor = tensor.to_local() if is_shared(tensor) else tensor  # type: ignore[attr-defined]  # as above
    return part


def like(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor that is shared as `tensor` is, with `part` on this rank."""
    if not is_shared(tensor):
        return part
    from torch.distributed.tensor import DTensor

    shared: DTensor = DTensor.from_local(part, tensor.device_mesh, tensor.placements, run_check=False)  # type: ignore[attr-defined]  # as above
    return shared
