"""A training job: wraps a model, loads a kernel from the team's Urza by its id, and runs forward and backward."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
import torch
from torch import nn

import esper

STEPS = 250  # of a layer, for two health signals


def main(kernel_id: str, out: str) -> None:
    """Writes input, host, output and gradients to the file `out`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = torch.randn(16, 8, requires_grad=True)
    with esper.Platform.connect() as platform:
        wrapped = esper.wrap(model, platform=platform)
        before = wrapped(x).detach()
        loaded = asyncio.run(wrapped.load_kernel("0", 1, kernel_id, alpha=0.5, trainable=True))
        assert loaded, wrapped.kasmina_layers["0"].seed_errors
        y = wrapped(x)
        y.square().mean().backward()
        kernel = list(wrapped.seed_parameters())
        assert x.grad is not None
        np.savez(
            out, x=x.detach(), before=before, y=y.detach(), x_grad=x.grad,
            **{name: value.detach() for name, value in model.state_dict().items()},
            **{f"kernel.{i}.grad": parameter.grad for i, parameter in enumerate(kernel)},
        )  # fmt: skip
        with torch.no_grad():
            for _ in range(STEPS):
                wrapped(x)
        while wrapped.get_model_stats()["layers"]["0"]["execution_count"] < STEPS:
            pass
        asyncio.run(asyncio.sleep(0.5))  # the meter looks ten times a second
        assert platform.oona.flush(10.0)
        print(platform.oona.stats(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
