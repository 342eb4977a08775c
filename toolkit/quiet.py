"""Third-party chatter kept off the terminal while a run speaks for itself; errors still raise."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

CHATTY = ("accelerate", "bitsandbytes", "datasets", "peft", "torch.distributed", "trl")


@contextmanager
def quiet() -> Iterator[None]:
    """Within, the libraries below say only errors, and draw no progress bars."""
    from transformers.utils import logging as transformers_logging

    notes: Any = transformers_logging  # its functions are not typed
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    levels = {name: logging.getLogger(name).level for name in CHATTY}
    verbosity = notes.get_verbosity()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # read when datasets is imported
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "bitsandbytes" else logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        notes.set_verbosity(verbosity)
        notes.enable_progress_bar()
