"""When, where and how large a grower grows: each of its constants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import esper
from tests.growth.growing import BATCHES, Run, begin, fitted, loss_of
from tests.kernel_shelf import KernelShelf

pytestmark = pytest.mark.xdist_group("growth")


class Pair(nn.Module):
    """Two layers of which the first lacks a unit, and the second has nothing to do."""

    def __init__(self) -> None:
        super().__init__()
        self.useful, self.idle = fitted(), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.useful(x) + 1e-3 * self.idle(x.sign())
        return y


def best(shelf: KernelShelf, host: nn.Module | None = None, **options: Any) -> Any:
    """The best candidate of the first probe, which is not compiled."""
    record = choice(shelf, host, threshold=1e9, **options)
    assert record.event == "nothing"
    return record


def choice(shelf: KernelShelf, host: nn.Module | None = None, **options: Any) -> Any:
    """What the first probe comes to; nothing is waited for."""
    run = begin(shelf, host, **{"lead": None, "chance": 0.0, **options})
    record = run.until("chosen", "nothing", most=20_000)
    run.grower.close()
    return record


def test_cooldown_patience_and_until(shelf: KernelShelf) -> None:
    run = begin(shelf, cooldown=7, until=60)
    run.until("stopped")
    kept = [each.step for each in run.grower.history if each.event == "kept"]
    chosen = [each.step for each in run.grower.history if each.event == "chosen"]
    assert chosen == [5 + 1, *[each + 7 + 1 for each in kept if each + 7 <= 60]]
    assert run.grower.stopped == "step 60 is over"
    assert run.grower.history[-1].step == max(61, kept[-1] + 1)
    bored = begin(shelf, chance=1e9, patience=2, lead=0)
    bored.until("stopped")
    assert [each.event for each in bored.grower.history] == ["nothing", "nothing", "stopped"]
    assert [each.step for each in bored.grower.history] == [6, 12, 12]
    assert bored.grower.stopped == "nothing was worth keeping 2 times in a row"


def test_the_budget_is_kept(shelf: KernelShelf) -> None:
    run = begin(shelf, budget=23 + 22)
    run.until("stopped")
    assert run.grower.spent == 23
    assert run.grower.stopped == (
        "no seed is free where 22 parameters, which are left, would do: layer '0' needs 23 parameters at least"
    )


def test_a_layer_grows_as_often_as_it_has_seeds(shelf: KernelShelf) -> None:
    run = begin(shelf, seeds=1)
    run.until("stopped")
    assert run.grower.stopped == (
        "no seed is free where 177 parameters, which are left, would do: all 1 of layer '0' are in use "
        "(seeds_per_layer of esper.wrap)"
    )


def test_the_threshold_is_on_the_gain_relative_to_the_layers_own(shelf: KernelShelf) -> None:
    record = choice(shelf)
    assert choice(shelf, threshold=0.9 * record.ratio).event == "chosen"
    assert choice(shelf, threshold=1.1 * record.ratio).event == "nothing"


def test_chance_is_taken_off(shelf: KernelShelf) -> None:
    plain, less, least = (choice(shelf, chance=each) for each in (0.0, 1.0, 100.0))
    assert plain.gain > less.gain > 0 > least.gain
    assert least.event == "nothing"
    assert choice(shelf, chance=1.0, rows=20).event == "nothing", "a smaller sample proves less"


def test_noise_is_not_worth_a_kernel(shelf: KernelShelf) -> None:
    """A layer has learnt what can be learnt: what is left is noise, of which random units explain a part by chance."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(300, 6, generator=generator)
    layer = fitted()
    with torch.no_grad():
        y = layer(x) + torch.randn(300, 3, generator=generator)
    record = choice(shelf, nn.Sequential(layer), chance=1.0, threshold=0.0, probe_batches=[(x, y)], first=1, rate=0.0)
    assert record.event == "nothing"
    fooled = choice(shelf, nn.Sequential(layer), threshold=0.0, probe_batches=[(x, y)], first=1, rate=0.0)
    assert fooled.event == "chosen"


def test_wider_candidates_as_long_as_their_units_pay(shelf: KernelShelf) -> None:
    assert best(shelf, widths=(1, 2), marginal=1e9).width == 1
    assert best(shelf, widths=(2, 1, 1), marginal=0.0).width == 2
    assert best(shelf, widths=(1, 2), marginal=0.0, budget=13).width == 1, "which the budget allows"


def test_more_proposals_find_better_units(shelf: KernelShelf) -> None:
    few, many = (best(shelf, proposals=each).gain for each in (2, 2000))
    assert many > 1.1 * few


