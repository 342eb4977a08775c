"""Runs versions on the connection that serve/store.py opened; alembic loads this file, nothing imports it."""

from alembic import context

from serve.store import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, render_as_batch=True)
with context.begin_transaction():
    context.run_migrations()
