"""`check` on a recipe with a search: its space, how it looks for values, how it uses the machine; no password."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.searching_world import write_base, write_search, write_talk
from toolkit.__main__ import main
from toolkit.search import outlook
from toolkit.search.split import Split

Check = Callable[..., dict[str, str]]


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Check:
    """What `check` says of a search, by name; everything it printed under ""."""
    monkeypatch.chdir(tmp_path)
    write_base(tmp_path / "base")
    write_talk(tmp_path / "talk.jsonl")

    def call(*overrides: str, **search: object) -> dict[str, str]:
        write_search(tmp_path, **search)  # type: ignore[arg-type]
        capfd.readouterr()
        assert main(["check", "search.yaml", *overrides]) == 0
        out = capfd.readouterr().out
        lines = out.partition("the search")[2].splitlines()
        pairs = (re.split(r"\s{2,}", line.strip(), maxsplit=1) for line in lines)
        return {"": out} | {pair[0]: pair[1] for pair in pairs if len(pair) == 2}

    return call


def test_the_search_is_told_before_it_is_made(check: Check) -> None:
    said = check(minutes=1.5, patience=4, sampler="random", pruner="median", side_by_side=3, trials=12)
    assert said["sampler"] == "random" and said["pruner"] == "median"
    assert said["trials"] == "12, 1.5 minutes at most, until 4 in a row are no better"
    assert said["trials side by side"] == "3 in each process" and said["processes"].startswith("1 here, of ")
    assert said["train.learning_rate"] == "0.001 to 0.1, log"
    assert said["storage"] == "search/journal.log in the run folder"


def test_kinds_and_steps_are_told(check: Check) -> None:
    said = check(
        space="{adapter: {lora: {rank: [2, 4]}, reft: {}}, train.warmup_ratio: {low: 0, high: 0.3, step: 0.1}}"
    )
    assert said["adapter.kind"] == "lora, reft" and said["lora/rank"] == "2, 4"
    assert said["train.warmup_ratio"] == "0 to 0.3, in steps of 0.1"


def test_what_is_left_to_us_is_told_as_it_would_be(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlook, "split_machine", lambda *_: Split(2, 1))
    monkeypatch.setattr(outlook, "trials_together", lambda *_: 5)
    said = check(workers="auto")
    assert said["processes"] == "2 here, of 1 thread" and said["trials side by side"] == "5 in each process"


def test_a_password_is_not_shown(check: Check) -> None:
    said = check(storage="postgresql://uns:geheim@there/study?password=verborgen&sslmode=disable")
    assert said["storage"] == "postgresql://uns:***@there/study?password=***&sslmode=disable"
    assert "geheim" not in said[""] and "verborgen" not in said[""]


def test_weights_of_files_are_in_the_steps_that_are_told(check: Check) -> None:
    train = "train: {epochs: 2, batch_size: 8}"
    assert "steps                   10 (5 an epoch)" in check(train=train)[""]
    assert (
        "steps                   20 (10 an epoch)"
        in check("data.train=[{path: talk.jsonl, weight: 2}]", train=train)[""]
    )
