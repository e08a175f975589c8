"""Kernels made permanent: in the host's weights where that is the same, as kernels of a constant share elsewhere."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint
from esper.execution.kernels.fossils import is_affine
from tests.core.seeds import load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

AFFINE = {
    "affine": Blueprint.affine(8, 6, start="kaiming", seed=3),
    "affine, no bias": Blueprint.affine(8, 6, bias=False, start="kaiming", seed=3),
    "low rank": Blueprint.low_rank(8, 6, rank=2, start="kaiming", seed=3),
    "low rank on top of the host": Blueprint.low_rank(8, 6, rank=2, start="identity", seed=3),
}
OTHERS = {
    "bottleneck": Blueprint.bottleneck(8, 6, rank=3, start="kaiming", seed=3),
    "gated": Blueprint.gated_mlp(8, 6, hidden=4, start="kaiming", seed=3),
    "residual": Blueprint.residual_mlp(8, 6, hidden=4, start="kaiming", seed=3),
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8)


def wrapped(shelf: KernelShelf, host: nn.Module | None = None, **options: Any) -> esper.MorphableModel:
    return esper.wrap(host or mlp(8, 6, 4), seeds_per_layer=3, platform=shelf.platform, **options)


def active(model: esper.MorphableModel) -> int:
    """How many kernels the model runs."""
    return len(list(model.runtime.plan.seeds()))


def train(model: nn.Module, x: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(x).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("backend", ["eager mode", "esper"])
@pytest.mark.parametrize("name", AFFINE)
def test_affine_fossils_become_part_of_the_hosts_weights(
    shelf: KernelShelf, x: torch.Tensor, name: str, backend: str, fresh_dynamo: None
) -> None:
    host = mlp(8, 6, 4)
    model = wrapped(shelf, host)
    run = model if backend == "eager mode" else torch.compile(model, backend="esper", options={"inner": "eager"})
    load(model, "0", 1, shelf.put(AFFINE[name]).id, alpha=0.3, trainable=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(3):
        train(run, x, optimizer)
    before, weight = outputs(run, x), host[0].weight.clone()
    assert model.fossilize("0", 1)
    assert states(model)["0"] == ["DORMANT", "FOSSILIZED", "DORMANT"]
    torch.testing.assert_close(outputs(run, x), before)
    assert active(model) == 0
    assert list(model.seed_parameters()) == []
    assert not torch.equal(host[0].weight, weight)
    torch.testing.assert_close(outputs(host, x), before)  # what esper.unwrap() returns has grown too
    assert not any("_esper" in key for key in model.state_dict())
    train(run, x, optimizer)  # the weights learn on
    torch.testing.assert_close(outputs(run, x), outputs(host, x))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", ["eager mode", "esper"])
@pytest.mark.parametrize("name", OTHERS)
def test_other_fossils_stay_kernels_of_a_constant_share(
    shelf: KernelShelf, x: torch.Tensor, name: str, backend: str, alpha: float, fresh_dynamo: None
) -> None:
    model = wrapped(shelf)
    run = model if backend == "eager mode" else torch.compile(model, backend="esper", options={"inner": "eager"})
    load(model, "0", 0, shelf.put(OTHERS[name]).id, alpha=alpha, trainable=True)
    before, weight = outputs(run, x), model.get_parameter("0.weight").clone()
    assert model.fossilize("0", 0)
    torch.testing.assert_close(outputs(run, x), before)
    assert torch.equal(model.get_parameter("0.weight"), weight)
    assert active(model) == 1
    train(run, x, torch.optim.SGD(model.parameters(), lr=0.5))
    torch.testing.assert_close(outputs(run, x), outputs(model, x))


def test_operators_tell_which_kernels_are_affine(shelf: KernelShelf) -> None:
    graphs = {name: shelf.put(blueprint).graph for name, blueprint in {**AFFINE, **OTHERS}.items()}
    assert {name for name, graph in graphs.items() if is_affine(graph)} == set(AFFINE)
    linear = {name for name, graph in graphs.items() if is_affine(graph, constant=False)}
    assert linear == {name for name in AFFINE if not any("bias" in each for each in graphs[name].tensor_names)}
    assert "affine, no bias" in linear
    assert "affine" not in linear


class Tied(nn.Module):
    """Two layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def test_weights_that_others_depend_on_are_left_alone(shelf: KernelShelf) -> None:
    square = shelf.put(Blueprint.affine(6, 6, start="kaiming", seed=3)).id
    reads_host = shelf.put(Blueprint.bottleneck(6, 6, rank=2, start="identity", seed=5)).id
    added = shelf.put(Blueprint.affine(6, 6, start="identity", seed=3)).id
    nonlinear = shelf.put(Blueprint.bottleneck(6, 6, rank=2, start="kaiming", seed=5)).id
    x = torch.randn(5, 6)
    cases: list[tuple[nn.Module, str, list[tuple[str, dict[str, Any]]], int]] = [
        (Tied(), "first", [(square, {})], 0),
        (nn.Sequential(nn.Linear(6, 6)), "0", [(square, {"isolate": True})], 0),
        (nn.Sequential(nn.Linear(6, 6, bias=False)), "0", [(square, {})], 0),
        (nn.Sequential(nn.Linear(6, 6)), "0", [(nonlinear, {}), (square, {})], 1),  # blended in before
        (nn.Sequential(nn.Linear(6, 6)), "0", [(reads_host, {}), (square, {})], 1),
        (nn.Sequential(nn.Linear(6, 6)), "0", [(nonlinear, {}), (added, {})], 1),
        (nn.Sequential(nn.Linear(6, 6)), "0", [(reads_host, {"isolate": True}), (added, {})], 1),
    ]
    for host, layer, kernels, fossil in cases:
        model = wrapped(shelf, host)
        for seed, (kernel, options) in enumerate(kernels):
            load(model, layer, seed, kernel, alpha=0.5, **options)
        before, weights = outputs(model, x), [parameter.clone() for parameter in host.parameters()]
        assert model.fossilize(layer, fossil)
        torch.testing.assert_close(outputs(model, x), before)
        assert active(model) == len(kernels)
        assert all(map(torch.equal, host.parameters(), weights))


