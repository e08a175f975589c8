"""What a grower refuses, and what it survives: training goes on as it was."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import esper
from esper.core.errors import TargetError
from esper.execution.kernels.param_groups import OptimizerError
from esper.growth import GrowthError
from tests.growth.growing import BATCHES, Run, X, Y, begin, decisions, fitted, loss_of, mean_loss
from tests.kernel_shelf import KernelShelf
from tests.models import mlp

pytestmark = pytest.mark.xdist_group("growth")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": 0}, "budget must be a whole number, at least 1, not 0"),
        ({"budget": 1.5}, "budget must be a whole number"),
        ({"first": -1}, "first must be a whole number, at least 0"),
        ({"ramp": 0}, "ramp must be a whole number, at least 1"),
        ({"lead": -1}, "lead must be a whole number, at least 0"),
        ({"until": "end"}, "until must be a whole number"),
        ({"until": 4}, "until is 4 and first is 5: nothing would grow"),
        ({"patience": True}, "patience must be a whole number"),
        ({"threshold": float("nan")}, "threshold must be a number, at least 0, not nan"),
        ({"compute_share": 1}, "compute_share must be a number between 0 and 1, such as 0.03, not 1"),
        ({"margin": -1.0}, "margin must be a number"),
        ({"timeout": 0}, "timeout must be more than 0 seconds"),
        ({"widths": ()}, "widths must be numbers of hidden units"),
        ({"widths": (0,)}, "each of widths must be a whole number, at least 1, not 0"),
        ({"family": "low_rank"}, "family must be 'bottleneck', 'gated_mlp', or a function"),
        ({"family": lambda layer, width: width}, "family must return a Blueprint for a layer and a width, not 2"),
        ({"family": lambda layer, width: esper.Blueprint.affine(6, 3)}, "returned one of affine for layer '0'"),
        ({"place": "worst"}, "place must be 'best' or 'random', not 'worst'"),
        ({"start": "zero"}, "start must be 'selected' or 'random'"),
        ({"keep": "no"}, "keep must be 'fossilized' or 'active'"),
        ({"step_flops": 0}, "step_flops must be more than 0"),
        ({"probe_batches": []}, "probe_batches is empty: pass at least one batch"),
        ({"probe_batches": iter(BATCHES)}, "probe_batches is an iterator, which is empty after the first probe"),
        ({"judge_batches": 3}, "judge_batches must be batches, such as a list"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], told: str, shelf: KernelShelf) -> None:
    with pytest.raises(GrowthError, match=told):
        begin(shelf, **options)


def test_what_it_is_not_for(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wanted: Any = {"budget": 9, "probe_batches": BATCHES}
    with pytest.raises(GrowthError, match=r"what esper\.wrap\(\) returned, not for a Sequential"):
        esper.Grower(nn.Sequential(fitted()), optimizer, loss_of, **wanted)  # type: ignore[arg-type]  # a mistake
    called = r"loss_fn is called as loss_fn\(model, batch\) and must return a scalar tensor; "
    with pytest.raises(GrowthError, match=called + "'mse' is no function"):
        esper.Grower(model, optimizer, "mse", **wanted)  # type: ignore[arg-type]  # as above
    with pytest.raises(GrowthError, match=called + r"this one takes \(x, y, z\): missing a required argument: 'z'"):
        esper.Grower(model, optimizer, lambda x, y, z: x, **wanted)  # type: ignore[arg-type, misc]  # as above
    with pytest.raises(
        GrowthError, match=called + r"nn\.MSELoss takes an output and a target: pass lambda model, batch"
    ):
        esper.Grower(model, optimizer, nn.MSELoss(), **wanted)
    with pytest.raises(TargetError, match="no layer with seeds is selected by 'fc'"):
        esper.Grower(model, optimizer, loss_of, layers="fc", **wanted)
    with pytest.raises(OptimizerError, match="holds none of the model's parameters"):
        esper.Grower(model, torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), loss_of, **wanted)
    other = torch.optim.lr_scheduler.ConstantLR(torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1))
    with pytest.raises(OptimizerError, match="the ConstantLR is one of another optimizer"):
        esper.Grower(model, optimizer, loss_of, scheduler=other, **wanted)
    with pytest.raises(TypeError, match="scheduler"):
        esper.Grower(model, optimizer, loss_of, scheduler="cosine", **wanted)
    assert not model.has_optimizer(optimizer)
    esper.Grower(model, optimizer, loss_of, **wanted)  # nothing was left of those


class FixedRates(LRScheduler):
    """A scheduler of somebody's own, with a list by group under a name of its own."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.own = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [rate * 0.9 for rate, _ in zip(self.own, self.optimizer.param_groups, strict=True)]


