"""What a stack refuses, by name, with where and what to do; and nothing has changed afterwards."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from tests.stacked_world import GPT2, OPTIONS, SIZES, World, make_base, off, some_rows
from toolkit.adapters.kinds import kind_of
from toolkit.errors import AdapterError
from toolkit.recipe.model import Full, Lora, PeftKind, Prefix
from toolkit.stack.adapter import Adapter, new_adapter, read_adapter
from toolkit.stack.stack import Gates, Stack

ROWS = some_rows(3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@pytest.mark.parametrize(
    ("owner", "says"),
    [
        ([0, 7, -1], "owner: 7 is no adapter of this stack. It holds 0 lora, 1 prefix; -1 is the base"),
        ([0, -2, -1], "owner: -2 is no adapter"),
        ([0, 1], "2 owners for 3 rows"),
        (torch.tensor([0.0, 1.0, 1.0]), "one whole number per row"),
        (torch.tensor([[0], [1], [1]]), "one whole number per row"),
    ],
)
def test_owners_that_are_none(owner: Any, says: str, world: World) -> None:
    with pytest.raises(AdapterError, match=says):
        world.stack(["lora", "prefix"])(ROWS, owner)


def test_names_taken_or_unknown(world: World) -> None:
    stack = world.stack(["lora"])
    with pytest.raises(AdapterError, match="lora: this stack already has an adapter of that name"):
        stack.add("lora", world.folders["reft"])
    for act in (stack.remove, stack.hash, stack.learning, lambda name: stack.owners([name])):
        with pytest.raises(AdapterError, match=r"말투: this stack has no adapter of that name. It holds lora"):
            act("말투")


def test_an_adapter_of_another_base_is_refused_and_the_old_one_stays(world: World) -> None:
    stack = world.stack(["lora"])
    before = stack.hash("lora")
    other: Any = AutoModelForCausalLM.from_config(LlamaConfig(**{**SIZES, "hidden_size": 48, "vocab_size": 80}))
    for name, options in OPTIONS.items():
        made = new_adapter(other, options, seed=0)
        for act in (stack.replace, lambda _, one: stack.add("new", one)):
            with pytest.raises(
                AdapterError, match=r"(lora|new): this \w+ adapter does not fit the base: .* Load the base"
            ):
                act("lora", made)
        assert dict(stack.slots) == {"lora": 0}, name
    assert stack.hash("lora") == before
    other = AutoModelForCausalLM.from_config(GPT2Config(**GPT2))
    with pytest.raises(AdapterError, match=r"c_attn.* no linear layer that sees whole rows"):
        stack.add("new", new_adapter(other, OPTIONS["lora"], seed=0))


def test_a_folder_of_another_base_by_its_hash(world: World) -> None:
    with pytest.raises(AdapterError, match="made for another base"):
        Stack(make_base(), base_hash="abd").add("lora", world.folders["lora"])


@pytest.mark.parametrize("name", ["lora", "prefix", "reft", "embedding"])
def test_values_that_are_not_finite(name: str, world: World) -> None:
    made = read_adapter(world.folders[name], make_base())
    bad = {key: value.clone() for key, value in made.tensors.items()}
    next(value for value in bad.values() if value.is_floating_point()).view(-1)[1] = float("inf")
    with pytest.raises(AdapterError, match=r"x: .*holds values that are not finite"):
        world.stack([]).add("x", replace(made, tensors=bad))


def test_tensors_missing_or_without_a_place(world: World) -> None:
    made = read_adapter(world.folders["lora"], make_base())
    half = {key: value for key, value in made.tensors.items() if not key.endswith("layers.0.mlp.up_proj.lora_B.weight")}
    with pytest.raises(AdapterError, match=r"layers.0.mlp.up_proj has only lora_A"):
        world.stack([]).add("x", replace(made, tensors=half))
    reft = read_adapter(world.folders["reft"], make_base())
    with pytest.raises(AdapterError, match=r"layers.7.bias has no layer among 2"):
        world.stack([]).add("x", replace(reft, tensors={**reft.tensors, "layers.7.bias": torch.zeros(2)}))
    with pytest.raises(AdapterError, match="it holds no tensor"):
        world.stack([]).add("x", replace(reft, tensors={}))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("use_dora", True, "DoRA divides"),
        ("lora_bias", True, "also learns biases"),
        ("bias", "all", "changes the base's biases"),
        ("kasa_config", {"beta": 1e-4}, "KaSA scales"),
        ("use_bdlora", {"nblocks": 2}, "BD-LoRA keeps blocks"),
        ("modules_to_save", ["lm_head"], "keeps whole layers"),
        ("target_parameters", ["mlp.experts.gate_up_proj"], "fused experts"),
        ("init_lora_weights", "pissa", "pissa start changed the base's own weights"),
    ],
)
def test_lora_folders_that_no_stack_holds(key: str, value: Any, says: str, world: World, tmp_path: Path) -> None:
    for path in world.folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, key: value}), encoding="utf-8")
    with pytest.raises(AdapterError, match=f"no stack can hold this adapter.*{says}.*It trains alone"):
        world.stack([]).add("x", tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Lora(rank=2, dora=True), "DoRA"),
        (Lora(rank=2, init="pissa"), "PiSSA"),
        (Prefix(tokens=2, projection=True), "projection"),
        (Full(), "kind full"),
        (PeftKind(kind="ia3", options={}), "kind ia3"),
    ],
)
def test_options_that_no_stack_trains(options: Any, says: str) -> None:
    with pytest.raises(AdapterError, match=f"{says}.*It trains alone"):
        new_adapter(make_base(), options, seed=0)


def test_a_pissa_saved_as_the_plain_lora_it_is_can_answer(tmp_path: Path) -> None:
    kind = kind_of(options := Lora(rank=2, init="pissa"))
    model = kind.attach(make_base(), options, seed=0)
    kind.save(model, tmp_path)
    stack = Stack(make_base())
    stack.add("x", tmp_path)
    with torch.no_grad():
        assert off(stack(ROWS, [0] * 3).logits, model(input_ids=ROWS).logits) < 1e-5


def test_folders_of_other_kinds(tmp_path: Path) -> None:
    kind = kind_of(options := PeftKind(kind="ia3", options={}))
    kind.save(kind.attach(make_base(), options, seed=0), tmp_path)
    with pytest.raises(AdapterError, match="no stack can hold an adapter of kind ia3"):
        Stack(make_base()).add("x", tmp_path)


def test_layers_that_see_routed_tokens(world: World) -> None:
    base = make_base()
    base.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    tensors = {
        f"base_model.model.model.layers.0.mlp.experts.0.lora_{part}.weight": torch.ones(2, 32) if part == "A"
        else torch.ones(32, 2) for part in "AB"
    }  # fmt: skip
    with pytest.raises(AdapterError, match=r"experts.0 is no linear layer that sees whole rows.*It trains alone"):
        Stack(base).add("x", Adapter("lora", tensors, {"lora_alpha": 2}))
    head = {
        f"base_model.model.lm_head.lora_{part}.weight": torch.ones(2, 32) if part == "A" else torch.ones(96, 2)
        for part in "AB"
    }
    with pytest.raises(AdapterError, match=r"lm_head is no linear layer that sees whole rows.*not the head"):
        Stack(base).add("x", Adapter("lora", head, {"lora_alpha": 2}))


@pytest.mark.parametrize(
    ("names", "shape", "says"),
    [
        (
            ("lora", "reft"),
            (3, 11, 3),
            r"weights are \(3, 11, 3\) where 3 rows, 11 tokens and 2 adapters \(lora, reft\)",
        ),
        (("lora", "reft"), (3, 10, 2), r"weights are \(3, 10, 2\)"),
        (("lora", "reft"), (2, 11, 2), r"weights are \(2, 11, 2\)"),
        (("lora", "prefix"), (3, 11, 2), "prefix is of kind prefix"),
        (("embedding",), (3, 11, 1), "embedding is of kind embedding"),
        (("lora", "lora"), (3, 11, 2), "or one twice"),
        (("없음",), (3, 11, 1), "없음: this stack has no adapter of that name"),
    ],
)
def test_gate_weights_that_do_not_fit(names: tuple[str, ...], shape: tuple[int, ...], says: str, world: World) -> None:
    stack = world.stack(["lora", "prefix", "reft", "embedding"])
    with pytest.raises(AdapterError, match=says):
        stack(ROWS, [-1] * 3, gates=Gates(names, torch.zeros(shape)))


class TestCalls:
    def test_labels(self, world: World) -> None:
        with pytest.raises(AdapterError, match="labels: a loss belongs to one adapter"):
            world.stack(["lora"])(ROWS, [0] * 3, labels=ROWS)

    def test_packed_rows_beside_a_prefix_a_mask_or_a_cache(self, world: World) -> None:
        stack = world.stack(["lora", "prefix"])
        positions = torch.cat([torch.arange(6), torch.arange(5)]).expand(3, -1)
        for owner, given in (
            ([1, 0, 0], {}),
            ([0, 0, 0], {"attention_mask": torch.ones_like(ROWS)}),
            ([0, 0, 0], {"use_cache": True}),
        ):
            with pytest.raises(AdapterError, match="start again inside a row"):
                stack(ROWS, owner, position_ids=positions, **given)

    def test_masks_and_caches_of_other_batches(self, world: World) -> None:
        stack = world.stack(["lora", "prefix", "prefix-2"])
        with pytest.raises(AdapterError, match=r"attention_mask is \(3, 15\) where \(3, 11\) is needed"):
            stack(ROWS, [0, 1, 1], attention_mask=torch.ones(3, 15))
        cache = stack.start([0, 2, 2])
        with pytest.raises(AdapterError, match="2 columns cannot hold prefixes of 4"):
            stack(ROWS, [0, 1, 1], past_key_values=cache)

    def test_left_padding_that_pushes_a_prefix_out_of_a_window(self, tmp_path: Path) -> None:
        base = make_base("gemma3")
        stack = Stack(base)
        stack.add("prefix", new_adapter(base, Prefix(tokens=4), seed=0))
        rows, mask = some_rows(2, 30), torch.ones(2, 30, dtype=torch.long)
        mask[0, :3] = 0
        with pytest.raises(AdapterError, match="sliding window of 32"):
            stack(rows, [0, -1], attention_mask=mask)
        stack(rows, [-1, 0], attention_mask=mask)

    def test_activation_checkpointing(self, world: World) -> None:
        stack = Stack(make_base())
        stack.add("x", new_adapter(stack.base, Lora(rank=2), seed=0), learns=True)
        stack.base.train()
        stack.base.activation_checkpointing_enable()
        with pytest.raises(AdapterError, match="Activation checkpointing runs layers again"):
            stack(ROWS, [0] * 3)

    def test_after_an_error_nothing_is_left_on(self, world: World) -> None:
        stack = world.stack(["lora"])
        with pytest.raises(AdapterError), stack.routed([0] * 3):
            stack(ROWS, [5] * 3)
        with torch.no_grad():
            assert off(stack.base(input_ids=ROWS).logits, make_base()(input_ids=ROWS).logits) == 0


def test_a_base_that_already_wears_an_adapter() -> None:
    with pytest.raises(AdapterError, match="already has an adapter"):
        Stack(kind_of(Lora(rank=2)).attach(make_base(), Lora(rank=2), seed=0))
