"""What a chat request may say: every field checked, nothing passed over in silence."""

import json
import unicodedata
from typing import Any

import pytest

from serve.refusal import Refusal
from serve.schemas import Chat, read_chat

ASK = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}


def read(**more: Any) -> Chat:
    return read_chat(json.dumps(ASK | more).encode(), max_tokens=100)


def refused(body: bytes) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read_chat(body, max_tokens=100)
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize(
    ("field", "value", "param", "code"),
    [
        ("tempurature", 1, "tempurature", "unsupported_parameter"),
        ("n", 2, "n", "unsupported_parameter"),
        ("n", 10**6, "n", "unsupported_parameter"),
        ("n", True, "n", "unsupported_parameter"),
        ("logprobs", True, "logprobs", "unsupported_parameter"),
        ("tools", [{"type": "function"}], "tools", "unsupported_parameter"),
        ("response_format", {"type": "json_object"}, "response_format", "unsupported_parameter"),
        ("presence_penalty", 0.5, "presence_penalty", "unsupported_parameter"),
        ("logit_bias", {"5": 1}, "logit_bias", "unsupported_parameter"),
        ("chat_template", "{{ 1 }}", "chat_template", "unsupported_parameter"),
        ("temperature", 2.1, "temperature", "invalid_value"),
        ("temperature", "0.7", "temperature", "invalid_value"),
        ("temperature", True, "temperature", "invalid_value"),
        ("top_p", -0.1, "top_p", "invalid_value"),
        ("max_tokens", 0, "max_tokens", "invalid_value"),
        ("max_tokens", 2**31, "max_tokens", "integer_above_max_value"),
        ("max_completion_tokens", 101, "max_completion_tokens", "integer_above_max_value"),
        ("max_tokens", 1.5, "max_tokens", "invalid_value"),
        ("stop", ["a", "b", "c", "d", "e"], "stop", "invalid_value"),
        ("stop", "", "stop", "invalid_value"),
        ("stop", ["x" * 300], "stop", "invalid_value"),
        ("seed", 2**63, "seed", "invalid_value"),
        ("stream", "yes", "stream", "invalid_value"),
        ("model", "", "model", "invalid_value"),
        ("model", None, "model", "invalid_value"),
        ("messages", [], "messages", "invalid_value"),
        ("messages", "안녕", "messages", "invalid_value"),
        ("messages", [ASK["messages"][0]] * 257, "messages", "invalid_value"),  # type: ignore[index]
    ],
)
def test_a_field_that_cannot_be_answered_is_named(field: str, value: Any, param: str, code: str) -> None:
    refusal = refused(json.dumps(ASK | {field: value}).encode())
    assert (refusal.param, refusal.code, refusal.type) == (param, code, "invalid_request_error")


@pytest.mark.parametrize(
    ("message", "param", "code"),
    [
        ({"role": "tool", "content": "x"}, "messages[0].role", "unsupported_parameter"),
        ({"role": "king", "content": "x"}, "messages[0].role", "invalid_value"),
        ({"role": "user"}, "messages[0].content", "missing_required_parameter"),
        ({"role": "user", "content": None}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": 3}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": "x", "name": "kim"}, "messages[0].name", "unsupported_parameter"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls", "unsupported_parameter"),
        ({"role": "user", "content": "x", "mood": 1}, "messages[0].mood", "unsupported_parameter"),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]},
            "messages[0].content",
            "unsupported_parameter",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content", "invalid_value"),
        ({"role": "user", "content": ["x"]}, "messages[0].content", "invalid_value"),
    ],
)
def test_a_message_that_cannot_be_answered_is_named(message: dict[str, Any], param: str, code: str) -> None:
    refusal = refused(json.dumps(ASK | {"messages": [message]}).encode())
    assert (refusal.param, refusal.code) == (param, code)


def test_the_message_holds_every_problem() -> None:
    refusal = refused(json.dumps(ASK | {"temperature": 3, "top_p": 2, "colour": 1}).encode())
    assert all(word in refusal.message for word in ("temperature", "top_p", "colour"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b'"x"',
        b'{"model": NaN}',
        b'{"model": Infinity}',
        b"\xff\xfe{\x00}\x00",
        '{"model": "오늘"}'.encode("cp949"),
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        json.dumps(ASK, ensure_ascii=False).replace("먹지?", "\\ud800").encode(),
        b'{"\\udfff": 1}',
        b"1" * 5000,
    ],
    ids=lambda body: ascii(body[:20]),
)
def test_what_is_no_plain_json_object_is_refused(body: bytes) -> None:
    assert refused(body).code == "invalid_json"


def test_a_number_beyond_all_numbers_is_refused() -> None:
    assert refused(json.dumps(ASK)[:-1].encode() + b', "temperature": 1e400}').param == "temperature"


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert read(messages=[{"role": "user", "content": "😀"}]).messages[0].content == "😀"


@pytest.mark.parametrize(
    "nothing",
    [
        {"n": 1, "logprobs": False, "tools": [], "response_format": {"type": "text"}, "presence_penalty": 0},
        {
            "n": None,
            "logprobs": None,
            "tools": None,
            "response_format": None,
            "stop": None,
            "seed": None,
            "audio": None,
        },
        {"frequency_penalty": 0.0, "logit_bias": {}, "modalities": ["text"], "tool_choice": "none"},
    ],
)
def test_a_field_that_asks_for_nothing_is_taken(nothing: dict[str, Any]) -> None:
    assert read(**nothing).unused == []


def test_fields_without_effect_are_reported() -> None:
    asked = read(user="kim", metadata={"a": "b"}, store=True, service_tier="auto")
    assert asked.unused == ["user", "metadata", "store", "service_tier"]


def test_text_parts_are_joined_and_composed() -> None:
    parts = [{"type": "text", "text": unicodedata.normalize("NFD", "오늘 ")}, {"type": "text", "text": "뭐 먹지?"}]
    assert read(messages=[{"role": "developer", "content": parts}]).messages[0].content == "오늘 뭐 먹지?"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert read(stop="끝").stop == ["끝"] and read(stop=["끝", "\n"]).stop == ["끝", "\n"]


def test_either_name_of_the_limit_counts() -> None:
    assert read(max_tokens=9).limit == 9 and read(max_completion_tokens=8).limit == 8 and read().limit is None


def test_two_limits_that_disagree_are_refused() -> None:
    assert "disagree" in refused(json.dumps(ASK | {"max_tokens": 9, "max_completion_tokens": 8}).encode()).message


def test_stream_options_want_a_stream() -> None:
    assert "stream" in refused(json.dumps(ASK | {"stream_options": {"include_usage": True}}).encode()).message
    options = read(stream=True, stream_options={"include_usage": True}).stream_options
    assert options is not None and options.include_usage
