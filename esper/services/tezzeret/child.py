"""The process that compiles one blueprint: `python -m esper.services.tezzeret.child`, started by `child_process`.

It is at the lowest priority, on one thread, and ends when the worker that started it does. Whatever goes wrong with the
blueprint ends up in the report; only the death of the process is silent.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn, TypeVar

import torch

from esper.artifacts import Artifact, Blueprint, KernelGraph, Node, Target, build_artifact
from esper.child_processes import end_with_parent
from esper.compiler.attachment import with_latencies
from esper.compiler.attachment_code import compile_attachment, load_attachment
from esper.contracts.validation import AttachmentReport, LatencyMeasurement, ValidationCheck, ValidationReport
from esper.services.contracts import KernelMetadata
from esper.services.tezzeret.latency import measure_latencies
from esper.services.tezzeret.limits import INDUCTOR_OPTIONS, PIPELINES, Pipeline, sets_worth_trying
from esper.services.tezzeret.protocol import ARTIFACT, ATTACHMENT, BLUEPRINT, RESULT, ChildRequest, ChildResult
from esper.services.tezzeret.validation import CompiledKernel, check_agreement, check_eager

__all__ = ["compile_blueprint", "main"]

_DEVICE = "cpu"
_Value = TypeVar("_Value")


class _FailedError(Exception):
    """A check did not hold; the report says which."""


@dataclass
class _Findings:
    """What is known so far."""

    checks: list[ValidationCheck] = field(default_factory=list)

    def add(self, check: ValidationCheck) -> None:
        self.checks.append(check)
        if not check.passed:
            raise _FailedError(f"{check.name}: {check.detail}" if check.detail else check.name)

    def step(self, name: str, action: Callable[[], _Value]) -> _Value:
        """The result of `action`; an exception is a failed check of that name."""
        try:
            return action()
        except Exception as error:  # whatever it is, it is this blueprint's failure, and reported as such
            traceback.print_exc()
            self.add(ValidationCheck(name=name, passed=False, detail=_summary(error)))
            raise AssertionError("a failed check raises") from error


def compile_blueprint(blueprint: Blueprint, pipeline: Pipeline, folder: Path) -> ChildResult:
    """Build, compile, check and measure; writes `ARTIFACT` and, if there is one, `ATTACHMENT` to `folder`."""
    findings = _Findings()
    artifact: Artifact | None = None
    attachment: AttachmentReport | None = None
    target: Target | None = None
    latencies: tuple[LatencyMeasurement, ...] = ()
    reason = ""
    try:
        artifact = _build(blueprint, findings)
        graph, tensors = artifact.graph, artifact.tensors
        for check in findings.step("graph", lambda: check_eager(graph, tensors, pipeline.leading)):
            findings.add(check)
        target = Target.current(_DEVICE)
        attachment, payload, compiled = _compile(artifact, target, findings, pipeline)
        if compiled is not None:
            kernel = compiled
            findings.add(findings.step("agreement", lambda: check_agreement(graph, tensors, kernel, pipeline.rows)))
        latencies = findings.step(
            "latency",
            lambda: measure_latencies(graph, tensors, compiled, pipeline.latency_rows, pipeline.latency_seconds),
        )
        (folder / ARTIFACT).write_bytes(artifact.data)
        if payload is not None:
            compared = [(each.rows, each.graph_us, each.attachment_us) for each in latencies if each.attachment_us]
            (folder / ATTACHMENT).write_bytes(with_latencies(payload, compared))
    except _FailedError as error:
        reason = str(error)
    report = ValidationReport(
        blueprint_id=blueprint.id,
        pipeline=pipeline.name,
        passed=not reason,
        reason=reason,
        artifact_id=None if artifact is None else artifact.id,
        checks=tuple(findings.checks),
        attachment=attachment,
        latencies=latencies,
        peak_memory_mb=_peak_memory_mb(),
    )
    return ChildResult(
        report=report,
        metadata=None if artifact is None else KernelMetadata.of(artifact.graph),
        target=None if target is None or attachment is None or attachment.status != "compiled" else target.to_json(),
    )


def _build(blueprint: Blueprint, findings: _Findings) -> Artifact:
    artifact = findings.step("build", lambda: build_artifact(blueprint))
    again = findings.step("build", lambda: build_artifact(Blueprint.from_json(blueprint.to_json())))
    same = artifact.id == again.id
    findings.add(
        ValidationCheck(
            name="deterministic build",
            passed=same,
            detail="built twice, same id" if same else f"built twice, got {artifact.id} and {again.id}",
        )
    )
    return artifact


def _compile(
    artifact: Artifact, target: Target, findings: _Findings, pipeline: Pipeline
) -> tuple[AttachmentReport, bytes | None, CompiledKernel | None]:
    """With each of the pipeline's sets of options, of which the first has to succeed; the fastest is kept."""
    started = time.perf_counter()
    first, *others = sets_worth_trying(pipeline)
    try:
        payload, kernel = _compiled(artifact, first)
    except Exception as error:  # reported, either as the machine's or as the kernel's failure
        traceback.print_exc()
        problem = _toolchain_problem()
        if problem is None:
            findings.add(ValidationCheck(name="attachment", passed=False, detail=_summary(error)))
            raise AssertionError("a failed check raises") from error
        detail = f"this machine cannot compile kernels: {problem}"
        return AttachmentReport(status="unavailable", target_key=target.key, detail=detail), None, None
    best, tried = first, dict[str, float | None]()
    if others:
        tried[first] = _speed(artifact, kernel, pipeline)
        for name in others:
            found = _other(artifact, name, pipeline)
            tried[name] = None if found is None else _speed(artifact, found[1], pipeline)
            if found is not None and (tried[name] or 0.0) < (tried[best] or 0.0):
                best, (payload, kernel) = name, found
    report = AttachmentReport(
        status="compiled",
        target_key=target.key,
        size_bytes=len(payload),
        compile_seconds=time.perf_counter() - started,
        options=best,
        tried=tried,
    )
    return report, payload, kernel


