"""Datasets by name come through datasets.load_dataset: here from folders, and refused clearly without a network."""

import json
from pathlib import Path

import pytest

from toolkit.corpus.hub import HubName, parse_hub
from toolkit.corpus.load import load_talks
from toolkit.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A dataset with the splits train (2 rows) and test (1 row); datasets caches beside it and asks no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    place = tmp_path / "dataset"
    place.mkdir()
    for split, texts in {"train": ("안녕", "잘 가"), "test": ("또 봐",)}.items():
        rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        (place / f"{split}.jsonl").write_text(rows, encoding="utf-8")
    return place


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("hub:owner/name", HubName("owner/name", None, "train")),
        ("hub:owner/name:test", HubName("owner/name", None, "test")),
        ("hub:owner/name:train[100:200]", HubName("owner/name", None, "train[100:200]")),
        ("hub:owner/name:ko", HubName("owner/name", "ko", "train")),
        ("hub:owner/name:ko:test", HubName("owner/name", "ko", "test")),
        ("hub:owner/name::unusual", HubName("owner/name", None, "unusual")),
    ],
)
def test_a_hub_name_says_dataset_config_and_split(text: str, wanted: HubName) -> None:
    assert parse_hub(text) == wanted


@pytest.mark.parametrize("text", ["hub:", "hub:a:b:c:d"])
def test_a_malformed_hub_name_is_answered_with_how_to_write_it(text: str) -> None:
    with pytest.raises(DataError, match="hub:NAME:config:split"):
        list(load_talks([text], "auto", None))


def test_rows_of_a_folder_dataset_are_read_by_split(folder: Path) -> None:
    talks = list(load_talks([f"hub:{folder}", f"hub:{folder}:test"], "auto", None))
    assert [talk.turns[0].content for talk in talks] == ["안녕", "잘 가", "또 봐"]
    assert talks[1].source == f"hub:{folder}:2"


def test_a_split_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(DataError, match="could not load it") as caught:
        list(load_talks([f"hub:{folder}:validation"], "auto", None))
    assert "validation" in str(caught.value)


def test_without_a_network_the_error_says_so(folder: Path) -> None:
    with pytest.raises(DataError, match="hub cannot be reached"):
        list(load_talks(["hub:nobody/nothing"], "auto", None))
