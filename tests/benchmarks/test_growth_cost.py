"""What the benchmark of a grower's costs says of its steps, and what it counts."""

from __future__ import annotations

from torch.utils.flop_counter import FlopCounterMode

from benchmarks import growth_cost as cost
from benchmarks.growth_characters import Text, linear_layers, step_flops
from esper.growth import GrowthRecord

CHOSEN = GrowthRecord(20, "chosen", compute_share=0.5)
IN_FORCE = GrowthRecord(30, "in force", compute_share=0.4)
KEPT = GrowthRecord(50, "kept", loss_with=1.0, loss_without=2.0, compute_share=0.3)


def test_flops_of_the_network_are_those_of_its_products() -> None:
    text = Text.load()
    network = cost.network(text.characters, 0)
    with FlopCounterMode(display=False) as counter:
        cost._loss(network, next(text.batches(0))).backward()
    assert counter.get_total_flops() == step_flops(linear_layers(network))


def test_each_step_is_of_the_phase_that_the_records_say() -> None:
    found = cost.phases([CHOSEN, IN_FORCE, KEPT], 100)
    changes = [step for step in range(2, 101) if found[step - 1] != found[step - 2]]
    assert [found[0], *(found[step - 1] for step in changes)] == [
        "waiting", "probing", "scoring and staging", "coming into force", "on trial", "judging", "after a judgement",
        "waiting",
    ]  # fmt: skip
    assert changes == [20 - cost.PROBED + 1, 21, 30, 31, 50 - cost.JUDGED + 1, 51, 51 + cost.SETTLING]
    assert cost.phases([CHOSEN], 25)[20:] == ["scoring and staging"] * 5
    assert cost.phases([GrowthRecord(20, "nothing")], 25)[20:] == ["waiting"] * 5


def test_the_share_is_that_of_the_whole_run() -> None:
    run = cost.Run([1.0] * 100, [2.0] * 99 + [7.0], [CHOSEN, IN_FORCE, KEPT], flops=10.0, moments=2.0, forward=1.0)
    assert run.extra == max(0.5 / 0.5 * 20 * 10.0, 0.4 / 0.6 * 30 * 10.0, 0.3 / 0.7 * 50 * 10.0)
    assert run.share == run.extra / (run.extra + 1000.0)
    assert sum(run.parts().values()) == run.share
    assert (run.worst, run.worst_worked) == (1.0, 3.5)
    assert run.worked_by_phase()["waiting"] == (3.5, 1.0)
