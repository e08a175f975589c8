"""A program that forks while its threads stand in the middle of steps, and says what the child could do."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch

from esper.execution.kasmina_layer import KasminaLayer
from tests.execution.forked_layer import X, end_of
from tests.execution.kernel_sources import FolderOfArtifacts, make_artifact
from tests.stopped_threads import StoppedThread

_SECONDS = 10.0
_MODULES = "esper.execution"


def main() -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a child
    one, two = make_artifact(0), make_artifact(1)
    ready, slow = FolderOfArtifacts(one, two), FolderOfArtifacts(one, two)
    layers = {
        name: KasminaLayer(number, 2, 8, 8, source=ready)
        for number, name in enumerate(("alpha", "request", "cache", "telemetry"))
    }
    layers["fetch"] = KasminaLayer(4, 2, 8, 8, source=slow)
    slow.open.clear()
    fetched = layers["fetch"].request_kernel(0, one.id)
    assert slow.asked.wait(20)
    steps = [
        (lambda: layers["alpha"].set_alpha(0, 0.5), "state_layout:set_alpha", "write"),
        (lambda: layers["request"].request_kernel(0, one.id), "background:_staff", "start"),
        (lambda: layers["cache"].kernel_cache.held(one.id), "kernel_cache:held", "find"),
        (lambda: layers["telemetry"].get_layer_stats(), "telemetry:executions", "sum"),
        (lambda: KasminaLayer(9, 2, 8, 8), "plans.registry:register", "__setitem__"),
    ]
    stopped = [StoppedThread(work, f"{_MODULES}.{caller}", callee) for work, caller, callee in steps]

    child = os.fork()
    if child == 0:
        slow.open.set()
        _do(
            {
                "alpha": lambda: layers["alpha"].state.set_alpha(1, 0.25) == 0.25,
                "request": lambda: layers["request"].request_kernel(1, two.id).result(_SECONDS),
                "cache": lambda: layers["cache"].request_kernel(1, two.id).result(_SECONDS),
                "telemetry": lambda: layers["telemetry"].get_layer_stats()["active_seeds"] == 0,
                "another": lambda: KasminaLayer(9, 2, 8, 8)(X).shape == (1, 8),
                "fetch": lambda: layers["fetch"].request_kernel(1, one.id).result(_SECONDS),
            }
        )
        os._exit(0)
    print(f"child: {end_of(child)}", flush=True)
    for each in stopped:
        each.go()
    slow.open.set()
    _do(
        {
            "alpha": lambda: layers["alpha"].state.alpha(0) == 0.5,
            "fetched": lambda: fetched.result(_SECONDS),
            "request": lambda: layers["request"].request_kernel(1, two.id).result(_SECONDS),
        }
    )


def _do(what: dict[str, Callable[[], bool]]) -> None:
    for name, work in what.items():
        print(f"{name}: {work()}", flush=True)


if __name__ == "__main__":
    main()
