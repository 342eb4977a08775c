"""The benchmark of the server: every part of it runs, on our own server, and what it compares is alike."""

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"
SVG = "{http://www.w3.org/2000/svg}"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve") / "그림"


@pytest.fixture(scope="module")
def said(folder: Path) -> str:
    words = [sys.executable, str(SCRIPT), "--tiny", "--contestants", "base", "adapters", "--plot", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_part_gives_its_figures(said: str) -> None:
    assert [line for line in said.splitlines() if re.fullmatch(r"spoken-mini [\w=]+", line)] == [
        f"spoken-mini {part}" for part in ("beside", "clients=1", "clients=4", "pause", "talk")
    ]
    for figure in ("tokens/s", "ratio", "the longest gap is longer by", "times as long", "read anew,"):
        assert figure in said


def test_nothing_failed_and_all_read_and_write_alike(said: str) -> None:
    assert not re.search("ERRORS|NEVER HAPPENED|NOT ALIKE|no answer|no talk", said), said


def test_a_turn_reads_what_is_new_alone_unless_its_history_is_read_anew(said: str) -> None:
    ends = re.search(r"turn 4: .* prompt (\d+) tokens, (\d+) of them new", said)
    anew = re.search(r"turn 4 with its history read anew: .*; (\d+) tokens new", said)
    assert ends and anew
    whole, new, cold = int(ends[1]), int(ends[2]), int(anew[1])
    assert new < whole / 2 < cold <= whole


def test_the_picture_is_one_for_light_and_dark_pages(said: str, folder: Path) -> None:
    picture = ET.parse(folder / "fifty_turns.svg").getroot()
    assert picture.tag == f"{SVG}svg" and picture.find(f"{SVG}title") is not None
    style = picture.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    assert len(picture.findall(f"{SVG}path[@class='line a']")) == 4  # two lines, and their two keys
    assert str(folder / "fifty_turns.svg") in said


def test_what_only_tries_does_not_draw_into_the_documentation() -> None:
    words = [sys.executable, str(SCRIPT), "--tiny", "--plot"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "name another folder" in done.stderr
