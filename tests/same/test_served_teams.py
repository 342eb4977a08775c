"""Several adapters that answer as one in the server say what toolkit.combine says with them, whoever is beside them;
and what was read before changes no answer.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from serve.engines.contract import Ask, Mix, One, Vote
from tests.combined_world import words
from tests.gated_world import EXPERTS, shaken, some_gate
from tests.served_world import all_said, ask, combined, engine, gated_model, models_of, watch
from tests.stacked_world import Worlds, some_rows
from toolkit.combine.gate import gated
from toolkit.combine.mix import Mix as OfStack
from toolkit.combine.mix import Over
from toolkit.combine.speaker import Spec
from toolkit.combine.vote import VoteOfAnswers
from toolkit.generate import Sampling, generate

KINDS = ("lora", "lora-7", "prefix", "prefix-2", "reft", "embedding")
FAMILIES = ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "gemma3", "gpt2"))]
MIXES: list[tuple[dict[str, float], Over]] = [
    ({"lora": 0.5, "prefix-2": 0.3, "reft": 0.2}, "logprob"),
    ({"lora": 0.5, "prefix-2": 0.3, "reft": 0.2}, "prob"),
    ({"lora": 1.7, "base": -0.7}, "logprob"),
    ({"embedding": 3.0, "prefix": 0.0, "lora-7": 1.0}, "prob"),
    ({"prefix": 2.0}, "logprob"),
]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory)


def samplings(seed: int) -> list[Sampling]:
    """Greedy, warm, and warm with everything a request may ask for."""
    return [
        Sampling(temperature=0.0, max_tokens=9),
        Sampling(temperature=1.2, top_p=0.95, max_tokens=9, seed=seed),
        Sampling(
            temperature=1.0, top_k=40, min_p=0.01, repetition_penalty=1.2, presence_penalty=0.4, max_tokens=9,
            frequency_penalty=0.3, logit_bias={30: 2.0, 31: -100.0}, seed=seed,
        ),
    ]  # fmt: skip


def prompts() -> list[list[int]]:
    rows = some_rows(6, 30).tolist()
    return [row[: 3 + 5 * place] for place, row in enumerate(rows)]


def crowd() -> list[Ask]:
    """Requests of every adapter and the base, to stand beside others."""
    names, rows = ["base", *KINDS], some_rows(len(KINDS) + 1, 25).tolist()
    warm = Sampling(temperature=1.0, max_tokens=14, seed=5)
    return [ask(name, rows[place][: 4 + 3 * place], warm) for place, name in enumerate(names)]


def plain(names: Sequence[str]) -> list[str | None]:
    return [None if name == "base" else name for name in names]


@pytest.mark.parametrize("family", FAMILIES)
class TestEveryFamily:
    def test_a_mixture_is_the_toolkits_own_token_for_token(self, family: str, worlds: Any) -> None:
        stack = worlds(family).stack(KINDS)
        asks, wanted = [], []
        for place, (weights, over) in enumerate(MIXES):
            for sampling in samplings(place):
                prompt = prompts()[place]
                asks.append(ask(Mix(tuple(weights.items()), over), prompt, sampling))
                mix = OfStack.of(plain(list(weights)), list(weights.values()), over)
                wanted.append(mix.answer(stack, words(), [prompt], sampling)[0])
        with engine(models_of(stack), n_slots=12) as served:
            found = all_said(served, [*crowd(), *asks])[len(crowd()) :]
        assert [answer.ids for answer in found] == [answer.ids for answer in wanted]
        assert [answer.text for answer in found] == [answer.text for answer in wanted]
        assert len({answer.ids for answer in found}) > len(found) // 2

    def test_a_vote_is_that_of_whole_answers(self, family: str, worlds: Any) -> None:
        stack = worlds(family).stack(KINDS)
        asks, wanted = [], []
        for place, names in enumerate([("lora", "prefix", "reft"), ("base", "lora-7"), ("embedding",)]):
            for sampling in samplings(place):
                prompt = prompts()[place]
                asks.append(ask(Vote(names), prompt, replace(sampling, max_tokens=3)))
                vote = VoteOfAnswers.of(plain(names))
                wanted.append(vote.answer(stack, words(), [prompt], replace(sampling, max_tokens=3))[0])
        models = models_of(stack)
        trio = ("lora", "prefix", "reft")
        for heavy in trio:  # the one whose own words win, with the noise that is its own
            weights = {name: 0.6 if name == heavy else 0.2 for name in trio}
            models[f"for {heavy}"] = combined(models, f"for {heavy}", Spec("vote", "hard", trio, weights))
            for sampling in samplings(7):
                asks.append(ask(f"for {heavy}", prompts()[3], sampling))
                wanted.append(VoteOfAnswers.of(trio, weights).answer(stack, words(), [prompts()[3]], sampling)[0])
        with engine(models, n_slots=12) as served:
            found = all_said(served, [*crowd(), *asks])[len(crowd()) :]
        assert [(answer.ids, answer.text) for answer in found] == [(answer.ids, answer.text) for answer in wanted]

    def test_a_gate_answers_in_a_mixed_batch_as_it_does_alone(self, family: str, worlds: Any) -> None:
        stack = worlds(family).stack(KINDS)
        gates = {"gate": some_gate(stack, EXPERTS), "other": shaken(some_gate(stack, EXPERTS[:2], per="layer"), 9)}
        asks, wanted = [], []
        for name, gate in gates.items():
            for prompt, sampling in zip(prompts(), samplings(1), strict=False):
                asks.append(ask(name, prompt, sampling))
                with gated(stack, gate) as opened:
                    wanted.append(generate(opened, words(), [prompt], sampling)[0].ids)
        models = models_of(stack)
        models |= {name: gated_model(models, name, gate) for name, gate in gates.items()}
        with engine(models, n_slots=12) as served:
            found = all_said(served, [*crowd(), *asks])[len(crowd()) :]
        assert [answer.ids for answer in found] == wanted and len(set(wanted)) > 3

    def test_what_was_read_before_changes_no_answer(self, family: str, worlds: Any) -> None:
        stack = worlds(family).stack(KINDS)
        models = models_of(stack)
        models["gate"] = gated_model(models, "gate", some_gate(stack))
        who = [*map(One, ["base", *KINDS, "gate"]), Mix((("lora", 1.0), ("prefix-2", 1.0))), Vote(("reft", "base"))]
        row = some_rows(1, 60)[0].tolist()
        talk = [ask(one, row[:length], samplings(3)[1]) for length in (33, 34, 45, 45, 48) for one in who]
        talk += [ask(one, [*row[:38], *row[:9]]) for one in who]
        with engine(models, cache_mb=0) as without, engine(models, cache_mb=64) as served:
            wanted = [all_said(without, [one])[0].ids for one in talk]
            found = [all_said(served, [one])[0].ids for one in talk]
            assert without.load().n_reused == 0 and served.load().n_reused > 0.6 * served.load().n_prompt
        assert found == wanted


def test_a_mixture_reads_and_writes_in_the_same_passes_as_everybody_else(worlds: Any) -> None:
    """Its members are rows of the one batch, not a batch of their own."""
    models = models_of(worlds("llama").stack(KINDS))
    with engine(models, n_slots=12) as served:
        passes = watch(served._slots, "forward")
        mixture = ask(Mix((("lora", 1.0), ("reft", 1.0), ("base", 1.0))), prompts()[2], Sampling(max_tokens=20, seed=1))
        all_said(served, [mixture, *crowd()])
        widths = [len(seats) for seats, ids, _ in passes if max(map(len, ids)) == 1]
    assert max(widths) == 3 + len(crowd())
