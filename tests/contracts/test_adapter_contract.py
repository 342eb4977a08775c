"""The conformance test of adapter kinds: what toolkit/adapters/contract.py promises, for every kind and several bases.

A new kind is added to KINDS and done when this passes.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from toolkit.adapters.contract import Kind
from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.errors import AdapterError
from toolkit.recipe.adapter import PEFT_KINDS
from toolkit.recipe.model import Embedding, Full, Lora, PeftKind, Prefix, Reft

# Options that PEFT's kinds need on a base as small as these.
PEFT_OPTIONS: dict[str, dict[str, Any]] = {
    "adaption_prompt": {"adapter_layers": 2, "adapter_len": 4},
    "boft": {"boft_block_size": 8},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "miss": {"r": 8},
    "oft": {"r": 0, "oft_block_size": 8},
    "p_tuning": {"num_virtual_tokens": 4},
    "prompt_tuning": {"num_virtual_tokens": 4},
    "psoft": {"r": 4},
    "randlora": {"r": 4},
    "road": {"group_size": 8},
    "shira": {"r": 4},
    "vblora": {"num_vectors": 16, "vector_length": 16, "r": 4},
    "vera": {"r": 8},
    "waveft": {"n_frequency": 50},
}
OURS: dict[str, Any] = {
    "lora": Lora(rank=4),
    "lora, rank-stabilised": Lora(rank=4, rank_stabilised=True, dropout=0.1),
    "lora, dora": Lora(rank=4, dora=True),
    "lora, pissa": Lora(rank=4, init="pissa"),
    "prefix": Prefix(tokens=4),
    "prefix, projection": Prefix(tokens=4, projection=True),
    "reft": Reft(rank=2),
    "reft, one layer": Reft(rank=2, layers=(1,), dropout=0.1),
    "embedding": Embedding(),
    "full": Full(),
    "prompt_tuning": PeftKind(kind="prompt_tuning", options={"num_virtual_tokens": 4}),
    "ia3": PeftKind(kind="ia3", options={}),
}
OTHERS = {
    name: PeftKind(kind=name, options=PEFT_OPTIONS.get(name, {}))
    for name in sorted(PEFT_KINDS - {"prompt_tuning", "ia3"})
}
QUICK = ("lora", "lora, pissa", "prefix", "reft", "embedding", "full", "prompt_tuning")
KINDS = [
    *(
        pytest.param(options, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, options in OURS.items()
    ),
    *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in OTHERS.items()),
]
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": 96,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=32),
}
ROWS = torch.randint(5, 96, (2, 11), generator=torch.Generator().manual_seed(1))
ALL = torch.ones_like(ROWS)
SEEN = sorted(set(ROWS.flatten().tolist()))

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),  # frod says so at its first forward pass
]


def make_base(name: str = "llama", dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    """A tiny random base, the same one every time."""
    config = BASES[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.data += torch.randn_like(parameter) * 0.05
    return model.to(dtype).eval()


def attach(options: Any, base: nn.Module, seed: int = 0) -> nn.Module:
    return kind_of(options).attach(base, options, seed=seed, token_ids=SEEN)


def train(model: nn.Module, n_steps: int, optimizer: torch.optim.Optimizer | None = None) -> torch.optim.Optimizer:
    model.train()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(learning, 1e-2)
    for _ in range(n_steps):
        model(input_ids=ROWS, attention_mask=ALL, labels=ROWS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return optimizer


def logits(model: nn.Module, rows: Tensor = ROWS, mask: Tensor | None = None, **more: Any) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(
            input_ids=rows, attention_mask=torch.ones_like(rows) if mask is None else mask, **more
        ).logits
    return answer


def saved(
    options: Any, folder: Path, base: str = "llama", dtype: torch.dtype = torch.float32
) -> tuple[Kind[Any], Tensor]:
    """Train an adapter a little, save it, and return its kind and what it answered."""
    kind, model = kind_of(options), attach(options, make_base(base, dtype))
    train(model, 3)
    kind.save(model, folder, base="작은 말", base_hash="abc")
    return kind, logits(model)


def off(left: Tensor, right: Tensor) -> float:
    return (left - right).abs().max().item()


@pytest.mark.parametrize("options", KINDS)
class TestEveryKind:
    def test_only_the_adapter_learns_and_the_base_keeps_its_bits(self, options: Any) -> None:
        base = make_base()
        model = attach(options, base)
        learning = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
        assert learning
        if options.kind == "full":
            return
        before = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in learning}
        train(model, 2)
        changed = [n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])]
        assert changed == []

    def test_training_lowers_the_loss(self, options: Any) -> None:
        model = attach(options, make_base())
        losses = []
        for _ in range(2):
            with torch.no_grad():
                losses.append(model(input_ids=ROWS, attention_mask=ALL, labels=ROWS).loss.item())
            train(model, 8)
        assert losses[1] < losses[0]

    def test_the_same_seed_gives_the_same_adapter_and_leaves_the_random_state_alone(self, options: Any) -> None:
        def states() -> list[Any]:
            return [torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()]

        before = states()
        one = attach(options, make_base(), seed=7)
        assert states() == before
        torch.rand(3)
        two = attach(options, make_base(), seed=7)
        left, right = kind_of(options).parameters(one), kind_of(options).parameters(two)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)

    def test_reloaded_equals_saved(self, options: Any, tmp_path: Path) -> None:
        kind, before = saved(options, tmp_path)
        found = kind_in_folder(tmp_path)
        assert found.name == kind.name
        after = logits(found.load(make_base(), tmp_path, base_hash="abc"))
        tolerance = 2e-6 if getattr(options, "init", "") == "pissa" else 0.0  # PiSSA is written as another, plain LoRA
        assert off(before, after) <= tolerance

    def test_a_loaded_adapter_is_frozen_and_has_the_saved_tensors(self, options: Any, tmp_path: Path) -> None:
        kind, _ = saved(options, tmp_path)
        model = kind.load(make_base(), tmp_path)
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) == 1
        on_disk, now = load_file(files[0]), kind.parameters(model)
        assert now.keys() == on_disk.keys()
        assert all(torch.equal(now[name], on_disk[name]) for name in now)
        assert not any(parameter.requires_grad for parameter in model.parameters())

    def test_nothing_of_the_base_and_no_pickle_is_saved(self, options: Any, tmp_path: Path) -> None:
        saved(options, tmp_path)
        if options.kind != "full":
            assert {path.name for path in tmp_path.iterdir()} <= {
                "adapter_config.json", "adapter_model.safetensors", "adapter.safetensors",
            }  # fmt: skip
            assert "작은 말" in (tmp_path / "adapter_config.json").read_text(encoding="utf-8")
        assert not [path for path in tmp_path.iterdir() if path.suffix in (".bin", ".pt", ".pth")]

    def test_a_cached_answer_equals_one_pass(self, options: Any) -> None:
        model = attach(options, make_base())
        train(model, 2)
        whole = logits(model)
        with torch.no_grad():
            first = model(input_ids=ROWS[:, :6], attention_mask=ALL[:, :6], use_cache=True)
            second = model(
                input_ids=ROWS[:, 6:], attention_mask=ALL, past_key_values=first.past_key_values, use_cache=True
            )
        assert off(torch.cat([first.logits, second.logits], 1), whole) < 2e-6

    def test_a_row_answers_the_same_alone_padded_left_and_padded_right(self, options: Any) -> None:
        model = attach(options, make_base())
        train(model, 2)
        alone = logits(model, ROWS[:1, :8])
        left, right = torch.zeros_like(ROWS), torch.zeros_like(ROWS)
        left[0, 3:], right[0, :8], left[1], right[1] = ROWS[0, :8], ROWS[0, :8], ROWS[1], ROWS[1]
        left_mask, right_mask = (left > 0).long(), (right > 0).long()
        positions = (left_mask.cumsum(-1) - 1).clamp(min=0)
        assert off(logits(model, left, left_mask, position_ids=positions)[:1, 3:], alone) < 2e-6
        assert off(logits(model, right, right_mask)[:1, :8], alone) < 2e-6

    def test_generate_feeds_the_model_what_one_pass_would(self, options: Any) -> None:
        model: Any = attach(options, make_base())
        train(model, 2)
        rows, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ROWS], 1), torch.ones(2, 14, dtype=torch.long)
        mask[:, :3] = 0
        answer = model.generate(
            input_ids=rows, attention_mask=mask, max_new_tokens=3, do_sample=False, eos_token_id=None,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        again = logits(model, answer.sequences[:, 3:])[:, 10:-1]
        assert off(torch.stack(answer.logits, 1), again) < 2e-6

    def test_restored_training_goes_on_bit_for_bit(self, options: Any) -> None:
        kind = kind_of(options)
        one = attach(options, make_base())
        optimizer = train(one, 2)
        state = {name: tensor.clone() for name, tensor in kind.state(one).items()}
        moments = {k: {n: t.clone() for n, t in v.items()} for k, v in optimizer.state_dict()["state"].items()}
        torch.manual_seed(3)
        train(one, 2, optimizer)
        two = attach(options, make_base())
        kind.restore(two, state)
        resumed = torch.optim.AdamW([p for p in two.parameters() if p.requires_grad], 1e-2)
        resumed.load_state_dict(resumed.state_dict() | {"state": moments})
        torch.manual_seed(3)
        train(two, 2, resumed)
        left, right = kind.state(one), kind.state(two)
        assert all(torch.equal(left[name], right[name]) for name in left)

    def test_detached_the_base_is_what_it_was_or_the_kind_says_it_cannot(self, options: Any) -> None:
        before = logits(make_base())
        model = attach(options, make_base())
        train(model, 1)
        try:
            base = kind_of(options).detach(model)
        except AdapterError:
            return
        assert off(logits(base), before) <= (0.0 if options.kind in ("lora", "prefix", "reft", "embedding") else 2e-6)

    def test_merged_equals_unmerged_or_is_refused_with_the_reason(self, options: Any) -> None:
        kind, model = kind_of(options), attach(options, make_base())
        train(model, 3)
        before = logits(model)
        if not kind.mergeable:
            with pytest.raises(AdapterError, match=f"kind {kind.name} cannot be merged: "):
                kind.merge(model)
            return
        assert off(logits(kind.merge(model)), before) < 1e-5

    def test_bf16_bases_reload_what_was_saved(self, options: Any, tmp_path: Path) -> None:
        if getattr(options, "init", "") == "pissa":
            with pytest.raises(AdapterError, match="pissa needs a base in float32"):
                attach(options, make_base(dtype=torch.bfloat16))
            return
        kind, before = saved(options, tmp_path, dtype=torch.bfloat16)
        assert off(before, logits(kind.load(make_base(dtype=torch.bfloat16), tmp_path))) == 0

    def test_another_base_is_refused(self, options: Any, tmp_path: Path) -> None:
        kind, _ = saved(options, tmp_path)
        with pytest.raises(AdapterError, match=r"[Ll]oad the base it was trained on"):
            kind.load(make_base(hidden_size=48, num_attention_heads=6, vocab_size=90), tmp_path)
        if options.kind != "full":
            with pytest.raises(AdapterError, match="made for another base"):
                kind.load(make_base(), tmp_path, base_hash="abd")

    def test_damage_is_refused(self, options: Any, tmp_path: Path) -> None:
        kind, _ = saved(options, tmp_path)
        file = next(iter(sorted(tmp_path.glob("*.safetensors"))))
        whole, tensors = file.read_bytes(), load_file(file)
        file.write_bytes(whole[: len(whole) - 9])
        with pytest.raises(AdapterError, match="truncated or damaged"):
            kind.load(make_base(), tmp_path)
        name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
        tensors[name].view(-1)[0] = float("nan")
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(AdapterError, match="not finite"):
            kind.load(make_base(), tmp_path)
        file.unlink()
        (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(AdapterError, match="is a pickle"):
            kind.load(make_base(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("base", ["gpt2", "qwen3", "gemma3"])
@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in OURS.items()])
class TestOtherBases:
    def test_reloaded_equals_saved(self, options: Any, base: str, tmp_path: Path) -> None:
        kind, before = saved(options, tmp_path, base)
        after = logits(kind.load(make_base(base), tmp_path))
        assert off(before, after) <= (2e-6 if getattr(options, "init", "") == "pissa" else 0.0)

    def test_a_cached_padded_row_equals_the_row_alone(self, options: Any, base: str) -> None:
        model = attach(options, make_base(base))
        train(model, 2)
        rows = torch.cat([torch.zeros(2, 3, dtype=torch.long), ROWS], 1)
        mask = (rows > 0).long()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            first = model(
                input_ids=rows[:, :8], attention_mask=mask[:, :8], position_ids=positions[:, :8], use_cache=True
            )
            second = model(
                input_ids=rows[:, 8:], attention_mask=mask, position_ids=positions[:, 8:],
                past_key_values=first.past_key_values, use_cache=True,
            )  # fmt: skip
        assert off(second.logits, logits(model)[:, 5:]) < 3e-6

    def test_merged_equals_unmerged(self, options: Any, base: str) -> None:
        kind, model = kind_of(options), attach(options, make_base(base))
        if not kind.mergeable:
            pytest.skip(f"kind {kind.name} cannot be merged")
        train(model, 3)
        before = logits(model)
        assert off(logits(kind.merge(model)), before) < 1e-5


def test_the_kinds_under_test_are_all_there_are() -> None:
    assert {options.kind for options in [*OURS.values(), *OTHERS.values()]} == PEFT_KINDS | {
        "lora", "prefix", "reft", "embedding", "full",
    }  # fmt: skip
