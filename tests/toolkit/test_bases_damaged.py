"""A folder that is not a whole, safe, causal base is an error that names it and says what to do."""

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolkit.bases.load import load_base
from toolkit.errors import BaseError
from toolkit.recipe.model import Base
from toolkit.shipped import shipped

SPOKEN_MINI = shipped("base/spoken-mini")
load_on_cpu = partial(load_base, device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped base, to be damaged."""
    return Path(shutil.copytree(SPOKEN_MINI, tmp_path / "base"))


def _edit(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text())
    value.update(changes)
    path.write_text(json.dumps(value))


def _only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00" * 5)


def _lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _an_adapter(folder: Path) -> None:
    (folder / "config.json").rename(folder / "adapter_config.json")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _broken_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')


def _unknown_architecture(folder: Path) -> None:
    _edit(folder / "config.json", model_type="no_such_model")


def _translator(folder: Path) -> None:
    _edit(folder / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"])


def _classifier(folder: Path) -> None:
    _edit(folder / "config.json", architectures=["LlamaForSequenceClassification"])


def _own_code(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Own"})


def _own_tokenizer_code(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tok.Own", None]})


def _tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _another_shape(folder: Path) -> None:
    _edit(folder / "config.json", intermediate_size=100)


def _too_few_embeddings(folder: Path) -> None:
    _edit(folder / "config.json", vocab_size=8000)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:8000].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_only_pickles, r"pytorch_model\.bin.*opening a pickle runs.*save_pretrained"),
        (_cut_short, "damaged or cut short"),
        (_no_header, "damaged or cut short"),
        (_lfs_pointer, "git lfs pull"),
        (_no_weights, "there is no model.safetensors"),
        (_no_config, "no config.json"),
        (_an_adapter, "holds an adapter, not a base"),
        (_broken_config, "config.json cannot be read as JSON"),
        (_no_tokenizer, "there is no tokenizer"),
        (_broken_tokenizer, "tokenizer cannot be read"),
        (_unknown_architecture, "does not know the architecture 'no_such_model'"),
        (_translator, "T5ForConditionalGeneration is not a causal language model"),
        (_classifier, "LlamaForSequenceClassification is not a causal language model"),
        (_own_code, r"config\.json asks to run Python code.*trust_remote_code: true"),
        (_own_tokenizer_code, r"tokenizer_config\.json asks to run Python code"),
        (_tensor_missing, r"lack 1 tensors of the model \(model\.norm\.weight\)"),
        (_another_shape, "weights cannot be loaded"),
        (_too_few_embeddings, "tokenizer knows 8,192 tokens, its weights 8,000"),
    ],
)
def test_a_damaged_folder_is_an_error_that_names_it(
    folder: Path, damage: Callable[[Path], None], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    with pytest.raises(BaseError, match=says) as raised:
        load_on_cpu(Base(model=str(folder)))
    assert str(raised.value).startswith(str(folder))
    assert capfd.readouterr() == ("", "")
