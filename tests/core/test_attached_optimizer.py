"""`attach_optimizer`: kernels learn in the optimizer from their commit on, and leave it with their states."""

from __future__ import annotations

import asyncio
import copy
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

import esper
from esper.execution.kernels.param_groups import OptimizerError
from tests.core.seeds import blueprint, load
from tests.core.training import (
    SCHEDULERS,
    Picky,
    grow,
    ids,
    same,
    step,
    through_a_file,
    values,
    wrapped,
)
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.usefixtures("nothing_is_said")


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(16, 8)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "tensor rate": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-2), foreach=False),
    "named": lambda p: torch.optim.AdamW([(str(i), each) for i, each in enumerate(p)], lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=1e-3),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=1e-2),
}


def plain_sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-2)


def attached(shelf: KernelShelf, make: Callable[[Any], Any] = OPTIMIZERS["AdamW"], **options: Any) -> tuple[Any, Any]:
    """A model, and the optimizer that is attached to it."""
    model = wrapped(shelf)
    optimizer = make(model.parameters())
    model.attach_optimizer(optimizer, **options)
    return model, optimizer


# -- kernels come and go -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_kernel_learns_from_its_commit_on_and_leaves_with_its_state(
    shelf: KernelShelf, x: torch.Tensor, make: Callable[[Any], Any]
) -> None:
    model = wrapped(shelf)
    optimizer = make(model.parameters())
    decay = {"weight_decay": 0.0} if "weight_decay" in optimizer.defaults else {}
    model.attach_optimizer(optimizer, **decay)
    step(model, optimizer, x)
    hosts, states = ids(optimizer.param_groups[0]["params"]), {k: dict(v) for k, v in optimizer.state.items()}
    kernel = grow(shelf, model)
    assert [ids(group["params"]) for group in optimizer.param_groups] == [hosts, ids(kernel)]
    assert {k: dict(v) for k, v in optimizer.state.items() if id(k) in hosts} == states
    assert optimizer.param_groups[1].items() >= decay.items()
    before = values(kernel)
    for _ in range(3):
        step(model, optimizer, x)
    assert not any(torch.equal(a, b) for a, b in zip(before, kernel, strict=True))
    assert all(optimizer.state[each] for each in kernel)
    model.unload_kernel("0", 0)
    step(model, optimizer, x)
    assert [ids(group["params"]) for group in optimizer.param_groups] == [hosts]
    assert sorted(ids(optimizer.state)) == sorted(hosts)
    optimizer.state_dict()


def test_a_new_state_is_empty_and_the_old_one_goes_on_bit_for_bit(shelf: KernelShelf, x: torch.Tensor) -> None:
    """Adam's moments of the host go on as without the kernel, which is in force with a share of 0."""
    runs = []
    for grows in (False, True):
        model = wrapped(shelf)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        model.attach_optimizer(optimizer)
        for number in range(6):
            if grows and number == 3:
                kernel = grow(shelf, model, alpha=0.0)
                assert not any(each in optimizer.state for each in kernel)
            step(model, optimizer, x)
        hosts = [each for name, each in model.named_parameters() if not name.startswith("_esper")]
        runs.append([*values(hosts), *(optimizer.state[each]["exp_avg_sq"].clone() for each in hosts)])
        if grows:
            assert {int(optimizer.state[each]["step"]) for each in kernel} == {3}
            assert {int(optimizer.state[each]["step"]) for each in hosts} == {6}
    assert same(*runs)


def test_attaching_changes_nothing_of_a_model_that_does_not_grow(shelf: KernelShelf, x: torch.Tensor) -> None:
    runs = []
    for attaches in (False, True):
        model = wrapped(shelf)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = schedulers.OneCycleLR(optimizer, 0.1, total_steps=20)
        if attaches:
            model.attach_optimizer(optimizer, scheduler, warmup=3)
        for _ in range(8):
            step(model, optimizer, x)
            scheduler.step()
        runs.append(values(model.parameters()))
    assert same(*runs)


