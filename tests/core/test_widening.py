"""Hidden neurons beside a feed-forward block, which a baked model has in the block's own two linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from esper.artifacts.families import ACTIVATIONS
from esper.core.errors import WrapError
from esper.growth import Probe, selected
from tests.core.seeds import load, outputs
from tests.kernel_shelf import KernelShelf

IN, HIDDEN, OUT = 8, 6, 5
MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "leaky_relu": nn.LeakyReLU(),
    "elu": nn.ELU(),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "hardtanh": nn.Hardtanh(),
    "hardswish": nn.Hardswish(),
    "mish": nn.Mish(),
}


def block(activation: nn.Module | None = None, *, biases: tuple[bool, bool] = (True, True), **options: Any) -> Any:
    first, last = nn.Linear(IN, HIDDEN, biases[0]), nn.Linear(HIDDEN, OUT, biases[1])
    return nn.Sequential(first, activation or nn.GELU(), nn.Dropout(options.get("dropout", 0.0)), last)


def wrapped(shelf: KernelShelf, ffn: nn.Module, **options: Any) -> esper.MorphableModel:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, IN), ffn)
    return esper.wrap(host, {"1": None, **options}, platform=shelf.platform)


def neurons(shelf: KernelShelf, count: int = 3, **options: Any) -> str:
    return shelf.put(Blueprint.widen(IN, OUT, count, **{"start": "identity", **options})).id


def drawn(model: esper.MorphableModel, *seeds: int) -> None:
    """Let the kernels have learned something."""
    with torch.no_grad():
        for seed in seeds:
            for parameter in model.kasmina_layers["1"].kernel_parameters(seed):
                parameter.copy_(torch.randn_like(parameter))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_baked_block_is_as_wide_as_it_has_grown(shelf: KernelShelf, activation: str) -> None:
    model, x = wrapped(shelf, block(MODULES[activation])), torch.randn(20, IN)
    before = outputs(model, x)
    load(model, "1", 0, neurons(shelf, 3, activation=activation), alpha=0.5, trainable=True)
    load(model, "1", 2, neurons(shelf, 2, activation=activation, bias=False), trainable=True)
    assert torch.equal(outputs(model, x), before)
    drawn(model, 0, 2)
    grown = esper.bake(model)
    assert [type(each) for each in grown[1]] == [type(each) for each in model[1].default_transform]
    assert (grown[1][0].out_features, grown[1][3].in_features) == (HIDDEN + 5, HIDDEN + 5)
    assert grown[1][0].weight.shape == (HIDDEN + 5, IN)
    assert not torch.allclose(outputs(model, x), before)
    torch.testing.assert_close(outputs(grown, x), outputs(model, x), rtol=1e-5, atol=1e-5)
    assert model[1][0].weight.shape == (HIDDEN, IN)


def test_a_fossil_is_baked_with_its_share(shelf: KernelShelf) -> None:
    model, x = wrapped(shelf, block()), torch.randn(20, IN)
    load(model, "1", 0, neurons(shelf), alpha=0.25, trainable=True)
    drawn(model, 0)
    assert model.fossilize("1", 0)
    torch.testing.assert_close(outputs(esper.bake(model), x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_baked_block_are_those_of_the_wrapped_one(shelf: KernelShelf) -> None:
    model, x = wrapped(shelf, block().double()), torch.randn(20, IN, dtype=torch.double)
    model.double()
    load(model, "1", 0, neurons(shelf, dtype="float64"), trainable=True)
    drawn(model, 0)
    grown = esper.bake(model)
    for each in (model, grown):
        each.zero_grad()
        each(x).square().sum().backward()
    fan_in, bias, fan_out = (each.grad for each in model.kasmina_layers["1"].kernel_parameters(0))
    torch.testing.assert_close(grown[1][0].weight.grad, torch.cat([model[1][0].weight.grad, fan_in]))
    torch.testing.assert_close(grown[1][0].bias.grad, torch.cat([model[1][0].bias.grad, bias]))
    torch.testing.assert_close(grown[1][3].weight.grad, torch.cat([model[1][3].weight.grad, fan_out], 1))


class Residual(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("ffn", "kernel"),
    [
        (block(nn.ReLU()), Blueprint.widen(IN, OUT, 3)),
        (block(nn.LeakyReLU(0.2)), Blueprint.widen(IN, OUT, 3, activation="leaky_relu")),
        (block(biases=(False, True)), Blueprint.widen(IN, OUT, 3)),
        (block(biases=(True, False)), Blueprint.bottleneck(IN, OUT, 3)),
        (block(dropout=0.5).eval(), Blueprint.widen(IN, OUT, 3)),
        (Residual(*block()), Blueprint.widen(IN, OUT, 3)),
        (block(), Blueprint.deepen(IN, OUT, 3)),
        (block(), Blueprint.widen(IN, OUT, 3, start="kaiming")),
    ],
    ids=["activation", "its options", "bias", "bias of the output", "dropout", "class", "depth", "no neurons"],
)  # fmt: skip
def test_what_is_not_the_same_is_not_baked(shelf: KernelShelf, ffn: nn.Module, kernel: Blueprint) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, IN), ffn), {"1": (IN, OUT)}, platform=shelf.platform)
    load(model, "1", 0, shelf.put(kernel).id)
    with pytest.raises(WrapError, match="behind '1', which are no linear layers, and are no hidden neurons"):
        esper.bake(model)


def test_neurons_beside_a_block_with_kernels_in_it_are_not_baked(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, IN), block()), ["1", nn.Linear], platform=shelf.platform)
    load(model, "1", 0, neurons(shelf))
    esper.bake(model)
    load(model, "1.0", 0, shelf.put(Blueprint.affine(IN, HIDDEN)).id)
    with pytest.raises(WrapError, match="behind '1'"):
        esper.bake(model)


def test_a_bottleneck_of_the_blocks_activation_is_baked_too(shelf: KernelShelf) -> None:
    model, x = wrapped(shelf, block()), torch.randn(20, IN)
    load(model, "1", 0, shelf.put(Blueprint.bottleneck(IN, OUT, 3)).id, alpha=0.5, trainable=True)
    drawn(model, 0)
    torch.testing.assert_close(outputs(esper.bake(model), x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_neurons_are_selected_by_what_a_block_has_to_learn(shelf: KernelShelf) -> None:
    model = wrapped(shelf, block(nn.ReLU()))
    x, wanted = torch.randn(300, IN), torch.randn(300, OUT)
    with Probe(model) as probe:
        (model(x) - wanted).square().mean().backward()
    chosen = selected(probe["1"], Blueprint.widen(IN, OUT, 2, activation="relu"))
    before = outputs(model, x)
    load(model, "1", 0, shelf.put(chosen.blueprint).id, trainable=True)
    assert torch.equal(outputs(model, x), before)
    assert chosen.gains[1] > chosen.gains[0] > 0
    assert esper.bake(model)[1][0].out_features == HIDDEN + 2
