"""What a conversation has said is not read again: counted in tokens that are computed, never in seconds."""

from typing import Any

import pytest

from serve.engines.contract import Ask, Mix, One, Who
from serve.engines.rows import REUSED_SHARE, RowsEngine
from tests.served_world import all_said, ask, engine, models_of, watch
from tests.stacked_world import World, some_rows
from toolkit.corpus.talk import Turn
from toolkit.sampling import Sampling

N_TURNS = 50
SHORT = Sampling(temperature=0.9, max_tokens=6, seed=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def n_computed(served: RowsEngine) -> int:
    load = served.load()
    return load.n_prompt - load.n_reused


@pytest.mark.parametrize("who", [One("lora"), One("prefix"), Mix((("lora", 1.0), ("base", 1.0)))], ids=str)
def test_the_cost_of_turn_50_is_that_of_its_own_new_tokens(world: World, who: Who) -> None:
    n_members = 2 if isinstance(who, Mix) else 1
    costs, prompt = [], some_rows(1, 40)[0].tolist()
    with engine(models_of(world.stack(("lora", "prefix")))) as served:
        passes = watch(served._slots, "forward")
        for turn in range(N_TURNS):
            before = n_computed(served)
            answer = all_said(served, [ask(who, prompt, SHORT)])[0]
            costs.append(n_computed(served) - before)
            prompt = [*prompt, *answer.ids, 2, *some_rows(1, 5, seed=turn)[0].tolist()]
        read = sum(len(row) for _, ids, _ in passes for row in ids if len(row) > 1)
    assert costs[0] == 40 * n_members
    assert max(costs[1:]) <= (1 + 1 + 5) * n_members  # the last token of the answer, its end, and what is new
    assert read <= sum(costs) < len(prompt) * (n_members + 1)


def test_real_words_are_read_once_too(bare: Any) -> None:
    """Where the tokens that were written are not those the words are read as, the answer is read again, and no more."""
    turns, costs = [Turn("user", "안녕, 오늘 뭐 먹지?")], []
    with engine({"casual": bare.models["casual"]}) as served:
        for turn in range(12):
            before = n_computed(served)
            one = Ask("id", One("casual"), tuple(turns), Sampling(temperature=1.2, max_tokens=8, seed=turn))
            answer = all_said(served, [one])[0]
            costs.append(n_computed(served) - before)
            turns += [Turn("assistant", answer.text or "응"), Turn("user", f"그럼 {turn}번은?")]
    assert max(costs[1:]) < 40 and sum(costs[-3:]) <= 3 * max(costs[1:4]) + 12


def test_a_system_prompt_is_shared_by_conversations_of_one_key_and_never_across_keys(world: World) -> None:
    system, (one, other) = some_rows(1, 30)[0].tolist(), some_rows(2, 6, seed=3).tolist()
    with engine(models_of(world.stack(("lora", "reft")))) as served:
        for prompt, key, name, n_known in [
            (one, "kim", "lora", 0), (other, "kim", "lora", 30), (one, "lee", "lora", 0), (one, "", "lora", 0),
            (one, "kim", "reft", 0), (one, "kim", "base", 0), (other, "lee", "lora", 30), (one, "kim", "lora", 35),
        ]:  # fmt: skip
            before = served.load().n_reused
            all_said(served, [ask(name, [*system, *prompt], SHORT, key=key)])
            assert served.load().n_reused - before == n_known, (key, name)
        assert served.load().n_hits == 3


def test_a_prompt_is_known_while_its_answer_is_still_written(world: World) -> None:
    system = some_rows(1, 40)[0].tolist()
    long, short = Sampling(temperature=1.0, max_tokens=60, seed=1), Sampling(temperature=0.0, max_tokens=1)
    models = models_of(world.stack(("lora",)))
    with engine(models, n_slots=2) as served:
        all_said(served, [ask("lora", system, long), ask("base", [5], short), ask("lora", [*system, 7], short)])
        assert served.load().n_reused >= 39


def test_what_is_kept_stays_within_its_share_of_the_memory(world: World) -> None:
    with engine(models_of(world.stack(("lora",))), cache_mb=1) as served:
        for seed in range(60):
            all_said(served, [ask("lora", some_rows(1, 60, seed=seed)[0].tolist(), SHORT)])
        assert 0 < served._batch.reuse.n_bytes <= REUSED_SHARE * 2**20


def test_an_answer_that_failed_leaves_nothing_behind(world: World) -> None:
    with engine(models_of(world.stack(("lora",)))) as served:
        prompt = some_rows(1, 30)[0].tolist()
        inner = served._slots.forward  # type: ignore[union-attr]
        served._slots.forward = lambda *given: inner(*given) * float("nan")  # type: ignore[union-attr,method-assign]
        with pytest.raises(Exception, match="failed on this request"):
            all_said(served, [ask("lora", prompt, SHORT)])
        assert served.load().n_failures == 1 and served._batch.reuse.n_bytes == 0
