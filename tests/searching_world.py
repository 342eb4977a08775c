"""What the tests of a whole search share: a tiny base in a folder, a recipe that searches on it in seconds, what the
study in a run folder holds, and the command as a process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages import JournalStorage, RDBStorage
from optuna.trial import FrozenTrial
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.search.journal import Journal
from toolkit.shipped import shipped

ROOT = Path(__file__).parent.parent
RATES = "{train.learning_rate: {low: 1.0e-3, high: 1.0e-1, log: true}}"
KEYS = "train: {max_steps: 6, batch_size: 8, learning_rate: 0.01, evaluate_every: 0.5, early_stop_patience: null}"


def write_base(folder: Path) -> Path:
    """A random Llama of 2 layers with the tokenizer of the shipped base."""
    source = Path(shipped("base/spoken-mini"))
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    told = json.loads((source / "config.json").read_text(encoding="utf-8"))
    kept = {key: told.get(key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(**kept, **sizes, max_position_embeddings=256, tie_word_embeddings=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():  # a transformer of random weights knows nothing an adapter could pick out: make it louder
            for parameter in model.parameters():
                parameter.mul_(3.0) if parameter.dim() == 2 else None
        model.save_pretrained(folder)
    return folder


def write_search(folder: Path, space: str = RATES, train: str = KEYS, adapter: str = "", **search: Any) -> Path:
    """search.yaml beside `talk.jsonl` and `base`, which it names without their folder."""
    keys = {"trials": 3, "workers": 1, "pruner": "none", **search}
    told = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in keys.items())
    (folder / "search.yaml").write_text(
        f"name: 말투\nbase: {{model: ./base}}\n"
        "data: {train: [talk.jsonl], clean: {near_duplicates: null}}\n"
        f"adapter: {adapter or '{kind: lora, rank: 4}'}\n{train}\nevaluate: {{prompts: null}}\ntrack: []\n"
        f"search:\n  space: {space}\n{told}",
        encoding="utf-8",
    )
    return folder / "search.yaml"


def trials_of(run: Path, url: str | None = None) -> list[FrozenTrial]:
    """Every trial in the study of a run, the ones that were lost among them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if url is None:
            kept = JournalStorage(Journal(run / "search" / "journal.log"))
            return optuna.load_study(study_name=run.name, storage=kept).get_trials()
        database = RDBStorage(url)
        try:
            return optuna.load_study(study_name=run.name, storage=database).get_trials()
        finally:
            database.engine.dispose()


def start(folder: Path, *arguments: str, driver: str = "") -> "subprocess.Popen[str]":
    """The command as a process in `folder`; `driver` is Python that runs before it, and before each of its helpers."""
    (folder / "site").mkdir(exist_ok=True)
    (folder / "site" / "sitecustomize.py").write_text(driver, encoding="utf-8")
    told = {**os.environ, "PYTHONPATH": f"{folder / 'site'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "toolkit.train", "search.yaml", *arguments]
    return subprocess.Popen(command, cwd=folder, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_talk(path: Path, first: int = 0, n_rows: int = 48) -> Path:
    """Different short dialogues, half Korean, half English, as messages-jsonl; numbered from `first`."""
    rows = []
    for i in range(first, first + n_rows):
        user, answer = ("오늘 뭐 먹지?", "김치찌개 어때?") if i % 2 else ("what's for lunch", "Tacos!")
        turns = [
            f"{user} {i}",
            answer,
            f"정말? {i * 37 % 101}" if i % 2 else f"really? {i * 37 % 101}",
            f"{answer} {i}",
        ]
        messages = [{"role": "user" if k % 2 == 0 else "assistant", "content": t} for k, t in enumerate(turns)]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes, without the one that says who works on it."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert found
    return found
