"""Compiled graphs with active seeds: the formula, gradients, several graphs, dynamic shapes, other backends."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.artifacts import Blueprint
from esper.execution.lifecycle import SeedLifecycleState
from tests.kernel_shelf import KernelShelf
from tests.models import Branching, mlp, small_transformer
from tests.reference import ReferenceSeed, reference_site

INNER = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


def _blueprint(start: str, seed: int, in_features: int = 8, out_features: int = 6) -> Blueprint:
    return Blueprint.bottleneck(in_features, out_features, rank=3, start=start, seed=seed)  # type: ignore[arg-type]  # keywords from a dict or parameters


def _load(model: esper.MorphableModel, layer: str, seed: int, kernel: str, **options: Any) -> None:
    assert asyncio.run(model.load_kernel(layer, seed, kernel, **options)), model.kasmina_layers[layer].seed_errors


@pytest.mark.parametrize(
    ("count", "inner"),
    [(1, "eager"), (2, "eager"), (4, "eager"), (2, "aot_eager"), pytest.param(4, "inductor", marks=pytest.mark.slow)],
)
def test_output_and_gradients_follow_the_formula(
    inner: str, count: int, shelf: KernelShelf, fresh_dynamo: None
) -> None:
    host = nn.Linear(8, 6)
    model = esper.wrap(nn.Sequential(host), platform=shelf.platform)
    alphas, isolates = [0.3, 1.0, 0.0, 0.75], [False, True, False, True]
    starts = ["kaiming", "identity", "kaiming", "orthogonal"]
    seeds = []
    for index in range(count):
        artifact = shelf.put(_blueprint(starts[index], index))
        seeds.append(ReferenceSeed(artifact, alphas[index], isolates[index]))
        _load(model, "0", index, artifact.id, alpha=alphas[index], trainable=True, isolate=isolates[index])
    compiled = torch.compile(model, backend="esper", options={"inner": inner}, fullgraph=True)
    x = torch.randn(5, 8, requires_grad=True)
    output = compiled(x)
    kernels = [p for seed in range(count) for p in model.kasmina_layers["0"].kernel_parameters(seed)]
    gradients = torch.autograd.grad(output.square().sum(), [x, *host.parameters(), *kernels])

    exact = [(seed.module(), seed) for seed in seeds]
    x64 = x.detach().double().requires_grad_()
    weight, bias = (p.detach().double().requires_grad_() for p in (host.weight, host.bias))
    expected = reference_site(x64, weight, bias, exact)
    exact_kernels = [p for module, _ in exact for p in module.parameters()]
    expected_gradients = torch.autograd.grad(expected.square().sum(), [x64, weight, bias, *exact_kernels])
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["esper", "eager", "aot_eager"])
def test_a_change_of_plan_is_never_stale(backend: str, shelf: KernelShelf, fresh_dynamo: None) -> None:
    host, x = mlp(8, 6, 4), torch.randn(3, 8)
    model = esper.wrap(host, platform=shelf.platform)
    options = {"inner": "eager"} if backend == "esper" else None
    compiled = torch.compile(model, backend=backend, options=options)
    dormant = compiled(x)
    assert torch.equal(dormant, host(x))
    first, second = (shelf.put(_blueprint("kaiming", seed)) for seed in (1, 2))
    seen = []
    for kernel in (first, second):
        _load(model, "0", 0, kernel.id, alpha=0.5)
        seen.append(compiled(x))
        torch.testing.assert_close(seen[-1], model(x))
    assert not torch.allclose(seen[0], seen[1])
    model.set_alpha("0", 0, 0.0)
    torch.testing.assert_close(compiled(x), dormant)
    assert model.unload_kernel("0", 0)
    assert torch.equal(compiled(x), dormant)
    assert torch.equal(model(x), dormant)


def test_swapping_kernels_does_not_make_dynamo_recompile(shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    compiled(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rank, start in ((2, "kaiming"), (5, "zero"), (3, "identity")):
            kernel = shelf.put(Blueprint.bottleneck(8, 6, rank=rank, start=start, seed=3))
            _load(model, "0", 1, kernel.id, alpha=0.25)
            torch.testing.assert_close(compiled(x), model(x))
        model.unload_kernel("0", 1)
        compiled(x)


def test_a_dormant_variant_comes_back_without_a_compilation(shelf: KernelShelf, fresh_dynamo: None) -> None:
    compilations = 0

    def inner(module: torch.fx.GraphModule, inputs: object) -> Any:
        nonlocal compilations
        compilations += 1
        return module.forward

    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="esper", options={"inner": inner})
    dormant = compiled(x)
    kernels = [shelf.put(_blueprint("kaiming", seed)).id for seed in (1, 2)]
    for kernel in (*kernels, *kernels):
        _load(model, "0", 0, kernel)
        compiled(x)
        model.unload_kernel("0", 0)
        assert torch.equal(compiled(x), dormant)
    assert compilations == 2  # dormant, and one for all kernels of this structure


@pytest.mark.parametrize(
    ("budget", "compiled_again"), [(0, [1, 2, 3, 2, 1, 2, 3]), (1, [1, 2, 3, 1, 3]), (256, [1, 2, 3])]
)
def test_variants_that_were_used_least_recently_leave_when_the_budget_is_spent(
    budget: int, compiled_again: list[int], shelf: KernelShelf, fresh_dynamo: None
) -> None:
    compilations = 0

    def inner(module: torch.fx.GraphModule, inputs: object) -> Any:  # each counts as 1 MiB
        nonlocal compilations
        compilations += 1
        return module.forward

    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="esper", options={"inner": inner, "variant_cache_mb": budget})
    dormant = compiled(x)
    kernels = {rank: shelf.put(Blueprint.low_rank(8, 6, rank=rank, start="kaiming")).id for rank in (1, 2, 3)}
    found = []
    for rank in (1, 2, 3, 3, 2, 1, 2, 3):
        before = compilations
        _load(model, "0", 0, kernels[rank])
        torch.testing.assert_close(compiled(x), model(x))
        found += [rank] * (compilations - before)
        model.unload_kernel("0", 0)
        before = compilations
        assert torch.equal(compiled(x), dormant)
        assert compilations == before  # the dormant one stays
    assert found == compiled_again


def test_several_graphs_change_between_the_same_two_forwards(shelf: KernelShelf, fresh_dynamo: None) -> None:
    host, x = Branching(), torch.randn(3, 8)
    model = esper.wrap(host, platform=shelf.platform, commit="manual")
    compiled = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
    dormant = compiled(x)
    one = shelf.put(Blueprint.bottleneck(8, 8, rank=2, start="kaiming", seed=1)).id
    two = shelf.put(Blueprint.bottleneck(8, 4, rank=2, start="kaiming", seed=2)).id
    assert model.request_kernel("first", 0, one).result(30)
    assert model.request_kernel("second", 0, two).result(30)
    assert torch.equal(compiled(x), dormant)
    assert model.kasmina_layers["first"].state.lifecycle(0) is SeedLifecycleState.LOADING
    transitions = model.commit()
    assert [(t.layer, t.new.name) for t in transitions] == [("first", "ACTIVE"), ("second", "ACTIVE")]
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.allclose(compiled(x), dormant)


@pytest.mark.parametrize("inner", INNER)
def test_dynamic_batch_size(inner: str, shelf: KernelShelf, fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    compiled = torch.compile(model, backend="esper", options={"inner": inner}, dynamic=True)
    for size in (2, 5, 7):
        compiled(torch.randn(size, 8))
    _load(model, "0", 0, shelf.put(_blueprint("kaiming", 1)).id, alpha=0.5, trainable=True)
    for size in (2, 5, 7, 64):
        x = torch.randn(size, 8)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inner", INNER)
def test_training_and_inference_graphs_and_autocast(inner: str, shelf: KernelShelf, fresh_dynamo: None) -> None:
    # with Inductor each of the six graphs takes seconds, and ten times as long for attention
    host = small_transformer(blocks=1) if inner != "inductor" else nn.Sequential(OrderedDict(fc1=nn.Linear(16, 32)))
    layer = "fc1" if inner == "inductor" else "0.fc1"
    model = esper.wrap(host, platform=shelf.platform)
    compiled = torch.compile(model, backend="esper", options={"inner": inner})
    x = torch.randn(2, 5, 16)
    _load(model, layer, 0, shelf.put(_blueprint("kaiming", 1, 16, 32)).id, alpha=0.5, trainable=True)
    compiled(x).sum().backward()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = compiled(x)
        assert output.dtype == torch.bfloat16
        torch.testing.assert_close(output, model(x), rtol=0.05, atol=0.05)
    model.unload_kernel(layer, 0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


def test_training_through_a_swap_gives_the_losses_of_eager_training(shelf: KernelShelf, fresh_dynamo: None) -> None:
    kernel = shelf.put(_blueprint("identity", 4)).id

    def losses(compile_it: bool) -> list[float]:
        torch.manual_seed(3)
        model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
        run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compile_it else model
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for step in range(30):
            if step == 10:
                _load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 10), trainable=True)
                optimizer.add_param_group({"params": list(model.seed_parameters())})
            x = torch.randn(16, 8)
            loss = (run(x) - x[:, :4].abs()).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        assert model.kasmina_layers["0"].state.alpha(0) == 1.0
        return found

    eager, compiled = losses(False), losses(True)
    assert eager == pytest.approx(compiled, rel=1e-4)
    assert eager[-1] < eager[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inner": "nonexistent"}, "no backend 'nonexistent'"),
        ({"inner": "esper"}, "would call itself"),
        ({"inner": "eager", "max_autotune": True}, "max_autotune"),
    ],
)
def test_unusable_options_are_refused(options: dict[str, Any], message: str, fresh_dynamo: None) -> None:
    compiled = torch.compile(esper.wrap(mlp(4, 2)), backend="esper", options=options)
    with pytest.raises(Exception, match=message):
        compiled(torch.randn(3, 4))


def test_a_failing_inner_compiler_never_reaches_the_forward(
    shelf: KernelShelf, fresh_dynamo: None, caplog: pytest.LogCaptureFixture
) -> None:
    def inner(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        if any("esper" in node.name for node in module.graph.nodes):
            raise RuntimeError("no compiler today")
        return module.forward

    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    x = torch.randn(3, 8)
    compiled = torch.compile(model, backend="esper", options={"inner": inner})
    compiled(x)
    _load(model, "0", 0, shelf.put(_blueprint("kaiming", 1)).id, alpha=0.5)
    torch.testing.assert_close(compiled(x), model(x))
    assert "runs uncompiled" in caplog.text
