"""The engine in eight bits: the same tokens alone, in a full batch and where a beginning is kept; what is refused."""

import asyncio
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from serve.__main__ import _open_engine
from serve.engines.contract import Ask, Mix, One, Vote, Who
from serve.engines.models import open_models
from serve.engines.rows import RowsEngine
from serve.engines.slots import Slots
from serve.runs import find_runs
from serve.settings import read_settings
from tests.gated_world import some_gate
from tests.served_world import all_said, ask, engine, gated_model, models_of
from tests.stacked_world import World, some_rows
from toolkit.corpus.load import load_talks
from toolkit.corpus.render import IGNORED
from toolkit.errors import BaseError
from toolkit.sampling import Sampling
from toolkit.stack.stack import Stack

KINDS = ("lora", "lora-7", "prefix", "reft", "embedding")
WHO: list[Who] = [
    *(One(name) for name in ("base", *KINDS, "gated")),
    Mix((("lora", 0.7), ("reft", 0.3))),
    Vote(("lora", "prefix", "base")),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    stack = World(tmp_path_factory.mktemp("llama") / "adapters").stack(KINDS, dtype=torch.float64)
    made = models_of(stack)
    return made | {"gated": gated_model(made, "gated", some_gate(stack, ("lora", "reft"), per="layer"))}


def many(n_asks: int) -> list[Ask]:
    """Requests for everybody, of many lengths, greedy and warm."""
    made = []
    for number, row in enumerate(some_rows(n_asks, 100, seed=4).tolist()):
        sampling = Sampling(temperature=(0.0, 0.9)[number % 2], max_tokens=6 + number % 9, seed=number)
        made.append(ask(WHO[number % len(WHO)], row[: 7 + 13 * (number % 7)], sampling))
    return made


def test_a_request_gets_the_same_tokens_alone_and_in_a_full_mixed_batch(models: dict[str, Any]) -> None:
    asks = many(3 * len(WHO))
    with engine(models, n_slots=1, int8=True) as served:
        wanted = [all_said(served, [one])[0].ids for one in asks]
    with engine(models, n_slots=32, n_queue=200, int8=True) as served:
        assert [answer.ids for answer in all_said(served, asks)] == wanted
    assert len(set(wanted)) > len(WHO)


@pytest.mark.parametrize("who", [One("base"), One("lora"), One("prefix"), One("gated"), WHO[-2]], ids=str)
def test_a_conversation_goes_on_with_the_same_tokens_where_its_beginning_is_kept(
    models: dict[str, Any], who: Who
) -> None:
    found = []
    for cache_mb, n_beside in ((64, 3), (0, 0)):
        prompt, said = some_rows(1, 20, seed=8)[0].tolist(), []
        with engine(models, cache_mb=cache_mb, int8=True) as served:
            for turn in range(6):
                asks = [ask(who, prompt, Sampling(temperature=0.8, max_tokens=9, seed=turn)), *many(n_beside)]
                said.append(all_said(served, asks)[0].ids)
                prompt = [*prompt, *said[-1], *some_rows(1, 4, seed=turn)[0].tolist()]
            assert (served.load().n_hits > 4) == (cache_mb > 0)
        found.append(said)
    assert found[0] == found[1]


def test_log_probabilities_are_the_same_in_any_company(models: dict[str, Any]) -> None:
    one = ask("lora", some_rows(1, 30)[0].tolist(), n_logprobs=3)
    with engine(models, int8=True) as served:
        alone, beside = all_said(served, [one])[0], all_said(served, [one, *many(9)])[0]
    assert alone.logprobs == beside.logprobs and len(alone.logprobs) > 3


def test_keys_and_values_count_twice(models: dict[str, Any]) -> None:
    """They are kept in float64, so half as many tokens fit into the same memory."""
    with engine(models, int8=True) as served:
        rounded = served._scheduler.limits.n_cells
        assert served.is_int8 and served.computes == "the lean forward pass, cpu, int8"
    with engine(models_of(Stack(models["base"].stack.base))) as served:
        assert served._scheduler.limits.n_cells == pytest.approx(2 * rounded, abs=2) and not served.is_int8


def test_a_model_of_its_own_is_refused_by_name(models: dict[str, Any]) -> None:
    lone = replace(models["base"], stack=None)
    with pytest.raises(BaseError, match="--cpu-int8: dora, full cannot share"):
        RowsEngine(models | {"dora": lone, "full": lone}, int8=True)


def opened(runs: Path, *flags: str) -> RowsEngine:
    settings = read_settings(["polite", "--runs", str(runs), "--device", "cpu", *flags], {})
    engine = _open_engine(settings, find_runs(settings.runs, settings.folder))
    assert isinstance(engine, RowsEngine)
    return engine


@pytest.fixture
def served(runs: Path) -> Iterator[RowsEngine]:
    engine = opened(runs, "--cpu-int8")
    yield engine
    engine.close()


def test_labels_are_scored_in_float32_as_ever(served: RowsEngine, runs: Path) -> None:
    def scored(engine: RowsEngine) -> Any:
        return asyncio.run(engine.classify(One("polite"), ["오늘 정말 좋았어."], ["긍정", "부정"]))[1][0]

    plain = opened(runs)
    assert served.is_int8 and scored(served) == pytest.approx(scored(plain), abs=1e-5)
    plain.close()


def losses(slots: Slots, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    """Nats a supervised token, every text given token by token, as answers are written."""
    nats, n_tokens = 0.0, 0
    with torch.inference_mode():
        seats = [slots.open(None) for _ in rows]
        for place in range(max(len(ids) for ids, _ in rows) - 1):
            here = [row for row, (ids, _) in enumerate(rows) if place + 1 < len(ids)]
            logits_RV = slots.forward([seats[row] for row in here], [[rows[row][0][place]] for row in here])
            labels = torch.tensor([rows[row][1][place + 1] for row in here])
            nats += cross_entropy(logits_RV, labels, ignore_index=IGNORED, reduction="sum").item()
            n_tokens += int((labels != IGNORED).sum())
    return nats / n_tokens


@pytest.mark.slow
def test_the_loss_of_the_shipped_base_rises_by_less_than_a_hundredth(served: RowsEngine, runs: Path) -> None:
    loaded = open_models(find_runs(["polite"], runs), "cpu")["base"].loaded
    talks = [*load_talks(["maltu:talk/casual.ko.jsonl"], "auto", None)][:12]
    rows = [(row.input_ids, row.labels) for row in loaded.renderer.training_all(talks) if row.n_supervised]
    assert served.is_int8 and served._slots is not None and len(rows) > 8
    plain, rounded = losses(Slots(Stack(loaded.model)), rows), losses(served._slots, rows)
    assert plain != rounded and rounded < 1.01 * plain