class OwnRates(FixedRates):
    """One that goes by the groups."""

    def get_lr(self) -> list[float | Tensor]:
        return [group["lr"] * 0.9 for group in self.optimizer.param_groups]


def test_a_scheduler_that_cannot_take_another_group(shelf: KernelShelf) -> None:
    for named in (True, False):
        model = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scheduler = FixedRates(optimizer)
        wanted: Any = {"budget": 9, "probe_batches": BATCHES, "scheduler": scheduler if named else None}
        before = optimizer.param_groups[0]["lr"]
        with pytest.raises(
            OptimizerError, match="the scheduler FixedRates cannot take the kernels' group: ValueError: zip"
        ):
            esper.Grower(model, optimizer, loss_of, **wanted)
        assert not model.has_optimizer(optimizer)
        assert optimizer.param_groups[0]["lr"] == before
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    esper.Grower(model, optimizer, loss_of, **{**wanted, "scheduler": OwnRates(optimizer)})


def test_one_grower_a_model(shelf: KernelShelf) -> None:
    run = begin(shelf)
    wanted: Any = {"budget": 9, "probe_batches": BATCHES}
    with pytest.raises(GrowthError, match=r"another grower grows this model: close\(\) that one first"):
        esper.Grower(run.model, run.optimizer, loss_of, **wanted)
    run.grower.close()
    assert run.grower.stopped == "closed"
    with pytest.raises(GrowthError, match="the optimizer is attached to the model already"):
        esper.Grower(run.model, run.optimizer, loss_of, warmup=5, **wanted)
    esper.Grower(run.model, run.optimizer, loss_of, **wanted)
    run.steps(20)
    assert [each.event for each in run.grower.history] == ["stopped"]


def test_layers_that_share_parameters_are_left_out(shelf: KernelShelf) -> None:
    host = mlp(6, 6, 6, 3)
    host[2].weight = host[0].weight
    run = begin(shelf, host)
    assert [(each.event, each.layer) for each in run.grower.history] == [("left out", "0"), ("left out", "2")]
    assert run.grower.history[0].reason == "layer '0' shares parameters with '2'"
    run.until("chosen", "nothing")
    assert run.grower.history[-1].layer == "4"
    model = esper.wrap(host, ["0", "2"], platform=shelf.platform)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(GrowthError, match="no layer can grow: layer '0' shares parameters with '2'"):
        esper.Grower(model, optimizer, loss_of, budget=9, probe_batches=BATCHES)


class Idle(nn.Module):
    """With a layer that the loss does not reach, and one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.aside, self.idle = fitted(), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        y: Tensor = self.layer(x)
        return y


def test_layers_that_nothing_reaches_are_left_out(shelf: KernelShelf) -> None:
    run = begin(shelf, Idle())
    run.until("kept")
    left = [(each.layer, each.reason) for each in run.grower.history if each.event == "left out"]
    assert left == [(name, "the probe's batches do not reach it") for name in ("aside", "idle")]
    unreached = begin(shelf, Idle(), layers=["idle"], patience=2)
    with pytest.warns(UserWarning, match="no gradient has reached any of 'idle'"):
        unreached.until("stopped")


# -- what fails while training goes on ---------------------------------------------------------------------------------


class Failing(list[Any]):
    """Batches after which there are to be more."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()
        raise OSError("the disk is gone")


