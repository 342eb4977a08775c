"""Any file of texts and labels becomes prompts and words to answer with: its forms, what is missing, odd labels."""

import csv
import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.mini_world import base, renderer
from toolkit.corpus.gather import gather
from toolkit.corpus.load import load_talks
from toolkit.corpus.render import Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError
from toolkit.evaluate.classify import (
    classify,
    label_log_likelihoods,
    label_set,
    likeliest,
    measure_labels,
)
from toolkit.loaded import LoadedRun
from toolkit.recipe.model import Clean, Data, Labels
from toolkit.score import score

ROWS: list[dict[str, Any]] = [{"글": "재미있다", "답": 1}, {"글": "지루하다", "답": 0}, {"글": "또 볼래", "답": 1}]
NAMED = Labels(text="글", label="답", names={"0": "부정", "1": "긍정"}, template="{text}\n감정:")


def as_jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path = path.with_suffix(".jsonl")
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def as_csv(path: Path, rows: list[dict[str, Any]]) -> str:
    path = path.with_suffix(".csv")
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> str:
    path = path.with_suffix(".parquet")
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


FORMS = pytest.mark.parametrize("write", [as_jsonl, as_csv, as_parquet])
Write = Callable[[Path, list[dict[str, Any]]], str]


@FORMS
def test_every_form_gives_the_same_prompts_and_words(write: Write, tmp_path: Path) -> None:
    found = list(load_talks([write(tmp_path / "글", ROWS)], NAMED, None))
    assert [talk.label for talk in found] == ["긍정", "부정", "긍정"]
    assert [turn.content for turn in found[0].turns] == ["재미있다\n감정:", "긍정"]


@FORMS
def test_numbers_without_names_are_words(write: Write, tmp_path: Path) -> None:
    found = list(load_talks([write(tmp_path / "글", ROWS)], Labels(text="글", label="답"), None))
    assert [talk.label for talk in found] == ["1", "0", "1"] == [talk.turns[-1].content for talk in found]


@pytest.mark.parametrize(("write", "value"), [(as_jsonl, 1.0), (as_parquet, 1.0), (as_jsonl, True), (as_csv, " 1 ")])
def test_whole_numbers_truth_and_spaces_are_plain_words(write: Write, value: Any, tmp_path: Path) -> None:
    rows = [{"글": "재미있다", "답": value}]
    (found,) = load_talks([write(tmp_path / "글", rows)], Labels(text="글", label="답"), None)
    assert found.label == ("true" if value is True else "1")


