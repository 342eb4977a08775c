"""Answers of a given form over the whole server: whoever answers, however it is asked, and what goes wrong alone."""

import asyncio
import copy
import gc
import json
import threading
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import jsonschema_rs
import pytest
import torch
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines import grammars as room
from serve.engines.contract import Ask, One
from serve.engines.grammars import Grammars
from serve.engines.models import Model
from serve.engines.rows import RowsEngine
from serve.refusal import Refusal
from tests.gated_world import some_gate
from tests.served_world import all_said, combined, gated_model, models_of
from tests.stacked_world import World
from toolkit.combine.speaker import Spec
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling
from toolkit.grammar import Grammar, GrammarError
from toolkit.recipe.model import Lora, Reft
from toolkit.stack.adapter import Adapter, new_adapter
from toolkit.stack.stack import Stack

CHAT = "/v1/chat/completions"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "기분": {"enum": ["좋음", "나쁨", "그저 그래"]},
        "점수": {"type": "integer", "minimum": 1, "maximum": 12},
        "목록": {"type": "array", "items": {"const": "밥"}, "maxItems": 2},
    },
    "required": ["기분", "점수", "목록"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "talk", "schema": SCHEMA, "strict": True}}
MESSAGES = [{"role": "user", "content": "오늘 기분이 어때?"}]
ASK: dict[str, Any] = {"model": "lora", "messages": MESSAGES, "max_tokens": 60, "response_format": FORM}


class Chooses:
    """A router that always picks reft."""

    experts = ("lora", "reft")

    def probabilities(self, model: Any, tokenizer: Any, conversations: Any) -> torch.Tensor:
        return torch.tensor([[0.05, 0.9, 0.05]])


@pytest.fixture(scope="module")
def models(bare: Any) -> dict[str, Model]:
    """spoken-mini with two adapters, a gate over them, a run with a router, and a model of its own."""
    base, stack = bare.loaded.base, Stack(bare.loaded.base.model)
    made = {"base": replace(bare.models["base"], stack=stack)}
    noise = torch.Generator().manual_seed(3)
    for seed, (name, options) in enumerate({"lora": Lora(rank=4), "reft": Reft(rank=3)}.items()):
        raw = new_adapter(base.model, options, seed=seed)
        moved = {key: one + 0.05 * torch.randn(one.shape, generator=noise) for key, one in raw.tensors.items()}
        stack.add(name, Adapter(raw.kind, moved, raw.config, raw.is_raw))
        made[name] = Model(replace(bare.models["casual"].served, name=name), bare.loaded, stack, name)
    made["gated"] = gated_model(made, "gated", some_gate(stack, ("lora", "reft")))
    named = {
        f"run/{name}": replace(made[name], served=replace(made[name].served, name=f"run/{name}"))
        for name in Chooses.experts
    }
    spec, router = Spec("route", "classifier", Chooses.experts, default="base", margin=0.1), Chooses()
    return made | named | {"run": combined(made, "run", spec, router=router), "lone": bare.alone["casual"]}


@pytest.fixture(scope="module")
def engine(models: dict[str, Model]) -> Iterator[RowsEngine]:
    engine = RowsEngine(models, n_slots=12)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: RowsEngine) -> Iterator[TestClient]:
    with TestClient(create_app(engine, Bounds(400)), raise_server_exceptions=False) as client:
        yield client


def form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def fits(text: str, schema: dict[str, Any] = SCHEMA) -> bool:
    return jsonschema_rs.validator_for(schema).is_valid(json.loads(text))


def ask(model: str, sampling: Sampling, schema: dict[str, Any] | None = SCHEMA, id: str = "id") -> Ask:
    text = None if schema is None else json.dumps(schema, ensure_ascii=False)
    return Ask(id, One(model), (Turn("user", "오늘 기분이 어때?"),), sampling, schema=text)


