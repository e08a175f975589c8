"""Changes that real processes agree on, over torch's own store."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from esper.distributed.meeting import meet
from tests.distributed.ranks import Launched, launch

pytestmark = pytest.mark.slow

SCENARIOS = [
    "swaps_with_random_delays",
    "schedules_in_step",
    "a_request_of_a_stopped_program",
    "evaluation_on_one_rank",
    "one_rank_cannot_stage",
    "different_kernels",
    "another_order",
    "a_late_rank",
    "what_one_rank_leads_to",
    "many_layers_in_one_call",
    "many_layers_of_which_one_rank_lacks_one",
    "different_kernels_for_one_of_many_layers",
    "many_layers_that_one_rank_leads_to",
    "replaced_and_called_off",
    "commits_by_hand",
    "a_checkpoint_brings_all_to_one_plan",
    "a_paused_rank",
    "models_of_other_sites",
    "a_store_that_is_down_on_one_rank",
]


PROGRAMS = "tests.distributed.agreed_programs"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launch(PROGRAMS, SCENARIOS, 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    scenarios = [
        "swaps_with_random_delays",
        "one_rank_cannot_stage",
        "what_one_rank_leads_to",
        "many_layers_in_one_call",
        "many_layers_of_which_one_rank_lacks_one",
    ]
    return launch(PROGRAMS, scenarios, 4, tmp_path_factory.mktemp("four"))


def same(results: list[Any]) -> Any:
    """What all ranks returned."""
    assert all(each == results[0] for each in results), results
    return results[0]


def test_swaps_come_at_one_forward_however_late_ranks_ask(ranks: Launched, four: Launched) -> None:
    for launched in (ranks, four):
        result = same(launched.of("swaps_with_random_delays"))
        assert len(result["flips"]) == 8
        assert result["states"]["0"][0] == "DORMANT"


def test_alphas_move_in_step(ranks: Launched) -> None:
    alphas = same(ranks.of("schedules_in_step"))
    assert alphas["400"] == 0.5
    assert len(set(alphas.values())) > 20


def test_who_waits_has_the_kernel_with_the_next_forward(ranks: Launched) -> None:
    assert same(ranks.of("a_request_of_a_stopped_program")) == "ACTIVE"


def test_forwards_without_gradients_are_not_counted(ranks: Launched) -> None:
    assert len(same(ranks.of("evaluation_on_one_rank"))) == 1


def test_what_one_rank_cannot_have_comes_into_force_nowhere(ranks: Launched, four: Launched) -> None:
    for each in [*ranks.of("one_rank_cannot_stage"), *four.of("one_rank_cannot_stage")]:
        assert each["result"] is False
        assert each["states"] == ["ERROR_RECOVERY", "ACTIVE"]
        assert each["errors"] == 1
        assert "5d5d5d" in each["reason"]
    assert all("rank 1" in each["reason"] for rank, each in enumerate(ranks.of("one_rank_cannot_stage")) if rank != 1)


def test_a_store_that_one_rank_cannot_reach_keeps_the_kernel_from_all(ranks: Launched) -> None:
    for rank, each in enumerate(ranks.of("a_store_that_is_down_on_one_rank")):
        assert each["result"] is False
        assert each["kernel"] is True
        assert each["flips"] == {}
        assert each["errors"] == 1
        assert "127.0.0.1:1" in each["reason"]
        assert ("rank 1: " in each["reason"]) == (rank != 1)


def test_different_kernels_are_an_error_that_names_both(ranks: Launched) -> None:
    results = ranks.of("different_kernels")
    for each in results:
        assert each["result"] is False
        assert "rank 0" in each["reason"]
        assert "rank 1" in each["reason"]
        assert all(result["kernel"] in each["reason"] for result in results[:2])


def test_models_of_other_sites_are_told_from_each_other_when_they_join(ranks: Launched) -> None:
    result = same(ranks.of("models_of_other_sites"))
    said = {
        "layers": "rank 0 has seeds at '2', and rank 1 has none there",
        "more layers": "rank 1 has seeds at '2', and rank 0 has none there",
        "seeds": "layer '0' maps 8 to 6 features and has 2 seeds on rank 0, and on rank 1 it maps 8 to 6 and has 3",
        "features": "layer '2' maps 6 to 4 features and has 4 seeds on rank 0, and on rank 1 it maps 7 to 4 and has 4",
        "in DDP": "rank 0 has seeds at '2', and rank 1 has none there",
    }
    assert list(result["told"]) == list(said)
    for name, words in said.items():
        assert words in result["told"][name]
        assert "build and wrap the model alike on all ranks" in result["told"][name]
    assert result["afterwards"] is True


def test_a_rank_that_does_not_come_is_named() -> None:
    store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=10), wait_for_workers=False)
    store.set("here/2", "1")
    with pytest.raises(TimeoutError, match=r"^1, 3$"):
        meet(store, 0, 4, [("0", 4, 8, 6)], timedelta(milliseconds=100))


def test_layers_may_be_asked_for_in_another_order(ranks: Launched) -> None:
    result = same(ranks.of("another_order"))
    assert result["results"] == [True, True]


def test_a_late_rank_delays_the_others_and_no_more(ranks: Launched) -> None:
    results = ranks.of("a_late_rank")
    assert [each.pop("stages") for each in results] == [["agreeing", "in force"], ["fetching", "in force"]]
    result = same(results)
    assert result["early"] is False
    assert len(result["flips"]) == 1


def test_the_first_rank_leads_the_others(ranks: Launched, four: Launched) -> None:
    assert len({str(each["flips"]) for each in four.of("what_one_rank_leads_to")}) == 1
    results = ranks.of("what_one_rank_leads_to")
    assert "rank 0" not in str(results[0]["refusal"])
    assert "this is rank 1" in results[1]["refusal"][0]
    assert len(same([each["flips"] for each in results])) == 2
    assert same([each["states"] for each in results])[2] == "DORMANT"


def test_kernels_of_many_layers_come_and_go_at_one_forward(ranks: Launched, four: Launched) -> None:
    for launched in (ranks, four):
        result = same(launched.of("many_layers_in_one_call"))
        assert len(result["flips"]) == 4
        assert result["seen"] == [[], ["0", "2"]]
        assert result["results"] == [True, ["0", "2"], True, ["0", "2"]]
        assert {tuple(each[:2]) for each in result["states"].values()} == {("FOSSILIZED", "DORMANT")}


def test_where_one_rank_lacks_one_of_many_kernels_no_rank_gets_any(ranks: Launched, four: Launched) -> None:
    for launched in (ranks, four):
        for rank, each in enumerate(launched.of("many_layers_of_which_one_rank_lacks_one")):
            assert each["flips"] == []
            assert each["result"] is False
            assert "5d5d5d" in str(each["errors"])
            assert rank == 1 or "rank 1" in str(each["errors"])
            assert each["again"] is True
            assert each["states"] == ["ACTIVE", "ACTIVE"]


def test_different_kernels_for_one_of_many_layers_are_an_error_that_names_both(ranks: Launched) -> None:
    results = ranks.of("different_kernels_for_one_of_many_layers")
    for each in results:
        assert each["result"] is False
        assert not each["flips"]
        assert all(result["kernel"] in each["errors"] for result in results)


def test_one_rank_leads_all_to_kernels_of_many_layers(ranks: Launched) -> None:
    result = same(ranks.of("many_layers_that_one_rank_leads_to"))
    assert len(result["flips"]) == 2
    assert {each[0] for each in result["states"].values()} == {"DORMANT"}


def test_whatever_is_asked_in_a_row_all_ranks_end_alike(ranks: Launched) -> None:
    result = same(ranks.of("replaced_and_called_off"))
    assert result["fossil"] is True
    assert result["states"][0] == "FOSSILIZED"


def test_commits_by_hand_bring_it_at_the_same_one(ranks: Launched) -> None:
    result = same(ranks.of("commits_by_hand"))
    assert result["at"]
    assert result["result"] is True


def test_after_a_checkpoint_ranks_agree_again(ranks: Launched) -> None:
    result = same(ranks.of("a_checkpoint_brings_all_to_one_plan"))
    assert result["states"] == ["ACTIVE", "ACTIVE"]
    assert result["result"] is True


def test_a_rank_that_is_stopped_for_a_while_delays_the_others(ranks: Launched) -> None:
    result = same(ranks.of("a_paused_rank"))
    assert result["result"] is True
    assert len(result["flips"]) == 1


def test_ranks_that_die_leave_the_others_as_they_are_and_these_say_so(tmp_path: Path) -> None:
    first, second, third = launch("tests.distributed.agreed_programs", ["ranks_that_die"], 3, tmp_path).of(
        "ranks_that_die"
    )
    assert third is None
    for each in (first, second):
        assert each["before"] is False
        assert each["plan"] == 0
        assert any("rank 2" in text and "load kernel" in text for text in each["said"])
    assert second["answer"] is False
    assert second["state"] == "ERROR_RECOVERY"
    assert "store of the process group cannot be reached" in second["reason"]
