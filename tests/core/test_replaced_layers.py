"""Layers that are exchanged after wrapping: a new head, other embeddings, a layer set by hand."""

from __future__ import annotations

import asyncio
import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import esper
from esper.execution.seeds.checkpoint import CheckpointError
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf

MODES = pytest.mark.parametrize("mode", ["module", "fx"])


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.fc(x)
        return result


def wrapped(shelf: KernelShelf, mode: str) -> Any:
    torch.manual_seed(0)
    host = nn.Sequential(Block(), nn.Tanh(), nn.Linear(8, 4))
    return esper.wrap(host, seeds_per_layer=2, platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters


@MODES
def test_a_layer_of_the_same_features_takes_the_seeds(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = wrapped(shelf, mode)
    load(model, "0.fc", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    grown, new = outputs(model, x), nn.Linear(8, 8)
    new.load_state_dict(dict(model[0].fc.named_parameters()))
    model[0].fc = new
    torch.testing.assert_close(outputs(model, x), grown)
    assert states(model)["0.fc"][0] == "ACTIVE"
    assert model[0].fc is model.kasmina_layers["0.fc"]
    assert model[0].fc.weight is new.weight
    with torch.no_grad():
        new.weight.mul_(2)
    assert not torch.allclose(outputs(model, x), grown)
    fresh = wrapped(shelf, mode)
    fresh.load_state_dict(model.state_dict())
    torch.testing.assert_close(outputs(fresh, x), outputs(model, x))


@MODES
@pytest.mark.parametrize("new", [nn.Linear(8, 7), nn.Identity()], ids=["other features", "no linear layer"])
def test_kernels_of_a_layer_that_is_gone_leave_with_a_warning(
    shelf: KernelShelf, x: torch.Tensor, mode: str, new: nn.Module
) -> None:
    model = wrapped(shelf, mode)
    load(model, "2", 0, shelf.put(blueprint(8, 4)).id, alpha=0.5, trainable=True)
    outputs(model, x)
    model[2] = new
    with pytest.warns(UserWarning, match=r"seeds 0 of layer '2' are unloaded"):
        output = outputs(model, x)
    assert states(model)["2"] == ["DORMANT", "DORMANT"]
    assert list(model.seed_parameters()) == []
    torch.testing.assert_close(output, new(torch.tanh(model[0](x))))


@MODES
def test_nothing_is_loaded_where_no_layer_is(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = wrapped(shelf, mode)
    layer, kernel = model[2], shelf.put(blueprint(8, 4)).id
    model[2] = nn.Identity()
    assert model.request_kernel("2", 0, kernel, alpha=0.5).result(30) is False
    assert "replaced by Identity" in layer.seed_errors[0]
    model[2] = layer
    outputs(model, x)
    assert model.request_kernel("2", 0, kernel, alpha=0.5).result(30)
    outputs(model, x)
    assert states(model)["2"][0] == "ACTIVE"


@MODES
def test_a_new_layer_of_other_features_can_grow(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = wrapped(shelf, mode)
    model[2] = nn.Linear(8, 3)
    dormant = outputs(model, x)
    load(model, "2", 1, shelf.put(blueprint(8, 3)).id, alpha=0.5)
    assert not torch.equal(outputs(model, x), dormant)


def test_a_wrapper_around_a_layer_leaves_its_seeds(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf, "module")
    load(model, "2", 0, shelf.put(blueprint(8, 4)).id, alpha=0.5)
    grown = outputs(model, x)
    model[2] = nn.Sequential(model[2], nn.Identity())
    torch.testing.assert_close(outputs(model, x), grown)
    assert states(model)["2"][0] == "ACTIVE"


def _swapped(model: Any) -> None:
    model.first, model.second = model.second, model.first


def _put_into_another_module(model: Any) -> None:
    model.first = nn.Sequential(nn.Identity(), model.first)


def _counted_anew(model: Any) -> None:
    model.insert(0, nn.Linear(8, 8))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return result


@MODES
@pytest.mark.parametrize(
    ("host", "layer", "move"),
    [
        (Two, "first", _swapped),
        (Two, "first", _put_into_another_module),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), "0", _counted_anew),
    ],
    ids=["swapped", "put into another module", "counted anew"],
)
def test_copies_have_the_kernels_of_layers_that_were_moved(
    shelf: KernelShelf, x: torch.Tensor, mode: str, host: Any, layer: str, move: Any
) -> None:
    model: Any = esper.wrap(host(), seeds_per_layer=2, platform=shelf.platform, mode=mode)
    load(model, layer, 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    move(model)
    grown = outputs(model, x)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), AveragedModel(model), esper.bake(model)):
        torch.testing.assert_close(outputs(copied, x), grown)
    twin = copy.deepcopy(model)
    assert twin.unload_kernel(layer, 0)
    assert not torch.allclose(outputs(twin, x), grown)
    model.unload_kernel(layer, 0)
    torch.testing.assert_close(outputs(twin, x), outputs(model, x))


@MODES
@pytest.mark.parametrize("copied", [copy.deepcopy, esper.bake], ids=["deep copy", "baked"])
def test_a_copy_before_the_next_forward_follows_a_replaced_layer(
    shelf: KernelShelf, x: torch.Tensor, mode: str, copied: Any
) -> None:
    model = wrapped(shelf, mode)
    load(model, "0.fc", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    model[0].fc = nn.Linear(8, 8)
    twin = copied(model)
    torch.testing.assert_close(outputs(twin, x), outputs(model, x))


@MODES
def test_nothing_is_loaded_where_a_layer_was_deleted(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model = wrapped(shelf, mode)
    kernel = shelf.put(blueprint(8, 4)).id
    load(model, "2", 0, kernel, alpha=0.5, trainable=True)
    del model[2]
    with pytest.warns(UserWarning, match=r"seeds 0 of layer '2' are unloaded"):
        assert not asyncio.run(model.load_kernel("2", 1, kernel))
    assert not model.request_kernel("2", 1, kernel).result(30)
    torch.testing.assert_close(outputs(model, x), torch.tanh(model[0](x)))
    assert states(model)["2"] == ["DORMANT", "ERROR_RECOVERY"]


@MODES
def test_kernels_of_a_deleted_layer_are_not_saved(shelf: KernelShelf, mode: str) -> None:
    model = wrapped(shelf, mode)
    load(model, "2", 0, shelf.put(blueprint(8, 4)).id, alpha=0.5, trainable=True)
    del model[2]
    with pytest.warns(UserWarning, match=r"seeds 0 of layer '2' are unloaded"):
        state = model.state_dict()
    assert list(state) == ["0.fc.weight", "0.fc.bias"]


@MODES
@pytest.mark.parametrize("moved_alike", [False, True], ids=["as it was wrapped", "moved alike"])
def test_a_checkpoint_has_the_kernels_where_their_layers_stand(
    shelf: KernelShelf, x: torch.Tensor, mode: str, moved_alike: bool
) -> None:
    model: Any = esper.wrap(Two(), platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    load(model, "first", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    _swapped(model)
    grown, saved = outputs(model, x), model.state_dict()
    other: Any = esper.wrap(Two(), platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    if moved_alike:
        _swapped(other)
    for _ in range(2):
        other.load_state_dict(saved)
        torch.testing.assert_close(outputs(other, x), grown)
        saved = other.state_dict()


def test_a_checkpoint_names_the_place_of_a_layer_without_seeds(shelf: KernelShelf) -> None:
    model: Any = esper.wrap(Two(), platform=shelf.platform)
    load(model, "first", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5)
    _put_into_another_module(model)
    other: Any = esper.wrap(Two(), platform=shelf.platform)
    with pytest.raises(CheckpointError, match=r"a kernel for layer 'first\.1', which has no seeds; there are 'first'"):
        other.load_state_dict(model.state_dict())
    assert states(other)["first"] == ["DORMANT"] * len(states(other)["first"])


class Encoder(nn.Module):
    """Trained through a method of its own, never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.encode(x)


@MODES
def test_a_new_layer_that_a_method_calls_first_has_the_kernels(shelf: KernelShelf, x: torch.Tensor, mode: str) -> None:
    model: Any = esper.wrap(Encoder(), platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    load(model, "first", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    model.first = new = nn.Linear(8, 8)
    first = outputs(model.encode, x)
    assert not torch.allclose(first, torch.tanh(nn.functional.linear(x, new.weight, new.bias)))
    assert torch.equal(outputs(model.encode, x), first)
    assert torch.equal(outputs(model, x), first)
    assert not new._forward_hooks


@MODES
def test_a_layer_that_is_put_back_before_the_next_forward_is_as_it_was(
    shelf: KernelShelf, x: torch.Tensor, mode: str
) -> None:
    model = wrapped(shelf, mode)
    load(model, "2", 0, shelf.put(blueprint(8, 4)).id, alpha=0.5, trainable=True)
    before, layer, other = outputs(model, x), model[2], nn.Linear(8, 4)
    model[2] = other
    model[2] = layer
    assert torch.equal(outputs(model, x), before)
    torch.testing.assert_close(other(x), nn.functional.linear(x, other.weight, other.bias))


@MODES
def test_a_layer_that_is_set_again_after_it_took_in_another_says_so(
    shelf: KernelShelf, x: torch.Tensor, mode: str
) -> None:
    model = wrapped(shelf, mode)
    model[2] = model[2]
    layer = model[2]
    model[2] = nn.Linear(8, 4)
    outputs(model, x)
    with pytest.warns(UserWarning, match="layer '2' has the weights of the layer that replaced it"):
        model[2] = layer


@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_a_new_layer_that_a_compiled_method_calls_first_has_the_kernels(
    shelf: KernelShelf, x: torch.Tensor, backend: str, fresh_dynamo: None
) -> None:
    model: Any = esper.wrap(Encoder(), platform=shelf.platform)
    load(model, "first", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    options: Any = {"options": {"inner": "eager"}} if backend == "esper" else {}
    run = torch.compile(model.encode, backend=backend, **options)
    before = outputs(run, x)
    model.first = nn.Linear(8, 8)
    first = outputs(run, x)
    assert not torch.allclose(first, before)
    torch.testing.assert_close(first, outputs(model.encode, x))
    torch.testing.assert_close(outputs(run, x), first)
