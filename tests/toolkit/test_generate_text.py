"""Text as it comes: no piece breaks a character, no stop string leaks, whatever the tokenizer."""

import functools
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as some
from transformers import PreTrainedTokenizerFast

from tests.mini_world import tokenizer
from toolkit.writing import Detokenizer, StopStrings


def pieces_of(ids: list[int], reads: Any = None) -> list[str]:
    reader = Detokenizer(reads or tokenizer())
    return [*map(reader.push, ids), reader.flush()]


def byte_ids(text: str) -> list[int]:
    """The text as one token a byte: what a model writes that knows no longer token."""
    single = {}
    for i in range(5, 300):
        token = tokenizer().convert_ids_to_tokens(i)
        if len(token) == 1:
            single[token] = i
    pieces = tokenizer().backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    return [single[letter] for piece, _ in pieces for letter in piece]


@pytest.mark.parametrize(
    "text", ["오늘 뭐 먹지?", "한글😀 mixed 가나다 👨‍👩‍👧 end", "  two  spaces\n\nlines ", "ㅋㅋㅋ 그니까…~"]
)
def test_pieces_join_to_the_text_and_hold_no_half_character(text: str) -> None:
    for ids in (tokenizer()(text, add_special_tokens=False)["input_ids"], byte_ids(text)):
        pieces = pieces_of(list(ids))
        assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


@functools.cache
def sentencepiece_like() -> Any:
    """A tokenizer that marks spaces with ▁, drops the first one, and spells unknown characters in bytes."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁나는", "▁간다", "요", "▁"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    )
    steps = tokenizers.decoders
    inner.decoder = steps.Sequence(
        [steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def test_spaces_and_bytes_of_a_sentencepiece_tokenizer_come_out_whole() -> None:
    spelled = [1 + byte for byte in "뭐해😀".encode()]
    ids = [257, 258, 259, 260, *spelled, 258, 257, *spelled]
    pieces = pieces_of(ids, sentencepiece_like())
    assert "".join(pieces) == "나는 간다요 뭐해😀 간다 나는뭐해😀"
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_character_of_three_byte_tokens_comes_out_with_its_last_byte() -> None:
    assert pieces_of(byte_ids("뭐")) == ["", "", "뭐", ""]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(some.lists(some.integers(0, 8191), max_size=30))
def test_pieces_of_any_tokens_join_to_what_the_tokenizer_decodes(ids: list[int]) -> None:
    whole = tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(ids)).replace("\ufffd", "") == whole.replace("\ufffd", "")


def test_endless_broken_bytes_do_not_grow_the_window() -> None:
    reader, half = Detokenizer(tokenizer()), byte_ids("뭐")[0]
    shown = "".join(reader.push(half) for _ in range(200))
    assert len(shown) > 150 and len(reader._open) + len(reader._certain) < 32


def test_special_tokens_are_silent() -> None:
    assert "".join(pieces_of([3, *byte_ids("응"), 4, 0])) == "응"


def watched(stops: tuple[str, ...], pieces: list[str]) -> tuple[list[str], bool]:
    watch = StopStrings(stops)
    shown = [watch.push(piece) for piece in pieces]
    return [*shown, watch.flush()], watch.met


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    assert watched(("사용자:",), ["안녕 사", "용", "자:", "뒤"]) == (["안녕 ", "", "", "", ""], True)


def test_what_began_like_a_stop_string_is_shown_when_it_is_none() -> None:
    assert watched(("사용자:",), ["안녕 사", "용", "법"]) == (["안녕 ", "", "사용법", ""], False)


def test_an_end_inside_a_stop_string_shows_what_was_held() -> None:
    assert watched(("\n\n",), ["끝\n"]) == (["끝", "\n"], False)


def test_the_earliest_of_several_stop_strings_cuts() -> None:
    assert watched(("셋", "둘"), ["하나 둘 셋"]) == (["하나 ", ""], True)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(
    some.lists(some.text("ab", max_size=3), max_size=8), some.lists(some.text("ab", min_size=1, max_size=4), max_size=3)
)
def test_shown_text_is_the_text_before_the_first_stop_string_to_be_complete(
    pieces: list[str], stops: list[str]
) -> None:
    shown, met = watched(tuple(stops), pieces)
    text = "".join(pieces)
    assert met == any(stop in text for stop in stops)
    assert text.startswith("".join(shown)) and not any(stop in "".join(shown) for stop in stops)
    assert met or "".join(shown) == text
