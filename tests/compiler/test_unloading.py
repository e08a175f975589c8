"""Unloading a kernel under the backend, also where the graph without it is not compiled yet."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import esper
from tests.compiler.agreement import agrees, compiled, load, put, unload
from tests.compiler.moody_compiler import MoodyCompiler
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.slow
def test_a_kernel_with_which_the_graph_was_first_compiled_has_no_effect_once_it_is_unloaded(
    compiler: MoodyCompiler, shelf: KernelShelf, x: Tensor
) -> None:
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=shelf.platform)
    load(model, "0", 0, put(shelf, seed=1), alpha=0.75)
    load(model, "0", 1, put(shelf, seed=2), alpha=0.25)
    run = compiled(model, "inductor")
    with_both = agrees(run, model, x)
    assert not torch.allclose(with_both, host(x), rtol=0.05, atol=0.05)
    compiler.mood = "hanging"
    for seed in (1, 0):
        assert model.unload_kernel("0", seed)
        torch.testing.assert_close(run(x), model(x) if seed else host(x))
    compiler.mood = "good"
    unload(model, "0", 0)
    torch.testing.assert_close(run(x), host(x))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_graph_that_was_first_compiled_with_a_kernel_has_its_dormant_variant_at_once(
    inner: str, shelf: KernelShelf, x: Tensor
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, put(shelf))
    run = compiled(model, inner)
    agrees(run, model, x)
    (graph,) = model.compile_report().graphs
    assert {variant.plan for variant in graph.variants} >= {"dormant"}
    assert model.unload_kernel("0", 0)
    agrees(run, model, x)
    assert model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"
