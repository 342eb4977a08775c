"""Whatever kinds, ranks, owners, row counts and paddings are drawn: each row equals plain PEFT with its adapter."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stacked_world import OPTIONS, World, make_base, off, padded, save_random, some_rows, worn
from toolkit.recipe.model import Embedding, Lora, Prefix, Reft
from toolkit.stack.stack import Gates, Stack

TOLERANCE = 4e-6


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@pytest.fixture(scope="module")
def other_worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, World]:
    return {base: World(tmp_path_factory.mktemp(base) / "adapters", base) for base in ("gpt2", "qwen3", "neox")}


@st.composite
def batches(draw: Any) -> dict[str, Any]:
    """Some adapters in some order, rows that they own, lengths, where padding stands, where the prefill is cut."""
    names = draw(st.lists(st.sampled_from(sorted(OPTIONS)), unique=True, min_size=1, max_size=6))
    n_rows = draw(st.integers(1, 7))
    owners = draw(st.lists(st.sampled_from([None, *names]), min_size=n_rows, max_size=n_rows))
    if draw(st.booleans()):
        owners = sorted(owners, key=str)
    lengths = draw(st.lists(st.integers(1, 12), min_size=n_rows, max_size=n_rows))
    width = max(lengths) + draw(st.integers(0, 3))
    return {
        "names": names,
        "owners": owners,
        "lengths": lengths,
        "width": width,
        "side": draw(st.sampled_from(["left", "right"])),
        "cut": draw(st.integers(0, width - 1)),
        "seed": draw(st.integers(0, 9)),
        "removed": draw(st.sampled_from([None, *(name for name in OPTIONS if name not in names)])),
        "rows_apart": draw(st.booleans()),
    }


def check(world: World, batch: dict[str, Any]) -> None:
    rows = some_rows(len(batch["owners"]), 12, batch["seed"])
    texts = [row[:length] for row, length in zip(rows, batch["lengths"], strict=True)]
    ids, mask = padded(texts, batch["side"], batch["width"])
    stack = world.stack([], rows_apart=batch["rows_apart"])
    if batch["removed"] is not None:
        stack.add(batch["removed"], world.folders[batch["removed"]])
    for name in batch["names"]:
        stack.add(name, world.folders[name])
    if batch["removed"] is not None:
        stack.remove(batch["removed"])
    owner, cut = stack.owners(batch["owners"]), batch["cut"]
    with torch.no_grad():
        if cut == 0:
            logits = stack(ids, owner, attention_mask=mask).logits
        else:
            first = stack(ids[:, :cut], owner, attention_mask=mask[:, :cut], use_cache=True)
            second = stack(ids[:, cut:], owner, attention_mask=mask, past_key_values=first.past_key_values)
            logits = torch.cat([first.logits, second.logits], 1)
    for index, (name, text) in enumerate(zip(batch["owners"], texts, strict=True)):
        assert off(logits[index][mask[index].bool()], world.alone(name, text)) < TOLERANCE, (name, batch)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(batch=batches())
def test_every_row_equals_its_adapter_alone(world: World, batch: dict[str, Any]) -> None:
    check(world, batch)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(batch=batches())
def test_every_row_equals_its_adapter_alone_in_many_more_batches(world: World, batch: dict[str, Any]) -> None:
    check(world, batch)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(batch=batches(), base=st.sampled_from(["gpt2", "qwen3", "neox"]))
def test_every_row_equals_its_adapter_alone_on_other_bases(
    other_worlds: dict[str, World], batch: dict[str, Any], base: str
) -> None:
    check(other_worlds[base], batch)


ANY_OPTIONS = st.one_of(
    st.builds(
        Lora,
        rank=st.integers(1, 12),
        alpha=st.one_of(st.just("2x"), st.integers(1, 20)),
        rank_stabilised=st.booleans(),
        targets=st.sampled_from(["all-linear", ("q_proj",), ("down_proj", "v_proj")]),
    ),
    st.builds(Prefix, tokens=st.integers(1, 9)),
    st.builds(Reft, rank=st.integers(1, 6), layers=st.sampled_from(["all", (0,), (1,)])),
    st.just(Embedding()),
)


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(options=st.lists(ANY_OPTIONS, min_size=1, max_size=4), order=st.permutations(range(5)))
def test_adapters_of_any_kind_and_rank_stand_side_by_side(options: list[Any], order: list[int]) -> None:
    with tempfile.TemporaryDirectory() as root:
        stack, rows = Stack(make_base()), some_rows(5)
        folders = [save_random(one, make_base(), Path(root) / str(n), n) for n, one in enumerate(options)]
        for folder in folders:
            stack.add(folder.name, folder)
        owner = [(n % (len(options) + 1)) - 1 for n in order]
        with torch.no_grad():
            logits = stack(rows, owner).logits
            for index, slot in enumerate(owner):
                row = rows[index : index + 1]
                model = make_base() if slot < 0 else worn(folders[slot], make_base())
                alone = model(input_ids=row, attention_mask=torch.ones_like(row)).logits[0]
                assert off(logits[index], alone) < TOLERANCE * max(1.0, alone.abs().max().item())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    names=st.lists(st.sampled_from(["lora", "lora-7", "lora-alpha", "reft", "reft-5"]), unique=True, min_size=1),
    chosen=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    seed=st.integers(0, 9),
)
def test_gates_with_one_weight_of_1_equal_that_adapter(
    world: World, names: list[str], chosen: list[int], seed: int
) -> None:
    rows, picks = some_rows(len(chosen), 9, seed), [one % len(names) for one in chosen]
    weights = torch.zeros(len(rows), 9, len(names))
    for row, pick in enumerate(picks):
        weights[row, :, pick] = 1
    with torch.no_grad():
        logits = world.stack(names)(rows, [-1] * len(rows), gates=Gates(tuple(names), weights)).logits
    for row, pick in enumerate(picks):
        assert off(logits[row], world.alone(names[pick], rows[row])) < TOLERANCE


def test_the_drawn_kinds_are_all_that_a_stack_holds(tmp_path: Path) -> None:
    from toolkit.stack.adapter import KINDS

    assert {options.kind for options in OPTIONS.values()} == set(KINDS)
