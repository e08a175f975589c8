"""`torch.optim.swa_utils.AveragedModel` of a model that grows, shrinks, and takes kernels into its weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

import esper
from tests.core.grown import saved
from tests.core.seeds import blueprint, load
from tests.core.training import wrapped
from tests.kernel_shelf import KernelShelf

AVERAGES: dict[str, dict[str, Any]] = {
    "avg_fn": {"avg_fn": get_ema_avg_fn(0.5)},
    "multi_avg_fn": {"multi_avg_fn": get_ema_multi_avg_fn(0.5)},
    "use_buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.5), "use_buffers": True},
    "swa": {},
}


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(16, 8)


def ema(model: nn.Module) -> Any:
    """An average that has been updated once."""
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    return average


def nudge(model: nn.Module) -> None:
    with torch.no_grad():
        for each in model.parameters():
            if each.requires_grad:
                each.add_(0.1 * torch.randn_like(each))


@pytest.mark.parametrize("kind", AVERAGES)
def test_an_average_has_the_kernels_of_its_model_and_values_of_its_own(
    shelf: KernelShelf, x: torch.Tensor, kind: str
) -> None:
    host = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model: Any = esper.wrap(host, seeds_per_layer=3, platform=shelf.platform)
    average: Any = AveragedModel(model, **AVERAGES[kind])
    average.update_parameters(model)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    average.update_parameters(model)
    first = [each.detach().clone() for each in model.seed_parameters()]
    nudge(model)
    average.update_parameters(model)
    share = 1 / 3 if kind == "swa" else 0.5
    averaged = list(average.module.seed_parameters())
    for mine, old, new in zip(averaged, first, model.seed_parameters(), strict=True):
        assert torch.allclose(mine, old + share * (new - old), atol=1e-6)

    frozen = shelf.put(blueprint(6, 4, seed=9)).id
    load(model, "2", 1, frozen, alpha=0.25)
    model.set_alpha("0", 0, 0.75)
    assert len(list(average.parameters())) == len(list(model.parameters()))
    assert all(mine is still for mine, still in zip(averaged, average.module.seed_parameters(), strict=True))
    assert average.module.kasmina_layers["0"].state.alpha(0) == 0.75
    assert average.module.kasmina_layers["2"].state.alpha(1) == 0.25
    update_bn([x], average)

    model.unload_kernel("0", 0)
    model.commit()
    for _ in range(3):
        average.update_parameters(model)
    assert list(average.module.state_dict()) == list(model.state_dict())
    values = [each.detach().clone() for each in model.kasmina_layers["2"].kernel_parameters(1)]
    again = wrapped(shelf)
    load(again, "2", 1, frozen, alpha=0.25)
    assert all(torch.equal(a, b) for a, b in zip(values, again.kasmina_layers["2"].kernel_parameters(1), strict=True))


def test_a_kernel_that_is_loaded_anew_begins_anew(shelf: KernelShelf) -> None:
    model = wrapped(shelf)
    kernel = shelf.put(blueprint()).id
    load(model, "0", 0, kernel, alpha=0.5, trainable=True)
    average = ema(model)
    nudge(model)
    average.update_parameters(model)
    model.unload_kernel("0", 0)
    load(model, "0", 0, kernel, alpha=0.5, trainable=True)
    list(average.parameters())
    for mine, theirs in zip(average.module.seed_parameters(), model.seed_parameters(), strict=True):
        assert torch.equal(mine, theirs)
        assert mine is not theirs


def test_an_average_takes_its_own_kernel_into_its_weight(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(esper.Blueprint.affine(8, 6, start="kaiming")).id, alpha=0.5, trainable=True)
    average = ema(model)
    nudge(model)
    average.update_parameters(model)
    expected = average(x)
    assert not torch.allclose(expected, model(x), atol=1e-3)
    assert model.fossilize("0", 0)
    model.commit()
    list(average.parameters())
    assert model.runtime.plan.is_dormant
    assert list(average.module.state_dict()) == list(model.state_dict())
    assert torch.allclose(average(x), expected, atol=1e-5)
    for _ in range(60):
        average.update_parameters(model)
    assert torch.allclose(average(x), model(x), atol=1e-5)


def test_an_average_that_missed_a_kernel_takes_over_what_became_of_it(
    shelf: KernelShelf, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    model = wrapped(shelf)
    average = ema(model)
    load(model, "0", 0, shelf.put(esper.Blueprint.affine(8, 6, start="kaiming")).id, alpha=0.5)
    assert model.fossilize("0", 0)
    model.commit()
    average.update_parameters(model)
    assert torch.allclose(average(x), model(x), atol=1e-6)
    assert "the average of layer 0 begins anew" in caplog.text


def test_an_average_may_be_resumed_before_its_model(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    average = ema(model)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    average.update_parameters(model)
    nudge(model)
    average.update_parameters(model)
    expected = average(x)
    resumed = wrapped(shelf)
    again = ema(resumed)
    again.load_state_dict(saved(average))
    resumed.load_state_dict(saved(model))
    assert len(list(again.parameters())) == len(list(resumed.parameters()))
    assert torch.equal(again(x), expected)


def test_any_other_copy_stays_what_it_was(shelf: KernelShelf) -> None:
    model = wrapped(shelf)
    average = ema(model)
    best, best_average = copy.deepcopy(model), copy.deepcopy(average)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    average.update_parameters(model)
    assert len(list(best.parameters())) == len(list(best_average.parameters())) == 4
    assert len(list(average.parameters())) == len(list(model.parameters())) > 4


def test_a_ramp_moves_the_average_only_as_the_model_moves(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=esper.LinearRamp(0.0, 1.0, steps=10), trainable=True)
    average = ema(model)
    for _ in range(4):
        average(x)
        model(x)
        average.update_parameters(model)
        assert average.module.kasmina_layers["0"].state.alpha(0) == model.kasmina_layers["0"].state.alpha(0)


def test_an_average_of_a_model_with_a_wrapped_part(shelf: KernelShelf, x: torch.Tensor) -> None:
    part = wrapped(shelf)
    model = nn.Sequential(part, nn.Linear(4, 2))
    average = ema(model)
    load(part, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    for _ in range(60):
        average.update_parameters(model)
    assert torch.allclose(average(x), model(x), atol=1e-5)