def test_a_group_has_the_options_of_the_layers_group_and_ones_of_its_own(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    first, second = (list(model.kasmina_layers[layer].parameters(recurse=False)) for layer in ("0", "2"))
    optimizer = torch.optim.AdamW([{"params": first}, {"params": second, "lr": 4e-2, "betas": (0.8, 0.9)}], lr=1e-2)
    model.attach_optimizer(optimizer, lr_factor=0.5, weight_decay=0.25)
    grow(shelf, model, "2")
    grow(shelf, model, "0")
    beside, after = optimizer.param_groups[2:]
    assert (beside["lr"], beside["betas"], beside["weight_decay"]) == (2e-2, (0.8, 0.9), 0.25)
    assert (after["lr"], after["betas"], after["weight_decay"]) == (5e-3, (0.9, 0.999), 0.25)


def test_a_rate_of_its_own_is_one_beside_what_the_host_began_with(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model.attach_optimizer(optimizer, scheduler, lr=4e-2)
    step(model, optimizer, x)
    scheduler.step()
    grow(shelf, model)
    assert scheduler.get_last_lr() == pytest.approx([5e-3, 2e-2])


def test_kernels_of_one_commit_share_a_group(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf, commit="manual")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    kernels = [shelf.put(blueprint(seed=number)).id for number in range(3)]
    for seed in (0, 1):
        assert model.request_kernel("0", seed, kernels[seed], trainable=True).result()
    model.commit()
    assert model.request_kernel("0", 2, kernels[2], trainable=True).result()
    model.commit()
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 8, 4]
    model.unload_kernel("0", 0)
    model.commit()
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4, 4]