def _compiled(artifact: Artifact, options: str) -> tuple[bytes, CompiledKernel]:
    payload = compile_attachment(artifact.graph, artifact.tensors, _DEVICE, INDUCTOR_OPTIONS[options])
    return payload, load_attachment(payload)


def _other(artifact: Artifact, options: str, pipeline: Pipeline) -> tuple[bytes, CompiledKernel] | None:
    """None if Inductor cannot compile the kernel with these options, or not to code that computes the same."""
    try:
        found = _compiled(artifact, options)
        agrees = check_agreement(artifact.graph, artifact.tensors, found[1], pipeline.rows).passed
    except Exception:  # noqa: BLE001  # the kernel does not need this set; what happened is in the log
        traceback.print_exc()
        return None
    return found if agrees else None


def _speed(artifact: Artifact, kernel: CompiledKernel, pipeline: Pipeline) -> float | None:
    (measured,) = measure_latencies(
        artifact.graph, artifact.tensors, kernel, (pipeline.tuning_rows,), pipeline.latency_seconds
    )
    return measured.attachment_us


def _toolchain_problem() -> str | None:
    """Why not even the simplest kernel can be compiled here (no C++ compiler, or a broken one); None if it can."""
    simplest = KernelGraph(1, 1, "float32", (), (Node("y", "add_scalar", ("x",), {"value": 1.0}),), "y")
    try:
        compile_attachment(simplest, {}, _DEVICE)
    except Exception as error:  # noqa: BLE001  # any failure means the same, and its text is the answer
        return _summary(error)
    return None


def _summary(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text[:2000]}" if text else type(error).__name__


def _peak_memory_mb() -> float | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def _limit(request: ChildRequest) -> None:
    if os.name != "posix":
        return
    import resource

    for what, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, request.cpu_seconds),
        (resource.RLIMIT_DATA, request.data_bytes),
    ):
        hard = resource.getrlimit(what)[1]
        resource.setrlimit(what, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def main() -> NoReturn:
    """Read a request, do it, leave the result, and end."""
    request = ChildRequest.model_validate_json(sys.stdin.buffer.readline())
    end_with_parent(int(sys.argv[1]))
    _limit(request)
    torch.set_num_threads(1)
    folder = Path(request.folder)
    blueprint = Blueprint.from_json((folder / BLUEPRINT).read_bytes())
    result = compile_blueprint(blueprint, PIPELINES[request.pipeline], folder)
    unfinished = folder / f".{RESULT}"
    unfinished.write_text(result.model_dump_json(), encoding="utf-8")
    unfinished.replace(folder / RESULT)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # at once: nothing is left to do, and shutting torch down takes time


if __name__ == "__main__":
    main()
