"""Law 6 and resuming: state dicts of wrapped models, with and without kernels."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper.execution.seeds.checkpoint import CheckpointError
from tests.core.grown import apart, grown, saved
from tests.core.seeds import GatedPlatform, blueprint, load, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp, small_transformer

OWN = "_esper."


# -- law 6 -------------------------------------------------------------------------------------------------------------


class WithEverything(nn.Module):
    """Buffers, tied weights, batch norm, a root parameter, extra state, and a hook on its state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.norm = nn.BatchNorm1d(8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.note = "made"
        self.register_state_dict_post_hook(
            lambda module, state, prefix, _: state.update({f"{prefix}hooked": torch.ones(1)})
        )
        self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: state.pop(f"{prefix}hooked", None))

    def get_extra_state(self) -> dict[str, str]:
        return {"note": self.note}

    def set_extra_state(self, state: dict[str, str]) -> None:
        self.note = state["note"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.second(self.first(self.norm(x)))


HOSTS = {"mlp": lambda: mlp(8, 6, 4), "transformer": small_transformer, "everything": WithEverything}


@pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
def test_a_dormant_model_has_the_state_dict_of_its_host(make: Callable[[], nn.Module]) -> None:
    host = make()
    model = esper.wrap(host)
    state, expected = model.state_dict(), host.state_dict()
    assert list(state) == list(expected)
    assert state._metadata == {**expected._metadata, "": {**expected._metadata[""], "esper_dormant": True}}
    for name, value in expected.items():
        assert (
            value is state[name] or torch.equal(value, state[name])
            if isinstance(value, torch.Tensor)
            else value == state[name]
        )
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in host.named_parameters()]
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in host.named_buffers()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in host.named_modules()]
    make().load_state_dict(saved(model), strict=True)


