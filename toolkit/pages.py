"""Memory of freed tensors stays with the process, ready for the next ones."""

import ctypes
import os
import sys
from collections.abc import Callable

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # M_… of malloc.h, mallopt(3)
KEPT_BYTES = 1 << 30
GROWN_BYTES = 64 << 20
ALLOWED_BYTES = 32 << 20
SAID = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_pages() -> bool:
    """Ask the C library to keep the pages of large blocks that are freed. Returns whether it does so now.

    glibc gives blocks above some megabytes back to the system, and a training step's logits and activations are such
    blocks: every step would fault the same pages in again. Linux with glibc alone; elsewhere, and where the environment
    says how memory is to be had (mallopt's variables, GLIBC_TUNABLES, another allocator by LD_PRELOAD), nothing is
    changed. Cost: what the process once held stays with it until it ends.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in SAID):
        return False
    mallopt = _mallopt()
    if mallopt is None:
        return False
    # Older ones allow no more than 32 MB. Where neither does, the others would do harm: they freeze a low threshold.
    if not any(mallopt(MMAP_THRESHOLD, n_bytes) == 1 for n_bytes in (KEPT_BYTES, ALLOWED_BYTES)):
        return False
    return mallopt(TRIM_THRESHOLD, KEPT_BYTES) == 1 and mallopt(TOP_PAD, GROWN_BYTES) == 1


def _mallopt() -> Callable[[int, int], int] | None:
    """The C library's; musl has none."""
    found: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return found
