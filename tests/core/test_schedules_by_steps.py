"""Alphas that move with the steps of the model's optimizers, however many forwards a step takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import esper
from tests.core.seeds import GatedPlatform, load
from tests.kernel_shelf import KernelShelf
from tests.models import mlp


def alpha(model: esper.MorphableModel, layer: str = "0") -> float:
    return model.kasmina_layers[layer].state.alpha(0)


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def ramp(steps: int = 4) -> esper.LinearRamp:
    return esper.LinearRamp(0.0, 1.0, steps)


def grown(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, schedule: Callable[[int], float]
) -> torch.optim.SGD:
    """Begin `schedule` in a model of which an optimizer takes steps."""
    optimizer = sgd(model)
    load(model, "0", 0, kernel, alpha=0.0)
    model(x).sum().backward()
    optimizer.step()
    model.set_alpha("0", 0, schedule)
    return optimizer


def iterate(model: nn.Module, x: torch.Tensor, *optimizers: torch.optim.Optimizer, forwards: int = 1) -> list[float]:
    """One iteration of training; the alphas of its forwards."""
    seen = []
    for _ in range(forwards):
        model(x).sum().backward()
        seen.append(alpha(model))  # type: ignore[arg-type]  # a MorphableModel, behind what is around it
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_forwards_that_gather_gradients_are_one_step(
    shelf: KernelShelf, kernel: str, x: torch.Tensor, mode: Literal["module", "fx"]
) -> None:
    model = esper.wrap(mlp(8, 6, 4), platform=shelf.platform, mode=mode)
    optimizer = grown(model, kernel, x, ramp())
    seen = [iterate(model, x, optimizer, forwards=4) for _ in range(6)]
    assert seen == [[step / 4] * 4 for step in (0, 1, 2, 3, 4, 4)]


@pytest.mark.parametrize("waits", [True, False])
def test_a_ramp_of_as_many_steps_as_the_first_optimizer_takes_ends_with_them(
    shelf: KernelShelf, kernel: str, x: torch.Tensor, waits: bool
) -> None:
    """The optimizer was made and used before there was a kernel; of some steps during the load or of none."""
    gated = GatedPlatform(shelf)
    model = esper.wrap(mlp(8, 6, 4), platform=gated)  # type: ignore[arg-type]  # it has what is used of a platform
    optimizer = sgd(model)
    iterate(model, x, optimizer, forwards=4)
    gate = gated.hold(kernel)
    request = model.request_kernel("0", 0, kernel, alpha=ramp(20))
    if waits:
        iterate(model, x, optimizer, forwards=4)
    gate.set()
    assert request.result(30)
    seen = [iterate(model, x, optimizer, forwards=4) for _ in range(22)]
    if waits:
        assert seen == [pytest.approx([min(step / 20, 1.0)] * 4, abs=1e-3) for step in range(22)]
    else:  # it is not known before its first step, and then the ramp waits for it
        flat = [each for forwards in seen for each in forwards]
        assert flat == sorted(flat)
        assert seen[4:] == [pytest.approx([min(step / 20, 1.0)] * 4, abs=1e-3) for step in range(4, 22)]


def test_two_forwards_in_one_loss_are_one_step(model: esper.MorphableModel, kernel: str, x: torch.Tensor) -> None:
    optimizer = grown(model, kernel, x, ramp())
    for step in range(5):
        optimizer.zero_grad()
        first, second = model(x), model(x.flip(0))
        assert alpha(model) == step / 4
        (first - second).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("inside", ["lbfgs", "closure"])
def test_forwards_inside_of_a_step_see_one_alpha(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, inside: str
) -> None:
    load(model, "0", 0, kernel, alpha=ramp())
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    if inside == "closure":
        optimizer = sgd(model)
    seen: list[float] = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        seen.append(alpha(model))
        return loss

    for step in range(6):
        seen.clear()
        optimizer.step(closure)  # type: ignore[arg-type]  # torch wants a float, and takes what backward() is called on
        assert set(seen) == {min(step / 4, 1.0)}
        assert len(seen) > 1 or inside == "closure"


@pytest.mark.parametrize("order", ["in turn", "kernels twice"])
def test_several_optimizers_are_counted_by_the_one_that_steps_most_often(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, order: str
) -> None:
    load(model, "0", 0, kernel, alpha=0.0, trainable=True)
    own = list(model.seed_parameters())
    host = torch.optim.SGD([each for each in model.parameters() if not any(each is other for other in own)], lr=0.01)
    kernels = torch.optim.SGD(own, lr=0.01)
    iterate(model, x, host, kernels)
    model.set_alpha("0", 0, ramp(8))
    steps = [(host, kernels)] if order == "in turn" else [(kernels,), (kernels, host)]
    seen = [iterate(model, x, *optimizers)[0] for _ in range(8 // len(steps)) for optimizers in steps]
    assert seen == [step / 8 for step in range(8)]


def test_an_optimizer_for_each_parameter_that_steps_inside_of_the_backward_is_one_step(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    load(model, "0", 0, kernel, alpha=0.0, trainable=True)
    optimizers = {each: torch.optim.SGD([each], lr=0.01) for each in model.parameters()}
    for parameter in optimizers:
        parameter.register_post_accumulate_grad_hook(lambda each: optimizers[each].step())  # type: ignore[index]  # keyed by parameters
    model.set_alpha("0", 0, 1.0)
    iterate(model, x)
    model.set_alpha("0", 0, ramp())
    assert [iterate(model, x)[0] for _ in range(6)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


def test_an_optimizer_that_takes_anothers_place_is_followed(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    first = grown(model, kernel, x, ramp(10))
    for _ in range(3):
        iterate(model, x, first)
    second = sgd(model)  # while the first one lives
    before = alpha(model)
    seen = [iterate(model, x, second, forwards=2)[-1] for _ in range(4)]
    assert seen[-1] > seen[1] > before
    assert [round((after - each) * 10) for each, after in pairwise(seen[1:])] == [1, 1]


def test_a_step_that_a_scaler_skips_does_not_count(model: esper.MorphableModel, kernel: str, x: torch.Tensor) -> None:
    optimizer = grown(model, kernel, x, ramp())
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)  # type: ignore[attr-defined]  # torch does not say that it exports it
    seen = []
    for overflows in (False, True, True, False, False):
        optimizer.zero_grad()
        loss = model(x).sum() * (float("inf") if overflows else 1.0)
        seen.append(alpha(model))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert seen == [0.0, 0.25, 0.25, 0.25, 0.5]


def test_models_with_an_optimizer_each_go_by_their_own(shelf: KernelShelf, kernel: str, x: torch.Tensor) -> None:
    first, second = (esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2))
    optimizers = [grown(each, kernel, x, ramp(8)) for each in (first, second)]
    for _ in range(3):
        iterate(first, x, optimizers[0])
        second(x)
    iterate(second, x, optimizers[1])
    first(x), second(x)
    assert (alpha(first), alpha(second)) == (3 / 8, 1 / 8)


def test_models_in_one_optimizer_go_by_it(shelf: KernelShelf, kernel: str, x: torch.Tensor) -> None:
    models = [esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2)]
    both = torch.optim.SGD([each for model in models for each in model.parameters()], lr=0.01)
    for model in models:
        load(model, "0", 0, kernel, alpha=0.0)
    both.step()
    for model in models:
        model.set_alpha("0", 0, ramp())
    for step in range(4):
        for model in models:
            assert iterate(model, x, forwards=2) == [step / 4] * 2
        both.step()


def test_an_optimizer_of_another_model_does_not_matter(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    other = nn.Linear(8, 1)
    optimizer = sgd(other)
    load(model, "0", 0, kernel, alpha=ramp())
    seen = []
    for _ in range(5):
        other(x).sum().backward()
        optimizer.step()
        model(x), seen.append(alpha(model))
        model(x), seen.append(alpha(model))
    assert seen[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_updates_written_by_hand_are_counted_by_forwards(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    optimizer = grown(model, kernel, x, ramp())
    del optimizer
    seen = []
    for _ in range(5):
        model(x).sum().backward()
        seen.append(alpha(model))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.01 * parameter.grad if parameter.grad is not None else 0.0
                parameter.grad = None
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_an_optimizer_that_takes_no_steps_any_more_is_not_waited_for(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, caplog: pytest.LogCaptureFixture
) -> None:
    optimizer = grown(model, kernel, x, ramp())
    with caplog.at_level(logging.WARNING, "esper"):
        for _ in range(1000):
            model(x)
        assert alpha(model) == 0.0
        for _ in range(3):
            model(x)
    assert alpha(model) == 0.75
    assert caplog.text.count("has taken a step for 1000 training forwards") == 1
    seen = [iterate(model, x, optimizer, forwards=2)[-1] for _ in range(5)]
    assert seen == [1.0] * 5  # it had come so far


def test_a_step_between_the_schedule_and_its_first_forward_does_not_count(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    optimizer = grown(model, kernel, x, ramp())
    optimizer.step()
    assert [iterate(model, x, optimizer) for _ in range(2)] == [[0.0], [0.25]]


def test_a_ramp_whose_end_is_passed_between_two_forwards_ends_there(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor
) -> None:
    asked = []

    class Recorded:
        steps = 3

        def __call__(self, step: int) -> float:
            asked.append(step)
            return step / 3

    optimizer = grown(model, kernel, x, Recorded())
    model(x)
    for _ in range(5):
        optimizer.step()
    model(x), optimizer.step(), model(x)
    assert asked == [0, 0, 3]  # once when it was set
    assert alpha(model) == 1.0


@pytest.mark.parametrize("stepped", [True, False])
def test_a_resumed_ramp_goes_on_by_steps(shelf: KernelShelf, kernel: str, x: torch.Tensor, stepped: bool) -> None:
    """Saved between two iterations, or amid one, whose gradients are lost and which is taken anew."""
    model, fresh = (esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2))
    optimizer = grown(model, kernel, x, ramp(8))
    for _ in range(3):
        iterate(model, x, optimizer, forwards=2)
    if not stepped:
        model(x)
    resumed = sgd(fresh)
    fresh.load_state_dict(model.state_dict())
    seen = [iterate(fresh, x, resumed, forwards=2) for _ in range(7)]
    assert seen[0] == [3 / 8, 4 / 8]  # the new optimizer is known from its first step on
    assert seen[1:] == [[each / 8] * 2 for each in (4, 5, 6, 7, 8, 8)]


def test_an_attached_optimizer_is_known_before_its_first_step(shelf: KernelShelf, kernel: str, x: torch.Tensor) -> None:
    model, fresh = (esper.wrap(mlp(8, 6, 4), platform=shelf.platform) for _ in range(2))
    optimizer, resumed = sgd(model), sgd(fresh)
    model.attach_optimizer(optimizer)
    load(model, "0", 0, kernel, alpha=ramp(8))
    assert [iterate(model, x, optimizer, forwards=2) for _ in range(3)] == [[each / 8] * 2 for each in (0, 1, 2)]
    fresh.attach_optimizer(resumed)
    fresh.load_state_dict(model.state_dict())
    assert [iterate(fresh, x, resumed, forwards=2) for _ in range(2)] == [[each / 8] * 2 for each in (3, 4)]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_see_the_alpha_of_their_forward(
    shelf: KernelShelf, kernel: str, x: torch.Tensor, reentrant: bool
) -> None:
    seen: list[float] = []

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp(8, 6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self._noted, x, use_reentrant=reentrant)  # type: ignore[no-any-return]  # of any function

        def _noted(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(model.kasmina_layers["body.0"].state.alpha(0))
            return self.body(x)  # type: ignore[no-any-return]  # of any module

    model = esper.wrap(Checkpointed(), platform=shelf.platform)
    x.requires_grad_()
    optimizer = sgd(model)
    load(model, "body.0", 0, kernel, alpha=0.0)
    model(x).sum().backward()
    optimizer.step()
    model.set_alpha("body.0", 0, ramp())
    seen.clear()
    for _ in range(3):
        model(x).sum().backward()
        model(x).sum().backward()
        optimizer.step()
    assert seen == [0.0] * 4 + [0.25] * 4 + [0.5] * 4


@pytest.mark.parametrize("backend", ["esper", "eager"])
def test_gathered_gradients_are_one_step_in_compiled_models(
    model: esper.MorphableModel, kernel: str, x: torch.Tensor, backend: str, fresh_dynamo: None
) -> None:
    compiled = torch.compile(model, backend=backend, options={"inner": "eager"} if backend == "esper" else None)
    compiled(x).sum().backward()
    optimizer = grown(model, kernel, x, ramp())
    seen = []
    for _ in range(6):
        for _ in range(2):
            output = compiled(x)
            seen.append(alpha(model))
            with torch.no_grad():
                torch.testing.assert_close(output, model(x))
            output.sum().backward()
        optimizer.step()
    assert seen == [each / 4 for each in (0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4)]


def test_a_layer_that_stands_alone_goes_by_the_steps_of_its_optimizer(
    shelf: KernelShelf, kernel: str, x: torch.Tensor
) -> None:
    layer = esper.KasminaLayer(0, 1, 8, 6, source=shelf.platform.kernel_source)
    optimizer = sgd(layer)
    assert layer.request_kernel(0, kernel, alpha=0.0).result(30)
    layer(x).sum().backward()
    optimizer.step()
    layer.set_alpha(0, ramp())
    seen = []
    for _ in range(3):
        for _ in range(3):
            layer(x).sum().backward()
            seen.append(layer.state.alpha(0))
        optimizer.step()
    assert seen == [each / 4 for each in (0, 0, 0, 1, 1, 1, 2, 2, 2)]
