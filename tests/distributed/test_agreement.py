"""The agreement among hundreds of simulated ranks, on a network that delays and loses, with ranks that end."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.distributed.simulation import Simulation, Weather

UNHURRIED = settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # to shrink hundreds of ranks takes minutes
    suppress_health_check=[HealthCheck.too_slow],
)


def wishes(ranks: int, changes: int, seeds: int = 3) -> list[dict[str, str]]:
    """All ranks ask for the same, some of it of the same seeds."""
    return [{f"layer:{i % seeds}#{i // seeds + 1}": f"load kernel {i}" for i in range(changes)} for _ in range(ranks)]


def assert_one_plan_per_forward(simulation: Simulation) -> None:
    """No two ranks that have begun a forward run different plans in it."""
    plans: dict[int, list[tuple[int, tuple[str, ...]]]] = defaultdict(list)
    for rank, forward, changes in simulation.flips():
        plans[forward].append((rank, changes))
    for forward, flips in plans.items():
        assert len({changes for _, changes in flips}) == 1, f"forward {forward}: {flips}"
        crashed = simulation.weather.crashes
        reached = {rank for rank, each in enumerate(simulation.ranks) if each.member.forward > forward} - set(crashed)
        assert reached <= {rank for rank, _ in flips}, f"forward {forward}: only {[rank for rank, _ in flips]}"


weathers = st.builds(
    Weather,
    delay=st.sampled_from([0.05, 1.0, 8.0]),
    loss=st.sampled_from([0.0, 0.1, 0.4]),
    step=st.sampled_from([1.0, 10.0]),
    lead=st.sampled_from([0, 3, 20]),
    late=st.sampled_from([0.1, 20.0]),
    pauses=st.dictionaries(st.integers(0, 9), st.tuples(st.floats(0, 10), st.floats(10, 40)), max_size=3),
)


@UNHURRIED
@given(ranks=st.sampled_from([1, 2, 3, 10, 300]), changes=st.integers(1, 6), weather=weathers, seed=st.integers(0, 999))
def test_every_change_is_decided_and_comes_into_force_at_one_forward(
    ranks: int, changes: int, weather: Weather, seed: int
) -> None:
    wanted = wishes(ranks, changes)
    simulation = Simulation(wanted, weather, seed)
    for _ in range(100):  # all can be reached: it may take long, and comes to an end
        simulation.run(until=simulation.now + 50.0)
        if all(len(each.outcome) == changes and not each.member.decided for each in simulation.ranks):
            break
    assert_one_plan_per_forward(simulation)
    for each in simulation.ranks:
        assert each.outcome == dict.fromkeys(wanted[0], True)
        assert sorted(change for flip in each.flips.values() for change in flip) == sorted(wanted[0])


@UNHURRIED
@given(
    ranks=st.sampled_from([2, 5, 100]),
    weather=weathers,
    seed=st.integers(0, 999),
    failing=st.sets(st.integers(0, 4), min_size=1, max_size=2),
    off=st.booleans(),
)
def test_what_one_rank_cannot_have_none_has(
    ranks: int, weather: Weather, seed: int, failing: set[int], off: bool
) -> None:
    wanted = wishes(ranks, 5)
    lost = {list(wanted[0])[index] for index in failing}
    who = {(seed % ranks, change) for change in lost}
    simulation = Simulation(wanted, weather, seed, **{"called_off" if off else "failures": who})
    for _ in range(100):
        simulation.run(until=simulation.now + 50.0)
        if all(len(each.outcome) == 5 and not each.member.decided for each in simulation.ranks):
            break
    assert_one_plan_per_forward(simulation)
    for each in simulation.ranks:
        assert each.outcome == {change: change not in lost for change in wanted[0]}


@UNHURRIED
@given(
    ranks=st.sampled_from([2, 3, 8, 100]),
    weather=weathers,
    seed=st.integers(0, 999),
    crashes=st.dictionaries(st.integers(0, 7), st.floats(0, 60), min_size=1, max_size=2),
)
def test_ranks_that_end_leave_the_others_with_one_plan_and_going_on(
    ranks: int, weather: Weather, seed: int, crashes: dict[int, float]
) -> None:
    weather = Weather(**{**weather.__dict__, "crashes": {rank % ranks: when for rank, when in crashes.items()}})
    simulation = Simulation(wishes(ranks, 4), weather, seed)
    simulation.run(until=120.0)
    before = [each.member.forward for each in simulation.ranks]
    simulation.run(until=160.0)
    assert_one_plan_per_forward(simulation)
    for rank, each in enumerate(simulation.ranks):
        assert rank in weather.crashes or each.member.forward > before[rank], f"rank {rank} does not go on"


def test_ranks_that_ask_for_different_things_are_told_what() -> None:
    simulation = Simulation([{"a:0#1": "load x"}, {"a:0#1": "load y"}, {"a:0#1": "load x"}], Weather(), 1)
    simulation.run(until=100.0)
    [refusal] = [text for key, text in simulation.store.items() if key.startswith("ballot/") and "different" in text]
    assert "rank 0 to load x, rank 1 to load y" in refusal
    assert all(each.outcome == {"a:0#1": False} for each in simulation.ranks)


def test_seeds_may_be_asked_for_in_another_order() -> None:
    first, second = {"a:0#1": "load x", "b:0#1": "load y"}, {"b:0#1": "load y", "a:0#1": "load x"}
    simulation = Simulation([first, second], Weather(late=0.1), 1)
    simulation.run(until=100.0)
    assert all(each.outcome == {"a:0#1": True, "b:0#1": True} for each in simulation.ranks)


def test_a_rank_that_never_asks_keeps_the_others_from_changing_and_from_nothing_else() -> None:
    both = {"a:0#1": "load x", "b:0#1": "load y"}
    simulation = Simulation([both, {"b:0#1": "load y"}], Weather(), 3)
    simulation.run(until=300.0)
    assert all(each.outcome == {"b:0#1": True} for each in simulation.ranks)
    assert any("vote/a:0#1/1" in key for key in simulation.coordinator.missing)


@pytest.mark.parametrize("ranks", [8, 512])
def test_the_cost_in_messages_grows_with_the_number_of_ranks_and_no_faster(ranks: int) -> None:
    """What docs/ranks.md says: of each rank two writes and two reads for a change, beside those of the first."""
    simulation = Simulation(wishes(ranks, 1), Weather(delay=0.01, lead=20), 5)
    simulation.run(until=60.0)
    assert all(each.outcome for each in simulation.ranks)
    sent = simulation.requests
    assert sent["Set"] == 2 * ranks + 1
    assert sent["Get"] == 3 * ranks  # the ballot, the verdict, and the ballot after that, which is still waited for
    assert sent["Decide"] == 1


def test_nobody_waits_for_the_verdict_where_ballots_are_quicker_than_forwards() -> None:
    simulation = Simulation(wishes(20, 6), Weather(delay=0.05, lead=3, late=20.0), 7)
    simulation.run(until=200.0)
    assert all(len(each.outcome) == 6 for each in simulation.ranks)
    assert max(each.longest_wait for each in simulation.ranks) == 0.0
