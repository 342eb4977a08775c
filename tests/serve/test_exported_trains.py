"""TRL's trainers take exported feedback as it is, and take a step on it."""

from pathlib import Path
from typing import Any

import pytest

from serve.exporting import Format, write_rows
from serve.store import Record
from toolkit.shipped import shipped

pytestmark = pytest.mark.slow  # TRL takes seconds to load

BASE = shipped("base/spoken-mini")
WORDS = ["국밥.", "우산 챙겨!", "모릅니다.", "괜찮아, 다음엔 잘 볼 거야", "Tacos!", "Nap time."]


def records() -> list[Record]:
    found = []
    for n in range(12):
        messages = [{"role": "user", "content": f"오늘 뭐 먹지? {n}"}]
        a, b = ({"content": f"{WORDS[(n + k) % 6]} {n}", "model": "casual"} for k in (0, 1))
        own: dict[str, Any] = {"messages": messages, "comment": None}
        kinds = [
            Record("pair", "", own | {"answers": [a, b], "winner": "ab"[n % 2]}),
            Record("thumb", "", own | {"answers": [a], "value": ("up", "down")[n % 2]}),
            Record("correction", "", own | {"answers": [a], "corrected": f"국밥 어때? {n}"}),
        ]
        found.append(kinds[n % 3])
    return found


def rows(tmp_path: Path, format: Format) -> Any:
    from datasets import load_dataset

    file = tmp_path / f"{format}.jsonl"
    with file.open("w", encoding="utf-8") as opened:
        assert write_rows(records(), format, opened) >= 4
    return load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path / "cache"))


def options(tmp_path: Path) -> dict[str, Any]:
    small = {"max_length": 96, "per_device_train_batch_size": 2, "max_steps": 1, "save_strategy": "no"}
    cpu = {"use_cpu": True, "bf16": False, "activation_checkpointing": False, "report_to": []}
    return {"output_dir": str(tmp_path / "out"), "logging_steps": 1} | small | cpu


def model_and_tokenizer() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (BASE / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there")
    return AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)


def loss_of(trainer: Any) -> float:
    trainer.train()
    return float(next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch and transformers
def test_trls_dpo_trainer_learns_from_exported_preferences(tmp_path: Path) -> None:
    from trl import DPOConfig, DPOTrainer

    model, tokenizer = model_and_tokenizer()
    dataset = rows(tmp_path, "preference")
    trainer = DPOTrainer(model, args=DPOConfig(**options(tmp_path)), train_dataset=dataset, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(dataset)
    assert loss_of(trainer) == pytest.approx(0.6931, abs=0.01)  # log 2: the model is its own reference at first


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch and transformers
def test_trls_kto_trainer_learns_from_exported_labels(tmp_path: Path) -> None:
    from trl import KTOConfig, KTOTrainer

    model, tokenizer = model_and_tokenizer()
    dataset = rows(tmp_path, "kto")
    assert set(dataset["label"]) == {True, False}
    trainer = KTOTrainer(model, args=KTOConfig(**options(tmp_path)), train_dataset=dataset, processing_class=tokenizer)
    assert len(trainer.train_dataset) == len(dataset)
    assert loss_of(trainer) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("format", ["preference", "kto", "sft"])
def test_trl_sees_conversations_in_exported_rows(tmp_path: Path, format: Format) -> None:
    from trl.data_utils import is_conversational

    assert all(map(is_conversational, rows(tmp_path, format)))


def test_a_recipe_reads_exported_dialogues(tmp_path: Path) -> None:
    from toolkit.corpus.load import load_talks

    dataset = rows(tmp_path, "sft")
    talks = list(load_talks([str(tmp_path / "sft.jsonl")], "auto", None))
    assert len(talks) == len(dataset) and talks[0].turns[-1].role == "assistant"
