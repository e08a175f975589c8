"""A PostgreSQL server from PyPI (pgserver), one for the test process, and a database for each test, which is empty."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pgserver  # type: ignore[import-untyped]  # pgserver ships no types
import psycopg
from sqlalchemy import make_url

from esper.services.urza import UrzaStore
from esper.services.urza.storage.models import Base

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
        self._data = Path(self._folder.name) / "data"
        self._server = pgserver.get_server(self._data, cleanup_mode="stop")
        forget_quickly(self._server.get_uri())
        self._numbers = itertools.count()
        self._unused: list[str] = []

    def new_database(self) -> str:
        """The URL of an empty database."""
        name = f"esper_{next(self._numbers)}"
        with psycopg.connect(self._server.get_uri(), autocommit=True) as connection:
            connection.execute(f'CREATE DATABASE "{name}"')
        url = make_url(self._server.get_uri()).set(drivername="postgresql", database=name)
        return url.render_as_string(hide_password=False)

    @contextlib.contextmanager
    def store(self) -> Iterator[str]:
        """The URL of a database with a store's tables, which are empty: to make one takes longer than to empty it."""
        if not self._unused:
            with tempfile.TemporaryDirectory() as blobs, UrzaStore(url := self.new_database(), blobs):
                self._unused.append(url)
        url = self._unused.pop()
        yield url
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(f"TRUNCATE {', '.join(Base.metadata.tables)}")
        self._unused.append(url)

    def close(self) -> None:
        """End the server at once, without having it write down what nobody needs."""
        os.kill(int((self._data / "postmaster.pid").read_text().split()[0]), signal.SIGQUIT)
        self._server.cleanup()
        self._folder.cleanup()
