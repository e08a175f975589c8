"""What becomes of a compiled model whose compile workers, or the compilers that they run, come to grief."""

from __future__ import annotations

import itertools
from concurrent.futures import Future
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import Blueprint
from tests.compiler.agreement import agrees, load, put, unload
from tests.compiler.moody_compiler import Mood, MoodyCompiler
from tests.compiler.variants import AMPLE, in_force, paused_workers, train, wait_until
from tests.core.seeds import GatedPlatform
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = [pytest.mark.xdist_group("compile workers"), pytest.mark.slow]
X = torch.linspace(-1, 1, 12).reshape(3, 4)
UNLUCKY = "two compile workers died of the same job; the second was killed by SIGKILL, as happens when memory runs out"


class Grown:
    """A wrapped model, its compiled form that has made a step, and what is known of its loads."""

    def __init__(self, shelf: KernelShelf, commit: Any = "auto", **options: str) -> None:
        self.platform = GatedPlatform(shelf)
        self.model = esper.wrap(mlp(4, 4, 2), platform=self.platform, commit=commit)  # type: ignore[arg-type]  # the parts that wrap asks a platform for
        self.run: nn.Module = torch.compile(self.model, backend="esper", options=options)  # type: ignore[assignment]  # torch.compile is not typed as returning a module
        self.layer = self.model.kasmina_layers["0"]
        train(self.run, X)

    def output(self) -> Tensor:
        """In the graph of a training step, without moving anything."""
        result: Tensor = self.run(X.clone().requires_grad_())
        return result.detach()

    def request(self, kernel: str, seed: int = 0) -> Future[bool]:
        return self.model.request_kernel("0", seed, kernel, alpha=0.5, trainable=True)

    def state(self, seed: int = 0) -> str:
        return self.layer.state.lifecycle(seed).name

    def assert_in_recovery(self, reason: str, seed: int = 0, errors: int = 1) -> None:
        """The seed says that a load failed, and why; so does the last message."""
        assert self.state(seed) == "ERROR_RECOVERY"
        assert self.layer.state.errors(seed) == errors
        assert reason in self.layer.seed_errors[seed]
        report = self.platform.oona.of("innovation.field_reports")[-1]
        assert (report.layer_name, report.seed_idx, report.state) == ("0", seed, "ERROR_RECOVERY")
        assert (report.error_count, report.reason) == (errors, self.layer.seed_errors[seed])

    def assert_loads(self, kernel: str, seed: int = 0) -> None:
        """A worker compiles for the next load, and the error is forgotten."""
        load(self.model, "0", seed, kernel)
        agrees(self.run, self.model, X)
        assert in_force(self.model) == ["worker"]
        assert seed not in self.layer.seed_errors


_ranks = itertools.count(1)


def unseen(shelf: KernelShelf) -> str:
    """A kernel of a structure that no worker has compiled before."""
    return put(shelf, 4, 4, rank=next(_ranks))


def test_a_load_survives_the_death_of_one_worker(compiler: MoodyCompiler, shelf: KernelShelf) -> None:
    grown = Grown(shelf)
    grown.assert_loads(unseen(shelf), seed=1)  # or the end of another module's worker would be counted below
    crashes = crashes_so_far()
    compiler.mood = "deadly once"
    assert grown.request(unseen(shelf)).result(AMPLE), grown.layer.seed_errors
    agrees(grown.run, grown.model, X)
    assert (grown.state(), in_force(grown.model)) == ("ACTIVE", ["worker"])
    assert crashes_so_far() == crashes + 1
    assert grown.layer.state.errors(0) == 0


def crashes_so_far() -> int:
    workers = esper.wrap(mlp(4, 2)).compile_report().workers
    return 0 if workers is None else workers.crashes


