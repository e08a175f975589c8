"""Transactions on the database, with errors that say what to do. Knows nothing of the tables.

SQLite runs in write-ahead mode with a busy timeout, so any number of processes on one machine may use one file. A
transaction that writes takes SQLite's write lock at its start, so two never read the same state and then collide.
PostgreSQL waits for a lock as long as SQLite does.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as NoConnectionError
from sqlalchemy.orm import Session
from sqlalchemy.pool import ConnectionPoolEntry

from esper.forking import reset_after_fork
from esper.services.errors import (
    StoreBusyError,
    StoreCorruptError,
    StoreError,
    StoreFullError,
    StoreReadOnlyError,
)

__all__ = ["Database"]

_WRITES = "esper_writes"
_SQLITE_ERRORS: dict[int, tuple[type[StoreError], str]] = {
    sqlite3.SQLITE_READONLY: (StoreReadOnlyError, "is read-only; make the folder writable or choose another root"),
    sqlite3.SQLITE_CANTOPEN: (
        StoreReadOnlyError,
        "cannot be opened or created; make the folder writable or choose another root",
    ),
    sqlite3.SQLITE_FULL: (StoreFullError, "has no room left; free space on its disk or choose another root"),
    sqlite3.SQLITE_IOERR: (
        StoreFullError,
        "cannot be written any further; check free space, quota, file-size limit and health of its disk",
    ),
    sqlite3.SQLITE_BUSY: (StoreBusyError, "is held by another process; try again"),
    sqlite3.SQLITE_LOCKED: (StoreBusyError, "is held by another process; try again"),
    sqlite3.SQLITE_CORRUPT: (StoreCorruptError, "is damaged; restore it from a copy or choose another root"),
    sqlite3.SQLITE_NOTADB: (StoreCorruptError, "is not an SQLite database; choose another root"),
}
_BUSY = (StoreBusyError, "is held by others; try again")
_UNREACHABLE = (StoreBusyError, "cannot be reached, or is starting or stopping; see that it runs, and try again")
_SQLSTATES: dict[str, tuple[type[StoreError], str]] = {  # PostgreSQL's, by their beginnings
    "08": _UNREACHABLE,
    "57P": _UNREACHABLE,
    "53300": (StoreBusyError, "has no connection left; try again, or raise its max_connections"),
    "53100": (StoreFullError, "has no room left; free space on its disk"),
    "53": (StoreFullError, "has run out of a resource; see its log"),
    "25006": (StoreReadOnlyError, "is read-only; name its primary server"),
    "42501": (StoreReadOnlyError, "does not let this user do that; grant it the right to"),
    "40": _BUSY,
    "55P03": _BUSY,
    "57014": _BUSY,
    "XX001": (StoreCorruptError, "is damaged; restore it from a copy"),
    "XX002": (StoreCorruptError, "is damaged; restore it from a copy"),
}
_READ_FAILURES = {sqlite3.SQLITE_IOERR_READ, sqlite3.SQLITE_IOERR_SHORT_READ}


class Database:
    """Hands out transactions. Safe for threads, and for forked children, which get connections of their own."""

    def __init__(self, url: str | URL, *, busy_seconds: float = 30.0) -> None:
        """`url` is an SQLAlchemy URL; an SQLite file's folder is made if need be. Connects at the first transaction."""
        try:
            self._url = make_url(url)
        except ArgumentError as cause:
            raise StoreError("the database URL cannot be read; write for example sqlite:////folder/esper.db") from cause
        self._busy_seconds = busy_seconds
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        if self.is_sqlite:
            self._make_folder()
        self._engine = self._connect()
        self._inherited: list[Engine] = []
        reset_after_fork(self)

    def __str__(self) -> str:
        return self._url.render_as_string(hide_password=True)

    def after_fork(self) -> None:
        """Forget the parent's connections without closing them; see `esper.forking`."""
        self._inherited.append(self._engine)  # kept, so that no finaliser runs on a connection that is the parent's
        self._engine = self._connect()

    def close(self) -> None:
        """Close idle connections. A later transaction opens new ones."""
        self._engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session whose reads see one state of the database. Raises :class:`StoreError`."""
        with self._errors(), Session(self._engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """A session that is committed at the end, and rolled back on any error. Raises :class:`StoreError`.

        Its transaction has begun when the block does: on SQLite it holds the write lock then.
        """
        with (
            self._errors(),
            Session(self._engine.execution_options(**{_WRITES: True}), expire_on_commit=False) as session,
            session.begin(),
        ):
            session.connection()
            yield session

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """One connection in a writing transaction, for migrations."""
        with self._errors(), self._engine.execution_options(**{_WRITES: True}).begin() as connection:
            yield connection

    def use_write_ahead_log(self) -> None:
        """Switch an SQLite file to write-ahead mode, which it then stays in."""
        with self._errors():
            connection = sqlite3.connect(str(self._url.database), timeout=self._busy_seconds, isolation_level=None)
            try:
                connection.execute("PRAGMA journal_mode=WAL")
            finally:
                connection.close()

    def _make_folder(self) -> None:
        database = self._url.database
        if not database or database == ":memory:" or database.startswith("file:"):
            raise StoreError(
                "the store needs an SQLite file, which several processes can share: sqlite:////folder/name"
            )
        folder = Path(database).parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as cause:
            raise StoreReadOnlyError(
                f"the store's folder {folder} cannot be made ({cause.strerror}); choose another root"
            ) from cause

    def _connect(self) -> Engine:
        if not self.is_sqlite:
            return self._connect_to_server()
        engine = create_engine(self._url, connect_args={"timeout": self._busy_seconds, "check_same_thread": False})
        event.listen(engine, "connect", _prepare_connection)
        event.listen(engine, "begin", _begin)
        return engine

    def _connect_to_server(self) -> Engine:
        if self._url.drivername in ("postgresql", "postgres"):
            self._url = self._url.set(drivername="postgresql+psycopg")  # the driver that Esper depends on
        limits: dict[str, object] = {}
        if self._url.get_backend_name() == "postgresql":
            limits = {
                "connect_timeout": max(2, math.ceil(self._busy_seconds)),  # libpq takes 1 for 2
                "options": f"-c lock_timeout={math.ceil(self._busy_seconds * 1000)}",
            }
        return create_engine(self._url, pool_pre_ping=True, pool_timeout=self._busy_seconds, connect_args=limits)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except IntegrityError:
            raise
        except DBAPIError as cause:
            raise self._translated(cause.orig) from cause
        except NoConnectionError as cause:
            raise StoreBusyError(f"too many threads use the database {self} at once ({cause}); try again") from cause
        except sqlite3.Error as cause:
            raise self._translated(cause) from cause

    def _translated(self, error: BaseException | None) -> StoreError:
        if not self.is_sqlite:
            kind, remedy = _of_sqlstate(getattr(error, "sqlstate", None), error)
            return kind(f"the database {self} {remedy} ({str(error).strip()})")
        code = getattr(error, "sqlite_errorcode", None)
        kind, remedy = _SQLITE_ERRORS.get((code or 0) & 0xFF, (StoreError, "failed"))
        if code in _READ_FAILURES:
            kind, remedy = StoreCorruptError, "cannot be read; check the health of its disk"
        return kind(f"the database {self} {remedy} ({error})")


def _of_sqlstate(state: str | None, error: BaseException | None) -> tuple[type[StoreError], str]:
    if state is None:  # the driver's own: there is no connection, or a value that it cannot send
        is_connection = type(error).__name__ in ("OperationalError", "ConnectionTimeout")
        return _UNREACHABLE if is_connection else (StoreError, "failed")
    for length in (5, 3, 2):
        if state[:length] in _SQLSTATES:
            return _SQLSTATES[state[:length]]
    return StoreError, "failed"


def _prepare_connection(connection: DBAPIConnection, _entry: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # sqlite3's: we send BEGIN ourselves
    connection.execute("PRAGMA foreign_keys=ON")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
