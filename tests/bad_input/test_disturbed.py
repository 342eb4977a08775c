"""A run that is disturbed while it trains stops with one clear error, and the same command ends with the same bits."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from toolkit import bundle
from toolkit.fit import trainer, watch

pytestmark = pytest.mark.slow


Command = Callable[..., Any]
Same = Callable[[Path], None]
Logged = Callable[[Path], list[tuple[int, float]]]


@pytest.fixture(autouse=True)
def _save_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(watch, "SAVE_SHARE", 0.0)


# Numbers that run away


def _break_loss(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    compute = trainer.functional.cross_entropy
    calls: list[int] = []

    def cross_entropy(*inputs: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return compute(*inputs, **options) * (float("inf") if len(calls) == step else 1.0)

    monkeypatch.setattr(trainer.functional, "cross_entropy", cross_entropy)


def _break_weights(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    begin = watch.Watch.on_step_end

    def on_step_end(self: watch.Watch, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == step:
            assert self.trainer is not None
            learned = [p for p in self.trainer.model.parameters() if p.requires_grad]
            learned[-1].data.fill_(float("nan"))
        begin(self, args, state, control, **more)

    monkeypatch.setattr(watch.Watch, "on_step_end", on_step_end)


@pytest.mark.parametrize(
    ("breaks", "step", "saved", "n_logged"),
    [
        (_break_loss, 6, 5, 5),
        (_break_loss, 1, None, 0),
        (_break_weights, 2, 1, 1),  # at an evaluation, the first
        (_break_weights, 7, 6, 7),  # at a checkpoint without an evaluation
    ],
    ids=["loss", "first_loss", "held_out_loss", "weights"],
)
def test_a_number_that_is_not_finite_stops_the_run_at_once(
    here: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    assert_same: Same,
    breaks: Callable[..., None],
    step: int,
    saved: int | None,
    n_logged: int,
    logged: Logged,
) -> None:
    with monkeypatch.context() as patch:
        breaks(patch, step)
        command().refuses(f"step {step}:", "the last good checkpoint is kept", "train.learning_rate", "--fresh", code=1)
    run = here / "runs" / "tiny"
    last = bundle.Run(run).last_checkpoint()
    assert (last and last.name) == (saved and f"step-{saved:08d}")
    assert len(logged(run)) == n_logged
    assert not (run / "adapters").exists()
    assert command().code == 0
    assert_same(run)


def test_weights_that_run_away_in_the_last_step_are_not_saved(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "CHECKPOINT_S", 60.0)
    _break_weights(monkeypatch, 3)
    command("train.max_steps=3", "data.valid=0").refuses("step 3:", "train.learning_rate", code=1)
    assert not (here / "runs" / "tiny" / "adapters").exists()
    assert bundle.Run(here / "runs" / "tiny").facts()["status"] == "training"


# Checkpoints that the disk damaged


@pytest.mark.parametrize(
    ("name", "is_cut"),
    [("trainable.safetensors", True), ("rng_state.pth", True), ("optimizer.pt", False), ("COMPLETE", False)],
    ids=["cut_tensors", "cut_generators", "no_optimizer", "no_marker"],
)
def test_a_damaged_checkpoint_does_not_count_and_the_one_before_does(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch, assert_same: Same, name: str, is_cut: bool
) -> None:
    with monkeypatch.context() as patch:
        _break_loss(patch, 7)
        assert command().code == 1
    run = here / "runs" / "tiny"
    file = run / "checkpoints" / "step-00000006" / name
    part = file.read_bytes()[: file.stat().st_size // 2]
    file.unlink()
    if is_cut:
        file.write_bytes(part)
    last = bundle.Run(run).last_checkpoint()
    assert last is not None and last.name == "step-00000005"
    assert command().code == 0
    assert_same(run)


def test_best_tensors_that_are_damaged_are_told(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    with monkeypatch.context() as patch:
        _break_loss(patch, 7)
        assert command("train.max_steps=7").code == 1
    for best in (here / "runs" / "tiny" / "checkpoints").glob("best-*"):
        (best / "trainable.safetensors").write_bytes(b"half")
    monkeypatch.setattr(watch.Watch, "_look", lambda *_: None)
    command("train.max_steps=7").refuses("best-00000005/trainable.safetensors: damaged", "--fresh", code=1)


# Signals and a second process

HELD = """
import sys, time
from toolkit.quiet import quiet
with quiet():
    from toolkit.fit import watch
watch.CHECKPOINT_S = 3600.0
before = watch.Watch.on_step_end
def on_step_end(self, args, state, control, **more):
    wanted = int(sys.argv[1])
    while state.global_step == 3 and self.stops.is_asked < wanted:
        time.sleep(0.05)
    before(self, args, state, control, **more)
watch.Watch.on_step_end = on_step_end
from toolkit.train import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def start(here: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start the command in a process of its own, and wait until it stands in step 3: it goes on once it is told to
    stop; with `wanted` 2 it never does.
    """
    started: list[subprocess.Popen[str]] = []

    def run(wanted: int) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        arguments = [sys.executable, "-c", HELD, str(wanted), "tiny.yaml", "--quiet"]
        process = subprocess.Popen(
            arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(process)
        log, deadline = here / "runs" / "tiny" / "metrics.jsonl", time.monotonic() + 120
        while not (log.exists() and '"step": 2' in log.read_text(encoding="utf-8")):
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.05)
        time.sleep(0.5)  # from the log of step 2 into step 3
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def test_ctrl_c_stops_with_130_and_the_same_command_goes_on(
    here: Path, command: Command, start: Callable[..., subprocess.Popen[str]], assert_same: Same
) -> None:
    process = start(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, ""), err + out
    run = here / "runs" / "tiny"
    last = bundle.Run(run).last_checkpoint()
    assert last is not None and last.name == "step-00000003"
    assert command().code == 0
    assert_same(run)


def test_a_second_ctrl_c_stops_at_once(
    here: Path, command: Command, start: Callable[..., subprocess.Popen[str]], assert_same: Same
) -> None:
    process = start(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)  # two that come together count as one
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "Interrupted. The same command goes on where it stopped.\n"
    assert command().code == 0
    assert_same(here / "runs" / "tiny")


def test_a_second_process_is_refused_and_disturbs_nothing(
    here: Path, command: Command, start: Callable[..., subprocess.Popen[str]], assert_same: Same
) -> None:
    process = start(1)
    run = here / "runs" / "tiny"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for more in ([], ["--fresh"]):
        command(*more).refuses("runs/tiny", f"pid {process.pid}", "Wait for it", "name=", code=2)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert command().code == 0
    assert_same(run)


# Data that is odd and yet good


def test_a_byte_order_mark_and_crlf_change_nothing(here: Path, command: Command, assert_same: Same) -> None:
    talk = here / "talk.jsonl"
    talk.write_bytes(b"\xef\xbb\xbf" + talk.read_bytes().replace(b"\n", b"\r\n"))
    assert command().code == 0
    assert_same(here / "runs" / "tiny")


@pytest.mark.parametrize("n_rows", [1, 2])
def test_a_row_or_two_train(here: Path, command: Command, n_rows: int) -> None:
    talk = here / "talk.jsonl"
    talk.write_text("".join(talk.read_text(encoding="utf-8").splitlines(keepends=True)[:n_rows]), encoding="utf-8")
    said = command("train.max_steps=2", "data.valid=0", "data.test=0")
    assert said.code == 0, said.err
    assert load_file(here / "runs" / "tiny" / "adapters/main/adapter_model.safetensors")
    assert bundle.Run(here / "runs" / "tiny").facts()["data"]["parts"]["train"] == n_rows
