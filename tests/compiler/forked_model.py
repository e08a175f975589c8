"""A program that forks while its threads work on a wrapped and compiled model, and says what the child could do."""

from __future__ import annotations

import os
import tempfile
import threading
from pathlib import Path

import torch

import esper
from tests.compiler.agreement import put
from tests.execution.forked_layer import CHILD_SECONDS, end_of
from tests.kernel_shelf import KernelShelf
from tests.models import mlp
from tests.stopped_threads import Stop, StoppedThread

X = torch.linspace(-1, 1, 24).reshape(3, 8)


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a child
    with tempfile.TemporaryDirectory() as folder, KernelShelf(Path(folder)) as shelf:
        model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode="fx")
        run = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
        dormant = run(X)
        assert torch.allclose(model(X), dormant)
        one, two = put(shelf, 8, 6), put(shelf, 6, 4)

        building = Stop("esper.eager.parts:_generate", "generate")
        threading.setprofile(building.look)  # of the thread that stages
        loading = model.request_kernel("0", 0, one, alpha=0.5)
        building.wait()
        threading.setprofile(None)
        report = StoppedThread(model.compile_report, "esper.compiler.variant_cache:items", "items")

        child = os.fork()
        if child == 0:
            os._exit(_in_child(model, run, two, dormant))
        print(f"child: {end_of(child)}")
        building.go()
        report.go()
        print(f"loaded: {loading.result(CHILD_SECONDS)}")
        print(f"runs: {_agrees(model, run) and not torch.allclose(run(X), dormant)}")


def _in_child(model: esper.MorphableModel, run: torch.nn.Module, kernel: str, dormant: torch.Tensor) -> int:
    if not (torch.equal(run(X), dormant) and _agrees(model, run)):
        return 2
    if not model.request_kernel("2", 0, kernel, alpha=0.5).result(CHILD_SECONDS / 2):
        return 3
    return 0 if _agrees(model, run) and not torch.allclose(run(X), dormant) else 4


def _agrees(model: esper.MorphableModel, run: torch.nn.Module) -> bool:
    return torch.allclose(run(X), model(X), atol=1e-6)


if __name__ == "__main__":
    main()