class ReadsItsWeight(nn.Module):
    """A host whose linear layer nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.read.weight, self.read.bias)


@pytest.mark.parametrize("mode", ["module", "fx", "compiled"])
def test_the_weight_of_a_layer_that_is_not_called_is_left_alone(
    shelf: KernelShelf, x: torch.Tensor, mode: Any, caplog: pytest.LogCaptureFixture, fresh_dynamo: None
) -> None:
    model = esper.wrap(ReadsItsWeight(), mode="fx" if mode == "fx" else "module", platform=shelf.platform)
    run = torch.compile(model, backend="esper", options={"inner": "eager"}) if mode == "compiled" else model
    before = outputs(run, x)
    load(model, "read", 0, shelf.put(Blueprint.affine(8, 6, start="kaiming")).id, alpha=0.5)
    assert torch.equal(outputs(run, x), before)
    assert model.fossilize("read", 0)
    for _ in range(2):
        assert torch.equal(outputs(run, x), before)
    assert states(model)["read"][0] == "FOSSILIZED"
    assert "'read' stays a kernel: no forward has called the layer; where" in caplog.text


@pytest.mark.parametrize("start", ["kaiming", "identity"])
def test_a_seed_blended_in_later_does_not_mind(shelf: KernelShelf, x: torch.Tensor, start: Any) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    load(model, "0", 2, shelf.put(Blueprint.bottleneck(8, 6, rank=3, start=start, seed=3)).id, alpha=0.5)
    before = outputs(model, x)
    assert model.fossilize("0", 0)
    torch.testing.assert_close(outputs(model, x), before)
    assert active(model) == 1


def test_one_that_adds_to_the_output_is_folded_behind_others_that_do(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    kernels = [OTHERS["bottleneck"], AFFINE["low rank on top of the host"]]
    kernels[0] = Blueprint.bottleneck(8, 6, rank=3, seed=3)
    for seed, kernel in enumerate(kernels):
        load(model, "0", seed, shelf.put(kernel).id, alpha=0.5, trainable=True)
    with torch.no_grad():
        for parameter in model.seed_parameters():
            parameter.copy_(torch.randn_like(parameter))
    before = outputs(model, x)
    assert model.fossilize("0", 1)
    torch.testing.assert_close(outputs(model, x), before)
    assert active(model) == 1


def fossilize_from_elsewhere(model: esper.MorphableModel, seed: int = 0) -> None:
    """As over the bus: the thread that runs the model does not take part."""
    thread = threading.Thread(target=lambda: model.fossilize("0", seed))
    thread.start()
    thread.join()


@pytest.mark.parametrize("mode", ["module", "fx"])
@pytest.mark.parametrize("no_gradients", [torch.no_grad, torch.inference_mode])
def test_asked_for_beside_inference_it_comes_into_force(
    shelf: KernelShelf, x: torch.Tensor, no_gradients: Any, mode: Any
) -> None:
    model = wrapped(shelf, mode=mode)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    with no_gradients():
        before = model(x)
        fossilize_from_elsewhere(model)
        torch.testing.assert_close(model(x), before)
    assert states(model)["0"][0] == "FOSSILIZED"
    assert active(model) == 0


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "all"])
def test_asked_for_beside_the_training_of_other_layers_it_comes_into_force(shelf: KernelShelf, frozen: str) -> None:
    host = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    for name, parameter in host.named_parameters():
        parameter.requires_grad_(frozen not in (name, "all") or name.startswith("2"))
    model = wrapped(shelf, host)
    x = torch.randn(5, 8, requires_grad=True)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    train(model, x, optimizer)
    fossilize_from_elsewhere(model)
    for _ in range(3):
        train(model, x, optimizer)  # whose backward needs the weight of the frozen layer
    assert states(model)["0"][0] == "FOSSILIZED"
    assert active(model) == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_an_evaluation_between_a_forward_and_its_backward_does_not_spoil_it(shelf: KernelShelf, frozen: bool) -> None:
    model = wrapped(shelf)
    x = torch.randn(5, 8, requires_grad=True)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    model.get_parameter("0.weight").requires_grad_(not frozen)
    loss = model(x).square().mean()
    fossilize_from_elsewhere(model)
    for _ in range(3):
        outputs(model, x)
    assert states(model)["0"][0] == "ACTIVE"
    loss.backward()
    del loss
    outputs(model, x)
    assert states(model)["0"][0] == "FOSSILIZED"
    assert active(model) == 0


def test_where_something_always_holds_the_weights_it_stays_a_kernel(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    held = model.get_parameter("0.weight").detach()
    before, weight = outputs(model, x), held.clone()
    fossilize_from_elsewhere(model)
    for _ in range(80):
        torch.testing.assert_close(outputs(model, x), before)
    assert states(model)["0"][0] == "FOSSILIZED"
    assert active(model) == 1
    assert torch.equal(held, weight)


def test_a_kernel_put_before_one_that_waits_keeps_it_a_kernel(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 1, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(x).square().mean()
    fossilize_from_elsewhere(model, 1)
    assert model.request_kernel("0", 0, shelf.put(OTHERS["gated"]).id, alpha=0.5).result(30)
    outputs(model, x)
    assert states(model)["0"][:2] == ["ACTIVE", "ACTIVE"]
    loss.backward()
    optimizer.step()
    before = [outputs(model.kasmina_layers["0"], x), *(outputs(model, x) for _ in range(2))]
    torch.testing.assert_close(outputs(model.kasmina_layers["0"], x), before[0])
    torch.testing.assert_close(outputs(model, x), before[1])
    assert states(model)["0"][:2] == ["ACTIVE", "FOSSILIZED"]
    assert active(model) == 2


def test_a_checkpoint_loaded_while_one_waits_is_what_it_was(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 1, shelf.put(OTHERS["gated"]).id, alpha=0.5)
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    before = outputs(model, x)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    loss = model(x).square().mean()
    fossilize_from_elsewhere(model)
    outputs(model, x)
    del loss
    model.load_state_dict(saved)
    assert states(model)["0"] == ["DORMANT", "ACTIVE", "DORMANT"]
    torch.testing.assert_close(outputs(model, x), before)
    assert all(torch.equal(value, saved[key]) for key, value in model.state_dict().items() if "weight" in key)


def test_asked_for_beside_training_it_waits_for_the_optimizer(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train(model, x, optimizer)
    losses = [model(x).square().mean()]
    fossilize_from_elsewhere(model)
    losses += [model(x).square().mean(), model(2 * x).square().mean()]  # three forwards for one backward
    assert states(model)["0"][0] == "ACTIVE"
    optimizer.zero_grad()
    sum(losses).backward()  # type: ignore[union-attr]  # a sum of tensors
    optimizer.step()
    before = outputs(model.kasmina_layers["0"], x)
    model(x)
    assert states(model)["0"][0] == "FOSSILIZED"
    torch.testing.assert_close(outputs(model.kasmina_layers["0"], x), before)


def test_a_kernel_that_waits_beside_it_does_not_wait_for_the_optimizer(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    loss = model(x.requires_grad_()).square().mean()
    fossilize_from_elsewhere(model)
    assert model.request_kernel("0", 1, shelf.put(OTHERS["bottleneck"]).id).result(30)
    outputs(model, x)
    assert states(model)["0"] == ["ACTIVE", "ACTIVE", "DORMANT"]
    before = outputs(model, x)
    loss.backward()
    assert [transition.new.name for transition in model.commit()] == ["FOSSILIZED"]
    torch.testing.assert_close(outputs(model, x), before)


def test_a_backward_that_needs_the_old_weights_says_so(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(AFFINE["affine"]).id, alpha=0.5)
    loss = model(x.requires_grad_()).square().mean()
    assert model.fossilize("0", 0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
