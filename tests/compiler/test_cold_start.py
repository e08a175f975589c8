"""`options={"cold_start": "eager"}`: steps begin at once, and go on in compiled code when a worker has it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import esper
from tests.compiler.agreement import agrees, load, put
from tests.compiler.variants import compilations, in_force, jobs, origins, train, train_until, wait_until
from tests.kernel_shelf import KernelShelf
from tests.models import Branching, mlp

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]
COLD = {"cold_start": "eager"}


def _uncompiled() -> dict[str, int]:
    return {what: count for what, count in compilations().items() if not what.startswith(("frames", "stats"))}


@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_the_first_call_compiles_nothing_and_compiled_code_follows(
    commit: str, shelf: KernelShelf, empty_store: Path
) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform, commit=commit)  # type: ignore[arg-type]  # a text among the parameters
    run, x, before, done = torch.compile(model, backend="esper", options=COLD), torch.randn(3, 4), _uncompiled(), jobs()
    run(x.clone().requires_grad_())
    (variant,) = model.compile_report().graphs[0].variants
    assert (variant.origin, variant.reason) == ("uncompiled", "waits for a compile worker")
    dormant = agrees(run, model, x)
    wait_until(lambda: train(run, x) and in_force(model) == ["worker"], "a compiled dormant variant")
    assert torch.allclose(agrees(run, model, x), dormant)
    assert jobs() == done + 1
    load(model, "0", 0, put(shelf, 4, 6)) if commit == "auto" else None
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    assert _uncompiled() == before


def test_a_kernel_loaded_during_a_cold_start(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    run, x, before = torch.compile(model, backend="esper", options=COLD), torch.randn(3, 4), _uncompiled()
    train(run, x)
    future = model.request_kernel("0", 0, put(shelf, 4, 6), alpha=0.5, trainable=True)
    train_until(future.done, run, x)
    assert future.result()
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    wait_until(lambda: origins(model) == [["worker", "worker"]], "the dormant variant")
    assert model.unload_kernel("0", 0)
    agrees(run, model, x)
    assert in_force(model) == ["worker"]
    assert _uncompiled() == before


def test_a_cold_start_with_a_kernel_in_force(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(mlp(4, 6, 2), platform=shelf.platform)
    load(model, "0", 0, put(shelf, 4, 6))
    run, x, before = torch.compile(model, backend="esper", options=COLD), torch.randn(3, 4), _uncompiled()
    agrees(run, model, x)
    assert in_force(model) in (["uncompiled"], ["worker"])  # a worker with nothing else to do may be done already
    wait_until(lambda: train(run, x) and in_force(model) == ["worker"], "a compiled variant")
    agrees(run, model, x)
    assert _uncompiled() == before


def test_several_graphs_start_cold(shelf: KernelShelf, empty_store: Path) -> None:
    model = esper.wrap(Branching(), platform=shelf.platform)
    run, x, before = torch.compile(model, backend="esper", options=COLD), torch.randn(3, 8), _uncompiled()
    agrees(run, model, x)
    assert set(in_force(model)) <= {"uncompiled", "worker"}  # as above
    wait_until(lambda: train(run, x) and in_force(model) == ["worker"] * 2, "compiled dormant variants")
    agrees(run, model, x)
    assert _uncompiled() == before
