"""Training on several ranks: kernels learn as the host does, and as they do in one process."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Launched, launch

SCENARIOS = ["ddp", "ddp_that_accumulates", "ddp_around_a_part", "ddp_made_with_a_kernel_in_force", "ddp_with_backend"]


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launch("tests.distributed.training_programs", SCENARIOS, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("scenario", ["ddp", "ddp_that_accumulates", "ddp_around_a_part", "ddp_with_backend"])
def test_kernels_learn_on_all_ranks_as_in_one_process(ranks: Launched, scenario: str) -> None:
    for each in ranks.of(scenario):
        assert each["flips"] == [[3, 6, 12]] * 2
        assert each["between"] == 0.0
        assert each["alone"] < 1e-5
        assert each["states"] == {"0": ["ACTIVE", *["DORMANT"] * 3], "2": ["DORMANT"] * 4}


def test_a_kernel_that_was_there_before_ddp_can_leave(ranks: Launched) -> None:
    for each in ranks.of("ddp_made_with_a_kernel_in_force"):
        assert each == {"equal": True, "states": "DORMANT"}
