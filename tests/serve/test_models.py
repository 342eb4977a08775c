"""Runs opened side by side: the base's weights lie in memory once, and every run answers as it does alone."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from serve.engines.contract import Ask, One
from serve.engines.models import Model, open_models
from serve.engines.rows import RowsEngine
from serve.runs import find_runs
from toolkit.corpus.talk import Turn
from toolkit.errors import AdapterError, AloneError, RunError
from toolkit.generate import Sampling, generate
from toolkit.loaded import load_run
from toolkit.stack.adapter import ALONE

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def models(runs: Path) -> dict[str, Model]:
    return open_models(find_runs(["casual", "polite"], runs), "cpu")


TURNS = (Turn("user", "오늘 뭐 먹지?"),)
GREEDY = Sampling(temperature=0.0, max_tokens=24)


def answer(loaded: Any) -> tuple[int, ...]:
    prompt = loaded.renderer.prompt(TURNS)
    return generate(loaded.model, loaded.base.tokenizer, [prompt], GREEDY, ends=loaded.ends)[0].ids


def served_answers(models: dict[str, Model], *names: str) -> list[tuple[int, ...]]:
    """What an engine over the models answers, all of them at once."""

    async def one(engine: RowsEngine, name: str) -> tuple[int, ...]:
        reply = await engine.submit(Ask("id", One(name), TURNS, GREEDY))
        async for _ in reply:
            pass
        return reply.answer.ids

    async def run() -> list[tuple[int, ...]]:
        return await asyncio.gather(*(one(engine, name) for name in names))

    engine = RowsEngine(models)
    try:
        return asyncio.run(run())
    finally:
        engine.close()


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
    casual, polite, base = served_answers(models, "casual", "polite", "base")
    assert casual == answer(load_run(runs / "casual", "cpu")) == base
    assert polite == answer(load_run(runs / "polite", "cpu")) != base


def test_a_run_that_no_stack_holds_answers_on_a_model_of_its_own(runs: Path, tmp_path: Path) -> None:
    biased = tmp_path / "biased"
    shutil.copytree(runs / "polite", biased)
    config = json.loads((biased / "adapters/main/adapter_config.json").read_text())
    (biased / "adapters/main/adapter_config.json").write_text(json.dumps(config | {"lora_bias": True}))
    tensors = load_file(biased / "adapters/main/adapter_model.safetensors")
    biases = {
        name.replace(".weight", ".bias"): torch.full((len(tensor),), 0.05)
        for name, tensor in tensors.items()
        if "lora_B" in name
    }
    save_file(tensors | biases, biased / "adapters/main/adapter_model.safetensors")
    models = open_models(find_runs(["polite", str(biased)], runs), "cpu")
    assert models["polite"].stack is models["base"].stack is not None and models["biased"].stack is None
    assert not any(parameter.requires_grad for parameter in models["biased"].loaded.model.parameters())
    lone, base = ({p.data_ptr(): p.nbytes for p in models[n].loaded.model.parameters()} for n in ("biased", "base"))
    assert sum(n_bytes for place, n_bytes in lone.items() if place not in base) < 0.1 * sum(base.values())
    polite, own = served_answers(models, "polite", "biased")
    assert polite == answer(load_run(runs / "polite", "cpu")) and own == answer(load_run(biased, "cpu")) != polite


def test_a_run_whose_own_files_are_damaged_is_refused_by_name(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "polite", tmp_path / "torn")
    (tmp_path / "torn/generation.json").write_text("[")
    with pytest.raises(RunError, match="torn"):
        open_models(find_runs(["casual", str(tmp_path / "torn")], runs), "cpu")


def test_an_adapter_that_no_stack_takes_for_its_numbers_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "polite", tmp_path / "diverged")
    file = tmp_path / "diverged/adapters/main/adapter_model.safetensors"
    tensors = load_file(file)
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(AdapterError, match=r"diverged.*not finite"):
        open_models(find_runs([str(tmp_path / "diverged")], runs), "cpu")


def test_a_prefix_takes_its_part_of_the_context(models: dict[str, Model], monkeypatch: pytest.MonkeyPatch) -> None:
    from serve.engines import models as room

    class Opened:
        n_prefix = 16

    monkeypatch.setattr(room, "open_model", lambda model: Opened())
    assert room._model("casual", models["casual"].loaded).served.context == 512 - 16


def test_the_weights_learn_nothing(models: dict[str, Model]) -> None:
    assert not any(p.requires_grad for model in models.values() for p in model.loaded.model.parameters())
    assert torch.is_grad_enabled()


def test_whether_an_adapter_runs_alone_is_told_by_its_error_and_not_by_its_words(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "polite", tmp_path / "words")
    config = tmp_path / "words/adapters/main/adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": ALONE}))
    with pytest.raises(AdapterError) as raised:
        open_models(find_runs(["casual", str(tmp_path / "words")], runs), "cpu")
    assert not isinstance(raised.value, AloneError)
