"""Export: a plain folder that answers as base + adapter, whole or not at all; the hub here is a folder."""

import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from toolkit.__main__ import main as maltu
from toolkit.adapters.kinds import kind_of
from toolkit.errors import AdapterError, RunError
from toolkit.export import Exported, add_arguments, export, export_merged, hub_target, push_to_hub
from toolkit.loaded import load_run
from toolkit.recipe.model import Embedding, Lora, Prefix
from toolkit.train import main as train

ROWS = torch.tensor([[5, 6, 7, 8, 9, 10]])
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def make_base() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def make_tokenizer() -> Any:
    words = Tokenizer(WordLevel({"[UNK]": 0, "오늘": 1, "뭐": 2, "먹지?": 3}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", chat_template="원래 것")


def saved(options: Any, folder: Path) -> torch.Tensor:
    """Save a trained adapter; give back what it answers."""
    model: Any = kind_of(options).attach(make_base(), options, seed=0)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], 1e-2)
    for _ in range(3):
        model(input_ids=ROWS, labels=ROWS).loss.backward()
        optimizer.step()
    folder.mkdir()
    kind_of(options).save(model, folder, base_hash="abc")
    answer: torch.Tensor = model(input_ids=ROWS).logits.detach()
    return answer


@pytest.mark.parametrize("options", [Lora(rank=4), Embedding()], ids=["lora", "embedding"])
def test_an_exported_folder_answers_as_base_and_adapter(options: Any, tmp_path: Path) -> None:
    before = saved(options, tmp_path / "adapter")
    wanted = Exported(template=TEMPLATE, generation={"max_new_tokens": 60, "do_sample": True, "temperature": 0.7})
    tokenizer = make_tokenizer()
    out = export_merged(make_base(), tokenizer, kind_of(options), tmp_path / "adapter", tmp_path / "내보냄", wanted)
    again = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(again(ROWS).logits, before, rtol=0, atol=1e-5)
    assert (again.generation_config.max_new_tokens, again.generation_config.temperature) == (60, 0.7)
    said = AutoTokenizer.from_pretrained(out).apply_chat_template([{"role": "user", "content": "오늘"}], tokenize=False)
    assert said == "user: 오늘\n"
    assert tokenizer.chat_template == "원래 것"
    assert str(tmp_path) not in "".join(path.read_text() for path in out.glob("*.json"))


def test_fewer_bits_are_written_when_asked_for(tmp_path: Path) -> None:
    saved(Lora(rank=4), tmp_path / "adapter")
    wanted = Exported(dtype=torch.bfloat16)
    out = export_merged(make_base(), make_tokenizer(), kind_of(Lora()), tmp_path / "adapter", tmp_path / "out", wanted)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(out).dtype == torch.bfloat16


