"""Programs that come to grief, for `test_process_faults.py`. Each prints what came of it, one JSON object a line."""

from __future__ import annotations

import json
import os
import signal
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import esper
from esper.compiler.workers import default_workers
from tests.compiler.agreement import agrees, load, put, unload
from tests.compiler.moody_compiler import MoodyCompiler
from tests.compiler.variants import AMPLE, in_force, train, wait_until, workers
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

__all__ = ["ends", "forks", "has_a_worker_that_stops", "has_no_compiler"]

X = torch.linspace(-1, 1, 12).reshape(3, 4)
CHILD_SECONDS = 100


def _say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def _compiled(shelf: KernelShelf, **options: str) -> tuple[esper.MorphableModel, Any]:
    model = esper.wrap(mlp(4, 4, 2), platform=shelf.platform)
    return model, torch.compile(model, backend="esper", options=options)


def _outputs(run: nn.Module) -> Tensor:
    output: Tensor = run(X.clone().requires_grad_())
    return output.detach()


def _state(model: esper.MorphableModel) -> dict[str, object]:
    layer = model.kasmina_layers["0"]
    return {
        "state": layer.state.lifecycle(0).name,
        "errors": layer.state.errors(0),
        "reason": layer.seed_errors.get(0, ""),
        "in_force": in_force(model),
    }


def has_a_worker_that_stops() -> None:
    """The setting of the time limit comes with the environment."""
    with KernelShelf(Path(sys.argv[1])) as shelf:
        model, run = _compiled(shelf)
        train(run, X)
        before, kernel = _outputs(run), put(shelf, 4, 4)
        default_workers().submit(b"").exception(AMPLE)  # no job, but the worker is there then
        (worker,) = workers()
        worker.suspend()
        loaded = model.request_kernel("0", 0, kernel, alpha=0.5).result(AMPLE)
        _say(loaded=loaded, same=torch.equal(_outputs(run), before), **_state(model))
        load(model, "0", 0, kernel)
        agrees(run, model, X)
        _say(**_state(model), others=worker.pid not in [each.pid for each in workers()])


def has_no_compiler(only_raises: bool = False) -> None:
    """Where the environment says so. Says what is raised, and then what becomes of a fallback and of a cold start."""
    with KernelShelf(Path(sys.argv[1])) as shelf:
        kernel = put(shelf, 4, 4)
        _, run = _compiled(shelf)
        try:
            train(run, X)
        except Exception as error:  # noqa: BLE001  # it is what is looked at
            _say(raised=str(error))
        if only_raises:
            return

        model, run = _compiled(shelf, fallback="eager")
        agrees(run, model, X)
        dormant = in_force(model)
        load(model, "0", 0, kernel)
        agrees(run, model, X)
        _say(dormant=dormant, **_state(model))

        model, run = _compiled(shelf, cold_start="eager")
        before = agrees(run, model, X)
        loaded = model.request_kernel("0", 0, kernel, alpha=0.5).result(AMPLE)
        _say(loaded=loaded, same=torch.equal(agrees(run, model, X), before), **_state(model))


def ends(when: str) -> None:
    """In the middle of a cold start, or of a load. `CXX` names a moody compiler."""
    compiler, shelf = MoodyCompiler(Path(os.environ["CXX"]).parent), KernelShelf(Path(sys.argv[1]))
    if when == "cold start":
        compiler.mood = "hanging"
        model, run = _compiled(shelf, cold_start="eager")
        train(run, X)
        earlier = 0
    else:
        model, run = _compiled(shelf)
        train(run, X)
        earlier = len(compiler.pids)
        compiler.mood = "hanging"
        model.request_kernel("0", 0, put(shelf, 4, 4), alpha=0.5)
    wait_until(lambda: len(compiler.pids) > earlier, "a compilation")
    _say(pids=[*(each.pid for each in workers()), *compiler.pids[earlier:]], state=_state(model)["state"])


def forks() -> None:
    """Once the model is wrapped, while it loads its first kernel into compiled code, and when it has nothing to do."""
    torch.set_num_threads(1)  # OpenMP's threads do not live on in a child
    with KernelShelf(Path(sys.argv[1])) as shelf:
        model, run = _compiled(shelf)
        _fork(model, model, put(shelf, 4, 4, rank=1))
        assert model.unload_kernel("0", 0)
        train(run, X)
        loading = model.request_kernel("0", 0, put(shelf, 4, 4, rank=2), alpha=0.5, trainable=True)
        _fork(model, run, put(shelf, 4, 4, rank=3), loading)
        unload(model, "0", 0)
        _fork(model, run, put(shelf, 4, 4, rank=4))


def _fork(model: esper.MorphableModel, run: Any, kernel: str, loading: Future[bool] | None = None) -> None:
    """Go on in a child, and then in this process."""
    child = os.fork()
    if child == 0:
        signal.alarm(CHILD_SECONDS)
        _go_on(model, run, kernel, "child")
        os._exit(0)
    _say(child=os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), loaded=loading and loading.result(AMPLE))
    _go_on(model, run, kernel, "parent")


def _go_on(model: esper.MorphableModel, run: Any, kernel: str, who: str) -> None:
    """Run, load a kernel, and run with it."""
    model.unload_kernel("0", 0)  # what may be under way
    before = agrees(run, model, X)
    load(model, "0", 0, kernel)
    after = agrees(run, model, X)
    _say(who=who, changed=not torch.allclose(before, after), **_state(model))
