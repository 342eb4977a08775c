"""A vLLM server behind ours: what goes over to it, what comes back, and what happens when it is away."""

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.engines.contract import Ask, Auto, Mix, One, Vote
from serve.engines.vllm import VllmEngine
from serve.engines.vllm_runs import describe_runs, refuse_other_base
from serve.refusal import Refusal
from tests.serve.fake_vllm import FakeVllm, described, fake_of, running
from toolkit.bundle import Run, open_run
from toolkit.corpus.talk import Turn
from toolkit.errors import InputError
from toolkit.generate import Answer, Sampling

pytestmark = pytest.mark.slow  # reads a tokenizer, and talks HTTP

LUNCH = (Turn("user", "오늘 뭐 먹지?"),)
GREEDY = Sampling(temperature=0.0, max_tokens=8)


@pytest.fixture
def fake(runs: Path) -> Iterator[FakeVllm]:
    with running(fake_of(runs)) as fake:
        yield fake


@pytest.fixture
def engine(fake: FakeVllm, runs: Path) -> Iterator[VllmEngine]:
    engine = VllmEngine(described(runs), fake.url)
    yield engine
    engine.close()


def ask(name: str = "polite", sampling: Sampling = GREEDY, **more: Any) -> Ask:
    return Ask("the-id", One(name), LUNCH, sampling, **more)


def answered(engine: VllmEngine, one: Ask) -> Answer:
    async def run() -> Answer:
        reply = await engine.submit(one)
        text = "".join([piece async for piece in reply])
        assert text == reply.answer.text
        return reply.answer

    return asyncio.run(run())


def refused(engine: VllmEngine, one: Ask) -> Refusal:
    with pytest.raises(Refusal) as raised:
        answered(engine, one)
    return raised.value


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def copied(runs: Path, folder: Path, name: str, of: str = "polite") -> Run:
    return open_run(shutil.copytree(runs / of, folder / name))


def rescaled(run: Run, factor: float) -> Run:
    from safetensors.torch import load_file, save_file

    (file,) = run.adapter().glob("*.safetensors")
    save_file({name: tensor * factor for name, tensor in load_file(file).items()}, file)
    return run


def test_runs_go_over_as_adapters_and_the_base_is_asked_by_its_name_there(
    engine: VllmEngine, fake: FakeVllm, runs: Path
) -> None:
    assert sorted(fake.loras.values()) == sorted(
        str((runs / n).resolve() / "adapters/main") for n in ("casual", "polite")
    )
    answered(engine, ask("base"))
    answered(engine, ask("polite"))
    assert fake.bodies[0]["model"] == "base-here"
    assert fake.bodies[1]["model"].startswith("maltu-polite-") and fake.bodies[1]["model"] in fake.loras


def test_the_prompt_is_sent_as_the_ids_of_training(engine: VllmEngine, fake: FakeVllm, runs: Path) -> None:
    answered(engine, ask())
    handed = described(runs)["polite"]
    assert fake.bodies[0]["prompt"] == handed.renderer.prompt(LUNCH)
    assert set(fake.bodies[0]["stop_token_ids"]) == handed.ends and fake.bodies[0]["ignore_eos"]


def test_every_choice_of_sampling_is_said(engine: VllmEngine, fake: FakeVllm) -> None:
    sampling = Sampling(0.3, 0.8, 40, 0.1, 1.1, 5, (), 9, 0.5, -0.5, {7: -100.0})
    answered(engine, ask(sampling=sampling, row=0, key="somebody"))
    answered(engine, ask(sampling=sampling, row=1))
    body, second = fake.bodies
    told = {"temperature": 0.3, "top_p": 0.8, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "max_tokens": 5}
    told |= {"presence_penalty": 0.5, "frequency_penalty": -0.5, "logit_bias": {"7": -100.0}, "seed": 9}
    assert {name: body[name] for name in told} == told
    assert "somebody" not in json.dumps(body) and len(body["cache_salt"]) == 64 and "cache_salt" not in second
    assert second["seed"] != body["seed"] and engine.load().n_reused == 6 and engine.load().n_hits == 2


