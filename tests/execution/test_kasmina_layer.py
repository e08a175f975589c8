"""A `KasminaLayer` that stands alone, through its public methods."""

from __future__ import annotations

import asyncio
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.execution.kernel_cache import KernelCache
from esper.execution.lifecycle import LifecycleError
from esper.execution.seeds.checkpoint import CheckpointError
from esper.execution.state_layout import AlphaError, KasminaStateLayout
from tests.core.seeds import RecordingSink, blueprint
from tests.kernel_shelf import KernelShelf
from tests.reference import ReferenceSeed, reference_site

STATS = [
    "layer_id",
    "layer_name",
    "num_seeds",
    "active_seeds",
    "error_seeds",
    "execution_count",
    "avg_latency_μs",
    "cache_hit_rate",
    "cache_hits",
    "cache_misses",
    "cache_size_mb",
    "cache_entries",
    "seeds",
]


@pytest.fixture
def layer(shelf: KernelShelf) -> esper.KasminaLayer:
    return esper.KasminaLayer(
        1, 3, 8, 6, source=shelf.platform.kernel_source, sink=RecordingSink(), layer_name="middle"
    )


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 8)


def load(layer: esper.KasminaLayer, seed: int, kernel: str, **options: Any) -> None:
    assert asyncio.run(layer.load_kernel(seed, kernel, **options)), layer.seed_errors


def lifecycles(layer: esper.KasminaLayer) -> list[str]:
    return [layer.state.lifecycle(seed).name for seed in range(layer.num_seeds)]


# -- what it is --------------------------------------------------------------------------------------------------------


def test_dormant_it_is_a_linear_layer(layer: esper.KasminaLayer, x: torch.Tensor) -> None:
    assert isinstance(layer, nn.Linear)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), nn.functional.linear(x[0], layer.weight, layer.bias))
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert (layer.num_seeds, layer.layer_id, layer.input_dim, layer.output_dim) == (3, 1, 8, 6)
    assert layer.layer_name == "middle"
    assert esper.KasminaLayer(4, 1, 2, 2).layer_name == "4"
    assert isinstance(layer.state, KasminaStateLayout)
    assert isinstance(layer.kernel_cache, KernelCache)
    assert "num_seeds=3, active_seeds=0" in repr(layer)


def test_the_default_transform_is_the_hosts_path(
    layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor
) -> None:
    dormant = layer(x)
    load(layer, 0, shelf.put(blueprint()).id)
    default = layer.default_transform
    assert type(default) is nn.Linear
    assert torch.equal(default(x), dormant)
    assert default.weight is layer.weight
    layer.weight = nn.Parameter(torch.zeros(6, 8))
    assert default.weight is layer.weight


def test_constructor_options(shelf: KernelShelf) -> None:
    layer = esper.KasminaLayer(
        0, 1, 8, 6, 1.5, False, bias=False, dtype=torch.float64, source=shelf.platform.kernel_source
    )
    assert layer.bias is None
    assert layer.weight.dtype == torch.float64
    assert layer.kernel_cache.max_cache_size_mb == 1.5
    x = torch.randn(2, 8, dtype=torch.float64)
    load(layer, 0, shelf.put(blueprint(dtype="float64")).id, alpha=0.5)
    assert layer(x).dtype == torch.float64
    for wrong in ({"num_seeds": -1}, {"cache_size_mb": 0}, {"commit": "never"}, {"layer_id": -1}, {"layer_id": "fc1"}):
        with pytest.raises(
            ValueError, match=r"num_seeds|cache_size_mb|commit|layer_id must be a whole number.*layer_name"
        ):
            esper.KasminaLayer(**{"layer_id": 0, "num_seeds": 1, "input_dim": 2, "output_dim": 2, **wrong})


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("compiled", [False, "esper", "eager"])
def test_kernels_are_blended_in_seed_order(
    layer: esper.KasminaLayer, shelf: KernelShelf, count: int, compiled: Any, fresh_dynamo: None
) -> None:
    seeds = []
    for index, (start, alpha) in enumerate([("kaiming", 0.3), ("identity", 0.8), ("orthogonal", 0.5)][:count]):
        artifact = shelf.put(blueprint(start=start, seed=index))
        seeds.append(ReferenceSeed(artifact, alpha))
        load(layer, index, artifact.id, alpha=alpha, trainable=True)
    options = {"inner": "eager"} if compiled == "esper" else None
    run = torch.compile(layer, backend=compiled, options=options) if compiled else layer
    x = torch.randn(2, 5, 8, requires_grad=True)
    output = run(x)
    exact = [(seed.module(), seed) for seed in seeds]
    weight, bias = layer.weight.detach().double().requires_grad_(), layer.bias.detach().double()
    x64 = x.detach().double().requires_grad_()
    expected = reference_site(x64, weight, bias, exact)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    kernels = [parameter for seed in range(count) for parameter in layer.kernel_parameters(seed)]
    ours = torch.autograd.grad(output.square().sum(), [x, layer.weight, *kernels])
    exact_kernels = [parameter for module, _ in exact for parameter in module.parameters()]
    theirs = torch.autograd.grad(expected.square().sum(), [x64, weight, *exact_kernels])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("start", ["kaiming", "identity"])
