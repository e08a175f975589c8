"""Copies and pickles of wrapped models."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import time
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.core.grown import grown, saved
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def stored(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": stored}
each_copy = pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)


# -- copies ------------------------------------------------------------------------------------------------------------


@each_copy
@pytest.mark.parametrize("mode", ["fx", "module"])
def test_a_copy_of_a_dormant_model_is_independent(
    shelf: KernelShelf, x: torch.Tensor, copied: Callable[[Any], Any], mode: str
) -> None:
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    expected = model(x)
    twin = copied(model)
    assert isinstance(twin, esper.MorphableModel)
    assert torch.equal(twin(x), expected)
    assert list(twin.state_dict()) == list(model.state_dict())
    assert states(twin) == states(model)
    assert twin.runtime is not model.runtime
    assert not {layer.site for layer in twin.kasmina_layers.values()} & {
        layer.site for layer in model.kasmina_layers.values()
    }
    _change(twin)
    assert torch.equal(model(x), expected)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5)
    assert states(twin)["0"] == ["DORMANT", "DORMANT"]
    assert type(esper.unwrap(twin)) is nn.Sequential
    assert torch.equal(esper.unwrap(twin)(x), twin(x))


@each_copy
@pytest.mark.parametrize("mode", ["fx", "module"])
def test_a_copy_of_a_grown_model_has_copies_of_its_kernels(
    shelf: KernelShelf, x: torch.Tensor, copied: Callable[[Any], Any], mode: str
) -> None:
    model = grown(shelf, mode=mode)
    model.kasmina_layers["2"].seed_errors[0] = "as an example"
    expected, state = model(x), saved(model)
    twin = copied(model)
    assert torch.equal(twin(x), expected)
    assert states(twin) == states(model)
    assert twin.kasmina_layers["2"].seed_errors == {0: "as an example"}
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    assert {id(p) for p in twin.parameters()}.isdisjoint({id(p) for p in model.parameters()})
    twin(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in twin.seed_parameters())
    _change(twin)
    twin.unload_kernel("0", 0)
    assert torch.equal(model(x), expected)
    assert all(torch.equal(a, b) for a, b in zip(saved(model).values(), state.values(), strict=True))
    twin.load_state_dict(state)
    assert torch.equal(twin(x), expected)
    esper.wrap(mlp(8, 6, 4), seeds_per_layer=3).load_state_dict(saved(twin))


def _change(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


def test_a_deep_copy_loads_kernels_from_the_same_platform(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    kernel = shelf.put(blueprint()).id
    for twin in (copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model))):
        load(twin, "0", 0, kernel, alpha=0.5)
        assert states(model)["0"][0] == "DORMANT"
        assert not torch.equal(twin(x), model(x))


def test_a_deep_copy_goes_on_with_any_schedule_and_a_pickle_with_a_ramp(
    shelf: KernelShelf, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=esper.LinearRamp(0.0, 1.0, 8))
    for _ in range(3):
        model(x)
    resumed = pickled(model)
    resumed(x)
    assert resumed.kasmina_layers["0"].state.alpha(0) == 0.375
    model.set_alpha("0", 0, lambda step: (step + 2) / 8)
    model(x)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert twin.kasmina_layers["0"].state.alpha(0) == 0.375
    assert "alpha schedule" not in caplog.text
    still = pickled(model)
    still(x)
    assert still.kasmina_layers["0"].state.alpha(0) == 0.375
    assert "alpha schedule" in caplog.text
    model(x)
    assert twin.kasmina_layers["0"].state.alpha(0) == 0.375


def test_a_copy_of_a_loading_seed_is_what_it_was_before(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform, commit="manual")
    kernel = shelf.put(blueprint()).id
    assert model.request_kernel("0", 0, kernel, alpha=0.5).result(30)
    model.commit()
    assert model.request_kernel("0", 0, kernel).result(30)
    assert model.request_kernel("0", 1, kernel).result(30)
    twin = copy.deepcopy(model)
    assert states(twin)["0"] == ["ACTIVE", "DORMANT"]
    assert twin.commit() == []
    assert torch.equal(twin(x), model(x))


class Tied(nn.Module):
    """Tied weights, one module under two names, a list of modules, and a bound method kept aside."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.stages = [self.shared, self.head]
        self.first = self.shared.forward
        self.steps = 0

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.again(self.shared(self.embed(tokens)))
        result: torch.Tensor = self.stages[1](x)
        return result


