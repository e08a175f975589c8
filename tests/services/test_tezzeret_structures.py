"""Kernels of one structure: the first is compiled, the others have its code, each signed as its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from esper import Blueprint, Platform
from esper.artifacts import Attachment, SigningKey, Target, load_artifact
from esper.compiler.attachment import attach_from, read_payload
from esper.compiler.attachment_code import load_attachment
from esper.execution.kernels.loaded_kernel import KernelTemplate, LoadedKernel
from esper.services.contracts import CompiledKernelArtifact
from esper.services.errors import CompilationFailedError
from esper.services.tezzeret import worker
from esper.services.tezzeret.known_structure import KnownStructures

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("structures")]
_TARGET = Target.current("cpu").key
_GRAPH = Blueprint.bottleneck(8, 6, rank=3, bias=False, start="kaiming", activation="relu").graph


def _of_weights(value: float) -> Blueprint:
    shapes = {spec.name: spec.shape for spec in _GRAPH.tensors}
    return Blueprint.from_graph(_GRAPH, {name: torch.full(shape, value) for name, shape in shapes.items()})


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform.embedded(tmp_path_factory.mktemp("structures")) as platform:
        yield platform


@pytest.fixture(scope="module")
def first(platform: Platform) -> CompiledKernelArtifact:
    return platform.compile_sync(_of_weights(0.5), timeout=200)


def _code(platform: Platform, kernel: CompiledKernelArtifact) -> bytes:
    packed = platform.store.kernels.attachment(kernel.id, _TARGET)
    assert packed is not None
    attachment = Attachment.unpack(packed)
    attachment.verify(platform.trust)
    assert attachment.artifact_id == kernel.id
    return read_payload(attachment.payload)[1]


def _placed(platform: Platform, kernel: CompiledKernelArtifact) -> LoadedKernel:
    return KernelTemplate.from_artifact(load_artifact(platform.store.kernels.content(kernel.id)[0])).place()


def test_what_differs_in_weights_only_is_not_compiled_again(
    platform: Platform, first: CompiledKernelArtifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    run_child = worker.run_child
    monkeypatch.setattr(worker, "run_child", lambda *given: children.append(given) or run_child(*given))
    others = [platform.compile_sync(_of_weights(value), timeout=200) for value in (0.25, -1.0)]
    assert children == []
    assert {_code(platform, each) for each in others} == {_code(platform, first)}
    assert all(first.id in each.report.checks[0].detail for each in others)
    assert [each.report.latencies for each in others] == [first.report.latencies] * 2
    x, kernel = torch.randn(5, 8), _placed(platform, others[0])
    torch.testing.assert_close(load_attachment(_code(platform, others[0]))(x, *kernel.parameters), kernel.module(x))


def test_kernels_with_the_same_code_unpack_it_once(platform: Platform, first: CompiledKernelArtifact) -> None:
    other = platform.compile_sync(_of_weights(2.0), timeout=200)
    payload = {
        each.id: Attachment.unpack(platform.store.kernels.attachment(each.id, _TARGET) or b"").payload
        for each in (first, other)
    }
    assert payload[first.id] == payload[other.id]
    kernels = [_placed(platform, each) for each in (first, other)]
    for each in kernels:
        attach_from(platform.kernel_source, each)
    attached = [each.template.attachment(each.device) for each in kernels]
    assert attached[0] is attached[1]


def test_weights_that_fail_a_check_are_refused_though_the_structure_is_known(
    platform: Platform, first: CompiledKernelArtifact
) -> None:
    with pytest.raises(CompilationFailedError, match="not finite"):
        platform.compile_sync(_of_weights(3e38), timeout=200)


def test_code_that_another_key_has_signed_is_not_taken(platform: Platform, first: CompiledKernelArtifact) -> None:
    document = _of_weights(0.75).to_json().encode()
    pipeline = first.report.pipeline
    mine, key = KnownStructures(), SigningKey.load(platform.root / "signing.pem")
    assert mine.compile(document, platform.store, key, pipeline) is not None
    assert KnownStructures().compile(document, platform.store, SigningKey.generate(), pipeline) is None
    assert mine.compile(document, platform.store, key, "aggressive") is None
