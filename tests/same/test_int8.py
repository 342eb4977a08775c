"""In eight bits a row has the same bits alone and in any company, however its text was cut, and near the right ones."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from serve.engines import int8 as int8_room
from serve.engines.forward import AUTO, LEAN, MODULES
from serve.engines.fusing import joined
from serve.engines.int8 import Int8, needs_7_bits
from serve.engines.slots import Slots
from tests.gated_world import EXPERTS, some_gate
from tests.stacked_world import SIZES, Worlds, make_base, off, some_rows, worlds_of
from toolkit.combine.gate import Gate
from toolkit.combine.gate_start import arrow_gate
from toolkit.errors import BaseError
from toolkit.stack.stack import Stack

KINDS = ("lora", "lora-7", "prefix", "prefix-2", "reft", "reft-5", "embedding")
EVERY: list[str | None] = [None, *KINDS, None]
N_WRITTEN = 7
WINDOW: dict[str, Any] = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
FAMILIES: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, use_sliding_window=True, head_dim=8, **WINDOW),
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    yield from worlds_of(FAMILIES, tmp_path_factory)


def slots_of(worlds: Any, family: str, names: Sequence[str] = KINDS) -> Slots:
    return Slots(worlds(family).stack(names, dtype=torch.float64), int8=True)


@torch.inference_mode()
def alone(slots: Slots, name: str | None, text: Sequence[int], gate: Gate | None = None) -> list[Tensor]:
    """What follows a text and each token after it, the text read at once."""
    seat, n_read = slots.open(name, gate), len(text) - N_WRITTEN
    found = [slots.forward([seat], [text[:n_read]])[0]]
    found += [slots.forward([seat], [[token]])[0] for token in text[n_read:]]
    slots.close(seat)
    return found


@torch.inference_mode()
def together(
    slots: Slots, names: Sequence[Any], texts: Sequence[Sequence[int]], gate: Any = None
) -> list[list[Tensor]]:
    """The same with the texts beside each other, read in pieces of unequal lengths."""
    seats = [slots.open(name, gate) for name in names]
    left = [list(text[:-N_WRITTEN]) for text in texts]
    found: list[list[Tensor]] = [[] for _ in texts]
    while rows := [row for row in range(len(texts)) if left[row]]:
        pieces = [left[row][: 3 + row % 4] for row in rows]
        for row, piece in zip(rows, pieces, strict=True):
            del left[row][: len(piece)]
        read = [row for row in rows if not left[row]]
        logits_AV = slots.forward([seats[row] for row in rows], pieces, [row in read for row in rows])
        for row, logits_V in zip(read, logits_AV, strict=True):
            found[row].append(logits_V)
    for step in range(N_WRITTEN):
        logits_RV = slots.forward(seats, [[text[step - N_WRITTEN]] for text in texts])
        for own, logits_V in zip(found, logits_RV, strict=True):
            own.append(logits_V)
    return found


def texts_of(n_rows: int) -> list[list[int]]:
    return [row[: 12 + 2 * place] for place, row in enumerate(some_rows(n_rows, 40).tolist())]


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_a_row_of_any_kind_has_the_same_bits_whoever_is_beside_it(self, family: str, worlds: Any) -> None:
        slots, texts = slots_of(worlds, family), texts_of(len(EVERY))
        wanted = [alone(slots, name, text) for name, text in zip(EVERY, texts, strict=True)]
        found = together(slots, EVERY, texts)
        for name, one, other in zip(EVERY, wanted, found, strict=True):
            assert len(one) == len(other) == N_WRITTEN + 1, name
            assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True)), name

    @pytest.mark.parametrize("kind", ["layer", "model", "arrow"])
    def test_so_has_a_row_behind_a_gate(self, family: str, worlds: Any, kind: str) -> None:
        slots, texts = slots_of(worlds, family), texts_of(4)
        stack = slots.stack
        gate = arrow_gate(stack, ("lora", "lora-7")) if kind == "arrow" else some_gate(stack, EXPERTS, per=kind)
        wanted = [alone(slots, None, text, gate) for text in texts]
        for one, other in zip(wanted, together(slots, [None] * len(texts), texts, gate), strict=True):
            assert all(torch.equal(left, right) for left, right in zip(one, other, strict=True))

    def test_what_was_read_before_goes_on_with_the_same_bits(self, family: str, worlds: Any) -> None:
        """Keys and values of a text that was written token by token, for a row that is read beside others."""
        slots, text = slots_of(worlds, family), some_rows(1, 30)[0].tolist()
        for name in EVERY[:-1]:
            wanted = alone(slots, name, text)
            with torch.inference_mode():
                first, beside = slots.open(name), slots.open("lora")
                slots.forward([first], [text[:5]])
                for token in text[5:20]:
                    slots.forward([first], [[token]])
                again = slots.open(name)
                slots.recall(again, [slots.copied(first, 0, 17)])
                found = slots.forward([beside, again], [text[:25], text[17:-N_WRITTEN]])[1]
                slots.reset()
            assert torch.equal(found, wanted[0]), name

    def test_it_says_so_and_its_numbers_are_near(self, family: str, worlds: Any) -> None:
        slots, plain = slots_of(worlds, family, ()), Slots(worlds(family).stack(()))
        assert slots.forward_name == LEAN and slots.computes == "the lean forward pass, cpu, int8"
        text = some_rows(1, 20)[0].tolist()
        for rounded, exact in zip(alone(slots, None, text), alone(plain, None, text), strict=True):
            assert 1e-3 < off(rounded, exact) / exact.abs().max().item() < 0.1


def rounded(n_in: int, n_out: int, *, has_7_bits: bool = False) -> tuple[nn.Linear, Int8]:
    torch.manual_seed(3)
    linear = nn.Linear(n_in, n_out, bias=False)
    return linear, Int8(linear.weight, has_7_bits=has_7_bits or needs_7_bits())


@pytest.mark.parametrize("has_7_bits", [False, True])
def test_a_product_has_the_same_bits_whoever_is_beside_it(has_7_bits: bool) -> None:
    for n_in, n_out in ((32, 64), (200, 48), (256, 1536), (704, 256)):
        linear, int8 = rounded(n_in, n_out, has_7_bits=has_7_bits)
        x = torch.randn(70, 1, n_in) * torch.logspace(-6, 6, 70).view(-1, 1, 1)
        with torch.inference_mode():
            made, wanted = int8(x), linear(x)
            share = (made - wanted).norm(dim=-1) / wanted.norm(dim=-1)
            assert share.max() < (0.03 if has_7_bits else 0.02)
            for count in (1, 2, 3, 5, 8, 13, 32, 33, 70):
                assert torch.equal(int8(x[:count])[0], made[0]), count
                assert torch.equal(int8(x[70 - count :])[-1], made[-1]), count


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-38, 3e38])
def test_what_is_no_number_stays_with_its_row(odd: float) -> None:
    _, int8 = rounded(64, 96)
    x = torch.randn(3, 64)
    wanted = int8(x)
    for row in range(3):
        broken = x.clone()
        broken[row] = odd
        made = int8(broken)
        others = [other for other in range(3) if other != row]
        assert torch.equal(made[others], wanted[others])
        if odd == 0.0:
            assert not made[row].any()
        elif not torch.tensor(odd).isfinite():
            assert not made[row].isfinite().any()


def test_a_row_of_one_large_number_is_as_near_as_any() -> None:
    linear, int8 = rounded(64, 96)
    x = torch.zeros(1, 64)
    x[0, 5] = 1000.0
    assert (int8(x) - linear(x)).norm() < 0.01 * linear(x).norm()


def test_a_bias_is_added_in_float32() -> None:
    linear = nn.Linear(64, 48)
    nn.init.constant_(linear.bias, 1e-3)
    one = joined([linear], ["it"]).round(has_7_bits=needs_7_bits())
    with torch.inference_mode():
        assert torch.equal(one(torch.zeros(2, 64)), linear.bias.expand(2, -1))


def test_the_base_keeps_its_own_weights() -> None:
    before, base = make_base(), make_base()
    Slots(Stack(base, dtype=torch.float64), int8=True)
    weights = dict(base.named_parameters())
    assert all(torch.equal(parameter, weights[name]) for name, parameter in before.named_parameters())


@pytest.mark.parametrize(
    ("family", "forward", "says"),
    [("gpt2", AUTO, "is none of Llama"), ("moe", LEAN, "is none of Llama"), ("llama", MODULES, "--forward modules")],
)
def test_what_cannot_be_in_eight_bits_is_refused_by_name(family: str, forward: str, says: str) -> None:
    with pytest.raises(BaseError, match=says) as raised:
        Slots(Stack(make_base(family), dtype=torch.float64), forward, int8=True)
    assert "--cpu-int8" in str(raised.value)


def test_a_base_that_the_lean_forward_pass_gets_wrong_is_refused() -> None:
    base = make_base()
    base.model.layers[1].self_attn.scaling *= 1.5  # what the family's code would not make of this config
    with pytest.raises(BaseError, match="differs from the modules"):
        Slots(Stack(base, dtype=torch.float64), int8=True)


def test_another_device_or_type_is_refused() -> None:
    with pytest.raises(BaseError, match="in float16"):
        Slots(Stack(make_base().half(), dtype=torch.float64), int8=True)
    with pytest.raises(BaseError, match="runs on meta"):
        Slots(Stack(make_base().to("meta"), dtype=torch.float64), int8=True)


def test_a_torch_without_fbgemm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8_room, "ENGINE", "qnnpack-of-old")
    with pytest.raises(BaseError, match="built without"):
        Slots(Stack(make_base(), dtype=torch.float64), int8=True)


def test_adapters_in_float32_are_no_stack_for_it() -> None:
    with pytest.raises(ValueError, match="float64"):
        Slots(Stack(make_base()), int8=True)


def test_weights_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(BaseError, match="not finite"):
        Int8(torch.full((4, 4), float("nan")), has_7_bits=False)
