"""Kernels of a model in `DistributedDataParallel`: their gradients are averaged whenever those of the host are."""

from __future__ import annotations

import weakref

import torch
from torch import distributed as dist
from torch import nn

from esper.distributed.gradients import KernelGradients
from esper.distributed.ranks import RanksError
from esper.execution.seeds.active_kernels import ActiveKernels

__all__ = ["average_like"]


def average_like(bank: ActiveKernels, ddp: nn.parallel.DistributedDataParallel, device: torch.device) -> None:
    """Have the gradients of the kernels in `bank` averaged as `ddp` averages the host's, `no_sync()` included.

    To be called on all ranks: it makes a group for this.
    """
    this = weakref.ref(ddp)

    def wanted() -> bool:
        model = this()
        if model is None:
            return False
        if model._join_config.enable:
            raise RanksError(
                "kernels that learn cannot be trained under DistributedDataParallel.join(): give all ranks as many "
                "batches, by drop_last=True or a DistributedSampler"
            )
        return bool(model.require_backward_grad_sync)

    bank.average_by(KernelGradients(group_of_its_own(ddp.process_group, device), wanted))


def group_of_its_own(group: dist.ProcessGroup, device: torch.device) -> dist.ProcessGroup:
    """A group of the same ranks that nobody else uses, connected, so that its first use does not have to do that."""
    own: dist.ProcessGroup = dist.new_group(dist.get_process_group_ranks(group), use_local_synchronization=True)
    dist.all_reduce(torch.zeros(1, device=device), group=own)
    return own
