"""`esper.wrap`, `esper.unwrap`, and what happens to those who ask for what cannot be had: nothing but an error."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import esper
from esper.core.errors import UnknownLayerError, WrapError
from esper.errors import EsperError
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.state_layout import AlphaError
from tests.core.seeds import blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp, small_transformer

HEX = "ab" * 32


# -- wrapping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fx", "module"])
def test_the_wrapped_model_is_the_host_and_the_host_stays(mode: str) -> None:
    host, x = small_transformer(), torch.randn(2, 5, 16)
    before = {name: (type(module), dict(module.__dict__)) for name, module in host.named_modules()}
    expected = host(x)
    model = esper.wrap(host, mode=mode)  # type: ignore[arg-type]  # a text among the parameters
    assert torch.equal(model(x), expected)
    assert torch.equal(host(x), expected)
    assert all(a is b for a, b in zip(model.parameters(), host.parameters(), strict=True))
    assert {name: (type(module), dict(module.__dict__)) for name, module in host.named_modules()} == before
    assert esper.unwrap(model) is host
    assert isinstance(model, nn.Module)
    assert set(model.layer_mappings.values()) == {"Linear"}
    assert list(model.layer_mappings) == list(model.kasmina_layers)
    assert all(isinstance(layer, KasminaLayer) for layer in model.kasmina_layers.values())
    assert all(model.get_submodule(name) is layer for name, layer in model.kasmina_layers.items())
    with pytest.raises(TypeError):
        model.kasmina_layers["new"] = None  # type: ignore[index]  # what is refused


def test_a_model_without_linear_layers_is_wrapped_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="no layer can carry seeds: the model has no nn.Linear"):
        model = esper.wrap(nn.Sequential(nn.Conv1d(2, 2, 1), nn.ReLU()))
    assert model(torch.ones(1, 2, 3)).shape == (1, 2, 3)
    assert model.get_model_stats() == {"total_layers": 0, "layers": {}}
    with pytest.raises(UnknownLayerError):
        model.unload_kernel("0", 0)


def _compiled_in_place() -> nn.Module:
    model = mlp(8, 6, 4)
    model.compile(backend="eager")
    return model


def _around(module: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), module)


UNFIT: dict[str, tuple[Callable[[], Any], str]] = {
    "a function": (lambda: torch.relu, "takes an nn.Module, not a builtin"),
    "nothing": (lambda: None, "not a NoneType"),
    "a class": (lambda: nn.Linear, "not the type Linear"),
    "parameters": (lambda: list(mlp(8, 4).parameters()), "not a list"),
    "wrapped": (lambda: esper.wrap(mlp(8, 4)), "wrapped already"),
    "wrapped inside": (lambda: _around(esper.wrap(mlp(8, 4))), "wrapped already.*'1'"),
    "with a layer of ours": (lambda: _around(KasminaLayer(0, 2, 8, 4)), "wrapped already.*'1'"),
    "a part of a wrapped model": (lambda: esper.wrap(small_transformer()).get_submodule("0"), "wrapped already"),
    "compiled": (lambda: torch.compile(mlp(8, 4)), "compiled already"),
    "compiled inside": (lambda: _around(torch.compile(mlp(8, 4))), "compiled already.*'1'"),  # type: ignore[arg-type]  # torch.compile is not typed as returning a module
    "compiled in place": (_compiled_in_place, "compiled already"),
    "compiled in place inside": (lambda: _around(_compiled_in_place()), "compiled already.*'1'"),
    "a script": (lambda: torch.jit.script(mlp(8, 4)), "ScriptModule"),
    "a trace": (lambda: torch.jit.trace(mlp(8, 4), torch.ones(1, 8)), "ScriptModule"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("unfit", UNFIT)
def test_what_cannot_be_wrapped_is_refused(unfit: str) -> None:
    make, message = UNFIT[unfit]
    model = make()
    with pytest.raises(WrapError, match=message) as caught:
        esper.wrap(model)
    assert isinstance(caught.value, EsperError)
    assert isinstance(caught.value, TypeError)


OPTIONS: list[tuple[str, object]] = [
    *(("seeds_per_layer", value) for value in (0, -1, 1.5, "4", True, None)),
    *(("cache_size_mb", value) for value in (0, -1, math.nan, math.inf, "128", True)),
    *(("mode", value) for value in ("eager", "FX", None, 1)),
    *(("commit", value) for value in ("always", "", None, True)),
]


@pytest.mark.parametrize(("name", "value"), OPTIONS)
def test_an_option_out_of_range_is_refused(name: str, value: object, x: torch.Tensor) -> None:
    host = mlp(8, 6, 4)
    before, attributes = host(x), [dict(module.__dict__) for module in host.modules()]
    with pytest.raises(ValueError, match=name):
        esper.wrap(host, **{name: value})  # type: ignore[arg-type]  # keywords from a dict or parameters
    assert torch.equal(host(x), before)
    assert [dict(module.__dict__) for module in host.modules()] == attributes
    assert torch.equal(esper.wrap(host)(x), before)


@pytest.mark.parametrize("wrong", [mlp(8, 4), None, esper.MorphableModel, "model"])
def test_unwrapping_what_is_not_wrapped_is_refused(wrong: Any) -> None:
    with pytest.raises(WrapError, match=r"esper.unwrap takes what esper.wrap returned"):
        esper.unwrap(wrong)


def test_a_host_can_be_wrapped_again_after_unwrapping(shelf: KernelShelf, x: torch.Tensor) -> None:
    host = mlp(8, 6, 4)
    model = esper.wrap(host, platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5)
    expected = host(x)
    assert not torch.equal(model(x), expected)
    assert esper.unwrap(model) is host
    assert torch.equal(host(x), expected)
    assert torch.equal(esper.wrap(host, platform=shelf.platform)(x), expected)


def test_a_host_with_a_module_of_our_name_is_refused() -> None:
    host = mlp(8, 4)
    host.add_module("_esper", nn.Identity())
    with pytest.raises(WrapError, match="_esper"):
        esper.wrap(host)


# -- asking for the impossible -----------------------------------------------------------------------------------------


@pytest.fixture(params=["dormant", "grown"])
def model(request: pytest.FixtureRequest, shelf: KernelShelf, x: torch.Tensor) -> Iterator[esper.MorphableModel]:
    """A model that has to be, after the test, what it was before: bit for bit."""
    model = esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform)
    if request.param == "grown":
        load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    model(x)
    plan, output = model.runtime.plan, outputs(model, x)
    names = list(model.state_dict())
    alphas = model.runtime.state.alpha_blend.clone()
    yield model
    assert model.runtime.plan is plan
    assert model.runtime.target is plan
    assert torch.equal(outputs(model, x), output)
    assert list(model.state_dict()) == names
    assert torch.equal(model.runtime.state.alpha_blend, alphas)
    assert model.commit() == []


CALLS: dict[str, Callable[[esper.MorphableModel, Any, Any], object]] = {
    "load_kernel": lambda model, layer, seed: asyncio.run(model.load_kernel(layer, seed, HEX)),
    "request_kernel": lambda model, layer, seed: model.request_kernel(layer, seed, HEX),
    "unload_kernel": lambda model, layer, seed: model.unload_kernel(layer, seed),
    "set_alpha": lambda model, layer, seed: model.set_alpha(layer, seed, 0.5),
    "fossilize": lambda model, layer, seed: model.fossilize(layer, seed),
}


@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_layer_is_a_key_error_that_lists_names(model: esper.MorphableModel, call: str) -> None:
    before = states(model)
    with pytest.raises(KeyError, match=r"no layer '1' with seeds.*'0'.*'2'") as caught:
        CALLS[call](model, "1", 0)
    assert isinstance(caught.value, EsperError)
    with pytest.raises(KeyError):
        CALLS[call](model, 0, 0)
    assert states(model) == before


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("seed", [2, -1, 100])
def test_a_seed_that_does_not_exist_is_an_index_error(model: esper.MorphableModel, call: str, seed: int) -> None:
    before = states(model)
    with pytest.raises(IndexError, match=f"no seed {seed} of layer '0'; seeds 0 to 1 exist"):
        CALLS[call](model, "0", seed)
    assert states(model) == before


def test_a_misspelt_layer_is_recognised() -> None:
    model = esper.wrap(small_transformer())
    with pytest.raises(UnknownLayerError, match=r"did you mean .*'0.fc1'"):
        model.unload_kernel("0.fc11", 0)


BAD_ALPHAS = [-0.1, 1.1, math.nan, math.inf, True, "0.5", None, torch.tensor(0.5), [0.5], lambda step: 2.0]


@pytest.mark.parametrize("alpha", BAD_ALPHAS, ids=lambda alpha: type(alpha).__name__ + str(alpha)[:6])
def test_an_alpha_that_is_none_is_refused(model: esper.MorphableModel, alpha: Any) -> None:
    before = states(model)
    for call in (
        lambda: model.request_kernel("0", 0, HEX, alpha=alpha),
        lambda: asyncio.run(model.load_kernel("0", 1, HEX, alpha=alpha)),
        lambda: model.set_alpha("0", 0, alpha),
    ):
        with pytest.raises(AlphaError) as caught:
            call()
        assert isinstance(caught.value, ValueError)
    assert states(model) == before


KERNELS: dict[str, tuple[Any, str]] = {
    "unknown id": (HEX, "UnknownKernelError"),
    "unknown name": ("nobody-knows-me", "UnknownKernelError"),
    "other input": (blueprint(7, 6), "maps 7 to 6 features, but layer '0' maps 8 to 6"),
    "other output": (blueprint(8, 5), "maps 8 to 5 features, but layer '0' maps 8 to 6"),
    "other dtype": (blueprint(8, 6, dtype="float64"), "computes in float64, but layer '0' has weights in float32"),
}


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_that_cannot_be_had_leaves_a_reason(
    model: esper.MorphableModel, shelf: KernelShelf, kernel: str
) -> None:
    wanted, reason = KERNELS[kernel]
    reference = wanted if isinstance(wanted, str) else shelf.put(wanted).id
    layer = model.kasmina_layers["0"]
    for seed in (0, 1):
        in_force = layer.state.in_force(seed)
        assert asyncio.run(model.load_kernel("0", seed, reference)) is False
        assert reason in layer.seed_errors[seed]
        assert layer.state.errors(seed) == 1
        assert states(model)["0"][seed] == ("ACTIVE" if in_force else "ERROR_RECOVERY")
    assert model.get_model_stats()["layers"]["0"]["error_seeds"] == states(model)["0"].count("ERROR_RECOVERY")
    assert model.unload_kernel("0", 1)
    assert states(model)["0"][1] == "DORMANT"
    assert 1 not in layer.seed_errors


def test_a_kernel_is_asked_for_by_a_string(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    before, artifact = states(model), shelf.put(blueprint(8, 6))
    for wrong, hint in (
        (None, "not by None"),
        (7, "not by 7"),
        (artifact, "pass its id"),
        (blueprint(8, 6), "compile it first"),
    ):
        with pytest.raises(TypeError, match=f"by its id or name, a string.*{hint}"):
            model.request_kernel("0", 1, wrong)  # type: ignore[arg-type]  # what is tested
    assert states(model) == before


def test_a_seed_is_any_kind_of_integer(model: esper.MorphableModel, shelf: KernelShelf) -> None:
    kernel = shelf.put(blueprint(8, 6)).id
    for wrong in (True, "0", 0.0, None):
        for call in (
            lambda wrong=wrong: model.request_kernel("0", wrong, kernel),
            lambda wrong=wrong: model.unload_kernel("0", wrong),
            lambda wrong=wrong: model.fossilize("0", wrong),
            lambda wrong=wrong: model.set_alpha("0", wrong, 0.5),
        ):
            with pytest.raises(TypeError, match="a seed is given by its number"):
                call()
    fresh = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    assert fresh.request_kernel("0", np.int64(1), kernel).result(30)  # type: ignore[arg-type]  # as above
    fresh.commit()
    again = esper.wrap(mlp(8, 6, 4))
    again.load_state_dict(fresh.state_dict())
    assert states(again) == states(fresh)


def test_there_is_nothing_to_unload_or_to_fossilize(model: esper.MorphableModel) -> None:
    assert model.unload_kernel("2", 0) is False
    assert model.fossilize("2", 0) is False
