"""`maltu spoken FILE…` scores data files by role, and says what is wrong with those it cannot score."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from toolkit.__main__ import main
from toolkit.corpus.manner import manner_by_role, some_of
from toolkit.corpus.talk import Talk, Turn

CHAT = [
    ("오늘 뭐 먹지?", "나 지금 완전 배고파. 떡볶이 어때?"),
    ("what's up", "not much, I'm just chilling at home lol"),
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def messages(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def scored(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert main(["spoken", *argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return {one["file"]: one["roles"] for one in found["files"]}


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["spoken", *argv]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


def test_each_file_and_role_has_its_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = write(tmp_path / "말.jsonl", [messages(*said) for said in CHAT])
    assert main(["spoken", chat, "maltu:talk/polite.en.jsonl"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line]
    roles = [cell for line in lines for cell in map(str.strip, line.split("│")) if cell in ("user", "assistant")]
    assert roles == ["user"] * 3 + ["assistant"] * 3 + ["user", "assistant"]  # two languages: all, ko, en


def test_json_holds_counts_means_and_shares_by_role_and_language(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = write(tmp_path / "말.jsonl", [messages(*said) for said in CHAT] + [messages("…", "今日は")])
    of_file = scored(capsys, chat)[chat]
    assert {role: {lang: of["n"] for lang, of in by.items()} for role, by in of_file.items()} == {
        "user": {"all": 2, "ko": 1, "en": 1}, "assistant": {"all": 2, "ko": 1, "en": 1},
    }  # fmt: skip
    assert of_file["assistant"]["all"]["n_other"] == 1
    assert of_file["assistant"]["all"]["share"] == 1.0 and 0.5 < of_file["assistant"]["all"]["mean"] < 1.0


@pytest.mark.parametrize(
    ("row", "role"),
    [
        ({"conversations": [{"from": "human", "value": "응"}, {"from": "gpt", "value": "나 배고파"}]}, "assistant"),
        ({"instruction": "응", "output": "나 배고파"}, "assistant"),
        ({"prompt": "응", "completion": "나 배고파"}, "assistant"),
        ({"text": "나 배고파"}, "text"),
        ({"written": "정부는 예산안을 확정하였다.", "spoken": "나 배고파"}, "assistant"),
    ],
    ids=["sharegpt", "alpaca", "prompt_completion", "text", "columns by their names"],
)
def test_every_shape_that_a_recipe_takes_is_scored(
    row: dict[str, Any], role: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "말.jsonl", [row])
    assert scored(capsys, file)[file][role]["ko"]["share"] == 1.0


def test_compressed_and_comma_separated_files_are_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    packed, table = tmp_path / "말.jsonl.gz", tmp_path / "말.csv"
    packed.write_bytes(gzip.compress(json.dumps({"text": "나 배고파"}).encode()))
    table.write_text("ask,say\n뭐 해?,나 배고파\n", encoding="utf-8")
    form = "{kind: columns, user: ask, assistant: say}"
    assert scored(capsys, str(packed))[str(packed)]["text"]["ko"]["n"] == 1
    assert scored(capsys, str(table), "--format", form)[str(table)]["assistant"]["ko"]["share"] == 1.0


def test_a_guess_from_column_names_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "짝.jsonl", [{"written": "비가 온다.", "spoken": "비 와"}])
    assert main(["spoken", file]) == 0
    assert "read as user: written, assistant: spoken" in capsys.readouterr().err


def test_a_label_is_nothing_that_anybody_said() -> None:
    talk = Talk((Turn("user", "나 배고파"), Turn("assistant", "긍정")), "x:1", label="긍정")
    assert set(manner_by_role([talk])) == {"user"}


def test_a_row_that_names_its_language_is_believed_unless_the_user_says_otherwise() -> None:
    talk = Talk((Turn("text", "ok lol"),), "x:1", lang="ko")
    assert set(manner_by_role([talk])["text"]) == {"all", "ko"}
    assert set(manner_by_role([talk], "en")["text"]) == {"all", "en"}
    foreign = Talk((Turn("text", "ok lol"),), "x:1", lang="fr")
    assert set(manner_by_role([foreign])["text"]) == {"all", "en"}


def test_some_talks_are_spread_over_all_of_them() -> None:
    talks = [Talk((Turn("text", str(number)),), f"x:{number}") for number in range(9)]
    assert [talk.turns[0].content for talk in some_of(talks, 3)] == ["0", "3", "6"]
    assert list(some_of(talks, 100)) == talks


def test_an_empty_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no rows" in refused(capsys, write(tmp_path / "빈.jsonl", []))


@pytest.mark.parametrize("said", ["今日は雨だ", "12:30", "😀"])
def test_a_file_without_korean_or_english_is_refused(
    said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "none of its 2 texts is Korean or English" in refused(
        capsys, write(tmp_path / "x.jsonl", [messages(said, said)])
    )


@pytest.mark.parametrize("lang", ["ja", "korean"])
def test_an_unknown_language_is_refused_before_any_file_is_read(lang: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Name ko or en" in refused(capsys, "not/there.jsonl", "--lang", lang)


@pytest.mark.parametrize("form", ["chatml", "{kind: columns, user: a}", "{kind: [", "3"])
def test_an_unknown_format_is_refused_with_those_there_are(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "kind: columns, user: COLUMN" in refused(capsys, "not/there.jsonl", "--format", form)


def test_every_file_that_cannot_be_scored_is_named_and_no_table_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write(tmp_path / "a.jsonl", [messages(*CHAT[0])]), write(tmp_path / "b.jsonl", [{"messages": "no"}])
    said = refused(capsys, good, bad, str(tmp_path / "nowhere.jsonl"))
    assert "3 files: 2 problems" in said and "b.jsonl:1" in said and "nowhere.jsonl" in said


def test_the_data_report_of_check_says_how_spoken_each_role_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = write(
        tmp_path / "말.jsonl", [messages(f"{user} {n}", f"{said} {n}") for n in range(9) for user, said in CHAT]
    )
    recipe = tmp_path / "r.yaml"
    data = f"{{train: [{chat}], valid: 0, test: 0, clean: {{near_duplicates: null}}}}"
    recipe.write_text(f"name: tiny\nbase: {{model: spoken-mini}}\ndata: {data}\n", encoding="utf-8")
    assert main(["check", str(recipe)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    line = said[said.index("spoken, from 0 to 1:") :]
    assert re.findall(r"(user|assistant) (ko|en) [01]\.\d\d \(\d+ % of turns\)", line) == [
        ("user", "ko"), ("user", "en"), ("assistant", "ko"), ("assistant", "en"),
    ]  # fmt: skip
