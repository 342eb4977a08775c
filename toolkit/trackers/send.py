"""`sync RUN…`: send what wandb wrote offline into run folders, once there is a key and a network."""

import argparse
import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from toolkit.bundle import open_run
from toolkit.errors import RunError
from toolkit.trackers.in_wandb import has_key

SENT = ".synced"  # wandb lays an empty file of this ending beside what it has sent
TAIL = 600  # characters of what wandb said


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """sync RUN… [--timeout SECONDS]."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder, as runs/casual_chat")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that sending one run may take")


def sync(arguments: argparse.Namespace) -> int:
    """Send every run that was tracked by wandb offline and not sent yet. Returns the exit code.

    Raises: RunError where a folder is no run, was not tracked by wandb, or there is no key; where sending failed, with
    what wandb said: nothing is lost then, the same command tries again.
    """
    found = {run: offline_folders(run) for run in arguments.runs}
    waiting = {run: [folder for folder in folders if not is_sent(folder)] for run, folders in found.items()}
    if any(waiting.values()):
        _refuse_unready()
    for run, folders in waiting.items():
        if folders:
            _send(run, folders, arguments.timeout)
        said = f"{len(folders)} sent" if folders else "sent before, nothing is left to send"
        sys.stdout.write(f"{run}: {said}.\n")
    return 0


def offline_folders(path: Path) -> list[Path]:
    """What wandb wrote offline in a run folder, a folder for each start, in order. Raises RunError where there is
    nothing.
    """
    open_run(path)
    folders = [folder for folder in sorted(path.glob("wandb/offline-run-*")) if any(folder.glob("*.wandb"))]
    if not folders:
        raise RunError(
            f"{path}: wandb wrote nothing offline here. Only a run with track: [wandb] has something to send."
        )
    return folders


def is_sent(folder: Path) -> bool:
    """Whether wandb has marked it as sent."""
    return any(folder.glob(f"*{SENT}"))


def _refuse_unready() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise RunError("sync: wandb is not installed. Run pip install wandb.")
    if not has_key():
        raise RunError("sync: there is no key of wandb here. Run `wandb login`, or set WANDB_API_KEY.")


def _send(run: Path, folders: Sequence[Path], timeout: float) -> None:
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(str(folder.resolve()) for folder in folders)]
    try:
        done = subprocess.run(  # in the run folder: wandb leaves a log where it stands
            command,
            cwd=run,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        raise RunError(
            f"{run}: wandb did not finish sending within {timeout:g} s. Nothing is lost; try again, with a longer"
            " --timeout."
        ) from None
    if done.returncode or not all(map(is_sent, folders)):
        said = " ".join((done.stdout + done.stderr).split())[-TAIL:] or "it said nothing"
        raise RunError(
            f"{run}: wandb could not send it. Nothing is lost; try again once this is mended. It said: {said}"
        )
