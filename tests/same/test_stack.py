"""A row in a stack equals the same row computed by plain PEFT with that adapter alone, on every family of base."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from tests.stacked_world import (
    BASES,
    OPTIONS,
    SEEN,
    SIZES,
    TOLERANCE,
    Worlds,
    make_base,
    off,
    padded,
    save_random,
    some_rows,
    worn,
)
from toolkit.adapters import anatomy
from toolkit.recipe.model import Lora, Reft
from toolkit.stack.adapter import new_adapter, read_adapter
from toolkit.stack.stack import Gates, Stack

EVERY: list[str | None] = [None, *OPTIONS]
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in BASES if name != "llama"]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory)


@pytest.mark.parametrize("base", ["llama", *OTHERS])
class TestEveryBase:
    def test_all_kinds_in_one_batch_equal_each_alone(self, base: str, worlds: Any) -> None:
        world, rows = worlds(base), some_rows(len(EVERY))
        stack = world.stack()
        with torch.no_grad():
            logits = stack(rows, stack.owners(EVERY)).logits
        for index, name in enumerate(EVERY):
            assert off(logits[index], world.alone(name, rows[index])) < TOLERANCE, name

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padded_prefilled_in_chunks_and_decoded_they_still_do(self, base: str, side: str, worlds: Any) -> None:
        world, rows = worlds(base), some_rows(len(EVERY), 16)
        lengths = [3 + index % 5 for index in range(len(EVERY))]
        ids, mask = padded([row[:length] for row, length in zip(rows, lengths, strict=True)], side, 8)
        ids = torch.cat([ids, rows[:, 8:12]], 1)
        mask = torch.cat([mask, torch.ones(len(rows), 4, dtype=torch.long)], 1)
        stack, cache, parts = world.stack(), None, []
        for start, end in ((0, 5), (5, 8), (8, 9), (9, 10), (10, 12)):
            with torch.no_grad():
                out = stack(
                    ids[:, start:end], stack.owners(EVERY), attention_mask=mask[:, :end], past_key_values=cache,
                    use_cache=True,
                )  # fmt: skip
            cache = out.past_key_values
            parts.append(out.logits)
        logits = torch.cat(parts, 1)
        for index, name in enumerate(EVERY):
            real = mask[index].bool()
            assert off(logits[index][real], world.alone(name, ids[index][real])) < 2 * TOLERANCE, name

    def test_in_bf16_they_equal_to_its_precision(self, base: str, worlds: Any) -> None:
        world, rows = worlds(base, torch.bfloat16), some_rows(len(EVERY))
        stack = world.stack()
        with torch.no_grad():
            logits = stack(rows, stack.owners(EVERY)).logits
        for index, name in enumerate(EVERY):
            alone = world.alone(name, rows[index])
            assert off(logits[index], alone) < 0.03 * max(1.0, alone.abs().max().item()), name

    def test_removing_all_restores_the_base(self, base: str, worlds: Any) -> None:
        stack, rows = worlds(base).stack(), some_rows(3)
        with torch.no_grad():
            stack(rows, [0, 1, 2])
            stack.close()
            assert off(stack.base(input_ids=rows).logits, make_base(base)(input_ids=rows).logits) == 0


def test_owners_in_any_order_and_number_give_each_row_its_own_answer(worlds: Any) -> None:
    world, rows = worlds("llama"), some_rows(8)
    stack = world.stack()
    batches = (
        ["lora"] * 8,
        ["lora", "lora", "lora-7", "lora-7"] * 2,
        ["lora", None] * 4,
        ["lora-7"] * 3 + ["reft"] * 5,
        ["reft", "lora", "lora", "lora", None, "lora-alpha", "reft", "lora"],
    )
    for names in batches:
        with torch.no_grad():
            logits = stack(rows, stack.owners(names)).logits
        for index, name in enumerate(names):
            assert off(logits[index], world.alone(name, rows[index])) < TOLERANCE


def test_adapters_on_different_layers_leave_the_other_layers_alone(tmp_path: Path) -> None:
    """More of them than the first tables have places for."""
    parts = [("down_proj", "v_proj"), ("up_proj",), *[("q_proj",)] * 5]
    options: list[Any] = [Lora(rank=2 + n, targets=targets) for n, targets in enumerate(parts)]
    options += [Reft(rank=2, layers=(n,)) for n in (0, 1)]
    stack, rows = Stack(make_base()), some_rows(9)
    for n, one in enumerate(options):
        stack.add(str(n), save_random(one, make_base(), tmp_path / str(n), n))
    with torch.no_grad():
        logits = stack(rows, list(range(9))).logits
        for n in range(9):
            row = rows[n : n + 1]
            alone = worn(tmp_path / str(n), make_base())(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
            assert off(logits[n], alone) < TOLERANCE


def test_what_replaces_an_adapter_answers_at_its_slot_and_nothing_of_the_old_one_stays(worlds: Any) -> None:
    """A smaller rank after a larger one, another kind, the same owners again."""
    world, rows = worlds("llama"), some_rows(2)
    stack = world.stack(["lora-alpha"])
    stack.add("it", world.folders["lora-7"])
    for name in ("lora-7", "lora", "reft-5", "reft", "prefix", "prefix-2", "embedding", "lora"):
        assert stack.replace("it", world.folders[name]) == 1
        with torch.no_grad():
            logits = stack(rows, [1, 0]).logits
        assert off(logits[0], world.alone(name, rows[0])) < TOLERANCE
        assert off(logits[1], world.alone("lora-alpha", rows[1])) < TOLERANCE
        if name == "lora":
            assert not any(table.dense[stack.place("it"), 4:].any() for table in stack.loras.tables.values())


@pytest.mark.parametrize("order", ["sorted", "mixed", "uneven"])
def test_many_rows_of_few_adapters_decode_what_each_would_alone(order: str, worlds: Any) -> None:
    """One token a row: rows of one adapter are brought together to read its weights once."""
    world, rows = worlds("llama"), some_rows(16, 6)
    names = [["lora", "lora-7", None, "lora-alpha"][(n // 4 if order == "sorted" else n) % 4] for n in range(16)]
    names = ["lora"] * 6 + ["lora-7", "lora"] * 4 + [None, "lora-alpha"] if order == "uneven" else names
    stack, cache, parts = world.stack(), None, []
    for n in range(6):
        with torch.no_grad():
            out = stack(rows[:, n : n + 1], stack.owners(names), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    for index, name in enumerate(names):
        assert off(torch.cat(parts, 1)[index], world.alone(name, rows[index])) < TOLERANCE


def test_rows_multiplied_apart_or_with_little_memory_answer_the_same(worlds: Any) -> None:
    world, rows = worlds("llama"), some_rows(4)
    names = ["lora", "lora", "lora-7", "reft"]
    wanted = torch.stack([world.alone(name, row) for name, row in zip(names, rows, strict=True)])
    for options in ({"rows_apart": True}, {"keep_mb": 0}):
        stack = world.stack(**options)
        with torch.no_grad():
            assert off(stack(rows, stack.owners(names)).logits, wanted) < TOLERANCE


def test_packed_rows_see_their_own_text_alone(worlds: Any) -> None:
    world, rows = worlds("llama"), some_rows(2, 12)
    stack = world.stack()
    positions = torch.cat([torch.arange(7), torch.arange(5)]).expand(2, -1)
    with torch.no_grad():
        logits = stack(rows, stack.owners(["lora", "reft"]), position_ids=positions).logits
    for index, name in enumerate(("lora", "reft")):
        assert off(logits[index, :7], world.alone(name, rows[index, :7])) < TOLERANCE
        assert off(logits[index, 7:], world.alone(name, rows[index, 7:])) < TOLERANCE


def test_a_cache_and_a_mask_of_the_callers_own_serve_rows_at_their_own_lengths(worlds: Any) -> None:
    """As a server with a room per row has them: the prefix first, then the tokens, holes masked in 4 dimensions."""
    world, rows = worlds("llama"), some_rows(4, 6)
    stack, names = world.stack(), ["prefix", "prefix-2", None, "lora"]
    owner = stack.owners(names)
    widths, cache = stack.n_prefix(owner), DynamicCache(config=stack.base.config)
    assert widths == [4, 2, 0, 0]
    parts = [stack.keys_and_values(name) if name else [] for name in names]
    for layer in range(2):
        keys, values = torch.zeros(4, 2, 4, 8), torch.zeros(4, 2, 4, 8)
        for index, part in enumerate(parts):
            if part:
                keys[index, :, : widths[index]], values[index, :, : widths[index]] = part[layer]
        cache.update(keys, values, layer)
    sees = torch.zeros(4, 1, 6, 10, dtype=torch.bool)
    for index, width in enumerate(widths):
        sees[index, 0, :, :width] = True
        sees[index, 0, :, 4:] = torch.ones(6, 6).tril().bool()
    positions = torch.arange(6) + torch.tensor(widths).unsqueeze(1)
    given = {"attention_mask": sees, "position_ids": positions, "past_key_values": cache}
    with torch.no_grad():
        logits = stack(rows, owner, **given).logits
    for index, name in enumerate(names):
        assert off(logits[index], world.alone(name, rows[index])) < TOLERANCE


def test_a_forward_written_by_hand_gets_the_same_update(worlds: Any) -> None:
    stack, name = worlds("llama").stack(), "model.layers.1.mlp.up_proj"
    layer, x = stack.base.get_submodule(name), torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), stack.routed(stack.owners(["lora", None, "lora-7"])):
        hooked = layer(x)
        plain = torch.nn.functional.linear(x, layer.weight)
        assert off(hooked, plain) > 1e-3
        assert off(stack.update(name, x, plain.clone()), hooked) == 0
        assert off(stack.update("no.such.layer", x, plain), plain) == 0


def test_an_adapter_in_bf16_is_given_back_in_bf16(worlds: Any) -> None:
    world = worlds("llama")
    made = read_adapter(world.folders["lora"], make_base())
    half = replace(made, tensors={key: value.bfloat16() for key, value in made.tensors.items()})
    for dtype in (torch.float32, torch.bfloat16):
        stack = world.stack([], dtype=dtype)
        stack.add("half", half)
        found = stack.adapter("half")
        assert all(torch.equal(found.tensors[key], value) for key, value in half.tensors.items())
        assert stack.hash("half") == half.hash == found.hash


def test_everything_is_made_where_the_base_lies(worlds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, which refuses tensors of another one, in place of a GPU; transformers asks a mask for its
    values, which meta has not."""
    world, asked = worlds("llama"), Tensor.__bool__
    monkeypatch.setattr(Tensor, "__bool__", lambda it: it.device.type == "meta" or asked(it))
    rows = some_rows(8).to("meta")
    for learns in (False, True):
        stack = Stack(make_base().to("meta"))
        for name in OPTIONS:
            stack.add(name, read_adapter(world.folders[name], make_base()), learns=learns)
        names = ["lora", "lora-7", "reft", "reft-5", "embedding", "lora", "lora", None]
        gates = Gates(("lora", "reft"), torch.zeros(8, 11, 2))
        out = stack(rows, stack.owners(names), gates=gates, draws=torch.arange(8), use_cache=True)
        assert out.logits.device.type == "meta"
        if learns:
            out.logits.sum().backward()
        with torch.no_grad():
            out = stack(rows[:, :1], stack.owners(names), past_key_values=out.past_key_values)
        assert out.logits.device.type == "meta"
        assert stack.start(stack.owners(["prefix", None, "prefix-2"])).layers[0].keys.device.type == "meta"


