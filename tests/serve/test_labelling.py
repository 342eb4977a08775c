"""Labels of texts on a real engine: what the toolkit itself finds, while others are answered."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.engines.contract import Ask, Mix, One
from serve.engines.labelling import TEXT, Wording, wording
from serve.engines.models import Model
from serve.engines.rows import RowsEngine
from serve.refusal import Refusal
from toolkit.bundle import Run
from toolkit.combine.rows import Apart, answering
from toolkit.combine.speaker import Spec
from toolkit.combine.vote import vote_labels
from toolkit.corpus.talk import Turn
from toolkit.evaluate.classify import classify
from toolkit.generate import Sampling
from toolkit.recipe.adapter import Prefix
from toolkit.stack.adapter import new_adapter

LABELS = ("긍정", "부정", "모르겠음")
TEXTS = ["이 영화 정말 재밌다", "시간 낭비였다"]


@pytest.fixture
def engine(bare: Any) -> Iterator[RowsEngine]:
    engine = RowsEngine(bare.models, n_slots=4, n_queue=2)
    yield engine
    engine.close()


def test_labels_are_those_that_the_toolkit_finds(engine: RowsEngine, bare: Any) -> None:
    served, found = asyncio.run(engine.classify(One("casual"), TEXTS, LABELS))
    turns = [(Turn("user", text),) for text in TEXTS]
    wanted = classify(bare.loaded.model, bare.loaded.renderer, turns, LABELS)
    assert served.name == "casual" and all(abs(sum(of.values()) - 1) < 1e-6 for of in found)
    for own, other in zip(found, wanted, strict=True):
        assert own == pytest.approx(other, abs=1e-5)


def test_answers_go_on_between_texts(engine: RowsEngine) -> None:
    async def run() -> None:
        alone = Ask("id", One("base"), (Turn("user", "안녕"),), Sampling(temperature=0.0, max_tokens=16))
        before = "".join([piece async for piece in await engine.submit(alone)])
        reply = await engine.submit(alone)
        (_, found), text = await asyncio.gather(
            engine.classify(One("casual"), TEXTS * 3, LABELS), asyncio.create_task(joined(reply))
        )
        assert len(found) == 6 and text == before

    asyncio.run(run())


async def joined(reply: Any) -> str:
    return "".join([piece async for piece in reply])


@pytest.mark.parametrize(
    ("who", "texts", "labels", "param"),
    [
        (One("casual"), TEXTS, None, "labels"),
        (Mix((("casual", 1.0), ("polite", 1.0))), TEXTS, LABELS, "model"),
        (One("casual"), ["긴 글 " * 3000], LABELS, "input"),
        (One("nobody"), TEXTS, LABELS, "model"),
    ],
)
def test_what_cannot_be_labelled_is_refused(engine: RowsEngine, who: Any, texts: Any, labels: Any, param: str) -> None:
    with pytest.raises(Refusal) as raised:
        asyncio.run(engine.classify(who, texts, labels))
    assert raised.value.param == param and raised.value.status in (400, 404)
    assert engine.load().n_waiting == 0


def test_a_runs_own_labels_are_taken_where_none_are_named(bare: Any) -> None:
    loaded = replace(bare.loaded, labels=LABELS)
    engine = RowsEngine({name: replace(model, loaded=loaded) for name, model in bare.models.items()})
    _, found = asyncio.run(engine.classify(One("casual"), TEXTS[:1], None))
    engine.close()
    assert tuple(found[0]) == LABELS


@pytest.fixture
def members(bare: Any, tmp_path: Path) -> Iterator[dict[str, Model]]:
    """Two that find different labels likely, each with what its own prefix says."""
    stack = bare.models["base"].stack
    models = dict(bare.models)
    (tmp_path / "recipe.yaml").write_text(
        "name: mood\ntask: classify\nbase: {model: spoken-mini}\ncombine: {kind: bag}\ndata:\n  train: [talk.csv]\n"
        '  format: {kind: labels, text: document, label: label, template: "글: {text}"}\n',
        encoding="utf-8",
    )
    loaded = replace(bare.loaded, labels=LABELS, run=Run(tmp_path))
    for seed, name in enumerate(("casual", "polite")):
        stack.add(name, new_adapter(bare.loaded.model, Prefix(tokens=4), seed=seed))
        models[name] = replace(models[name], adapter=name, loaded=loaded)
    yield models
    for name in ("casual", "polite"):
        stack.remove(name)


def run_of(models: dict[str, Model], kind: str, how: str, task: str = "classify") -> dict[str, Model]:
    weights = {"casual": 0.7, "polite": 0.3}
    served = replace(models["casual"].served, name="run", combination=kind, members=tuple(weights.items()), task=task)
    run = replace(models["casual"], served=served, adapter=None, spec=Spec(kind, how, tuple(weights), weights))
    return {**models, "run": run}


@pytest.mark.parametrize(("kind", "how"), [("vote", "hard"), ("bag", "soft"), ("boost", "soft"), ("vote", "logprob")])
def test_a_run_whose_members_vote_over_labels_labels_by_their_vote(
    members: dict[str, Model], bare: Any, kind: str, how: Any
) -> None:
    engine = RowsEngine(run_of(members, kind, how))
    served, found = asyncio.run(engine.classify(One("run"), TEXTS, None))
    engine.close()
    turns = [(Turn("user", f"글: {text}"),) for text in TEXTS]
    said = []
    for name in ("casual", "polite"):
        with answering(members[name].stack, [name], Apart) as opened:  # type: ignore[arg-type]
            said.append(classify(opened, bare.loaded.renderer, turns, LABELS))
    logp = torch.tensor([[[of[label] for label in LABELS] for of in rows] for rows in said]).log()
    wanted = vote_labels(logp, how, [0.7, 0.3]).probs_RL.tolist()
    assert served.name == "run" and served.combination == kind
    assert [list(of) for of in found] == [list(LABELS)] * 2
    assert [list(of.values()) for of in found] == [pytest.approx(row, abs=1e-4) for row in wanted]
    assert how == "hard" or wanted[0] != pytest.approx(list(said[0][0].values()), abs=1e-3)


@pytest.mark.parametrize(("kind", "how", "task"), [("mix", "prob", "classify"), ("vote", "hard", "chat")])
def test_a_run_whose_members_do_not_vote_over_labels_is_refused(
    members: dict[str, Model], kind: str, how: str, task: str
) -> None:
    engine = RowsEngine(run_of(members, kind, how, task))
    with pytest.raises(Refusal, match="run: several answer there as one"):
        asyncio.run(engine.classify(One("run"), TEXTS, LABELS))
    engine.close()


def test_a_text_stands_in_the_words_that_a_run_was_taught_with(tmp_path: Path) -> None:
    (tmp_path / "talk.csv").write_text("document,label\n좋다,1\n", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text(
        "name: mood\ntask: classify\nbase: {model: spoken-mini}\ndata:\n  train: [talk.csv]\n"
        '  format: {kind: labels, text: document, label: label, template: "{text}\\n감정:"}\n',
        encoding="utf-8",
    )
    assert wording(Run(tmp_path), "classify") == Wording("{text}\n감정:")
    assert wording(Run(tmp_path), "chat") == Wording(TEXT)


def test_a_system_turn_that_a_run_was_taught_with_stands_before_each_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "name: mood\ntask: classify\nbase: {model: spoken-mini}\ndata:\n  train: [talk.csv]\n  system: 느낌을 말해\n"
        "  format: {kind: labels, text: document, label: label}\n",
        encoding="utf-8",
    )
    turns = wording(Run(tmp_path), "classify").turns("좋다")
    assert turns == (Turn("system", "느낌을 말해"), Turn("user", "좋다"))


def test_an_engine_that_stops_labels_nothing(engine: RowsEngine) -> None:
    engine.drain(1.0)
    with pytest.raises(Refusal) as raised:
        asyncio.run(engine.classify(One("casual"), TEXTS, LABELS))
    assert raised.value.status == 503
