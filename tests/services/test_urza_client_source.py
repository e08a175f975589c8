"""Kernels for a model out of a remote Urza: fetched once, kept on disk, and loaded while Urza is away."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import esper
from esper import Blueprint, Platform
from esper.artifacts import Artifact, Attachment, SigningKey, Target, TrustStore, load_artifact
from esper.configs import EsperConfig, PlatformConfig
from esper.execution.sources import AmbiguousKernelError, KernelSource, KernelSourceError, UnknownKernelError
from esper.services.urza import UrzaStore
from esper.services.urza_client import RemoteKernelSource, RemoteStore
from tests.services.broken_server import (
    Behaviour,
    BrokenServer,
    answer,
    client_settings,
    free_port,
    hang_up,
    problem,
    relay,
    silence,
)
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza, settings

KEY = SigningKey.generate()
TRUST = TrustStore([KEY.public_bytes])


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def artifact(store: UrzaStore) -> Artifact:
    return add_kernel(store, blueprint(1), "first", key=KEY)[0]


@contextmanager
def source_at(url: str, cache: Path, **client: Any) -> Iterator[RemoteKernelSource]:
    """A source as a process that starts has it."""
    store = RemoteStore(client_settings(url, cache_folder=cache, **{"timeout": 30, "retries": 1, **client}))
    try:
        yield RemoteKernelSource(store, lambda: TRUST)
    finally:
        store.close()


@contextmanager
def counted(urza: RunningUrza) -> Iterator[BrokenServer]:
    """Urza, with its requests counted."""
    with BrokenServer(relay(urza.port)) as server:
        yield server


def use(urza: RunningUrza, cache: Path, *references: str) -> None:
    """Fetch these kernels, as an earlier process."""
    with source_at(urza.url, cache) as source:
        for reference in references:
            source.fetch(source.resolve(reference))


def blob(cache: Path, digest: str) -> Path:
    (path,) = cache.rglob(digest)
    return path


def test_a_kernel_is_fetched_once_and_then_read_from_the_disk(
    urza: RunningUrza, cache: Path, artifact: Artifact
) -> None:
    with counted(urza) as server:
        with source_at(server.url, cache) as source:
            assert isinstance(source, KernelSource)
            assert source.resolve("first") == artifact.id
            fetched = source.fetch(artifact.id)
            assert server.asked == ["GET /api/v1/kernels/first", f"GET /api/v1/kernels/{artifact.id}/content"]
        with source_at(server.url, cache) as another:
            for each in (another, copy.deepcopy(another)):
                assert each.resolve(artifact.id) == artifact.id
                again = each.fetch(artifact.id)
                assert (again.data, again.signature) == (fetched.data, fetched.signature)
        assert len(server.requests) == 2
    assert load_artifact(fetched.data, signature=fetched.signature, trust=source.trust()).id == artifact.id


def test_what_is_not_there_is_an_error_of_the_source(urza: RunningUrza, cache: Path, artifact: Artifact) -> None:
    with source_at(urza.url, cache) as source:
        for ask in (source.resolve, source.fetch):
            with pytest.raises(UnknownKernelError):
                ask("0" * 64)
        with pytest.raises(UnknownKernelError, match="no kernel is called"):
            source.resolve("../escape")
        with pytest.raises(UnknownKernelError, match="not the full id"):
            source.fetch("first")
        assert source.attachment(artifact.id, "no-such-target") is None
    assert issubclass(AmbiguousKernelError, KernelSourceError)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"{}",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
    ids=["emptied", "overwritten", "truncated", "one bit"],
)
def test_a_damaged_file_is_fetched_again(
    urza: RunningUrza, cache: Path, artifact: Artifact, damage: Callable[[bytes], bytes]
) -> None:
    use(urza, cache, "first")
    with counted(urza) as server, source_at(server.url, cache) as source:
        path = blob(cache, artifact.id)
        path.write_bytes(damage(path.read_bytes()))
        assert source.fetch(source.resolve(artifact.id)).data == artifact.data
        assert server.asked == [f"GET /api/v1/kernels/{artifact.id}/content"]
        assert path.read_bytes() == artifact.data


def test_a_damaged_signature_is_fetched_again(urza: RunningUrza, cache: Path, artifact: Artifact) -> None:
    use(urza, cache, "first")
    with source_at(urza.url, cache) as source:
        for path in (cache / "facts").iterdir():
            path.write_bytes(path.read_bytes()[:-3])
        fetched = source.fetch(artifact.id)
        assert load_artifact(fetched.data, signature=fetched.signature, trust=TRUST).id == artifact.id


def test_a_folder_that_cannot_be_used_does_not_keep_a_kernel_from_loading(
    urza: RunningUrza, tmp_path: Path, artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_bytes(b"theirs")
    with source_at(urza.url, tmp_path / "taken") as source:
        for _ in range(2):
            assert source.fetch(source.resolve("first")).data == artifact.data
    assert str(tmp_path / "taken") in caplog.text


# -- Urza is away, or in trouble ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "trouble", [hang_up, answer(500, b"{}"), answer(502, b"<html>", "text/html"), problem(503, "store-busy")]
)
def test_what_is_on_the_disk_loads_while_urza_is_in_trouble(
    urza: RunningUrza, cache: Path, artifact: Artifact, trouble: Behaviour, caplog: pytest.LogCaptureFixture
) -> None:
    use(urza, cache, "first", artifact.id[:14])
    with (
        BrokenServer(trouble) as server,
        source_at(server.url, cache) as source,
    ):
        for reference in ("first", artifact.id[:14], artifact.id):
            assert source.resolve(reference) == artifact.id
        assert f"'first' is taken for {artifact.id}, as it was before" in caplog.text
        assert source.fetch(artifact.id).data == artifact.data
        assert source.attachment(artifact.id, "a-target") is None
        with pytest.raises(KernelSourceError, match=f"'second' is not in {cache} either"):
            source.resolve("second")
        with pytest.raises(KernelSourceError, match=f"kernel {'0' * 64} is not in {cache} either") as caught:
            source.fetch("0" * 64)
        assert not isinstance(caught.value, UnknownKernelError)


@pytest.mark.parametrize(
    "refusal", [problem(401, "unauthorised"), problem(403, "forbidden"), answer(200, b"<html>", "text/html")]
)
def test_a_refusal_is_not_taken_for_trouble(
    urza: RunningUrza, cache: Path, artifact: Artifact, refusal: Behaviour
) -> None:
    use(urza, cache, "first")
    with BrokenServer(refusal) as server, source_at(server.url, cache) as source, pytest.raises(KernelSourceError):
        source.resolve("first")


def test_a_name_that_was_given_up_is_not_loaded_from_the_disk(
    urza: RunningUrza, cache: Path, artifact: Artifact
) -> None:
    use(urza, cache, "first")
    with (
        BrokenServer(problem(404, "unknown-kernel", "no kernel is called so")) as server,
        source_at(server.url, cache) as source,
        pytest.raises(UnknownKernelError),
    ):
        source.resolve("first")


def test_offline_nothing_is_asked(urza: RunningUrza, cache: Path, artifact: Artifact) -> None:
    use(urza, cache, "first")
    with (
        counted(urza) as server,
        source_at(server.url, cache, offline=True) as source,
    ):
        assert source.resolve("first") == artifact.id
        assert source.fetch(source.resolve(artifact.id)).data == artifact.data
        assert source.attachment(artifact.id, "a-target") is None
        with pytest.raises(KernelSourceError, match=r"urza\.client\.offline is set.*'second' is not in"):
            source.resolve("second")
        with pytest.raises(KernelSourceError, match=r"urza\.client\.offline is set"):
            source.fetch("0" * 64)
        outcomes = source.prefetch(["first", "second"])
        assert outcomes["first"] == artifact.id
        assert isinstance(outcomes["second"], KernelSourceError)
        assert server.requests == []


# -- attachments -------------------------------------------------------------------------------------------------------

TARGET = Target.current()


def test_an_attachment_is_sent_once_and_replaced_by_a_newer_one(
    store: UrzaStore, urza: RunningUrza, cache: Path, artifact: Artifact
) -> None:
    old, new = (Attachment.create(artifact.id, TARGET, payload, KEY) for payload in (b"old" * 1000, b"new" * 1000))
    store.kernels.add_attachment(old)
    with counted(urza) as server, source_at(server.url, cache) as source:
        for _ in range(3):
            assert source.attachment(artifact.id, TARGET.key) == old.pack()
        sent = [request.headers.get("if-none-match") for request in server.requests]
        assert sent[0] is None
        assert sent[1] == sent[2] is not None
        store.kernels.add_attachment(new)
        assert source.attachment(artifact.id, TARGET.key) == new.pack()
        assert source.attachment(artifact.id, "another") is None
    with source_at(urza.url, cache, offline=True) as source:
        assert source.attachment(artifact.id, TARGET.key) == new.pack()
        assert source.attachment(artifact.id, "another") is None


# -- prefetch ----------------------------------------------------------------------------------------------------------


def test_prefetched_kernels_load_without_urza(store: UrzaStore, cache: Path, artifact: Artifact) -> None:
    others = [add_kernel(store, blueprint(seed), f"kernel-{seed}", key=KEY)[0] for seed in range(2, 14)]
    attachment = Attachment.create(artifact.id, TARGET, b"machine code", KEY)
    store.kernels.add_attachment(attachment)
    names = ["first", *(f"kernel-{seed}" for seed in range(2, 14))]
    with RunningUrza(store) as urza, counted(urza) as server, source_at(server.url, cache) as source:
        outcomes = source.prefetch([*names, "first", "no-such", "0" * 64], TARGET.key)
        assert list(outcomes) == [*names, "no-such", "0" * 64]
        assert [outcomes[name] for name in names] == [artifact.id, *(each.id for each in others)]
        assert isinstance(outcomes["no-such"], UnknownKernelError)
        assert isinstance(outcomes["0" * 64], UnknownKernelError)
        count = len(server.requests)
        assert source.prefetch([each.id for each in others]) == {each.id: each.id for each in others}
        assert len(server.requests) == count, "they are there already"
    with source_at("http://127.0.0.1:1", cache, offline=True) as source:
        for name, each in zip(names, [artifact, *others], strict=True):
            assert source.fetch(source.resolve(name)).data == each.data
        assert source.attachment(artifact.id, TARGET.key) == attachment.pack()


def test_a_kernel_that_cannot_be_kept_is_not_said_to_be_there(
    urza: RunningUrza, cache: Path, artifact: Artifact
) -> None:
    with source_at(urza.url, cache, cache_mb=100 / 2**20) as source:
        (outcome,) = source.prefetch(["first"]).values()
        assert isinstance(outcome, KernelSourceError)
        assert "urza.client.cache_mb" in str(outcome)
        assert source.fetch(artifact.id).data == artifact.data


def test_prefetching_nothing(cache: Path) -> None:
    with source_at("http://127.0.0.1:1", cache) as source:
        assert source.prefetch([]) == {}


# -- a model -----------------------------------------------------------------------------------------------------------


def test_a_model_loads_a_kernel_by_name_and_again_without_urza(
    store: UrzaStore, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    artifact, _ = add_kernel(store, Blueprint.bottleneck(8, 8, 2, start="kaiming", seed=5), "narrow", key=KEY)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    with RunningUrza(store, settings(port=0)) as urza:
        config = _config(urza.url, tmp_path, cache)
        first = _output_with(config, model, x, "narrow")
    again = _output_with(config, model, x, "narrow")
    assert torch.equal(first, again)
    assert not torch.allclose(first, model(x))
    assert torch.equal(_output_with(config, model, x, artifact.id), first)
    assert "as it was before" in caplog.text


def test_a_model_takes_no_kernel_that_a_stranger_has_put_into_urza(
    store: UrzaStore, tmp_path: Path, cache: Path
) -> None:
    add_kernel(store, Blueprint.bottleneck(8, 8, 2, seed=6), "strange", key=SigningKey.generate())
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(3, 8)
    with RunningUrza(store, settings(port=0)) as urza:
        config = _config(urza.url, tmp_path, cache)
        with Platform.connect(config) as platform:
            wrapped = esper.wrap(model, platform=platform, telemetry_enabled=False)
            assert not asyncio.run(wrapped.load_kernel("0", 0, "strange"))
            layer = wrapped.kasmina_layers["0"]
            assert "not trusted" in layer.seed_errors[0]
            assert layer.state.lifecycle(0).name == "ERROR_RECOVERY"
            assert torch.equal(wrapped(x), model(x))


@pytest.mark.parametrize(
    "trouble",
    [
        hang_up,
        silence,
        answer(500, b"{}"),
        answer(200, b"x" * 1000, "application/octet-stream", cut=500),
        answer(200, b"x" * 1000, "application/octet-stream"),
    ],
    ids=["down", "slow", "500", "truncated", "wrong bytes"],
)
@pytest.mark.parametrize("knows", [True, False], ids=["at the content", "at once"])
def test_a_model_goes_on_as_it_was_when_urza_is_in_trouble(
    urza: RunningUrza, tmp_path: Path, cache: Path, artifact: Artifact, trouble: Behaviour, knows: bool
) -> None:
    """And loads the kernel when it is asked to again after that."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(3, 4)
    port = free_port()
    config = _config(f"http://127.0.0.1:{port}", tmp_path, cache, timeout=1)
    with Platform.connect(config) as platform:
        wrapped = esper.wrap(model, platform=platform, telemetry_enabled=False)
        layer = wrapped.kasmina_layers["0"]
        with BrokenServer(*[relay(urza.port)] * knows, trouble, port=port):
            assert not asyncio.run(wrapped.load_kernel("0", 0, "first"))
        assert layer.seed_errors[0]
        assert layer.state.lifecycle(0).name == "ERROR_RECOVERY"
        assert torch.equal(wrapped(x), model(x))
        with BrokenServer(relay(urza.port), port=port):
            assert asyncio.run(wrapped.load_kernel("0", 0, "first")), layer.seed_errors
    assert layer.state.lifecycle(0).name == "ACTIVE"


def _config(url: str, folder: Path, cache: Path, timeout: float = 30) -> EsperConfig:
    """Of a training job that trusts `KEY`."""
    return EsperConfig(
        environment="test",
        platform=PlatformConfig(root=folder / "data", trusted_keys=(KEY.public_bytes.hex(),)),
        urza=client_settings(url, cache_folder=cache, timeout=timeout, retries=1),
    )


def _output_with(config: EsperConfig, model: nn.Module, x: torch.Tensor, reference: str) -> torch.Tensor:
    """In a platform of its own, as another training job would have it."""
    with Platform.connect(config) as platform:
        wrapped = esper.wrap(model, platform=platform, telemetry_enabled=False)
        assert asyncio.run(wrapped.load_kernel("0", 0, reference)), wrapped.kasmina_layers["0"].seed_errors
        output: torch.Tensor = wrapped(x).detach()
        return output