class TestGates:
    names = ("lora", "reft", "lora-7")

    def gated(self, stack: Stack, rows: Tensor, weights: Any, owner: Any = None) -> Tensor:
        with torch.no_grad():
            owner = [-1] * len(rows) if owner is None else owner
            logits: Tensor = stack(rows, owner, gates=Gates(self.names, weights)).logits
        return logits

    def test_a_gate_forced_to_one_adapter_equals_it(self, worlds: Any) -> None:
        world, rows = worlds("llama"), some_rows(3)
        stack, weights = world.stack(), torch.eye(3).unsqueeze(1).expand(3, 11, 3)
        logits = self.gated(stack, rows, weights)
        for index, name in enumerate(self.names):
            assert off(logits[index], world.alone(name, rows[index])) < TOLERANCE

    def test_no_weight_at_all_is_the_base(self, worlds: Any) -> None:
        world, rows = worlds("llama"), some_rows(3)
        logits = self.gated(world.stack(), rows, torch.zeros(3, 11, 3))
        assert off(logits, make_base()(input_ids=rows).logits) == 0

    def test_rows_with_gates_stand_beside_rows_with_owners(self, worlds: Any) -> None:
        world, rows = worlds("llama"), some_rows(3)
        stack, weights = world.stack(), torch.zeros(3, 11, 3)
        weights[0, :, 2] = 1
        logits = self.gated(stack, rows, weights, stack.owners([None, "prefix", "lora"]))
        for index, name in enumerate(("lora-7", "prefix", "lora")):
            assert off(logits[index], world.alone(name, rows[index])) < TOLERANCE

    def test_the_weighted_sum_of_loras_is_that_of_their_exact_merge(self, worlds: Any) -> None:
        world, rows = worlds("llama"), some_rows(2)
        share = {"lora": 0.7, "lora-alpha": 0.3}
        base = make_base()
        for name, weight in share.items():
            stack = world.stack([name])
            tensors, scale = stack.adapter(name).tensors, (2.0 if name == "lora" else 0.75)
            for key, down in tensors.items():
                if key.endswith("lora_A.weight"):
                    module = base.get_submodule(key.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
                    up = tensors[key.replace("lora_A", "lora_B")]
                    module.weight.data += weight * scale * up @ down
        stack = world.stack()
        with torch.no_grad():
            weights = torch.tensor(list(share.values())).expand(2, 11, 2)
            logits = stack(rows, [-1, -1], gates=Gates(tuple(share), weights)).logits
            assert off(logits, base(input_ids=rows).logits) < 3 * TOLERANCE

    def test_weights_may_come_layer_by_layer_and_learn(self, worlds: Any) -> None:
        world, rows = worlds("llama"), some_rows(2)
        stack, asked = world.stack(), set()
        free = nn.Parameter(torch.zeros(2, 3))

        def weights(layer: int | None) -> Tensor:
            assert layer is not None
            asked.add(layer)
            return free[layer].softmax(0).expand(2, 11, 3)

        stack(rows, [-1, -1], gates=Gates(self.names, weights)).logits.square().mean().backward()
        assert asked == {0, 1}
        assert free.grad is not None and bool(free.grad.any(1).all())


def in_few_bits(bits: str) -> Any:
    """A tiny Llama whose linear layers are bitsandbytes' own, built on the CPU."""
    bitsandbytes: Any = pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed: install the extra gpu"
    )
    base = wide_base()
    for name, module in list(base.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            sizes = (module.in_features, module.out_features)
            new: Any = (
                bitsandbytes.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                if bits == "4"
                else bitsandbytes.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            )
            new.load_state_dict(module.state_dict())
            parent, _, last = name.rpartition(".")
            setattr(base.get_submodule(parent), last, new.to("cpu"))
    return base


def wide_base() -> Any:
    """4-bit weights come in blocks of 64."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sizes = {**SIZES, "hidden_size": 64, "intermediate_size": 128, "tie_word_embeddings": False}
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).eval()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("bits", "tolerance"), [("4", 1e-5), ("8", 0.05)])
def test_on_a_base_in_4_or_8_bits_rows_equal_the_adapter_alone(bits: str, tolerance: float, tmp_path: Path) -> None:
    """In 8 bits activations are rounded to 1/127 of a row's largest, so that a last bit may become a step."""
    rows, stack = some_rows(3), Stack(in_few_bits(bits))
    for name in ("lora", "reft"):
        stack.add(name, save_random(OPTIONS[name], wide_base(), tmp_path / name))
    plain = in_few_bits(bits)
    anatomy.pin_quantised_numbers(plain)
    with torch.no_grad():
        logits = stack(rows, stack.owners(["lora", "reft", None])).logits
        assert off(logits[2:], plain(input_ids=rows).logits[2:]) == 0
        for index, name in enumerate(("lora", "reft")):
            row, base = rows[index : index + 1], in_few_bits(bits)
            anatomy.pin_quantised_numbers(base)
            alone = worn(tmp_path / name, base)(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
            assert off(logits[index], alone) < tolerance
            assert off(logits[index], plain(input_ids=row).logits[0]) > 2 * tolerance
    stack.add("new", new_adapter(stack.base, OPTIONS["lora"], seed=0, token_ids=SEEN), learns=True)
    stack(rows, stack.owners(["new", "lora", None])).logits.square().mean().backward()
    assert any(leaf.grad is not None and leaf.grad.any() for leaf in stack.learning("new").values())
