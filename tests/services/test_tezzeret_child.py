"""What the child process does with a blueprint, done in this process."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from esper.artifacts import Blueprint, Target, load_artifact
from esper.compiler.attachment import read_payload
from esper.compiler.attachment_code import load_attachment
from esper.services.tezzeret import child
from esper.services.tezzeret.child import compile_blueprint
from esper.services.tezzeret.limits import PIPELINES, sets_worth_trying
from esper.services.tezzeret.protocol import ARTIFACT, ATTACHMENT
from tests.services.shelf import exponential

FAST = PIPELINES["fast"]
KERNEL = Blueprint.low_rank(6, 4, 2, start="kaiming")


def test_a_blueprint_that_fails_leaves_a_report_and_no_artifact(tmp_path: Path) -> None:
    result = compile_blueprint(exponential(), FAST, tmp_path)
    assert not result.report.passed
    assert result.report.reason.startswith("large inputs: the output is not finite")
    assert list(tmp_path.iterdir()) == []
    assert result.target is None


@pytest.mark.slow
def test_a_sound_blueprint_leaves_artifact_and_attachment(tmp_path: Path) -> None:
    result = compile_blueprint(KERNEL, FAST, tmp_path)
    assert result.report.passed, result.report.reason
    artifact = load_artifact((tmp_path / ARTIFACT).read_bytes(), expected_id=result.report.artifact_id)
    assert artifact.graph == KERNEL.graph
    assert callable(load_attachment(read_payload((tmp_path / ATTACHMENT).read_bytes())[1]))
    assert result.target == Target.current().to_json()
    assert result.metadata is not None
    assert result.metadata.parameter_count == 6 * 2 + 2 * 4


@pytest.mark.slow
def test_of_several_sets_of_options_the_fastest_is_kept(tmp_path: Path) -> None:
    pipeline = dataclasses.replace(PIPELINES["standard"], options=("default", "autotuned products"))
    result = compile_blueprint(KERNEL, pipeline, tmp_path)
    report = result.report.attachment
    assert report is not None
    assert tuple(report.tried) == pipeline.options
    times = {name: time for name, time in report.tried.items() if time is not None}
    assert times[report.options] == min(times.values())
    assert callable(load_attachment(read_payload((tmp_path / ATTACHMENT).read_bytes())[1]))


def test_sets_that_would_make_the_same_code_are_not_tried() -> None:
    narrower = {"vectors of 256 bits", "autotuned products, vectors of 256 bits"}
    for pipeline in PIPELINES.values():
        left_out = set(pipeline.options) - set(sets_worth_trying(pipeline))
        wide = "AVX512" in torch.backends.cpu.get_cpu_capability()
        assert left_out == (set() if wide else narrower & set(pipeline.options))


@pytest.mark.slow
def test_a_kernel_that_the_compiler_refuses_where_it_works_otherwise_is_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_attachment = child.compile_attachment

    def refusing(graph: object, *arguments: object) -> bytes:
        if graph == KERNEL.graph:
            raise NotImplementedError("no lowering for this operator")
        return compile_attachment(graph, *arguments)  # type: ignore[arg-type]  # passed through

    monkeypatch.setattr(child, "compile_attachment", refusing)  # stands in for a bug of the compiler
    result = compile_blueprint(KERNEL, FAST, tmp_path)
    assert not result.report.passed
    assert result.report.reason == "attachment: NotImplementedError: no lowering for this operator"
    assert result.target is None
    assert list(tmp_path.iterdir()) == []
