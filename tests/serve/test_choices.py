"""Several answers to one request, log-probabilities, running text, mixtures, labels, turns that do not fit."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.asking import BLOCK, shortened
from serve.engines.contract import Auto, Mix, Vote
from serve.refusal import queue_full
from toolkit.corpus.talk import Turn

CHAT, TEXT, LABELS = "/v1/chat/completions", "/v1/completions", "/v1/classify"
ASK = {"model": "casual", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}]}


@pytest.fixture
def client(engine: Any) -> Iterator[TestClient]:
    with TestClient(create_app(engine, Bounds(max_tokens=100, answer_s=0.5)), raise_server_exceptions=False) as client:
        yield client


def events_of(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def test_n_asks_for_answers_that_draw_noise_of_their_own(client: TestClient, engine: Any) -> None:
    answer = client.post(CHAT, json=ASK | {"n": 3, "seed": 5}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert [(ask.row, ask.sampling.seed) for ask in engine.asks] == [(0, 5), (1, 5), (2, 5)]
    assert answer["usage"] == {"prompt_tokens": 7, "completion_tokens": 9, "total_tokens": 16}


def test_streamed_choices_are_told_apart_by_their_index(client: TestClient) -> None:
    asked = ASK | {"n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, done = events_of(client.post(CHAT, json=asked).text)
    for index in (0, 1):
        own = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(choice["delta"].get("content", "") for choice in own) == "아무거나 먹자."
        assert own[0]["delta"]["role"] == "assistant" and own[-1]["finish_reason"] == "stop"
    assert done == "[DONE]" and usage["usage"]["completion_tokens"] == 6


def test_answers_that_find_no_room_take_the_others_back(client: TestClient, engine: Any) -> None:
    submit = engine.submit

    async def two_at_most(ask: Any) -> Any:
        if len(engine.asks) == 2:
            raise queue_full(64, 3)
        return await submit(ask)

    engine.submit = two_at_most
    assert client.post(CHAT, json=ASK | {"n": 4}).status_code == 429
    assert all(reply.was_cancelled.is_set() for reply in engine.replies) and len(engine.replies) == 2


def test_one_choice_that_breaks_ends_the_stream_with_its_error(client: TestClient, engine: Any, refusal: Any) -> None:
    engine.pieces = ["아", refusal(500, "broke", "internal_error")]
    *_, last = events_of(client.post(CHAT, json=ASK | {"n": 2, "stream": True}).text)
    assert last["error"]["code"] == "internal_error"
    assert all(reply.was_cancelled.is_set() for reply in engine.replies)


def test_log_probabilities_of_a_chat(client: TestClient) -> None:
    choice = client.post(CHAT, json=ASK | {"logprobs": True, "top_logprobs": 2}).json()["choices"][0]
    told = choice["logprobs"]["content"]
    assert [one["token"] for one in told] == ["아무거나 ", "먹자", "."]
    assert bytes(told[1]["bytes"]).decode() == "먹자" and told[1]["logprob"] == -0.5
    assert [top["logprob"] for top in told[0]["top_logprobs"]] == [-2.0, -3.0]


def test_streamed_log_probabilities_come_once_each(client: TestClient) -> None:
    *chunks, _ = events_of(client.post(CHAT, json=ASK | {"logprobs": True, "stream": True}).text)
    told = [one["token"] for chunk in chunks for one in chunk["choices"][0]["logprobs"]["content"]]
    assert told == ["아무거나 ", "먹자", "."]


def test_without_asking_there_are_no_log_probabilities(client: TestClient, engine: Any) -> None:
    assert client.post(CHAT, json=ASK).json()["choices"][0]["logprobs"] is None
    assert engine.asks[0].n_logprobs is None


def test_penalties_and_bias_reach_the_engine(client: TestClient, engine: Any) -> None:
    wished = {"presence_penalty": 0.5, "frequency_penalty": -1, "repetition_penalty": 1.2, "top_k": 9, "min_p": 0.1}
    client.post(CHAT, json=ASK | wished | {"logit_bias": {"42": -100, "7": 1}})
    sampling = engine.asks[0].sampling
    assert {name: getattr(sampling, name) for name in wished} == wished
    assert tuple(sampling.logit_bias) == ((7, 1.0), (42, -100.0))


def test_running_text_goes_on_without_a_template(client: TestClient, engine: Any) -> None:
    answer = client.post(TEXT, json={"model": "base", "prompt": "옛날 옛적에", "logprobs": 1}).json()
    assert engine.asks[0].turns == (Turn("text", "옛날 옛적에"),)
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    choice = answer["choices"][0]
    assert choice["text"] == "아무거나 먹자." and choice["logprobs"]["tokens"] == ["아무거나 ", "먹자", "."]
    assert choice["logprobs"]["text_offset"] == [0, 5, 7] and choice["logprobs"]["top_logprobs"][0] == {"음": -2.0}


def test_several_prompts_are_answered_in_order(client: TestClient, engine: Any) -> None:
    answer = client.post(TEXT, json={"model": "base", "prompt": ["하나", "둘"], "n": 2}).json()
    assert [ask.turns[0].content for ask in engine.asks] == ["하나", "하나", "둘", "둘"]
    assert [ask.row for ask in engine.asks] == [0, 1, 0, 1] and len(answer["choices"]) == 4
    assert answer["usage"] == {"prompt_tokens": 14, "completion_tokens": 12, "total_tokens": 26}


def test_streamed_text_has_the_shape_of_openai(client: TestClient) -> None:
    *chunks, done = events_of(client.post(TEXT, json={"model": "base", "prompt": "옛날", "stream": True}).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "아무거나 먹자." and done == "[DONE]"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop" and chunks[0]["object"] == "text_completion"


@pytest.mark.parametrize(
    ("asked", "who", "kind"),
    [
        ({"model": "mix:casual=0.7,polite=0.3"}, Mix((("casual", 0.7), ("polite", 0.3))), "mix"),
        ({"model": "mix", "maltu": {"mix": {"base": 1, "polite": 2}}}, Mix((("base", 1.0), ("polite", 2.0))), "mix"),
        ({"model": "vote:casual,polite"}, Vote(("casual", "polite")), "vote"),
        ({"model": "auto"}, Auto(), None),
    ],
)
def test_who_answers_is_told(client: TestClient, engine: Any, asked: dict[str, Any], who: Any, kind: str) -> None:
    answer = client.post(CHAT, json=ASK | asked).json()
    assert engine.asks[0].who == who
    told = answer["maltu"]["routing"]
    assert (told and told["kind"]) == kind and answer["maltu"]["weights_hash"]


def test_whom_a_router_chose_is_told_with_the_answer(client: TestClient, engine: Any, monkeypatch: Any) -> None:
    assert client.post(CHAT, json=ASK | {"model": "auto"}).json()["model"] == "polite"
    reply = type(engine.replies[0])
    plain = reply.answer
    monkeypatch.setattr(reply, "answer", property(lambda one: replace(plain.fget(one), routing=(("polite", 1.0),))))
    answer = client.post(CHAT, json=ASK | {"model": "auto"}).json()
    assert answer["maltu"]["routing"] == {"kind": "route", "weights": {"polite": 1.0}}


def test_what_a_mixture_would_be_can_be_looked_at(client: TestClient) -> None:
    told = client.get("/v1/models/mix:casual=0.7,polite=0.3").json()["maltu"]
    assert told["routing"] == {"kind": "mix", "weights": {"casual": 0.7, "polite": 0.3}}


def test_labels_of_texts(client: TestClient) -> None:
    asked = {"model": "casual", "input": ["좋아요", "별로"], "labels": ["긍정", "부정"]}
    answer = client.post(LABELS, json=asked).json()
    assert [one["label"] for one in answer["data"]] == ["긍정", "긍정"] and answer["data"][1]["index"] == 1
    assert sum(answer["data"][0]["probabilities"].values()) == 1.0


def test_an_answer_that_takes_too_long_is_given_up(client: TestClient, engine: Any) -> None:
    engine.pieces, engine.pace = ["음"] * 1000, 0.05
    response = client.post(CHAT, json=ASK)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert response.headers["retry-after"]
    *_, last = events_of(client.post(CHAT, json=ASK | {"stream": True}).text)
    assert last["error"]["code"] == "timeout"


def test_a_conversation_that_does_not_fit_loses_its_oldest_turns_when_told(client: TestClient, engine: Any) -> None:
    engine.longest = 60
    turns = [{"role": ("user", "assistant")[n % 2], "content": f"말 {n:03}"} for n in range(31)]
    asked = {"model": "casual", "messages": [{"role": "system", "content": "짧게."}, *turns]}
    assert client.post(CHAT, json=asked).json()["error"]["code"] == "context_length_exceeded"
    answer = client.post(CHAT, json=asked | {"maltu": {"truncation": "auto"}}).json()
    kept = engine.asks[0].turns
    assert kept[0].content == "짧게." and kept[1].content == "말 024" and kept[-1].content == "말 030"
    assert answer["maltu"]["dropped_turns"] == 24


def test_turns_are_left_out_in_blocks_down_to_the_last_of_the_user() -> None:
    turns = [Turn("system", "s"), *(Turn(("user", "assistant")[n % 2], str(n)) for n in range(BLOCK + 3))]  # type: ignore[arg-type]
    assert [turn.content for turn in shortened(turns, 1) or ()] == ["s", "8", "9", "10"]
    assert [turn.content for turn in shortened(turns, 2) or ()] == ["s", "10"]
    assert shortened(turns, 3) is None and shortened(turns[:2], 1) is None
