"""What wandb is told, and `sync`, which sends later what it wrote offline."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from toolkit.__main__ import main as maltu
from toolkit.bundle import Run
from toolkit.recipe.track import WandbOptions, WithOptions
from toolkit.track import config_of, open_track
from toolkit.trackers import send
from toolkit.trackers.contract import Cells

INPUTS: dict[str, Any] = {"recipe": {"name": "말투", "train.seed": 0}, "data": {"말.jsonl": "abc"}, "base": "def"}
SEARCH = {**INPUTS, "recipe": {**INPUTS["recipe"], "search.sampler": "tpe"}}


class Told:
    """Stands in for the module wandb: writes down what it is told."""

    def __init__(self) -> None:
        self.begun: dict[str, Any] = {}
        self.logged: list[dict[str, Any]] = []
        self.artifacts: list[Any] = []
        self.axes: dict[str, str] = {}
        self.steps: list[int | None] = []
        self.run = SimpleNamespace(
            id="abc123", log=self.log, finish=lambda: None, step=0, log_artifact=self.artifacts.append,
            define_metric=lambda name, step_metric: self.axes.update({name: step_metric}),
        )  # fmt: skip
        self.Settings = dict
        self.Html = str
        self.Table = lambda columns, data: {"columns": columns, "data": data}

    def log(self, values: dict[str, Any], step: int | None = None) -> None:
        """As wandb does, steps only grow."""
        assert step is None or step >= self.run.step
        self.logged.append(values)
        self.steps.append(step)
        self.run.step = self.run.step + 1 if step is None else step

    def init(self, **told: Any) -> Any:
        self.begun = told
        return self.run

    def Artifact(self, name: str, type: str, metadata: dict[str, str]) -> Any:
        made = SimpleNamespace(name=name, type=type, folder="")
        made.add_dir = lambda folder: setattr(made, "folder", folder)
        return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    stub = Told()
    monkeypatch.setitem(sys.modules, "wandb", stub)  # type: ignore[arg-type]
    return stub


def tracked(run: Path, inputs: dict[str, Any], options: WandbOptions | None = None) -> None:
    named = "wandb" if options is None else WithOptions(wandb=options)
    track = open_track(run, (named,), config_of(inputs), 0, pytest.fail)
    track.log(1, loss=2.0)
    track.table(1, "answers", Cells(("prompt", "after"), [("밥?", "응")]))
    track.files("말투", run)
    track.close()


def test_wandb_gets_recipe_and_hashes_numbers_and_answers(tmp_path: Path, told: Told) -> None:
    tracked(tmp_path, INPUTS)
    assert told.begun["config"]["sha256.data.말.jsonl"] == "abc" and told.begun["config"]["name"] == "말투"
    assert told.logged == [{"loss": 2.0}, {"answers": {"columns": ["prompt", "after"], "data": [["밥?", "응"]]}}]
    assert told.begun["resume"] == "allow" and told.begun["project"] == "maltu"


def test_runs_of_a_recipe_stand_in_one_group_and_a_search_in_its_own(tmp_path: Path, told: Told) -> None:
    groups = []
    for inputs in (INPUTS, {**INPUTS, "recipe": {**INPUTS["recipe"], "name": "다른", "train.seed": 3}}, SEARCH):
        tracked(tmp_path, inputs)
        groups.append((told.begun["group"], told.begun["job_type"]))
    assert groups[0] == groups[1] and groups[0][0].startswith("recipe ") and groups[0][1] == "train"
    assert groups[2] == (f"search {tmp_path.name}", "search")


def test_what_wandb_was_told_of_steps_that_are_taken_again_is_not_told_twice(tmp_path: Path, told: Told) -> None:
    for n_steps in (3, 5):  # killed before its first checkpoint, begun again
        track = open_track(tmp_path, ("wandb",), config_of(INPUTS), 0, pytest.fail)
        for step in range(1, n_steps + 1):
            track.log(step, loss=float(step))
        track.close()
    assert told.logged == [{"loss": float(step)} for step in range(1, 6)]


def test_what_was_trained_is_sent_only_where_the_recipe_asks(tmp_path: Path, told: Told) -> None:
    tracked(tmp_path, INPUTS)
    assert told.artifacts == []
    tracked(tmp_path, INPUTS, WandbOptions(artifact=True, project="말", group="우리"))
    (sent,) = told.artifacts
    assert (sent.name, sent.type, sent.folder) == ("adapter-abc123", "model", str(tmp_path))
    assert (told.begun["project"], told.begun["group"]) == ("말", "우리")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that wandb tracked offline in two starts; no key is here."""
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    folder = tmp_path / "말투"
    folder.mkdir()
    Run(folder).update(status="finished")
    for start in ("20261124_1", "20261124_2"):
        (folder / "wandb" / f"offline-run-{start}-abc").mkdir(parents=True)
        (folder / "wandb" / f"offline-run-{start}-abc" / "run-abc.wandb").write_bytes(b"x")
    return folder


