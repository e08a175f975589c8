"""An eager host executes what Tezzeret compiled, if its signer is trusted and its target is this machine."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint, Platform
from esper.artifacts import Attachment, SigningKey, Target
from esper.execution.kernel_cache import KernelCache
from esper.execution.loaded_kernel import AttachedKernel

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attachments")]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    with Platform.embedded(tmp_path_factory.mktemp("platform")) as platform:
        yield platform


@pytest.fixture(scope="module")
def kernel(platform: Platform) -> str:
    """A compiled kernel that reads its input and the host's output."""
    blueprint = Blueprint.bottleneck(8, 6, rank=3, start="identity", seed=5)
    return platform.compile_sync(blueprint, timeout=240).id


def test_an_eager_host_runs_the_attachment_and_agrees_with_the_graph(
    platform: Platform, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=platform)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5, trainable=True))
    (seed,) = model.runtime.plan.seeds()
    executor = seed.kernel.executor
    assert isinstance(executor, AttachedKernel)
    compiled, calls = executor.attachment, []

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments[0].shape)
        return compiled(*arguments)

    monkeypatch.setattr(executor, "attachment", counted)
    for shape in ((5, 8), (2, 3, 8)):
        x = torch.randn(shape, requires_grad=True)
        with torch.no_grad():
            for parameter in model.seed_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        inputs = [x, *model.parameters()]
        output = model(x)
        gradients = torch.autograd.grad(output.square().sum(), inputs)
        host = torch.nn.functional.linear(x, *model.kasmina_layers["0"]._parameters.values())  # type: ignore[arg-type]
        expected = torch.lerp(host, seed.kernel.module(x, host), torch.tensor(0.5))
        theirs = torch.autograd.grad(expected.square().sum(), inputs)
        torch.testing.assert_close(output, expected)
        for ours, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(ours, other)
    assert calls == [(5, 8), (6, 8)]


def test_a_restored_kernel_gets_its_attachment_in_the_background(platform: Platform, kernel: str) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=platform)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    fresh = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=platform)
    fresh.load_state_dict(model.state_dict())
    x, calls = torch.randn(5, 8), []
    expected = fresh(x)
    torch.testing.assert_close(expected, model(x))
    (seed,) = fresh.runtime.plan.seeds()
    assert fresh.request_kernel("0", 3, "ab" * 32).result(60) is False  # requests are carried out one after the other
    executor = seed.kernel.executor
    assert isinstance(executor, AttachedKernel)
    with pytest.MonkeyPatch.context() as patch:
        compiled = executor.attachment
        patch.setattr(executor, "attachment", lambda *inputs: calls.append(1) or compiled(*inputs))
        torch.testing.assert_close(fresh(x), expected)
    assert calls == [1]


def _fresh_kernel(platform: Platform, kernel: str) -> esper.execution.loaded_kernel.LoadedKernel:
    cache = KernelCache(source=platform.kernel_source)
    loaded = cache.fetch(kernel).place()
    esper.attach_from(platform.kernel_source, loaded)
    return loaded


def test_a_strangers_attachment_is_not_touched_and_takes_no_ones_place(
    platform: Platform, kernel: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target.current("cpu")
    packed = platform.kernel_source.attachment(kernel, target.key)
    assert packed is not None
    own = Attachment.unpack(packed)
    stranger = Attachment.create(kernel, target, b"not what anybody would run", SigningKey.generate())
    platform.store.kernels.add_attachment(stranger)
    assert platform.kernel_source.attachment(kernel, target.key) == packed
    assert _fresh_kernel(platform, kernel).attached

    class OfAStranger:
        """A store that hands out what its owner likes."""

        resolve, fetch, trust = (
            platform.kernel_source.resolve,
            platform.kernel_source.fetch,
            platform.kernel_source.trust,
        )
        given = stranger.pack()

        def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
            return self.given

    loaded = KernelCache(source=platform.kernel_source).fetch(kernel).place()
    source = OfAStranger()
    esper.attach_from(source, loaded)
    assert not loaded.attached
    assert "is not used" in caplog.text
    forged = dataclasses.replace(own, payload=b"not what was signed")
    source.given = forged.pack()
    esper.attach_from(source, loaded)
    assert not loaded.attached


def test_another_toolchains_attachment_is_not_touched(
    platform: Platform, kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Target.current("cpu")
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    other = Target.current("cpu")
    assert other.key != real.key
    loaded = _fresh_kernel(platform, kernel)
    assert not loaded.attached
    assert loaded.executor is loaded.module


def test_a_kernel_of_the_right_key_but_for_another_artifact_is_refused(
    platform: Platform, kernel: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target.current("cpu")
    packed = platform.kernel_source.attachment(kernel, target.key)
    assert packed is not None

    class Swapped:
        """A store that hands out the attachment of another kernel."""

        resolve, fetch, trust = (
            platform.kernel_source.resolve,
            platform.kernel_source.fetch,
            platform.kernel_source.trust,
        )

        def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
            return packed

    other = platform.compile_sync(Blueprint.low_rank(8, 6, rank=1, start="kaiming"), timeout=240).id
    loaded = KernelCache(source=platform.kernel_source).fetch(other).place()
    esper.attach_from(Swapped(), loaded)
    assert not loaded.attached
    assert "another kernel" in caplog.text
