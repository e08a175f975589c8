"""`Probe`: moments of inputs and gradients, the same whatever way the model runs, and nothing left of it afterwards."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import esper
from esper.core.errors import TargetError
from esper.growth import GrowthError, Probe, SiteStatistics
from tests.compiler.agreement import load, put
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

BATCHES = [torch.randn(n, 5, 8, generator=torch.Generator().manual_seed(n)) for n in (3, 4)]
ROWS = 5 * (3 + 4)


def train(run: Any, batches: list[Tensor] = BATCHES) -> None:
    for x in batches:
        run(x).square().mean().backward()


def expected(model: Any, name: str) -> tuple[Tensor, Tensor]:
    """Inputs with a 1 appended, and gradients of outputs, of a layer of a plain model."""
    seen: list[Tensor] = []
    gradients: list[Tensor] = []

    def see(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(inputs[0].detach().flatten(0, -2))
        output.register_hook(lambda g: gradients.append(g.flatten(0, -2)))

    handle = model.get_submodule(name).register_forward_hook(see)
    train(model)
    handle.remove()
    x = torch.cat(seen)
    return torch.cat([x, torch.ones(len(x), 1)], 1), torch.cat(gradients)


def check(found: SiteStatistics, x: Tensor, g: Tensor, **tolerance: Any) -> None:
    assert (found.count, found.batches) == (ROWS, 2)
    for ours, wanted in ((found.inputs, x.T @ x), (found.cross, g.T @ x), (found.gradients, g.T @ g)):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, wanted.float() / ROWS, **tolerance)


@pytest.mark.parametrize("way", ["module", "fx", "compiled", "by blocks", "checkpointed"])
def test_the_moments_are_those_of_the_plain_model(way: str, fresh_dynamo: None) -> None:
    host = nn.Sequential(mlp(8, 6, 8), mlp(8, 6, 8))
    model = esper.wrap(copy.deepcopy(host), mode="fx" if way == "fx" else "module")
    run: Any = model
    if way == "compiled":
        run = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
        train(run)
    elif way == "by blocks":
        esper.compile_blocks(model, options={"inner": "aot_eager"})
        train(run)
    elif way == "checkpointed":

        def run(x: Tensor) -> Tensor:
            for block in model:  # type: ignore[attr-defined]  # a Sequential
                x = checkpoint(block, x, use_reentrant=False)
            return x

    with Probe(model) as probe:
        train(run)
    assert list(probe) == ["0.0", "0.2", "1.0", "1.2"]
    assert probe.reached == set(probe)
    for name, found in probe.items():
        check(found, *expected(host, name))
        assert found.learns == (True, True)


def test_kernels_in_force_are_part_of_what_a_site_returns(shelf: KernelShelf) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform)
    load(model, "0", 0, put(shelf), alpha=0.5)
    with Probe(model, "0") as probe:
        train(model)
    check(probe["0"], *expected(model, "0"))
    torch.testing.assert_close(model.get_submodule("0")(probe["0"].rows), probe["0"].row_outputs)


def test_a_bfloat16_model_is_summed_up_in_float32() -> None:
    host = mlp(8, 6, 4).bfloat16()
    model = esper.wrap(copy.deepcopy(host))
    batches = [x.bfloat16() for x in BATCHES]
    with Probe(model) as probe:
        train(model, batches)
    found = probe["0"]
    x = torch.cat([x.flatten(0, -2) for x in batches]).float()
    torch.testing.assert_close(found.inputs[:8, :8], x.T @ x / ROWS)
    assert found.row_gradients.dtype == torch.float32


def test_the_sample_is_bounded_and_comes_of_all_batches_alike() -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(1, 2)))
    batches = [torch.arange(100.0 * n, 100.0 * n + 100)[:, None] for n in range(20)]
    samples = []
    for seed in (0, 0, 1):
        with Probe(model, rows=400, seed=seed) as probe:
            train(model, batches)
        rows = probe["0"].rows.flatten()
        assert len(rows.unique()) == 400
        counts = torch.bincount((rows / 100).long(), minlength=20)
        assert counts.min() >= 5
        assert counts.max() <= 40
        torch.testing.assert_close(model(rows[:, None]), probe["0"].row_outputs)
        samples.append(rows)
    assert torch.equal(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])


def test_an_input_that_is_written_to_later_was_seen_as_it_was() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 6).requires_grad_(False)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            hidden = self.layer(x).requires_grad_()
            x.zero_()
            y: Tensor = self.head(hidden.clone().relu_())
            return y

    model = esper.wrap(Writes(), ["layer"])
    layer = model.get_submodule("layer")
    layer.bias.requires_grad_(True)  # so that a gradient comes back
    with Probe(model) as probe:
        train(model)
    x = torch.cat([x.flatten(0, -2) for x in BATCHES])
    torch.testing.assert_close(probe["layer"].inputs[:8, :8], x.T @ x / ROWS)
    assert probe["layer"].learns == (False, True)


def test_nothing_is_left_of_a_probe(fresh_dynamo: None) -> None:
    model = esper.wrap(mlp(8, 6, 4))
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
    before = run(BATCHES[0])
    traced = counters["stats"]["unique_graphs"]
    probe = Probe(model)
    with probe:
        train(run)
    assert torch.equal(run(BATCHES[0]), before)
    assert counters["stats"]["unique_graphs"] == traced
    assert not any(layer._forward_hooks for layer in model.kasmina_layers.values())
    assert probe["0"].count == ROWS
    with probe:
        train(model)
    assert probe["0"].count == 2 * ROWS


def test_a_probe_goes_on_from_its_state() -> None:
    model, batches = esper.wrap(mlp(8, 6, 4)), [*BATCHES, *BATCHES]
    whole = Probe(model, rows=20, seed=3)
    with whole:
        train(model, batches[:2])
    state = whole.state_dict()
    with whole:
        train(model, batches[2:])
    resumed = Probe(model, rows=20, seed=3)
    for _ in range(2):  # what was loaded is a copy
        resumed.load_state_dict(state)
        with resumed:
            train(model, batches[2:])
    for name, found in whole.items():
        for field in dataclasses.fields(found):
            one, other = getattr(found, field.name), getattr(resumed[name], field.name)
            assert torch.equal(one, other) if isinstance(one, Tensor) else one == other
    narrow = Probe(esper.wrap(mlp(6, 6, 4)))
    for bad in ({}, None, {"drawn": {}, "sites": {"5": {}}}):
        with pytest.raises(GrowthError, match="a probe's state is of another one or damaged"):
            narrow.load_state_dict(bad)  # type: ignore[arg-type]  # a mistake
    with pytest.raises(GrowthError, match=r"inputs of layer '0' is of shape \[9, 9\], not \[7, 7\]"):
        narrow.load_state_dict(state)
    assert not narrow.reached


def test_a_block_that_raises_ends_the_probe() -> None:
    model = esper.wrap(mlp(8, 6, 4))
    with pytest.raises(ZeroDivisionError), Probe(model):
        _ = 1 / 0
    assert not any(layer._forward_hooks for layer in model.kasmina_layers.values())


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_what_was_not_seen_is_named() -> None:
    model = esper.wrap(mlp(8, 6, 4))
    with Probe(model, ["0"]) as probe:
        model(BATCHES[0])
        with torch.no_grad():
            model(BATCHES[0])
    assert probe.reached == frozenset()
    with pytest.raises(GrowthError, match="no gradient has reached layer '0'"):
        probe["0"]
    with pytest.raises(KeyError, match="the probe is not for '2'"):
        probe["2"]


def test_a_loss_that_is_nan_is_named() -> None:
    model = esper.wrap(mlp(8, 6, 4))
    with Probe(model) as probe:
        (model(BATCHES[0]).sum() * float("nan")).backward()
    with pytest.raises(GrowthError, match=r"layer '0' were infinite or NaN"):
        probe["0"]


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        (["0", "first"], "no layer with seeds is selected by 'first'"),
        ([], "no layers are named"),
        (nn.Conv1d, "Conv1d"),
    ],
)
def test_layers_that_are_not_there(layers: Any, told: str) -> None:
    with pytest.raises(TargetError, match=told):
        Probe(esper.wrap(mlp(8, 6, 4)), layers)


def test_a_sample_of_no_rows_is_refused() -> None:
    with pytest.raises(GrowthError, match="rows must be at least 1, not 0"):
        Probe(esper.wrap(mlp(8, 6, 4)), rows=0)


def test_models_and_layers_that_it_is_not_for() -> None:
    with pytest.raises(GrowthError, match=r"what esper\.wrap\(\) returned, not for a Sequential"):
        Probe(mlp(8, 6, 4))  # type: ignore[arg-type]  # a mistake
    wide = esper.wrap(nn.Sequential(nn.Linear(2, 10000)))
    with pytest.raises(GrowthError, match="'0' has 2 inputs and 10000 outputs"):
        Probe(wide)
    probe = Probe(esper.wrap(mlp(8, 6, 4)))
    with probe, pytest.raises(GrowthError, match="in its block already"), probe:
        pass


def test_an_input_that_is_written_to_under_autocast_was_seen_before() -> None:
    """Autograd keeps what autocast has cast it to, and lets the input itself be changed."""
    torch.manual_seed(0)
    model = esper.wrap(nn.Sequential(nn.Linear(6, 6)))
    x = torch.randn(32, 6)
    kept = x.clone()
    with Probe(model) as probe:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(x)
        x.add_(1.0)
        y.float().square().mean().backward()
    with_one = torch.cat([kept, torch.ones(32, 1)], 1)
    assert torch.allclose(probe["0"].inputs, with_one.T @ with_one / 32, atol=1e-5)
