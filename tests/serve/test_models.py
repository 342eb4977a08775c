"""Runs opened side by side: the base's weights lie in memory once, and every run answers as it does alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from serve.engines.models import Model, open_models
from serve.runs import find_runs
from toolkit.corpus.talk import Turn
from toolkit.generate import Sampling, generate
from toolkit.loaded import load_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(runs: Path) -> dict[str, Model]:
    return open_models(find_runs(["casual", "polite"], runs), "cpu")


def answer(loaded: Any) -> tuple[int, ...]:
    prompt = loaded.renderer.prompt([Turn("user", "오늘 뭐 먹지?")])
    greedy = Sampling(temperature=0.0, max_tokens=24)
    return generate(loaded.model, loaded.base.tokenizer, [prompt], greedy, ends=loaded.ends)[0].ids


def test_base_and_runs_are_told_apart(models: dict[str, Model]) -> None:
    served = [model.served for model in models.values()]
    assert [(one.name, one.adapter) for one in served] == [("base", None), ("casual", "casual"), ("polite", "polite")]
    assert len({one.weights_hash for one in served}) == 3 and len({one.base_hash for one in served}) == 1
    assert all(one.context == 512 and one.base == "spoken-mini" for one in served)


def test_the_weights_of_the_base_are_held_once(models: dict[str, Model]) -> None:
    held: dict[int, int] = {}
    for model in models.values():
        for parameter in model.loaded.model.parameters():
            held[parameter.data_ptr()] = parameter.nbytes
    base = sum(parameter.nbytes for parameter in models["base"].loaded.model.parameters())
    assert sum(held.values()) < 1.2 * base


def test_a_run_beside_others_answers_as_it_does_alone(models: dict[str, Model], runs: Path) -> None:
    for name in ("casual", "polite"):
        alone = load_run(runs / name, "cpu")
        assert answer(models[name].loaded) == answer(alone)
    assert answer(models["polite"].loaded) != answer(models["base"].loaded)


def test_a_prefix_takes_its_part_of_the_context(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.engines import models as room

    class Opened:
        n_prefix = 16

    monkeypatch.setattr(room, "open_model", lambda model: Opened())
    assert room._model("casual", models["casual"].loaded).served.context == 512 - 16


def test_the_weights_learn_nothing(models: dict[str, Model]) -> None:
    assert not any(p.requires_grad for model in models.values() for p in model.loaded.model.parameters())
    assert torch.is_grad_enabled()
