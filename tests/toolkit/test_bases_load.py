"""Bases load from folders, from the hub's cache and from a hub; whatever is wrong with one is said, with the remedy."""

import json
import shutil
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from toolkit.bases.families import CHATML, GEMMA, OURS, PLAIN_TEXT
from toolkit.bases.load import load_base, load_tokenizer
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


def _with_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerFast, template: str | None) -> Base:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Base(model=str(folder))


def _shipped_tokenizer(
    special: dict[str, str], normalizer: normalizers.Normalizer | None = None
) -> PreTrainedTokenizerFast:
    """The shipped tokenizer with its special tokens renamed."""
    text = (SPOKEN_MINI / "tokenizer.json").read_text()
    for old, new in special.items():
        text = text.replace(f'"{old}"', f'"{new}"')
    tokenizer = Tokenizer.from_str(text)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    eos = special.get("<|end|>", "<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token="<|endoftext|>")


# what loads


def test_shipped_base_loads_by_name_in_fp32_on_a_cpu_whatever_was_asked() -> None:
    base = load_base(Base(model="spoken-mini"), torch.device("cpu"), torch.bfloat16)
    assert {parameter.dtype for parameter in base.model.parameters()} == {torch.float32} == {base.dtype}
    assert not base.model.training
    assert (base.source, base.context, base.template, base.template_from) == ("spoken-mini", 512, OURS, "base")
    ids = torch.tensor([base.tokenizer.encode("오늘 뭐 먹지?")])
    assert torch.isfinite(base.model(ids).logits).all()


def test_a_folder_and_a_shipped_path_are_the_base_of_that_name(folder: Path) -> None:
    hashes = {load_on_cpu(Base(model=name)).hash for name in ("spoken-mini", str(folder), "maltu:base/spoken-mini")}
    assert len(hashes) == 1


def test_a_folder_beside_the_recipe_wins_over_a_hub_id(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    folder.rename(folder.parent / "owner")
    (folder.parent / "owner").rename(folder.parent / "name")
    (folder.parent / "owner").mkdir()
    (folder.parent / "name").rename(folder.parent / "owner" / "name")
    assert load_tokenizer(Base(model="owner/name")).folder == Path("owner/name")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_hash_changes_with_every_file_that_matters(folder: Path, name: str) -> None:
    before = load_on_cpu(Base(model=str(folder))).hash
    if name == "model.safetensors":
        tensors = load_file(folder / name)
        tensors["model.norm.weight"] += 1
        save_file(tensors, folder / name, metadata={"format": "pt"})
    else:
        (folder / name).write_text((folder / name).read_text() + "\n")
    assert load_on_cpu(Base(model=str(folder))).hash != before


def test_hash_does_not_change_with_a_card_or_a_template(folder: Path) -> None:
    before = load_on_cpu(Base(model=str(folder))).hash
    (folder / "README.md").write_text("다른 글")
    (folder / "chat_template.jinja").write_text(OURS + "\n")
    assert load_on_cpu(Base(model=str(folder))).hash == before


def test_tokenizer_loads_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    opened = load_tokenizer(Base(model=str(folder)))
    assert opened.tokenizer.decode(opened.tokenizer.encode("밥은 먹었어?")) == "밥은 먹었어?"
    assert (opened.context, opened.template, opened.config["hidden_size"]) == (512, OURS, 256)


def test_weights_in_shards_load(folder: Path) -> None:
    whole = load_on_cpu(Base(model=str(folder))).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    shards = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    weight_map = {name: f"model-{i}.safetensors" for i, shard in enumerate(shards) for name in shard}
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i}.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(t, whole[n]) for n, t in load_on_cpu(Base(model=str(folder))).model.state_dict().items())
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(BaseError, match="1 of 2 weight files are missing"):
        load_on_cpu(Base(model=str(folder)))


def test_pickled_weights_beside_safetensors_are_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_on_cpu(Base(model=str(folder)))


@pytest.mark.parametrize(
    ("tokenizer_limit", "positions", "context"), [(512, 1024, 512), (10**30, 1024, 1024), (131_072, 1024, 1024)]
)
def test_context_is_the_smaller_of_what_tokenizer_and_model_say(
    folder: Path, tokenizer_limit: int, positions: int, context: int
) -> None:
    _edit(folder / "tokenizer_config.json", model_max_length=tokenizer_limit)
    _edit(folder / "config.json", max_position_embeddings=positions)
    assert load_tokenizer(Base(model=str(folder))).context == context


