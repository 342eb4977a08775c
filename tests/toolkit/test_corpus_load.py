"""Every shape that a row may have becomes turns."""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from toolkit.corpus.load import load_talks, sniff
from toolkit.corpus.talk import Talk
from toolkit.errors import DataError
from toolkit.recipe.model import Columns, Labels

LUNCH = [{"role": "user", "content": "오늘 뭐 먹지?"}, {"role": "assistant", "content": "칼국수 어때?"}]
TURNS = [("user", "오늘 뭐 먹지?"), ("assistant", "칼국수 어때?")]


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(file: str, format: Any = "auto", system: str | None = None) -> list[Talk]:
    return list(load_talks([file], format, system))


def turns(talk: Talk) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in talk.turns]


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("messages", {"messages": LUNCH}),
        ("messages", {"conversations": LUNCH}),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": LUNCH[0]["content"]},
                    {"from": "gpt", "value": "칼국수 어때?"},
                ]
            },
        ),
        ("alpaca", {"instruction": "오늘 뭐 먹지?", "input": "", "output": "칼국수 어때?"}),
        ("prompt_completion", {"prompt": "오늘 뭐 먹지?", "completion": "칼국수 어때?"}),
        ("prompt_completion", {"prompt": LUNCH[:1], "completion": LUNCH[1:]}),
    ],
)
def test_a_shape_is_read_by_name_and_sniffed_alike(tmp_path: Path, name: str, row: dict[str, Any]) -> None:
    file = write(tmp_path / "a.jsonl", row)
    assert turns(load(file, name)[0]) == TURNS
    assert load(file) == load(file, name)


def test_text_is_one_turn_of_its_own_role(tmp_path: Path) -> None:
    talk = load(write(tmp_path / "a.jsonl", {"text": "비 오는 날엔 국물이지"}), system="친구처럼")[0]
    assert turns(talk) == [("text", "비 오는 날엔 국물이지")]


def test_alpaca_joins_input_and_puts_history_first(tmp_path: Path) -> None:
    row = {"instruction": "번역해", "input": "hi", "output": "안녕", "history": [["준비됐어?", "응"]], "system": "통역"}
    assert turns(load(write(tmp_path / "a.jsonl", row))[0]) == [
        ("system", "통역"), ("user", "준비됐어?"), ("assistant", "응"), ("user", "번역해\nhi"), ("assistant", "안녕"),
    ]  # fmt: skip


def test_a_top_level_system_text_comes_first(tmp_path: Path) -> None:
    talk = load(write(tmp_path / "a.jsonl", {"system": "반말로", "conversations": LUNCH}))[0]
    assert turns(talk) == [("system", "반말로"), *TURNS]


def test_the_system_of_the_recipe_is_for_talks_without_one(tmp_path: Path) -> None:
    own = [{"role": "developer", "content": "존댓말로"}, *LUNCH]
    first, second = load(write(tmp_path / "a.jsonl", {"messages": LUNCH}, {"messages": own}), system="반말로")
    assert (turns(first)[0], turns(second)[0]) == (("system", "반말로"), ("system", "존댓말로"))


def test_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "오늘"}, {"type": "text", "text": "뭐 먹지?"}]
    row = {"messages": [{"role": "user", "content": parts}, LUNCH[1]]}
    assert turns(load(write(tmp_path / "a.jsonl", row))[0])[0] == ("user", "오늘\n뭐 먹지?")


def test_columns_take_dotted_paths_from_either_end(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"messages": LUNCH})
    talk = load(file, Columns(user="messages.0.content", assistant="messages.-1.content"))[0]
    assert turns(talk) == TURNS


def test_a_column_of_messages_becomes_lines_with_speakers(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "반말로"}, *LUNCH]
    file = write(tmp_path / "a.jsonl", {"topic": "점심", "messages": messages})
    talk = load(file, Columns(user="messages", assistant="topic"))[0]
    assert turns(talk) == [("user", "A: 오늘 뭐 먹지?\nB: 칼국수 어때?"), ("assistant", "점심")]


