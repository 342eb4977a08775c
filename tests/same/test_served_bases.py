"""A vote of members on different bases says in the server what the toolkit finds; what cannot be is refused by name."""

import asyncio
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from serve.__main__ import _open_engine
from serve.engines.bases import BasesEngine
from serve.engines.bases_panel import open_panel
from serve.engines.contract import Ask, Auto, Mix, One, Vote
from serve.refusal import Refusal
from serve.runs import find_runs, has_bases
from serve.settings import read_settings
from tests.combining_world import train, write_recipe
from tests.encoder_world import save_encoder
from toolkit.bundle import Run
from toolkit.combine.speaker import Speaker, open_speaker
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble.subjects import Combined, Table
from toolkit.errors import BaseError, InputError
from toolkit.grammar import check_schema
from toolkit.sampling import Sampling

pytestmark = pytest.mark.slow

TEXTS = ["밥 먹었어? 3", "식사는 하셨습니까? 8", "did you eat 11"]
TALKS = [(Turn("user", "밥 먹었어? 3"),), (Turn("user", "안녕"), Turn("assistant", "네"), Turn("user", "식사는 8"))]
SAMPLINGS = [Sampling(temperature=0.0, max_tokens=9), Sampling(temperature=0.9, max_tokens=9, seed=4)]
FRESH = (
    "fresh: {base: {new: {hidden: 32, layers: 1, heads: 2, vocab: 400, context: 64}}, adapter: {kind: full}},"
    " doubled: {adapter: {kind: lora, rank: 2, dora: true}}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory with two runs: `labels` votes with an encoder among its members, `talks` has none."""
    folder = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        save_encoder(folder / "encoder")
        weighed = "{kind: vote, how: soft, weights: {tuned: 0.5, fresh: 0.2, doubled: 0, reader: 0.3}}"
        experts = f"{{tuned: {{}}, {FRESH}, reader: {{base: {{model: ./encoder}}}}}}"
        train(folder, write_recipe(folder, weighed, experts, name="labels", more="labels"))
        train(folder, write_recipe(folder, "{kind: vote}", f"{{tuned: {{}}, {FRESH}}}", name="talks", more="labels"))
        yield folder


def serving(place: Path, name: str, **options: Any) -> BasesEngine:
    (run,) = find_runs([name], place / "runs")
    assert has_bases(run, run.facts())
    return BasesEngine(open_panel(run, "cpu"), **options)


def asked(name: str, **more: Any) -> Ask:
    return Ask("id", One(name), TALKS[0], more.pop("sampling", SAMPLINGS[0]), **more)


async def heard(engine: BasesEngine, ask: Ask) -> tuple[list[str], Any]:
    reply = await engine.submit(ask)
    return [piece async for piece in reply], reply.answer


def refused(engine: BasesEngine, ask: Ask) -> Refusal:
    with pytest.raises(Refusal) as raised:
        asyncio.run(heard(engine, ask))
    return raised.value


def table_of(speaker: Speaker, labels: tuple[str, ...]) -> Table:
    talks = [Talk((Turn("user", text), Turn("assistant", labels[0])), "asked", labels[0]) for text in TEXTS]
    return Table(speaker.base, speaker.renderer, speaker.stack, talks, [], labels, speaker.apart)


def close_to(found: list[Mapping[str, float]], wanted: list[dict[str, float]]) -> bool:
    return [dict(one) for one in found] == [pytest.approx(one, abs=1e-5) for one in wanted]


def test_labels_are_those_of_the_jury_and_of_each_member_alone(place: Path) -> None:
    speaker, loaded = open_speaker(place / "runs" / "labels", "cpu")
    labels = loaded.labels
    table = table_of(speaker, labels)
    engine = serving(place, "labels")
    served, found = asyncio.run(engine.classify(One("labels"), TEXTS, None))
    assert served.combination == "vote" and served.name == "labels" and len(set(served.base.split(", "))) == 3
    assert close_to(found, Combined(table, speaker).labelled(table.talks, labels))
    for name in ("tuned", "fresh", "reader", "doubled"):
        alone = asyncio.run(engine.classify(One(f"labels/{name}"), TEXTS, labels[::-1]))[1]
        assert close_to(alone, table.labelled(name))
    hard = asyncio.run(engine.classify(Vote(("labels/tuned", "labels/reader")), TEXTS, None))[1]
    assert {value for of in hard for value in of.values()} <= {0.0, 0.5, 1.0}
    one = asyncio.run(engine.classify(Vote(("labels/tuned",)), TEXTS, labels[::-1]))[1]
    assert close_to(one, table.labelled("tuned"))  # the run's own wording, for a request's vote as well
    engine.close()


def test_answers_are_those_of_the_toolkits_chat(place: Path) -> None:
    speaker, _ = open_speaker(place / "runs" / "talks", "cpu")
    engine = serving(place, "talks")
    for sampling in SAMPLINGS:
        for turns in TALKS:
            wanted = speaker.answer([turns], sampling)[0]
            pieces, found = asyncio.run(heard(engine, Ask("id", One("talks"), turns, sampling)))
            assert (found.ids, found.text, found.finish) == (wanted.ids, wanted.text, wanted.finish)
            assert "".join(pieces) == found.text and len(pieces) <= 1
            assert found.routing[0][0] in engine.models()
    one, alone = asyncio.run(heard(engine, asked("talks/tuned", n_logprobs=2)))
    assert "".join(one) == alone.text and len(alone.logprobs) == len(alone.ids)
    engine.close()


def test_a_base_that_several_members_have_lies_in_memory_once(place: Path) -> None:
    run = Run(place / "runs" / "talks")
    panel = open_panel(run, "cpu")
    tuned, doubled = panel.members["talks/tuned"].loaded, panel.members["talks/doubled"].loaded
    whole = {parameter.data_ptr() for parameter in tuned.model.parameters()}
    assert whole <= {parameter.data_ptr() for parameter in doubled.model.parameters()}
    assert panel.told().startswith("2 bases (") and f"{panel.memory_mb:,.0f} MB" in panel.told()


def test_what_has_no_meaning_over_tokenizers_is_refused_by_name(place: Path) -> None:
    engine = serving(place, "talks")
    mixed = refused(engine, Ask("id", Mix((("talks/tuned", 1.0), ("talks/fresh", 1.0))), TALKS[0], SAMPLINGS[0]))
    assert mixed.param == "model" and "tokenizers of their own" in mixed.message
    assert refused(engine, asked("talks", n_logprobs=0)).param == "logprobs"
    assert refused(engine, asked("talks", sampling=Sampling(logit_bias=((5, 1.0),)))).param == "logit_bias"
    assert refused(engine, Ask("id", Auto(), TALKS[0], SAMPLINGS[0])).param == "model"
    assert refused(engine, asked("talks/nobody")).status == 404
    assert refused(engine, Ask("id", Vote(("talks", "talks/tuned")), TALKS[0], SAMPLINGS[0])).param == "model"
    long = refused(engine, Ask("id", One("talks"), (Turn("user", "길다 " * 200),), SAMPLINGS[0]))
    assert long.code == "context_length_exceeded"
    for texts, labels, param in ((["길다 " * 400], None, "input"), (TEXTS, ["반말", "다른 말"], "labels")):
        with pytest.raises(Refusal) as raised:
            asyncio.run(engine.classify(One("talks"), texts, labels))
        assert raised.value.param == param
    with pytest.raises(Refusal, match="load and unload"):
        asyncio.run(engine.change(None, "talks"))
    assert engine.load().n_failures == 0
    engine.close()


def test_every_member_follows_a_schema_with_its_own_tokenizer(place: Path) -> None:
    engine = serving(place, "talks")
    sampling = Sampling(temperature=1.0, max_tokens=40, seed=3)
    told, schema = [], check_schema({"enum": ["네", "아니요"]})
    for name in ("talks", "talks/tuned", "talks/fresh"):
        told.append(asyncio.run(heard(engine, asked(name, sampling=sampling, schema=schema)))[1])
    assert {answer.text for answer in told} <= {'"네"', '"아니요"'} and told[0].text in {one.text for one in told[1:]}
    assert refused(engine, asked("talks", schema='{"type": "no such"}')).param == "response_format"
    engine.close()


def test_an_encoder_labels_and_does_not_talk(place: Path) -> None:
    engine = serving(place, "labels")
    for who in ("labels", "labels/reader"):
        assert "labels/reader is an encoder" in refused(engine, asked(who)).message
    engine.close()
    run = place / "runs" / "labels" / "experts" / "reader"
    alone = BasesEngine(open_panel(Run(run), "cpu"))
    assert list(alone.models()) == ["reader"] and alone.models()["reader"].combination is None
    found = asyncio.run(alone.classify(One("reader"), TEXTS, None))[1]
    speaker, loaded = open_speaker(place / "runs" / "labels", "cpu")
    assert close_to(found, table_of(speaker, loaded.labels).labelled("reader"))
    alone.close()


def endless(model: Any, writing: Any, is_cancelled: Callable[[], bool]) -> Iterator[str]:
    while not is_cancelled():
        yield "말"
    writing.end("cancelled")


def test_scorings_do_not_wait_for_an_answer_and_the_queue_is_bounded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = serving(place, "talks", n_queue=1)
    monkeypatch.setattr("serve.engines.bases.write", endless)

    async def run() -> None:
        first = await engine.submit(asked("talks/tuned"))
        pieces = aiter(first)
        assert await anext(pieces) == "말"
        assert len((await engine.classify(One("talks"), TEXTS, None))[1]) == 3
        second = await engine.submit(asked("talks"))
        with pytest.raises(Refusal) as full:
            await engine.submit(asked("talks"))
        assert full.value.status == 429 and engine.load().n_running == 1 and engine.load().n_waiting == 1
        second.cancel()
        third = await engine.submit(asked("talks"))  # nobody waits in the place of one that was cancelled
        assert engine.load().n_waiting == 1
        third.cancel()
        first.cancel()
        assert {piece async for piece in pieces} <= {"말"} and first.answer.finish == "cancelled"
        assert "".join([piece async for piece in second]) == "" and second.answer.finish == "cancelled"

    asyncio.run(run())
    engine.close()


def test_a_stopping_engine_gives_up_with_503(place: Path) -> None:
    engine = serving(place, "talks")

    async def run() -> None:
        reply = await engine.submit(asked("talks", sampling=Sampling(temperature=1.0, max_tokens=200, seed=1)))
        engine.drain(0.0)
        with pytest.raises(Refusal) as raised:
            [piece async for piece in reply]
        assert raised.value.status == 503

    asyncio.run(run())
    engine.close()
    assert engine.load().state == "stopped"
    assert "bases" not in {thread.name for thread in threading.enumerate()}


def test_what_breaks_fails_alone(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = serving(place, "talks")
    with monkeypatch.context() as patch:
        patch.setattr("serve.engines.bases.write", lambda *given: 1 / 0)
        assert refused(engine, asked("talks")).status == 500
    assert engine.load().n_failures == 1
    assert asyncio.run(heard(engine, asked("talks")))[1].ids
    engine.close()


def test_the_command_opens_it_and_says_what_lies_in_memory(place: Path) -> None:
    settings = read_settings(["talks", "--runs", str(place / "runs"), "--device", "cpu"], {})
    engine = _open_engine(settings, find_runs(settings.runs, settings.folder))
    assert isinstance(engine, BasesEngine) and "2 bases (" in engine.computes and "MB of weights" in engine.computes
    engine.close()


def test_its_bases_are_not_served_in_eight_bits(place: Path) -> None:
    settings = read_settings(["talks", "--runs", str(place / "runs"), "--cpu-int8"], {})
    with pytest.raises(BaseError, match="--cpu-int8: the members of talks"):
        _open_engine(settings, find_runs(settings.runs, settings.folder))


def test_it_is_served_by_itself_and_beside_others_refused_by_name(place: Path) -> None:
    for words in (["talks", "labels"], ["labels", "talks"]):
        with pytest.raises(InputError, match="has bases of its own"):
            find_runs(words, place / "runs")
