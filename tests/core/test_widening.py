"""Hidden neurons beside a feed-forward block, which a baked model has in the block's own two linear layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import esper
from esper import Blueprint
from esper.artifacts.families import ACTIVATIONS
from esper.core.errors import WrapError
from esper.growth import Probe, selected
from tests.core.seeds import load, outputs, states
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


@pytest.mark.parametrize("compiled", [False, True])
def test_a_fossil_leaves_the_layers_of_its_block_to_optimizers_graphs_and_checkpoints(
    shelf: KernelShelf, compiled: bool, fresh_dynamo: None
) -> None:
    """They would be of other shapes: it becomes part of them in the baked model, and not while training goes on."""
    torch.manual_seed(0)
    model, x = wrapped(shelf, block()), torch.randn(20, IN)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"}) if compiled else model
    load(model, "1", 0, neurons(shelf), alpha=0.5, trainable=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    own = list(model[1].parameters())

    def step() -> None:
        optimizer.zero_grad()
        run(x).square().sum().backward()
        optimizer.step()

    step()
    before, moments = outputs(run, x), [optimizer.state[each]["exp_avg"] for each in own]
    assert model.fossilize("1", 0)
    torch.testing.assert_close(outputs(run, x), before, rtol=1e-6, atol=1e-6)
    assert states(model)["1"][0] == "FOSSILIZED"
    assert all(a is b for a, b in zip(model[1].parameters(), own, strict=True))
    assert model[1][0].weight.shape == (HIDDEN, IN)
    step()
    assert all(optimizer.state[each]["exp_avg"] is moment for each, moment in zip(own, moments, strict=True))
    assert not torch.allclose(outputs(run, x), before)
    model.load_state_dict(nn.Sequential(nn.Linear(IN, IN), block()).state_dict(), strict=True)
    grown = esper.bake(model)
    assert grown[1][0].weight.shape == (HIDDEN + 3, IN)
    torch.testing.assert_close(outputs(grown, x), outputs(run, x), rtol=1e-5, atol=1e-5)


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


class Scaled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def hooked() -> Any:
    ffn = block()
    ffn[1].register_forward_hook(lambda *_: None)
    return ffn


def with_own_parameters() -> Any:
    class Own(nn.Parameter):
        pass

    ffn = block()
    ffn[0].weight = Own(ffn[0].weight.detach())
    return ffn


WIDER = Blueprint.widen(IN, OUT, 3)


@pytest.mark.parametrize(
    ("ffn", "kernel", "reason"),
    [
        (
            block(nn.ReLU()),
            WIDER,
            r"activation is ReLU\(\), and that of the kernel gelu\(approximate='none'\): make the kernel with that",
        ),
        (
            block(nn.LeakyReLU(0.2)),
            Blueprint.widen(IN, OUT, 3, activation="leaky_relu"),
            r"activation is LeakyReLU\(negative_slope=0.2\), and that of the kernel leaky_relu\(negative_slope=0.01\)",
        ),
        (block(nn.Softshrink()), WIDER, r"is Softshrink\(0.5\), and that of the kernel gelu\(.*\): no kernel has that"),
        (block(biases=(False, True)), WIDER, "its first linear layer has no bias, .* make the kernel with bias=False"),
        (
            block(biases=(True, False)),
            Blueprint.bottleneck(IN, OUT, 3),
            r"its last linear layer has no bias, .* make the kernel by Blueprint\.widen",
        ),
        (block(dropout=0.5).eval(), WIDER, r"it has a Dropout\(p=0.5, inplace=False\), which may drop neurons"),
        (Residual(*block()), WIDER, r"Residual has a forward of its own, .* have seeds at an nn\.Sequential"),
        (nn.Sequential(*block(), nn.Tanh()), WIDER, "it is a sequence of Linear, GELU, Linear, Tanh, and not"),
        (hooked(), WIDER, "its GELU has forward hooks, which would see the neurons: remove them"),
        (
            nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), Scaled(HIDDEN, OUT)),
            WIDER,
            "its last linear layer cannot be made wider, since Scaled has a forward of its own",
        ),
        (
            nn.Sequential(weight_norm(nn.Linear(IN, HIDDEN)), nn.GELU(), nn.Linear(HIDDEN, OUT)),
            WIDER,
            "its first linear layer cannot be made wider, since its weight or bias is computed at each call",
        ),
        (with_own_parameters(), WIDER, "the weight of its Linear is an Own, and no plain parameter"),
        (block(), Blueprint.deepen(IN, OUT, 3), r"is no sum of what .* such as Blueprint\.widen makes"),
        (block(), Blueprint.widen(IN, OUT, 3, start="kaiming"), "is no sum of what .* makes with start='identity'"),
    ],
    ids=[
        "activation", "its options", "unknown activation", "bias", "bias of the output", "dropout", "class",
        "more layers", "hooks", "linear of a class", "parametrization", "parameters", "depth", "no neurons",
    ],
)  # fmt: skip
def test_what_is_not_the_same_is_not_baked_and_the_error_says_why(
    shelf: KernelShelf, ffn: nn.Module, kernel: Blueprint, reason: str
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(IN, IN), ffn), {"1": (IN, OUT)}, platform=shelf.platform)
    load(model, "1", 1, shelf.put(kernel).id)
    with pytest.raises(
        WrapError,
        match=rf"behind '1', which are no linear layers, .*: at '1', seed 1: .*{reason}.* keep the wrapped model",
    ):
        esper.bake(model)
    assert states(model)["1"][1] == "ACTIVE"


def test_neurons_of_detached_inputs_are_not_baked(shelf: KernelShelf) -> None:
    model = wrapped(shelf, block())
    load(model, "1", 0, neurons(shelf), isolate=True)
    with pytest.raises(WrapError, match="the kernel's input is detached, as no part of a block's is: load it without"):
        esper.bake(model)


def test_a_block_whose_layer_is_used_elsewhere_too_is_not_baked(shelf: KernelShelf) -> None:
    ffn, other = block(), nn.Linear(OUT, IN)
    tied = nn.Linear(HIDDEN, OUT)
    tied.weight = ffn[3].weight
    host = nn.ModuleDict({"block": ffn, "other": other, "tied": tied})
    model = esper.wrap(host, {"block": (IN, OUT)}, platform=shelf.platform)
    load(model, "block", 0, neurons(shelf))
    with pytest.raises(
        WrapError, match="at 'block', seed 0: the weight of its Linear is used elsewhere in the model too"
    ):
        esper.bake(model)


def test_every_block_that_cannot_be_baked_is_named(shelf: KernelShelf) -> None:
    host = nn.Sequential(block(nn.ReLU()), nn.Linear(OUT, IN), block(dropout=0.5))
    model = esper.wrap(host, ["0", "2"], platform=shelf.platform)
    for name in "02":
        load(model, name, 0, neurons(shelf))
    with pytest.raises(
        WrapError, match=r"behind '0', '2', .*: at '0', seed 0: .*ReLU.*; at '2', seed 0: it has a Drop"
    ):
        esper.bake(model)


def test_a_block_with_kernels_in_it_is_baked_if_these_become_part_of_its_layers(shelf: KernelShelf) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(IN, IN), block())
    model, x = esper.wrap(host, ["1", nn.Linear], platform=shelf.platform), torch.randn(20, IN)
    load(model, "1", 0, neurons(shelf), trainable=True)
    drawn(model, 0)
    load(model, "1.0", 0, shelf.put(Blueprint.affine(IN, HIDDEN, start="kaiming")).id, alpha=0.5)
    grown = esper.bake(model)
    assert grown[1][0].out_features == HIDDEN + 3
    torch.testing.assert_close(outputs(grown, x), outputs(model, x), rtol=1e-5, atol=1e-5)
    load(model, "1.0", 1, shelf.put(Blueprint.bottleneck(IN, HIDDEN, 2)).id)
    with pytest.raises(WrapError, match=r"at '1', seed 0: kernels stay in force inside of it, at '1\.0': unload those"):
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