def test_a_missing_value_in_a_column_is_empty(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", {"q": None, "a": 3})
    assert turns(load(file, Columns(user="q", assistant="a"))[0]) == [("user", ""), ("assistant", "3")]


def test_labels_answer_with_their_words_through_the_template(tmp_path: Path) -> None:
    labels = Labels(text="document", label="label", names={"0": "부정", "1": "긍정"}, template="{text}\n감정:")
    file = write(tmp_path / "a.jsonl", {"document": "{재미} 있다", "label": 1}, {"document": "졸려", "label": "0"})
    first, second = load(file, labels)
    assert turns(first) == [("user", "{재미} 있다\n감정:"), ("assistant", "긍정")]
    assert (first.label, second.label) == ("긍정", "부정")


def test_the_language_of_a_row_is_kept(tmp_path: Path) -> None:
    first, second = load(write(tmp_path / "a.jsonl", {"lang": "KO", "messages": LUNCH}, {"messages": LUNCH}))
    assert (first.lang, second.lang) == ("ko", None)


def test_every_talk_knows_its_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n\n" + json.dumps({"text": "안녕"}) + "\n\n" + json.dumps({"text": "잘 가"}), encoding="utf-8")
    assert [talk.source for talk in load(str(file))] == [f"{file}:3", f"{file}:5"]


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": "오늘 뭐 먹지?", "completion": '줄을\n바꾸고, "따옴표"'},
        {"prompt": "ㅎㅇ", "completion": "ㅎㅇ"},
    ]
    plain = write(tmp_path / "a.jsonl", *rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    (tmp_path / "c.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "d.json").write_bytes(Path(plain).read_bytes())
    with (tmp_path / "e.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, ["prompt", "completion"])
        table.writeheader()
        table.writerows(rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    expected = [turns(talk) for talk in load(plain)]
    others = sorted(path for path in tmp_path.iterdir() if path.name != "a.jsonl")
    assert len(others) == 5
    for path in others:
        assert [turns(talk) for talk in load(str(path))] == expected, path.name


def test_a_csv_field_over_several_lines_moves_the_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes('prompt,completion\r\n"둘\r\n셋",응\r\n다음,그래\r\n'.encode())
    assert [talk.source for talk in load(str(file))] == [f"{file}:2", f"{file}:4"]


def test_messages_in_a_csv_cell_are_read_as_json(tmp_path: Path) -> None:
    with (tmp_path / "a.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(LUNCH, ensure_ascii=False)]])
    assert turns(load(str(tmp_path / "a.csv"))[0]) == TURNS


def test_lists_in_parquet_are_messages(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"messages": LUNCH}]), tmp_path / "a.parquet")
    assert turns(load(str(tmp_path / "a.parquet"))[0]) == TURNS


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_a_bom_and_windows_line_ends_change_nothing(tmp_path: Path, start: bytes, ending: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(start + (json.dumps({"messages": LUNCH}) + ending).encode() * 2)
    assert [turns(talk) for talk in load(str(file))] == [TURNS, TURNS]


def test_sniffing_names_a_known_shape(tmp_path: Path) -> None:
    found = sniff(write(tmp_path / "a.jsonl", {"conversations": [{"from": "human", "value": "안녕"}]}))
    assert (found.format, found.is_sure, found.fields) == ("sharegpt", True, ("conversations",))


@pytest.mark.parametrize(
    ("row", "proposal"),
    [
        ({"question": "왜?", "answer": "그냥"}, Columns(user="question", assistant="answer")),
        ({"text": "재밌다", "label": 1}, Labels(text="text", label="label")),
        ({"column_1": "왜?"}, None),
    ],
)
def test_sniffing_proposes_from_names_but_is_not_sure(tmp_path: Path, row: dict[str, Any], proposal: Any) -> None:
    found = sniff(write(tmp_path / "a.jsonl", row))
    assert (found.format, found.is_sure) == (proposal, False)


def test_labelled_text_is_never_taken_for_running_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.format: \{kind: labels, text: text, label: label\}"):
        load(write(tmp_path / "a.jsonl", {"text": "재밌다", "label": 1}))


def test_each_file_is_sniffed_by_itself(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", {"messages": LUNCH}), write(tmp_path / "b.jsonl", {"text": "안녕"})
    assert [talk.turns[0].role for talk in load_talks([first, second], "auto", None)] == ["user", "text"]
