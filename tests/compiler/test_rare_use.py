"""What is rarer under torch.compile, and went wrong once: each test is for something that did."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import esper
from tests.compiler.agreement import (
    Block,
    Counting,
    agrees,
    agrees_through_a_swap,
    compiled,
    each_inner,
    in_the_middle,
    load,
    middle,
    put,
    unload,
)
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_functional_call_with_other_kernel_parameters(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    load(model, "0", 0, put(shelf))
    run = compiled(model)
    for shift in (0.25, 0.5):
        others = {name: parameter.detach() + shift for name, parameter in model.named_parameters()}
        expected = functional_call(model, others, (x,))
        output = functional_call(run, {f"_orig_mod.{name}": value for name, value in others.items()}, (x,))
        torch.testing.assert_close(output, expected)
    agrees(run, model, x)


def test_functional_call_inside_of_compiled_code_takes_the_kernel_parameters_that_it_is_given(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        output: Tensor = functional_call(model, parameters, (x,))
        return output + model(x)  # with its own again

    def others(shift: float) -> dict[str, Tensor]:
        return {name: (value.detach() + shift).requires_grad_() for name, value in model.named_parameters()}

    def check(parameters: dict[str, Tensor]) -> None:
        torch.testing.assert_close(run(parameters, x), call(parameters, x))
        found, expected = (
            torch.autograd.grad(function(parameters, x).square().sum(), list(parameters.values()))
            for function in (run, call)
        )
        torch.testing.assert_close(found, expected)

    run = compiled(call, fullgraph=True)
    check(others(0.25))
    load(model, "0", 0, put(shelf), alpha=0.5)
    for shift in (0.25, 0.5):
        check(others(shift))
    load(model, "0", 1, put(shelf, seed=2), alpha=0.25)
    check(others(0.25))
    hosts = {name: value for name, value in others(0.5).items() if not name.startswith("_esper")}
    check(hosts)
    unload(model, "0", 0)
    unload(model, "0", 1)
    check(hosts)
    agrees(compiled(model), model, x)


def test_kernel_parameters_that_are_thawed_one_by_one(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    run = compiled(model)
    load(model, "0", 0, put(shelf), trainable=False)
    agrees(run, model, x)
    for flag in (True, False, True):
        for parameter in model.kasmina_layers["0"].kernel_parameters(0):
            parameter.requires_grad_(flag)
        agrees(run, model, x)


def test_a_swap_under_ddp_is_no_recompilation(shelf: KernelShelf, group: None) -> None:
    model = esper.wrap(mlp(256, 1100, 256, 4), platform=shelf.platform)
    run, x = compiled(DistributedDataParallel(model, bucket_cap_mb=1)), torch.randn(3, 256)
    run(x).sum().backward()
    with torch._dynamo.config.patch(error_on_recompile=True):
        load(model, "0", 0, put(shelf, 256, 1100))
        run(x).sum().backward()
        unload(model, "0", 0)
        run(x).sum().backward()


@pytest.mark.parametrize("active", [False, True])
def test_a_compiled_model_that_is_dropped_is_freed(active: bool, shelf: KernelShelf, x: Tensor) -> None:
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=shelf.platform)
    run = compiled(model)
    run(x).sum().backward()
    if active:
        load(model, "0", 0, put(shelf))
        run(x).sum().backward()
    weight = weakref.ref(host[0].weight)
    del host, model, run
    gc.collect()
    assert weight() is None  # as with a plain model under aot_eager


def test_a_forward_replaced_by_its_compiled_self(model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    expected = model(x)
    model.forward = compiled(model.forward)
    torch.testing.assert_close(model(x), expected)
    load(model, "0", 0, put(shelf))
    assert not torch.allclose(model(x), expected)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        middle()
        return self.second(x)


def test_two_forwards_in_one_graph_with_nested_breaks(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Broken(), platform=shelf.platform)
    kernel = put(shelf, 8, 8)

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        y = model(x)
        return y, model(y)

    with torch._dynamo.config.patch(nested_graph_breaks=True), torch.no_grad():
        run = compiled(twice, "eager")
        dormant = run(x)[0]
        in_the_middle.append(lambda: model.request_kernel("second", 0, kernel, alpha=0.5).result(60))
        assert torch.equal(run(x)[0], dormant)  # its second half is in a graph that another forward begins in


def test_a_dozen_models_are_compiled(x: Tensor) -> None:
    counting = Counting()
    kinds = [type(f"Host{index}", (nn.Sequential,), {}) for index in range(12)]  # twelve classes, as plain hosts have
    models = [esper.wrap(kind(nn.Linear(8, 6 + index))) for index, kind in enumerate(kinds)]
    for model in models:
        compiled(model, counting)(x)
    assert counting.graphs == 12


class Fast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.compile(backend="eager")
    def fast(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fast(x)


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: self.b(x), (x,)))


@pytest.mark.parametrize("kind", [Fast, Choosing])
def test_eager_hosts_that_call_dynamo_themselves(kind: type[nn.Module], x: Tensor) -> None:
    host = kind()
    assert torch.equal(esper.wrap(host)(x), host(x))


@each_inner
def test_a_kernel_where_none_can_be_inlined(inner: str, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Choosing(), platform=shelf.platform, mode="module")
    run, kernel = compiled(model, inner), put(shelf, 8, 8)
    with torch.no_grad():
        dormant = run(x)
        if model.request_kernel("a", 0, kernel, alpha=0.5).result(60):  # else it is the seed's error, and all is well
            torch.testing.assert_close(run(x), model(x))
        else:
            assert torch.equal(run(x), dormant)


class Region(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    @torch.compiler.nested_compile_region
    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(x).relu()


def test_nested_compile_regions(shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(nn.Sequential(*[Region() for _ in range(4)]), platform=shelf.platform)
    agrees_through_a_swap(compiled(model), model, {"1.fc": put(shelf, 8, 8)}, x)


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


@torch.library.custom_op("esper_tests::double", mutates_args=())
def double(x: Tensor) -> Tensor:
    return 2 * x


double.register_fake(torch.empty_like)
double.register_autograd(lambda ctx, gradient: 2 * gradient)


class Special(nn.Module):
    def __init__(self, special: Any) -> None:
        super().__init__()
        self.first, self.last, self.special = nn.Linear(8, 6), nn.Linear(6, 4), special

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.special(self.first(x)))


@pytest.mark.slow
@pytest.mark.parametrize("special", [Double.apply, double], ids=["autograd function", "custom operator"])
def test_what_a_worker_cannot_compile_is_compiled_here(special: Any, shelf: KernelShelf, x: Tensor) -> None:
    model = esper.wrap(Special(special), platform=shelf.platform)
    agrees_through_a_swap(compiled(model, "inductor"), model, {"first": put(shelf)}, x)


def test_parts_compiled_in_place_before_the_first_forward(x: Tensor) -> None:
    counting = Counting()
    model = esper.wrap(nn.Sequential(Block(), Block()))  # mode="fx"
    for block in model:
        block.compile(backend="esper", options={"inner": counting})
    model(x)
    assert counting.graphs == 2


def test_the_model_compiled_in_place_keeps_its_region(
    model: esper.MorphableModel, x: Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    before = model.explain()
    model.compile(backend="esper", options={"inner": "eager"})
    model.eval()
    model(x)
    assert model.explain() == replace(before, compiled=("",))


@pytest.mark.slow
def test_a_stored_variant_is_not_used_for_sites_in_another_order(
    shelf: KernelShelf, x: Tensor, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # an empty store
    kernels = [put(shelf), put(shelf, seed=2)]  # of one structure
    hosts = [mlp(8, 6, 8), mlp(8, 6, 8)]
    for order in ((0, 1), (1, 0)):
        torch._dynamo.reset()
        models: dict[int, esper.MorphableModel] = {}
        for index in order:
            models[index] = esper.wrap(hosts[index], platform=shelf.platform)
        first, second = models[0], models[1]

        def chain(x: Tensor, first: nn.Module = first, second: nn.Module = second) -> Tensor:
            return second(first(x))

        run = compiled(chain, "inductor")
        both = nn.ModuleList([first, second])
        agrees(run, both, x, eager=chain)
        load(first, "0", 0, kernels[0], alpha=0.5)
        load(second, "0", 0, kernels[1], alpha=0.5)
        agrees(run, both, x, eager=chain, rtol=1e-5, atol=1e-5)


def test_sizes_seen_by_one_model_do_not_make_another_dynamic() -> None:
    seen: list[bool] = []

    def inner(module: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(any(isinstance(each, torch.SymInt) for each in inputs))
        return module.forward

    class Other(nn.Sequential):
        """Another host."""

    models = [esper.wrap(kind(nn.Linear(8, 6))) for kind in (nn.Sequential, Other)]
    for model, size in zip(models, (3, 5), strict=True):
        compiled(model, inner)(torch.randn(size, 8))
    assert seen == [False, False]


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_hooks_on_a_kernels_module_run(inner: str, model: esper.MorphableModel, shelf: KernelShelf, x: Tensor) -> None:
    load(model, "0", 1, put(shelf))
    plain = model(x)
    kernel = dict(model.named_modules())["_esper.0:1"]
    kernel.register_forward_hook(lambda module, inputs, output: 2 * output)
    run = compiled(model, inner)
    assert not torch.allclose(agrees(run, model, x), plain)
    load(model, "2", 0, put(shelf, 6, 4))
    agrees(run, model, x)
    unload(model, "0", 1)
    unload(model, "2", 0)
    agrees(run, model, x)


def test_another_model_that_is_compiled_while_a_kernels_module_has_hooks(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor
) -> None:
    load(model, "0", 1, put(shelf))
    dict(model.named_modules())["_esper.0:1"].register_forward_hook(lambda module, inputs, output: 2 * output)
    other = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    run = compiled(other, fullgraph=True)
    agrees(run, other, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        agrees_through_a_swap(run, other, {"0": put(shelf, seed=2)}, x)


def test_hooks_on_a_kernel_that_comes_into_a_graph_without_them_are_a_warning(
    model: esper.MorphableModel, shelf: KernelShelf, x: Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    other = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    agrees(compiled(other), other, x)
    artifact = put(shelf)
    load(model, "0", 1, artifact)
    dict(model.named_modules())["_esper.0:1"].register_forward_hook(lambda module, inputs, output: 2 * output)
    compiled(model)(x.clone().requires_grad_())
    assert f"hooks on the module of kernel {artifact[:12]} do not run" in caplog.text
