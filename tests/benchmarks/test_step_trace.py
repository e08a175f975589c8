"""The arithmetic behind `benchmarks/hot_swap.py`: phases, medians, the worst step and the time lost."""

from __future__ import annotations

import json

import pytest

from benchmarks.step_trace import PHASES, StepTrace, lost_seconds


def trace(
    before: list[float], preparing: list[float], active: list[float], after: list[float], control: list[float]
) -> StepTrace:
    phases = (before, preparing, active, after)
    ends = [sum(len(phase) for phase in phases[: i + 1]) for i in range(4)]
    return StepTrace([*before, *preparing, *active, *after, *control], *ends)


CALM = [1.0] * 30


def test_lost_is_what_slow_steps_take_beyond_the_ordinary() -> None:
    assert lost_seconds([1.0, 1.5, 4.0], 1.0) == 3.5
    assert lost_seconds([0.1, 1.0], 1.0) == 0.0, "a fast step makes up for nothing"
    assert lost_seconds([], 1.0) == 0.0


def test_every_step_belongs_to_one_phase() -> None:
    example = trace([1.0, 2.0], [3.0], [4.0, 5.0], [6.0], [7.0])
    assert [list(example.phase(name)) for name in PHASES] == [[1.0, 2.0], [3.0], [4.0, 5.0], [6.0], [7.0]]


def test_a_stall_counts_wherever_it_is_after_the_request() -> None:
    assert trace(CALM, CALM, CALM, CALM, CALM).lost == 0.0
    for place in range(1, 4):
        phases = [CALM] * 5
        phases[place] = [*CALM, 9.0]
        example = trace(*phases)
        assert (example.worst, example.lost) == (9.0, 8.0)


def test_stalls_outside_of_the_swap_do_not_count() -> None:
    example = trace([*CALM, 9.0], CALM, CALM, CALM, [*CALM, 9.0])
    assert (example.worst, example.lost) == (1.0, 0.0)
    assert (example.control_worst, example.control_lost) == (9.0, 8.0)


def test_each_phase_has_a_median_of_its_own_and_slower_steps_are_told_apart_from_stalls() -> None:
    example = trace(CALM, [1.5] * 40, [2.0] * 30, CALM, CALM)
    assert [example.median(name) for name in PHASES] == [1.0, 1.5, 2.0, 1.0, 1.0]
    assert (example.lost, example.slowed) == (0.0, 20.0)


def test_steps_that_are_faster_while_the_kernel_is_prepared_give_no_credit() -> None:
    assert trace(CALM, [0.5] * 40, CALM, CALM, CALM).slowed == 0.0


def test_a_stall_that_is_the_whole_phase_is_lost() -> None:
    example = trace(CALM, [8.0], CALM, CALM, CALM)
    assert (example.median("preparing"), example.lost, example.slowed) == (1.0, 7.0, 0.0)


def test_a_swap_that_waits_for_nothing_has_no_preparation() -> None:
    example = trace(CALM, [], [8.0, *CALM], CALM, CALM)
    assert list(example.phase("preparing")) == []
    assert (example.request_to_active, example.lost, example.slowed) == (8.0, 7.0, 0.0)


def test_a_request_is_served_when_the_first_step_with_the_kernel_ends() -> None:
    assert trace(CALM, [1.0, 1.0], [3.0, *CALM], CALM, CALM).request_to_active == 5.0


def test_a_trace_survives_json_to_the_microsecond() -> None:
    example = trace([0.0012345], [0.002], [0.003], [0.004], [0.005])
    again = StepTrace.from_json(json.loads(json.dumps(example.to_json())))
    assert again.durations == pytest.approx([0.0012345, 0.002, 0.003, 0.004, 0.005], abs=1e-6)
    assert again.to_json() == example.to_json()


def test_the_control_can_be_left_out() -> None:
    short = trace(CALM, CALM, CALM, CALM, [5.0, 5.0]).without_control()
    assert (len(short.durations), list(short.phase("control"))) == (120, [])


@pytest.mark.parametrize("bounds", [(0, 1, 2, 3), (2, 1, 3, 4), (1, 2, 2, 3), (1, 2, 3, 9)])
def test_phases_that_do_not_follow_each_other_are_refused(bounds: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="phases begin at"):
        StepTrace([1.0] * 5, *bounds)