def test_families(shelf: KernelShelf) -> None:
    assert best(shelf, family="gated_mlp").parameters == 2 * 2 * 6 + 2 * 3

    def plain(layer: esper.KasminaLayer, width: int) -> esper.Blueprint:
        return esper.Blueprint.bottleneck(layer.input_dim, layer.output_dim, rank=width, bias=False)

    assert best(shelf, family=plain).parameters == 2 * 6 + 2 * 3


def test_a_family_may_go_by_the_width(shelf: KernelShelf) -> None:
    """The widest candidate is chosen among other units than the one that grows."""

    def family(layer: esper.KasminaLayer, width: int) -> esper.Blueprint:
        activation = "relu" if width == 1 else "tanh"
        return esper.Blueprint.bottleneck(layer.input_dim, layer.output_dim, rank=width, activation=activation)

    run = begin(shelf, family=family, widths=(1, 2), marginal=1e9, lead=None, chance=0.0)
    record = run.until("chosen", most=20_000)
    assert record.width == 1
    assert "relu" in str(run.grower.state_dict()["stage"]["choice"]["blueprint"])
    run.grower.close()


def test_where(shelf: KernelShelf) -> None:
    assert choice(shelf, Pair()).layer == "useful"
    assert choice(shelf, Pair(), layers=["idle"], threshold=0.0).layer == "idle"


def test_a_random_place_is_a_control(shelf: KernelShelf) -> None:
    found = choice(shelf, Pair())
    elsewhere = [choice(shelf, Pair(), place="random", seed=seed) for seed in range(6)]
    assert {each.layer for each in elsewhere} == {"useful", "idle"}
    assert {(each.event, each.step, each.width) for each in elsewhere} <= {("chosen", found.step, found.width)}


def kernel(shelf: KernelShelf, **options: Any) -> Any:
    """The first kernel in force, and whether its first linear map is one of those that a selection would have."""
    run = begin(shelf, **options)
    run.until("in force")
    return run.model.kasmina_layers["0"].kernel_in_force(0)


def test_a_random_start_is_a_control_and_seeds_draw_others(shelf: KernelShelf) -> None:
    kernels = [kernel(shelf, **each) for each in ({}, {}, {"seed": 1}, {"start": "random"}, {"start": "random"})]
    assert kernels[0] == kernels[1]
    assert kernels[3] == kernels[4]
    assert len(set(kernels)) == 3


def test_compute_is_counted(shelf: KernelShelf) -> None:
    run = begin(shelf, step_flops=1e6, keep="active")
    kept = run.until("kept")
    share = kept.compute_share
    assert share is not None
    extra = share * kept.step * 1e6 / (1 - share)
    probe_and_judgement = 2 * 300 * 6 * 3 * 5  # forward, two backward products less that of the input, and two forwards
    assert extra > probe_and_judgement
    assert kept.seconds > 0
    unsaid = begin(shelf, keep="active").until("kept")
    assert unsaid.compute_share is not None
    assert unsaid.compute_share > share, "a step of this model takes less than a million"


def test_compute_is_bounded(shelf: KernelShelf) -> None:
    """After the first round, which tells what one takes, no probe begins that would cost too much."""
    options: dict[str, Any] = {"chance": 1e9, "patience": 1000, "lead": 0, "cooldown": 1, "step_flops": 2e6}
    free = begin(shelf, **options)
    free.steps(300)
    most, whole = (each.compute_share for each in (free.grower.history[-1], free.grower.history[0]))
    assert most is not None
    assert whole is not None
    bounded = begin(shelf, compute_share=most / 4, **options)
    bounded.steps(300)
    first, *others = (each.compute_share or 1.0 for each in bounded.grower.history)
    assert first == whole, "of five steps"
    assert 10 < len(others) < len(free.grower.history) / 3
    assert max(others) <= most / 4 < 1.2 * others[-1]


def test_a_compilation_is_given_up(shelf: KernelShelf) -> None:
    run = begin(shelf, widths=(5,), timeout=1e-4)
    with pytest.warns(UserWarning, match="CompilationTimeoutError|CancelledError|TimeoutError"):
        run.until("failed")
    assert run.grower.spent == 0


def test_a_loader_of_batches_does_not_disturb_random_numbers(shelf: KernelShelf) -> None:
    data = torch.utils.data.TensorDataset(*(torch.cat(each) for each in zip(*BATCHES, strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=100)  # which draws a seed each time
    run = begin(shelf, probe_batches=loader, chance=1e9, lead=0, cooldown=0, patience=99)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    run.steps(20)
    assert len(run.grower.history) > 2
    assert torch.equal(torch.rand(1), expected)
    assert isinstance(run, Run)
    assert loss_of(run.model, BATCHES[0]).ndim == 0