@each_copy
def test_tied_weights_and_shared_modules_stay_so(shelf: KernelShelf, copied: Callable[[Any], Any]) -> None:
    tokens = torch.randint(10, (3, 4))
    model = esper.wrap(Tied(), platform=shelf.platform)
    load(model, "shared", 0, shelf.put(blueprint(8, 8)).id, alpha=0.5, trainable=True)
    model.steps = 7
    twin = copied(model)
    assert twin.steps == 7
    assert twin.head.weight is twin.embed.weight
    assert twin.shared is twin.again
    assert len(list(twin.parameters())) == len(list(model.parameters()))
    assert torch.equal(twin(tokens), model(tokens))
    _change(twin)
    assert not torch.equal(twin(tokens), model(tokens))
    assert torch.equal(twin.head.weight, model.head.weight + 1)


@each_copy
def test_encoder_layers_keep_their_class(copied: Callable[[Any], Any], shelf: KernelShelf) -> None:
    host = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    model, inputs = esper.wrap(host, platform=shelf.platform), torch.randn(2, 5, 16)
    load(model, "layers.0.linear1", 0, shelf.put(blueprint(16, 32)).id, alpha=0.5)
    twin = copied(model)
    plain = esper.unwrap(twin)
    assert [type(module) for module in plain.modules()] == [type(module) for module in host.modules()]
    assert torch.equal(outputs(twin, inputs), outputs(model, inputs))
    assert torch.equal(outputs(plain, inputs), outputs(host, inputs))
    assert not torch.equal(outputs(twin, inputs), outputs(host, inputs))


class Trainer:
    """An object that the model refers to, and that refers to the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.layer = model.get_submodule("0")


def test_a_copy_within_a_larger_object(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    trainer = Trainer(model)
    model.trainer = trainer
    twin = copy.deepcopy(trainer)
    assert twin.model.trainer is twin
    assert twin.layer is twin.model.get_submodule("0")
    assert torch.equal(twin.model(x), model(x))
    first = copy.deepcopy(model)
    assert first.trainer.model is first


@each_copy
def test_hooks_modes_and_attributes_come_along(copied: Callable[[Any], Any]) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.5), nn.Linear(6, 4)))
    model.eval()
    model[1].train()
    model.register_forward_hook(double)
    model[0].register_forward_hook(double)
    model[2].weight.requires_grad_(False)
    model.extra = ["an attribute"]
    twin = copied(model)
    assert [module.training for module in twin.modules()] == [module.training for module in model.modules()]
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert list(twin.kasmina_layers) == ["0", "2"]
    model.eval(), twin.eval()
    x = torch.randn(3, 8)
    assert torch.equal(twin(x), model(x))
    assert torch.equal(twin(x), 2 * (twin[2](2 * nn.functional.linear(x, twin[0].weight, twin[0].bias))))
    assert twin.extra == ["an attribute"]
    assert twin.extra is not model.extra


def double(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return 2 * output


def test_a_shallow_copy_shares_parameters(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    twin = copy.copy(model)
    assert torch.equal(twin(x), model(x))
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    twin.unload_kernel("0", 0)
    assert states(model)["0"][0] == "ACTIVE"


def test_copies_are_compiled_apart(shelf: KernelShelf, x: torch.Tensor, fresh_dynamo: None) -> None:
    model = grown(shelf)
    compiled = torch.compile(model, backend="esper", options={"inner": "eager"})
    compiled(x)
    twin = copy.deepcopy(model)
    other = torch.compile(twin, backend="esper", options={"inner": "eager"})
    torch.testing.assert_close(other(x), model(x))
    twin.unload_kernel("0", 0)
    torch.testing.assert_close(other(x), twin(x))
    torch.testing.assert_close(compiled(x), model(x))
    again = copy.deepcopy(compiled)
    torch.testing.assert_close(again(x), model(x))


def test_a_model_that_is_dropped_is_freed(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    twin = copy.deepcopy(model)
    twin(x)
    runtime = weakref.ref(twin.runtime)
    del twin
    end = time.monotonic() + 10  # a background job for it may have to end first
    while runtime() is not None and time.monotonic() < end:
        gc.collect()
    assert runtime() is None
