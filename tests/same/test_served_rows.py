"""What the server's engine writes for a request is what it writes alone, and what transformers writes with plain PEFT.

Rows of every kind of adapter and of the base in one batch, of different lengths, joining and leaving between steps.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, MistralConfig

from serve.engines.slots import Slots, unfit
from tests.stacked_world import SIZES, Worlds, make_base, off, some_rows, worlds_of, worn
from toolkit.sampling import Sampling
from toolkit.writing import Writing, next_tokens

KINDS = ("lora", "lora-7", "prefix", "prefix-2", "reft", "embedding")
EVERY: list[str | None] = [None, *KINDS]
TOLERANCE = 1e-5
WINDOWS = {
    "gemma3-window-8": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "mistral-window-8": lambda: MistralConfig(**SIZES, sliding_window=8),
}
OTHERS = ("qwen3", "gemma3", "gpt2", *WINDOWS)
FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]


class Letters:
    """A tokenizer as far as writing needs one: token n is a letter."""

    all_special_ids = (0, 1, 2)

    def decode(self, ids: list[int], **options: Any) -> str:
        del options
        return "".join(chr(0xAC00 + one) for one in ids)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worlds]:
    yield from worlds_of(WINDOWS, tmp_path_factory)


def requests() -> list[tuple[str | None, list[int], Sampling]]:
    """Two for each adapter and the base, of many lengths, greedy and warm."""
    ids = some_rows(2 * len(EVERY), 30).tolist()
    made = []
    for index, name in enumerate([*EVERY, *EVERY]):
        warm = Sampling(temperature=0.0 if index < len(EVERY) else 1.1, top_p=0.95, max_tokens=14, seed=index)
        made.append((name, ids[index][: 3 + 5 * index % 26], warm))
    return made


@torch.inference_mode()
def write(slots: Slots, asked: list[tuple[str | None, list[int], Sampling]], pace: int, chunk: int) -> list[list[int]]:
    """Answer requests, a new one joining every `pace` steps, prompts read in chunks; the tokens of each."""
    coming, answers = list(enumerate(asked)), {}
    rows: list[dict[str, Any]] = []
    for n_steps in itertools.count():
        if coming and n_steps % pace == 0:
            number, (name, prompt, sampling) = coming.pop(0)
            writing = Writing(Letters(), prompt, sampling, sampling.max_tokens, frozenset())
            rows.append({"number": number, "left": list(prompt), "writing": writing, "seat": slots.open(name)})
        for is_reading in (False, True):
            group = sorted((r for r in rows if bool(r["left"]) is is_reading), key=lambda r: r["seat"].slot)
            if not group:
                continue
            ids = [r["left"][:chunk] if is_reading else r["writing"].ids[-1:] for r in group]
            logits = slots.forward([r["seat"] for r in group], ids)
            for r, own in zip(group, ids, strict=True):
                r["left"] = r["left"][len(own) :] if is_reading else []
            ready = [place for place, r in enumerate(group) if not r["left"]]
            if not ready:
                continue
            tokens = next_tokens(logits[ready], [group[place]["writing"] for place in ready])
            for place, token in zip(ready, tokens, strict=True):
                row = group[place]
                slots.settle(row["seat"])
                row["writing"].take(token)
                if row["writing"].finish:
                    slots.close(row["seat"])
                    rows.remove(row)
                    answers[row["number"]] = row["writing"].ids
        if not rows and not coming:
            break
    return [answers[number] for number in range(len(asked))]


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_a_request_gets_the_same_tokens_alone_and_in_a_full_mixed_batch(self, family: str, worlds: Any) -> None:
        stack = worlds(family).stack(KINDS)
        asked = requests()
        alone = [write(Slots(stack), [one], 1, 64)[0] for one in asked]
        slots = Slots(stack)
        assert write(slots, asked, pace=1, chunk=7) == alone and len(slots) == 0
        assert write(slots, asked[::-1], pace=3, chunk=4)[::-1] == alone
        assert len({tuple(ids) for ids in alone}) > len(asked) // 2

    def test_greedy_equals_transformers_with_plain_peft(self, family: str, worlds: Any) -> None:
        world = worlds(family)
        asked = [(name, prompt, Sampling(temperature=0.0, max_tokens=14)) for name, prompt, _ in requests()]
        written = write(Slots(world.stack(KINDS)), asked, pace=2, chunk=5)
        for (name, prompt, _), ids in zip(asked, written, strict=True):
            base = make_base(family)
            model = base if name is None else worn(world.folders[name], base)
            row = torch.tensor([prompt])
            base.generation_config.eos_token_id = None
            whole = model.generate(
                input_ids=row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=14, pad_token_id=0
            )
            assert whole[0, len(prompt) :].tolist() == ids, name

    def test_logits_in_the_batch_are_those_of_plain_peft(self, family: str, worlds: Any) -> None:
        world, rows = worlds(family), some_rows(len(EVERY), 40)
        slots = Slots(world.stack(KINDS))
        seats = [slots.open(name) for name in EVERY]
        lengths = [20 + 3 * index for index in range(len(EVERY))]
        parts: list[list[torch.Tensor]] = [[] for _ in EVERY]
        for index, seat in enumerate(seats):
            slots.forward([seat], [rows[index, : lengths[index] - 8].tolist()])
        for step in range(8):
            ids = [[int(rows[index, length - 8 + step])] for index, length in enumerate(lengths)]
            for part, logits_V in zip(parts, slots.forward(seats, ids), strict=True):
                part.append(logits_V)
        for index, name in enumerate(EVERY):
            alone = world.alone(name, rows[index, : lengths[index]])[-8:]
            assert off(torch.stack(parts[index]), alone) < TOLERANCE, name

    def test_the_base_is_found_fit_for_slots(self, family: str, worlds: Any) -> None:
        assert unfit(worlds(family).stack([])) is None


def test_a_row_that_is_no_number_reaches_nobody(worlds: Any, tmp_path: Path) -> None:
    """Neither its neighbours nor whoever takes its slot after it."""
    del tmp_path
    stack = worlds("llama").stack(("lora", "lora-7"))
    for table in stack.loras.tables.values():
        table.dense[stack.place("lora-7")] = float("inf")
    slots, row = Slots(stack), some_rows(1, 9)[0].tolist()
    good, bad = slots.open("lora"), slots.open("lora-7")
    for seat in (good, bad):
        slots.forward([seat], [row])
    beside = slots.forward([good, bad], [[7], [7]])
    writings = [Writing(Letters(), row, Sampling(temperature=0.0), 5, frozenset()) for _ in range(2)]
    assert next_tokens(beside, writings)[1] is None and next_tokens(beside, writings)[0] is not None
    slots.close(bad)
    after = slots.open("lora")
    assert after.slot == 1
    slots.forward([after], [row[:3]])
    both = slots.forward([good, after], [[8], [row[3]]])
    alone = worlds("llama").alone("lora", torch.tensor(row[:4]))
    assert off(both[1], alone[-1]) < TOLERANCE