def test_a_load_that_kills_every_worker_fails_and_leaves_the_rest_alone_and_the_next_one_works(
    compiler: MoodyCompiler, shelf: KernelShelf
) -> None:
    grown, kernel = Grown(shelf), unseen(shelf)
    before = grown.output()
    compiler.mood = "deadly"
    assert grown.request(kernel).result(AMPLE) is False
    grown.assert_in_recovery(UNLUCKY)
    assert torch.equal(grown.output(), before)
    agrees(grown.run, grown.model, X)
    assert in_force(grown.model) == ["host compile"]

    compiler.mood = "good"
    load(grown.model, "0", 1, unseen(shelf))
    before = grown.output()
    compiler.mood = "deadly"
    assert grown.request(kernel).result(AMPLE) is False
    grown.assert_in_recovery(UNLUCKY, errors=2)
    assert torch.equal(grown.output(), before)
    agrees(grown.run, grown.model, X)
    assert (grown.state(1), in_force(grown.model)) == ("ACTIVE", ["worker"])
    compiler.mood = "good"
    grown.assert_loads(kernel)


def test_with_a_fallback_a_load_that_kills_every_worker_runs_uncompiled(
    compiler: MoodyCompiler, shelf: KernelShelf, caplog: pytest.LogCaptureFixture
) -> None:
    grown = Grown(shelf, fallback="eager")
    compiler.mood = "deadly"
    assert grown.request(unseen(shelf)).result(AMPLE), grown.layer.seed_errors
    agrees(grown.run, grown.model, X)
    assert (grown.state(), in_force(grown.model)) == ("ACTIVE", ["uncompiled"])
    (reason,) = (each.reason for each in grown.model.compile_report().graphs[0].variants if each.in_force)
    assert UNLUCKY in reason
    assert "runs uncompiled: two compile workers died" in caplog.text
    compiler.mood = "good"
    grown.assert_loads(unseen(shelf))


@pytest.mark.parametrize("mood", ["dying", "dying in mid-link"])
def test_an_empty_library_that_a_dying_compiler_left_is_made_anew(
    mood: Mood, compiler: MoodyCompiler, shelf: KernelShelf
) -> None:
    grown, kernel = Grown(shelf), unseen(shelf)
    before = grown.output()
    compiler.mood = mood
    if grown.request(kernel).result(AMPLE):
        agrees(grown.run, grown.model, X)
    else:  # what the compiler said, unless Inductor has the source in its cache: then it tries twice
        assert mood == "dying"
        grown.assert_in_recovery("the inner compiler failed on graph")
        assert torch.equal(grown.output(), before)
        grown.assert_loads(kernel)
    assert compiler.outputs.count(compiler.outputs[0]) == 2
    assert (grown.state(), in_force(grown.model)) == ("ACTIVE", ["worker"])


@pytest.mark.parametrize("fallback", ["raise", "eager"])
def test_an_unload_whose_compilation_fails(
    fallback: Literal["raise", "eager"], compiler: MoodyCompiler, shelf: KernelShelf
) -> None:
    grown = Grown(shelf, fallback=fallback)
    with grown.model.runtime.lock:  # so that both are compiled together, and neither ever alone
        loads = [grown.request(unseen(shelf), seed) for seed in (0, 1)]
    assert all(each.result(AMPLE) for each in loads)
    before = agrees(grown.run, grown.model, X)
    compiler.mood = "deadly"
    assert grown.model.unload_kernel("0", 0)
    if fallback == "raise":
        wait_until(lambda: grown.layer.state.errors(0), "the failure")
        assert UNLUCKY in grown.layer.seed_errors[0]
        assert torch.equal(agrees(grown.run, grown.model, X), before)
        assert [grown.state(seed) for seed in (0, 1)] == ["ACTIVE", "ACTIVE"]
        report = grown.platform.oona.of("innovation.field_reports")[-1]
        assert (report.state, report.error_count, report.reason) == ("ACTIVE", 1, grown.layer.seed_errors[0])
        compiler.mood = "good"
        unload(grown.model, "0", 0)
    wait_until(lambda: train(grown.run, X) and grown.state() == "DORMANT", "the unload")
    agrees(grown.run, grown.model, X)
    assert [grown.state(seed) for seed in (0, 1)] == ["DORMANT", "ACTIVE"]
    assert in_force(grown.model) == ["worker" if fallback == "raise" else "uncompiled"]


