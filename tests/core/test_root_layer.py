"""A model that is one linear layer itself: hooks, parametrizations and pruning of it are the layer's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import esper
from tests.core.seeds import blueprint, load
from tests.core.test_parametrized_copies import CHANGES, Change, Doubled
from tests.kernel_shelf import KernelShelf

Mode = Any


def twins(shelf: KernelShelf, change: Change, mode: Mode = "module") -> tuple[esper.MorphableModel, nn.Module]:
    """A wrapped layer and a plain one, to both of which `change` was done."""
    host = nn.Linear(8, 6)
    plain = copy.deepcopy(host)
    model = esper.wrap(host, platform=shelf.platform, mode=mode)
    torch.manual_seed(1)
    change(model)
    torch.manual_seed(1)
    change(plain)
    return model.eval(), plain.eval()


@pytest.mark.parametrize("mode", ["module", "fx"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_changes_the_weight_changes_what_the_model_computes(
    shelf: KernelShelf, x: torch.Tensor, change: Change, mode: Mode
) -> None:
    model, plain = twins(shelf, change, mode)
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    assert list(model.state_dict()) == list(plain.state_dict())
    kernel = shelf.put(blueprint())
    load(model, "", 0, kernel.id, alpha=0.5, trainable=True)
    grown = model(x)
    assert not torch.allclose(grown, plain(x))
    model.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    plain.train()(x)  # spectral norms learn from forwards
    model.eval().zero_grad()
    plain.eval()
    assert model.unload_kernel("", 0)
    assert torch.allclose(model(x), plain(x), atol=1e-6)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_copies_and_plain_models_compute_the_same(shelf: KernelShelf, x: torch.Tensor, change: Change) -> None:
    model, plain = twins(shelf, change)
    with torch.no_grad():
        want = model(x), plain(x)
        assert torch.allclose(copy.deepcopy(model)(x), want[1], atol=1e-6)
        load(model, "", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
        grown = model(x)
        twin = copy.deepcopy(copy.deepcopy(model))
        assert torch.equal(twin(x), grown)
        assert list(twin.state_dict()) == list(model.state_dict())
        assert torch.allclose(esper.bake(model)(x), grown, atol=1e-6)
        alone = copy.deepcopy(model.kasmina_layers[""])
        assert torch.equal(alone(x), grown)
        assert torch.allclose(model.kasmina_layers[""].default_transform(x), want[1], atol=1e-6)
        host = esper.unwrap(model)
        assert torch.allclose(host(x), want[1], atol=1e-6)
        assert list(host.state_dict()) == list(plain.state_dict())
    twin.train()(x).square().sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert not torch.allclose(twin.eval()(x), grown)
    assert torch.equal(model(x), grown)


def test_without_its_parametrization_again(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, plain = twins(shelf, lambda each: parametrize.register_parametrization(each, "weight", Doubled()))
    parametrize.remove_parametrizations(model, "weight")
    assert torch.allclose(model(x), plain(x), atol=1e-6)
    assert list(model.state_dict()) == ["bias", "weight"]
    assert torch.allclose(pickle.loads(pickle.dumps(model))(x), model(x))


@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_compiled(shelf: KernelShelf, x: torch.Tensor, fresh_dynamo: None, backend: str) -> None:
    model, plain = twins(shelf, CHANGES["weight_norm"])
    options: Any = {"inner": "eager"} if backend == "esper" else None
    compiled = torch.compile(model, backend=backend, options=options)
    assert torch.allclose(compiled(x), plain(x), atol=1e-6)
    load(model, "", 0, shelf.put(blueprint()).id, alpha=0.5)
    grown = compiled(x)
    assert not torch.allclose(grown, plain(x))
    assert torch.allclose(grown, model(x), atol=1e-6)


HOOKS: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda module, hook: module.register_forward_hook(hook),
    "before": lambda module, hook: module.register_forward_pre_hook(hook),
    "backward": lambda module, hook: module.register_full_backward_hook(hook),
}


@pytest.mark.parametrize("grown", [False, True])
@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_the_host_had_is_called_once(shelf: KernelShelf, x: torch.Tensor, kind: str, grown: bool) -> None:
    calls: list[nn.Module] = []
    host = nn.Linear(8, 6)
    HOOKS[kind](host, lambda module, *_: calls.append(module))
    model = esper.wrap(host, platform=shelf.platform)
    if grown:
        load(model, "", 0, shelf.put(blueprint()).id, alpha=0.5)
    calls.clear()
    model(x.requires_grad_()).sum().backward()
    assert calls == [model]


def test_its_layer_has_its_weight_wherever_it_is(shelf: KernelShelf, x: torch.Tensor) -> None:
    model: Any = esper.wrap(nn.Linear(8, 6), platform=shelf.platform)
    layer = model.kasmina_layers[""]
    model.weight = nn.Parameter(torch.zeros(6, 8))
    assert layer.weight is model.weight
    assert torch.equal(model(x), model.bias.expand(5, 6))
    model.double()
    assert layer.weight.dtype is torch.float64
    assert "in_features=8" in repr(layer)
