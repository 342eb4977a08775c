"""A run that is there already: what was changed, damaged, locked or moved is told, and nothing of it is lost."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolkit import bundle
from toolkit.errors import AdapterError, BaseError, RunError
from toolkit.loaded import load_run
from toolkit.track import Track

GOOD = '{"messages": [{"role": "user", "content": "뭐 먹지?"}, {"role": "assistant", "content": "김치찌개 어때?"}]}'
Command = Callable[..., Any]


@pytest.fixture
def finished(here: Path, whole: Path) -> Path:
    """runs/tiny, finished."""
    return Path(shutil.copytree(whole, here / "runs" / "tiny"))


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], None]]:
    """Makes a folder and all in it read-only, for root too where the file system can; skips where it cannot."""
    made: list[Path] = []

    def lock(folder: Path) -> None:
        made.append(folder)
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o222)
        if os.geteuid() == 0:  # permission bits do not bind root
            done = subprocess.run(["chattr", "-R", "+i", str(folder)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"nothing binds root here: {done.stderr.strip()}")

    yield lock
    for folder in made:
        if os.geteuid() == 0:
            subprocess.run(["chattr", "-R", "-i", str(folder)], capture_output=True, check=False)
        for path in (folder, *folder.rglob("*")):
            path.chmod(path.stat().st_mode | 0o200)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes; the lock says who works on it and may change."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != bundle.LOCK_FILE)
    found = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    assert found
    return found


# A run that is there already


@pytest.mark.parametrize("data", ["", f"{GOOD}\n{{"], ids=["empty", "torn"])
def test_bad_data_leaves_a_finished_run_as_it_was(here: Path, command: Command, finished: Path, data: str) -> None:
    before = contents(finished)
    (here / "talk.jsonl").write_text(data, encoding="utf-8")
    command().refuses("talk.jsonl")
    assert contents(finished) == before


def test_fresh_with_bad_data_leaves_the_old_run_in_its_place(here: Path, command: Command, finished: Path) -> None:
    before = contents(finished)
    (here / "talk.jsonl").write_text(f"{GOOD}\n{{", encoding="utf-8")
    command("--fresh").refuses("talk.jsonl:2")
    assert contents(finished) == before


def test_a_changed_recipe_is_refused_with_what_changed(command: Command, finished: Path) -> None:
    before = contents(finished)
    said = command("adapter.rank=8", "train.seed=7")
    said.refuses("runs/tiny", "adapter.rank: 4 became 8", "train.seed: 0 became 7", "name=tiny-2", "--fresh")
    assert contents(finished) == before


def test_changed_data_is_refused_with_what_changed(here: Path, command: Command, finished: Path) -> None:
    before = contents(finished)
    with (here / "talk.jsonl").open("a", encoding="utf-8") as file:
        file.write(GOOD + "\n")
    command().refuses("talk.jsonl: the file changed", "name=tiny-2", "--fresh")
    assert contents(finished) == before


def test_a_changed_base_is_refused_with_what_changed(base: Path, command: Command, here: Path) -> None:
    assert command("train.max_steps=1", "--quiet").code == 0
    run = here / "runs" / "tiny"
    before = contents(run)
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    command("train.max_steps=1").refuses("base: its files changed", "name=tiny-2", "--fresh")
    assert contents(run) == before
    assert command("runs/tiny", verb="evaluate").code == 0
    command("runs/tiny", "--data", "talk.jsonl", verb="evaluate").refuses("./base", "not the base", "runs/tiny")


def test_fresh_moves_the_old_run_and_deletes_nothing(here: Path, command: Command, finished: Path) -> None:
    before = contents(finished)
    assert command("--fresh", "train.max_steps=1").code == 0
    old = list((here / "runs" / ".old").iterdir())
    assert len(old) == 1 and old[0].name.startswith("tiny-")
    assert contents(old[0]) == before
    assert json.loads((finished / "run.json").read_text())["fit"]["steps"] == 1


def test_the_way_out_that_a_refusal_offers_works(here: Path, command: Command, finished: Path) -> None:
    before = contents(finished)
    assert command("train.max_steps=1", "name=tiny-2").code == 0
    assert contents(finished) == before
    assert (here / "runs" / "tiny-2" / "adapters" / "main").is_dir()


def _cut(text: str) -> str:
    return text[: len(text) // 2]


def _without(key: str) -> Callable[[str], str]:
    return lambda text: json.dumps({name: value for name, value in json.loads(text).items() if name != key})


def _with(key: str, value: object) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), key: value})


DAMAGES = {
    "cut": _cut,
    "empty": lambda _: "",
    "zeros": lambda text: "\0" * len(text),
    "a_list": lambda _: "[]",
    "no_inputs": _without("inputs"),
    "odd_inputs": _with("inputs", {"recipe": 3}),
    "no_status": _without("status"),
    "no_results": _without("results"),
    "newer": _with("version", 99),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_run_file_is_named_and_nothing_is_overwritten(
    command: Command, finished: Path, damage: Callable[[str], str]
) -> None:
    file = finished / "run.json"
    file.write_text(damage(file.read_text(encoding="utf-8")), encoding="utf-8")
    before = contents(finished)
    command().refuses("runs/tiny")
    assert contents(finished) == before


@pytest.mark.parametrize("name", DAMAGES)
def test_evaluate_tells_a_damaged_run_file_where_it_needs_it(command: Command, finished: Path, name: str) -> None:
    file = finished / "run.json"
    file.write_text(DAMAGES[name](file.read_text(encoding="utf-8")), encoding="utf-8")
    said = command("runs/tiny", verb="evaluate")
    if name.endswith("inputs"):
        assert said.code == 0
    else:
        said.refuses("runs/tiny")


def test_a_folder_that_is_no_run_is_told_by_evaluate(here: Path, command: Command) -> None:
    (here / "runs" / "tiny").mkdir(parents=True)
    command("runs/tiny", verb="evaluate").refuses("runs/tiny", "not a run folder")
    command("runs/nothing", verb="evaluate").refuses("runs/nothing", "not a run folder")


def test_evaluate_of_an_unfinished_run_says_that_it_goes_on(command: Command, finished: Path) -> None:
    bundle.Run(finished).update(status="training")
    file = finished / "run.json"
    file.write_text(_without("results")(file.read_text(encoding="utf-8")), encoding="utf-8")
    for more in ([], ["--data", "talk.jsonl"]):
        command("runs/tiny", *more, verb="evaluate").refuses("runs/tiny", "not finished", "again")


def test_a_run_that_another_process_works_on_is_refused(command: Command, finished: Path) -> None:
    before = contents(finished)
    with bundle.Run(finished).locked():
        command().refuses("runs/tiny", f"pid {os.getpid()}", "Wait for it", "name=")
        command("--fresh").refuses("runs/tiny", f"pid {os.getpid()}")
    assert contents(finished) == before
    assert command().code == 0


def test_what_killed_processes_left_is_cleared_away_and_what_they_moved_aside_comes_back(
    command: Command, finished: Path
) -> None:
    before = contents(finished)
    for left in (
        "checkpoints/.step-00000003.4999999.writing",
        "adapters/.main.4999999.writing",
        "adapters/.main.4999999.replaced",
    ):
        (finished / left).mkdir(parents=True)
        (finished / left / "half").write_text("half")
    (finished / ".run.json.4999999.writing").write_text("half")
    shutil.copytree(finished / "adapters" / "main", finished / "adapters" / ".second.4999999.replaced")
    assert command().code == 0
    assert contents(finished / "adapters" / "second") == contents(finished / "adapters" / "main")
    shutil.rmtree(finished / "adapters" / "second")
    assert contents(finished) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_log_on_a_full_disk_is_told() -> None:
    with pytest.raises(RunError, match=r"/dev/full: cannot be written .*No space left.* MB free"):
        Track(Path("/dev/full"), {}, print).log(1, loss=1.0)


def test_a_cache_that_cannot_be_written_or_read_costs_no_run(
    here: Path, command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "cache").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    assert command("name=other", "train.max_steps=1").code == 0
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache2"))
    assert command("name=other", "train.max_steps=1", "--fresh").code == 0
    (measured,) = (here / "cache2" / "maltu" / "judged").iterdir()
    whole = measured.read_text(encoding="utf-8")
    measured.write_text(whole[:20], encoding="utf-8")
    assert command("name=other", "train.max_steps=1", "--fresh").code == 0
    assert measured.read_text(encoding="utf-8") == whole


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="permissions are another matter on Windows")
def test_a_finished_run_that_may_only_be_read_is_shown_and_never_trained_over(
    command: Command, finished: Path, read_only: Callable[[Path], None]
) -> None:
    before = contents(finished)
    read_only(finished)
    shown = command("runs/tiny", verb="evaluate")
    measured = command("runs/tiny", "--data", "talk.jsonl", verb="evaluate")
    assert (shown.code, measured.code) == (0, 0), shown.err + measured.err
    assert load_run(finished).facts["status"] == "finished"
    for more in ([], ["train.seed=1"], ["--fresh"]):
        command(*more).refuses("runs/tiny", "permissions", "name=")
    assert contents(finished) == before


# A run used elsewhere


@pytest.mark.parametrize("move", [shutil.copytree, shutil.move], ids=["copied", "moved"])
def test_a_run_elsewhere_evaluates_and_loads(
    here: Path, command: Command, finished: Path, monkeypatch: pytest.MonkeyPatch, move: Callable[[Path, Path], object]
) -> None:
    away = here / "멀리" / "another name"
    away.parent.mkdir()
    shutil.move(here / "talk.jsonl", away.parent / "새 대화.jsonl")
    move(finished, away)
    monkeypatch.chdir(away.parent)
    shown = command(str(away), verb="evaluate")
    measured = command("another name", "--data", "새 대화.jsonl", verb="evaluate")
    assert (shown.code, measured.code) == (0, 0), shown.err + measured.err
    assert load_run(away).facts["status"] == "finished"


def test_a_run_whose_prompts_stayed_behind_is_measured_without_them(
    here: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "prompts.jsonl").write_text('{"prompt": "오늘 뭐 먹지?"}\n', encoding="utf-8")
    assert command("train.max_steps=1", "evaluate.prompts=prompts.jsonl").code == 0
    (here / "away").mkdir()
    monkeypatch.chdir(here / "away")
    said = command("../runs/tiny", "--data", "../talk.jsonl", verb="evaluate")
    assert said.code == 0, said.err
    assert "prompts.jsonl: not here" in said.out


def test_an_adapter_for_another_base_is_refused(here: Path, base: Path, command: Command, finished: Path) -> None:
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    assert command("name=other", "train.max_steps=1", "--quiet").code == 0
    other = here / "runs" / "other"
    shutil.rmtree(other / "adapters")
    shutil.copytree(finished / "adapters", other / "adapters")
    with pytest.raises(AdapterError, match="made for another base"):
        load_run(other)
    command("runs/other", "--data", "talk.jsonl", verb="evaluate").refuses("adapters/main", "made for another base")


def test_a_run_whose_base_became_another_is_refused(command: Command, finished: Path) -> None:
    facts = json.loads((finished / "run.json").read_text(encoding="utf-8"))
    bundle.Run(finished).update(base={**facts["base"], "hash": "0" * 64})
    with pytest.raises(BaseError, match=r"not the base that .*tiny was trained on"):
        load_run(finished)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_truncated_adapter_is_refused(command: Command, finished: Path, file: str) -> None:
    path = finished / "adapters" / "main" / file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AdapterError, match=file):
        load_run(finished)


@pytest.mark.parametrize("file", ["template.jinja", "generation.json", "recipe.yaml", "adapters"])
def test_a_run_with_a_part_missing_is_refused_by_name(command: Command, finished: Path, file: str) -> None:
    path = finished / file
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    command("runs/tiny", "--data", "talk.jsonl", verb="evaluate").refuses("runs/tiny", file)


def test_evaluate_on_data_that_is_not_there_is_an_error(command: Command, finished: Path) -> None:
    command("runs/tiny", "--data", "tlak.jsonl", verb="evaluate").refuses("tlak.jsonl", "Did you mean")


def test_what_a_living_process_is_writing_stays(command: Command, finished: Path) -> None:
    """Several processes work in one folder while a search runs."""
    writing = finished / "checkpoints" / f".stack-00000001.{os.getppid()}.writing"
    writing.mkdir(parents=True)
    with bundle.Run(finished).locked():
        assert writing.is_dir()
