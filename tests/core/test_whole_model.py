"""What is done to a model as a whole: casts, functional calls, freezing, optimizers, changes of its modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, stack_module_state, vmap

import esper
from tests.core.grown import grown, saved
from tests.core.seeds import GatedPlatform, blueprint, load, outputs
from tests.kernel_shelf import KernelShelf
from tests.models import mlp, small_transformer


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_functional_call_grad_and_vmap(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = grown(shelf, mode=mode)
    parameters = {name: parameter.detach().clone() + 0.1 for name, parameter in model.named_parameters()}
    reference = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.copy_(parameters[name])
    before = model(x)
    torch.testing.assert_close(functional_call(model, parameters, x), reference(x))
    assert torch.equal(model(x), before)

    def loss(values: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        return functional_call(model, values, inputs).square().mean()

    gradients = grad(loss)(parameters, x)
    reference.requires_grad_()
    expected = torch.autograd.grad(reference(x).square().mean(), list(reference.parameters()))
    for ours, theirs in zip(gradients.values(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)

    each = vmap(grad(loss), (None, 0))(parameters, x.unsqueeze(1))
    for name, ours in each.items():
        torch.testing.assert_close(ours.mean(0), gradients[name], rtol=1e-4, atol=1e-6)


def test_an_ensemble_of_copies(shelf: KernelShelf, x: torch.Tensor) -> None:
    models = [grown(shelf) for _ in range(3)]
    stacked, buffers = stack_module_state(models)  # type: ignore[arg-type]  # a list of MorphableModels
    together = vmap(lambda values, kept: functional_call(models[0], (values, kept), x))(stacked, buffers)
    torch.testing.assert_close(together, torch.stack([model(x) for model in models]))


def test_a_first_call_with_other_parameters_warns_of_nothing(
    shelf: KernelShelf, x: torch.Tensor, recwarn: pytest.WarningsRecorder
) -> None:
    host = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6))
    model = esper.wrap(host, platform=shelf.platform)
    others = {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}
    assert torch.equal(functional_call(model, others, x), functional_call(host, others, x))
    assert not recwarn.list


CASTS: dict[str, tuple[Callable[[nn.Module], object], torch.dtype]] = {
    "double": (lambda model: model.double(), torch.float64),
    "half": (lambda model: model.half(), torch.float16),
    "bfloat16": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "inside": (lambda model: nn.Sequential(model).double(), torch.float64),
    "the host": (lambda model: esper.unwrap(model).double(), torch.float64),  # type: ignore[arg-type]  # a Sequential
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_reaches_host_and_kernels(shelf: KernelShelf, x: torch.Tensor, cast: str) -> None:
    action, dtype = CASTS[cast]
    model = grown(shelf)
    before = model(x)
    action(model)
    if cast == "the host":  # which does not know of the kernels
        assert {p.dtype for name, p in model.named_parameters() if not name.startswith("_esper.")} == {dtype}
        return
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(x.to(dtype))
    torch.testing.assert_close(output.float(), before, rtol=0.05, atol=0.05)
    output.sum().backward()
    assert model.kasmina_layers["0"].state.alpha_blend.dtype == torch.float16


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_a_dormant_forward_takes_no_lock(shelf: KernelShelf, x: torch.Tensor, mode: Any) -> None:
    class Held:
        def __enter__(self) -> None:
            raise AssertionError("a dormant forward took the lock")

        def __exit__(self, *_: object) -> None: ...

    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode=mode, telemetry_enabled=False)
    for _ in range(2):  # the first one commits, and notes which layers are called
        model(x)
    lock, model.runtime.lock = model.runtime.lock, Held()  # type: ignore[assignment]  # whatever asks for it fails
    try:
        model(x).sum().backward()
    finally:
        model.runtime.lock = lock


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["fx", "module"])
def test_a_model_moves_with_its_kernels(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = grown(shelf, mode=mode)
    before = model(x)
    for device in ("cuda", "cpu", "cuda"):
        model.to(device)
        assert {parameter.device.type for parameter in model.parameters()} == {device}
        assert model.runtime.state.device.type == device
        torch.testing.assert_close(model(x.to(device)).cpu(), before, rtol=1e-3, atol=1e-3)
    fresh = esper.wrap(mlp(8, 6, 4), seeds_per_layer=3, platform=shelf.platform)
    fresh.load_state_dict(saved(model))
    torch.testing.assert_close(fresh(x), before, rtol=1e-3, atol=1e-3)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x.cuda()), model(x.cuda()))
    load(model, "2", 0, shelf.put(blueprint(6, 4, seed=3)).id, trainable=True)
    model(x.cuda()).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.is_cuda for parameter in model.seed_parameters())


@pytest.mark.parametrize("when", ["staged", "under way"])
def test_a_cast_reaches_kernels_that_are_not_yet_in_force(shelf: KernelShelf, x: torch.Tensor, when: str) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated, commit="manual")  # type: ignore[arg-type]  # as much of a platform as is needed
    kernel = shelf.put(blueprint()).id
    gate = gated.hold(kernel)
    future = model.request_kernel("0", 0, kernel, alpha=0.5)
    gated.wait_until_held()
    if when == "under way":
        model.double()
    gate.set()
    if when == "under way":
        assert future.result(30) is False
        assert "float64" in model.kasmina_layers["0"].seed_errors[0]
        return
    assert future.result(30)
    model.double()
    model.commit()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    assert model(x.double()).dtype == torch.float64


@pytest.mark.parametrize("compiled", [True, False])
def test_requires_grad_reaches_kernels_and_never_the_cache(
    shelf: KernelShelf, x: torch.Tensor, compiled: bool, fresh_dynamo: None
) -> None:
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform)
    kernel = shelf.put(blueprint()).id
    load(model, "0", 0, kernel, alpha=0.5)
    load(model, "0", 1, kernel, alpha=0.25)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compiled else model
    run(x).sum().backward()
    kernels = [p for seed in range(2) for p in model.kasmina_layers["0"].kernel_parameters(seed)]
    assert list(model.seed_parameters()) == []
    model.requires_grad_()
    assert {id(parameter) for parameter in model.seed_parameters()} == {id(parameter) for parameter in kernels}
    run(x).sum().backward()
    assert all(parameter.grad is not None for parameter in kernels)
    first, second = (model.kasmina_layers["0"].kernel_parameters(seed) for seed in range(2))
    with torch.no_grad():
        first[0].add_(1.0)
    assert not torch.equal(first[0], second[0])
    fresh = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(fresh, "0", 0, kernel)
    assert torch.equal(fresh.kasmina_layers["0"].kernel_parameters(0)[0], second[0])
    model.requires_grad_(False)
    assert not run(x).requires_grad


def test_apply_visits_every_module(shelf: KernelShelf) -> None:
    model, seen = grown(shelf), []

    def visit(module: nn.Module) -> None:
        seen.append(module)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)

    assert model.apply(visit) is model
    assert {id(module) for module in seen} == {id(module) for module in model.modules()}
    assert not esper.unwrap(model)[0].weight.any()  # type: ignore[index]  # a Sequential


def test_parameters_replaced_on_the_host_are_seen(shelf: KernelShelf, x: torch.Tensor, fresh_dynamo: None) -> None:
    host = mlp(8, 6, 4)
    for mode in ("fx", "module"):
        model = esper.wrap(host, platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
        compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
        compiled(x), model(x)
        host[0].weight = nn.Parameter(torch.randn(6, 8))
        assert torch.equal(model(x), host(x))
        torch.testing.assert_close(compiled(x), host(x))
        host.load_state_dict(mlp(8, 6, 4).state_dict(), assign=True)
        assert torch.equal(model(x), host(x))
        torch.testing.assert_close(compiled(x), host(x))
        model[2].bias = nn.Parameter(torch.randn(4))
        assert host[2].bias is model[2].bias
        assert torch.equal(model(x), host(x))


def test_memory_is_shared_between_processes(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    expected = model(x)
    assert model.share_memory() is model
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert torch.equal(model(x), expected)
    sender, receiver = torch.multiprocessing.get_context("spawn").SimpleQueue(), None
    sender.put(model)  # as it is sent to a worker: parameters by reference
    receiver = sender.get()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert not any(parameter.any() for parameter in receiver.parameters() if parameter.requires_grad)


def test_modules_that_are_added_replaced_and_deleted(x: torch.Tensor) -> None:
    host = small_transformer(8, 2, 1)
    model = esper.wrap(host)
    inputs = torch.randn(2, 5, 8)
    model.add_module("tail", nn.Linear(4, 2))
    assert model(inputs).shape == (2, 5, 2)
    del model.tail
    assert model(inputs).shape == (2, 5, 4)
    with pytest.raises(AttributeError):
        del model.tail
    model[0].fc1 = nn.Linear(8, 16, bias=False)
    assert not torch.equal(model(inputs), host(inputs))
    twin = copy.deepcopy(model)
    assert torch.equal(twin(inputs), model(inputs))
    assert twin[0].fc1 is twin.kasmina_layers["0.fc1"]
    model.plain = 3
    assert not hasattr(host, "plain")
    del model.plain
    assert not hasattr(model, "plain")


def test_containers_stay_containers(shelf: KernelShelf) -> None:
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=shelf.platform)
    assert len(model) == 3  # type: ignore[arg-type]  # the host's own method
    assert [isinstance(each, esper.KasminaLayer) for each in model] == [True, False, True]
    assert model[-1] is model.kasmina_layers["2"]
    load(model, "0", 0, shelf.put(blueprint()).id)
    assert len(model) == 3  # type: ignore[arg-type]  # the host's own method
    model[1] = nn.Tanh()
    model.append(nn.Linear(4, 2))
    assert [name for name, _ in model.named_children()] == ["0", "1", "2", "3"]
    assert model(torch.randn(3, 8)).shape == (3, 2)
    del model[3]
    assert model(torch.randn(3, 8)).shape == (3, 4)
    assert len(copy.deepcopy(model)) == 3
    assert type(host[1]) is nn.ReLU
    plain = esper.wrap(small_transformer(8, 2, 1)[0])
    assert not hasattr(plain, "__len__")
    assert bool(plain)


def test_backward_hooks_of_the_host_run() -> None:
    host, calls = mlp(8, 4), []
    host.register_full_backward_hook(lambda module, inputs, outputs: calls.append("module"))
    host[0].register_full_backward_pre_hook(lambda module, outputs: calls.append("layer"))
    x = torch.randn(3, 8, requires_grad=True)
    esper.wrap(host)(x).sum().backward()
    assert sorted(calls) == ["layer", "module"]
    assert torch.equal(outputs(esper.wrap(host), x), outputs(host, x))


def test_reports_of_a_model_without_a_platform_open_none(monkeypatch: pytest.MonkeyPatch, shelf: KernelShelf) -> None:
    def opened() -> Any:
        raise AssertionError("the default platform was opened")

    monkeypatch.setattr("esper.platform.default_platform", opened)
    monkeypatch.setattr("esper.platform._default", None)
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=3)
    model.load_state_dict(saved(grown(shelf)))
    assert model.unload_kernel("0", 0)
