"""From the data section of a recipe to three sets of talk."""

import errno
import json
import random
from pathlib import Path
from typing import Any

import pytest

from toolkit.corpus import clean, near, store
from toolkit.corpus.gather import Corpus, gather
from toolkit.errors import DataError, MaltuError
from toolkit.recipe.model import Clean, Columns, Data, Labels

SYLLABLES = "가나다라마바사아자차하고노도로모보소오조기니디리미비시이지은는을를에서와과"
SHARED = Path(__file__).parents[3] / "shared" / "corpus"


def long_text(seed: int) -> str:
    rng = random.Random(seed)
    return " ".join("".join(rng.choices(SYLLABLES, k=3)) for _ in range(20))


def write(path: Path, *asked: str) -> str:
    rows = [{"prompt": text, "completion": "그래"} for text in asked]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def asked(part: Any) -> list[str]:
    return [talk.turns[0].content for talk in part]


def gathered(train: str, **data: Any) -> Corpus:
    return gather(Data(train=(train,), **data), 0, None)


def test_shares_are_taken_from_train(tmp_path: Path) -> None:
    corpus = gathered(write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(50))))
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (40, 5, 5)
    assert corpus.report.loaded == 50


def test_the_same_recipe_gives_the_same_corpus(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(50)))
    first, again = gathered(file), gathered(file)
    assert [list(part) for part in (first.train, first.valid, first.test)] == [
        list(part) for part in (again.train, again.valid, again.test)
    ]


def test_files_named_for_valid_and_test_are_taken_whole(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", "하나", "둘")
    valid, test = write(tmp_path / "b.jsonl", "셋"), write(tmp_path / "c.jsonl", "넷", "다섯")
    corpus = gathered(train, valid=(valid,), test=(test,))
    assert [asked(part) for part in (corpus.train, corpus.valid, corpus.test)] == [
        ["하나", "둘"],
        ["셋"],
        ["넷", "다섯"],
    ]


def test_what_is_held_out_is_dropped_from_train(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", "하나", "둘", long_text(1), long_text(2))
    test = write(tmp_path / "b.jsonl", "둘", long_text(1) + "요")
    corpus = gathered(train, valid=0.0, test=(test,))
    assert asked(corpus.train) == ["하나", long_text(2)]
    assert asked(corpus.test) == ["둘", long_text(1) + "요"]
    assert dict(corpus.report.dropped) == {"exact_duplicate": 1, "near_duplicate": 1}


def test_a_share_is_taken_from_train_beside_a_file(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(20)))
    corpus = gathered(train, valid=0.1, test=(write(tmp_path / "b.jsonl", "시험"),))
    assert (len(corpus.train), len(corpus.valid), asked(corpus.test)) == (18, 2, ["시험"])


def test_talks_much_alike_stay_on_one_side(tmp_path: Path) -> None:
    bases = [long_text(number) for number in range(100)]
    texts = bases + [text[:70] + long_text(1000 + number)[:10] for number, text in enumerate(bases)]
    corpus = gathered(write(tmp_path / "a.jsonl", *texts), clean=Clean(near_duplicates=None))
    side = {text: name for name in ("train", "valid", "test") for text in asked(getattr(corpus, name))}
    cluster = corpus.report.cluster.tolist()
    alike = [number for number in range(100) if cluster[number] == cluster[100 + number]]
    assert len(alike) > 80
    assert all(side[texts[number]] == side[texts[100 + number]] for number in alike)


def test_too_much_damage_is_an_error_with_reasons_and_remedies(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(18)), "", " ")
    with pytest.raises(DataError) as caught:
        gathered(file)
    said = str(caught.value)
    assert "2 of 20 conversations (10.0%) had to be dropped, more than 5.0%" in said
    assert "2 one_sided: no question with an answer after it; check the roles" in said
    assert f"such as {file}:19" in said


def test_damage_within_the_limit_is_no_error(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(19)), "")
    assert gathered(file).report.damaged == 1


def test_duplicates_are_no_damage(tmp_path: Path) -> None:
    corpus = gathered(write(tmp_path / "a.jsonl", *(f"{number % 5}번 질문" for number in range(50))))
    assert (corpus.report.kept, dict(corpus.report.dropped)) == (5, {"exact_duplicate": 45})


def test_one_row_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "하나")
    with pytest.raises(DataError, match="too little to hold out"):
        gathered(file)
    assert len(gathered(file, valid=0.0, test=0.0).train) == 1


