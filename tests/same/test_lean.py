"""The forward pass written by hand gives the logits of the base's own modules, whoever is in the batch."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from serve.engines.forward import LEAN, MODULES
from serve.engines.fusing import joined
from serve.engines.slots import Seat, Slots
from serve.engines.threads import Team, Wakes
from tests.gated_world import EXPERTS, some_gate
from tests.served_world import watch
from tests.stacked_world import SIZES, Worlds, make_base, off, some_rows, worlds_of
from toolkit.combine.gate import Gate
from toolkit.combine.gate_start import arrow_gate
from toolkit.errors import BaseError
from toolkit.stack.stack import Stack

KINDS = ("lora", "lora-7", "prefix", "prefix-2", "reft", "reft-5", "embedding")
EVERY: list[str | None] = [None, *KINDS]
TOLERANCE = 1e-5
WINDOW: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
OWN: dict[str, Any] = {"tie_word_embeddings": False, "num_key_value_heads": 4}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-biases": lambda: LlamaConfig(**{**SIZES, **OWN}, attention_bias=True, mlp_bias=True, head_dim=16),
    "llama-scaled": lambda: LlamaConfig(
        **SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=8),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=None, head_dim=12),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, **WINDOW),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
    "qwen3-window": lambda: Qwen3Config(**{**SIZES, **OWN}, use_sliding_window=True, head_dim=8, **WINDOW),
}
OFTEN = ("llama", "mistral-window", "qwen2", "qwen3-window")
NAMES = [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    yield from worlds_of(FAMILIES, tmp_path_factory)


class Both:
    """The same rows in slots of their own, read by the modules and by hand."""

    def __init__(self, stack: Stack) -> None:
        self.slots = [Slots(stack, MODULES), Slots(stack, LEAN)]
        self.seats: list[list[Seat]] = []

    def open(self, name: str | None, gate: Gate | None = None) -> int:
        """The number of a new row."""
        self.seats.append([slots.open(name, gate) for slots in self.slots])
        return len(self.seats) - 1

    @torch.inference_mode()
    def differ(self, rows: list[int], ids: list[list[int]]) -> float:
        """How far the two are apart after these tokens."""
        found: list[Tensor] = []
        for number, slots in enumerate(self.slots):
            found.append(slots.forward([self.seats[row][number] for row in rows], ids))
        return off(found[0], found[1])


@pytest.mark.parametrize("family", NAMES)
class TestEveryFamily:
    def test_rows_of_every_kind_alone_and_together(self, family: str, worlds: Any) -> None:
        """Chunks of unequal lengths, then tokens one by one, with rows that lie side by side and rows that do not."""
        stack = worlds(family).stack(KINDS)
        both, ids = Both(stack), some_rows(len(EVERY), 40).tolist()
        rows = [both.open(name) for name in EVERY]
        for row in rows:
            assert both.differ([row], [ids[row][: 3 + row]]) < TOLERANCE, EVERY[row]
        assert both.differ(rows, [ids[row][3 + row : 8 + 2 * row] for row in rows]) < TOLERANCE
        assert both.differ(rows[::2], [ids[row][20:31] for row in rows[::2]]) < TOLERANCE
        for step in range(31, 38):
            assert both.differ(rows, [[ids[row][step]] for row in rows]) < TOLERANCE
        assert both.differ(rows[1::3], [[ids[row][38]] for row in rows[1::3]]) < TOLERANCE
        assert both.differ(rows[:1], [[7]]) < TOLERANCE

    def test_rows_of_few_adapters_in_any_order(self, family: str, worlds: Any) -> None:
        """Owners that repeat are brought together, or cut into groups, or kept one by one."""
        stack = worlds(family).stack(KINDS)
        one, other = "lora", "lora-7"
        for order in ([one, one, other, other], [one, other] * 3, [one] * 4, [one, other], [one, None, None, other]):
            both = Both(stack)
            rows = [both.open(name) for name in order]
            ids = some_rows(len(rows), 12).tolist()
            assert both.differ(rows, [own[:6] for own in ids]) < TOLERANCE
            for step in range(6, 9):
                assert both.differ(rows, [[own[step]] for own in ids]) < TOLERANCE

    @pytest.mark.parametrize("kind", ["layer", "model", "arrow"])
    def test_a_gate_weighs_every_token(self, family: str, worlds: Any, kind: str) -> None:
        stack = worlds(family).stack(KINDS)
        gate = arrow_gate(stack, ("lora", "lora-7")) if kind == "arrow" else some_gate(stack, EXPERTS, per=kind)
        both, ids = Both(stack), some_rows(3, 20).tolist()
        rows = [both.open(None, gate) for _ in ids]
        assert both.differ(rows, [own[: 4 + 2 * place] for place, own in enumerate(ids)]) < TOLERANCE
        for step in range(8, 12):
            assert both.differ(rows, [[own[step]] for own in ids]) < TOLERANCE

    def test_it_is_what_serves_this_family(self, family: str, worlds: Any) -> None:
        slots = Slots(worlds(family).stack([]))
        assert slots.forward_name == LEAN and slots.computes == "the lean forward pass, cpu, float32"
        assert len(slots) == 0 and slots.cache.n_bytes == 0


@pytest.mark.parametrize("forward", [MODULES, LEAN])
@pytest.mark.parametrize("counts", [(3, 5, 5, 2), (4, 4, 4, 4), (1, 1, 1, 1)], ids=str)
def test_rows_that_are_not_asked_about_change_nothing(forward: str, counts: tuple[int, ...], worlds: Any) -> None:
    """Who is asked about has the same logits, and all rows go on as if everybody had been asked about."""
    slots, names = Slots(worlds("qwen2").stack(KINDS), forward), ("lora", None, "prefix", "reft")
    pieces = [row[:count] for row, count in zip(some_rows(4, 9).tolist(), counts, strict=True)]
    for asked in ([True, False, True, False], [True, False, False, False], [False] * 4):
        found = []
        for said in (None, asked):
            with torch.inference_mode():
                seats = [slots.open(name) for name in names]
                made = slots.forward(seats, pieces, said)
                found.append((made, slots.forward(seats, [[7]] * 4)))
                slots.reset()
        (every_RV, after_RV), (some_AV, again_RV) = found
        assert some_AV.shape == (sum(asked), 96) and torch.equal(after_RV, again_RV)
        assert off(some_AV, every_RV[asked]) < TOLERANCE if any(asked) else not some_AV.numel()


def test_the_head_sees_the_last_tokens_of_those_who_are_asked_about(worlds: Any) -> None:
    slots = Slots(worlds("llama").stack(KINDS), LEAN)
    lean: Any = slots._forward
    heads, downs = watch(lean, "_head"), watch(lean, "_attended")
    lean._head.widths = lean._head.inner.widths
    with torch.inference_mode():
        seats = [slots.open(name) for name in ("lora", None, "reft")]
        slots.forward(seats, [[5, 6, 7], [8, 9], [9]], [False, True, True])
        slots.forward(seats, [[5, 6], [8, 9], [9]], [False] * 3)
    assert [tuple(x.shape[:2]) for (x,) in heads] == [(2, 1)]
    assert len(downs) == 3  # both layers, then the first alone


@pytest.mark.parametrize("packed_mb", [0, 4096])
def test_a_large_base_is_served_by_its_own_weights(
    packed_mb: int, monkeypatch: pytest.MonkeyPatch, worlds: Any
) -> None:
    """They lie in memory a second time only where there is room for it."""
    monkeypatch.setattr("serve.engines.lean.MOST_PACKED_MB", packed_mb)
    both, ids = Both(worlds("qwen2").stack(KINDS)), some_rows(len(EVERY), 12).tolist()
    packed = [layer.down.packed for layer in both.slots[1]._forward._layers]  # type: ignore[attr-defined]
    assert [one is None for one in packed] == [packed_mb == 0] * 2
    rows = [both.open(name) for name in EVERY]
    assert both.differ(rows, [own[:9] for own in ids]) < TOLERANCE
    assert both.differ(rows, [own[9:10] for own in ids]) < TOLERANCE


def test_packed_layers_give_a_row_the_same_bits_whoever_is_beside_it() -> None:
    noise = torch.Generator().manual_seed(3)
    for n_in, n_out, has_bias in ((32, 64, True), (200, 48, False), (256, 1536, False), (704, 256, True)):
        linear = nn.Linear(n_in, n_out, bias=has_bias)
        one = joined([linear], ["it"]).pack()
        x = torch.randn(70, 1, n_in, generator=noise)
        with torch.inference_mode():
            assert off(one(x), linear(x)) < TOLERANCE
            for count in (1, 2, 3, 5, 8, 13, 32, 33, 70):
                assert torch.equal(one(x[:count])[0], one(x)[0]), count


@pytest.mark.parametrize("count", [1, 8, 32])
def test_packed_layers_give_the_same_bits_on_any_number_of_threads(count: int, several_threads: None) -> None:
    linear = nn.Linear(256, 1536)
    one, x = joined([linear], ["it"]).pack(), torch.randn(count, 1, 256)
    with torch.inference_mode():
        with Team().one():
            alone = one(x)
        assert torch.equal(one(x), alone)


def test_whatever_wakes_the_threads_a_row_has_the_same_logits(worlds: Any, several_threads: None) -> None:
    both, ids = Both(worlds("llama").stack(KINDS)), some_rows(len(EVERY), 16).tolist()
    lean: Any = both.slots[1]._forward
    rows = [both.open(name) for name in EVERY]
    assert both.differ(rows, [own[:9] for own in ids]) < TOLERANCE
    for place, wakes in enumerate(Wakes, start=9):
        lean.tried.update({1: Wakes.EVERYTHING, 8: wakes, 32: wakes})
        with both.slots[1].few_threads():
            assert both.differ(rows, [own[place : place + 1] for own in ids]) < TOLERANCE
        assert torch.get_num_threads() == 2


def test_a_base_keeps_its_parameters_as_they_were(tmp_path: Path) -> None:
    before, base = make_base(), make_base()
    slots = [Slots(Stack(base), LEAN) for _ in range(2)]
    weights = dict(base.named_parameters())
    for name, parameter in before.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in weights.values()}
    assert sum(storages.values()) == sum(one.nbytes for one in before.parameters())
    for one in slots:
        layers = one._forward._layers  # type: ignore[attr-defined]
        places = {part.weight.untyped_storage().data_ptr() for layer in layers for part in (layer.qkv, layer.gate_up)}
        assert places <= storages.keys() and len(places) == 4
    base.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, weights[name]), name


def changed(base: Any, how: str) -> None:
    """Make a base something else than its family's code makes."""
    if how == "a module of its own":
        base.model.layers[1].mlp.up_proj = type("Wider", (nn.Linear,), {})(32, 64, bias=False)
    elif how == "a forward of its own":
        base.model.layers[0].self_attn.forward = lambda *given, **named: None
    elif how == "half precision":
        base.half()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("a module of its own", "model.layers.1.mlp.up_proj is a Wider"),
        ("a forward of its own", "forward pass of model.layers.0.self_attn was replaced"),
        ("half precision", "lies on cpu in float16"),
    ],
)
def test_a_base_that_is_something_else_is_refused_by_name(how: str, says: str) -> None:
    base = make_base()
    changed(base, how)
    with pytest.raises(BaseError, match=says):
        Slots(Stack(base), LEAN)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "moe"])
def test_other_families_go_through_their_modules(family: str) -> None:
    stack = Stack(make_base(family))
    assert Slots(stack).forward_name == MODULES and Slots(stack).computes.startswith("transformers' modules")
    with pytest.raises(BaseError, match="is none of Llama, Mistral, Qwen2, Qwen3"):
        Slots(stack, LEAN)


def test_a_base_that_comes_out_otherwise_goes_through_its_modules(caplog: pytest.LogCaptureFixture) -> None:
    base = make_base()
    base.model.layers[1].self_attn.scaling *= 1.5  # what the family's code would not make of this config
    assert Slots(Stack(base)).forward_name == MODULES
    assert "the lean forward pass differs" in caplog.text
