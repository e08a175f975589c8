"""Laws 3 and 4: what is staged comes into force between two forwards, and what fails changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import esper
from esper.execution.lifecycle import LifecycleError
from esper.execution.plans.runtime import CommitError
from tests.core.seeds import GatedPlatform, blueprint, load, outputs, states
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

HEX = "ab" * 32


@pytest.fixture
def other(shelf: KernelShelf) -> str:
    return shelf.put(blueprint(seed=2)).id


def wrapped(shelf: KernelShelf, **options: Any) -> esper.MorphableModel:
    return esper.wrap(mlp(8, 6, 4), seeds_per_layer=2, platform=shelf.platform, **options)


# -- when --------------------------------------------------------------------------------------------------------------


def test_what_is_requested_comes_into_force_with_the_next_forward(
    shelf: KernelShelf, x: torch.Tensor, kernel: str
) -> None:
    model = wrapped(shelf)
    dormant = model(x)
    assert model.request_kernel("0", 1, kernel, alpha=0.5).result(30) is True
    assert states(model)["0"] == ["DORMANT", "LOADING"]
    active = model(x)
    assert states(model) == {"0": ["DORMANT", "ACTIVE"], "2": ["DORMANT", "DORMANT"]}
    assert not torch.allclose(active, dormant)
    assert torch.equal(model(x), active)


def test_awaited_on_the_thread_that_runs_the_model_it_is_in_force_at_once(
    shelf: KernelShelf, x: torch.Tensor, kernel: str
) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, kernel)
    assert states(model)["0"][0] == "ACTIVE"
    assert model.unload_kernel("0", 0)
    assert states(model)["0"][0] == "DORMANT"


def test_manual_mode_waits_for_commit_and_changes_everything_at_once(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf, commit="manual")
    first, second = shelf.put(blueprint(8, 6)).id, shelf.put(blueprint(6, 4)).id
    dormant = model(x)
    assert asyncio.run(model.load_kernel("0", 0, first, alpha=0.5))
    assert asyncio.run(model.load_kernel("2", 1, second, alpha=0.5))
    assert torch.equal(model(x), dormant)
    assert states(model) == {"0": ["LOADING", "DORMANT"], "2": ["DORMANT", "LOADING"]}
    transitions = model.commit()
    assert [(each.layer, each.seed, each.new.name, each.kernel_id) for each in transitions] == [
        ("0", 0, "ACTIVE", first),
        ("2", 1, "ACTIVE", second),
    ]
    active = model(x)
    assert not torch.allclose(active, dormant)
    assert model.commit() == []
    assert model.unload_kernel("0", 0)
    assert model.unload_kernel("2", 1)
    assert torch.equal(model(x), active)
    assert [each.new.name for each in model.commit()] == ["DORMANT", "DORMANT"]
    assert torch.equal(model(x), dormant)


def _refused(action: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(LifecycleError):
        action("0", 0, *arguments)
    return "refused"


MANUAL: dict[str, tuple[Callable[[esper.MorphableModel], list[object]], list[object], str]] = {
    "unload, unload": (lambda m: [m.unload_kernel("0", 0), m.unload_kernel("0", 0)], [True, False], "DORMANT"),
    "unload, fossilize": (lambda m: [m.unload_kernel("0", 0), m.fossilize("0", 0)], [True, False], "DORMANT"),
    "fossilize, fossilize": (lambda m: [m.fossilize("0", 0), m.fossilize("0", 0)], [True, False], "FOSSILIZED"),
    "fossilize, unload": (lambda m: [m.fossilize("0", 0), _refused(m.unload_kernel)], [True, "refused"], "FOSSILIZED"),
    "fossilize, load": (
        lambda m: [m.fossilize("0", 0), _refused(m.request_kernel, HEX)],
        [True, "refused"],
        "FOSSILIZED",
    ),
    "fossilize, set alpha": (
        lambda m: [m.fossilize("0", 0), _refused(m.set_alpha, 0.1)],
        [True, "refused"],
        "FOSSILIZED",
    ),
    "unload, failing load": (
        lambda m: [m.unload_kernel("0", 0), m.request_kernel("0", 0, HEX).result(30)],
        [True, False],
        "DORMANT",
    ),
    "failing load, unload": (
        lambda m: [m.request_kernel("0", 0, HEX).result(30), m.unload_kernel("0", 0)],
        [False, True],
        "DORMANT",
    ),
}


@pytest.mark.parametrize("sequence", MANUAL)
def test_any_sequence_of_requests_before_a_commit_is_carried_out(
    shelf: KernelShelf, x: torch.Tensor, kernel: str, sequence: str
) -> None:
    steps, expected, state = MANUAL[sequence]
    model = wrapped(shelf, commit="manual")
    dormant = model(x)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    model.commit()
    active = model(x)
    assert steps(model) == expected
    assert torch.equal(model(x), active)
    model.commit()
    assert states(model)["0"] == [state, "DORMANT"]
    assert torch.equal(model(x), dormant if state == "DORMANT" else active)


# -- backward ----------------------------------------------------------------------------------------------------------


def test_a_load_during_backward_waits_for_the_next_forward(shelf: KernelShelf, x: torch.Tensor, kernel: str) -> None:
    model = wrapped(shelf)
    x.requires_grad_()
    dormant = model(x)
    seen: list[object] = []

    def in_backward(gradient: torch.Tensor) -> None:
        seen.append(asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5)))
        seen.append(states(model)["0"][0])
        seen.append(torch.equal(outputs(model, x), dormant))  # a forward inside a backward repeats an earlier one
        with pytest.raises(CommitError, match="between two training steps"):
            model.commit()

    dormant.register_hook(in_backward)
    dormant.sum().backward()
    assert seen == [True, "LOADING", True]
    assert not torch.allclose(model(x), dormant)
    assert states(model)["0"][0] == "ACTIVE"


@pytest.mark.filterwarnings("ignore:.*reentrant")
@pytest.mark.parametrize("mode", ["fx", "module", "esper", "eager"])
@pytest.mark.parametrize(
    ("change", "reentrant"),
    [("load", True), ("load", False), ("unload", True), ("unload", False), ("schedule", False)],
)
def test_a_commit_never_lands_in_an_activation_recompute(
    shelf: KernelShelf, x: torch.Tensor, kernel: str, reentrant: bool, change: str, mode: str, fresh_dynamo: None
) -> None:
    model = wrapped(shelf, mode=mode if mode in ("fx", "module") else "fx")
    run: Any = model
    if mode in ("esper", "eager"):
        options = {"inner": "aot_eager"} if mode == "esper" else None
        run = torch.compile(model, backend=mode, options=options)
    if change != "load":
        load(model, "0", 0, kernel, alpha=0.25, trainable=True)
    x.requires_grad_()
    parameters = list(model.parameters())
    expected = torch.autograd.grad(run(x).square().sum(), parameters)
    if change == "schedule":
        model.set_alpha("0", 0, esper.LinearRamp(0.25, 1.0, 3))

    output = checkpoint(run, x, use_reentrant=reentrant)
    if change == "unload":  # staged by another thread between forward and backward
        asyncio.run(asyncio.to_thread(model.unload_kernel, "0", 0))
    elif change == "load":
        assert model.request_kernel("0", 0, kernel, alpha=0.5).result(30)
    output.square().sum().backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    run(x)
    assert states(model)["0"][0] == ("DORMANT" if change == "unload" else "ACTIVE")
    if change == "schedule":
        assert model.kasmina_layers["0"].state.alpha(0) == 0.5


# -- failures and races ------------------------------------------------------------------------------------------------


def test_a_failure_keeps_the_kernel_in_force(shelf: KernelShelf, x: torch.Tensor, kernel: str) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # the parts that wrap asks a platform for
    load(model, "0", 0, kernel, alpha=0.5)
    before, plan = model(x), model.runtime.plan
    assert asyncio.run(model.load_kernel("0", 0, HEX)) is False
    layer = model.kasmina_layers["0"]
    assert torch.equal(model(x), before)
    assert model.runtime.plan is plan
    assert states(model)["0"][0] == "ACTIVE"
    assert layer.state.errors(0) == 1
    assert "UnknownKernelError" in layer.seed_errors[0]
    report = gated.oona.of("innovation.field_reports")[-1]
    assert (report.layer_name, report.seed_idx, report.state, report.error_count) == ("0", 0, "ACTIVE", 1)
    assert "UnknownKernelError" in report.reason

    assert asyncio.run(model.load_kernel("0", 1, HEX)) is False
    assert states(model)["0"][1] == "ERROR_RECOVERY"
    assert bool(layer.state.fallback_active[1])
    assert gated.oona.of("innovation.field_reports")[-1].state == "ERROR_RECOVERY"
    load(model, "0", 1, kernel, alpha=0.5)
    assert layer.seed_errors == {0: layer.seed_errors[0]}


def test_unloading_calls_off_a_load_under_way(shelf: KernelShelf, x: torch.Tensor, kernel: str) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of a platform as is needed
    dormant = model(x)
    gate = gated.hold(kernel)
    future = model.request_kernel("0", 0, kernel)
    gated.wait_until_held()
    assert states(model)["0"][0] == "LOADING"
    assert model.unload_kernel("0", 0)
    assert states(model)["0"][0] == "DORMANT"
    gate.set()
    assert future.result(30) is False
    assert torch.equal(model(x), dormant)
    assert states(model)["0"][0] == "DORMANT"


def test_calling_off_the_replacement_of_a_kernel_unloads_the_kernel(
    shelf: KernelShelf, x: torch.Tensor, kernel: str, other: str
) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of a platform as is needed
    dormant = model(x)
    load(model, "0", 0, kernel)
    gate = gated.hold(other)
    future = model.request_kernel("0", 0, other)
    gated.wait_until_held()
    assert model.unload_kernel("0", 0)
    gate.set()
    assert future.result(30) is False
    assert torch.equal(model(x), dormant)
    assert states(model)["0"][0] == "DORMANT"


def test_of_two_loads_of_a_seed_the_later_wins(shelf: KernelShelf, x: torch.Tensor, kernel: str, other: str) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of a platform as is needed
    gate = gated.hold(kernel)
    first = model.request_kernel("0", 0, kernel)
    gated.wait_until_held()
    second = model.request_kernel("0", 0, other)
    gate.set()
    assert (first.result(30), second.result(30)) == (False, True)
    model(x)
    assert states(model)["0"][0] == "ACTIVE"
    (seed,) = model.runtime.plan.seeds()
    assert seed.kernel.artifact_id == other


@pytest.mark.parametrize("ends", ["well", "badly", "called off"])
def test_a_load_that_outlasts_the_commit_of_an_earlier_one(
    shelf: KernelShelf, x: torch.Tensor, kernel: str, other: str, ends: str
) -> None:
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # as much of a platform as is needed
    dormant = model(x)
    assert model.request_kernel("0", 0, kernel, alpha=0.5).result(30)
    reference = HEX if ends == "badly" else other
    gate = gated.hold(reference)
    future = model.request_kernel("0", 0, reference, alpha=0.25)
    gated.wait_until_held()
    active = model(x)
    assert not torch.allclose(active, dormant)
    assert states(model)["0"][0] == "LOADING"  # the first is in force, the second under way
    if ends == "called off":
        assert model.unload_kernel("0", 0)
    gate.set()
    assert future.result(30) is (ends == "well")
    after = model(x)
    assert states(model)["0"][0] == ("DORMANT" if ends == "called off" else "ACTIVE")
    assert torch.equal(after, active) == (ends == "badly")
    assert torch.equal(after, dormant) == (ends == "called off")


# -- fossils -----------------------------------------------------------------------------------------------------------


def test_a_fossil_stays(shelf: KernelShelf, x: torch.Tensor, kernel: str) -> None:
    model = wrapped(shelf)
    assert model.fossilize("0", 0) is False
    load(model, "0", 0, kernel, alpha=esper.LinearRamp(0.25, 1.0, 100))
    before = outputs(model, x)
    assert model.fossilize("0", 0) is True
    assert model.fossilize("0", 0) is False
    assert states(model)["0"][0] == "FOSSILIZED"
    model(x)
    assert torch.equal(outputs(model, x), before)  # the schedule has ended with the fossilization
    for action in (
        lambda: model.unload_kernel("0", 0),
        lambda: model.set_alpha("0", 0, 0.5),
        lambda: asyncio.run(model.load_kernel("0", 0, kernel)),
    ):
        with pytest.raises(LifecycleError, match="FOSSILIZED"):
            action()
    assert torch.equal(outputs(model, x), before)
    assert model.get_model_stats()["layers"]["0"]["active_seeds"] == 0