@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_a_cold_start_whose_worker_fails_goes_on_uncompiled_and_loads_kernels(
    commit: str, compiler: MoodyCompiler, shelf: KernelShelf, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.mood = "deadly"
    grown = Grown(shelf, commit, cold_start="eager")
    wait_until(lambda: "goes on uncompiled: two compile workers died" in caplog.text, "the failure")
    dormant = agrees(grown.run, grown.model, X)
    assert in_force(grown.model) == ["uncompiled"]
    (variant,) = grown.model.compile_report().graphs[0].variants
    assert UNLUCKY in variant.reason
    assert grown.request(unseen(shelf)).result(AMPLE) is False
    grown.assert_in_recovery(UNLUCKY)
    compiler.mood = "good"
    assert grown.request(unseen(shelf)).result(AMPLE), grown.layer.seed_errors
    if commit == "manual":
        assert torch.equal(agrees(grown.run, grown.model, X), dormant)
        assert [each.layer for each in grown.model.commit()] == ["0"]
    agrees(grown.run, grown.model, X)
    assert (grown.state(), in_force(grown.model)) == ("ACTIVE", ["worker"])
    unload(grown.model, "0", 0)
    assert torch.equal(agrees(grown.run, grown.model, X), dormant)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_kernel_with_norms_is_compiled_while_the_model_is_cast(
    dtype: torch.dtype, compiler: MoodyCompiler, shelf: KernelShelf
) -> None:
    grown = Grown(shelf)
    kernel = shelf.put(Blueprint.residual_mlp(4, 4, hidden=4, start="kaiming")).id
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype is torch.bfloat16 else {}
    with paused_workers():
        future = grown.request(kernel)
        wait_until(lambda: grown.model.compile_report().graphs[0].waiting, "the beginning of a compilation")
        grown.model.to(dtype)
        train(grown.run, X.to(dtype))
    assert future.result(AMPLE), grown.layer.seed_errors
    assert agrees(grown.run, grown.model, X.to(dtype), **tolerance).dtype == dtype
    assert grown.state() == "ACTIVE"
    grown.model.float()
    agrees(grown.run, grown.model, X)


def test_a_stored_variant_whose_libraries_were_deleted_is_a_miss(compiler: MoodyCompiler, shelf: KernelShelf) -> None:
    kernel = unseen(shelf)
    Grown(shelf).assert_loads(kernel)
    torch._dynamo.reset()  # models of one class share their graphs' variants
    again = Grown(shelf)
    load(again.model, "0", 0, kernel)
    assert in_force(again.model) == ["store"]
    assert compiler.outputs
    for output in compiler.outputs:
        output.unlink()
    torch._dynamo.reset()
    Grown(shelf).assert_loads(kernel)


def test_what_a_worker_compiled_for_a_load_that_was_called_off_is_kept(
    compiler: MoodyCompiler, shelf: KernelShelf
) -> None:
    grown, kernel = Grown(shelf), unseen(shelf)
    before = written(grown.model)
    compiler.mood = "hanging"
    future = grown.request(kernel)
    wait_until(lambda: compiler.pids, "the compilation")
    assert grown.model.unload_kernel("0", 0)
    assert future.result(AMPLE) is False
    compiler.mood = "good"
    wait_until(lambda: written(grown.model) > before, "an entry in the store", seconds=60)
    load(grown.model, "0", 0, kernel)
    agrees(grown.run, grown.model, X)
    assert in_force(grown.model) == ["store"]


def written(model: esper.MorphableModel) -> int:
    store = model.compile_report().store
    assert store is not None
    return store.writes