@pytest.mark.parametrize(
    "model", ["base", "lora", "gated", "lone", "auto", "mix:lora=0.7,reft=0.3", "vote:lora,reft,base", "prob"]
)
@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_whoever_answers_the_answer_satisfies_the_schema(client: TestClient, model: str, temperature: float) -> None:
    asked = ASK | {"model": model, "temperature": temperature, "top_p": 1.0, "seed": 3}
    if model == "prob":
        asked |= {"model": "mix", "maltu": {"mix": {"lora": 0.5, "reft": 0.5}, "over": "prob"}}
    (choice,) = client.post(CHAT, json=asked).json()["choices"]
    assert choice["finish_reason"] == "stop" and fits(choice["message"]["content"])
    assert choice["message"]["refusal"] is None


def test_several_answers_each_satisfy_it_and_differ(client: TestClient) -> None:
    asked = ASK | {"n": 6, "temperature": 2.0, "top_p": 1.0, "seed": 1}
    texts = [choice["message"]["content"] for choice in client.post(CHAT, json=asked).json()["choices"]]
    assert all(map(fits, texts)) and len(set(texts)) > 2


def test_a_stream_says_the_same_with_log_probabilities(client: TestClient) -> None:
    asked = ASK | {"seed": 5, "temperature": 1.0, "logprobs": True, "top_logprobs": 1}
    whole = client.post(CHAT, json=asked).json()["choices"][0]
    lines = client.post(CHAT, json=asked | {"stream": True}).text.split("\n\n")
    told = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    choices = [one["choices"][0] for one in told]
    assert "".join(one["delta"].get("content", "") for one in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == "stop" and fits(whole["message"]["content"])
    tokens = [one["token"] for one in whole["logprobs"]["content"]]
    assert len(tokens) > 5 and all(one["logprob"] < 0 for one in whole["logprobs"]["content"])


def spelt(bare: Any, *words: str) -> list[list[int]]:
    return [bare.loaded.base.tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]


def test_any_json_object_is_one(client: TestClient, bare: Any) -> None:
    asked = ASK | {"response_format": {"type": "json_object"}, "max_tokens": 40, "n": 4, "temperature": 1.0, "seed": 2}
    closing = {"logit_bias": {str(ids[0]): 12 for ids in spelt(bare, "}", '"}')}}
    answers = [one for more in (closing, {}) for one in client.post(CHAT, json=asked | more).json()["choices"]]
    ended = [one["message"]["content"] for one in answers if one["finish_reason"] == "stop"]
    assert ended and all(isinstance(json.loads(text), dict) for text in ended)
    assert all(one["message"]["content"].startswith("{") for one in answers)


def test_text_asks_for_no_form(client: TestClient) -> None:
    plain = ASK | {"response_format": {"type": "text"}, "seed": 1, "max_tokens": 8}
    without = {name: value for name, value in plain.items() if name != "response_format"}
    first, second = (client.post(CHAT, json=one).json()["choices"] for one in (plain, without))
    assert first == second


def test_too_few_tokens_cut_it_as_any_answer(client: TestClient) -> None:
    (choice,) = client.post(CHAT, json=ASK | {"max_tokens": 3}).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["message"]["content"].startswith("{")


def test_a_stop_string_ends_it_as_any_answer(client: TestClient) -> None:
    (choice,) = client.post(CHAT, json=ASK | {"stop": "점수"}).json()["choices"]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"].endswith('"')


def test_a_bias_makes_nothing_possible_that_the_form_forbids(client: TestClient, bare: Any) -> None:
    bias = {str(ids[0]): 100 for ids in spelt(bare, "a", " the", bare.loaded.base.tokenizer.eos_token)}
    (choice,) = client.post(CHAT, json=ASK | {"logit_bias": bias}).json()["choices"]
    assert fits(choice["message"]["content"])


def test_an_answer_is_the_same_whoever_is_answered_beside_it(models: dict[str, Model]) -> None:
    asks = []
    for index in range(10):
        sampling = Sampling((0.0, 0.9, 1.4)[index % 3], max_tokens=24, seed=index, top_k=(0, 50)[index % 2])
        asks.append(ask(("base", "lora", "reft")[index % 3], sampling, SCHEMA if index % 2 else None))
    alone = RowsEngine(models, n_slots=1)
    together = RowsEngine(models, n_slots=10)
    try:
        wanted = [all_said(alone, [one])[0].ids for one in asks]
        assert [answer.ids for answer in all_said(together, asks)] == wanted
    finally:
        alone.close()
        together.close()


@pytest.mark.parametrize("model", ["lora", "lone", "vote:lora,reft"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_form_that_fails_in_the_middle_fails_its_own_request_alone(
    client: TestClient, engine: RowsEngine, monkeypatch: pytest.MonkeyPatch, model: str, stream: bool
) -> None:
    schema = {"const": "하나 둘 셋 넷 다섯 여섯"}
    inner, n_before = room.Grammar.start, engine.load().n_failures

    def start(grammar: Grammar, ends: Any) -> Any:
        guide = inner(grammar, ends)
        mask = guide.mask

        def breaking(n_vocabulary: int) -> Any:
            if guide._n_said == 3:
                raise GrammarError("after 3 tokens it cannot be followed: too costly")
            return mask(n_vocabulary)

        guide.mask = breaking  # type: ignore[method-assign]
        return guide

    plain = {"model": "base", "messages": MESSAGES, "max_tokens": 20, "temperature": 0}
    alone = client.post(CHAT, json=plain).json()["choices"][0]["message"]["content"]
    told: list[str] = []
    beside = threading.Thread(
        target=lambda: told.append(client.post(CHAT, json=plain).json()["choices"][0]["message"]["content"])
    )
    with monkeypatch.context() as patched:
        patched.setattr(room.Grammar, "start", start)
        beside.start()
        response = client.post(CHAT, json=ASK | {"model": model, "response_format": form(schema), "stream": stream})
        beside.join()
    last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
    error = json.loads(last)["error"]
    assert (error["param"], error["code"], error["type"]) == (
        "response_format",
        "invalid_value",
        "invalid_request_error",
    )
    assert "after 3 tokens" in error["message"] and response.status_code == (200 if stream else 400)
    assert told == [alone] and engine.load().n_failures == n_before and engine.load().state == "ready"
    assert client.post(CHAT, json=ASK).status_code == 200


@pytest.mark.slow
def test_the_client_of_openai_reads_its_own_model_from_the_answer(server: Any) -> None:
    openai = pytest.importorskip("openai")

    class Mood(BaseModel):
        기분: Literal["좋음", "나쁨"]
        점수: Annotated[int, Field(ge=1, le=10)]

    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none") as client:
        asked = {"model": "polite", "messages": MESSAGES, "response_format": Mood}
        said = client.chat.completions.parse(**asked).choices[0].message.parsed
        with client.chat.completions.stream(**asked) as stream:
            streamed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(said, Mood) and isinstance(streamed, Mood)


def test_a_base_whose_tokenizer_spells_no_bytes_refuses_by_name(tmp_path: Any) -> None:
    engine = RowsEngine(models_of(World(tmp_path / "adapters").stack(("lora",))))

    async def run() -> None:
        with pytest.raises(Refusal, match="WordLevel") as raised:
            await engine.submit(replace(ask("lora", Sampling()), turns=(Turn("user", "5 6 7"),)))
        assert (raised.value.status, raised.value.param) == (400, "response_format")

    try:
        asyncio.run(run())
        assert engine.load().n_waiting == 0
    finally:
        engine.close()


def test_a_base_whose_tokenizer_names_no_end_refuses_with_what_to_do(bare: Any) -> None:
    lone = bare.alone["casual"]
    endless = copy.deepcopy(lone.loaded.base.tokenizer)
    endless.eos_token = None
    base = replace(lone.loaded.base, tokenizer=endless)
    engine = RowsEngine({"casual": replace(lone, loaded=replace(lone.loaded, base=base))})
    try:
        with TestClient(create_app(engine, Bounds(400))) as client:
            answer = client.post(CHAT, json=ASK | {"model": "casual", "max_tokens": 4})
            error = answer.json()["error"]
            plain = client.post(CHAT, json={"model": "casual", "messages": MESSAGES, "max_tokens": 4})
        assert (answer.status_code, error["param"], error["code"]) == (400, "response_format", "invalid_value")
        assert "eos_token" in error["message"] and plain.status_code == 200
    finally:
        engine.close()


def test_what_was_made_for_a_tokenizer_goes_with_it(
    grammars: Grammars, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    bridge = room.bridge

    def bridged(tokenizer: Any) -> Any:
        found = bridge(tokenizer)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(room, "bridge", bridged)
    own = bare.loaded.base.tokenizer

    async def run() -> None:
        for tokenizer in (copy.deepcopy(own), own):  # the first as a run has it that stands alone
            await grammars.grammar(tokenizer, '{"const":"가"}')

    asyncio.run(run())
    gc.collect()
    assert [one() is None for one in made] == [True, False]


def refused(grammars: Grammars, tokenizer: Any, schema: str) -> Refusal:
    async def run() -> None:
        await grammars.grammar(tokenizer, schema)

    with pytest.raises(Refusal) as raised:
        asyncio.run(run())
    return raised.value


@pytest.fixture
def grammars() -> Iterator[Grammars]:
    made = Grammars()
    yield made
    made.close()


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is compiled from now on."""
    seen: list[str] = []

    class Counted(Grammar):
        def __init__(self, vocabulary: Any, schema: str) -> None:
            seen.append(schema)
            super().__init__(vocabulary, schema)

    monkeypatch.setattr(room, "Grammar", Counted)
    return seen


def test_a_schema_is_compiled_once_and_so_is_one_that_is_refused(
    grammars: Grammars, compiled: list[str], bare: Any
) -> None:
    tokenizer = bare.loaded.base.tokenizer

    async def run() -> None:
        for _ in range(3):
            await grammars.grammar(tokenizer, '{"const":"가"}')
        assert await grammars.grammar(tokenizer, None) is None

    asyncio.run(run())
    assert {refused(grammars, tokenizer, '{"not":{}}').status for _ in range(3)} == {400}
    assert compiled == ['{"const":"가"}', '{"not":{}}']


def test_only_the_last_schemas_are_kept(
    grammars: Grammars, compiled: list[str], bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "N_KEPT", 2)

    async def run() -> None:
        for name in ("1", "2", "1", "3", "1", "2"):
            await grammars.grammar(bare.loaded.base.tokenizer, f'{{"const":{name}}}')

    asyncio.run(run())
    assert [text[9:-1] for text in compiled] == ["1", "2", "3", "2"]


class Slow:
    """A grammar that is not done before somebody says so."""

    go = threading.Event()

    def __init__(self, vocabulary: Any, schema: str) -> None:
        self.go.wait(20)


def test_what_takes_too_long_is_refused_and_who_waited_for_it_is_told_to_come_again(
    grammars: Grammars, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "Grammar", Slow)
    monkeypatch.setattr(room, "COMPILE_S", 0.3)
    monkeypatch.setattr(room, "N_WAITING", 1)
    tokenizer = bare.loaded.base.tokenizer

    async def run() -> list[Any]:
        asked = [grammars.grammar(tokenizer, f'{{"const":{n}}}') for n in range(4)]
        return await asyncio.gather(*asked, return_exceptions=True)

    try:
        found = asyncio.run(run())
    finally:
        Slow.go.set()
    assert [(one.status, one.code) for one in found] == [
        (400, "invalid_value"), (400, "invalid_value"), (429, "queue_full"), (429, "queue_full")
    ]  # fmt: skip
    assert "0.3 s" in str(found[0]) and found[3].headers["retry-after"] == "2"
