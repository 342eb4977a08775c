"""Contradictions, and what this machine lacks: told once, at the key to change."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.recipe import world
from toolkit.recipe.read import read_recipe

HEAD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"


Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "adapter: {kind: prefix}\ntrain: {packing: true}",
            "line 5  train.packing: a prefix adapter leads only the first",
        ),
        ("adapter: {kind: prompt_tuning}\ntrain: {packing: true}", "train.packing: a prompt_tuning adapter leads only"),
        ("adapter: {kind: p_tuning}\ntrain: {packing: true}", "train.packing: a p_tuning adapter leads only"),
        (
            "adapter: {kind: prefix}\ntrain: {activation_checkpointing: true}",
            "train.activation_checkpointing: a prefix lives",
        ),
        (
            "adapter: {kind: prefix, init_text: 안녕, projection: true}",
            "line 4  adapter.init_text: a prefix that starts from",
        ),
        (
            "train: {optimizer: muon}",
            "train.optimizer: muon is for whole weight matrices (adapter: {kind: full}), not for lora",
        ),
        ("adapter: {targets: [q_proj, lm_head]}", "adapter.targets: the head (lm_head) takes no adapter"),
        ("adapter: {targets: [q_proj, q_proj]}", "adapter.targets: names a layer twice"),
        ("adapter: {targets: [embed_tokens]}", "adapter.targets: this base ties its head to its embeddings"),
        (
            "adapter: {kind: ia3, options: {target_modules: [lm_head]}}",
            "adapter.options.target_modules: the head (lm_head)",
        ),
        (
            "adapter: {kind: vera, options: {task_type: x}}",
            "adapter.options.task_type: is filled in by the run. Remove it",
        ),
        ("task: classify", "data.format: task: classify needs labels"),
        ("evaluate: {metrics: [accuracy]}", "evaluate.metrics: accuracy count labels"),
        ("train: {micro_batch: 16}", "train.micro_batch: is over batch_size (8)"),
        ("train: {evaluate_every: 5}", "train.evaluate_every: 5 epochs are more than the run has (3). Lower it"),
        ("evaluate: {prompts: none.jsonl}", "evaluate.prompts: there is no file 'none.jsonl'"),
    ],
)
def test_a_contradiction_is_told_at_the_key_to_change(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["base.quantize=nf4", "adapter.kind=full"], "weights in 4 bits cannot learn"),
        (["base.quantize=nf4", "adapter.init=pissa"], "pissa moves weights out of the base"),
        (["base.new={}"], "a base made from scratch learns all its weights. Write adapter: {kind: full}"),
        (
            ["base.new={hidden: 100}", "adapter.kind=full"],
            "3 heads do not divide hidden 100 into even widths. Write hidden: 102",
        ),
        (["base.new={}", "adapter.kind=full", "train.max_length=600"], "is over the context of the new base (512)"),
        (["data.format={kind: labels, text: a, label: b}"], "labels are learned by task: classify"),
        (["data.format=text", "data.system=하이"], "running text (format: text) has no system turn"),
        (["data.format=text", "task=text2text"], "running text has no answers"),
        (["data.valid=0.5", "data.test=0.5"], "valid and test take all of it (1)"),
        (["data.valid=['maltu:probes.jsonl']"], "'maltu:probes.jsonl' is in train too"),
        (["data.test=[hub:a/b]", "data.valid=[hub:a/b]"], "'hub:a/b' is in valid too"),
        (["data.train=[hub:a, hub:a]"], "'hub:a' is listed twice"),
        (["data.train=[hub:a b]"], "is not hub:NAME[:config][:split]"),
        (["data.train=['https://x.org/a.jsonl']"], "is a web address. Fetch the file first"),
        (
            ["base.model=https://huggingface.co/Qwen/Qwen3-0.6B/tree/main"],
            "is a web address. Write the hub id: Qwen/Qwen3-0.6B",
        ),
        (["base.model=./nowhere"], "there is no folder './nowhere'"),
        (["base.model=a/b/c"], "'a/b/c' is no catalogue name, no hub id (owner/name) and no folder here"),
        (["base.model=maltu:base/spoken-mini"], "is named by its catalogue name, as in spoken-mini"),
    ],
)
def test_sections_that_contradict_each_other_give_one_complaint(
    problems: Problems, overrides: list[str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "find_spec", lambda name: name)
    found = problems("", *overrides)
    assert len(found) == 1 and says in found[0], found


def test_copies_are_allowed_where_nothing_drops_them(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEAD)
    recipe = read_recipe(tmp_path / "r.yaml", ["data.train=[hub:a, hub:a]", "data.clean.duplicates=none"])
    assert recipe.data.train == ("hub:a", "hub:a")


def test_what_is_not_installed_is_told_with_how_to_install_it(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "find_spec", lambda name: None)
    assert problems("track: [trackio]\n", "base.quantize=nf4") == [
        "line 4  track.0: trackio is not installed. Run pip install 'maltu[trackio]', or leave it out",
        "override base.quantize=nf4: nf4 needs bitsandbytes. Run pip install 'maltu[gpu]', or write quantize: none",
    ]


def test_a_missing_data_file_is_told_with_the_nearest(
    problems: Problems, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "대화모음.jsonl").write_text("{}\n")
    (tmp_path / "talk").mkdir()
    names = ["대화모임.jsonl", "casual.ko.jsonl", "*.jsonl", "talk", "maltu:talk/casaul.ko.jsonl"]
    found = problems(head=HEAD.replace("['maltu:probes.jsonl']", json.dumps(names)))
    assert [one.partition(": ")[2] for one in found] == [
        "there is no file '대화모임.jsonl'. Did you mean '대화모음.jsonl'?",
        "there is no file 'casual.ko.jsonl'. Did you mean 'maltu:talk/casual.ko.jsonl'?",
        "there is no file '*.jsonl'. Patterns and ~ are not filled in: write the whole path of each file",
        "'talk' is a folder. List its files",
        "there is no file 'maltu:talk/casaul.ko.jsonl'. Did you mean 'maltu:talk/casual.ko.jsonl'?",
    ]


def test_one_file_under_two_names_is_still_one_file(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    found = problems(
        "", f"data.train=[{tmp_path}/a.jsonl]", f"data.valid=[{tmp_path}/x/../b.jsonl, {tmp_path}/b.jsonl]"
    )
    assert any("is in train too" in one for one in found)


def test_a_base_folder_is_looked_into(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("")
    (tmp_path / "empty").mkdir()
    tied = tmp_path / "tied"
    tied.mkdir()
    (tied / "config.json").write_text('{"tie_word_embeddings": true}')
    assert "is a file. Name the folder" in problems("", f"base.model={tmp_path}/model.gguf")[0]
    assert "holds no config.json" in problems("", f"base.model={tmp_path}/empty")[0]
    assert "a folder has no revisions" in problems("", f"base.model={tied}", "base.revision=main")[0]
    assert "ties its head" in problems("adapter: {targets: [embed_tokens]}", f"base.model={tied}")[0]