@FORMS
def test_a_missing_label_is_named_with_its_row(write: Write, tmp_path: Path) -> None:
    rows = [*ROWS, {"글": "글쎄", "답": None}]
    file = write(tmp_path / "글", rows)
    with pytest.raises(DataError, match=r"글\.\w+:[45](.|\n)*답 is (empty: every row needs a label|null)"):
        list(load_talks([file], NAMED, None))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"글": "그저 그래", "답": 7}, "the label '7' is not one of data.format.names"),
        ({"글": "그저 그래", "답": 0.5}, "답 is a number, not text"),
        ({"글": "그저 그래"}, "has no '답'"),
        ({"글": "그저 그래", "답": ["부정", "긍정"]}, "답.0 is text, not a part"),
    ],
)
def test_a_label_that_is_none_says_what_is_wrong(row: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        list(load_talks([as_jsonl(tmp_path / "글", [ROWS[0], row])], NAMED, None))
    assert says in str(caught.value)


def test_a_label_in_two_forms_of_unicode_is_one_label(tmp_path: Path) -> None:
    apart = [{**row, "답": unicodedata.normalize("NFD", "긍정" if row["답"] else "부정")} for row in ROWS]
    plain = [{"글": f"{number}번 영화", "답": "긍정"} for number in range(3)]
    clean = Clean(near_duplicates=None)
    format = Labels(text="글", label="답")
    file = as_jsonl(tmp_path / "글", [*apart, *plain])
    corpus = gather(Data(train=(file,), valid=0, test=0, format=format, clean=clean), 0, None)
    assert label_set(tuple(corpus.train)) == ("긍정", "부정")
    assert all(talk.label == talk.turns[-1].content for talk in corpus.train)


ASKED = [(Turn("user", "이 영화 어땠어?"),), (Turn("user", "환불해 주세요"),)]


def test_a_label_that_begins_like_another_is_told_from_it() -> None:
    """Its end of turn is part of it: without that, 좋음 would be as likely as 좋음 아님 begins."""
    labels = ("좋음", "좋음 아님", "좋음 아님 몰라")
    found = classify(base(), renderer(), ASKED, labels)
    assert all(sum(of.values()) == pytest.approx(1.0) and len(set(of.values())) == 3 for of in found)
    ends = [renderer().training(Talk((*ASKED[0], Turn("assistant", label)), "x")).input_ids for label in labels]
    assert len({tuple(ids[-1:]) for ids in ends}) == 1


def test_many_labels_are_scored_as_each_is_alone() -> None:
    labels = [f"분류 {number}번" for number in range(60)]
    found = classify(base(), renderer(), ASKED, labels, batch_tokens=300)
    few = classify(base(), renderer(), ASKED, labels[7:9])
    for many, of in zip(found, few, strict=True):
        assert len(many) == 60 and sum(many.values()) == pytest.approx(1.0)
        assert many[labels[7]] / many[labels[8]] == pytest.approx(of[labels[7]] / of[labels[8]], rel=1e-3)
    talks = [Talk((*turns, Turn("assistant", "분류 3번")), "x", "분류 3번") for turns in ASKED]
    assert len(measure_labels(talks, found, labels)["confusion"]["rows"]) == 60


def test_a_label_that_the_base_cannot_spell_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    row = renderer().training(Talk((*ASKED[0], Turn("assistant", "긍정")), "x"))
    first = next(ids for ids, label in zip(row.input_ids, row.labels, strict=True) if label >= 0)
    monkeypatch.setattr(Renderer, "unknown_id", property(lambda self: first))
    with pytest.raises(DataError, match=r"label '긍정'(.|\n)*has signs that this base's tokenizer does not know"):
        classify(base(), renderer(), ASKED, ["부정", "긍정"])


def test_labels_that_the_base_spells_alike_are_refused() -> None:
    apart = unicodedata.normalize("NFD", "긍정")
    with pytest.raises(DataError, match="this base spells it like '긍정'"):
        classify(base(), renderer(), ASKED, ["긍정", "부정", apart])


def test_log_likelihoods_of_a_run_stand_in_the_order_asked_for() -> None:
    run: Any = type("Named", (), {"name": "말"})
    bare: Any = None
    loaded = LoadedRun(run, {}, bare, base(), renderer(), {}, frozenset(), ("가", "나 다"))
    talks = [Talk((*turns, Turn("assistant", "가")), "x", "가") for turns in ASKED]
    found = label_log_likelihoods(loaded, talks, ["나 다", "가"])
    assert found.shape == (2, 2) and found.dtype == torch.float64
    probabilities = classify(base(), renderer(), ASKED, ["나 다", "가"])
    assert found.softmax(-1).flatten().tolist() == pytest.approx([p for of in probabilities for p in of.values()])
    prompt = renderer().prompt(ASKED[0])
    ids = renderer().training(Talk((*ASKED[0], Turn("assistant", "나 다")), "x")).input_ids
    (values,) = score(base(), [(prompt, ids[len(prompt) :])])
    assert found[0, 0].item() == pytest.approx(sum(values) / len(values), rel=1e-5)
    assert likeliest(probabilities)[0] == ("나 다", "가")[int(found[0].argmax())]
    with pytest.raises(DataError, match="말: does not know 라"):
        label_log_likelihoods(loaded, talks, ["가", "나 다", "라"])