def test_a_kind_that_cannot_merge_leaves_no_folder(tmp_path: Path) -> None:
    saved(Prefix(tokens=4), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="prefix cannot be merged"):
        export_merged(make_base(), make_tokenizer(), kind_of(Prefix()), tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


def test_an_adapter_of_another_base_leaves_no_folder(tmp_path: Path) -> None:
    saved(Lora(rank=4), tmp_path / "adapter")
    with pytest.raises(AdapterError, match="made for another base"):
        export_merged(
            make_base(),
            make_tokenizer(),
            kind_of(Lora()),
            tmp_path / "adapter",
            tmp_path / "out",
            Exported(base_hash="x"),
        )
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "일기.txt").write_text("중요")
    with pytest.raises(RunError, match="is there already"):
        export_merged(make_base(), make_tokenizer(), kind_of(Lora()), tmp_path, tmp_path / "out")
    assert (tmp_path / "out" / "일기.txt").read_text() == "중요"


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(Lora(rank=4), tmp_path / "adapter")
    tokenizer = make_tokenizer()

    def full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokenizer, "save_pretrained", full)
    with pytest.raises(RunError, match="No space left on device"):
        export_merged(make_base(), tokenizer, kind_of(Lora()), tmp_path / "adapter", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter"}


@pytest.mark.parametrize("target", ["hub:name", "hub:", "hub:a/b/c", "hub:../x", "hub:민지/말투"])
def test_a_target_that_is_no_place_on_a_hub_is_refused(target: str) -> None:
    with pytest.raises(RunError, match="hub:USER/NAME"):
        hub_target(target)


def test_other_targets_are_not_on_a_hub() -> None:
    assert hub_target("merged") is None
    assert hub_target("hub:minji/casual-chat_1.0") == "minji/casual-chat_1.0"


class FolderHub:
    """What huggingface_hub does over the network, done in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        (self.root / f"{repo_id}.visibility").write_text("private" if private else "public")

    def upload_folder(self, *, repo_id: str, folder_path: Path, ignore_patterns: list[str]) -> Any:
        files = [path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file()]
        for name in huggingface_hub.utils.filter_repo_objects(files, ignore_patterns=ignore_patterns):
            (self.root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder_path / name, self.root / repo_id / name)
        return SimpleNamespace(repo_url=f"https://huggingface.co/{repo_id}")


def make_run(folder: Path) -> Path:
    for name in (
        "README.md",
        "adapters/main/adapter.safetensors",
        "checkpoints/1/optimizer.pt",
        ".lock",
        "a/.hidden",
        "x.bin",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("public", [True, False])
def test_a_run_is_pushed_without_its_checkpoints_and_private_by_default(
    public: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: FolderHub(tmp_path / "hub"))
    address = push_to_hub(make_run(tmp_path / "run"), "hub:minji/casual", public=public)
    assert address == "https://huggingface.co/minji/casual"
    sent = tmp_path / "hub" / "minji" / "casual"
    assert sorted(p.relative_to(sent).as_posix() for p in sent.rglob("*") if p.is_file()) == [
        "README.md", "adapters/main/adapter.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "hub/minji/casual.visibility").read_text() == ("public" if public else "private")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (errors.LocalTokenNotFoundError("no token"), "nobody is logged in"),
        (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set"),
        (ConnectionError("no route"), "cannot be reached"),
        (errors.HFValidationError("bad name"), "the hub refused"),
        (ValueError("Invalid metadata in README.md."), "does not take the heading of .*README.md"),
    ],
)
def test_what_goes_wrong_at_the_hub_is_said_with_a_remedy(
    error: Exception, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", fail)
    with pytest.raises(RunError, match=says):
        push_to_hub(make_run(tmp_path / "run"), "hub:minji/casual")


def test_offline_nothing_is_sent(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"hub:minji/casual: "):
        push_to_hub(make_run(tmp_path / "run"), "hub:minji/casual")


def test_an_empty_folder_and_a_target_elsewhere_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to send"):
        push_to_hub(tmp_path, "hub:minji/casual")
    with pytest.raises(RunError, match="not a place on a hub"):
        push_to_hub(tmp_path, "merged")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "--to", "merged", "--public"], "--public: only with --to hub"),
        (["run", "--to", "hub:minji/casual", "--out", "밖"], "--out 밖: only with --to merged"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(arguments: list[str], says: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    with pytest.raises(RunError, match=says):
        export(parser.parse_args(arguments))


@pytest.mark.slow
@pytest.mark.parametrize(
    "base", ["base={model: spoken-mini}", "base={new: {hidden: 32, layers: 1, heads: 2, vocab: 300, context: 64}}"]
)
def test_a_run_that_trained_every_parameter_is_exported_as_it_answers(
    base: str, recipe_file: Path, tmp_path: Path
) -> None:
    few = [base, "adapter={kind: full}", "train.max_steps=2", "train.batch_size=2", "--quiet"]
    assert train([str(recipe_file), *few, "--runs", str(tmp_path / "runs")]) == 0
    run, out = tmp_path / "runs" / "tiny", tmp_path / "내보냄"
    assert maltu(["export", str(run), "--to", "merged", "--out", str(out)]) == 0
    was: Any = load_run(run, "cpu").model
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out)(ROWS).logits, was(ROWS).logits)