@pytest.mark.parametrize("compiled", [False, True])
def test_isolate_cuts_the_way_to_the_host_and_nothing_else(
    layer: esper.KasminaLayer, shelf: KernelShelf, start: str, compiled: bool, fresh_dynamo: None
) -> None:
    artifact = shelf.put(blueprint(start=start, seed=5))
    run = torch.compile(layer, backend="esper", options={"inner": "aot_eager"}) if compiled else layer
    x = torch.randn(5, 8, requires_grad=True)
    gradients = {}
    for isolate in (False, True):
        load(layer, 0, artifact.id, alpha=0.5, trainable=True, isolate=isolate)
        with torch.no_grad():
            for parameter in layer.kernel_parameters(0):
                parameter.add_(0.1)  # a zero-initialised part would cut the way by itself
        output = run(x)
        kernel = list(layer.kernel_parameters(0))
        gradients[isolate] = torch.autograd.grad(output.sum(), [x, layer.weight, layer.bias, *kernel])
        if isolate:  # what the host alone gives, times its share
            host = torch.autograd.grad(0.5 * layer.default_transform(x).sum(), [x, layer.weight, layer.bias])
            for ours, theirs in zip(gradients[True][:3], host, strict=True):
                torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(gradients[True][0], gradients[False][0])
    for ours, theirs in zip(gradients[True][3:], gradients[False][3:], strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


# -- control -----------------------------------------------------------------------------------------------------------


def test_a_seeds_whole_life(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    kernel, dormant = shelf.put(blueprint()).id, layer(x)
    assert lifecycles(layer) == ["DORMANT"] * 3
    assert layer.request_kernel(1, kernel, alpha=0.5).result(30) is True
    assert lifecycles(layer)[1] == "LOADING"
    active = layer(x)
    assert lifecycles(layer)[1] == "ACTIVE"
    assert not torch.allclose(active, dormant)
    layer.set_alpha(1, 0.0)
    torch.testing.assert_close(layer(x), dormant)
    layer.set_alpha(1, 0.5)
    assert torch.equal(layer(x), active)
    assert layer.unload_kernel(1) is True
    assert layer.unload_kernel(1) is False
    assert torch.equal(layer(x), dormant)
    assert asyncio.run(layer.load_kernel(1, "ab" * 32)) is False
    assert lifecycles(layer)[1] == "ERROR_RECOVERY"
    assert "UnknownKernelError" in layer.seed_errors[1]
    load(layer, 1, kernel, alpha=0.5)
    assert layer.fossilize(1) is True
    assert lifecycles(layer)[1] == "FOSSILIZED"
    assert torch.equal(layer(x), active)
    with pytest.raises(LifecycleError, match="'middle'"):
        layer.unload_kernel(1)


def test_what_does_not_exist(layer: esper.KasminaLayer, shelf: KernelShelf) -> None:
    for call in (layer.unload_kernel, layer.fossilize, lambda seed: layer.set_alpha(seed, 0.5)):
        with pytest.raises(IndexError, match="seeds 0 to 2 exist"):
            call(3)
    with pytest.raises(IndexError):
        layer.request_kernel(3, "ab" * 32)
    with pytest.raises(AlphaError):
        layer.request_kernel(0, "ab" * 32, alpha=2.0)
    assert asyncio.run(layer.load_kernel(0, shelf.put(blueprint(7, 6)).id)) is False
    assert "maps 7 to 6" in layer.seed_errors[0]
    assert lifecycles(layer) == ["ERROR_RECOVERY", "DORMANT", "DORMANT"]


def test_manual_commits(shelf: KernelShelf, x: torch.Tensor) -> None:
    layer = esper.KasminaLayer(0, 1, 8, 6, commit="manual", source=shelf.platform.kernel_source)
    dormant = layer(x)
    load(layer, 0, shelf.put(blueprint()).id, alpha=0.5)
    assert torch.equal(layer(x), dormant)
    (transition,) = layer.runtime.commit()
    assert (transition.layer, transition.new.name) == ("0", "ACTIVE")
    assert not torch.allclose(layer(x), dormant)


def test_an_alpha_that_is_set_while_a_kernel_loads_is_the_kernels(shelf: KernelShelf) -> None:
    layer = esper.KasminaLayer(0, 1, 8, 6, commit="manual", source=shelf.platform.kernel_source)
    load(layer, 0, shelf.put(blueprint()).id, alpha=1.0)
    layer.set_alpha(0, 0.25)
    layer.runtime.commit()
    assert layer.state.alpha(0) == 0.25
    load(layer, 0, shelf.put(blueprint()).id, alpha=0.75)  # what is asked with a load counts for it
    layer.runtime.commit()
    assert layer.state.alpha(0) == 0.75


def test_schedules_move_in_training(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    load(layer, 0, shelf.put(blueprint()).id, alpha=esper.LinearRamp(0.0, 1.0, 4))
    layer(x), layer(x)
    layer.eval()
    layer(x)
    assert layer.state.alpha(0) == 0.25


def test_stats(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    assert list(layer.get_layer_stats()) == STATS
    kernel = shelf.put(blueprint())
    load(layer, 0, kernel.id)
    load(layer, 1, kernel.id)
    asyncio.run(layer.load_kernel(2, "ab" * 32))
    for _ in range(7):
        layer(x)
    stats = layer.get_layer_stats()
    assert [each["kernel"] for each in stats.pop("seeds")] == [kernel.id, kernel.id, None]
    assert stats == {
        "layer_id": 1,
        "layer_name": "middle",
        "num_seeds": 3,
        "active_seeds": 2,
        "error_seeds": 1,
        "execution_count": 7,
        "avg_latency_μs": 0.0,
        "cache_hit_rate": 1 / 3,
        "cache_hits": 1,
        "cache_misses": 2,
        "cache_size_mb": len(kernel.data) / 2**20,
        "cache_entries": 1,
    }
    assert layer.memory_bytes() > layer.state.nbytes


def test_parameters_and_moves(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    load(layer, 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    assert layer.kernel_parameters(1) == ()
    kernel = layer.kernel_parameters(0)
    assert {id(parameter) for parameter in kernel} <= {id(parameter) for parameter in layer.parameters()}
    before = layer(x)
    layer.double()
    torch.testing.assert_close(layer(x.double()), before.double(), rtol=1e-5, atol=1e-6)
    assert all(parameter.dtype == torch.float64 for parameter in kernel)
    layer.to("meta")
    assert layer.state.alpha_blend.device.type == "meta"
    assert layer(x.double().to("meta")).shape == (5, 6)


# -- saving and copying ------------------------------------------------------------------------------------------------


def test_a_checkpoint_brings_kernels_back(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    load(layer, 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    load(layer, 2, shelf.put(blueprint(seed=2)).id, alpha=0.25, isolate=True)
    with torch.no_grad():
        layer.kernel_parameters(0)[0].add_(1.0)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = esper.KasminaLayer(1, 3, 8, 6, layer_name="middle")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x))
    assert lifecycles(fresh) == lifecycles(layer)
    host = {key: value for key, value in state.items() if not key.startswith("_esper.")}
    nn.Linear(8, 6).load_state_dict(host)
    fresh.load_state_dict(nn.Linear(8, 6).state_dict())
    assert lifecycles(fresh) == lifecycles(layer)
    other = esper.KasminaLayer(1, 3, 8, 6, layer_name="another")
    weight = other.weight.clone()
    with pytest.raises(CheckpointError, match="layer 'middle', which has no seeds; there are 'another'"):
        other.load_state_dict(state)
    assert torch.equal(other.weight, weight)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@pytest.mark.parametrize("at_a_site", [True, False])
def test_copies_stand_alone(shelf: KernelShelf, x: torch.Tensor, copied: Callable[[Any], Any], at_a_site: bool) -> None:
    if at_a_site:
        model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=shelf.platform)
        layer = model.kasmina_layers["0"]
    else:
        layer = esper.KasminaLayer(0, 2, 8, 6, source=shelf.platform.kernel_source)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    load(layer, 1, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    layer.eval()
    twin = copied(layer)
    expected = layer(x)
    assert torch.equal(twin(x), expected)
    assert twin.training is False
    assert lifecycles(twin) == lifecycles(layer)
    assert twin.kernel_parameters(1)[0] is not layer.kernel_parameters(1)[0]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert twin.unload_kernel(1)
    assert torch.equal(layer(x), expected)
    assert not twin(x).any()


def test_a_layer_in_a_model_of_its_own(layer: esper.KasminaLayer, shelf: KernelShelf, x: torch.Tensor) -> None:
    model = nn.Sequential(layer, nn.ReLU(), nn.Linear(6, 2))
    load(layer, 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    fresh = nn.Sequential(esper.KasminaLayer(1, 3, 8, 6, layer_name="middle"), nn.ReLU(), nn.Linear(6, 2))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))
