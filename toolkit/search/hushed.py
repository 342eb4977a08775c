"""Optuna kept quiet while it works: its notes on experimental features and its log do not reach the user."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna

LOGS = ("alembic", "sqlalchemy")


@contextmanager
def hushed() -> Iterator[None]:
    """Within, Optuna and what it stores with say nothing; what fails still raises."""
    verbosity = optuna.logging.get_verbosity()
    levels = {name: logging.getLogger(name).level for name in LOGS}
    optuna.logging.set_verbosity(logging.CRITICAL)
    for name in LOGS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