class Empty:
    """What has batches at other times."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _nan(model: Any, batch: Any) -> Tensor:
    return loss_of(model, batch) * float("nan")


def _vector(model: Any, batch: Any) -> Tensor:
    y: Tensor = model(batch[0])
    return y


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"probe_batches": Failing(BATCHES[:1])}, "OSError: the disk is gone"),
        ({"probe_batches": Failing(BATCHES)}, "OSError: the disk is gone"),
        ({"probe_batches": Empty()}, "probe_batches gave no batch: pass some"),
        ({"loss_fn": _nan}, "infinite or NaN"),
        ({"loss_fn": _vector}, r"\(model, batch\) and must return a scalar tensor, not a tensor of shape \[150, 3\]"),
        ({"loss_fn": nn.functional.mse_loss}, r"loss_fn\(model, batch\) and must return a scalar tensor, and raised "),
    ],
    ids=["first batch", "later batch", "no batch", "nan", "vector", "torch's"],
)
def test_what_fails_in_a_probe_is_told_once(options: dict[str, Any], told: str, shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    loss_fn = options.pop("loss_fn", loss_of)
    every: Any = {"probe_batches": BATCHES, "first": 3, "cooldown": 4, "lead": 1, "widths": (2,), **options}
    run = Run(model, optimizer, esper.Grower(model, optimizer, loss_fn, budget=99, **every))
    plain = begin(shelf, first=10**6)
    with pytest.warns(UserWarning, match=told) as warned:
        run.steps(30)
    plain.steps(30)
    failed = [each for each in run.grower.history if each.event == "failed"]
    assert len(failed) == 3
    assert run.grower.stopped == "nothing was worth keeping 3 times in a row"
    assert len([each for each in warned if "a grower could not do its part" in str(each.message)]) == 1
    assert warned[0].filename.endswith("growing.py"), "where step is called"
    assert mean_loss(model) == mean_loss(plain.model)


@pytest.mark.parametrize("at", [1, 2])
def test_a_judgement_that_fails_takes_the_kernel_back(at: int, shelf: KernelShelf) -> None:
    run = begin(shelf, judge_batches=Failing(BATCHES[:at]))
    with pytest.warns(UserWarning, match="the disk is gone"):
        record = run.until("failed")
    assert (record.layer, record.seed, record.width) == ("0", 0, 2)
    assert run.grower.spent == 0
    assert run.model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"
    assert run.model.training


def test_a_kernel_that_cannot_be_loaded(shelf: KernelShelf) -> None:
    """Its optimizer refuses parameters: the seed says why, and so does the history."""
    run = begin(shelf)

    def refuse(group: dict[str, Any]) -> None:
        raise ValueError("no more groups")

    run.optimizer.add_param_group = refuse  # type: ignore[method-assign]  # an optimizer of somebody's own
    with pytest.warns(UserWarning, match="has not got its kernel: .*no more groups"):
        run.until("failed")
    assert run.grower.spent == 0
    run.steps(10)


def test_a_compilation_that_fails(shelf: KernelShelf) -> None:
    def unknown(layer: Any, width: int) -> esper.Blueprint:
        return esper.Blueprint.bottleneck(6, 3, rank=width, dtype="float64")  # the layer's is another

    run = begin(shelf, family=unknown)
    with pytest.warns(UserWarning, match="float64"):
        run.until("failed")
    assert run.grower.spent == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_before_a_growth(value: float, shelf: KernelShelf) -> None:
    run = begin(shelf)
    with pytest.warns(UserWarning, match=f"the loss is {value}: nothing grows meanwhile"):
        run.grower.step(value)
    for _ in range(12):
        run.grower.step(value)
    assert [each.event for each in run.grower.history] == ["failed"]
    run.until("kept")  # once it is finite again


def test_a_loss_that_becomes_nan_takes_the_kernel_back(shelf: KernelShelf) -> None:
    run = begin(shelf)
    run.until("in force")
    with pytest.warns(UserWarning, match="the loss is nan"):
        run.grower.step(torch.tensor(float("nan")))
    assert [each.event for each in run.grower.history[-2:]] == ["failed", "unloaded"]
    assert run.grower.history[-1].reason == "the loss became nan"
    assert run.model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"


@pytest.mark.parametrize("at", [5, 6, 8])
def test_a_loss_that_is_nan_during_a_probe_and_after_it_lets_nothing_grow(at: int, shelf: KernelShelf) -> None:
    """Between the batches, while candidates are scored, and with the step at which there would be a choice."""
    run = begin(shelf)
    run.steps(at)
    with pytest.warns(UserWarning, match="the loss is nan"):
        run.grower.step(float("nan"))
    run.grower.step(float("nan"))
    run.grower.step(float("nan"))
    run.grower.step(float("nan"))
    assert [each.event for each in run.grower.history] == ["failed"]
    run.until("kept")
    steps = [each.step for each in run.grower.history]
    assert steps == sorted(steps)
    assert run.grower.spent == 23


def test_the_history_is_in_the_order_of_steps(shelf: KernelShelf) -> None:
    """A loss that was NaN once, after the probe and before what came of it is known."""
    run = begin(shelf)
    run.steps(6)
    with pytest.warns(UserWarning, match="the loss is nan"):
        run.grower.step(float("nan"))
    run.until("kept")
    assert [each.event for each in run.grower.history] == ["failed", "chosen", "in force", "kept"]
    assert [each.step for each in run.grower.history] == [7, 7, 10, 36]


def test_a_kernel_that_is_coming_when_the_loss_becomes_nan_is_taken_back(shelf: KernelShelf) -> None:
    run = begin(shelf)
    run.until("chosen")
    with pytest.warns(UserWarning, match="the loss is nan"):
        run.grower.step(float("nan"))
    assert [each.event for each in run.grower.history] == ["chosen", "failed", "failed"]
    assert run.grower.history[-1].reason == "the loss is nan before it is in force"
    assert run.grower.history[-1].layer == "0"
    run.steps(3)
    assert run.grower.spent == 0
    assert run.model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"
    run.until("kept")


def test_a_probe_whose_batches_are_not_there_any_more_fails(shelf: KernelShelf) -> None:
    """A run is resumed in the middle of a probe, with fewer batches than that has seen."""
    run = begin(shelf, probe_batches=[*BATCHES, *BATCHES])
    run.steps(7)
    resumed = begin(shelf)
    resumed.grower.load_state_dict(run.grower.state_dict())
    with pytest.warns(UserWarning, match="probe_batches gave no batch after 3, of which there were more before"):
        resumed.step()
    assert [each.event for each in resumed.grower.history] == ["failed"]
    assert resumed.model.training


class Slow:
    """A platform that compiles when it is let."""

    def __init__(self, platform: Any) -> None:
        self.platform, self.requests = platform, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.platform, name)

    def request(self, blueprint: esper.Blueprint, timeout: float) -> Future[Any]:
        future: Future[Any] = Future()
        self.requests.append((blueprint, timeout, future))
        return future

    def compile_now(self) -> None:
        for blueprint, timeout, future in self.requests:
            future.set_result(self.platform.request(blueprint, timeout=timeout).result())
        self.requests.clear()


def test_a_step_that_waits_says_so(shelf: KernelShelf, caplog: pytest.LogCaptureFixture) -> None:
    platform, shown = Slow(shelf.platform), []
    model = esper.wrap(nn.Sequential(fitted()), platform=platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    grower = esper.Grower(
        model, optimizer, loss_of, budget=200, probe_batches=BATCHES, first=5, cooldown=1, ramp=1, trial=1, lead=3,
        widths=(2,),
    )  # fmt: skip

    class Reader(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno == logging.WARNING:
                shown.append((record.getMessage(), str(grower)))
                platform.compile_now()

    logger = logging.getLogger("esper.growth")
    reader = Reader()
    logger.addHandler(reader)
    try:
        in_force = Run(model, optimizer, grower).until("in force")
    finally:
        logger.removeHandler(reader)
    ((told, table),) = shown
    assert told.startswith("step 9 waits for what grows by the probe until step 6, as lead=3 says")
    assert "; what was probed until step 6 is not in force yet; step waits, and has waited 1." in table
    assert in_force.seconds > 1, "the wait is in the record"
    assert "; step has waited 1." in str(grower)


@pytest.mark.parametrize("loss", ["high", None, True, torch.ones(2)])
def test_what_is_no_loss_is_refused(loss: Any, shelf: KernelShelf) -> None:
    run = begin(shelf)
    with pytest.raises(GrowthError, match="a loss is"):
        run.grower.step(loss)
    assert run.grower.steps == 0


def _unload(run: Run) -> None:
    run.model.unload_kernel("0", 0)


def _fossilize(run: Run) -> None:
    run.model.fossilize("0", 0)


def _schedule(run: Run) -> None:
    run.model.set_alpha("0", 0, lambda step: 0.5)


@pytest.mark.parametrize(
    ("by_hand", "told", "spent"),
    [
        (_unload, "others have unloaded or replaced it before it was judged", 0),
        (_fossilize, "others have fossilized it before it was judged", 23),
        (_schedule, "its alpha is on a schedule of others", 23),
    ],
)
def test_a_kernel_that_others_take_over(
    by_hand: Callable[[Run], None], told: str, spent: int, shelf: KernelShelf
) -> None:
    run = begin(shelf)
    run.until("in force")
    run.steps(10)
    by_hand(run)
    record = run.until("removed")
    assert record.reason == told
    assert run.grower.spent == spent
    run.until("chosen", "nothing")


def test_a_state_that_is_none(shelf: KernelShelf) -> None:
    run = begin(shelf)
    run.until("kept")
    before = decisions(run.grower)
    good = run.grower.state_dict()
    probing = {"kind": "probing", "since": 5, "probe": {"layers": ["9"], "seed": 0, "taken": 1, "seen": {}}}
    stages = [{**good, "stage": stage} for stage in ({"kind": "sleeping"}, probing)]
    for bad in (None, {}, {**good, "version": 7}, *stages, {**good, "history": [{}]}):
        with pytest.raises(GrowthError, match=r"not what Grower\.state_dict\(\)|damaged|none of"):
            run.grower.load_state_dict(bad)  # type: ignore[arg-type]  # a mistake
    assert decisions(run.grower) == before
    assert dataclasses.asdict(before[0])["step"] == 6
    assert len(X) == len(Y)
