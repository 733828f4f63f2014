"""Alembic's entry point: runs on the connection that `gateway.database` hands over, in its transaction."""

from alembic import context

from adapter_store.catalog import metadata

context.configure(connection=context.config.attributes["connection"], target_metadata=metadata)
with context.begin_transaction():
    context.run_migrations()