def answering(monkeypatch: pytest.MonkeyPatch, code: int = 0, said: str = "", marks: bool = True) -> list[list[str]]:
    """Let `wandb sync` answer so; the commands that were called."""
    called: list[list[str]] = []

    def answer(command: list[str], **_: Any) -> "subprocess.CompletedProcess[str]":
        called.append(command)
        for folder in command[5:] if marks else ():
            (Path(folder) / "run-abc.wandb.synced").touch()
        return subprocess.CompletedProcess(command, code, said, "")

    monkeypatch.setattr(send.subprocess, "run", answer)
    return called


Refuse = Callable[..., str]


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Refuse:
    def call(*arguments: str) -> str:
        assert maltu(["sync", *arguments]) == 2
        return capsys.readouterr().err

    return call


def test_every_start_is_sent_in_order_and_once(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    called = answering(monkeypatch)
    assert maltu(["sync", str(run)]) == 0
    assert called[0][1:5] == ["-m", "wandb", "sync", "--yes"]
    assert [Path(folder).name for folder in called[0][5:]] == [
        "offline-run-20261124_1-abc",
        "offline-run-20261124_2-abc",
    ]
    assert maltu(["sync", str(run)]) == 0 and len(called) == 1
    assert "nothing is left to send" in capsys.readouterr().out


def test_without_a_key_nothing_is_tried(run: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse) -> None:
    called = answering(monkeypatch)
    assert "there is no key of wandb here. Run `wandb login`" in refused(str(run))
    assert called == []


def test_a_run_that_wandb_did_not_track_is_told(tmp_path: Path, refused: Refuse) -> None:
    Run(tmp_path).update(status="finished")
    assert "wandb wrote nothing offline here" in refused(str(tmp_path))
    (tmp_path / "run.json").unlink()
    assert "not a run folder" in refused(str(tmp_path))


@pytest.mark.parametrize(("code", "marks"), [(1, False), (0, False)])
def test_what_could_not_be_sent_is_told_in_wandbs_words(
    run: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse, code: int, marks: bool
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    answering(monkeypatch, code, "permission denied", marks)
    assert "Nothing is lost" in (said := refused(str(run))) and "permission denied" in said


@pytest.mark.slow
def test_sending_with_the_network_closed_ends_with_a_message(
    run: Path, monkeypatch: pytest.MonkeyPatch, refused: Refuse
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert "Nothing is lost" in refused(str(run), "--timeout", "20")


def test_members_that_count_their_own_steps_have_an_axis_of_their_own(tmp_path: Path, told: Told) -> None:
    """wandb drops what comes for a step that is over."""
    track = open_track(tmp_path, ("wandb",), config_of(INPUTS), 0, pytest.fail)
    for name in ("round-1", "round-2"):
        for step in (1, 2):
            track.log(step, **{f"loss/{name}": 2.0})
    track.log(2, **{"test/loss": 1.0})
    track.text(2, "samples", "말")
    track.close()
    assert [one for one in told.logged if "loss/round-2" in one] == [
        {"loss/round-2": 2.0, "own step": step} for step in (1, 2)
    ]
    assert told.axes["loss/*"] == "own step" and told.steps[-2:] == [4, 4]
