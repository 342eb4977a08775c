"""Freed memory is kept: counted in page faults, by processes of their own."""

import os
import subprocess
import sys

import pytest

from toolkit import pages
from toolkit.pages import SAID

COUNT = """
import resource, sys
import torch
from toolkit.pages import keep_pages
is_kept = keep_pages() if sys.argv[1] == "keep" else False
def step():
    held = [torch.ones(12 << 20) for _ in range(2)]  # 48 MB each: more than glibc ever keeps by itself
    return len(held)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(is_kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def counted(how: str, **said: str) -> tuple[int, int]:
    """Whether pages are kept, and the faults of ten steps of 96 MB."""
    environment = {name: value for name, value in os.environ.items() if name not in SAID} | said
    command = [sys.executable, "-c", COUNT, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    is_kept, faults = done.stdout.split()
    return int(is_kept), int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_large_blocks_are_not_faulted_in_again() -> None:
    every_step = counted("leave")[1]
    assert every_step > 100_000, "the C library keeps such blocks by itself: nothing to test"
    tries = [counted("keep") for _ in range(3)]  # a system that is short of memory takes some back at times
    assert all(is_kept for is_kept, _ in tries) and min(faults for _, faults in tries) < every_step / 4


@pytest.mark.parametrize("name", SAID[:3])
def test_what_the_environment_says_stands(name: str) -> None:
    assert counted("keep", **{name: "131072"})[0] == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
@pytest.mark.parametrize(("most", "is_kept", "asked"), [(1 << 40, True, 3), (32 << 20, True, 4), (0, False, 2)])
def test_a_c_library_that_allows_less_is_asked_for_less_or_left_alone(
    monkeypatch: pytest.MonkeyPatch, most: int, is_kept: bool, asked: int
) -> None:
    said: list[int] = []

    def mallopt(what: int, n_bytes: int) -> int:
        said.append(what)
        return int(what != pages.MMAP_THRESHOLD or n_bytes <= most)

    monkeypatch.setattr(pages, "_mallopt", lambda: mallopt)
    for name in SAID:
        monkeypatch.delenv(name, raising=False)
    assert pages.keep_pages() is is_kept and len(said) == asked