def test_a_form_goes_over_in_the_servers_own_words(engine: VllmEngine, fake: FakeVllm, runs: Path) -> None:
    answered(engine, replace(ask(), schema='{"enum":["밥","국"]}'))
    answered(engine, ask())
    form = {"name": "answer", "schema": {"enum": ["밥", "국"]}, "strict": True}
    assert fake.bodies[0]["response_format"] == {"type": "json_schema", "json_schema": form}
    assert described(runs)["polite"].tokenizer.eos_token_id in fake.bodies[0]["stop_token_ids"]
    assert "response_format" not in fake.bodies[1]


def test_a_form_that_the_server_does_not_take_is_refused_by_name(engine: VllmEngine, fake: FakeVllm) -> None:
    fake.context = 1  # whatever it refuses
    refusal = refused(engine, replace(ask(), schema='{"not":{}}'))
    assert (refusal.status, refusal.param) == (400, "response_format")


def test_whatever_else_a_request_may_say_one_day_has_to_be_said_or_refused_here() -> None:
    said = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "stop", "seed"}
    said |= {"presence_penalty", "frequency_penalty", "logit_bias"}
    assert {field.name for field in fields(Sampling)} == said
    asked = {"id", "who", "turns", "sampling", "n_logprobs", "row", "key", "schema"}
    assert {field.name for field in fields(Ask)} == asked


def test_a_character_in_several_tokens_comes_whole(engine: VllmEngine, fake: FakeVllm, runs: Path) -> None:
    tokenizer = described(runs)["polite"].tokenizer
    fake.text = tokenizer("뷁! 👩‍🌾 점심", add_special_tokens=False)["input_ids"]
    assert len(fake.text) > 6

    async def run() -> list[str]:
        return [piece async for piece in await engine.submit(ask(sampling=Sampling(max_tokens=60)))]

    pieces = asyncio.run(run())
    assert "".join(pieces) == "뷁! 👩‍🌾 점심" and not any("\ufffd" in piece for piece in pieces)


def test_a_stop_string_ends_the_answer_and_has_the_server_stop(engine: VllmEngine, fake: FakeVllm, runs: Path) -> None:
    tokenizer = described(runs)["polite"].tokenizer
    fake.text = tokenizer("하나 둘 셋 넷" + " 다섯" * 50, add_special_tokens=False)["input_ids"]
    answer = answered(engine, ask(sampling=Sampling(max_tokens=200, stop=("셋",))))
    assert answer.text == "하나 둘 " and answer.finish == "stop"
    until(lambda: fake.n_cut_off == 1)


def test_a_cancelled_answer_has_the_server_stop(engine: VllmEngine, fake: FakeVllm) -> None:
    async def run() -> None:
        reply = await engine.submit(ask(sampling=Sampling(temperature=1.5, max_tokens=400, seed=1)))
        async for _ in reply:
            reply.cancel()
        assert reply.answer.finish == "cancelled"

    asyncio.run(run())
    until(lambda: fake.n_cut_off == 1)


@pytest.mark.parametrize("who", [Auto(), Mix((("polite", 0.5), ("casual", 0.5))), Vote(("polite", "casual"))])
def test_who_answers_together_is_refused_by_name(engine: VllmEngine, who: Any) -> None:
    refusal = refused(engine, Ask("id", who, LUNCH, GREEDY))
    assert (refusal.status, refusal.code, refusal.param) == (400, "unsupported_parameter", "model")
    assert str(who) in refusal.message


def test_labels_are_refused(engine: VllmEngine) -> None:
    with pytest.raises(Refusal, match="does not classify"):
        asyncio.run(engine.classify(One("polite"), ["좋다"], ["a", "b"]))


@pytest.mark.parametrize(
    ("kind", "says"),
    [("PREFIX_TUNING", "kind prefix"), ("reft", "kind reft"), ("embedding", "kind embedding"), ("dora", "use_dora")],
)
def test_a_run_that_vllm_cannot_take_is_refused_by_name(runs: Path, tmp_path: Path, kind: str, says: str) -> None:
    run = copied(runs, tmp_path, "odd")
    file = run.adapter() / "adapter_config.json"
    config = json.loads(file.read_text())
    if kind == "dora":
        config["use_dora"] = True
    elif kind.islower():
        config = {"kind": kind, "version": 1}
    else:
        config["peft_type"] = kind
    file.write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"odd.*{says}.*without --engine vllm"):
        describe_runs([run])


