"""However a step is cut, packed or shared, it is the same step: loss and gradients of one optimizer step agree."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from toolkit.adapters.kinds import kind_of
from toolkit.bases.load import load_base
from toolkit.bundle import Run
from toolkit.corpus.render import Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.fit.display import Display
from toolkit.fit.one import Job, fit_one
from toolkit.fit.plan import Plan
from toolkit.recipe.model import Base, Lora, Recipe
from toolkit.track import open_track, read_metrics

TALKS = [
    Talk(
        (Turn("user", f"{i}번째로 오늘 뭐 먹지?"), Turn("assistant", "김치찌개 " * (1 + i * 3 % 7) + "어때?")), f"t:{i}"
    )
    for i in range(16)
]


def job(tmp_path: Path, name: str, micro: int, packing: bool, extra: dict[str, object] | None = None) -> Job:
    base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
    train = {"batch_size": 8, "max_steps": 1, "learning_rate": 1e-3, "warmup_ratio": 0.0, "schedule": "constant"}
    recipe = Recipe.model_validate(
        {"name": name, "base": {"model": "spoken-mini"}, "data": {"train": ["x"]}, "train": {**train, **(extra or {})}}
    )
    plan = Plan(1e-3, 512, micro, 8 // micro, packing, "fp32", False)
    rows = [(r.input_ids, r.labels) for r in Renderer(base.tokenizer, base.template).training_all(TALKS)]
    model = kind_of(Lora()).attach(base.model, Lora(rank=4), seed=0)
    run = Run(tmp_path / name)
    run.path.mkdir()
    return Job(recipe, plan, model, base.tokenizer, rows, None, run, open_track(run.path, (), {}, 0, print))


def fitted(one: Job) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    fit_one(one, lambda total: Display(Console(quiet=True), total, is_quiet=True))
    learned = {name: p.detach().clone() for name, p in one.model.named_parameters() if p.requires_grad}
    return learned, read_metrics(one.run.path)[0]


def assert_same_step(one: Job, other: Job) -> None:
    (weights, numbers), (others, other_numbers) = fitted(one), fitted(other)
    assert numbers["loss"] == pytest.approx(other_numbers["loss"], rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(other_numbers["grad_norm"], rel=1e-4)
    # Adam's first step is the sign of the gradient times the learning rate: elements without a gradient may flip.
    flipped = sum(int(((weights[n] - others[n]).abs() > 1e-4).sum()) for n in weights)
    assert flipped <= 0.001 * sum(w.numel() for w in weights.values())


@pytest.mark.slow
def test_eight_at_once_equal_eight_accumulated(tmp_path: Path) -> None:
    assert_same_step(job(tmp_path, "a", 8, False), job(tmp_path, "b", 1, False))


@pytest.mark.slow
def test_packed_equals_unpacked(tmp_path: Path) -> None:
    assert_same_step(job(tmp_path, "a", 8, True), job(tmp_path, "b", 8, False))


@pytest.mark.slow
def test_the_heads_loss_equals_trl_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = job(tmp_path, "a", 8, False)
    _, numbers = fitted(ours)
    monkeypatch.setattr("toolkit.fit.trainer.MAX_LOGITS", 0)
    _, other_numbers = fitted(job(tmp_path, "b", 8, False))
    assert numbers["loss"] == pytest.approx(other_numbers["loss"], rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(other_numbers["grad_norm"], rel=1e-4)


@pytest.mark.slow
def test_the_loss_equals_the_models_own(tmp_path: Path) -> None:
    one = job(tmp_path, "a", 8, True, {"max_steps": 1})
    before = mean_loss(one.model, one.rows[:0] or one.rows)
    one = job(tmp_path, "b", 8, True, {"max_steps": 1, "batch_size": 16})
    one = Job(**{**one.__dict__, "plan": Plan(1e-3, 512, 16, 1, True, "fp32", False)})
    _, numbers = fitted(one)
    assert numbers["loss"] == pytest.approx(before, rel=1e-5)


def mean_loss(model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> float:
    total, n_tokens = 0.0, 0
    for ids, labels in rows:
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([list(ids)]), labels=torch.tensor([list(labels)])).loss
        n = sum(label != -100 for label in labels[1:])
        total, n_tokens = total + float(loss) * n, n_tokens + n
    return total / n_tokens


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo under torchrun is tested on Linux")
def test_two_processes_equal_one(recipe_file: Path, tmp_path: Path) -> None:
    overrides = ["train.max_steps=3", "adapter.dropout=0.0", "data.valid=0", "data.test=0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name, launch in (("one", []), ("two", ["-m", "torch.distributed.run", "--nproc-per-node", "2"])):
        command = [sys.executable, *launch, "-m", "toolkit.train", str(recipe_file), f"name={name}", *overrides]
        done = subprocess.run(
            [*command, "--runs", str(tmp_path / "runs"), "--quiet"],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (
        load_file(tmp_path / "runs" / name / "adapters/main/adapter_model.safetensors") for name in ("one", "two")
    )
    losses = [
        [row["loss"] for row in read_metrics(tmp_path / "runs" / name) if "loss" in row] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    far = sum(int(((one[n] - two[n]).abs() > 1e-3).sum()) for n in one)
    assert far <= 0.01 * sum(w.numel() for w in one.values())
    assert json.loads((tmp_path / "runs/two/run.json").read_text())["surroundings"]["processes"] == 2
