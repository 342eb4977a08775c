"""Which kind a recipe or a folder means, whole models, PEFT's other kinds by name, and how quickly that is known."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.adapters.peft_kinds import PeftKinds, refuse_unknown
from toolkit.errors import AdapterError
from toolkit.recipe.adapter import PEFT_KINDS, REFUSED_KINDS
from toolkit.recipe.model import Full, Lora, PeftKind

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True, "pad_token_id": 0,
}  # fmt: skip
ROWS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def make_base(**changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, **changes})).eval()


def test_choosing_a_kind_imports_no_peft() -> None:
    code = (
        "import sys; from toolkit.adapters.kinds import kind_of; from toolkit.recipe.model import Lora, PeftKind;"
        "kind_of(Lora()); kind_of(PeftKind(kind='ia3')); sys.exit('peft' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no adapter_config.json, so this is not an adapter"),
        ({"adapter_config.json": "{"}, "cannot be read as JSON"),
        ({"adapter_config.json": "[]"}, "holds a list where"),
        ({"adapter_config.json": "{}"}, "names neither a kind of ours nor one of PEFT"),
        ({"adapter_config.json": '{"kind": "lora"}'}, "names neither a kind of ours nor one of PEFT"),
        ({"adapter_config.json": '{"peft_type": "XLORA"}'}, "xlora is not to be had here"),
        ({"adapter_config.json": '{"peft_type": "로라"}'}, "'로라' is not a kind"),
    ],
)
def test_a_folder_that_holds_no_adapter_says_why(files: dict[str, str], says: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(AdapterError, match=says):
        kind_in_folder(tmp_path)


def test_a_plain_peft_folder_of_others_is_loaded(tmp_path: Path) -> None:
    from toolkit.adapters import through_peft

    with through_peft.quiet():
        import peft

        made = peft.get_peft_model(make_base(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
        made.eval().save_pretrained(tmp_path)
    loaded = kind_in_folder(tmp_path).load(make_base(), tmp_path, base_hash="abc")
    assert torch.equal(loaded(ROWS).logits, made(ROWS).logits)


def test_tensors_without_a_config_of_peft_are_refused(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"kind": "reft", "version": 1}')
    with pytest.raises(AdapterError, match="names no peft_type"):
        kind_of(Lora()).load(make_base(), tmp_path)


def test_a_peft_config_that_does_not_fit_the_base_is_one_clear_error(tmp_path: Path) -> None:
    kind_of(Lora()).save(kind_of(Lora()).attach(make_base(), Lora(rank=4), seed=0), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query"]}))
    with pytest.raises(AdapterError, match=r"does not fit LlamaForCausalLM: .*query"):
        kind_of(Lora()).load(make_base(), tmp_path)


class TestFull:
    def test_weights_are_saved_in_shards_and_read_back(self, tmp_path: Path) -> None:
        from toolkit.adapters.full import FullKind

        kind = FullKind(max_shard_size="20KB")
        model: Any = kind.attach(make_base(), Full(), seed=0)
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        kind.save(model, tmp_path)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
        assert isinstance(kind_in_folder(tmp_path), FullKind)
        loaded: Any = kind_in_folder(tmp_path).load(make_base(), tmp_path)
        assert torch.equal(loaded(ROWS).logits, model(ROWS).logits)

    def test_an_untied_model_does_not_fit_a_tied_base(self, tmp_path: Path) -> None:
        kind = kind_of(Full())
        kind.save(make_base(tie_word_embeddings=False), tmp_path)
        with pytest.raises(AdapterError, match=r"lm_head\.weight has no place"):
            kind.load(make_base(), tmp_path)

    def test_an_index_that_leads_out_of_the_folder_is_not_followed(self, tmp_path: Path) -> None:
        index = {"weight_map": {"model.norm.weight": "../다른/model.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(AdapterError, match="names files outside its folder"):
            kind_of(Full()).load(make_base(), tmp_path)


class TestPeftKinds:
    @pytest.mark.parametrize("name", sorted(REFUSED_KINDS))
    def test_kinds_that_fail_or_are_silently_wrong_are_refused_with_the_reason(self, name: str) -> None:
        with pytest.raises(AdapterError, match=f"{name} is not to be had here: .*kind: "):
            refuse_unknown(name)

    def test_a_name_that_is_no_kind_gets_the_nearest(self) -> None:
        with pytest.raises(AdapterError, match=r"'ia4' is not a kind\. Did you mean ia3\?"):
            refuse_unknown("ia4")

    def test_every_kind_of_the_installed_peft_is_accepted_or_refused(self) -> None:
        from toolkit.adapters import through_peft

        with through_peft.quiet():
            import peft
        ours = {"lora"}
        assert {kind.value.lower() for kind in peft.PeftType} == PEFT_KINDS | REFUSED_KINDS.keys() | ours

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"target_module": ["q_proj"]}, r"target_module is not a key .*Did you mean target_modules\?"),
            ({"task_type": "SEQ_CLS"}, "task_type is set by Maltu"),
            ({"modules_to_save": ["lm_head"]}, "modules_to_save: it keeps whole layers"),
        ],
    )
    def test_options_are_checked_against_the_kinds_config(self, options: dict[str, Any], says: str) -> None:
        with pytest.raises(AdapterError, match=says):
            PeftKinds("ia3").attach(make_base(), PeftKind(kind="ia3", options=options), seed=0)

    def test_what_a_kind_cannot_do_without_is_asked_for(self) -> None:
        with pytest.raises(AdapterError, match="num_virtual_tokens is needed"):
            PeftKinds("p_tuning").attach(make_base(), PeftKind(kind="p_tuning", options={}), seed=0)

    def test_what_peft_refuses_is_one_error_in_its_words(self) -> None:
        with pytest.raises(AdapterError, match=r"ia3: PEFT cannot put this adapter on LlamaForCausalLM: .*말투"):
            chosen = PeftKind(kind="ia3", options={"target_modules": ["말투"], "feedforward_modules": []})
            PeftKinds("ia3").attach(make_base(), chosen, seed=0)