@pytest.mark.parametrize("make", HOSTS.values(), ids=HOSTS)
def test_a_vanilla_checkpoint_loads_into_the_wrapped_model(make: Callable[[], nn.Module]) -> None:
    host, other = make(), make()
    model = esper.wrap(host)
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    model.load_state_dict(saved(other), strict=True)
    assert all(torch.equal(a, b) for a, b in zip(host.parameters(), other.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        model.load_state_dict({**other.state_dict(), "unknown.weight": torch.ones(1)}, strict=True)
    with pytest.raises(TypeError):
        model.load_state_dict(None)  # type: ignore[arg-type]  # what is refused


class WithMethodsOfItsOwn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer(x)
        return result

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return OrderedDict((f"old.{key}", value) for key, value in super().state_dict(*args, **kwargs).items())

    def load_state_dict(self, state_dict: Any, strict: bool = True) -> Any:  # type: ignore[override]  # narrower than torch's
        return super().load_state_dict({key.removeprefix("old."): value for key, value in state_dict.items()}, strict)


def test_the_hosts_own_way_to_save_and_load_is_kept(shelf: KernelShelf) -> None:
    host, other = WithMethodsOfItsOwn(), WithMethodsOfItsOwn()
    model = esper.wrap(host, platform=shelf.platform)
    assert list(model.state_dict()) == ["old.layer.weight", "old.layer.bias"]
    model.load_state_dict(other.state_dict())
    assert torch.equal(host.layer.weight, other.layer.weight)
    load(model, "layer", 0, shelf.put(blueprint()).id, alpha=0.5)
    fresh = esper.wrap(other, platform=shelf.platform)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    assert torch.equal(fresh(x), model(x))


def test_the_host_part_of_a_grown_model_loads_into_the_vanilla_model(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, vanilla = grown(shelf), mlp(8, 6, 4)
    state = saved(model)
    host_part = {key: value for key, value in state.items() if not key.startswith(OWN)}
    assert list(host_part) == list(vanilla.state_dict())
    vanilla.load_state_dict(host_part, strict=True)
    assert torch.equal(vanilla(x), esper.unwrap(model)(x))
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize("of", ["vanilla", "grown"])
def test_a_checkpoint_of_the_host_leaves_kernels_in_force(shelf: KernelShelf, x: torch.Tensor, of: str) -> None:
    model, other = grown(shelf), mlp(8, 6, 4)
    state = saved(other)
    if of == "grown":
        state = {key: value for key, value in saved(model).items() if not key.startswith(OWN)}
        other.load_state_dict(state)
    plan, before = model.runtime.plan, states(model)
    kernels = [parameter.clone() for parameter in model.seed_parameters()]
    result = model.load_state_dict(state, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert model.runtime.plan is plan
    assert states(model) == before
    assert all(torch.equal(a, b) for a, b in zip(kernels, model.seed_parameters(), strict=True))
    assert torch.equal(esper.unwrap(model)(x), other(x))


# -- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fx", "module"])
@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_a_checkpoint_brings_kernels_back_without_a_platform(
    shelf: KernelShelf, x: torch.Tensor, mode: str, commit: str
) -> None:
    model = grown(shelf)
    model.kasmina_layers["0"].state.record_health(0, 2.5)
    fresh = apart(mode=mode, commit=commit)
    fresh(x)
    assert str(fresh.load_state_dict(saved(model), strict=True)) == "<All keys matched successfully>"
    assert torch.equal(fresh(x), model(x))
    assert states(fresh) == states(model)
    for name, layer in model.kasmina_layers.items():
        ours, theirs = fresh.kasmina_layers[name].state.state_dict(), layer.state.state_dict()
        assert all(torch.equal(ours[field], theirs[field]) for field in theirs)
    assert [(n, p.requires_grad) for n, p in fresh.named_parameters()] == [
        (n, p.requires_grad) for n, p in model.named_parameters()
    ]
    ours = torch.autograd.grad(fresh(x).square().sum(), [p for p in fresh.parameters() if p.requires_grad])
    theirs = torch.autograd.grad(model(x).square().sum(), [p for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert list(saved(fresh)) == list(saved(model))
    assert all(torch.equal(a, b) for a, b in zip(saved(fresh).values(), saved(model).values(), strict=True))
    stats = fresh.get_model_stats()["layers"]["0"]
    assert (stats["active_seeds"], stats["cache_entries"]) == (2, 3)
    assert fresh.unload_kernel("0", 0)
    fresh.commit()
    assert not torch.equal(fresh(x), model(x))


def test_training_goes_on_as_if_it_had_not_been_interrupted(shelf: KernelShelf) -> None:
    batches = [torch.randn(16, 8) for _ in range(10)]

    def train(model: esper.MorphableModel, optimizer: torch.optim.Optimizer, data: list[torch.Tensor]) -> list[float]:
        losses = []
        for batch in data:
            loss = (model(batch) - batch[:, :4]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = grown(shelf)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    train(model, optimizer, batches[:5])
    state, optimizer_state = saved(model), copy.deepcopy(optimizer.state_dict())
    resumed = apart()
    resumed.load_state_dict(state)
    again = torch.optim.Adam(resumed.parameters(), lr=0.01)
    again.load_state_dict(optimizer_state)
    assert train(resumed, again, batches[5:]) == train(model, optimizer, batches[5:])


def test_rolling_back_keeps_the_parameters_that_an_optimizer_holds(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    best, before = saved(model), model(x)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    model.load_state_dict(best)
    assert torch.equal(model(x), before)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))


def test_a_checkpoint_replaces_the_whole_plan(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = grown(shelf)
    gated = GatedPlatform(shelf)
    fresh = esper.wrap(mlp(8, 6, 4), seeds_per_layer=3, platform=gated, commit="manual")  # type: ignore[arg-type]  # as much of a platform as is needed
    late = shelf.put(blueprint(8, 6, seed=9)).id
    gate = gated.hold(late)
    for layer, seed, kernel in (("0", 1, blueprint(8, 6, seed=7)), ("2", 0, blueprint(6, 4, seed=8))):
        load_future = fresh.request_kernel(layer, seed, shelf.put(kernel).id, alpha=esper.LinearRamp(0.0, 1.0, 9))
        assert load_future.result(30)
    fresh.commit()
    assert fresh.fossilize("0", 1)  # staged, as is the next; the one after that is under way
    assert fresh.request_kernel("2", 2, shelf.put(blueprint(6, 4, seed=5)).id).result(30)
    under_way = fresh.request_kernel("0", 0, late)
    gated.wait_until_held()
    fresh.load_state_dict(saved(model))
    assert states(fresh) == states(model)
    assert torch.equal(fresh(x), model(x))
    gate.set()
    assert under_way.result(30) is False
    assert fresh.commit() == []
    assert torch.equal(fresh(x), model(x))
    assert states(fresh) == states(model)
    reports = [(each.layer_name, each.seed_idx, each.state) for each in gated.oona.of("innovation.field_reports")[-5:]]
    assert ("2", 1, "FOSSILIZED") in reports


@pytest.mark.parametrize("ramp", [esper.LinearRamp(0.0, 1.0, 6), esper.CosineRamp(1.0, 0.25, 5)], ids=["line", "wave"])
def test_a_ramp_goes_on_where_it_was_when_training_is_resumed(
    shelf: KernelShelf, x: torch.Tensor, ramp: esper.LinearRamp | esper.CosineRamp
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=ramp)
    model(x), model(x), model(x)
    state = saved(model)
    fresh = apart()
    fresh.load_state_dict(state)
    for _ in range(6):
        assert torch.equal(fresh(x), model(x))
        assert fresh.kasmina_layers["0"].state.alpha(0) == model.kasmina_layers["0"].state.alpha(0)
    model.load_state_dict(state)  # and in the model itself, whose ramp has ended
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    assert model.kasmina_layers["0"].state.alpha(0) == pytest.approx(ramp(3), abs=1e-3)


def test_the_shape_of_what_is_saved_does_not_depend_on_values(shelf: KernelShelf, x: torch.Tensor) -> None:
    """A planner of torch.distributed.checkpoint reads into tensors of the sizes that it finds."""
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=1.0)
    before = {name: value.shape for name, value in model.state_dict().items()}
    model.set_alpha("0", 0, esper.CosineRamp(0.123456789, 0.987654321, 2**61))
    model(x)
    assert {name: value.shape for name, value in model.state_dict().items()} == before


def test_another_schedule_is_not_saved_and_that_is_said(
    shelf: KernelShelf, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=lambda step: min(step / 4, 1.0))
    model(x), model(x), model(x)
    fresh = apart()
    fresh.load_state_dict(saved(model))
    assert "seed 0 of 0 had an alpha schedule" in caplog.text
    fresh(x)
    assert fresh.kasmina_layers["0"].state.alpha(0) == 0.5


def test_what_is_staged_is_not_saved(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, commit="manual")
    assert model.request_kernel("0", 0, shelf.put(blueprint()).id).result(30)
    assert list(model.state_dict()) == list(mlp(8, 6, 4).state_dict())
    model.commit()
    assert len(model.state_dict()) > 4


@pytest.mark.parametrize("options", [{"seeds_per_layer": 5}, {"cache_size_mb": 0.0001}])
def test_more_seeds_and_a_cache_that_is_too_small_do_not_hinder(
    shelf: KernelShelf, x: torch.Tensor, options: dict[str, Any]
) -> None:
    model, fresh = grown(shelf), apart(**options)
    fresh.load_state_dict(saved(model))
    assert torch.equal(fresh(x), model(x))
    fresh.load_state_dict(saved(model))
    assert fresh.unload_kernel("0", 0)
    assert states(fresh)["0"][0] == "DORMANT"


@pytest.mark.parametrize("nested", ["sequential", "compiled", "data parallel"])
def test_as_a_part_of_a_larger_module(shelf: KernelShelf, x: torch.Tensor, nested: str, fresh_dynamo: None) -> None:
    def around(model: nn.Module) -> nn.Module:
        if nested == "sequential":
            return nn.Sequential(OrderedDict(body=model, head=nn.Linear(4, 2)))
        if nested == "compiled":
            compiled: nn.Module = torch.compile(model, backend="esper", options={"inner": "eager"})  # type: ignore[assignment]  # torch.compile is not typed as returning a module
            return compiled
        return nn.DataParallel(model)

    inner = grown(shelf)
    model = around(inner)
    state = saved(model)
    own = {"sequential": "body.", "compiled": "_orig_mod.", "data parallel": "module."}[nested] + OWN
    assert any(key.startswith(own) for key in state)
    fresh_inner = apart()
    fresh = around(fresh_inner)
    fresh(x)
    assert str(fresh.load_state_dict(state, strict=True)) == "<All keys matched successfully>"
    assert torch.equal(fresh(x), model(x))
    assert states(fresh_inner) == states(inner)

    vanilla = {key: value for key, value in state.items() if not key.startswith(own)}
    assert str(fresh.load_state_dict(vanilla, strict=True)) == "<All keys matched successfully>"
    assert states(fresh_inner) == states(inner)
    broken = {**state, f"{own}seeds": torch.zeros(3, dtype=torch.uint8)}
    with pytest.raises(CheckpointError):
        fresh.load_state_dict(broken)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.parametrize("assign", [True, False])
def test_a_model_on_the_meta_device_is_filled(shelf: KernelShelf, x: torch.Tensor, assign: bool) -> None:
    model = grown(shelf)
    with torch.device("meta"):
        host = mlp(8, 6, 4)
    fresh = esper.wrap(host, seeds_per_layer=3, platform=shelf.platform)
    if not assign:
        fresh.to_empty(device="cpu")
    fresh.load_state_dict(saved(model), assign=assign)
    assert torch.equal(fresh(x), model(x))
    assert {parameter.device.type for parameter in fresh.parameters()} == {"cpu"}
    fresh(x).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_that_was_cast_is_saved_and_restored_as_such(
    shelf: KernelShelf, x: torch.Tensor, dtype: torch.dtype
) -> None:
    model, fresh = grown(shelf).to(dtype), apart().to(dtype)
    fresh.load_state_dict(saved(model))
    assert torch.equal(fresh(x.to(dtype)), model(x.to(dtype)))
    assert {parameter.dtype for parameter in fresh.parameters()} == {dtype}


@pytest.mark.parametrize("inner", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_models_follow(shelf: KernelShelf, x: torch.Tensor, inner: str, fresh_dynamo: None) -> None:
    model, fresh = grown(shelf), apart()
    ours = torch.compile(fresh, backend="esper", options={"inner": inner})
    other = torch.compile(fresh, backend="eager")
    ours(x), other(x)
    fresh.load_state_dict(saved(model))
    for compiled in (ours, other):
        torch.testing.assert_close(compiled(x), model(x))
    fresh.load_state_dict(saved(mlp(8, 6, 4)))
    torch.testing.assert_close(ours(x), fresh(x))


# -- rollback ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("commit", ["auto", "manual"])
def test_a_checkpoint_from_before_growth_brings_that_model_back(
    shelf: KernelShelf, x: torch.Tensor, caplog: pytest.LogCaptureFixture, commit: Any
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, commit=commit)
    best, want, dormant = saved(model), model(x).detach(), states(model)
    assert model.request_kernel("0", 0, shelf.put(blueprint()).id, trainable=True).result(30)
    model.commit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().mean().backward()
    optimizer.step()
    assert not torch.allclose(model(x), want)
    assert model.request_kernel("2", 0, shelf.put(blueprint(6, 4)).id).result(30)  # staged, and called off
    model.load_state_dict(best)
    assert torch.equal(model(x), want)
    assert states(model) == dormant
    assert not list(model.seed_parameters())
    assert "of the host alone" not in caplog.text


@pytest.mark.parametrize("grown_before", [False, True])
def test_a_fossil_in_its_layers_weight_leaves_with_that_weight(
    shelf: KernelShelf, x: torch.Tensor, grown_before: bool
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    kernel = shelf.put(esper.Blueprint.low_rank(8, 6, 2, start="kaiming")).id
    if grown_before:
        load(model, "2", 0, shelf.put(blueprint(6, 4, start="kaiming")).id, alpha=0.5)
    best, want = saved(model), model(x).detach()
    load(model, "0", 0, kernel, alpha=0.5)
    assert model.fossilize("0", 0)
    assert not torch.allclose(model(x), want)
    assert states(model)["0"][0] == "FOSSILIZED"
    assert model.kasmina_layers["0"].kernel_in_force(0) is None
    model.load_state_dict(best)
    assert torch.equal(model(x), want)
    assert states(model)["0"][0] == "DORMANT"
    load(model, "0", 0, kernel, alpha=0.5)
    assert not torch.allclose(model(x), want)


def test_a_checkpoint_of_the_host_leaves_kernels_and_says_so(
    shelf: KernelShelf, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    for plain in (saved(mlp(8, 6, 4)), dict(model.state_dict())):
        load(model, "0", 0, shelf.put(blueprint()).id, trainable=True)
        caplog.clear()
        model.load_state_dict(plain)
        assert states(model)["0"][0] == "ACTIVE"
        assert caplog.text.count("of the host alone") == 1


def test_a_checkpoint_from_before_growth_in_a_larger_module(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    alone = esper.KasminaLayer(0, 2, 4, 4, layer_name="alone")
    whole = nn.Sequential(model, alone)
    best, want = saved(whole), whole(x).detach()
    load(model, "0", 0, shelf.put(blueprint()).id, trainable=True)
    assert not torch.allclose(whole(x), want)
    whole.load_state_dict(best)
    assert torch.equal(whole(x), want)
    assert states(model)["0"][0] == "DORMANT"
    nn.Sequential(mlp(8, 6, 4), nn.Linear(4, 4)).load_state_dict(best)  # law 6


def test_a_rollback_inside_a_backward_is_refused_with_nothing_changed(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    best = saved(model)
    load(model, "0", 0, shelf.put(blueprint()).id, trainable=True)
    with torch.no_grad():
        model.get_parameter("0.weight").mul_(2)
    want, y = model(x).detach(), model(x)
    y.register_hook(lambda _: model.load_state_dict(best) and None)
    with pytest.raises(RuntimeError, match="backward"):
        y.sum().backward()
    assert torch.equal(model(x), want)
