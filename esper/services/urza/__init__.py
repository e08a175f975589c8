"""Urza stores blueprints and artifacts: tables in a database, content in a blob store."""

from esper.services.urza.storage.store import UrzaStore

__all__ = ["UrzaStore"]
