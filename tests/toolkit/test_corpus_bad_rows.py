"""A row or file that cannot be read is named with its place, itself and what is accepted."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from toolkit.corpus.load import MAX_PROBLEMS, load_talks, sniff
from toolkit.corpus.row import MAX_ROW
from toolkit.errors import DataError
from toolkit.recipe.model import Columns, Labels

GOOD = json.dumps(
    {"messages": [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "어 안녕"}]}
).encode()


def refused(file: Path, format: Any = "auto") -> DataError:
    with pytest.raises(DataError) as caught:
        list(load_talks([str(file)], format, None))
    return caught.value


def refused_row(tmp_path: Path, row: bytes, format: Any = "auto") -> str:
    """The one problem of a file whose second row is this one."""
    file = tmp_path / "talk.jsonl"
    file.write_bytes(GOOD + b"\n" + row + b"\n" + GOOD + b"\n")
    error = refused(file, format)
    assert len(error.problems) == 1
    assert error.problems[0].where == f"{file}:2"
    return error.problems[0].says


def turn(content: Any, role: str = "user", **more: Any) -> bytes:
    return json.dumps({"messages": [{"role": role, "content": content, **more}]}).encode()


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (b'{"messages": [', "not JSON: Expecting value at column 15"),
        (b"[1, 2]", "the whole file one JSON list"),
        (b'"hello"', "a row is one JSON object"),
        (b'{"messages": NaN}', "NaN is not JSON"),
        (b'{"messages": [], "messages": []}', "the key 'messages' stands twice"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (b'{"messages": []}', "messages is an empty list"),
        (b'{"messages": "hello"}', "messages is text, not a list of turns"),
        (b'{"messages": {"role": "user"}}', "messages is an object, not a list"),
        (b'{"messages": ["hello"]}', "messages.0 is text, not an object"),
        (b'{"text": "hello"}', "no 'messages' and no 'conversations', but 'text'"),
        (b"{}", "but nothing at all"),
        (b'{"messages": [{"content": "x"}]}', "has no 'role'"),
        (b'{"messages": [{"role": "user"}]}', "has no 'content'"),
        (turn("x", role="narrator"), "has the role 'narrator'; known are user"),
        (b'{"messages": [{"role": 3, "content": "x"}]}', "has the role 3"),
        (turn("x", role="tool"), "tools are not in this version"),
        (turn(None, role="assistant", tool_calls=[{"id": "1"}]), "tools are not in this version"),
        (turn("x", role="assistant", weight=0), "weight 0"),
        (turn(None), "messages.0.content is null"),
        (turn(3), "messages.0.content is a number, not text"),
        (turn({"a": 1}), "messages.0.content is an object, not text"),
        (
            turn([{"type": "image_url", "image_url": {"url": "x"}}]),
            "is of type 'image_url'; this version reads text alone",
        ),
        (turn(["x"]), "messages.0.content.0 is text, not a part"),
        (turn("x" * 3).replace(b"xxx", b"\\ud83d"), "half a character"),
    ],
)
def test_a_bad_row_is_named_with_what_is_wrong(tmp_path: Path, row: bytes, says: str) -> None:
    assert says in refused_row(tmp_path, row)


def test_a_bad_row_is_shown_with_the_accepted_shape(tmp_path: Path) -> None:
    said = refused_row(tmp_path, '{"messages": [{"role": "해설", "content": "비가 온다"}]}'.encode())
    assert 'the row: {"messages": [{"role": "해설", "content": "비가 온다"}]}' in said
    assert 'accepted: {"messages": [{"role": "user", "content": "…"}' in said


def test_a_long_row_is_shown_cut(tmp_path: Path) -> None:
    assert len(refused_row(tmp_path, turn("가" * 100_000, role="narrator"))) < 900


def test_ten_megabytes_in_one_row_are_refused_and_the_next_row_is_read(tmp_path: Path) -> None:
    said = refused_row(tmp_path, turn("x" * 10_000_000))
    assert "one row is longer than 4 MB" in said
    assert len(said) < 600


def test_a_huge_value_in_parquet_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"text": "x" * (MAX_ROW + 1)}])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "text is 4,000,001 characters long" in str(refused(tmp_path / "a.parquet"))


def test_all_problems_come_at_once_and_the_shape_once(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join([GOOD, b"{", turn(None), GOOD, turn(3)]))
    error = refused(file)
    assert [problem.where for problem in error.problems] == [f"{file}:2", f"{file}:3", f"{file}:5"]
    assert str(error).count("accepted:") == 1


def test_problems_of_several_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(turn(None))
    with pytest.raises(DataError) as caught:
        list(load_talks([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")], "auto", None))
    assert [problem.where for problem in caught.value.problems] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl"]


def test_reading_stops_after_twenty_problems(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"{\n" * 1000)
    error = refused(tmp_path / "a.jsonl")
    assert len(error.problems) == MAX_PROBLEMS
    assert "stopped here, after 20 problems" in str(error)


def test_a_format_that_is_not_known_is_one_problem_with_a_proposal(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "왜?", "answer": "그냥"}\n' * 30, encoding="utf-8")
    error = refused(tmp_path / "a.jsonl")
    assert len(error.problems) == 1
    assert "data.format: {kind: columns, user: question, assistant: answer}" in str(error)
    assert "accepted:" in str(error)


@pytest.mark.parametrize(
    ("row", "says"), [('{"messages": null}', "is null, not a list"), ("{}", "a row with no columns")]
)
def test_a_first_row_without_turns_is_named(tmp_path: Path, row: str, says: str) -> None:
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-8")
    assert says in str(refused(tmp_path / "a.jsonl"))


def test_preference_rows_are_not_in_this_version(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "왜?", "chosen": "그냥", "rejected": "몰라"}', encoding="utf-8")
    assert "learning from preferences is not in this version" in str(refused(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (Columns(user="q", assistant="text"), "the row has no 'q', but 'text', 'list'"),
        (Columns(user="list.x", assistant="text"), "list is a list, so 'x' of list.x must be a number"),
        (Columns(user="list.2", assistant="text"), "list has 2 entries, so there is no 2"),
        (Columns(user="text.0", assistant="text"), "text is text, so there is no '0' in it"),
        (Columns(user="list", assistant="text"), "list.0 is a number, not an object"),
        (
            Labels(text="text", label="text", names={"0": "부정"}),
            "the label '안녕' is not one of data.format.names (0: 부정)",
        ),
        (Labels(text="text", label="none"), "none is null"),
    ],
)
def test_a_column_that_is_not_there_is_named(tmp_path: Path, columns: Any, says: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "안녕", "list": [1, 2], "none": null}', encoding="utf-8")
    assert says in str(refused(tmp_path / "a.jsonl", columns))


def test_bytes_that_are_not_utf8_are_named_by_row(tmp_path: Path) -> None:
    assert "byte 6 of the line (0xff) is not UTF-8" in refused_row(tmp_path, b'{"a":\xff\xff}')


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_korean_windows_encoding_is_recognised_once_for_the_file(tmp_path: Path, name: str) -> None:
    row = '{"text": "비 오는 날엔 국물이지"}\n' if name != "a.csv" else "text\n비 오는 날엔 국물이지\n"
    (tmp_path / name).write_bytes((row * 30).encode("cp949"))
    error = refused(tmp_path / name)
    assert len(error.problems) == 1
    assert "cp949" in str(error) and "iconv -f cp949 -t UTF-8" in str(error)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_utf16_is_recognised(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes("text\n안녕\n".encode("utf-16"))
    assert "UTF-16" in str(refused(tmp_path / name))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_file_is_said_to_be_empty(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert "holds no rows" in str(refused(tmp_path / name))


def test_a_header_without_rows_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n", encoding="utf-8")
    assert "holds no rows" in str(refused(tmp_path / "a.csv"))


def test_a_gzip_file_cut_short_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(b"\n".join([GOOD] * 5000))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    assert "damaged or cut short" in str(refused(tmp_path / "a.jsonl.gz"))


def test_a_file_that_is_not_gzip_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(GOOD)
    assert "damaged or cut short" in str(refused(tmp_path / "a.jsonl.gz"))


def test_a_file_that_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(GOOD * 10)
    assert "not a parquet file" in str(refused(tmp_path / "a.parquet"))


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "casual.ko.jsonl").write_bytes(GOOD)
    assert f"Did you mean {tmp_path}/casual.ko.jsonl?" in str(refused(tmp_path / "casual_ko.jsonl"))


def test_a_folder_is_answered_with_a_file_in_it(tmp_path: Path) -> None:
    (tmp_path / "talk.jsonl.gz").write_bytes(GOOD)
    assert f"is a folder; name the files in it, such as {tmp_path}/talk.jsonl.gz" in str(refused(tmp_path))


def test_an_unknown_ending_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_bytes(GOOD)
    assert ".parquet" in str(refused(tmp_path / "a.xlsx"))


@pytest.mark.skipif(getattr(os, "geteuid", int)() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    (tmp_path / "a.jsonl").chmod(0)
    assert "cannot be read: Permission denied" in str(refused(tmp_path / "a.jsonl"))


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that opens and cannot be read (Linux)")
def test_a_file_that_fails_while_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    assert "cannot be read" in str(refused(tmp_path / "a.jsonl"))


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a device without end")
def test_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to("/dev/zero")
    assert "not a regular file" in str(refused(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("a,b\n1,2,3\n", "3 fields where the header names 2"),
        ('a,b\n"x"y,2\n', "not CSV as RFC 4180 has it"),
        ('a,b\n"x,2\n3,4\n', "a quote opened near this line and never closed"),
        ("a,a\n1,2\n", "names the column 'a' twice"),
        ("a;b\n1;2\n", "separate columns with commas"),
    ],
)
def test_broken_csv_is_named(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "a.csv").write_text(content, encoding="utf-8")
    assert says in str(refused(tmp_path / "a.csv", Columns(user="a", assistant="b")))


def test_a_json_file_that_holds_no_list_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("3", encoding="utf-8")
    assert "a .json file holds a list of rows" in str(refused(tmp_path / "a.json"))


def test_sniffing_a_bad_file_is_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        sniff(str(tmp_path / "a.jsonl"))
