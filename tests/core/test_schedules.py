"""Alphas that move while the model trains."""

from __future__ import annotations

import asyncio
import re

import pytest
import torch

import esper
from esper.execution.state_layout import AlphaError
from tests.core.seeds import GatedPlatform, blueprint, load, outputs
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def alpha(model: esper.MorphableModel, seed: int = 0) -> float:
    return float(model.kasmina_layers["0"].state.alpha_blend[seed])


@pytest.mark.parametrize("ramp", [esper.LinearRamp, esper.CosineRamp])
def test_a_ramp_moves_with_training_forwards_and_ends(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, ramp: type[esper.LinearRamp]
) -> None:
    schedule = ramp(0.0, 1.0, 4)
    load(model, "0", 0, kernel, alpha=schedule)
    seen = []
    for _ in range(6):
        model(x)
        seen.append(alpha(model))
    assert seen == pytest.approx([schedule(step) for step in (0, 1, 2, 3, 4, 4)], abs=1e-3)
    model.set_alpha("0", 0, 0.5)
    model(x)
    assert alpha(model) == 0.5


def test_only_training_forwards_count(model: esper.MorphableModel, kernel: str, x: torch.Tensor) -> None:
    load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 4))
    model(x), model(x)
    moved = alpha(model)
    assert moved == 0.25
    model.eval()
    model(x)
    model.train()
    outputs(model, x)
    with torch.inference_mode():
        model(x)
    assert alpha(model) == moved
    model(x)
    assert alpha(model) == 0.5


@pytest.mark.parametrize("awaited", [True, False])
@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_a_schedule_moves_in_compiled_models(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, backend: str, awaited: bool, fresh_dynamo: None
) -> None:
    """Also one whose kernel comes into force in a compiled forward."""
    options = {"inner": "eager"} if backend == "esper" else None
    compiled = torch.compile(model, backend=backend, options=options)
    compiled(x)
    if awaited:
        load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 4))
    else:
        assert model.request_kernel("0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 4)).result(60)
    seen = []
    for _ in range(6):
        output = compiled(x)
        seen.append(alpha(model))
        torch.testing.assert_close(output, outputs(model, x))
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_a_schedule_begins_when_its_kernel_comes_into_force(shelf: KernelShelf, kernel: str, x: torch.Tensor) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, commit="manual")
    other = shelf.put(blueprint(seed=2)).id
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.75))
    model.commit()
    before = outputs(model, x)
    assert asyncio.run(model.load_kernel("0", 0, other, alpha=esper.LinearRamp(0.0, 1.0, 4)))
    for _ in range(3):
        assert torch.equal(model(x), before)
    model.commit()
    seen = []
    for _ in range(3):
        model(x)
        seen.append(alpha(model))
    assert seen == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("how", ["another kernel", "unload", "constant"])
def test_a_schedule_ends_with_its_kernel(
    shelf: KernelShelf, model: esper.MorphableModel, kernel: str, x: torch.Tensor, how: str
) -> None:
    load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 100))
    model(x)
    if how == "constant":
        model.set_alpha("0", 0, 0.5)
    elif how == "unload":
        model.unload_kernel("0", 0)
        model.set_alpha("0", 0, 0.5)
    else:
        load(model, "0", 0, shelf.put(blueprint(seed=3)).id, alpha=0.5)
    for _ in range(3):
        model(x)
    assert alpha(model) == 0.5


def test_a_schedule_that_raises_leaves_alpha_where_it_is_and_training_goes_on(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    def schedule(step: int) -> float:
        if step == 2:
            raise ZeroDivisionError("no alpha today")
        return 0.25 + step / 4

    calls = []

    def recorded(step: int) -> float:
        calls.append(step)
        return schedule(step)

    load(model, "0", 0, kernel, alpha=recorded)
    for _ in range(5):
        model(x).sum().backward()
    assert calls == [0, 0, 1, 2]  # once when it was asked for
    assert alpha(model) == 0.5
    assert model.kasmina_layers["0"].state.errors(0) == 1
    assert "no alpha today" in caplog.text


@pytest.mark.parametrize("bad", [1.5, float("nan"), "half", None])
def test_a_schedule_that_returns_no_alpha_is_refused_or_ends(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, bad: object
) -> None:
    with pytest.raises(AlphaError):
        model.request_kernel("0", 0, kernel, alpha=lambda step: bad)  # type: ignore[arg-type, return-value]  # what is refused
    assert model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"
    load(model, "0", 0, kernel, alpha=lambda step: 0.5 if step < 1 else bad)  # type: ignore[arg-type, return-value]  # what is refused
    with pytest.raises(AlphaError):
        model.set_alpha("0", 0, lambda step: bad)  # type: ignore[arg-type, return-value]  # what is refused
    for _ in range(3):
        model(x)
    assert alpha(model) == 0.5
    assert model.kasmina_layers["0"].state.errors(0) == 1


def test_a_failed_load_leaves_the_schedule_of_the_kernel_in_force(
    shelf: KernelShelf, kernel: str, x: torch.Tensor
) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of a platform as is needed
    load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.0, 1.0, 4))
    model(x)
    gate = gated.hold("cd" * 32)
    future = model.request_kernel("0", 0, "cd" * 32, alpha=esper.LinearRamp(1.0, 0.0, 4))
    gated.wait_until_held()
    model(x)
    assert alpha(model) == 0.25
    gate.set()
    assert future.result(30) is False
    model(x)
    assert alpha(model) == 0.5


def test_an_alpha_for_a_seed_without_a_kernel_is_a_warning_once(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    before = outputs(model, x)
    for value in (0.25, esper.LinearRamp(0.0, 1.0, 4)):
        model.set_alpha("0", 1, value)
    assert torch.equal(outputs(model, x), before)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(r"seed 1 of 0 has no effect.*pass alpha=\.\.\. to load_kernel", record.getMessage())
    caplog.clear()
    load(model, "0", 1, kernel)
    assert alpha(model, 1) == 1.0
    model.set_alpha("0", 1, 0.5)
    assert not caplog.records


def test_an_alpha_set_during_a_load_is_no_mistake(
    shelf: KernelShelf, kernel: str, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of one as it needs
    gate = gated.hold(kernel)
    staged = model.request_kernel("0", 0, kernel)
    gated.wait_until_held()
    model.set_alpha("0", 0, 0.5)
    gate.set()
    assert staged.result(30)
    model.set_alpha("0", 0, 0.75)
    model(x)
    assert alpha(model) == 0.75
    assert not [each for each in caplog.records if "no effect" in each.getMessage()]
