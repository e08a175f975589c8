"""Data-driven starts: they change nothing, and learn from the first step what the layer itself cannot."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper import Blueprint
from esper.growth import GrowthError, Probe, SiteStatistics, alpha_gradient, gradmax, selected
from tests.compiler.agreement import load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(0))
HIDDEN = torch.tensor([2.0, -1.0, 0.5, 0.0, 0.0, 1.5])


def target() -> Tensor:
    """A linear function, and a unit that no linear function can stand in for."""
    unit = (X @ HIDDEN).relu()
    return X @ torch.linspace(-1, 1, 18).reshape(6, 3) + torch.outer(unit, torch.tensor([1.0, -2.0, 0.5]))


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - target()).square().mean()


def fitted() -> nn.Linear:
    """The layer that is best for the target."""
    layer = nn.Linear(6, 3)
    solution = torch.linalg.lstsq(torch.cat([X, torch.ones(400, 1)], 1), target()).solution
    with torch.no_grad():
        layer.weight.copy_(solution[:6].T)
        layer.bias.copy_(solution[6])
    return layer


def probed(model: esper.MorphableModel) -> SiteStatistics:
    with Probe(model) as probe:
        loss_of(model).backward()
    model.zero_grad()
    return next(iter(probe.values()))


@pytest.fixture
def model(shelf: KernelShelf) -> esper.MorphableModel:
    return esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)


BLUEPRINTS = [
    Blueprint.bottleneck(6, 3, rank=2, activation="relu"),
    Blueprint.bottleneck(6, 3, rank=3, activation="gelu", bias=False),
    Blueprint.widen(6, 3, hidden=2, activation="relu"),
    Blueprint.gated_mlp(6, 3, hidden=2),
    Blueprint.gated_mlp(6, 3, hidden=2, bias=True, start="kaiming"),
]


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda each: f"{each.family}-{each.options['bias']}")
def test_a_selected_kernel_changes_nothing_and_learns_at_once(
    blueprint: Blueprint, model: esper.MorphableModel, shelf: KernelShelf
) -> None:
    found = selected(probed(model), blueprint)
    before = model(X)
    load(model, "0", 0, shelf.put(found.blueprint).id, alpha=1.0)
    assert torch.equal(model(X), before)
    loss_of(model).backward()
    moving = [each for each in model.seed_parameters() if each.grad is not None and each.grad.abs().max() > 1e-4]
    assert moving, "the last linear map has a gradient"


def test_the_unit_that_is_missing_is_found(model: esper.MorphableModel) -> None:
    found = selected(probed(model), Blueprint.bottleneck(6, 3, rank=1, activation="relu"), proposals=4096)
    _, weights = found.blueprint.build()
    direction = weights["down.weight"][0]
    assert torch.cosine_similarity(direction, HIDDEN, dim=0).abs() > 0.9
    assert found.host_gain < 1e-3 * found.gains[0], "the layer has nothing left to gain by itself"


def test_selected_units_explain_more_than_any_that_are_drawn(model: esper.MorphableModel) -> None:
    statistics = probed(model)
    blueprint = Blueprint.bottleneck(6, 3, rank=4, activation="gelu")
    chosen = selected(statistics, blueprint)
    drawn = [
        selected(statistics, Blueprint.bottleneck(6, 3, rank=4, activation="gelu", seed=seed), proposals=4).gains[-1]
        for seed in range(8)
    ]
    assert chosen.gains[-1] > 1.2 * max(drawn)
    assert list(chosen.gains) == sorted(chosen.gains)


def test_what_chance_gives_is_told_from_what_is_there(model: esper.MorphableModel) -> None:
    blueprint = Blueprint.bottleneck(6, 3, rank=1)
    there = selected(probed(model), blueprint)
    assert there.gains[0] > 2 * there.by_chance
    with Probe(model) as probe:
        (model(X) - model(X).detach() - torch.randn(400, 3)).square().mean().backward()
    noise = selected(probe["0"], blueprint)
    assert noise.by_chance > noise.gains[0] > 0.3 * noise.by_chance


def test_what_many_parameters_explain_of_few_rows_counts_for_nothing(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Linear(200, 3), platform=shelf.platform)
    (name,) = model.kasmina_layers
    with Probe(model) as probe:
        x = torch.randn(400, 200)
        (model(x) - model(x).detach() - torch.randn(400, 3)).square().mean().backward()
    noise = selected(probe[name], Blueprint.bottleneck(200, 3, rank=1), proposals=200)
    assert noise.host_gain < 0.5, "the layer explains half of the three outputs' noise, which adds up to 1.5"
    assert noise.by_chance > noise.gains[0] > 0.3 * noise.by_chance


def test_fewer_rows_than_inputs_tell_nothing(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Linear(50, 3), platform=shelf.platform)
    (name,) = model.kasmina_layers
    with Probe(model) as probe:
        model(torch.randn(20, 50)).square().mean().backward()
    found = selected(probe[name], Blueprint.bottleneck(50, 3, rank=1))
    assert found.by_chance > found.gains[0]


def test_training_goes_further_from_there(shelf: KernelShelf, model: esper.MorphableModel) -> None:
    plain = Blueprint.bottleneck(6, 3, rank=2, activation="relu")
    losses = {}
    for name, blueprint in (("random", plain), ("selected", selected(probed(model), plain).blueprint)):
        grown = copy.deepcopy(model)
        load(grown, "0", 0, shelf.put(blueprint).id, alpha=1.0)
        optimizer = torch.optim.SGD(grown.parameters(), lr=0.05)
        for _ in range(100):
            optimizer.zero_grad()
            loss_of(grown).backward()
            optimizer.step()
        losses[name] = float(loss_of(grown).detach())
    assert losses["selected"] < 0.5 * losses["random"]


def test_equal_statistics_give_equal_kernels(model: esper.MorphableModel) -> None:
    statistics = probed(model)
    blueprint = BLUEPRINTS[0]
    assert selected(statistics, blueprint).blueprint.id == selected(probed(model), blueprint).blueprint.id
    other = Blueprint.bottleneck(6, 3, rank=2, activation="relu", seed=1)
    assert selected(statistics, blueprint).blueprint.id != selected(statistics, other).blueprint.id


def test_a_frozen_layer_leaves_everything_to_the_kernel(shelf: KernelShelf) -> None:
    host = nn.Sequential(nn.Linear(6, 3).requires_grad_(False), nn.Linear(3, 3))
    model = esper.wrap(host, ["0"], platform=shelf.platform)
    model[0].bias.requires_grad_(True)  # type: ignore[operator, index]  # a Sequential
    found = selected(probed(model), Blueprint.bottleneck(6, 3, rank=1))
    assert found.gains[0] > 0
    assert found.host_gain > 0


def test_gradmax_has_the_largest_gradient(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(6, 3)), platform=shelf.platform)
    statistics = probed(model)
    blueprint = Blueprint.bottleneck(6, 3, rank=2, activation="tanh")
    best, before = gradmax(statistics, blueprint), model(X)

    def gradient(kernel: Blueprint) -> float:
        grown = copy.deepcopy(model)
        load(grown, "0", 0, shelf.put(kernel).id, alpha=1.0)
        assert torch.equal(grown(X), before)
        loss_of(grown).backward()
        return sum(float(each.grad.square().sum()) for each in grown.seed_parameters() if each.grad is not None)

    graph, weights = best.build()
    reached = gradient(best)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        other = torch.linalg.qr(torch.randn(3, 2, generator=generator)).Q.contiguous()
        assert gradient(Blueprint.from_graph(graph, {**weights, "up.weight": other})) < reached


@pytest.mark.parametrize("start", ["kaiming", "identity"])
def test_the_gradient_of_alpha_is_that_of_the_loss(start: Any, shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(6, 5, 3), platform=shelf.platform)
    with Probe(model, "0") as probe:
        for part in X.split(100):
            (model(part) - 1).square().mean().backward()
    kernel = Blueprint.bottleneck(6, 5, rank=2, start=start)
    graph, weights = kernel.build()
    alpha = torch.zeros((), requires_grad=True)
    module = torch.fx.GraphModule(nn.Module(), graph.to_fx())

    def blended(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        host = [output] if graph.uses_host else []
        made = module(inputs[0], *host, *(weights[name] for name in graph.tensor_names))
        return output + alpha * (made - output)

    with model.kasmina_layers["0"].register_forward_hook(blended):
        loss = torch.stack([(model(part) - 1).square().mean() for part in X.split(100)]).mean()
    (wanted,) = torch.autograd.grad(loss, alpha)
    assert alpha_gradient(probe["0"], kernel) == pytest.approx(float(wanted), abs=1e-6, rel=1e-4)


def test_bad_input_is_named(model: esper.MorphableModel) -> None:
    statistics = probed(model)
    for call, told in (
        (lambda: selected(statistics, Blueprint.bottleneck(6, 4, rank=2)), "6 to 4 features, and layer '0' has 6 to 3"),
        (lambda: selected(statistics, Blueprint.affine(6, 3)), "gated_mlp, widen blueprints, not for affine"),
        (lambda: selected(statistics, BLUEPRINTS[0], proposals=1), "proposals is 1, and 2 units"),
        (lambda: selected(statistics, BLUEPRINTS[0], damping=0.0), "damping must be more than 0"),
        (lambda: gradmax(statistics, BLUEPRINTS[0]), "a bottleneck with relu has no gradient"),
        (lambda: gradmax(statistics, Blueprint.bottleneck(6, 3, rank=4)), "at most 3 units"),
        (lambda: alpha_gradient(statistics, Blueprint.affine(3, 3)), "is for 3 to 3 features"),
    ):  # fmt: skip
        with pytest.raises(GrowthError, match=told):
            call()
