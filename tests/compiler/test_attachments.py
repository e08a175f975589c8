"""An eager host executes what Tezzeret compiled, if it is trusted, made for this machine, and faster."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import esper
from esper import Platform
from esper.artifacts import Attachment, SigningKey, Target, build_artifact
from esper.compiler.attachment import with_latencies
from esper.execution.kernel_cache import KernelCache
from esper.execution.kernels.loaded_kernel import AttachedKernel, LoadedKernel
from esper.execution.sources import KernelSource
from esper.logs import SayOnce
from tests.compiler.variants import wait_until
from tests.kernel_shelf import COMPILED, KernelShelf, compiled_code

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("attachments")]

BLUEPRINT = COMPILED["identity"]


@pytest.fixture
def platform(compiled: Platform) -> Platform:
    return compiled


@pytest.fixture
def kernel() -> str:
    """A compiled kernel that reads its input and the host's output."""
    return build_artifact(BLUEPRINT).id


@pytest.fixture
def faster(platform: Platform, kernel: str, tmp_path: Path) -> Iterator[KernelShelf]:
    """A platform with the same kernel, whose compiled code is said to be faster than its graph."""
    (tmp_path / "shelf").mkdir()
    with KernelShelf(tmp_path / "shelf") as shelf:
        assert shelf.put(BLUEPRINT).id == kernel
        shelf.attach(kernel, compiled_code(platform, kernel))
        yield shelf


def _executor(model: esper.MorphableModel) -> AttachedKernel:
    (seed,) = model.runtime.plan.seeds()
    executor = seed.kernel.executor
    assert isinstance(executor, AttachedKernel)
    return executor


def _unpacked(model: esper.MorphableModel, x: torch.Tensor) -> AttachedKernel:
    """The executor, once forwards without gradients have had its code unpacked."""
    executor = _executor(model)

    def unpacked() -> bool:
        with torch.no_grad():
            model(x)  # the first that runs the executor asks for it
        return executor.attachment.call is not None

    wait_until(unpacked, "the unpacking of an attachment")
    return executor


def _count_calls(executor: AttachedKernel) -> list[tuple[int, ...]]:
    compiled, calls = executor.attachment.call, []
    assert compiled is not None

    def counted(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(arguments[0].shape))
        return compiled(*arguments)

    executor.attachment.call = counted
    return calls


def test_an_eager_host_runs_the_attachment_without_gradients_and_agrees_with_the_graph(
    faster: KernelShelf, kernel: str
) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=faster.platform)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5, trainable=True))
    calls = _count_calls(_unpacked(model, torch.randn(5, 8)))
    for shape in ((5, 8), (2, 3, 8)):
        x = torch.randn(shape)
        with torch.no_grad():
            for parameter in model.seed_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            evaluated = model(x)
        trained = model(x)
        trained.square().sum().backward()
        torch.testing.assert_close(evaluated, trained.detach())
    assert calls == [(5, 8), (6, 8)]


def test_a_restored_kernel_gets_its_attachment_in_the_background(faster: KernelShelf, kernel: str) -> None:
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=faster.platform)
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    fresh = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=faster.platform)
    fresh.load_state_dict(model.state_dict())
    x = torch.randn(5, 8)
    expected = fresh(x)
    torch.testing.assert_close(expected, model(x))

    def attached() -> bool:
        fresh(x)
        return isinstance(next(iter(fresh.runtime.plan.seeds())).kernel.executor, AttachedKernel)

    wait_until(attached, "the attachment of a restored kernel")
    calls = _count_calls(_unpacked(fresh, x))
    with torch.no_grad():
        torch.testing.assert_close(fresh(x), expected.detach())
    assert calls == [(5, 8)]


def test_one_that_is_no_faster_is_left_packed(
    platform: Platform, kernel: str, faster: KernelShelf, caplog: pytest.LogCaptureFixture
) -> None:
    faster.attach(kernel, compiled_code(platform, kernel), (2, 10.0, 20.0), (32, 10.0, 9.9))
    with caplog.at_level("INFO", "esper.compiler"):
        loaded = _fresh_kernel(faster.platform, kernel)
    assert not loaded.attached
    assert loaded.executor is loaded.module
    assert "no faster" in caplog.text
    caplog.clear()
    esper.attach_from(_SourceOfForgeries(faster.platform.kernel_source, b"which it does not ask for"), loaded.place())
    assert not caplog.text


class _Marks:
    """A pickle that leaves a file behind where it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self._path),)


class _Kills:
    """A pickle that ends the process where it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return os.abort, ()


