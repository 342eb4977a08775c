"""Freed memory is kept: counted in page faults, by processes of their own."""

import os
import subprocess
import sys

import pytest

from toolkit.pages import SAID

COUNT = """
import resource, sys
import torch
from toolkit.pages import keep_pages
is_kept = keep_pages() if sys.argv[1] == "keep" else False
def step():
    held = [torch.ones(1 << 22) for _ in range(4)]  # 16 MB each
    return len(held)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(is_kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def counted(how: str, **said: str) -> tuple[int, int]:
    """Whether pages are kept, and the faults of ten steps of 64 MB."""
    environment = {name: value for name, value in os.environ.items() if name not in SAID} | said
    command = [sys.executable, "-c", COUNT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    is_kept, faults = done.stdout.split()
    return int(is_kept), int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_blocks_are_not_faulted_in_again() -> None:
    assert counted("leave")[1] > 1_000, "the C library keeps such blocks by itself: nothing to test"
    is_kept, faults = counted("keep")
    assert is_kept and faults < 100


@pytest.mark.parametrize("name", SAID[:3])
def test_what_the_environment_says_stands(name: str) -> None:
    assert counted("keep", **{name: "131072"})[0] == 0