def test_a_combination_is_refused_by_name(runs: Path, facts_writer: Callable[..., Path], tmp_path: Path) -> None:
    base_hash = open_run(runs / "polite").facts()["base"]["hash"]
    spec = {"kind": "mix", "how": "logprob", "members": ["a", "b"], "weights": {"a": 0.5, "b": 0.5}}
    folder = facts_writer(tmp_path / "voices", base_hash, combination=spec)
    for name in ("a", "b"):
        shutil.copytree(runs / "polite" / "adapters" / "main", folder / "adapters" / name)
    with pytest.raises(InputError, match=r"voices.*\(mix\)"):
        describe_runs([Run(folder)])


def test_another_base_is_refused(runs: Path, tmp_path: Path, fake: FakeVllm) -> None:
    base = described(runs)["base"]
    other = Path(shutil.copytree(fake.root, tmp_path / "spoken-mini"))
    (other / "config.json").write_text((other / "config.json").read_text().replace("{", "{ ", 1))
    assert "its files differ" in str(refuse_other_base(str(other), base))
    assert "Start vLLM on that base" in str(refuse_other_base("somebody/llama", base))
    assert refuse_other_base("somebody/spoken-mini", base) is None and refuse_other_base(fake.root, base) is None
    fake.root = str(other)
    with pytest.raises(InputError, match="its files differ"):
        VllmEngine(described(runs), fake.url)


def test_a_server_that_is_not_there_or_takes_no_adapters_is_told_at_start(runs: Path) -> None:
    with pytest.raises(InputError, match="Is the vLLM server running"):
        VllmEngine(described(runs), "http://127.0.0.1:9")
    with running(fake_of(runs, takes_loras=False)) as fake, pytest.raises(InputError, match="VLLM_ALLOW_RUNTIME"):
        VllmEngine(described(runs), fake.url)


def test_what_the_server_has_already_is_not_handed_over_again(fake: FakeVllm, runs: Path, tmp_path: Path) -> None:
    first = VllmEngine(described(runs), fake.url)
    late = rescaled(copied(runs, tmp_path, "late"), 0.5)
    asyncio.run(first.change(late, None))
    second = VllmEngine(described(runs), fake.url)
    asyncio.run(second.change(late, None))
    assert len(fake.loras) == 3 and answered(second, ask("late")).ids
    second.close()
    first.close()


def test_another_scale_is_another_adapter(runs: Path, tmp_path: Path) -> None:
    run = copied(runs, tmp_path, "own")
    file = run.adapter() / "adapter_config.json"
    before = describe_runs([run])["own"].lora
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_alpha": 1}))
    assert describe_runs([run])["own"].lora != before


def test_a_key_goes_along(runs: Path) -> None:
    with running(fake_of(runs, key="s3cret")) as fake:
        with pytest.raises(InputError, match="Unauthorized"):
            VllmEngine(described(runs), fake.url)
        engine = VllmEngine(described(runs), fake.url, "s3cret")
        engine.close()


def test_an_adapter_that_the_server_refuses_is_named(runs: Path, tmp_path: Path, fake: FakeVllm) -> None:
    run = copied(runs, tmp_path, "wide")
    file = run.adapter() / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 64}))
    with pytest.raises(InputError, match="wide: vLLM: LoRA rank 64 is greater"):
        VllmEngine(describe_runs([run]), fake.url)


def test_the_context_is_the_smaller_one(runs: Path) -> None:
    with running(fake_of(runs, context=40)) as fake:
        engine = VllmEngine(described(runs), fake.url)
        assert engine.models()["polite"].context == 40
        assert answered(engine, ask(sampling=Sampling(temperature=0.0, max_tokens=400))).finish in ("stop", "length")
        engine.close()


def test_a_server_that_is_away_is_a_503_and_not_ready_and_comes_back_with_its_adapters(
    engine: VllmEngine, fake: FakeVllm
) -> None:
    client = TestClient(create_app(engine, Bounds(100)))
    body = {"model": "polite", "messages": [{"role": "user", "content": "안녕"}], "max_tokens": 4}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    fake.is_away = True
    fake.loras.clear()
    until(lambda: client.get("/readyz").status_code == 503)
    answer = client.post("/v1/chat/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_unavailable")
    assert answer.headers["retry-after"] and client.get("/readyz").json()["status"] == "failing"
    fake.is_away = False
    until(lambda: client.get("/readyz").status_code == 200)
    assert client.post("/v1/chat/completions", json=body).status_code == 200 and len(fake.loras) == 2