@pytest.mark.parametrize("damage", ["another's bytes", "cut off", "ends the process", "no latencies"])
def test_one_that_cannot_be_unpacked_is_as_good_as_none(
    platform: Platform, kernel: str, faster: KernelShelf, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    code = compiled_code(platform, kernel)
    key = SigningKey.load_or_create(Path(faster.platform.root) / "signing.pem")
    payload = {
        "another's bytes": with_latencies(pickle.dumps("nothing of torch's"), [(2, 100.0, 1.0)]),
        "cut off": with_latencies(code[: len(code) // 2], [(2, 100.0, 1.0)]),
        "ends the process": with_latencies(pickle.dumps(_Kills()), [(2, 100.0, 1.0)]),
        "no latencies": code,
    }[damage]
    faster.store_attachment(Attachment.create(kernel, Target.current("cpu"), payload, key))
    model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=faster.platform)
    esper.compiler.attachment._say_once = SayOnce(logging.getLogger("esper.compiler"))
    assert asyncio.run(model.load_kernel("0", 0, kernel, alpha=0.5))
    x = torch.randn(5, 8)
    with torch.no_grad():
        expected = model(x)
        wait_until(lambda: "its graph runs" in caplog.text, "the word that the attachment is not used")
        for _ in range(3):
            torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert caplog.text.count("its graph runs") == 1


class _SourceOfForgeries:
    """A store that hands out as attachments what its owner likes."""

    def __init__(self, source: KernelSource, given: bytes) -> None:
        self.resolve, self.fetch, self.trust = source.resolve, source.fetch, source.trust
        self.given = given

    def attachment(self, artifact_id: str, target_key: str) -> bytes | None:
        return self.given


def test_nothing_of_it_is_read_before_its_signature_is_verified(
    platform: Platform, kernel: str, faster: KernelShelf, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    payload = with_latencies(pickle.dumps(_Marks(tmp_path / "read")), [(2, 100.0, 1.0)])
    stranger, own = SigningKey.generate(), SigningKey.load_or_create(Path(faster.platform.root) / "signing.pem")
    target = Target.current("cpu")
    good = Attachment.create(kernel, target, with_latencies(b"", [(2, 1.0, 2.0)]), own)
    for signature in (Attachment.create(kernel, target, payload, stranger).signature, good.signature):
        attachment = Attachment(kernel, target, payload, signature)
        forged = _SourceOfForgeries(faster.platform.kernel_source, attachment.pack())
        loaded = KernelCache(source=faster.platform.kernel_source).fetch(kernel).place()
        esper.attach_from(forged, loaded)
        assert not loaded.attached
        loaded.executor(torch.randn(5, 8), torch.randn(5, 6))
    assert not (tmp_path / "read").exists()
    assert "not used" in caplog.text


TRAINER = """
import sys, torch, esper
from torch import nn
root, kernel = sys.argv[1:]
model = esper.wrap(nn.Sequential(nn.Linear(8, 6)), platform=esper.Platform.embedded(root))
assert model.request_kernel("0", 0, kernel, alpha=0.5, trainable=True).result(100)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.randn(5, 8))
print([name for name in ("codecache", "compile_fx", "graph") if f"torch._inductor.{name}" in sys.modules])
"""


def test_a_program_that_trains_an_eager_model_imports_no_compiler(platform: Platform, kernel: str) -> None:
    program = [sys.executable, "-c", TRAINER, str(platform.root), kernel]
    assert subprocess.run(program, check=True, capture_output=True, text=True).stdout.strip() == "[]"


def _fresh_kernel(platform: Platform, kernel: str) -> LoadedKernel:
    cache = KernelCache(source=platform.kernel_source)
    loaded = cache.fetch(kernel).place()
    esper.attach_from(platform.kernel_source, loaded)
    return loaded


def test_a_strangers_attachment_is_not_touched_and_takes_no_ones_place(
    faster: KernelShelf, kernel: str, caplog: pytest.LogCaptureFixture
) -> None:
    target = Target.current("cpu")
    packed = faster.platform.kernel_source.attachment(kernel, target.key)
    assert packed is not None
    own = Attachment.unpack(packed)
    stranger = Attachment.create(kernel, target, b"not what anybody would run", SigningKey.generate())
    faster.platform.store.kernels.add_attachment(stranger)
    assert faster.platform.kernel_source.attachment(kernel, target.key) == packed
    assert _fresh_kernel(faster.platform, kernel).attached

    loaded = KernelCache(source=faster.platform.kernel_source).fetch(kernel).place()
    source = _SourceOfForgeries(faster.platform.kernel_source, stranger.pack())
    esper.attach_from(source, loaded)
    assert not loaded.attached
    assert "is not used" in caplog.text
    forged = dataclasses.replace(own, payload=b"not what was signed")
    source.given = forged.pack()
    esper.attach_from(source, loaded)
    assert not loaded.attached


def test_another_toolchains_attachment_is_not_touched(
    faster: KernelShelf, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Target.current("cpu")
    monkeypatch.setattr(torch, "__version__", "1.0.0")
    other = Target.current("cpu")
    assert other.key != real.key
    loaded = _fresh_kernel(faster.platform, kernel)
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

    other = build_artifact(COMPILED["bottleneck"]).id
    loaded = KernelCache(source=platform.kernel_source).fetch(other).place()
    esper.attach_from(Swapped(), loaded)
    assert not loaded.attached
    assert "another kernel" in caplog.text
