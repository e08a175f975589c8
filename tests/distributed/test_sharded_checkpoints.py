"""Checkpoints that four ranks write, read by as many, by two, and by one process."""

from __future__ import annotations

import pytest

from tests.distributed.ranks import Launched, launch

pytestmark = pytest.mark.slow

PROGRAMS = "tests.distributed.checkpoint_programs"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("checkpoint")
        patch.setenv("ESPER_TEST_CHECKPOINT", str(folder))
        yield launch(PROGRAMS, ["saves"], 4, tmp_path_factory.mktemp("four"))


@pytest.mark.parametrize("size", [1, 2])
def test_training_goes_on_at_another_world_size(
    written: Launched, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    want = written.of("saves")[0]
    programs = ["loads", "what_does_not_fit"] if size == 1 else ["loads"]
    again = launch(PROGRAMS, programs, size, tmp_path_factory.mktemp("again"))
    for each in again.of("loads"):
        assert each["states"] == want["states"]
        assert each["alpha"] == want["alpha"]
        assert 0.25 < each["alpha"] < 0.75
        assert each["rates"] == [0.01, 0.03]
        assert each["agrees"] is True
        for mine, theirs in zip(each["parameters"], want["parameters"], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
    if size == 1:
        [(sites, unwrapped)] = again.of("what_does_not_fit")
        assert "'0'" in sites
        assert "esper.wrap" in unwrapped
