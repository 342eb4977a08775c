"""Memory of freed tensors stays with the process, ready for the next ones."""

import ctypes
import os
import sys

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # M_… of malloc.h, mallopt(3)
KEPT_BYTES = 1 << 30
GROWN_BYTES = 64 << 20
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
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    wanted = ((MMAP_THRESHOLD, KEPT_BYTES), (TRIM_THRESHOLD, KEPT_BYTES), (TOP_PAD, GROWN_BYTES))
    return all([mallopt(what, n_bytes) == 1 for what, n_bytes in wanted])
