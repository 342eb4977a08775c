"""Talks read back from a file as they were put in, like from a list."""

import gc
import multiprocessing
import os
from pathlib import Path

import pytest

from toolkit.corpus.store import Spool, Talks
from toolkit.corpus.talk import Talk, Turn

TALKS = [
    Talk((Turn("user", f"{number}번\n\u2028줄"), Turn("assistant", "응 😀")), f"a.jsonl:{number}", None, "ko")
    for number in range(50)
]


def stored(memory_mb: float, folder: Path) -> Talks:
    spool = Spool(folder, memory_mb)
    for talk in TALKS:
        spool.add(talk)
    return spool.finish()


@pytest.mark.parametrize("memory_mb", [64, 0.01, 0])
def test_talks_read_back_equal(tmp_path: Path, memory_mb: float) -> None:
    talks = stored(memory_mb, tmp_path)
    assert talks.is_in_file == (memory_mb < 1)
    assert list(talks) == TALKS
    assert [talks[-1], talks[0], *talks[3:5]] == [TALKS[-1], TALKS[0], *TALKS[3:5]]


@pytest.mark.parametrize("memory_mb", [64, 0])
def test_selections_of_selections_are_views(tmp_path: Path, memory_mb: float) -> None:
    view = stored(memory_mb, tmp_path)[10:20].select([True, False] * 5).select([4, 0])
    assert list(view) == [TALKS[18], TALKS[10]]


def test_a_place_beyond_the_end_is_an_index_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        stored(0, tmp_path)[50]


def test_a_label_is_kept(tmp_path: Path) -> None:
    spool = Spool(tmp_path, 0)
    spool.add(Talk((Turn("text", "재밌다"),), "a.csv:2", "긍정", None))
    assert spool.finish()[0] == Talk((Turn("text", "재밌다"),), "a.csv:2", "긍정", None)


def test_the_file_has_no_name_and_closes_with_the_last_view(tmp_path: Path) -> None:
    talks = stored(0, tmp_path)
    assert list(tmp_path.iterdir()) == []
    view = talks[:1]
    del talks
    gc.collect()
    assert view[0] == TALKS[0]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # other tests may have started threads
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_reads_beside_its_parent(tmp_path: Path) -> None:
    talks = stored(0, tmp_path)
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def read() -> None:
        answers.put(all(list(talks) == TALKS for _ in range(200)))

    child = context.Process(target=read)
    child.start()
    assert all(list(talks) == TALKS for _ in range(200))
    child.join()
    assert child.exitcode == 0
    assert answers.get()
