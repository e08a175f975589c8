"""A PostgreSQL server from PyPI (pgserver), one for the test process, and a database of its own for each test."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import pgserver  # type: ignore[import-untyped]  # pgserver ships no types
import psycopg
from sqlalchemy import make_url

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

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"esper_{next(self._numbers)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        url = make_url(self._server.get_uri()).set(drivername="postgresql", database=name)
        return url.render_as_string(hide_password=False)

    def close(self) -> None:
        """End the server."""
        self._server.cleanup()
        self._folder.cleanup()
