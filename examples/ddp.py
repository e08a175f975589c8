"""Two ranks train a model together, and grow it while they do.

    torchrun --standalone --nproc-per-node=2 examples/ddp.py

Every rank asks for the same kernel, whenever it comes to it: the kernel comes into force at one and the same forward
on all of them. Its gradients are averaged as those of the host are.
"""

from __future__ import annotations

import tempfile
import time

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import esper


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" with one GPU for each rank
    rank = dist.get_rank()
    torch.manual_seed(0)
    # A platform of this rank's own; equal blueprints make equal kernels. A team shares one: see esper.Platform.connect.
    with tempfile.TemporaryDirectory() as folder, esper.Platform.embedded(folder) as platform:
        kernel = platform.compile_sync(esper.Blueprint.low_rank(16, 32, rank=4))
        model = esper.wrap(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1)), platform=platform)
        ddp = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
        model.attach_optimizer(optimizer)  # kernels that learn are in it from the forward on that all ranks agree on
        torch.manual_seed(rank)  # each rank has batches of its own
        grown_at = None
        for step in range(300):
            if step == 20 + 5 * rank:  # not even at the same step
                model.request_kernel("0", 0, kernel.id, alpha=esper.LinearRamp(0.0, 1.0, 50), trainable=True)
            x = torch.randn(64, 16)
            loss = (ddp(x) - x[:, :4].prod(dim=1, keepdim=True)).square().mean()
            loss.backward()
            if grown_at is None and list(model.seed_parameters()):
                grown_at = model.ranks.forward if model.ranks else step
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.005)  # a model of a useful size takes as long
        checksum = sum(parameter.double().sum() for parameter in model.parameters())
        print(f"rank {rank}: grown at forward {grown_at}, parameters sum up to {float(checksum):.12f}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
