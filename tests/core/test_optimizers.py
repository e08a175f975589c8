"""Kernels that are put into optimizers by hand, and those that are left out."""

from __future__ import annotations

import gc
import threading
import time
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import esper
from tests.core.seeds import blueprint, load
from tests.core.training import SCHEDULERS
from tests.kernel_shelf import KernelShelf


def wrapped(shelf: KernelShelf) -> Any:
    torch.manual_seed(0)
    return esper.wrap(nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1)), platform=shelf.platform)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(32, 8)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor) -> None:
    optimizer.zero_grad()
    (model(x) - x.norm(dim=1, keepdim=True)).square().mean().backward()
    optimizer.step()


@pytest.mark.parametrize("name", sorted(SCHEDULERS.keys() - {"ReduceLROnPlateau by group"}))  # torch's takes no group
def test_kernels_are_added_beside_a_scheduler_that_was_there_before(
    shelf: KernelShelf, x: torch.Tensor, name: str
) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
    scheduler: Any = SCHEDULERS[name](optimizer)
    loss = (1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()
    step(model, optimizer, x)
    scheduler.step(*loss)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    optimizer.add_param_group({"params": list(model.seed_parameters())})
    before = [parameter.detach().clone() for parameter in model.seed_parameters()]
    for _ in range(4):
        step(model, optimizer, x)
        scheduler.step(*loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, model.seed_parameters(), strict=True))


def test_the_order_of_parameters_does_not_depend_on_the_order_of_loading(shelf: KernelShelf) -> None:
    kernel, names = shelf.put(blueprint()).id, []
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        model = wrapped(shelf)
        for seed in order:
            load(model, "0", seed, kernel, alpha=0.5, trainable=True)
        names.append([name for name, _ in model.named_parameters()])
    assert names[0] == names[1] == names[2]


def test_gradients_of_kernels_in_no_optimizer_do_not_pile_up_and_that_is_said_once(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    said = steps_until_told(model, optimizer, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(4):
            step(model, optimizer, x)
            assert all(parameter.grad is None for parameter in model.seed_parameters())
    assert "the kernels of seed 0 of layer '0' are trainable and stand in no optimizer" in said
    assert all(parameter.grad is not None for parameter in optimizer.param_groups[0]["params"])


def test_what_is_said_of_kernels_is_said_where_their_own_model_trains(
    shelf: KernelShelf, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, other = wrapped(shelf), wrapped(shelf)
    optimizer, others = (torch.optim.SGD(each.parameters(), lr=1e-2) for each in (alone, other))
    kernel = shelf.put(blueprint()).id
    load(alone, "0", 0, kernel, alpha=0.5, trainable=True)
    load(other, "0", 0, kernel, alpha=0.5, trainable=True)
    mine = torch.optim.SGD(other.seed_parameters(), lr=1e-2)  # which takes no step yet
    looked, get_objects = threading.Event(), gc.get_objects

    def noting(*generation: int) -> list[Any]:
        objects = get_objects(*generation)
        if generation == (2,):
            looked.set()
        return objects

    monkeypatch.setattr(gc, "get_objects", noting)
    while not looked.is_set():
        step(alone, optimizer, x)
        looked.wait(0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:  # meanwhile the answer arrives
            step(other, others, x)
    mine.step()
    assert "the kernels of seed 0 of layer '0' are trainable" in steps_until_told(alone, optimizer, x)


def steps_until_told(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, kept: Iterable[nn.Parameter] = ()
) -> str:
    """Take steps of the host until it is said that kernels stand in no optimizer; what is said.

    Gradients of parameters that are `kept` are there after each.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end = time.monotonic() + 60
        while not caught:
            assert time.monotonic() < end, "nothing was said"
            step(model, optimizer, x)
            assert all(each.grad is not None for each in kept)
    [said] = [str(each.message) for each in caught]
    return said


def test_optimizers_are_looked_for_by_another_thread_than_the_one_that_trains(
    shelf: KernelShelf, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    threads, get_objects = set(), gc.get_objects

    def noting(*generation: int) -> list[Any]:
        threads.add(threading.current_thread())
        return get_objects(*generation)

    monkeypatch.setattr(gc, "get_objects", noting)
    steps_until_told(model, optimizer, x)
    assert [each.name for each in threads] == ["esper-staging"]


def test_an_optimizer_that_has_not_stepped_yet_keeps_its_kernels_gradients(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    hosts = torch.optim.SGD(model.parameters(), lr=1e-2)
    load(model, "0", 0, shelf.put(blueprint()).id, alpha=0.5, trainable=True)
    mine = list(model.seed_parameters())
    kernels = torch.optim.Adam(mine, lr=1e-2)
    load(model, "2", 0, shelf.put(blueprint(6, 1)).id, alpha=0.5, trainable=True)  # which nobody holds
    assert "the kernels of seed 0 of layer '2' are" in steps_until_told(model, hosts, x, kept=mine)
    before = [each.detach().clone() for each in mine]
    kernels.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, mine, strict=True))
