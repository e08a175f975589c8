"""A PostgreSQL server from PyPI (pgserver), one for the test process, and a database of its own for each test."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pgserver  # type: ignore[import-untyped]  # pgserver ships no types
import psycopg
from sqlalchemy import make_url

from esper.services.urza import UrzaStore

__all__ = ["Postgres", "forget_quickly"]


def forget_quickly(uri: str) -> None:
    """Have a server, whose data nobody needs after it has ended, not wait for its disk: ending it takes long else."""
    with psycopg.connect(uri, autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET fsync = off")
        connection.execute("SELECT pg_reload_conf()")


class Postgres:
    """A running server. `close` ends it and removes its files."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="esper-postgres-")
        Path(self._folder.name).chmod(0o755)  # pgserver runs it as a user of its own where the tests are root's
        self._server = pgserver.get_server(Path(self._folder.name) / "data", cleanup_mode="stop")
        forget_quickly(self._server.get_uri())
        self._numbers = itertools.count()
        self._tables: str | None = None

    def new_database(self, template: str = "template1") -> str:
        """The URL of an empty database, or of a copy of another one that nobody is connected to."""
        name = f"esper_{next(self._numbers)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        url = make_url(self._server.get_uri()).set(drivername="postgresql", database=name)
        return url.render_as_string(hide_password=False)

    def new_store(self) -> str:
        """The URL of a database with a store's tables, which are empty: a copy, since migrations take longer."""
        if self._tables is None:
            url = self.new_database()
            with tempfile.TemporaryDirectory() as blobs, UrzaStore(url, blobs):
                self._tables = str(make_url(url).database)
        return self.new_database(self._tables)

    def close(self) -> None:
        """End the server."""
        self._server.cleanup()
        self._folder.cleanup()