@pytest.mark.parametrize(
    ("how", "status", "code"),
    [
        ("status", 500, "internal_error"),
        ("event", 500, "internal_error"),
        ("foreign", 500, "internal_error"),
        ("cut", 503, "engine_unavailable"),
    ],
)
def test_what_breaks_there_fails_that_request_alone(
    engine: VllmEngine, fake: FakeVllm, how: Any, status: int, code: str
) -> None:
    fake.breaks.append(how)
    refusal = refused(engine, ask(sampling=Sampling(temperature=1.0, max_tokens=30, seed=3)))
    assert (refusal.status, refusal.code) == (status, code)
    assert engine.load().n_failures == (status == 500)
    until(lambda: engine.load().state == "ready")
    assert answered(engine, ask()).ids


def test_more_than_may_wait_are_sent_away(fake: FakeVllm, runs: Path) -> None:
    engine = VllmEngine(described(runs), fake.url, n_slots=1, n_queue=1)
    long = ask(sampling=Sampling(temperature=1.5, max_tokens=400))

    async def run() -> None:
        replies = [await engine.submit(long) for _ in range(2)]
        with pytest.raises(Refusal) as raised:
            await engine.submit(long)
        assert raised.value.status == 429 and raised.value.headers["retry-after"]
        for reply in replies:
            reply.cancel()

    asyncio.run(run())
    engine.close()


def test_a_reloaded_run_answers_anew_and_who_is_being_answered_keeps_the_old(
    fake: FakeVllm, runs: Path, tmp_path: Path
) -> None:
    run = copied(runs, tmp_path, "own")
    engine = VllmEngine(describe_runs([run]), fake.url)
    (old,) = fake.loras

    async def during() -> None:
        reply = await engine.submit(ask("own", Sampling(temperature=1.0, max_tokens=100, seed=2)))
        rescaled(run, 0.5)
        await engine.change(run, "own")
        assert len(fake.loras) == 2
        assert "".join([piece async for piece in reply]) == reply.answer.text
        assert reply.answer.finish != "cancelled"

    asyncio.run(during())
    until(lambda: len(fake.loras) == 1)
    assert old not in fake.loras
    answered(engine, ask("own"))
    assert fake.bodies[-1]["model"] in fake.loras
    engine.close()
    assert not fake.loras


def test_runs_come_and_go(engine: VllmEngine, fake: FakeVllm, runs: Path, tmp_path: Path) -> None:
    run = rescaled(copied(runs, tmp_path, "late"), 0.5)
    asyncio.run(engine.change(run, None))
    assert answered(engine, ask("late")).ids and len(fake.loras) == 3
    asyncio.run(engine.change(None, "late"))
    assert refused(engine, ask("late")).status == 404 and len(fake.loras) == 2


def test_a_run_without_effect_or_damaged_is_refused_and_nothing_changes(
    engine: VllmEngine, runs: Path, tmp_path: Path
) -> None:
    before = dict(engine.models())
    broken = copied(runs, tmp_path, "broken")
    rescaled(broken, float("nan"))
    for run, says in ((copied(runs, tmp_path, "idle", "casual"), "changes nothing"), (broken, "not finite")):
        with pytest.raises(Refusal, match=says) as raised:
            asyncio.run(engine.change(run, None))
        assert (raised.value.status, raised.value.code) == (400, "run_unfit")
    assert engine.models() == before


def test_the_command_serves_through_it(fake: FakeVllm, runs: Path, tmp_path: Path, start: Callable[..., Any]) -> None:
    words = ("--runs", str(runs), "--no-ui", "--engine", "vllm", "--vllm-url", fake.url)
    one = start("casual", "polite", *words, log=tmp_path / "log.txt")
    assert f"vLLM at {fake.url}" in one.said
    asked = {"model": "polite", "messages": [{"role": "user", "content": "오늘 뭐 먹지?"}], "max_tokens": 6, "n": 2}
    said = httpx.post(f"{one.address}/v1/chat/completions", json=asked | {"logprobs": True}, timeout=30).json()
    assert len(said["choices"]) == 2 and said["choices"][0]["logprobs"]["content"]
    assert {body["model"].split("-")[1] for body in fake.bodies} == {"polite"}
