"""Where Urza keeps its data in the golden path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pgserver

from tests.services.postgres import forget_quickly
from tests.services.s3_server import s3_server

__all__ = ["BACKENDS", "settings_of"]

BACKENDS = ("sqlite and folders", "postgresql and s3")


@contextmanager
def settings_of(backend: str, folder: Path) -> Iterator[Mapping[str, str]]:
    """Environment variables; servers run for as long as the block does."""
    if backend == "sqlite and folders":
        yield {}
        return
    database = pgserver.get_server(folder / "postgresql", cleanup_mode="delete")
    with database, s3_server() as s3:
        forget_quickly(database.get_uri())
        yield {"ESPER_DATABASE__URL": database.get_uri().replace("postgresql://", "postgresql+psycopg://"), **s3}
