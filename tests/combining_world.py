"""What the tests of a run of several adapters share: a tiny base, two voices, and a recipe that combines them."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.searching_world import write_base
from toolkit.bundle import Run, open_run
from toolkit.recipe.read import read_recipe
from toolkit.steps import Options

VOICES = {
    "casual": ("밥 먹었어?", "응, 너는?", "did you eat", "yeah, you?"),
    "polite": ("식사는 하셨습니까?", "네, 잘 먹었습니다.", "have you had lunch", "Yes, thank you for asking."),
}
TRAIN = "train: {max_steps: 8, batch_size: 8, learning_rate: 0.02, evaluate_every: 0.5, early_stop_patience: null}"


def write_voice(path: Path, voice: str, n_rows: int = 24) -> Path:
    """Short dialogues of two turns in one voice, half Korean, half English."""
    rows = []
    for i in range(n_rows):
        asked, answer = VOICES[voice][:2] if i % 2 else VOICES[voice][2:]
        turns = [f"{asked} {i}", f"{answer} {i}", f"{asked} {i * 37 % 101}", answer]
        messages = [{"role": "user" if k % 2 == 0 else "assistant", "content": t} for k, t in enumerate(turns)]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def write_labels(path: Path, n_rows: int = 48) -> Path:
    """Texts with one of two labels."""
    rows = [
        {"text": f"{VOICES['casual' if i % 2 else 'polite'][0]} {i}", "label": "반말" if i % 2 else "존댓말"}
        for i in range(n_rows)
    ]
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    return path


def write_recipe(folder: Path, combine: str, experts: str = "", name: str = "여럿", more: str = "") -> Path:
    """A recipe of two voices and a combination, beside its base and its talk."""
    if not (folder / "base").exists():
        write_base(folder / "base")
        for voice in VOICES:
            write_voice(folder / f"{voice}.jsonl", voice)
        write_labels(folder / "labels.jsonl")
    experts = experts or (
        "{casual: {data: {train: [casual.jsonl]}},"
        " polite: {adapter: {kind: lora, rank: 8}, data: {train: [polite.jsonl]}}}"
    )
    files = "train: [labels.jsonl], " if "labels" in more else ""
    files = "train: [casual.jsonl, polite.jsonl], " if experts == "none" and not files else files
    formed = ", format: {kind: labels, text: text, label: label}" if "labels" in more else ""
    task = "task: classify\n" if "labels" in more else ""
    told = f"experts: {experts}\n" if experts != "none" else ""
    path = folder / f"{name}.yaml"
    path.write_text(
        f"name: {name}\n{task}base: {{model: ./base}}\n"
        f"data: {{{files}clean: {{near_duplicates: null, duplicates: none}}{formed}}}\n"
        f"adapter: {{kind: lora, rank: 4}}\n{TRAIN}\nevaluate: {{prompts: null}}\ntrack: []\n"
        f"{told}{f'combine: {combine}' if combine else ''}\n",
        encoding="utf-8",
    )
    return path


def train(folder: Path, path: Path, **options: Any) -> Run:
    """The command, in this process; the run that it left."""
    from toolkit.combining import run

    recipe = read_recipe(path, runs=folder / "runs")
    assert run(recipe, Options(folder / "runs", quiet=True, **options)) == 0
    return open_run(folder / "runs" / recipe.name)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
