"""How the store's layout came to be what it is, for alembic. A change of serve/store.py's tables is a version here."""