def test_a_replaced_kernel_leaves_and_its_successor_begins(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    old = grow(shelf, model)
    step(model, optimizer, x)
    load(model, "0", 0, shelf.put(blueprint(seed=9)).id, trainable=True)
    new = list(model.kasmina_layers["0"].kernel_parameters(0))
    assert ids(optimizer.param_groups[1]["params"]) == ids(new)
    assert not any(each in optimizer.state for each in [*old, *new])


def test_a_frozen_kernel_enters_no_optimizer(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    grow(shelf, model, trainable=False)
    assert len(optimizer.param_groups) == 1


def test_a_fossil_in_the_weights_leaves_and_one_that_goes_on_learning_stays(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    model, optimizer = attached(shelf)
    load(model, "2", 0, shelf.put(esper.Blueprint.affine(6, 4)).id, alpha=0.5, trainable=True)
    bottleneck = grow(shelf, model)
    step(model, optimizer, x)
    assert model.fossilize("2", 0)
    assert model.fossilize("0", 0)
    step(model, optimizer, x)
    assert [ids(group["params"]) for group in optimizer.param_groups][1:] == [ids(bottleneck)]
    assert len(optimizer.state) == 4 + len(bottleneck)


def test_kernels_that_are_there_already_move_into_groups_of_their_own_with_their_states(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    model = wrapped(shelf)
    kernel = grow(shelf, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
    for _ in range(2):
        step(model, optimizer, x)
        scheduler.step()
    twin = copy.deepcopy(model)
    twins = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    twins.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    model.attach_optimizer(optimizer, scheduler)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    assert ids(optimizer.param_groups[1]["params"]) == ids(kernel)
    for _ in range(2):
        step(model, optimizer, x)
        step(twin, twins, x)
    assert same(model.parameters(), twin.parameters())


def test_a_group_of_kernels_made_by_hand_is_taken_over(shelf: KernelShelf, x: torch.Tensor) -> None:
    """It stands before the host's, and the scheduler has a function for each."""
    model = wrapped(shelf)
    hosts = list(model.parameters())
    kernel = grow(shelf, model)
    optimizer = torch.optim.AdamW([{"params": kernel, "lr": 1.0}, {"params": hosts}], lr=1e-2)
    scheduler = schedulers.LambdaLR(optimizer, [lambda step: 5.0, lambda step: 0.9**step])
    refused(model, optimizer, OptimizerError, "pass one of them", scheduler, lr=1.0, lr_factor=0.1)
    model.attach_optimizer(optimizer, scheduler, lr_factor=0.5)
    assert [ids(group["params"]) for group in optimizer.param_groups] == [ids(hosts), ids(kernel)]
    step(model, optimizer, x)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.9e-2, 0.45e-2])


def test_an_attachment_that_fails_leaves_all_as_it_was(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    hosts = list(model.parameters())
    kernel = grow(shelf, model)
    optimizer = Picky([{"params": kernel, "lr": 1.0}, {"params": hosts}], lr=1e-2)
    scheduler = schedulers.LambdaLR(optimizer, [lambda step: 5.0, lambda step: 0.9**step])
    optimizer.full = True
    refused(model, optimizer, RuntimeError, "no more groups", scheduler)
    step(model, optimizer, x)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([5.0, 0.9e-2])


def test_an_optimizer_for_kernels_alone(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf).requires_grad_(False)
    optimizer = torch.optim.AdamW([{"params": []}], lr=1e-2)
    model.attach_optimizer(optimizer)
    kernel = grow(shelf, model)
    before = values(kernel)
    step(model, optimizer, x)
    assert not same(before, kernel)


def test_two_optimizers_share_the_layers(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    first, second = (
        torch.optim.SGD(list(model.kasmina_layers[layer].parameters(recurse=False)), lr=1e-2) for layer in ("0", "2")
    )
    model.attach_optimizer(first)
    model.attach_optimizer(second)
    one, two = grow(shelf, model, "0"), grow(shelf, model, "2")
    assert ids(first.param_groups[1]["params"]) == ids(one)
    assert ids(second.param_groups[1]["params"]) == ids(two)


def test_a_compiled_model(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    run = torch.compile(model, backend="esper", options={"inner": "aot_eager"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer, warmup=2)
    step(run, optimizer, x)
    kernel = shelf.put(blueprint()).id
    assert model.request_kernel("0", 0, kernel, trainable=True).result()
    step(run, optimizer, x)
    learning = list(model.seed_parameters())
    before = values(learning)
    assert ids(optimizer.param_groups[1]["params"]) == ids(learning)
    step(run, optimizer, x)
    assert not same(before, learning)
    model.unload_kernel("0", 0)
    while model.runtime.plan.sites:
        step(run, optimizer, x)
    assert len(optimizer.param_groups) == 1


def test_a_commit_of_another_threads_in_the_middle_of_a_step_is_followed_at_its_end(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    model = wrapped(shelf, commit="manual")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    step(model, optimizer, x)
    assert model.request_kernel("0", 0, shelf.put(blueprint()).id, trainable=True).result()
    seen: list[int] = []

    def other(*_: Any) -> None:
        thread = threading.Thread(target=model.commit)
        thread.start()
        thread.join()
        seen.append(len(optimizer.param_groups))

    handle = optimizer.register_step_pre_hook(other)
    step(model, optimizer, x)
    handle.remove()
    assert seen == [1]
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]


def test_gradients_are_unscaled_by_a_grad_scaler(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf, plain_sgd)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert model.request_kernel("0", 0, shelf.put(blueprint()).id, trainable=True).result()
    loss = model(x).square().mean()
    kernel = list(model.seed_parameters())
    before, plain = values(kernel), torch.autograd.grad(loss, kernel, retain_graph=True)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert same(kernel, [value - 1e-2 * grad for value, grad in zip(before, plain, strict=True)])


# -- schedulers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [True, False], ids=["given", "found"])
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_goes_on_for_the_host_and_for_the_kernels(
    shelf: KernelShelf, x: torch.Tensor, make: Callable[[Any], Any], given: bool
) -> None:
    """The host's rates are those of a run without kernels, and the kernels' a half of them."""
    rates: list[list[float]] = []
    for grows in (False, True):
        model = wrapped(shelf)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        scheduler = make(optimizer)
        loss = (1.0,) if isinstance(scheduler, schedulers.ReduceLROnPlateau) else ()
        if grows:
            model.attach_optimizer(optimizer, scheduler if given else None, lr_factor=0.5)
        rates.append([])
        for number in range(9):
            if grows and number == 2:
                grow(shelf, model)
            if grows and number == 4:
                grow(shelf, model, "2")
            if grows and number == 6:
                model.unload_kernel("0", 0)
                model(x)
            step(model, optimizer, x)
            scheduler.step(*loss)
            first, *others = [group["lr"] for group in optimizer.param_groups]
            rates[-1].append(first)
            assert others == pytest.approx([first / 2] * len(others))
            assert len(others) == (0 if not grows or number < 2 else 2 if 4 <= number < 6 else 1)
            if not isinstance(scheduler, schedulers.ReduceLROnPlateau):
                assert scheduler.get_last_lr() == [first, *others]
    assert rates[0] == rates[1]


def test_a_scheduler_that_is_made_after_attaching(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf, plain_sgd)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
    step(model, optimizer, x)
    scheduler.step()
    grow(shelf, model)
    step(model, optimizer, x)
    scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.81e-2] * 2)


@pytest.mark.parametrize("lr", [1e-2, torch.tensor(1e-2, dtype=torch.float64)], ids=["float", "tensor"])
def test_new_parameters_alone_are_warmed_up(shelf: KernelShelf, x: torch.Tensor, lr: Any) -> None:
    """SGD on a gradient of ones: what a step changes is the rate of that step."""
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    scheduler = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    model.attach_optimizer(optimizer, scheduler, warmup=4, warmup_start=0.0, peak=2.0)
    kernel = grow(shelf, model, "2")[0]
    host, seen = optimizer.param_groups[0]["params"][0], []
    with torch.no_grad():
        for each in (kernel, host):
            each.zero_()
    for _ in range(6):
        before = float(kernel.detach().flatten()[0]), float(host.detach().flatten()[0])
        for each in (kernel, host):
            each.grad = torch.ones_like(each)
        optimizer.step()
        seen.append((before[0] - float(kernel.detach().flatten()[0]), before[1] - float(host.detach().flatten()[0])))
        scheduler.step()
    rates = [1e-2 / (1 + number) for number in range(6)]
    assert [of_host for _, of_host in seen] == pytest.approx(rates, rel=1e-3)
    factors = [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert [own for own, _ in seen] == pytest.approx([f * r for f, r in zip(factors, rates, strict=True)], rel=1e-3)
    assert [float(each) for each in scheduler.get_last_lr()] == pytest.approx([1e-2 / 7, 2e-2 / 7])


def test_a_step_that_raises_leaves_the_rate_as_it_was(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf, plain_sgd, warmup=4, warmup_start=0.0, peak=1.0)
    grow(shelf, model)

    def closure() -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    step(model, optimizer, x)
    assert optimizer.param_groups[1]["lr"] == 1e-2
    assert optimizer.param_groups[1]["esper_warmup"] == 1


# -- states that are saved and loaded ----------------------------------------------------------------------------------


def saved(**parts: Any) -> dict[str, Any]:
    """What a process finds that loads `parts` from a file."""
    loaded: dict[str, Any] = through_a_file({name: part.state_dict() for name, part in parts.items()})
    return loaded


RESUMED = {
    "SGD": plain_sgd,
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("order", ["mos", "oms", "som", "mso", "osm"])
@pytest.mark.parametrize("make", RESUMED.values(), ids=RESUMED)
def test_a_run_is_resumed_bit_for_bit_in_whatever_order_things_are_loaded(
    shelf: KernelShelf, x: torch.Tensor, make: Callable[[Any], Any], order: str
) -> None:
    """Kernels came one by one, in another order than their seeds', and one of them has gone."""

    def fresh() -> tuple[Any, Any, Any]:
        model = wrapped(shelf)
        optimizer = make(model.parameters())
        scheduler = schedulers.LambdaLR(optimizer, lambda step: 0.9**step)
        model.attach_optimizer(optimizer, scheduler, lr_factor=0.5, warmup=3, peak=2.0)
        return model, optimizer, scheduler

    def train(model: Any, optimizer: Any, scheduler: Any, steps: int) -> None:
        for _ in range(steps):
            step(model, optimizer, x)
            scheduler.step()

    run = model, optimizer, scheduler = fresh()
    train(*run, 1)
    grow(shelf, model, "2", 1)
    train(*run, 2)
    grow(shelf, model, "0", 2)
    train(*run, 1)
    grow(shelf, model, "0", 0)
    model.unload_kernel("0", 2)
    train(*run, 1)
    state = saved(m=model, o=optimizer, s=scheduler)
    again = fresh()
    parts = dict(zip("mos", again, strict=True))
    for name in order:
        parts[name].load_state_dict(state[name])
    train(*run, 4)
    train(*again, 4)
    assert same(model.parameters(), again[0].parameters())
    assert scheduler.get_last_lr() == again[2].get_last_lr()
    assert [group["esper_kernels"] for group in optimizer.param_groups[1:]] == [
        group["esper_kernels"] for group in again[1].param_groups[1:]
    ]


def test_a_scheduler_made_after_attaching_is_resumed_beside_kernels_of_two_commits(
    shelf: KernelShelf, x: torch.Tensor
) -> None:
    """As trainers do it: the model is loaded first, and all its kernels come at one commit, in one group."""

    def begin(model: Any) -> tuple[Any, Any]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        model.attach_optimizer(optimizer, lr_factor=0.5)
        return optimizer, schedulers.LambdaLR(optimizer, lambda step: 0.9**step)

    model = wrapped(shelf)
    run = optimizer, scheduler = begin(model)
    for seed in (0, 1):
        grow(shelf, model, seed=seed)
        step(model, optimizer, x)
        scheduler.step()
    state = saved(m=model, o=optimizer, s=scheduler)
    again = wrapped(shelf)
    again.load_state_dict(state["m"])
    resumed = begin(again)
    for part, name in zip(resumed, "os", strict=True):
        part.load_state_dict(state[name])
    for grown, (own, its) in ((model, run), (again, resumed)):
        step(grown, own, x)
        its.step()
    assert same(again.parameters(), model.parameters())
    assert sorted(resumed[1].get_last_lr()) == pytest.approx([0.05 * 0.9**3] * 2 + [0.1 * 0.9**3])


@pytest.mark.parametrize("order", ["mos", "oms", "mso"])
def test_a_schedule_of_functions_that_are_objects_is_resumed(shelf: KernelShelf, x: torch.Tensor, order: str) -> None:
    """As Hugging Face's are; a LambdaLR loads their attributes, by group."""

    def fresh() -> tuple[Any, Any, Any]:
        model = wrapped(shelf)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = schedulers.LambdaLR(optimizer, functools.partial(pow, 0.9))
        model.attach_optimizer(optimizer, scheduler)
        return model, optimizer, scheduler

    run = model, optimizer, scheduler = fresh()
    grow(shelf, model)
    step(model, optimizer, x)
    scheduler.step()
    state = saved(m=model, o=optimizer, s=scheduler)
    parts = dict(zip("mos", again := fresh(), strict=True))
    for name in order:
        parts[name].load_state_dict(state[name])
    for each in (run, again):
        step(each[0], each[1], x)
        each[2].step()
    assert same(model.parameters(), again[0].parameters())
    assert scheduler.get_last_lr() == again[2].get_last_lr() == pytest.approx([0.81e-2] * 2)


def test_a_state_is_saved_again_before_its_kernels_have_come(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    grow(shelf, model)
    step(model, optimizer, x)
    state = saved(m=model, o=optimizer)
    fresh, other = attached(shelf)
    other.load_state_dict(state["o"])
    other.state_dict()
    fresh.load_state_dict(state["m"])
    assert len(other.state_dict()["state"]) == 8
    step(model, optimizer, x)
    step(fresh, other, x)
    assert same(model.parameters(), fresh.parameters())


def test_going_back_to_a_checkpoint_of_before_a_kernel(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    step(model, optimizer, x)
    state = saved(m=model, o=optimizer)
    step(model, optimizer, x)
    expected = values(model.parameters())
    grow(shelf, model)
    step(model, optimizer, x)
    model.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    assert len(optimizer.param_groups) == 1
    step(model, optimizer, x)
    assert same(expected, model.parameters())


def test_a_state_that_does_not_belong_to_the_model_is_told_of(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    step(model, optimizer, x)
    before = saved(o=optimizer)["o"]
    grow(shelf, model, "0", 1)
    step(model, optimizer, x)
    after = saved(o=optimizer)["o"]
    optimizer.load_state_dict(before)
    with pytest.warns(UserWarning, match="nothing for seed 1 of layer '0'"):
        step(model, optimizer, x)
    model.unload_kernel("0", 1)
    model(x)
    optimizer.load_state_dict(after)
    with pytest.warns(UserWarning, match="seed 1 of layer '0', kernels that the model does not have"):
        step(model, optimizer, x)
    step(model, optimizer, x)


def test_a_state_that_does_not_fit_raises_as_ever_and_changes_nothing(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    kernel = grow(shelf, model)
    step(model, optimizer, x)
    state = saved(o=optimizer)["o"]
    state["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="size"):
        optimizer.load_state_dict(state)
    assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
    assert all(optimizer.state[each] for each in kernel)
    step(model, optimizer, x)


def test_copies_share_nothing_of_the_attachment(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    grow(shelf, model)
    step(model, optimizer, x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        other.unload_kernel("0", 0)
        other(x)
        assert [len(group["params"]) for group in optimizer.param_groups] == [4, 4]
        own = torch.optim.AdamW(other.parameters(), lr=1e-2)
        other.attach_optimizer(own)
    twin, twins = copy.deepcopy((model, optimizer))
    model.unload_kernel("0", 0)
    model(x)
    assert [len(group["params"]) for group in twins.param_groups] == [4, 4]
    twin.attach_optimizer(twins)
    assert [len(group["params"]) for group in twins.param_groups] == [4, 4]


# -- bad input ---------------------------------------------------------------------------------------------------------


def refused(model: Any, optimizer: Any, error: type[Exception], match: str, *args: Any, **options: Any) -> None:
    """Attaching raises, and leaves optimizer and model as they were."""
    before = [dict(group) for group in optimizer.param_groups] if isinstance(optimizer, torch.optim.Optimizer) else []
    with pytest.raises(error, match=match):
        model.attach_optimizer(optimizer, *args, **options)
    if before:
        assert [dict(group) for group in optimizer.param_groups] == before
        assert not optimizer._optimizer_step_pre_hooks


def test_what_cannot_be_attached(shelf: KernelShelf) -> None:
    model, other = wrapped(shelf), wrapped(shelf)
    parameters = list(model.parameters())
    sgd, foreign = torch.optim.SGD(parameters, lr=1e-2), torch.optim.SGD(other.parameters(), lr=1e-2)
    refused(model, "sgd", TypeError, "optimizer must be one of torch.optim, not a str")
    refused(model, [], TypeError, "not a list; attach each by itself")
    refused(model, foreign, OptimizerError, "holds none of the model's parameters")
    refused(model, torch.optim.LBFGS(parameters), OptimizerError, "LBFGS takes no parameters later")
    refused(model, sgd, TypeError, "scheduler must be one of torch.optim.lr_scheduler", object())
    refused(model, sgd, OptimizerError, "StepLR is one of another optimizer", schedulers.StepLR(foreign, 2))
    refused(model, sgd, TypeError, "no option 'weight_deacy'; there are", weight_deacy=0.1)
    refused(model, sgd, OptimizerError, "weight_decay must be a number", weight_decay=-0.1)
    refused(model, sgd, OptimizerError, "lr_factor must be a number", lr_factor="a tenth")
    refused(model, sgd, OptimizerError, "peak must be a number", peak=float("nan"))
    refused(model, sgd, OptimizerError, "warmup is a whole number", warmup=0.5)
    refused(model, sgd, OptimizerError, "pass one of them", lr=0.1, lr_factor=0.1)
    refused(model, torch.optim.SGD(parameters, lr=0.0), OptimizerError, "host's rate, which is 0", lr=0.1)
    model.attach_optimizer(sgd)
    with pytest.raises(OptimizerError, match="attached to the model already"):
        model.attach_optimizer(sgd)
    mixed = torch.optim.SGD([*parameters, *other.parameters()], lr=1e-2)
    other.attach_optimizer(mixed)
    with pytest.raises(OptimizerError, match="attached to another model"):
        model.attach_optimizer(mixed)
    with pytest.raises(OptimizerError, match="not attached to the model"):
        model.detach_optimizer(mixed)


def test_an_optimizer_that_divides_its_parameters_among_ranks(shelf: KernelShelf, tmp_path: Any) -> None:
    from torch import distributed
    from torch.distributed.optim import ZeroRedundancyOptimizer

    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = wrapped(shelf)
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-2)
        refused(model, optimizer, OptimizerError, "ZeroRedundancyOptimizer divides the parameters")
    finally:
        distributed.destroy_process_group()


def test_a_kernel_whose_optimizer_refuses_it_does_not_come_into_force(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = wrapped(shelf)
    optimizer = Picky(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    optimizer.full = True
    kernel = shelf.put(blueprint()).id
    expected = model(x)
    assert asyncio.run(model.load_kernel("0", 0, kernel, trainable=True))  # staged
    layer = model.kasmina_layers["0"]
    assert torch.equal(model(x), expected)
    assert (layer.state.lifecycle(0).name, layer.state.errors(0)) == ("ERROR_RECOVERY", 1)
    assert "no more groups" in layer.seed_errors[0]
    assert len(optimizer.param_groups) == 1
    optimizer.full = False
    load(model, "0", 0, kernel, trainable=True)
    assert len(optimizer.param_groups) == 2


class ByGroup(schedulers.LRScheduler):
    """A schedule of somebody's own: rates by group in a list that only it knows of, or made from what torch keeps."""

    def __init__(self, optimizer: torch.optim.Optimizer, adapts: bool) -> None:
        self.adapts, self.factors = adapts, [0.5] * len(optimizer.param_groups)
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        factors = [0.5] * len(self.base_lrs) if self.adapts else self.factors
        return [base * factor**self.last_epoch for base, factor in zip(self.base_lrs, factors, strict=True)]


@pytest.mark.parametrize("adapts", [True, False])
def test_a_scheduler_that_cannot_take_a_group_keeps_the_kernel_out(
    shelf: KernelShelf, x: torch.Tensor, adapts: bool
) -> None:
    model = wrapped(shelf)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scheduler = ByGroup(optimizer, adapts)
    model.attach_optimizer(optimizer, scheduler)
    groups, rates, held = len(optimizer.param_groups), list(scheduler.base_lrs), set(ids(held_by(optimizer)))
    assert asyncio.run(model.load_kernel("0", 0, shelf.put(blueprint()).id, trainable=True))  # staged
    step(model, optimizer, x)
    layer = model.kasmina_layers["0"]
    if adapts:
        assert (layer.state.lifecycle(0).name, len(optimizer.param_groups)) == ("ACTIVE", groups + 1)
    else:
        assert layer.state.lifecycle(0).name == "ERROR_RECOVERY"
        assert "the scheduler ByGroup cannot take the kernels' group: ValueError" in layer.seed_errors[0]
        assert (len(optimizer.param_groups), scheduler.base_lrs, set(ids(held_by(optimizer)))) == (groups, rates, held)
    scheduler.step()  # and training goes on
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.5e-2)


def held_by(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def test_muon_takes_no_vectors(shelf: KernelShelf, x: torch.Tensor) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6, bias=False)), platform=shelf.platform)
    optimizer = torch.optim.Muon(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    load(model, "0", 0, shelf.put(blueprint()).id, trainable=True)
    assert "Muon takes matrices alone" in model.kasmina_layers["0"].seed_errors[0]
    load(model, "0", 0, shelf.put(esper.Blueprint.low_rank(8, 6, rank=2)).id, trainable=True)
    step(model, optimizer, x)
    assert len(optimizer.param_groups) == 2


def test_a_detached_optimizer_keeps_its_groups_and_may_be_attached_again(shelf: KernelShelf, x: torch.Tensor) -> None:
    model, optimizer = attached(shelf)
    kernel = grow(shelf, model)
    step(model, optimizer, x)
    model.detach_optimizer(optimizer)
    state = dict(optimizer.state[kernel[0]])
    model.attach_optimizer(optimizer, lr_factor=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2, 1e-3])
    assert optimizer.state[kernel[0]] == state
    assert ids(optimizer.param_groups[1]["params"]) == ids(kernel)


def test_neither_model_nor_optimizer_is_kept_alive(shelf: KernelShelf) -> None:
    import gc
    import weakref

    model, optimizer = attached(shelf)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.attach_optimizer(optimizer)
    grow(shelf, model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    optimizer.step()
