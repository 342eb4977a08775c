"""The engine as a whole: many adapters in one batch, steps that break, a loop that starts again."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from serve.engines import rows as room
from serve.engines import slots as slots_room
from serve.engines.contract import Ask, One, Reply
from serve.engines.models import Model
from serve.engines.rows import RowsEngine
from serve.refusal import Refusal
from tests.served_world import watch
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling
from toolkit.recipe.model import Embedding, Lora, Prefix, Reft
from toolkit.stack.adapter import Adapter, new_adapter
from toolkit.stack.stack import Stack

KINDS: dict[str, Any] = {
    "lora": Lora(rank=4), "lora-8": Lora(rank=8), "prefix": Prefix(tokens=6), "reft": Reft(rank=3),
    "embedding": Embedding(),
}  # fmt: skip
SHORT = Sampling(temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def models(bare: Any) -> dict[str, Model]:
    """spoken-mini under its own name and under one for each kind of adapter, all of them far from their start."""
    base, stack = bare.loaded.base, Stack(bare.loaded.base.model)
    noise = torch.Generator().manual_seed(3)
    made = {"base": replace(bare.models["base"], stack=stack)}
    for seed, (name, options) in enumerate(KINDS.items()):
        raw = new_adapter(base.model, options, seed=seed, token_ids=range(50, 4000))
        moved = {
            key: value + 0.05 * torch.randn(value.shape, generator=noise) if value.is_floating_point() else value
            for key, value in raw.tensors.items()
        }
        stack.add(name, Adapter(raw.kind, moved, raw.config, raw.is_raw))
        served = replace(bare.models["casual"].served, name=name)
        n_prefix = stack.n_prefix(stack.owners([name]))[0]
        made[name] = Model(served, bare.loaded, stack, name, n_prefix)
    return made


@pytest.fixture
def start(models: dict[str, Model]) -> Iterator[Callable[..., RowsEngine]]:
    engines: list[RowsEngine] = []

    def made(**options: Any) -> RowsEngine:
        engines.append(RowsEngine(options.pop("models", models), **options))
        return engines[-1]

    yield made
    for engine in engines:
        engine.close()


def ask(model: str = "lora", text: str = "오늘 뭐 먹지?", sampling: Sampling = SHORT, id: str = "id") -> Ask:
    return Ask(id, One(model), (Turn("user", text),), sampling)


async def said(engine: RowsEngine, one: Ask) -> tuple[int, ...]:
    reply = await engine.submit(one)
    pieces = [piece async for piece in reply]
    assert "".join(pieces) == reply.answer.text
    return reply.answer.ids


async def all_said(engine: RowsEngine, asks: Sequence[Ask]) -> list[Any]:
    return await asyncio.gather(*(said(engine, one) for one in asks), return_exceptions=True)


def mixed(n_asks: int) -> list[Ask]:
    """Requests of many lengths for every name, greedy and warm, with penalties and stop strings."""
    names = ["base", *KINDS]
    made = []
    for index in range(n_asks):
        sampling = Sampling(
            temperature=(0.0, 0.8, 1.2)[index % 3],
            top_k=(0, 40)[index % 2],
            repetition_penalty=(1.0, 1.0, 1.3)[index // 2 % 3],
            max_tokens=4 + index % 13,
            stop=("다", "e") if index % 5 == 0 else (),
            seed=index,
        )
        made.append(ask(names[index % len(names)], "말이 길어진다 " * (index % 7) + "오늘 뭐 먹지?", sampling))
    return made


def test_a_request_gets_the_same_tokens_alone_and_in_a_full_mixed_batch(start: Callable[..., RowsEngine]) -> None:
    asks = mixed(24)

    async def alone() -> list[tuple[int, ...]]:
        engine = start(n_slots=1)
        return [await said(engine, one) for one in asks]

    wanted = asyncio.run(alone())
    engine, batches = start(n_slots=10), []
    breaking(engine._slots, "forward", lambda seats, ids, _: batches.append(([seat.slot for seat in seats], ids)))
    assert asyncio.run(all_said(engine, asks)) == wanted
    writing = [slots for slots, ids in batches if len(slots) > 1 and max(map(len, ids)) == 1]
    assert len(writing) > 5 and all(slots == list(range(len(slots))) for slots in writing)
    assert len(set(wanted)) > 16


def test_answers_in_a_stack_are_those_of_models_of_their_own(start: Callable[..., RowsEngine], bare: Any) -> None:
    """Two forward passes agree to rounding, so no seed may land on the border of two tokens, as 8 does (to 2e-7)."""
    seeded = [replace(one, sampling=replace(one.sampling, seed=50 + place)) for place, one in enumerate(mixed(9))]
    asks = [replace(one, who=One("base")) for one in seeded]
    own = {"base": bare.alone["base"]}
    assert asyncio.run(all_said(start(), asks)) == asyncio.run(all_said(start(models=own), asks))


def endless(models: dict[str, Model]) -> dict[str, Model]:
    """The same, but no answer ends by itself."""
    return {name: replace(one, loaded=replace(one.loaded, ends=frozenset())) for name, one in models.items()}


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.001)


def test_a_long_prompt_does_not_stall_those_who_stream(start: Callable[..., RowsEngine], models: Any) -> None:
    engine, order = start(models=endless(models)), []

    async def listen(name: str, reply: Reply) -> None:
        async for _ in reply:
            order.append(name)

    async def run() -> None:
        sampling = Sampling(temperature=1.0, max_tokens=480, seed=1)
        stream = await engine.submit(ask("base", sampling=sampling))
        listening = asyncio.create_task(listen("stream", stream))
        await until(lambda: len(order) > 2)
        n_before = len(order)
        long = await engine.submit(ask("lora", "아주 긴 이야기를 할게. " * 65))
        assert 256 < long.n_prompt < 512
        await listen("long", long)
        assert order.index("long") - n_before >= 4
        stream.cancel()
        await listening

    asyncio.run(run())


def test_nothing_is_asked_of_a_prompt_that_goes_on(start: Callable[..., RowsEngine]) -> None:
    engine = start()
    passes = watch(engine._slots, "forward")
    asyncio.run(said(engine, ask("lora", "아주 긴 이야기를 할게. " * 65)))
    reading = [asked for _, ids, asked in passes if len(ids[0]) > 1]
    assert len(reading) > 1 and reading == [[False]] * (len(reading) - 1) + [[True]]
    assert all(asked == [True] for _, ids, asked in passes if len(ids[0]) == 1)


def test_the_context_is_the_last_bound_of_an_answer(start: Callable[..., RowsEngine], models: Any) -> None:
    one = models["prefix"]
    tight = replace(one, served=replace(one.served, context=40), loaded=replace(one.loaded, ends=frozenset()))
    engine = start(models={"prefix": tight})

    async def run() -> None:
        reply = await engine.submit(ask("prefix", sampling=Sampling(max_tokens=400)))
        async for _ in reply:
            pass
        assert len(reply.answer.ids) == 40 - reply.n_prompt and reply.answer.finish == "length"

    asyncio.run(run())


class Breaking:
    """Stands before a method and raises when told."""

    def __init__(self, inner: Callable[..., Any], breaks: Callable[..., bool]) -> None:
        self.inner, self.breaks, self.n_raised = inner, breaks, 0

    def __call__(self, *given: Any) -> Any:
        if self.breaks(*given):
            self.n_raised += 1
            raise ZeroDivisionError("inside")
        return self.inner(*given)


def breaking(holder: Any, method: str, breaks: Callable[..., bool]) -> Breaking:
    made = Breaking(getattr(holder, method), breaks)
    setattr(holder, method, made)
    return made


def test_a_step_that_breaks_once_changes_no_answer(start: Callable[..., RowsEngine]) -> None:
    asks = mixed(12)
    wanted = asyncio.run(all_said(start(), asks))
    engine = start()
    batches = breaking(engine._slots, "forward", lambda seats, *_: len(seats) > 1)
    assert asyncio.run(all_said(engine, asks)) == wanted
    assert batches.n_raised > 3 and engine.load().n_failures == 0


def test_what_breaks_a_step_fails_alone_with_its_id(start: Callable[..., RowsEngine]) -> None:
    asks = mixed(12)
    wanted = asyncio.run(all_said(start(), asks))
    engine = start()
    breaking(engine._slots, "forward", lambda seats, *_: any(seat.adapter == "reft" for seat in seats))
    done = asyncio.run(all_said(engine, [replace(one, id=f"the-id-{index}") for index, one in enumerate(asks)]))
    for index, (one, answer) in enumerate(zip(asks, done, strict=True)):
        if one.model == "reft":
            assert isinstance(answer, Refusal) and answer.status == 500 and f"the-id-{index}" in answer.message
        else:
            assert answer == wanted[index]
    load = engine.load()
    assert (load.state, load.n_failures, load.n_running, load.n_waiting) == ("ready", 2, 0, 0)


def test_a_loop_that_breaks_fails_what_runs_and_starts_again(start: Callable[..., RowsEngine]) -> None:
    engine = start(n_slots=2)
    wanted = asyncio.run(said(engine, ask()))
    once = breaking(engine._scheduler, "step", lambda: once.n_raised == 0 and len(engine._slots or ()) == 2)
    done = asyncio.run(all_said(engine, [ask(id=f"id-{index}") for index in range(8)]))
    failed = [answer for answer in done if isinstance(answer, Refusal)]
    assert len(failed) == 2 and all(one.status == 500 and "id-" in one.message for one in failed)
    assert [answer for answer in done if not isinstance(answer, Refusal)] == [wanted] * (8 - len(failed))
    assert engine._slots is not None and len(engine._slots) == 0
    assert (engine.load().state, engine.load().n_failures) == ("ready", 1)


@pytest.mark.parametrize("method", ["step", "admit"])
def test_an_engine_that_always_breaks_says_so_leaves_nobody_waiting_and_recovers(
    start: Callable[..., RowsEngine], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(room, "BREATH_S", 0.0)
    engine = start(n_slots=2)
    wanted = asyncio.run(said(engine, ask()))
    is_broken = True
    breaking(engine._scheduler, method, lambda: is_broken)
    done = asyncio.run(asyncio.wait_for(all_said(engine, [ask() for _ in range(9)]), 30.0))
    assert all(isinstance(answer, Refusal) and answer.status == 500 for answer in done)
    assert engine.load().state == "failing"
    is_broken = False
    assert asyncio.run(said(engine, ask())) == wanted and engine.load().state == "ready"


def test_an_adapter_whose_output_is_no_number_fails_alone(start: Callable[..., RowsEngine], models: Any) -> None:
    stack: Stack = models["lora"].stack
    table = next(iter(stack.loras.tables.values()))
    place, wanted = stack.place("lora-8"), asyncio.run(said(start(), ask("lora")))
    kept = table.dense[place].clone()
    try:
        table.dense[place] = float("nan")
        stack._forget_plans()
        done = asyncio.run(all_said(start(), [ask("lora"), ask("lora-8"), ask("lora")]))
    finally:
        table.dense[place] = kept
        stack._forget_plans()
    assert done[0] == done[2] == wanted and isinstance(done[1], Refusal) and done[1].status == 500


@pytest.mark.parametrize("kind", ["rows", "alone"])
def test_a_cancelled_answer_takes_part_in_no_later_step(start: Callable[..., RowsEngine], bare: Any, kind: str) -> None:
    models = endless(bare.models if kind == "rows" else bare.alone)
    engine = start(models={"base": models["base"]})

    async def run() -> None:
        sampling = Sampling(temperature=1.5, max_tokens=450, seed=2)
        replies = [await engine.submit(ask("base", sampling=sampling)) for _ in range(3)]
        async for _ in replies[0]:
            replies[0].cancel()
        assert replies[0].answer.finish == "cancelled" and len(replies[0].answer.ids) < 200
        await until(lambda: engine.load().n_waiting == 0)
        assert engine.load().n_running == 2
        await until(lambda: len(engine._slots or ()) == (2 if kind == "rows" else 0))
        for reply in replies:
            reply.cancel()

    asyncio.run(run())


def test_an_empty_engine_gives_its_memory_back(
    start: Callable[..., RowsEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots_room, "FREE_MB", 0)
    engine = start()
    asyncio.run(all_said(engine, mixed(6)))
    assert engine._slots is not None and engine._slots.cache.n_bytes == 0 and len(engine._slots) == 0


def test_models_of_two_stacks_are_no_engine(models: dict[str, Model], bare: Any) -> None:
    with pytest.raises(ValueError, match="one stack"):
        RowsEngine({"lora": models["lora"], "base": bare.models["base"]})


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "longest row"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "longest row"),
        ({"num_kv_shared_layers": 1}, "share caches"),
        ({"_attn_implementation": "flash_attention_2"}, "flash_attention_2"),
    ],
)
def test_a_base_that_does_not_fit_into_slots_is_named(bare: Any, changes: dict[str, Any], why: str) -> None:
    config = SimpleNamespace(**{"layer_types": None, "rope_parameters": None, "_attn_implementation": "sdpa"} | changes)
    base: Any = SimpleNamespace(config=config, forward=bare.loaded.base.model.forward)
    assert why in (slots_room.unfit(SimpleNamespace(base=base)) or "")  # type: ignore[arg-type]


def test_a_base_whose_rows_depend_on_each_other_is_found_out(bare: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = Stack(bare.loaded.base.model)
    assert slots_room.unfit(stack) is None
    inner = slots_room.Slots._masks
    monkeypatch.setattr(slots_room.Slots, "_masks", lambda self, frame: inner(self, frame) * 0)
    assert "differ" in (slots_room.unfit(stack) or "")
    monkeypatch.setattr(slots_room.Slots, "_masks", lambda self, frame: {"full_attention": None})
    assert "does not run in slots" in (slots_room.unfit(stack) or "")
