"""Training on several ranks: kernels learn as the host does, and as they do in one process."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Launched, launch

pytestmark = pytest.mark.slow

ALIKE = [
    "ddp", "ddp_at_a_block", "ddp_that_accumulates", "ddp_around_a_part", "ddp_with_backend",
    "ddp_with_backend_at_a_block", "ddp_with_backend_at_a_broken_block", "fsdp", "fsdp_at_a_block",
    "fsdp_before_wrapping", "fsdp_that_accumulates",
]  # fmt: skip
GROWN = ["ddp_made_with_a_kernel_in_force", "fsdp_of_a_model_that_has_grown"]
OTHERS = [*GROWN, "what_is_refused", "fsdp_in_bfloat16"]
OF_FOUR = ["ddp", "ddp_at_a_block", "fsdp", "fsdp_at_a_block", "hsdp"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launch("tests.distributed.training_programs", [*ALIKE, *OTHERS], 2, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    return launch("tests.distributed.training_programs", OF_FOUR, 4, tmp_path_factory.mktemp("four"))


def assert_alike(ranks: Launched, scenario: str, tolerance: float = 1e-5) -> None:
    for each in ranks.of(scenario):
        assert each["flips"] == [[3, 6, 9, 12] if "block" in scenario else [3, 6, 12]] * 2
        assert each["between"] == 0.0
        assert each["alone"] < tolerance
        assert each["norms"] < tolerance
        assert each["states"] == {"0": ["ACTIVE", *["DORMANT"] * 3], "2": ["DORMANT"] * 4}


@pytest.mark.parametrize("scenario", ALIKE)
def test_kernels_learn_on_two_ranks_as_in_one_process(two: Launched, scenario: str) -> None:
    assert_alike(two, scenario)


@pytest.mark.parametrize("scenario", OF_FOUR)
def test_kernels_learn_on_four_ranks_as_in_one_process(four: Launched, scenario: str) -> None:
    assert_alike(four, scenario)


def test_a_policy_of_mixed_precision_is_that_of_kernels_too(two: Launched) -> None:
    assert_alike(two, "fsdp_in_bfloat16", tolerance=0.05)


@pytest.mark.parametrize("scenario", GROWN)
def test_a_kernel_that_was_there_before_learns_and_can_leave(two: Launched, scenario: str) -> None:
    for each in two.of(scenario):
        assert each == {"equal": True, "states": "DORMANT"}


def test_what_cannot_be_kept_is_refused(two: Launched) -> None:
    for each in two.of("what_is_refused"):
        assert "DistributedDataParallel already" in each["ddp"]
        assert "'0', which has seeds, is put into DistributedDataParallel without the model" in each["a part in ddp"]
        for name in ("fsdp1", "fsdp1 inside"):
            assert "is in a FullyShardedDataParallel already" in each[name]
        for name in ("fsdp1 later", "a part in fsdp1"):
            assert "put into FullyShardedDataParallel: FSDP1" in each[name]
        assert all("use torch.distributed.fsdp.fully_shard (FSDP2)" in each[name] for name in each if "fsdp1" in name)
        assert "is in a DeepSpeedEngine already" in each["deepspeed"]
        for name in ("deepspeed later", "deepspeed's pipeline"):
            assert "put into DeepSpeedEngine: DeepSpeed reduces" in each[name]
        for name in ("tensor parallel", "parallel later", "parallel later, asked", "parallel after a forward"):
            assert "tensor parallelism" in each[name]
            assert "shard it by fully_shard() (FSDP2)" in each[name]
        assert "'world'" in each["no group"]
        assert "whose growers would see other batches" in each["a grower"]
        assert "join()" in each["join"]
        assert "first forward" in each["late"]
