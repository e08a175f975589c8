"""`esper.Grower`: a model grows where it pays, keeps what pays, and trains on as if nothing had been looked at."""

from __future__ import annotations

import copy
import io
import os
import sys
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import esper
from esper.contracts.messages import GrowthReport, TopicNames
from tests.growth.growing import BATCHES, Run, X, Y, begin, decisions, fitted, loss_of, mean_loss
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.xdist_group("growth")


def test_a_model_grows_the_unit_that_it_lacks(shelf: KernelShelf) -> None:
    run = begin(shelf)
    before = mean_loss(run.model)
    run.until("kept")
    assert [each.event for each in run.grower.history] == ["chosen", "in force", "kept"]
    chosen, in_force, kept = run.grower.history
    # first, and a step for each further batch; lead, and the forward after it; ramp, trial, and a step for each batch
    assert (chosen.step, in_force.step, kept.step) == (5 + 1, 6 + 3 + 1, 10 + 5 + 20 + 1)
    assert (kept.layer, kept.seed, kept.width, kept.parameters) == ("0", 0, 2, 23)
    assert chosen.ratio is not None
    assert chosen.ratio > 1
    assert chosen.score == pytest.approx(chosen.gain / 23)  # type: ignore[operator]  # it has a gain
    assert kept.loss_with < kept.loss_without  # type: ignore[operator]  # it was judged
    assert mean_loss(run.model) < 0.7 * before
    assert run.grower.spent == 23
    assert run.model.kasmina_layers["0"].state.lifecycle(0).name == "FOSSILIZED"
    assert len(list(run.model.seed_parameters())) == 4


def test_a_judgement_is_an_exact_counterfactual(shelf: KernelShelf) -> None:
    run = begin(shelf, keep="active", judge_batches=BATCHES[1:])
    kept = run.until("kept")
    assert run.model.kasmina_layers["0"].state.alpha(0) == 1.0
    with_it = float(loss_of(run.model, BATCHES[1]).detach())
    run.model.set_alpha("0", 0, 0.0)
    without = float(loss_of(run.model, BATCHES[1]).detach())
    assert (kept.loss_with, kept.loss_without) == (pytest.approx(with_it), pytest.approx(without))
    assert run.model.unload_kernel("0", 0)  # it is no fossil


def test_what_lowers_the_loss_too_little_goes(shelf: KernelShelf) -> None:
    run = begin(shelf, margin=0.9999)
    record = run.until("unloaded")
    assert record.reason == "the loss is not lower enough with it"
    assert run.grower.spent == 0
    assert run.model.kasmina_layers["0"].state.lifecycle(0).name == "DORMANT"
    assert not list(run.model.seed_parameters())
    assert sum(len(group["params"]) for group in run.optimizer.param_groups) == 2


