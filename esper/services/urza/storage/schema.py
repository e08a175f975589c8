"""Migration of a database to this version's tables, or its refusal, untouched."""

from __future__ import annotations

import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from esper.services.errors import StoreSchemaError
from esper.services.urza.storage.database import Database

__all__ = ["prepare"]

_VERSION_TABLE = "alembic_version"
_LOCK = 0x4553504D  # "ESPM"; a number that nothing else in this database locks
_alembic = threading.Lock()  # alembic's `context` and `op` are global to the process


def prepare(database: Database) -> str:
    """Run the migrations that are missing, all or none, and return the schema's version.

    Raises :class:`StoreSchemaError` if the tables are newer than this code or not Esper's; nothing is changed then.
    """
    with _alembic:
        config = _config()
        scripts = ScriptDirectory.from_config(config)
        head = str(scripts.get_current_head())
        known = {script.revision for script in scripts.walk_revisions()}
        with database.reading() as session:
            version = _version(session.connection(), known, database)
        if version == head:
            return head
        if database.is_sqlite and version is None:
            database.use_write_ahead_log()
        with database.connection() as connection:
            if connection.dialect.name == "postgresql":  # SQLite's write lock is held by now
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            if _version(connection, known, database) != head:  # another process may have been faster
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
        return head


def _config() -> Config:
    config = Config()
    folder = str(Path(__file__).parent / "migrations")
    config.set_main_option("script_location", folder.replace("%", "%%"))
    return config


def _version(connection: Connection, known: set[str], database: Database) -> str | None:
    tables = set(inspect(connection).get_table_names())
    if not tables:
        return None
    if _VERSION_TABLE not in tables:
        raise StoreSchemaError(
            f"the database {database} holds tables that are not Esper's ({', '.join(sorted(tables)[:5])}); name another"
        )
    versions = set(connection.scalars(text(f"SELECT version_num FROM {_VERSION_TABLE}")))
    if not versions <= known:
        raise StoreSchemaError(
            f"the database {database} has schema {', '.join(sorted(versions))}, which this version of Esper does not "
            f"know (it knows up to {max(known)}); update esper-fx, or choose another root"
        )
    return max(versions, default=None)
