"""Feedback as rows to train on, and the command that writes them."""

import io
import json
from pathlib import Path
from typing import Any

import pytest

from serve.commands import run_command
from serve.exporting import Format, rows_of, write_rows
from serve.store import Kept, Record, Store, Which
from toolkit.errors import InputError

TALK = [{"role": "developer", "content": "짧게 답해."}, {"role": "user", "content": "오늘 뭐 먹지?"}]
PROMPT = [{"role": "system", "content": "짧게 답해."}, TALK[1]]


def said(content: str, model: str | None = "voices/casual") -> dict[str, Any]:
    return {"content": content, "model": model, "known": model is not None}


def thumb(value: str, content: str = "김치찌개!", **more: Any) -> Record:
    return Record(
        "thumb", "me", {"messages": TALK, "answers": [said(content, **more)], "value": value, "comment": "비밀"}
    )


def pair(winner: str, a: str = "국밥.", b: str = "모릅니다.") -> Record:
    answers = [said(a), said(b, "polite")]
    return Record("pair", "me", {"messages": TALK, "answers": answers, "winner": winner, "comment": None})


def correction(corrected: str = "국밥 어때?") -> Record:
    payload = {"messages": TALK, "answers": [said("밥.")], "corrected": corrected, "comment": None}
    return Record("correction", "me", payload)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        (pair("a"), [("국밥.", "모릅니다.")]),
        (pair("b"), [("모릅니다.", "국밥.")]),
        (pair("tie"), []),
        (pair("both_bad"), []),
        (pair("a", b="국밥."), []),
        (pair("a", b=" "), []),
        (correction(), [("국밥 어때?", "밥.")]),
        (thumb("up"), []),
    ],
)
def test_preferences_come_from_pairs_and_corrections(record: Record, rows: list[tuple[str, str]]) -> None:
    wanted = [{"prompt": PROMPT, "chosen": answer(good), "rejected": answer(bad)} for good, bad in rows]
    assert list(rows_of(record, "preference")) == wanted


@pytest.mark.parametrize(
    ("record", "rows"),
    [
        (thumb("up"), [("김치찌개!", True)]),
        (thumb("down"), [("김치찌개!", False)]),
        (pair("b"), [("모릅니다.", True), ("국밥.", False)]),
        (pair("both_bad"), [("국밥.", False), ("모릅니다.", False)]),
        (pair("tie"), []),
        (correction(), [("국밥 어때?", True), ("밥.", False)]),
        (thumb("up", " \n"), []),
    ],
)
def test_labels_come_from_everything_that_was_judged(record: Record, rows: list[tuple[str, bool]]) -> None:
    wanted = [{"prompt": PROMPT, "completion": answer(text), "label": label} for text, label in rows]
    assert list(rows_of(record, "kto")) == wanted


@pytest.mark.parametrize(
    ("record", "texts"),
    [(thumb("up"), ["김치찌개!"]), (thumb("down"), []), (pair("a"), ["국밥."]), (correction(), ["국밥 어때?"])],
)
def test_dialogues_come_from_what_was_good(record: Record, texts: list[str]) -> None:
    assert list(rows_of(record, "sft")) == [{"messages": [*PROMPT, *answer(text)]} for text in texts]


@pytest.mark.parametrize(
    ("model", "n_rows"), [(None, 1), ("voices", 1), ("voices/casual", 1), ("voice", 0), ("base", 0)]
)
def test_a_run_takes_its_experts_along(model: str | None, n_rows: int) -> None:
    assert len(list(rows_of(thumb("up"), "kto", model))) == n_rows
    assert list(rows_of(thumb("up", model=None), "kto", "voices")) == []


def test_the_same_row_is_written_once() -> None:
    file = io.StringIO()
    assert write_rows([thumb("up"), thumb("up"), pair("a")], "sft", file) == 2
    assert len(file.getvalue().splitlines()) == 2 and "비밀" not in file.getvalue()


@pytest.fixture
def url(tmp_path: Path) -> str:
    url = f"sqlite:///{tmp_path}/feedback.db"
    store = Store(url)
    for record in (thumb("up"), pair("a"), correction()):
        store.add(record)
    store.keep([Kept("chatcmpl-1", "me", "conversation-0001", {})])
    store.close()
    return url


@pytest.mark.parametrize(("format", "n_rows"), [("preference", 2), ("kto", 5), ("sft", 3)])
def test_the_command_writes_a_file(url: str, tmp_path: Path, format: Format, n_rows: int) -> None:
    out = tmp_path / "rows.jsonl"
    assert run_command(["feedback", "export", "--store", url, "--format", format, "--out", str(out)], {}) == 0
    assert len([json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]) == n_rows


def test_the_command_writes_to_standard_output(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["feedback", "export", "--format", "kto", "--model", "polite"], {"MALTU_STORE": url})
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 2 and "2 rows" in said.err


def test_the_command_deletes_by_key_and_conversation(url: str) -> None:
    run_command(["feedback", "delete", "--store", url, "--conversation", "conversation-0001"], {})
    store = Store(url)
    assert store.count(Which()) == (3, 0)
    run_command(["feedback", "delete", "--store", url, "--key", "me"], {})
    assert store.count(Which()) == (0, 0)
    store.close()


@pytest.mark.parametrize(
    "words", [["feedback", "export", "--format", "kto"], ["feedback", "delete", "--store", "sqlite:///x.db"]]
)
def test_a_command_that_lacks_something_says_what(words: list[str], tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r"missing|say what"):
        run_command(words, {})


def test_a_key_is_printed_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["key", "new", "--name", "app", "--file", str(tmp_path / "keys")], {})
    secret = capsys.readouterr().out.strip()
    assert secret.startswith("maltu-") and secret not in (tmp_path / "keys").read_text(encoding="utf-8")
