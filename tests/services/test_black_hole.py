"""A store that takes every connection and says nothing: who trains does not notice, and what is here can be used."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest
from torch import nn

import esper
from esper import Blueprint, Platform
from esper.artifacts import Artifact, SigningKey, Target
from esper.configs import EsperConfig, PlatformConfig
from esper.services.errors import CompilationTimeoutError
from esper.services.urza import UrzaStore
from tests.services.broken_server import BrokenServer, client_settings, silence
from tests.services.shelf import add_kernel, blueprint
from tests.services.urza_server import RunningUrza

KEY = SigningKey.generate()
_PATIENT = 3600.0  # seconds that the client would wait


def _config(url: str, folder: Path) -> EsperConfig:
    return EsperConfig(
        urza=client_settings(url, cache_folder=folder / "cache", timeout=_PATIENT, retries=5),
        platform=PlatformConfig(root=folder / "data", trusted_keys=(KEY.public_bytes.hex(),)),
    )


def test_a_request_returns_and_its_future_fails_in_time(tmp_path: Path) -> None:
    with BrokenServer(silence) as server, Platform.connect(_config(server.url, tmp_path)) as platform:
        future = platform.request(Blueprint.affine(4, 4), timeout=0.5)
        with pytest.raises(CompilationTimeoutError, match=r"0\.5 s"):
            future.result(60)
        with pytest.raises(CompilationTimeoutError):
            platform.wait_sync("0" * 64, timeout=0.5)
        with pytest.raises(esper.EsperError, match="a str was submitted"):
            platform.request("no blueprint")  # type: ignore[arg-type]  # what is asked about


def test_a_request_to_a_locked_database_returns_and_its_future_fails_in_time(tmp_path: Path) -> None:
    with Platform.embedded(tmp_path) as platform:
        platform.store.blueprints.list()
        database = next(path for path in tmp_path.iterdir() if path.suffix in (".db", ".sqlite", ".sqlite3"))
        with sqlite3.connect(database) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            future = platform.request(Blueprint.affine(4, 4), timeout=0.5)
            with pytest.raises(CompilationTimeoutError):
                future.result(60)
            holder.rollback()


@pytest.mark.slow
def test_a_kernel_on_the_disk_loads(urza: RunningUrza, store: UrzaStore, tmp_path: Path) -> None:
    artifact: Artifact = add_kernel(store, blueprint(1), "first", key=KEY)[0]
    references = [artifact.id, artifact.id[:12], "first"]
    with Platform.connect(_config(urza.url, tmp_path)) as platform:
        platform.kernel_source.prefetch(references, Target.current("cpu").key)  # type: ignore[attr-defined]  # a remote one
    features = artifact.graph.in_features, artifact.graph.out_features
    with BrokenServer(silence) as server, Platform.connect(_config(server.url, tmp_path)) as platform:
        model = esper.wrap(nn.Sequential(nn.Linear(*features)), platform=platform)
        loads = [model.request_kernel("0", seed, reference) for seed, reference in enumerate(references)]
        assert [load.result(60) for load in loads] == [True] * 3, model.kasmina_layers["0"].seed_errors
    assert threading.active_count() < 40
