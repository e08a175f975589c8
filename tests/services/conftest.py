"""A store in a folder of its own, others on PostgreSQL, and Urza over them."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.services.stores import Store
from esper.services.urza import UrzaStore
from tests.services.postgres import Postgres
from tests.services.remote_stores import remote_of
from tests.services.s3_server import BUCKET, s3_server
from tests.services.urza_server import RunningUrza


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="session")
def _empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store without content, to be copied: migrations take longer."""
    folder = tmp_path_factory.mktemp("empty") / "store"
    with UrzaStore.in_folder(folder):
        return folder


@pytest.fixture
def store(folder: Path, _empty_store: Path) -> Iterator[UrzaStore]:
    shutil.copytree(_empty_store, folder)
    with UrzaStore.in_folder(folder) as store:
        yield store


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of a bucket of an S3 server, which the environment leads to."""
    with s3_server() as environment, pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            if name.startswith("AWS_"):
                patch.setenv(name, value)
        yield f"s3://{BUCKET}"


@pytest.fixture(params=["sqlite", "postgresql"])
def any_store(request: pytest.FixtureRequest, folder: Path) -> Iterator[UrzaStore]:
    """A store with its tables in SQLite, and one with its tables in PostgreSQL."""
    if request.param == "sqlite":
        yield request.getfixturevalue("store")
        return
    with request.getfixturevalue("postgres").store() as url, UrzaStore(url, folder / "blobs") as opened:
        yield opened


@pytest.fixture
def s3_store(postgres: Postgres, s3: str) -> Iterator[UrzaStore]:
    """A store with its tables in PostgreSQL and its blobs in S3."""
    with postgres.store() as url, UrzaStore(url, f"{s3}/{uuid.uuid4().hex}") as opened:
        yield opened


@pytest.fixture
def urza(store: UrzaStore) -> Iterator[RunningUrza]:
    """Urza without tokens, over SQLite."""
    with RunningUrza(store) as running:
        yield running


@pytest.fixture
def any_urza(any_store: UrzaStore) -> Iterator[RunningUrza]:
    """Urza without tokens, over SQLite, and over PostgreSQL."""
    with RunningUrza(any_store) as running:
        yield running


@pytest.fixture(params=["here", "over HTTP"])
def either(request: pytest.FixtureRequest, folder: Path) -> Iterator[Store]:
    """A store in SQLite, and the client of one in PostgreSQL: whatever a store does, both do."""
    if request.param == "here":
        yield request.getfixturevalue("store")
        return
    with (
        request.getfixturevalue("postgres").store() as url,
        UrzaStore(url, folder / "blobs") as store,
        RunningUrza(store) as urza,
    ):
        remote = remote_of(urza)
        yield remote
        remote.close()
