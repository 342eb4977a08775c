"""A working directory with a tiny recipe in it, the command called in this process as a user calls it, and its run."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from toolkit.__main__ import main as maltu
from toolkit.shipped import shipped
from toolkit.train import main as train

STEPS = 12
TENSORS = "adapters/main/adapter_model.safetensors"


@dataclass(frozen=True)
class Said:
    """How a command ended and what it printed."""

    code: int
    out: str
    err: str

    def refuses(self, *parts: str, code: int = 2) -> None:
        """Assert that it ended with `code` and that its message, not a traceback, holds every part."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err
        missing = [part for part in parts if part not in self.err]
        assert not missing, f"{missing} not in:\n{self.err}"


@pytest.fixture
def here(recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with tiny.yaml and talk.jsonl, named without their folder."""
    text = recipe_file.read_text(encoding="utf-8")
    recipe_file.write_text(text.replace(f"{tmp_path}{os.sep}", ""), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Call `train tiny.yaml …`, or another verb, in this process."""

    def call(*arguments: str, verb: str = "train") -> Said:
        capfd.readouterr()
        code = train(["tiny.yaml", *arguments]) if verb == "train" else maltu([verb, *arguments])
        return Said(code, *capfd.readouterr())

    return call


@pytest.fixture
def base(here: Path) -> Path:
    """A copy of the shipped base in ./base, which tiny.yaml names from then on."""
    recipe = here / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("model: spoken-mini", "model: ./base"))
    return Path(shutil.copytree(shipped("base/spoken-mini"), here / "base"))


@pytest.fixture(scope="session")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one run lies that nothing disturbed."""
    return tmp_path_factory.mktemp("kept") / "tiny"


@pytest.fixture
def whole(here: Path, kept: Path, command: Callable[..., Said]) -> Path:
    """A run that nothing disturbed, to compare with and to copy; trained once."""
    if not kept.exists():
        assert command("--runs", "whole").code == 0
        shutil.move(here / "whole" / "tiny", kept)
    return kept


@pytest.fixture
def assert_same(whole: Path) -> Callable[[Path], None]:
    """Assert that a run ended with the bits of the whole one, and left nothing half-written."""

    def check(run: Path) -> None:
        assert (run / TENSORS).read_bytes() == (whole / TENSORS).read_bytes()
        assert losses(run) == losses(whole)
        assert [step for step, _ in losses(run)] == list(range(1, STEPS + 1))
        assert not [path for path in run.rglob("*") if path.name.endswith((".writing", ".replaced"))]

    return check


@pytest.fixture
def logged() -> Callable[[Path], list[tuple[int, float]]]:
    """Gives the steps and losses in a run's metrics.jsonl."""
    return losses


def losses(run: Path) -> list[tuple[int, float]]:
    if not (run / "metrics.jsonl").exists():
        return []
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]
