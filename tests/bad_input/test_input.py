"""A recipe, data or a base that is wrong: one clear error that shows where and what to do, and nothing is begun."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from toolkit import bundle
from toolkit.__main__ import main as maltu
from toolkit.train import main as train

GOOD = '{"messages": [{"role": "user", "content": "뭐 먹지?"}, {"role": "assistant", "content": "김치찌개 어때?"}]}'
Command = Callable[..., Any]


# The recipe


def test_a_typo_in_every_section_is_told_at_once(here: Path, command: Command) -> None:
    (here / "tiny.yaml").write_text(
        """
nmae: tiny
name: tiny
base: {model: spoken-mini, revison: v1}
data:
  train: [talk.jsonl]
  vaild: 0.2
  clean: {near_duplicate: 0.9}
adapter: {kind: lora, rnak: 4}
train: {learning_rte: 0.005}
evaluate: {promts: null}
track: [tensorbord]
serve: {temprature: 0.5}
"""
    )
    said = command("train.epohcs=3")
    said.refuses("tiny.yaml: 10 problems", "line 2  nmae", "line 4  base.revison", "line 7  data.vaild")
    said.refuses("line 8  data.clean.near_duplicate", "Did you mean 'rank'?", "Did you mean 'learning_rate'?")
    said.refuses("evaluate.promts", "track", "tensorboard", "serve.temprature", "Did you mean 'epochs'?")
    assert not (here / "runs").exists()


def test_a_recipe_that_is_not_there_is_named(here: Path, command: Command) -> None:
    assert train(["tinny.yaml"]) == 2
    (here / "tiny.yaml").unlink()
    command().refuses("tiny.yaml")


def test_overrides_may_stand_after_options(here: Path, command: Command) -> None:
    command("--runs", "elsewhere", "--quiet", "train.epohcs=3").refuses("Did you mean 'epochs'?")
    assert maltu(["train", "tiny.yaml", "--quiet", "train.epohcs=3"]) == 2


# Data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", ["talk.jsonl", "holds no rows", "put at least one"]),
        (b"\n \n", ["talk.jsonl", "holds no rows"]),
        (b"\xef\xbb\xbf", ["talk.jsonl", "holds no rows"]),
        (f"{GOOD}\n".encode() + b'{"text": "\xff\xfe"}\n', ["talk.jsonl:2", "not UTF-8", "save the file as UTF-8"]),
        (GOOD.encode("utf-16"), ["talk.jsonl", "UTF-16", "UTF-8"]),
        (GOOD.encode("cp949"), ["talk.jsonl:1", "cp949", "iconv"]),
        (b'{"text": "' + b"a" * 10_000_000 + b'"}\n' + GOOD.encode(), ["talk.jsonl:1", "longer than", "Split it"]),
        (GOOD.replace('"user"', '"judge"').encode(), ["talk.jsonl:1", "judge", "user", "assistant"]),
        (GOOD[:-9].encode(), ["talk.jsonl:1", "not JSON", "column"]),
        (b'{"a": 1}', ["talk.jsonl:1", "a", "accepted:"]),
        (b'{"messages": [{"role": "user", "content": "..."}]}', ["one_sided"]),
        (b'{"messages": []}', ["talk.jsonl:1", "messages"]),
        (GOOD.encode(), ["1 conversation", "data.valid: 0 and data.test: 0"]),
    ],
    ids="empty blank only_bom not_utf8 utf16 cp949 10_mb roles not_json columns one_sided no_turns one_row".split(),
)
@pytest.mark.parametrize("verb", ["train", "check"])
def test_data_that_cannot_be_learned_from_is_an_error_that_shows_the_row(
    here: Path, command: Command, data: bytes, says: list[str], verb: str
) -> None:
    (here / "talk.jsonl").write_bytes(data)
    said = command(verb="train") if verb == "train" else command("tiny.yaml", verb="check")
    said.refuses(*says)
    assert (here / "talk.jsonl").read_bytes() == data
    assert len(said.err) < 4000
    assert not (here / "runs" / "tiny" / bundle.RUN_FILE).exists()


def test_every_bad_file_is_named_at_once(here: Path, command: Command) -> None:
    (here / "other.jsonl").write_text("{\n" * 3, encoding="utf-8")
    (here / "talk.jsonl").write_text("[]\n", encoding="utf-8")
    (here / "empty.csv").touch()
    files = "data.train=[talk.jsonl, other.jsonl, empty.csv]"
    command(files).refuses("talk.jsonl:1", "other.jsonl:1", "other.jsonl:3", "empty.csv")


def test_missing_prompts_and_data_are_named_at_once(command: Command) -> None:
    said = command("evaluate.prompts=prompts.jsonl", "data.valid=[held.jsonl]", "data.train=[tlak.jsonl]")
    said.refuses("3 problems", "prompts.jsonl", "held.jsonl", "talk.jsonl")


# The base


def test_a_base_of_pickles_is_refused_and_not_opened(base: Path, command: Command) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    command().refuses("./base", "pytorch_model.bin", "safetensors", "save_pretrained")


def test_a_truncated_base_is_refused(base: Path, command: Command) -> None:
    whole = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    command().refuses("./base", "model.safetensors", "cut short", "Get the file again")


def test_a_hub_id_without_network_is_refused(
    command: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, here: Path
) -> None:
    command("base.model=owner/name").refuses("owner/name", "HF_HUB_OFFLINE", "folder")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    command("base.model=owner/name").refuses("owner/name", "hub did not answer", "Connect to the network", "folder")
    assert not (here / "runs").exists()
