"""A gate that gives one expert everything equals that expert; a gate is the same with a cache, in chunks, padded."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.combined_world import GREEDY, PROMPTS, adapters, greedy, stacked_logits, words
from tests.gated_world import EXPERTS, at_once, some_gate
from tests.stacked_world import BASES, World, off, padded, some_rows
from toolkit.combine.gate import Gate, gated
from toolkit.combine.gate_start import arrow_gate, constant_gate
from toolkit.combine.merge import merge
from toolkit.generate import Sampling, generate, stream
from toolkit.score import score, supervised_log_likelihoods
from toolkit.stack.stack import Stack

TOLERANCE = 1e-5
GATES = ("layer", "model", "layer-top-1", "model-top-2", "arrow-layer", "arrow-model")
ROWS = [row[:n] for row, n in zip(some_rows(3, 11, seed=8), (11, 4, 7), strict=True)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def made(stack: Stack, name: str) -> Gate:
    if name.startswith("arrow"):
        return arrow_gate(stack, ("lora", "lora-7", "lora-alpha"), per=name.removeprefix("arrow-"))  # type: ignore[arg-type]
    per, _, top_k = name.partition("-top-")
    return some_gate(stack, per=per, top_k=int(top_k) if top_k else None)


def forced(stack: Stack, to: str, per: Any = "model") -> Gate:
    return constant_gate(stack, {name: float(name == to) for name in EXPERTS}, per=per)


# One expert has everything


@pytest.mark.parametrize("base", BASES)
def test_a_gate_forced_to_one_expert_equals_it_in_plain_peft_on_every_base(base: str, tmp_path: Path) -> None:
    world = World(tmp_path / "adapters", base)
    stack, rows = world.stack(EXPERTS), some_rows(2)
    for per in ("layer", "model"):
        for expert in EXPERTS:
            alone = torch.stack([world.alone(expert, row) for row in rows])
            assert off(at_once(stack, forced(stack, expert, per), rows), alone) < TOLERANCE


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_so_it_does_padded_on_either_side(side: str, expert: str, world: World) -> None:
    stack = world.stack()
    ids_BT, mask_BT = padded(ROWS, side, 11)
    logits_BTV = at_once(stack, forced(stack, expert), ids_BT, mask_BT)
    for row, own, mask in zip(ROWS, logits_BTV, mask_BT.bool(), strict=True):
        assert off(own[mask], world.alone(expert, row)) < TOLERANCE


@pytest.mark.parametrize("expert", EXPERTS)
def test_a_forced_gate_answers_what_the_expert_alone_does(expert: str, world: World) -> None:
    stack = world.stack()
    with gated(stack, forced(stack, expert)) as opened:
        answers = generate(opened, words(), PROMPTS, GREEDY)
    alone = [greedy(lambda row: world.alone(expert, row[0])[-1], prompt, GREEDY) for prompt in PROMPTS]
    assert [answer.ids for answer in answers] == alone


def test_constant_weights_are_the_exact_merge(world: World) -> None:
    stack, rows, names = world.stack(), some_rows(3), ("lora", "lora-7", "lora-alpha")
    merged = merge(adapters(world, *names), dict(zip(names, (0.5, 0.3, 0.2), strict=True))).adapter
    for per in ("layer", "model"):
        gate = constant_gate(stack, dict(zip(names, (5, 3, 2), strict=True)), per=per)  # type: ignore[arg-type]
        assert off(at_once(stack, gate, rows), stacked_logits(world, merged, rows)) < TOLERANCE


# With a cache, in chunks, padded


@pytest.mark.parametrize("name", GATES)
def test_chunks_over_a_cache_equal_the_whole(name: str, world: World) -> None:
    stack, rows = world.stack(), some_rows(3)
    gate = made(stack, name)
    whole = at_once(stack, gate, rows)
    with gated(stack, gate) as opened:
        cache, mask = opened.start(3), torch.ones_like(rows)
        for start, end in ((0, 4), (4, 5), (5, 6), (6, 11)):
            kept = torch.ones(3, end - start)
            logits = opened.logits(rows[:, start:end], mask[:, :end], cache, kept).view(3, end - start, -1)
            assert off(logits, whole[:, start:end]) < TOLERANCE


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_neighbours_change_nothing(name: str, side: str, world: World) -> None:
    stack = world.stack()
    gate = made(stack, name)
    ids_BT, mask_BT = padded(ROWS, side, 13)
    logits_BTV = at_once(stack, gate, ids_BT, mask_BT)
    for row, own, mask in zip(ROWS, logits_BTV, mask_BT.bool(), strict=True):
        assert off(own[mask], at_once(stack, gate, row[None])[0]) < TOLERANCE


@pytest.mark.parametrize("name", GATES)
def test_generated_answers_are_those_of_a_loop_without_a_cache(name: str, world: World) -> None:
    stack = world.stack()
    gate = made(stack, name)
    with gated(stack, gate) as opened:
        answers = generate(opened, words(), PROMPTS, GREEDY)
        first = "".join(stream(opened, words(), PROMPTS[0], GREEDY))
    alone = [greedy(lambda row: at_once(stack, gate, row)[0, -1], prompt, GREEDY) for prompt in PROMPTS]
    assert [answer.ids for answer in answers] == alone
    assert first == answers[0].text


def test_prompts_that_end_early_leave_the_others_as_they_are(world: World) -> None:
    stack, sampling = world.stack(), Sampling(temperature=1.0, top_p=1.0, max_tokens=9, seed=2)
    with gated(stack, some_gate(stack)) as opened:
        ends = set(range(3, 40))
        together = generate(opened, words(), PROMPTS, sampling, ends=ends)
        assert len({len(answer.ids) for answer in together}) > 1
        alone = generate(opened, words(), PROMPTS, sampling, ends=ends, batch_tokens=1)
    assert together == alone


@pytest.mark.parametrize("name", GATES)
def test_scores_are_those_of_the_whole_rows(name: str, world: World) -> None:
    stack = world.stack()
    gate = made(stack, name)
    prompt = [9, 40, 17]
    tails = [[12, 30], [55, 8, 77], [41]]
    with gated(stack, gate) as opened:
        shared = score(opened, [(prompt, tail) for tail in tails])
        supervised = supervised_log_likelihoods(opened, [(prompt + tail, [-100] * 3 + tail) for tail in tails])
    for tail, one, other in zip(tails, shared, supervised, strict=True):
        logp = at_once(stack, gate, torch.tensor([prompt + tail]))[0].log_softmax(-1)
        wanted = [float(logp[2 + place, token]) for place, token in enumerate(tail)]
        assert one == pytest.approx(wanted, abs=1e-5) and other == pytest.approx(wanted, abs=1e-5)
