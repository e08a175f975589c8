"""Kernels of a model that `fully_shard` has sharded: whole on every rank, with gradients that are averaged.

Their parameters are `DTensor`s that are replicated over the mesh of the host's, so that whoever goes through all
parameters (an optimizer, a clipping of norms, a checkpoint) finds one kind of tensors.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from esper import torch_internals
from esper.distributed.gradients import KernelGradients
from esper.distributed.ranks import RanksError
from esper.execution.kernels.loaded_kernel import LoadedKernel
from esper.execution.kernels.local_parts import is_shared
from esper.execution.seeds.active_kernels import ActiveKernels

__all__ = ["average_like_shards", "group_of", "is_sharded", "mesh_of", "refuse_parallel_layers", "replicate"]


def is_sharded(modules: Iterable[nn.Module]) -> bool:
    """Whether any of `modules` is one that `fully_shard` was called with. Looks at none where there are no ranks."""
    kind = _fsdp_module() if dist.is_available() and dist.is_initialized() else None
    return kind is not None and any(isinstance(each, kind) for each in modules)


def mesh_of(modules: Iterable[nn.Module]) -> Any:
    """The mesh over which `fully_shard` has sharded `modules`; None if there is nothing of the sort.

    Raises :class:`RanksError` for parameters that are shared among ranks in another way, as tensor parallelism does,
    and for modules of several meshes.
    """
    every = list(modules)
    shared = [each for module in every for each in module._parameters.values() if is_shared(each)]
    kind = _fsdp_module()
    states = [each for each in every if kind is not None and isinstance(each, kind)]
    meshes = {each.device_mesh for each in shared}  # type: ignore[union-attr]  # DTensors have one
    if not states and shared:
        raise RanksError(
            f"parameters of the model are DTensors{_first_shared(every)}, and no module of it is fully_shard()ed: "
            "kernels beside layers that are parallel by themselves (tensor parallelism, parallelize_module) are not "
            "supported, as each rank would have to have a part of them; wrap the parts of the model that are not, or "
            "shard it by fully_shard() (FSDP2) instead"
        )
    if len(meshes) > 1:
        raise RanksError(
            f"the model's parameters are shared over {len(meshes)} different meshes (tensor parallelism, or experts of "
            "their own ranks): kernels of one model need one mesh"
        )
    mesh = next(iter(meshes), None)
    if mesh is not None and mesh.ndim > max(map(torch_internals.dimensions_of_fsdp, states)):
        raise RanksError(
            f"the model's parameters are shared over a mesh of {mesh.ndim} dimensions, of which fully_shard() has not "
            "all: kernels beside layers that are parallel by themselves (tensor parallelism) are not supported"
        )
    return mesh


def _first_shared(modules: Iterable[nn.Module]) -> str:
    """Which one is, for people."""
    for module in modules:
        for name, each in module._parameters.items():
            if is_shared(each):
                where = getattr(module, "layer_name", type(module).__name__)
                return f" (as the {name} of {where!r}, {tuple(each.placements)})"  # type: ignore[union-attr]  # a DTensor's
    return ""


def refuse_parallel_layers(modules: Iterable[nn.Module]) -> None:
    """Raise :class:`RanksError` for a model that `fully_shard` has not sharded, and whose parameters are shared.

    Looks at nothing where there are no ranks.
    """
    if dist.is_available() and dist.is_initialized() and "torch.distributed.tensor" in sys.modules:
        mesh_of(modules)


def average_like_shards(bank: ActiveKernels, modules: Iterable[nn.Module], mesh: Any, device: torch.device) -> None:
    """Have the gradients of the kernels in `bank` averaged over `mesh`, whenever those of the host are.

    To be called on all ranks: it makes a group for this.
    """
    kind = _fsdp_module()
    assert kind is not None
    sharded = [weakref.ref(each) for each in modules if isinstance(each, kind)]

    def wanted() -> bool:
        return all(torch_internals.reduces_gradients(module) for each in sharded if (module := each()) is not None)

    own = group_of(mesh)
    dist.all_reduce(torch.zeros(1, device=device), group=own)
    bank.average_by(KernelGradients(own, wanted))


def group_of(mesh: Any) -> dist.ProcessGroup:
    """A group of all ranks of `mesh`; to be called on all of them."""
    group: dist.ProcessGroup = dist.new_group(mesh.mesh.flatten().tolist(), use_local_synchronization=True)
    return group


def replicate(kernel: LoadedKernel, mesh: Any) -> None:
    """Make the kernel's parameters `DTensor`s that are whole on every rank of `mesh`, where they are the same."""
    from torch.distributed.tensor import DTensor, Replicate

    module, whole = kernel.module, [Replicate()] * mesh.ndim
    for name, parameter in module._parameters.items():
        if parameter is not None and not is_shared(parameter):
            shared = DTensor.from_local(parameter.detach(), mesh, whole, run_check=False)
            module._parameters[name] = nn.Parameter(shared, requires_grad=parameter.requires_grad)
    module.is_shared = True


def _fsdp_module() -> type[nn.Module] | None:
    module = sys.modules.get("torch.distributed.fsdp")
    return None if module is None else module.FSDPModule
