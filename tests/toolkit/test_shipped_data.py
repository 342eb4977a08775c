"""The dialogues, pairs and probes that ship: well formed, in the language and voice they claim, truly counted."""

import json
import re
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from toolkit.shipped import shipped

Row = dict[str, Any]

VOICES = ("casual", "polite", "teacher", "listener")
LANGUAGES = ("ko", "en")
TALK = [f"talk/{voice}.{lang}.jsonl" for voice in VOICES for lang in LANGUAGES]
SPEECH = [f"speech/register.{lang}.jsonl" for lang in LANGUAGES]
PROBES = "probes.jsonl"
EVERY = [*TALK, *SPEECH, PROBES]
CARDS = ("README.md", "talk/README.md", "speech/README.md")

POLITE_ENDING = re.compile(r"[가-힣]*(?:요|니다|습니까|세요)(?=[\s.,!?~…ㅋㅎㅠ)]|$)")
POLITE_LOOKALIKES = {"필요"}  # ends in 요 without being polite speech
QUOTED = re.compile(r"\"[^\"]*\"|“[^”]*”")
PRIVATE = re.compile(r"\b\d{2,4}-\d{3,4}-\d{4}\b|\b\d{6}-[1-4]\d{6}\b|\b[\w.]+@\w+\.\w+|https?://|www\.")
BRITISH = re.compile(
    r"\b(?:mum|colour\w*|favour\w*|neighbour\w*|humour|grey|\w*metres?|litres?|maths|yoghurts?|cancell(?:ed|ing)|tyres?"
    r"|car park|lorry|flatmate|whilst|realis\w+|organis\w+)\b",
    re.IGNORECASE,
)


@cache
def rows(name: str) -> tuple[Row, ...]:
    lines = shipped(name).read_text(encoding="utf-8").splitlines()
    assert lines, f"{name} is empty"
    return tuple(json.loads(line) for line in lines)


def language(name: str) -> str:
    return name.split(".")[1]


def texts(row: Row) -> list[str]:
    found = [turn["content"] for turn in row.get("messages", [])]
    return found + [row[key] for key in ("topic", "spoken", "written", "reference") if key in row]


def spoken_by(row: Row, role: str) -> list[str]:
    return [turn["content"] for turn in row["messages"] if turn["role"] == role]


