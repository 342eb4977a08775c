"""`init`: files are looked at, questions asked, a recipe written that runs as it stands; nothing is overwritten."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit import start
from toolkit.bases.catalog import BASES
from toolkit.errors import DataError, RecipeError
from toolkit.recipe.model import Base, Columns, Labels, Lora, Recipe
from toolkit.recipe.read import read_recipe

KOREAN = {"messages": [{"role": "user", "content": "오늘 뭐 먹지?"}, {"role": "assistant", "content": "라면 어때"}]}
ENGLISH = {"messages": [{"role": "user", "content": "what's for lunch?"}, {"role": "assistant", "content": "Soup."}]}

Init = Callable[..., Recipe]


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Init:
    """Call `init` in a folder of its own and read what it wrote."""
    monkeypatch.chdir(tmp_path)

    def call(*words: str) -> Recipe:
        parser = argparse.ArgumentParser()
        start.add_arguments(parser)
        arguments = parser.parse_args(words)
        before = set(tmp_path.iterdir())
        assert start.init(arguments) == 0
        (written,) = set(tmp_path.iterdir()) - before
        return read_recipe(written.relative_to(tmp_path))

    return call


def rows(name: str, *values: object) -> str:
    Path(name).write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return name


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> list[str]:
    """Answer the questions from a terminal that is none; the questions asked are returned."""
    asked: list[str] = []
    left = iter(lines)

    def answer(prompt: str) -> str:
        asked.append(prompt)
        try:
            return next(left)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    return asked


def test_a_dialogue_file_becomes_a_recipe_that_is_right(init: Init) -> None:
    recipe = init(rows("친구.ko.jsonl", KOREAN), "--yes")
    assert (recipe.name, recipe.task, recipe.data.train, recipe.data.format) == (
        "친구",
        "chat",
        ("친구.ko.jsonl",),
        "auto",
    )
    assert recipe.base == Base(model="spoken-mini") and recipe.adapter == Lora()


def test_comments_are_in_the_language_of_the_talk(init: Init) -> None:
    init(rows("k.jsonl", KOREAN), "--yes")
    init(rows("e.jsonl", ENGLISH), "--yes")
    assert "데이터를 몇 번 도는지" in Path("k.yaml").read_text(encoding="utf-8")
    assert "passes over the talk" in Path("e.yaml").read_text(encoding="utf-8")


def test_columns_that_look_like_a_question_are_named_in_the_recipe(init: Init) -> None:
    recipe = init(rows("q.jsonl", {"question": "뭐해", "answer": "자"}), "--yes")
    assert recipe.data.format == Columns(user="question", assistant="answer")


def test_labels_become_a_classify_recipe(init: Init) -> None:
    recipe = init(rows("l.jsonl", {"text": "좋아요", "label": 1}), "--yes")
    assert recipe.task == "classify" and recipe.data.format == Labels(text="text", label="label")
    assert "macro_f1" in recipe.evaluate.metrics


def test_columns_may_be_named_by_flags(init: Init) -> None:
    recipe = init(rows("n.jsonl", {"물음": "뭐해", "no": "자: 응"}), "--user", "물음", "--assistant", "no", "--yes")
    assert recipe.data.format == Columns(user="물음", assistant="no")


def test_flags_answer_every_question(init: Init) -> None:
    recipe = init(
        rows("a.jsonl", ENGLISH),
        "--name",
        "mine",
        "--language",
        "both",
        "--base",
        "Qwen/Qwen3-0.6B",
        "--device",
        "cuda",
        "--out",
        "other.yaml",
    )
    assert recipe.name == "mine" and recipe.base == Base(model="Qwen/Qwen3-0.6B", quantize="none")
    assert "nf4" in Path("other.yaml").read_text(encoding="utf-8")


def test_questions_are_asked_until_they_are_answered(
    init: Init, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = answers(monkeypatch, "한국말", "ko", "qwen3-0.6b", "cuda")
    recipe = init(rows("a.jsonl", ENGLISH))
    assert recipe.base == Base(model="qwen3-0.6b")
    assert [question.split(" [")[0] for question in asked] == [
        "Language of the talk",
        "Language of the talk",
        "Base",
        "What will train it",
    ]
    told = capsys.readouterr().out
    assert "One of ko, en, both." in told and "spoken-mini" in told and "NOT commercial" in told


def test_the_end_of_the_input_takes_the_defaults(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch)
    assert init(rows("a.jsonl", KOREAN)).base == Base(model="spoken-mini")


def test_nothing_is_asked_where_nobody_sits(init: Init, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answers(monkeypatch, "ko")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)
    init(rows("a.jsonl", KOREAN))
    assert asked == []


def test_a_recipe_that_is_there_is_left_as_it_is(init: Init) -> None:
    rows("a.jsonl", KOREAN)
    Path("a.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match="is there already and is left as it is"):
        init("a.jsonl", "--yes")
    assert Path("a.yaml").read_text(encoding="utf-8") == "mine"


def test_a_place_that_cannot_be_written_is_told(init: Init) -> None:
    with pytest.raises(RecipeError, match="cannot be written"):
        init(rows("a.jsonl", KOREAN), "--yes", "--out", "nowhere/a.yaml")


def test_nothing_is_written_for_a_recipe_that_would_not_run(init: Init, tmp_path: Path) -> None:
    rows("a.jsonl", KOREAN)
    for words in (["--name", "base"], ["--base", "qwen3-0.6"], ["--base", "./nowhere"]):
        with pytest.raises(RecipeError, match="not written"):
            init("a.jsonl", "--yes", *words)
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_every_file_that_is_no_talk_is_told(init: Init) -> None:
    rows("a.jsonl", {"foo": 1, "바": 2})
    with pytest.raises(DataError) as caught:
        init("a.jsonl", "gone.jsonl", "--yes")
    assert "no dialogue is seen in its columns (foo, 바)" in str(caught.value) and "gone.jsonl" in str(caught.value)


def test_files_of_different_shapes_are_refused_unless_each_is_sure(init: Init) -> None:
    mixed = init(rows("a.jsonl", KOREAN), rows("b.jsonl", {"text": "글"}), "--yes")
    assert mixed.data.format == "auto"
    with pytest.raises(DataError, match="rows of different shapes"):
        init(rows("c.jsonl", {"question": "a", "answer": "b"}), rows("d.jsonl", {"text": "x", "label": 1}), "--yes")


def test_one_column_alone_is_no_pair(init: Init) -> None:
    with pytest.raises(DataError, match="go together"):
        init(rows("a.jsonl", {"foo": "x"}), "--user", "foo", "--yes")


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("talk/my chat.ko.jsonl", "my_chat"),
        ("base.jsonl", "base_talk"),
        ("말투 모음.csv", "말투_모음"),
        ("hub:owner/name:default:train", "train"),
        ("/a/.jsonl", "mine"),
        ("-x.jsonl", "x"),
    ],
)
def test_a_run_is_named_after_its_first_file(file: str, name: str) -> None:
    assert start.name_from(file) == name


def test_only_bases_that_speak_the_language_are_shown() -> None:
    korean = start.suited("ko")
    assert korean and all("ko" in (base.languages or ()) for base in korean)
    assert {base.name for base in start.suited("both")} <= {base.name for base in korean}
    assert len(korean) < len(BASES)


def test_a_file_name_that_yaml_would_misread_is_quoted(init: Init) -> None:
    assert init(rows("1e3.jsonl", KOREAN), "--yes", "--name", "1e3").name == "1e3"
    assert init(rows("a: #b.jsonl", KOREAN), "--yes", "--name", "no").data.train == ("a: #b.jsonl",)
