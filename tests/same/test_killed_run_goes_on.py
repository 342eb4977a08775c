"""A run that was killed, wherever it was killed, ends with the bits of one that never stopped."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from toolkit.track import read_metrics

pytestmark = pytest.mark.slow

# The run is killed from inside, at an exact place; checkpoints come at every step.
DRIVER = """
import os, signal, sys
from toolkit.fit import trainer, watch
watch.CHECKPOINT_S = watch.SAVE_SHARE = 0.0
where, step = sys.argv[1], int(sys.argv[2])
def die():
    os.kill(os.getpid(), signal.SIGKILL)
if where == "step":
    before = watch.Watch.on_step_end
    def on_step_end(self, args, state, control, **more):
        before(self, args, state, control, **more)
        if state.global_step == step:
            die()
    watch.Watch.on_step_end = on_step_end
if where == "inside_save":
    fill = trainer.Trainer._fill
    def torn(self, folder, weights):
        if self.state.global_step == step:
            (folder / trainer.WEIGHTS_FILE).write_bytes(b"half")
            die()
        fill(self, folder, weights)
    trainer.Trainer._fill = torn
if where == "after_evaluation":
    look = watch.Watch._look
    def then_die(self, state):
        look(self, state)
        if state.global_step == step:
            die()
    watch.Watch._look = then_die
from toolkit.train import main
sys.exit(main(sys.argv[3:]))
"""


def train(recipe: Path, runs: Path, name: str, *overrides: str, where: str = "nowhere", step: int = 0) -> int:
    command = [sys.executable, "-c", DRIVER, where, str(step), str(recipe), f"name={name}", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [*command, "--runs", str(runs), "--quiet"], env=environment, check=False, capture_output=True, text=True
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def losses(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def assert_same(one: Path, other: Path) -> None:
    tensors, others = (load_file(run / "adapters/main/adapter_model.safetensors") for run in (one, other))
    assert tensors.keys() == others.keys() and tensors
    assert all(tensors[name].equal(others[name]) for name in tensors)
    assert losses(one) == losses(other)


@pytest.fixture
def whole(recipe_file: Path, tmp_path: Path) -> Path:
    assert train(recipe_file, tmp_path / "runs", "whole") == 0
    return tmp_path / "runs" / "whole"


def test_killed_at_steps_and_inside_a_checkpoint(recipe_file: Path, tmp_path: Path, whole: Path) -> None:
    runs, name = tmp_path / "runs", "killed"
    for where, step in (("step", 3), ("inside_save", 6), ("step", 7), ("after_evaluation", 8)):
        assert train(recipe_file, runs, name, where=where, step=step) == -signal.SIGKILL
        torn = [p for p in (runs / name / "checkpoints").glob("step-*") if not (p / "COMPLETE").exists()]
        assert not torn
        before = losses(runs / name)
        assert before[-1][0] >= step - 1
    assert train(recipe_file, runs, name) == 0
    assert_same(whole, runs / name)
    assert [step for step, _ in losses(runs / name)] == list(range(1, 13))


def test_tensorboard_shows_every_number_of_a_killed_run_once(recipe_file: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    runs, name = tmp_path / "runs", "killed"
    for where, step in (("inside_save", 1), ("after_evaluation", 8), ("nowhere", 0)):
        train(recipe_file, runs, name, "track=[tensorboard]", where=where, step=step)
    events = EventAccumulator(str(runs / name / "tensorboard")).Reload()
    shown = {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    told: dict[str, list[tuple[int, float]]] = {}
    for row in read_metrics(runs / name):
        for tag in row.keys() - {"step", "time"}:
            told.setdefault(tag, []).append((int(row["step"]), pytest.approx(row[tag], rel=1e-6)))
    assert shown == told and [step for step, _ in shown["loss"]] == list(range(1, 13))


def test_killed_after_a_bad_evaluation_keeps_its_patience(recipe_file: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    other = tmp_path / "other.jsonl"  # held-out talk of another kind: what helps the training talk soon hurts it
    turns = [("user", "qwxz 8821"), ("assistant", "ᚠᚢᚦ ☂☃ 0x7f3a !!"), ("user", "~~"), ("assistant", "ʘ‿ʘ %%% {}")]
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
    other.write_text(row + "\n", encoding="utf-8")
    hopeless = (
        f"data.valid=[{other}]",
        "train.early_stop_patience=2",
        "train.max_steps=60",
        "train.learning_rate=0.02",
    )
    assert train(recipe_file, runs, "whole", *hopeless) == 0
    facts = json.loads((runs / "whole" / "run.json").read_text())
    assert facts["fit"]["stopped"] == "early"
    looked = [row["step"] for row in read_metrics(runs / "whole") if "valid_loss" in row]
    step = looked[-2] + 1  # its checkpoint carries one bad evaluation; the next one ends the run
    assert train(recipe_file, runs, "killed", *hopeless, where="step", step=step) == -signal.SIGKILL
    assert train(recipe_file, runs, "killed", *hopeless) == 0
    assert_same(runs / "whole", runs / "killed")
    assert json.loads((runs / "killed" / "run.json").read_text())["fit"]["steps"] == facts["fit"]["steps"]


def test_the_same_command_on_a_finished_run_shows_it_and_changes_nothing(whole: Path, recipe_file: Path) -> None:
    before = (whole / "run.json").read_bytes()
    assert train(recipe_file, whole.parent, "whole") == 0
    assert (whole / "run.json").read_bytes() == before
