"""A store in a folder of its own, others on PostgreSQL, and Urza over them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from esper.services.urza import UrzaStore
from tests.services.postgres import Postgres
from tests.services.urza_server import RunningUrza


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[UrzaStore]:
    with UrzaStore.in_folder(folder) as store:
        yield store


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def any_store(request: pytest.FixtureRequest, folder: Path) -> Iterator[UrzaStore]:
    """A store with its tables in SQLite, and one with its tables in PostgreSQL."""
    if request.param == "sqlite":
        opened = UrzaStore.in_folder(folder)
    else:
        url = request.getfixturevalue("postgres").new_database()
        opened = UrzaStore(url, folder / "blobs")
    with opened:
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
