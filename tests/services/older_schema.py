"""A database as an earlier version of Esper left it."""

from __future__ import annotations

from alembic import command

from esper.services.urza import UrzaStore
from esper.services.urza.storage import schema

__all__ = ["as_left_by"]


def as_left_by(revision: str, store: UrzaStore) -> None:
    """Take the tables of `store` back to those of `revision`, with what is in them; `schema.prepare` brings them up."""
    config = schema._config()
    with store.database.connection() as connection:
        config.attributes["connection"] = connection
        command.downgrade(config, revision)
