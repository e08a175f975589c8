"""Copies and plain models of wrapped models whose layers were parametrized or pruned after wrapping."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import esper
from esper.execution.plain_linear import OWN_ATTRIBUTES
from tests.core.seeds import blueprint, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

Change = Callable[[nn.Module], object]


class Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


CHANGES: dict[str, Change] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "bias and weight": lambda layer: [
        parametrize.register_parametrization(layer, name, Doubled()) for name in ("weight", "bias", "weight")
    ],
    "old weight_norm": nn.utils.weight_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


def changed(shelf: KernelShelf, change: Change) -> esper.MorphableModel:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    change(model.get_submodule("0"))
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    return model.eval()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_deep_copy_is_independent_and_learns(shelf: KernelShelf, x: torch.Tensor, change: Change) -> None:
    model = changed(shelf, change)
    with torch.no_grad():  # what hooks compute can be copied then, of any module
        want = model(x)
        twin = copy.deepcopy(copy.deepcopy(model))
        assert torch.equal(twin(x), want)
    assert list(twin.state_dict()) == list(model.state_dict())
    twin.train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    twin(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.parameters())
    optimizer.step()
    assert not torch.allclose(twin.eval()(x), want)
    assert torch.equal(model(x), want)
    if parametrize.is_parametrized(twin.get_submodule("0")):
        parametrize.remove_parametrizations(twin.get_submodule("0"), "weight")
        assert torch.equal(model(x), want)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_baked_model_computes_the_same(shelf: KernelShelf, x: torch.Tensor, change: Change) -> None:
    model = changed(shelf, change)
    with torch.no_grad():
        want = model(x)
        baked = esper.bake(model)
        assert torch.allclose(baked(x), want, atol=1e-6)
    host_part = [name for name in model.state_dict() if not name.startswith("_esper.")]
    assert [name for name in baked.state_dict() if ".seed_" not in name] == host_part
    baked(x).square().sum().backward()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_layer_that_stands_alone_is_copied(shelf: KernelShelf, x: torch.Tensor, change: Change) -> None:
    layer = esper.KasminaLayer(0, 2, 8, 6, source=shelf.platform.kernel_source)
    change(layer)
    assert layer.request_kernel(0, shelf.put(blueprint()).id, alpha=0.5).result(30)
    layer.eval()
    with torch.no_grad():
        want = layer(x)
        assert torch.equal(copy.deepcopy(layer)(x), want)
        layer.unload_kernel(0)
        layer(x)
        assert torch.equal(layer.default_transform(x), layer(x))
        assert torch.equal(layer.as_host().eval()(x), layer(x))


def test_a_layer_without_its_parametrization_again(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = changed(shelf, parametrizations.weight_norm)
    twin = copy.deepcopy(model)
    parametrize.remove_parametrizations(twin.get_submodule("0"), "weight")
    assert torch.allclose(copy.deepcopy(twin)(x), model(x), atol=1e-6)


def test_what_a_layer_has_of_its_own_is_known() -> None:
    layer = esper.KasminaLayer(0, 1, 8, 6)
    behind = esper.wrap(nn.Sequential(nn.GELU()), "0").kasmina_layers["0"]
    own = [set(vars(site)) - set(vars(host)) for site, host in ((layer, nn.Linear(8, 6)), (behind, nn.GELU()))]
    assert own[0] < own[1] == OWN_ATTRIBUTES


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(8, 6), nn.Parameter(torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(self.layer(x), self.scale)


def test_a_model_that_was_parametrized_itself_is_copied(shelf: KernelShelf, x: torch.Tensor) -> None:
    model: Any = esper.wrap(Scaled(), platform=shelf.platform)
    load(model, "layer", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    parametrize.register_parametrization(model, "scale", Doubled())
    twin = copy.deepcopy(copy.deepcopy(model))
    assert isinstance(twin, esper.MorphableModel)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(twin.scale, 2 * torch.ones(6))
    with torch.no_grad():
        twin.parametrizations.scale.original.zero_()
    assert torch.equal(model.scale, 2 * torch.ones(6))
    assert twin.unload_kernel("layer", 0)
    assert not torch.equal(twin(x), model(x))