def test_nothing_is_printed(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    load_on_cpu(Base(model=str(folder)))
    assert capfd.readouterr() == ("", "")


def test_a_base_without_a_padding_token_pads_with_its_end(folder: Path) -> None:
    base = _with_tokenizer(folder, _shipped_tokenizer({}), None)
    assert load_tokenizer(base).tokenizer.pad_token == "<|end|>"


# nf4


@pytest.mark.slow
def test_nf4_runs_on_a_cpu_and_stays_near_the_full_weights(capfd: pytest.CaptureFixture[str]) -> None:
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    full = load_on_cpu(Base(model="spoken-mini"))
    small = load_on_cpu(Base(model="spoken-mini", quantize="nf4"))
    assert small.model.get_memory_footprint() < 0.5 * full.model.get_memory_footprint()
    ids = torch.tensor([full.tokenizer.encode("<|user|>오늘 뭐 먹지?<|end|><|assistant|>글쎄, 라면?<|end|>")])
    losses = [base.model(ids, labels=ids).loss.item() for base in (full, small)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    assert small.hash == full.hash
    assert capfd.readouterr() == ("", "")


def test_nf4_without_bitsandbytes_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BaseError, match="nf4 needs bitsandbytes"):
        load_on_cpu(Base(model="spoken-mini", quantize="nf4"))


def test_code_beside_the_weights_runs_when_the_recipe_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
    monkeypatch.syspath_prepend(str(folder / "modules"))
    (folder / "own.py").write_text(
        "from transformers import LlamaForCausalLM\n\n\nclass Own(LlamaForCausalLM):\n    loud = True\n"
    )
    _edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "own.Own"})
    base = load_on_cpu(Base(model=str(folder), trust_remote_code=True))
    assert base.model.loud is True


# names


def test_a_folder_that_is_not_there_is_an_error() -> None:
    with pytest.raises(BaseError, match=r"\./nowhere: there is no such folder"):
        load_tokenizer(Base(model="./nowhere"))


def test_a_misspelt_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(BaseError, match="Did you mean 'spoken-mini'"):
        load_tokenizer(Base(model="spoken_mini"))


def test_a_revision_of_a_folder_is_an_error() -> None:
    with pytest.raises(BaseError, match=r"base\.revision names a version on the hub"):
        load_tokenizer(Base(model="spoken-mini", revision="main"))


# templates and tokenizers


def test_a_base_without_a_template_gets_ours_for_the_tokens_it_has(folder: Path) -> None:
    chatml = _shipped_tokenizer({"<|user|>": "<|im_start|>", "<|end|>": "<|im_end|>"})
    gemma = _shipped_tokenizer({"<|user|>": "<start_of_turn>", "<|end|>": "<end_of_turn>"})
    other = _shipped_tokenizer({"<|user|>": "<u>", "<|end|>": "</s>"})
    found = [load_tokenizer(_with_tokenizer(folder, tokenizer, None)) for tokenizer in (chatml, gemma, other)]
    assert [opened.template for opened in found] == [CHATML, GEMMA, PLAIN_TEXT]
    assert [opened.template_from for opened in found] == ["ours (chatml)", "ours (gemma)", "ours (plain text)"]


def test_a_template_that_does_not_nest_is_replaced_where_we_have_one_for_its_tokens(folder: Path) -> None:
    strips_thinking = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
    )
    chatml = _shipped_tokenizer({"<|user|>": "<|im_start|>", "<|end|>": "<|im_end|>"})
    assert load_tokenizer(_with_tokenizer(folder, chatml, strips_thinking)).template == CHATML
    other = _shipped_tokenizer({"<|user|>": "<u>", "<|end|>": "</s>"})
    with pytest.raises(BaseError, match="does not nest"):
        load_tokenizer(_with_tokenizer(folder, other, strips_thinking.replace("<|im_end|>", "</s>")))


def test_a_tokenizer_without_an_end_token_is_an_error(folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_shipped_tokenizer({"<|user|>": "<u>"}).backend_tokenizer)
    with pytest.raises(BaseError, match="no end token"):
        load_tokenizer(_with_tokenizer(folder, tokenizer, None))


def test_a_template_whose_end_token_the_tokenizer_does_not_know_is_an_error(folder: Path) -> None:
    tokenizer = _shipped_tokenizer({"<|user|>": "<u>", "<|end|>": "</s>"})
    with pytest.raises(BaseError, match="ends an answer without a token of its own"):
        load_tokenizer(_with_tokenizer(folder, tokenizer, CHATML))


def test_a_tokenizer_that_changes_text_is_an_error(folder: Path) -> None:
    with pytest.raises(BaseError, match="does not give back what it is given"):
        load_tokenizer(_with_tokenizer(folder, _shipped_tokenizer({}, normalizers.Lowercase()), OURS))


def test_a_tokenizer_that_knows_few_words_is_an_error(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "Hello": 2}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="</s>")
    with pytest.raises(BaseError, match="does not give back what it is given"):
        load_tokenizer(_with_tokenizer(folder, tokenizer, None))
