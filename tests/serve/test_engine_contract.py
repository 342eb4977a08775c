"""What every engine keeps: subclass `EngineContract` with an `engine` fixture that serves `casual` and `polite`."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.engines.bases import BasesEngine
from serve.engines.bases_panel import Member, Panel
from serve.engines.contract import Ask, Engine, One, Reply
from serve.engines.rows import RowsEngine
from serve.engines.vllm import VllmEngine
from serve.refusal import Refusal
from tests.serve.fake_vllm import described, fake_of, running
from toolkit.bundle import Run
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling

GREEDY = Sampling(temperature=0.0, max_tokens=12)
TURNS = (Turn("user", "오늘 뭐 먹지?"),)


def ask(model: str = "casual", text: str = "오늘 뭐 먹지?", sampling: Sampling = GREEDY) -> Ask:
    return Ask("id", One(model), (Turn("user", text),), sampling)


async def said(reply: Reply) -> str:
    return "".join([piece async for piece in reply])


async def refused(engine: Engine, one: Ask) -> Refusal:
    with pytest.raises(Refusal) as raised:
        await said(await engine.submit(one))
    return raised.value


class EngineContract:
    """One class for all engines."""

    def test_models_are_named_as_they_are_asked_for(self, engine: Engine) -> None:
        models = engine.models()
        assert {"casual", "polite"} <= set(models) and all(name == one.name for name, one in models.items())
        assert engine.load().state == "ready"

    def test_who_answers_is_described_and_nobody_is_a_404(self, engine: Engine) -> None:
        assert engine.served(One("casual")) == engine.models()["casual"]
        with pytest.raises(Refusal) as raised:
            engine.served(One("nobody"))
        assert (raised.value.status, raised.value.code) == (404, "model_not_found")
        assert asyncio.run(refused(engine, ask("nobody"))).status == 404

    def test_log_probabilities_are_those_of_the_tokens(self, engine: Engine) -> None:
        async def run() -> None:
            reply = await engine.submit(Ask("id", One("casual"), TURNS, GREEDY, n_logprobs=1))
            assert await said(reply) == reply.answer.text and reply.served.name == "casual"
            told = reply.answer.logprobs
            assert tuple(one.id for one in told) == reply.answer.ids and tuple(reply.logprobs) == told
            assert all(one.logprob <= 0 and one.top[0].logprob == one.logprob for one in told)

        asyncio.run(run())

    def test_pieces_join_to_the_answer(self, engine: Engine) -> None:
        async def run() -> None:
            reply = await engine.submit(ask())
            text = await said(reply)
            assert text and text == reply.answer.text and reply.answer.finish in ("stop", "length")
            assert 0 < len(reply.answer.ids) <= 12 and reply.n_prompt > 0

        asyncio.run(run())

    def test_no_piece_holds_half_a_character(self, engine: Engine) -> None:
        async def run() -> None:
            hot = Sampling(temperature=2.0, top_p=1.0, max_tokens=60, seed=5)
            async for piece in await engine.submit(ask(sampling=hot)):
                piece.encode()

        asyncio.run(run())

    def test_a_seed_says_the_same_alone_and_among_others(self, engine: Engine) -> None:
        async def run() -> None:
            warm = Sampling(temperature=1.0, max_tokens=16, seed=7)
            alone = await said(await engine.submit(ask(sampling=warm)))
            noise = [await engine.submit(ask("polite", f"안녕 {i}", Sampling(seed=i, max_tokens=16))) for i in range(5)]
            together = [said(await engine.submit(ask(sampling=warm))), *map(said, noise)]
            assert (await asyncio.gather(*together))[0] == alone

        asyncio.run(run())

    def test_a_prompt_that_leaves_no_room_is_refused(self, engine: Engine) -> None:
        refusal = asyncio.run(refused(engine, ask(text="가나다라 " * 3000)))
        assert (refusal.status, refusal.code) == (400, "context_length_exceeded")

    def test_turns_that_the_template_does_not_write_are_refused(self, engine: Engine) -> None:
        assert asyncio.run(refused(engine, Ask("id", One("casual"), (Turn("system", ""),), GREEDY))).status == 400

    def test_a_cancelled_answer_ends_within_a_step(self, engine: Engine) -> None:
        async def run() -> None:
            reply = await engine.submit(ask(sampling=Sampling(temperature=1.5, max_tokens=400, stop=("없는말",))))
            pieces = []
            async for piece in reply:
                pieces.append(piece)
                reply.cancel()
            assert len(pieces) < 20 and reply.answer.finish in ("cancelled", "stop")
            reply.cancel()

        asyncio.run(run())

    def test_an_answer_that_is_cancelled_while_it_waits_is_over(self, engine: Engine) -> None:
        async def run() -> None:
            replies = [await engine.submit(ask(sampling=Sampling(temperature=1.5, max_tokens=400))) for _ in range(20)]
            for reply in replies:
                reply.cancel()
            async with asyncio.timeout(20):
                await asyncio.gather(*map(said, replies))
            assert engine.load().n_running == 0

        asyncio.run(run())

    def test_draining_finishes_what_runs_and_takes_nothing_in(self, engine: Engine) -> None:
        async def run() -> None:
            reply = await engine.submit(ask())
            engine.drain(30.0)
            assert (await refused(engine, ask())).status == 503
            assert await said(reply) == reply.answer.text and reply.answer.finish in ("stop", "length")

        asyncio.run(run())

    def test_what_is_not_over_in_time_is_given_up(self, engine: Engine) -> None:
        async def run() -> None:
            endless = [await engine.submit(ask(sampling=Sampling(temperature=1.5, max_tokens=400))) for _ in range(20)]
            engine.drain(0.0)
            over = await asyncio.gather(*map(said, endless), return_exceptions=True)
            assert all(isinstance(one, Refusal) and one.status == 503 for one in over)

        asyncio.run(run())

    def test_closing_twice_is_harmless(self, engine: Engine) -> None:
        engine.close()
        engine.close()
        assert engine.load().state == "stopped"


class TestRowsEngine(EngineContract):
    @pytest.fixture
    def engine(self, bare: Any) -> Iterator[Engine]:
        engine = RowsEngine(bare.models, n_slots=4, n_queue=32)
        yield engine
        engine.close()


class TestRowsEngineOverModelsOfTheirOwn(EngineContract):
    """Runs that no stack can hold keep the same contract."""

    @pytest.fixture
    def engine(self, bare: Any) -> Iterator[Engine]:
        engine = RowsEngine(bare.alone, n_slots=4, n_queue=32)
        yield engine
        engine.close()


class TestBasesEngine(EngineContract):
    """Members on bases of their own, each asked alone."""

    @pytest.fixture
    def engine(self, bare: Any) -> Iterator[Engine]:
        members = {name: Member(model.served, model.loaded) for name, model in bare.alone.items()}
        engine = BasesEngine(Panel(Run(Path("casual")), members["casual"].served, members), n_queue=32)
        yield engine
        engine.close()


@pytest.mark.slow
class TestVllmEngine(EngineContract):
    """Through HTTP, to a server that answers as vLLM does."""

    @pytest.fixture
    def engine(self, runs: Path) -> Iterator[Engine]:
        with running(fake_of(runs)) as fake:
            engine = VllmEngine(described(runs), fake.url, n_slots=4, n_queue=32)
            yield engine
            engine.close()