def test_a_valid_file_without_anything_left_is_an_error(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.jsonl", "하나"), write(tmp_path / "b.jsonl", "둘")
    with pytest.raises(DataError, match=r"data\.valid: nothing is left of [^\n]*\n.* exact_duplicate"):
        gathered(train, valid=(write(tmp_path / "c.jsonl", "둘"),), test=(test,))


def test_train_whose_every_row_is_held_out_is_an_error(tmp_path: Path) -> None:
    train, test = write(tmp_path / "a.jsonl", "하나"), write(tmp_path / "b.jsonl", "하나")
    with pytest.raises(DataError, match=r"data\.train: nothing is left of [^\n]*\n.* 1 exact_duplicate"):
        gathered(train, valid=0.0, test=(test,))


def test_problems_of_all_files_come_together(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    with pytest.raises(DataError) as caught:
        gather(Data(train=(names[0],), valid=(names[1],), test=(names[2],)), 0, None)
    assert {problem.where for problem in caught.value.problems} == set(names)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_that_names_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(50)))
    monkeypatch.setattr(clean, "Spool", lambda folder: store.Spool(folder, 0))
    monkeypatch.setattr(store.tempfile, "TemporaryFile", lambda **_: open("/dev/full", "r+b", buffering=0))
    with pytest.raises(MaltuError, match="No space left on device") as caught:
        gather(Data(train=(file,)), 0, tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: temporary files")


def test_a_full_disk_is_met_before_signatures_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(near, "MEMORY_BYTES", 0)
    monkeypatch.setattr(near.os, "posix_fallocate", refuse, raising=False)
    with pytest.raises(MaltuError, match="No space left on device"):
        gather(Data(train=(write(tmp_path / "a.jsonl", "하나", "둘", "셋"),)), 0, tmp_path)


def test_shipped_names_are_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"maltu:talk/nowhere\.jsonl: there is no such file"):
        gathered("maltu:talk/nowhere.jsonl")


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/corpus")
def test_real_dialogues_are_kept_whole() -> None:
    files = tuple(str(SHARED / f"casual.{lang}.jsonl") for lang in ("ko", "en"))
    corpus = gather(Data(train=files), 0, None)
    assert (corpus.report.loaded, dict(corpus.report.dropped)) == (586, {})
    assert {talk.lang for talk in corpus.valid} == {"ko", "en"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/corpus")
def test_real_pairs_and_topics_are_read_by_column() -> None:
    pairs = gathered(str(SHARED / "register.ko.jsonl"), format=Columns(user="written", assistant="spoken"))
    topics = gathered(str(SHARED / "casual.ko.jsonl"), format=Columns(user="messages", assistant="topic"))
    assert pairs.report.kept == 350
    assert topics.train[0].turns[0].content.startswith("A: ")


def test_labels_are_gathered_by_share(tmp_path: Path) -> None:
    rows = [{"text": f"{number}번 영화", "label": number % 2} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    labels = Labels(text="text", label="label", names={"0": "부정", "1": "긍정"})
    corpus = gathered(str(tmp_path / "a.jsonl"), format=labels, valid=0.2, test=0.0)
    assert [talk.label for talk in corpus.valid].count("긍정") == 4


def test_held_out_talk_keeps_the_file_that_it_was_drawn_from(tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(30)))
    second = write(tmp_path / "b.jsonl", *(f"{number}번째 이야기" for number in range(30)))
    corpus = gather(Data(train=(first, second)), 0, None)
    for part, entry in (
        (corpus.train, corpus.entry),
        (corpus.valid, corpus.entry_valid),
        (corpus.test, corpus.entry_test),
    ):
        assert len(part) == len(entry) > 0
        assert entry.tolist() == ["이야기" in text for text in asked(part)]
    assert set(corpus.entry_valid.tolist()) == {0, 1}


def test_talk_of_a_file_named_for_valid_or_test_was_drawn_from_nowhere(tmp_path: Path) -> None:
    train = write(tmp_path / "a.jsonl", *(f"{number}번 질문" for number in range(20)))
    held = write(tmp_path / "b.jsonl", "시험", "또 시험")
    corpus = gather(Data(train=(train,), valid=0.1, test=(held,)), 0, None)
    assert (corpus.entry_valid.tolist(), corpus.entry_test.tolist()) == ([0, 0], [-1, -1])
    assert corpus.entry.tolist() == [0] * 18


def test_each_expert_s_share_of_one_split_is_found_again(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{i}.jsonl", *(f"{i} {number}번 질문" for number in range(40))) for i in range(3)]
    whole = gather(Data(train=tuple(names)), 0, None)
    held = {text for part in (whole.valid, whole.test) for text in asked(part)}
    for place in range(3):
        learned = [text for text, own in zip(asked(whole.train), whole.entry, strict=True) if own == place]
        assert learned and not held & set(learned) and all(text.startswith(f"{place} ") for text in learned)
