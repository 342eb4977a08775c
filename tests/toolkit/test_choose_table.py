"""A table of others' figures: read as it is, named as what it is, refused with its lines where it is wrong."""

from pathlib import Path

import pytest

from toolkit.choose.table import read_table
from toolkit.errors import DataError

GOOD = "model,benchmark,score,metric,source\nQwen/Qwen3-0.6B,KLUE-YNAT,71.3,F1,저자\nqwen3-0.6b,KLUE-STS,0.8,,\n"


def test_figures_are_found_by_any_name_of_a_base(tmp_path: Path) -> None:
    (tmp_path / "klue.csv").write_text(GOOD, encoding="utf-8-sig")
    table = read_table(tmp_path / "klue.csv")
    assert table.benchmarks == ("KLUE-YNAT F1", "KLUE-STS")
    for name in ("qwen3-0.6b", "Qwen/Qwen3-0.6B"):
        assert [table.cell(name, of) for of in table.benchmarks] == ["71.3", "0.8"]
    assert table.cell("spoken-mini", "KLUE-STS") == "–"
    assert table.sources == ("저자",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model,f1\na,1\n", "line 1  columns are missing: benchmark, score; it has: model, f1"),
        ("", "columns are missing: model, benchmark, score; it has: nothing"),
        ("model,benchmark,score\n", "holds no figure"),
        ("model,benchmark,score\na,KLUE,좋음\n,KLUE,3\n", "line 2  score: '좋음' is no number"),
        ("model,benchmark,score\na,KLUE,1\n,KLUE,3\n", "line 3  no model"),
    ],
)
def test_a_table_that_is_none_is_told_with_its_line(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "t.csv")
    assert says in str(caught.value)


def test_every_wrong_line_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("model,benchmark,score\na,b,c\nd,,1\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "t.csv")
    assert [problem.line for problem in caught.value.problems] == [2, 3]


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: path.write_bytes("모델".encode("cp949"))])
def test_what_cannot_be_read_is_told(tmp_path: Path, make: object) -> None:
    assert callable(make)
    make(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"cannot be read as CSV"):
        read_table(tmp_path / "t.csv")
