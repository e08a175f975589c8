"""Optimizers that are saved, resumed, copied and compiled, and kernels in groups and optimizers of their own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from tests.core.seeds import blueprint
from tests.core.training import (
    grow,
    step,
    through_a_file,
    wrapped,
)
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.usefixtures("nothing_is_said")


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(16, 8)


# -- groups ------------------------------------------------------------------------------------------------------------


def test_kernels_join_the_group_of_their_own_layer_with_their_names(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    named = dict(model.named_parameters())
    first, second = ([(n, p) for n, p in named.items() if n.startswith(layer)] for layer in ("0.", "2."))
    optimizer = torch.optim.AdamW([{"params": first}, {"params": second, "lr": 1e-2}], lr=1e-3)
    scheduler = schedulers.CosineAnnealingLR(optimizer, 10)
    step(model, optimizer, x)
    scheduler.step()
    new = grow(shelf, model, "2")
    added = [(n, p) for n, p in model.named_parameters() if n.startswith("_esper")]
    optimizer.add_param_group({"params": list(added)})
    step(model, optimizer, x)
    one, two = optimizer.param_groups
    assert [id(each) for each in two["params"][-len(new) :]] == [id(each) for each in new]
    assert len(one["params"]) == len(first)
    assert two["param_names"] == [n for n, _ in second] + [n for n, _ in added]


def test_a_group_with_options_of_its_own_stays_one(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = schedulers.StepLR(optimizer, 1, gamma=0.5)
    step(model, optimizer, x)
    scheduler.step()
    optimizer.add_param_group({"params": grow(shelf, model), "lr": 0.5})
    step(model, optimizer, x)
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.0025, 0.25]


def test_without_a_scheduler_groups_stay_as_they_are(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    optimizer.add_param_group({"params": grow(shelf, model)})
    step(model, optimizer, x)
    assert len(optimizer.param_groups) == 2


# -- states ------------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2),
    "Rprop": torch.optim.Rprop,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_resumed_optimizer_goes_on_as_if_nothing_had_been(
    shelf: KernelShelf, x: torch.Tensor, kind: str, order: tuple[int, ...]
) -> None:
    make = OPTIMIZERS[kind]
    model = wrapped(shelf)
    optimizer = make(model.parameters())
    for seed in order:
        optimizer.add_param_group({"params": grow(shelf, model, "0", seed), "lr": 1e-2 / (seed + 1)})
        step(model, optimizer, x)
        step(model, optimizer, x)
    state, saved = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    step(model, optimizer, x)
    step(model, optimizer, x)

    resumed = wrapped(shelf)
    host = list(resumed.parameters())
    resumed.load_state_dict(state)
    again = make(host)
    for seed in range(3):
        again.add_param_group({"params": list(resumed.kasmina_layers["0"].kernel_parameters(seed))})
    again.load_state_dict(saved)
    step(resumed, again, x)
    again.load_state_dict(again.state_dict())  # what was given back is saved under its name again
    step(resumed, again, x)
    assert [group["lr"] for group in again.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert torch.allclose(resumed(x), model(x), atol=1e-6)


def test_kernels_that_joined_the_hosts_group_are_resumed_from_all_of_the_models_parameters(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    scheduler = schedulers.LambdaLR(optimizer, lambda i: 0.9**i)
    for place in (("2", 1), ("0", 2), ("0", 0)):
        optimizer.add_param_group({"params": grow(shelf, model, *place)})
        step(model, optimizer, x)
        scheduler.step()
    state, saved = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    step(model, optimizer, x)

    resumed = wrapped(shelf)
    resumed.load_state_dict(state)
    again = torch.optim.Adam(resumed.parameters(), lr=1e-2)
    again.load_state_dict(saved)
    step(resumed, again, x)
    assert torch.allclose(resumed(x), model(x), atol=1e-6)


def test_a_state_of_a_kernel_that_is_not_there_is_dropped_aloud(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    optimizer.add_param_group({"params": grow(shelf, model, "0", 0)})
    step(model, optimizer, x)
    saved = copy.deepcopy(optimizer.state_dict())

    other = wrapped(shelf)
    again = torch.optim.Adam(other.parameters(), lr=1e-2)
    new = grow(shelf, other, "0", 1)
    again.add_param_group({"params": new})
    again.load_state_dict(saved)
    with pytest.warns(UserWarning, match="nothing for seed 1 of layer '0'"):
        step(other, again, x)
    assert all(again.state[each]["step"] == 1 for each in new)
    assert all(again.state[each]["step"] == 2 for each in again.param_groups[0]["params"])


def test_two_models_in_one_optimizer_and_a_copy_of_both(shelf: KernelShelf, x: torch.Tensor) -> None:
    models: Any = nn.ModuleList([wrapped(shelf), wrapped(shelf)])
    optimizer = torch.optim.Adam(models.parameters(), lr=1e-2)

    def train(models: Any, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        optimizer.zero_grad()
        y: torch.Tensor = models[0](x) * 2 + models[1](x)
        y.square().mean().backward()
        optimizer.step()
        return y.detach()

    for index, seed in ((1, 2), (0, 2), (1, 0)):
        optimizer.add_param_group({"params": grow(shelf, models[index], "0", seed)})
        train(models, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    twins, again = copy.deepcopy((models, optimizer))
    assert torch.equal(train(models, optimizer), train(twins, again))
    for each in (optimizer, again):  # a rollback of running optimizers
        each.load_state_dict(copy.deepcopy(saved))
    assert torch.equal(train(models, optimizer), train(twins, again))
    assert torch.equal(train(models, optimizer), train(twins, again))


def test_an_lbfgs_closure_that_brings_a_kernel_into_force(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model(x).square().mean()
        loss.backward()
        return loss

    before = closure().item()
    assert model.request_kernel("0", 0, shelf.put(blueprint(start="identity")).id, alpha=0.5).result()
    optimizer.step(closure)
    assert model.kasmina_layers["0"].state.in_force(0)
    assert closure().item() < before


def test_a_compiled_step_goes_on(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    new = grow(shelf, model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    compiled = torch.compile(optimizer.step, backend="eager")
    before = [each.detach().clone() for each in new]
    model(x).square().mean().backward()
    compiled()
    assert not any(torch.equal(a, b) for a, b in zip(before, new, strict=True))


# -- optimizers of their own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("kernels_first", [True, False])
def test_kernels_with_an_optimizer_of_their_own_keep_their_gradients(
    shelf: KernelShelf, x: torch.Tensor, every: int, kernels_first: bool
) -> None:
    model = wrapped(shelf)
    host = torch.optim.SGD(model.parameters(), lr=1e-2)
    new = grow(shelf, model)
    own = torch.optim.SGD(new, lr=1e-2)
    total = [torch.zeros_like(each) for each in new]
    before = [each.detach().clone() for each in new]
    for turn in range(1, every + 1):
        host.zero_grad()
        loss = model(x).square().mean()
        for sum_, gradient in zip(total, torch.autograd.grad(loss, new, retain_graph=True), strict=True):
            sum_ += gradient
        loss.backward()
        for optimizer in (own, host) if kernels_first else (host, own):
            if optimizer is host or turn == every:
                optimizer.step()
    expected = [b - 1e-2 * g for b, g in zip(before, total, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(new, expected, strict=True))