class Host(nn.Module):
    """With all that a look at it could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = fitted()
        self.norm, self.dropout = nn.BatchNorm1d(3), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y + 0.01 * self.dropout(self.norm(y))


@pytest.mark.parametrize("mode", ["module", "fx"])
def test_probing_leaves_training_as_it_was(mode: Any, shelf: KernelShelf) -> None:
    """A grower that finds nothing beside one that never looks: the same numbers to the last bit."""
    outcomes = []
    for grows in (False, True):
        torch.manual_seed(3)
        options: dict[str, Any] = {"chance": 1e9, "patience": 100, "first": 2, "cooldown": 1, "lead": 0}
        run = begin(shelf, Host(), mode=mode, **(options if grows else {**options, "first": 10**6}))
        run.model.dropout.eval()  # one whose mode is not that of the model
        for _ in range(8):
            run.step()
            assert run.model.training
            assert not run.model.dropout.training
        assert all(each.grad is not None for each in run.model.parameters())
        if grows:
            assert [each.event for each in run.grower.history] == ["nothing"] * len(run.grower.history) != []
        outcomes.append([each.clone() for each in (*run.model.state_dict().values(), torch.rand(2))])
        outcomes[-1] += [each.grad.clone() for each in run.model.parameters()]
    for plain, grown in zip(*outcomes, strict=True):
        assert torch.equal(plain, grown)


def test_judging_leaves_training_as_it_was(shelf: KernelShelf) -> None:
    """A growth that is judged beside one that is not yet: the same numbers to the last bit."""
    outcomes = []
    for trial in (10, 10**6):
        torch.manual_seed(3)
        run = begin(shelf, Host(), trial=trial, keep="active", cooldown=10**6)
        run.steps(30)
        assert [each.event for each in run.grower.history] == ["chosen", "in force", "kept"][: 3 if trial == 10 else 2]
        outcomes.append([each.clone() for each in (*run.model.state_dict().values(), torch.rand(2))])
        outcomes[-1] += [each.grad.clone() for each in run.model.parameters()]
    for judged, other in zip(*outcomes, strict=True):
        assert torch.equal(judged, other)


@pytest.mark.parametrize("lead", [0, 3, None])
def test_equal_seeds_give_equal_decisions(lead: int | None, shelf: KernelShelf) -> None:
    histories = []
    for _ in range(2):
        rate = 0.0 if lead is None else 0.02  # without a lead what is learnt meanwhile depends on the compiler
        run = begin(shelf, lead=lead, rate=rate)
        run.until("kept", "unloaded", most=100_000)
        histories.append(decisions(run.grower))
    first, second = histories
    if lead is None:
        assert [each.event for each in first] == [each.event for each in second]
        assert first[0] == second[0]
        assert first[-1].step - first[-2].step == second[-1].step - second[-2].step == 26  # counted from the commit
    else:
        assert first == second


def test_a_step_takes_one_batch(shelf: KernelShelf) -> None:
    """A probe of five batches goes through one at each step, a judgement of three through one twice at each."""
    calls: list[int] = []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(run.grower.steps)
        return loss_of(model, batch)

    model = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batches = [(X[at : at + 60], Y[at : at + 60]) for at in range(0, 300, 60)]
    grower = esper.Grower(
        model, optimizer, loss, budget=23, probe_batches=batches, judge_batches=batches[:3], first=5, ramp=5, trial=20,
        lead=3, widths=(2,),
    )  # fmt: skip
    run = Run(model, optimizer, grower)
    run.steps(7)
    assert "a probe has seen 3 batches since step 5" in str(grower)
    run.until("in force")
    assert [each.step for each in grower.history] == [9, 13]
    assert calls == [5, 6, 7, 8, 9]
    run.steps(25)
    assert "a kernel is judged at layer 0" in str(grower)
    run.until("kept")
    assert calls[5:] == [38, 38, 39, 39, 40, 40]


def test_a_probe_between_steps_is_as_good_as_one_at_once(shelf: KernelShelf) -> None:
    """Weights that stay, and batches at one step or at several: as much is found, of units drawn beside other rows."""
    whole = begin(shelf, rate=0.0, probe_batches=[(X, Y)], lead=0, proposals=1000)
    batches = list(zip(X.split(50), Y.split(50), strict=True))
    parts = begin(shelf, rate=0.0, probe_batches=batches, lead=0, proposals=1000)
    one, other = (each.until("chosen") for each in (whole, parts))
    assert (one.step, other.step) == (5, 10)
    assert other.gain == pytest.approx(one.gain, rel=0.1)


def saved(run: Run) -> Any:
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "grower": run.grower.state_dict(),
    }
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("at", [3, 5, 6, 8, 9, 12, 20, 35, 36, 41, 42, 50])
def test_a_run_goes_on_from_any_step(at: int, shelf: KernelShelf) -> None:
    """Before the probe and between its batches, while it is scored, staged, ramping, tried, judged; and once more."""
    whole = begin(shelf)
    whole.steps(at)
    state = saved(whole)
    whole.steps(90 - at)
    resumed = begin(shelf)
    resumed.model.load_state_dict(state["model"])
    resumed.optimizer.load_state_dict(state["optimizer"])
    resumed.grower.load_state_dict(state["grower"])
    assert resumed.grower.steps == at
    resumed.steps(90 - at)
    assert decisions(resumed.grower) == decisions(whole.grower)
    assert mean_loss(resumed.model) == mean_loss(whole.model)


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no niceness of their own")
def test_scores_leave_the_processors_to_training(shelf: KernelShelf) -> None:
    begin(shelf, chance=1e9).until("nothing")
    scoring = next(each for each in threading.enumerate() if each.name == "esper-growth")
    assert scoring.native_id is not None
    assert os.getpriority(os.PRIO_PROCESS, scoring.native_id) > os.getpriority(os.PRIO_PROCESS, os.getpid())
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) == os.getpriority(os.PRIO_PROCESS, os.getpid())


def test_what_was_saved_stays_as_it_was(shelf: KernelShelf) -> None:
    run = begin(shelf)
    run.steps(5)
    state = run.grower.state_dict()
    before = copy.deepcopy(state)
    run.until("kept")
    torch.testing.assert_close(state["stage"]["probe"]["seen"], before["stage"]["probe"]["seen"])
    run.grower.load_state_dict(state)
    run.until("kept")
    assert [each.step for each in run.grower.history] == [6, 10, 36]


def test_decisions_are_published(shelf: KernelShelf) -> None:
    run = begin(shelf)
    reports: list[Any] = []
    with shelf.platform.oona.subscribe(TopicNames.SYSTEM_EVENTS_EPOCH, reports.append):
        run.until("kept")
        shelf.platform.oona.flush()
    found = [GrowthReport.model_validate(each.payload) for each in reports]
    assert found[-3:] == [each.report() for each in run.grower.history]


def test_the_history_is_a_table_and_a_picture(shelf: KernelShelf, tmp_path: Any) -> None:
    run = begin(shelf)
    run.until("kept")
    text = str(run.grower)
    assert text.startswith("36 steps, 1 growths kept, 23 of 200 parameters added\n")
    assert [line.split()[1] for line in text.splitlines()[2:]] == ["chosen", "in", "kept"]
    picture = run.grower.plot(tmp_path / "growth.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_kernels_enter_the_optimizer_with_a_rate_of_their_own(shelf: KernelShelf) -> None:
    run = begin(shelf, lr_factor=0.5, warmup=4, peak=3.0)
    run.until("kept")
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.02, 0.03])
    assert run.model.has_optimizer(run.optimizer)


def test_schedulers_that_know_their_groups_go_on(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(fitted()), platform=shelf.platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 0.99**step])
    grower = esper.Grower(
        model, optimizer, loss_of, scheduler=scheduler, budget=23, probe_batches=BATCHES, first=2, ramp=2, trial=20,
        lead=0, widths=(2,),
    )  # fmt: skip
    run = Run(model, optimizer, grower)
    for _ in range(30):
        run.step()
        scheduler.step()
    assert grower.history[2].event == "kept"
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 * 0.99**30] * 2)


@pytest.mark.gpu
def test_losses_on_a_device_are_read_many_together(shelf: KernelShelf) -> None:
    host = nn.Sequential(fitted()).cuda()
    batches = [(x.cuda(), y.cuda()) for x, y in BATCHES]
    model = esper.wrap(host, platform=shelf.platform)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    grower = esper.Grower(
        model, optimizer, loss_of, budget=23, probe_batches=batches, first=5, ramp=5, trial=20, lead=3, widths=(2,)
    )
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_of(model, (X.cuda(), Y.cuda()))
        loss.backward()
        optimizer.step()
        grower.step(loss)
    assert [each.event for each in grower.history] == ["chosen", "in force", "kept", "stopped"]
    for _ in range(62):
        grower.step(loss.detach() * float("nan"))
    assert grower.history[-1].event == "stopped"
    with pytest.warns(UserWarning, match="the loss is nan"):
        grower.state_dict()


def test_a_frozen_model_grows(shelf: KernelShelf) -> None:
    model = esper.wrap(nn.Sequential(fitted().requires_grad_(False)), platform=shelf.platform)
    optimizer = torch.optim.SGD([{"params": []}], lr=0.05)
    grower = esper.Grower(
        model, optimizer, loss_of, budget=23, probe_batches=BATCHES, first=1, ramp=2, trial=20, lead=0, widths=(2,)
    )
    before = mean_loss(model)
    for _ in range(30):
        loss = loss_of(model, (X, Y))
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        grower.step(loss)
    assert grower.history[-1].event == "kept"
    assert mean_loss(model) < before
    assert grower.history[0].host_gain == 0


def test_a_copied_model_has_no_grower(shelf: KernelShelf) -> None:
    run = begin(shelf)
    twin = copy.deepcopy(run.model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    esper.Grower(twin, optimizer, loss_of, budget=5, probe_batches=BATCHES)
    assert (Y.shape[0], run.grower.steps) == (300, 0)


def test_a_state_that_is_loaded_while_the_next_growth_is_asked_for_keeps_its_kernel(shelf: KernelShelf) -> None:
    """The model's own state has called that off already, and brought back what was on trial at that seed."""
    run = begin(shelf, seeds=1, margin=1e9, patience=99, cooldown=1, lead=8)
    run.until("in force")
    run.steps(3)
    saved = copy.deepcopy([each.state_dict() for each in (run.model, run.optimizer, run.grower)])
    layer = run.model.kasmina_layers["0"]
    kernel = layer.kernel_in_force(0)
    assert kernel is not None
    run.until("unloaded")
    run.until("chosen")
    for part, state in zip((run.model, run.optimizer, run.grower), saved, strict=True):
        part.load_state_dict(state)
    run.model(X)
    assert layer.kernel_in_force(0) == kernel
    assert run.until("kept", "unloaded").event == "unloaded", "at the end of its trial"
