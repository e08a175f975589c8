"""Run by Alembic: applies migrations on the connection that `esper.services.urza.storage.schema` hands over."""

from alembic import context

from esper.services.urza.storage.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    transactional_ddl=True,  # also on SQLite, where we send BEGIN ourselves
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