def hangul_share(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum("가" <= c <= "힣" or "ㄱ" <= c <= "ㅣ" for c in letters) / max(1, len(letters))


def polite_endings(answer: str) -> list[str]:
    return [word for word in POLITE_ENDING.findall(QUOTED.sub("", answer)) if word not in POLITE_LOOKALIKES]


def grams(text: str, n: int) -> frozenset[str]:
    solid = re.sub(r"\W", "", text.lower())
    return frozenset(solid[i : i + n] for i in range(len(solid) - n + 1))


def alike(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / max(1, len(a | b))


@pytest.mark.parametrize("name", EVERY)
def test_files_are_plain_utf8_lines(name: str) -> None:
    raw = shipped(name).read_bytes()
    assert not raw.startswith(b"\xef\xbb\xbf") and b"\r" not in raw and raw.endswith(b"\n")
    text = raw.decode("utf-8")
    assert text == unicodedata.normalize("NFC", text)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\u200b-\u200f\ufeff]", text)


@pytest.mark.parametrize("name", TALK)
def test_dialogue_rows_have_their_five_fields(name: str) -> None:
    voice, lang = Path(name).name.split(".")[:2]
    for row in rows(name):
        assert list(row) == ["id", "lang", "expert", "topic", "messages"], row["id"]
        assert (row["lang"], row["expert"]) == (lang, voice), row["id"]
        assert re.fullmatch(rf"{voice}-{lang}-\d{{4}}", row["id"]), row["id"]


@pytest.mark.parametrize("name", SPEECH)
def test_pair_rows_have_their_four_fields(name: str) -> None:
    lang = language(name)
    for row in rows(name):
        assert list(row) == ["id", "lang", "spoken", "written"], row["id"]
        assert row["lang"] == lang and re.fullmatch(rf"register-{lang}-\d{{4}}", row["id"]), row["id"]
        assert row["spoken"] != row["written"], row["id"]


def test_probe_rows_end_with_the_user_and_may_carry_a_reference() -> None:
    for row in rows(PROBES):
        assert set(row) - {"reference"} == {"id", "lang", "messages"}, row["id"]
        roles = [turn["role"] for turn in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"], row["id"]


@pytest.mark.parametrize("name", TALK)
def test_dialogues_alternate_user_first_assistant_last(name: str) -> None:
    for row in rows(name):
        roles = [turn["role"] for turn in row["messages"]]
        assert roles and roles == ["user", "assistant"] * (len(roles) // 2), row["id"]
        assert all(set(turn) == {"role", "content"} for turn in row["messages"]), row["id"]


@pytest.mark.parametrize("name", EVERY)
def test_no_text_is_empty_or_padded(name: str) -> None:
    assert [row["id"] for row in rows(name) if any(not text or text != text.strip() for text in texts(row))] == []


def test_ids_are_unique_over_all_files() -> None:
    counts = Counter(row["id"] for name in EVERY for row in rows(name))
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("name", EVERY)
def test_nothing_is_said_twice_in_a_file(name: str) -> None:
    openings = Counter(row["messages"][0]["content"] if "messages" in row else row["spoken"] for row in rows(name))
    assert [text for text, count in openings.items() if count > 1] == []
    if name in TALK:
        topics = Counter(row["topic"] for row in rows(name))
        assert [topic for topic, count in topics.items() if count > 1] == []


@pytest.mark.parametrize("name", EVERY)
def test_text_is_in_the_language_it_claims(name: str) -> None:
    for row in rows(name):
        share = hangul_share(" ".join(texts(row)))
        assert (share > 0.55) if row["lang"] == "ko" else (share == 0.0), row["id"]


@pytest.mark.parametrize("name", TALK)
def test_topics_are_short_phrases_in_the_language_of_the_dialogue(name: str) -> None:
    for row in rows(name):
        assert 2 <= len(row["topic"]) <= 40 and not re.search(r"[.!?\n]", row["topic"]), row["id"]
        assert (hangul_share(row["topic"]) > 0) == (row["lang"] == "ko"), row["id"]


def test_a_polite_ending_is_noticed() -> None:
    assert polite_endings('오늘은 "좋아요" 말고 필요 없다고 해.') == []
    assert polite_endings("그건 제가 할게요. 고맙습니다ㅋㅋ") == ["할게요", "고맙습니다"]


def test_haru_never_leaves_plain_speech() -> None:
    answers = [(row["id"], text) for row in rows("talk/casual.ko.jsonl") for text in spoken_by(row, "assistant")]
    assert [found for found in answers if polite_endings(found[1])] == []


@pytest.mark.parametrize("voice", ["polite", "teacher", "listener"])
def test_the_other_korean_voices_are_polite_in_every_dialogue(voice: str) -> None:
    for row in rows(f"talk/{voice}.ko.jsonl"):
        answers = spoken_by(row, "assistant")
        assert sum(bool(re.search(r"(?:요|니다|니까|죠)\b", text)) for text in answers) == len(answers), row["id"]


@pytest.mark.parametrize("name", ["talk/casual.en.jsonl", "talk/listener.en.jsonl", "talk/polite.en.jsonl"])
def test_american_spelling_is_kept(name: str) -> None:
    found = [(row["id"], BRITISH.findall(" ".join(texts(row)))) for row in rows(name)]
    assert [row for row in found if row[1]] == []


@pytest.mark.parametrize("name", EVERY)
def test_no_row_holds_private_data(name: str) -> None:
    assert [row["id"] for row in rows(name) if PRIVATE.search(" ".join(texts(row)))] == []


def test_korean_helplines_are_named_with_their_numbers() -> None:
    answers = [text for row in rows("talk/listener.ko.jsonl") for text in spoken_by(row, "assistant")]
    suicide = [text for text in answers if "자살예방" in text]
    youth = [text for text in answers if "청소년전화" in text]
    assert suicide and all("109" in text for text in suicide)
    assert youth and all("1388" in text for text in youth)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_probes_are_enough_to_judge_by(lang: str) -> None:
    mine = [row for row in rows(PROBES) if row["lang"] == lang]
    assert len(mine) >= 24
    assert sum("reference" in row for row in mine) >= 16
    assert any(len(row["messages"]) > 1 for row in mine)


def test_korean_references_are_in_plain_speech() -> None:
    given = [row["reference"] for row in rows(PROBES) if row["lang"] == "ko" and "reference" in row]
    assert [text for text in given if polite_endings(text)] == []


@pytest.mark.parametrize("lang", LANGUAGES)
def test_probes_are_not_in_the_dialogues(lang: str) -> None:
    n = 3 if lang == "ko" else 5
    talk = [row for voice in VOICES for row in rows(f"talk/{voice}.{lang}.jsonl")]
    openings = [(row["id"], grams(row["messages"][0]["content"], n)) for row in talk]
    known = {text for row in talk for text in spoken_by(row, "user") + spoken_by(row, "assistant")}
    for probe in rows(PROBES):
        if probe["lang"] == lang:
            said = [turn["content"] for turn in probe["messages"]] + [probe.get("reference", "")]
            assert known.isdisjoint(said), probe["id"]
            asked = grams(said[0], n)
            assert [found for found, opening in openings if alike(asked, opening) > 0.35] == [], probe["id"]


def counted(name: str) -> list[int]:
    """What a card states for a file: rows, and for dialogues their messages too."""
    sizes = [len(rows(name))]
    return [*sizes, sum(len(row["messages"]) for row in rows(name))] if name in TALK else sizes


@pytest.mark.parametrize("name", [*TALK, *SPEECH])
def test_the_folder_card_states_the_true_counts(name: str) -> None:
    folder, file = name.split("/")
    card = shipped(f"{folder}/README.md").read_text(encoding="utf-8")
    line = next(line for line in card.splitlines() if line.startswith(f"| {file} |"))
    numbers = [int(cell.replace(",", "")) for cell in re.findall(r"\| ([\d,]+)(?= \|)", line)]
    assert numbers[: len(counted(name))] == counted(name)


def test_the_index_states_the_true_counts() -> None:
    card = shipped("README.md").read_text(encoding="utf-8")
    dialogues, pairs = (sum(len(rows(name)) for name in names) for names in (TALK, SPEECH))
    assert f"{dialogues:,} dialogues" in card and f"{pairs} pairs" in card
    given = [row for row in rows(PROBES) if "reference" in row]
    assert f"{len(rows(PROBES))} prompts" in card and f"{len(given)} with a reference" in card


@pytest.mark.parametrize("name", CARDS)
def test_cards_name_the_licence(name: str) -> None:
    assert "CC BY 4.0" in shipped(name).read_text(encoding="utf-8")


def test_data_holds_no_python() -> None:
    files = [path for path in shipped("talk").parent.rglob("*") if path.is_file()]
    assert files and [path for path in files if path.suffix == ".py"] == []
