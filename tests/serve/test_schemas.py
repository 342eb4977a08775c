"""What a chat request may say: every field checked, nothing passed over in silence."""

import json
import unicodedata
from typing import Any

import pytest

from serve.reading import read_model
from serve.refusal import Refusal
from serve.schemas import Chat, Classify, read_chat, read_completion

ASK = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}


def read(**more: Any) -> Chat:
    return read_chat(json.dumps(ASK | more).encode(), max_tokens=100)


def form(wanted: Any, **more: Any) -> dict[str, Any]:
    inner = {"name": more.pop("name", "x"), "schema": more.pop("schema", wanted)}
    return {"type": "json_schema", "json_schema": inner} | more


def refused(body: bytes) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read_chat(body, max_tokens=100)
    assert raised.value.status == 400
    return raised.value


@pytest.mark.parametrize(
    ("field", "value", "param", "code"),
    [
        ("tempurature", 1, "tempurature", "unsupported_parameter"),
        ("n", 17, "n", "integer_above_max_value"),
        ("n", 10**6, "n", "integer_above_max_value"),
        ("n", 0, "n", "invalid_value"),
        ("n", True, "n", "invalid_value"),
        ("logprobs", 3, "logprobs", "invalid_value"),
        ("top_logprobs", 21, "top_logprobs", "invalid_value"),
        ("top_k", -1, "top_k", "invalid_value"),
        ("min_p", 1.0, "min_p", "invalid_value"),
        ("repetition_penalty", 0, "repetition_penalty", "invalid_value"),
        ("presence_penalty", 2.5, "presence_penalty", "invalid_value"),
        ("frequency_penalty", -2.5, "frequency_penalty", "invalid_value"),
        ("logit_bias", {"5": 101}, "logit_bias", "invalid_value"),
        ("logit_bias", {"five": 1}, "logit_bias", "invalid_value"),
        ("logit_bias", {str(i): 1 for i in range(301)}, "logit_bias", "invalid_value"),
        ("maltu", {"truncation": "middle"}, "maltu.truncation", "invalid_value"),
        ("maltu", {"conversation": "kim"}, "maltu.conversation", "invalid_value"),
        ("maltu", {"template": "x"}, "maltu.template", "unsupported_parameter"),
        ("maltu", {"mix": {"a": 1}, "vote": ["a"]}, "maltu", "invalid_value"),
        ("maltu", {"over": "prob"}, "maltu", "invalid_value"),
        ("tools", [{"type": "function"}], "tools", "unsupported_parameter"),
        ("response_format", {"type": "grammar"}, "response_format.type", "invalid_value"),
        ("response_format", "json", "response_format", "invalid_value"),
        ("response_format", {"type": "json_schema"}, "response_format", "missing_required_parameter"),
        ("response_format", form({}, type="json_object"), "response_format", "invalid_value"),
        ("response_format", form({}, name="이름"), "response_format.json_schema.name", "invalid_value"),
        ("response_format", form({}, schema=[]), "response_format.json_schema.schema", "invalid_value"),
        ("response_format", form({"$ref": "http://a.example/s"}), "response_format", "invalid_value"),
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
        b'{"model": "a", "model": "b"}',
        b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}",
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


def test_a_form_is_handed_on_as_a_schema_in_its_own_words() -> None:
    assert read().form is None and read(response_format={"type": "text"}).form is None
    assert read(response_format={"type": "json_object"}).form == '{"type":"object"}'
    schema = {"properties": {"기분": {"enum": ["좋음"]}, "가": {}}}
    asked = read(response_format=form(schema) | {"json_schema": form(schema)["json_schema"] | {"strict": False}})
    assert asked.form == '{"properties":{"기분":{"enum":["좋음"]},"가":{}}}' and asked.unused == []


def test_text_parts_are_joined_and_composed() -> None:
    parts = [{"type": "text", "text": unicodedata.normalize("NFD", "오늘 ")}, {"type": "text", "text": "뭐 먹지?"}]
    assert read(messages=[{"role": "developer", "content": parts}]).messages[0].content == "오늘 뭐 먹지?"


def test_one_stop_string_is_a_list_of_one() -> None:
    assert read(stop="끝").stop == ["끝"] and read(stop=["끝", "\n"]).stop == ["끝", "\n"]


def test_either_name_of_the_limit_counts() -> None:
    assert read(max_tokens=9).limit == 9 and read(max_completion_tokens=8).limit == 8 and read().limit is None


def test_two_limits_that_disagree_are_refused() -> None:
    assert "disagree" in refused(json.dumps(ASK | {"max_tokens": 9, "max_completion_tokens": 8}).encode()).message


def test_likely_tokens_are_told_where_log_probabilities_are() -> None:
    assert read().n_logprobs is None and read(logprobs=False).n_logprobs is None
    assert read(logprobs=True).n_logprobs == 0 and read(logprobs=True, top_logprobs=3).n_logprobs == 3
    assert "top_logprobs" in refused(json.dumps(ASK | {"top_logprobs": 2}).encode()).message


def test_a_bias_is_by_token_id() -> None:
    assert read(logit_bias={"5": -100, "017": 1.5}).bias == {5: -100.0, 17: 1.5}


def test_one_prompt_is_a_list_of_one() -> None:
    asked = {"model": "base", "prompt": unicodedata.normalize("NFD", "옛날 옛적에")}
    assert read_completion(json.dumps(asked).encode(), 100).prompt == ["옛날 옛적에"]


@pytest.mark.parametrize(
    ("field", "value", "param", "code"),
    [
        ("prompt", "", "prompt", "invalid_value"),
        ("prompt", [], "prompt", "invalid_value"),
        ("prompt", [1, 2, 3], "prompt", "unsupported_parameter"),
        ("prompt", [[1, 2]], "prompt", "unsupported_parameter"),
        ("prompt", ["가"] * 17, "prompt", "invalid_value"),
        ("n", 9, "", "invalid_value"),
        ("echo", True, "echo", "unsupported_parameter"),
        ("suffix", "끝", "suffix", "unsupported_parameter"),
        ("best_of", 3, "best_of", "unsupported_parameter"),
        ("logprobs", True, "logprobs", "invalid_value"),
        ("messages", [], "messages", "unsupported_parameter"),
        ("response_format", {"type": "json_object"}, "response_format", "unsupported_parameter"),
        ("response_format", form({"const": 1}), "response_format", "unsupported_parameter"),
    ],
)
def test_a_completion_that_cannot_be_answered_is_named(field: str, value: Any, param: str, code: str) -> None:
    asked = {"model": "base", "prompt": ["옛날", "옛적"]} | {field: value}
    with pytest.raises(Refusal) as raised:
        read_completion(json.dumps(asked).encode(), max_tokens=100)
    assert (raised.value.param or "", raised.value.code) == (param, code)


@pytest.mark.parametrize(
    "wrong",
    [
        {"input": []},
        {"input": " "},
        {"input": ["가"] * 65},
        {"labels": ["하나"]},
        {"labels": ["같다", "같다"]},
        {"labels": [""]},
        {"labels": ["x" * 101, "y"]},
    ],
)
def test_texts_and_labels_are_bounded(wrong: dict[str, Any]) -> None:
    with pytest.raises(Refusal) as raised:
        read_model(Classify, json.dumps({"model": "base", "input": "좋아요"} | wrong).encode())
    assert raised.value.param == next(iter(wrong))


def test_stream_options_want_a_stream() -> None:
    assert "stream" in refused(json.dumps(ASK | {"stream_options": {"include_usage": True}}).encode()).message
    options = read(stream=True, stream_options={"include_usage": True}).stream_options
    assert options is not None and options.include_usage
