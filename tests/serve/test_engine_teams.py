"""Requests that several models answer: who may, how they come and go, what they say about themselves."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from serve.engines.contract import Auto, Mix, One, Vote, Who
from serve.engines.models import Model
from serve.engines.routing import Routing
from serve.engines.teams import team_of
from serve.refusal import Refusal
from tests.served_world import GREEDY, all_said, ask, combined, engine, listened, models_of, said, watch
from tests.stacked_world import World, some_rows
from toolkit.combine.speaker import Spec
from toolkit.corpus.talk import Turn
from toolkit.sampling import Sampling

PROMPT = some_rows(1, 20)[0].tolist()
ENDLESS = Sampling(temperature=1.0, max_tokens=400, seed=1)
TRIO = Mix((("lora", 1.0), ("prefix", 2.0), ("reft", 1.0)))


class Deaf:
    """A router that says what it is told, whatever is said; and remembers what it was asked."""

    experts = ("lora", "reft")

    def __init__(self, *rows: Sequence[float]) -> None:
        self.rows, self.asked = list(rows), []

    def probabilities(self, model: Any, tokenizer: Any, conversations: Any) -> torch.Tensor:
        self.asked.append(tuple(turn.content for turn in conversations[0]))
        return torch.tensor([self.rows.pop(0) if len(self.rows) > 1 else self.rows[0]])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@pytest.fixture
def models(world: World) -> dict[str, Model]:
    made = models_of(world.stack(("lora", "prefix", "reft")))
    mix = Spec("mix", "prob", ("lora", "reft"), {"lora": 0.75, "reft": 0.25})
    vote = Spec("vote", "hard", ("lora", "reft", "prefix"), {"lora": 0.2, "reft": 0.3, "prefix": 0.5})
    made["run-mix"] = combined(made, "run-mix", mix)
    made["run-vote"] = combined(made, "run-vote", vote)
    made["run-soft"] = combined(made, "run-soft", replace(vote, how="soft"))
    made["lone"] = replace(made["lora"], served=replace(made["lora"].served, name="lone"), stack=None)
    made["elsewhere"] = replace(made["lora"], served=replace(made["lora"].served, name="elsewhere"))
    renderer: Any = type("Other", (), {"template": "other"})()
    made["elsewhere"] = replace(made["elsewhere"], loaded=replace(made["lora"].loaded, renderer=renderer))
    return made


def with_router(models: dict[str, Model], router: Any, top_k: int = 1, default: str = "base") -> dict[str, Model]:
    """The same and a run whose experts are lora and reft."""
    spec = Spec("route", "classifier", Deaf.experts, default=default, margin=0.2, top_k=top_k)
    named = {
        f"run/{name}": replace(models[name], served=replace(models[name].served, name=f"run/{name}"))
        for name in Deaf.experts
    }
    return models | named | {"run": combined(models, "run", spec, router=router)}


@pytest.mark.parametrize(
    ("who", "status", "says"),
    [
        (One("none"), 404, "'none' does not exist.*base, lora"),
        (Mix((("lora", 1.0), ("none", 1.0))), 404, "'none' does not exist"),
        (Mix((("lora", 1.0), ("lora", 2.0))), 400, "lora: name every model once"),
        (Mix((("lora", 1.0), ("reft", -2.0))), 400, "sum"),
        (Mix((("lora", 2.0), ("reft", -1.0)), "prob"), 400, "negative"),
        (Mix((("lora", 0.0),)), 400, "every weight is 0"),
        (Mix(()), 400, "at least one"),
        (Vote(()), 400, "at least one"),
        (Vote(("lora", "run-mix")), 400, "run-mix.*is a mix already"),
        (Mix((("lora", 1.0), ("lone", 1.0))), 400, "lone.*model of its own"),
        (Mix((("lora", 1.0), ("elsewhere", 1.0))), 400, "elsewhere.*another template than lora"),
        (Auto(), 400, "nothing chooses"),
    ],
)
def test_who_cannot_answer_is_refused_by_name(models: dict[str, Model], who: Who, status: int, says: str) -> None:
    with pytest.raises(Refusal, match=says) as raised:
        team_of(models, who)
    assert raised.value.status == status and raised.value.param == "model"


def test_a_team_is_described_as_one_model(models: dict[str, Model]) -> None:
    with engine(models) as served:
        told = served.served(TRIO)
        assert (told.combination, told.adapter) == ("mix", None)
        assert told.members == (("lora", 0.25), ("prefix", 0.5), ("reft", 0.25))
        assert told.context == min(served.models()[name].context for name, _ in TRIO.weights)
        others = [Mix(TRIO.weights, "prob"), Mix(TRIO.weights[:2]), Vote(("lora", "prefix", "reft"))]
        assert len({told.weights_hash, *(served.served(other).weights_hash for other in others)}) == 4
        assert served.served(One("lora")) == served.models()["lora"]


def test_a_run_with_a_combination_answers_as_it(models: dict[str, Model]) -> None:
    pairs = {
        "run-mix": Mix((("lora", 0.75), ("reft", 0.25)), "prob"),
        "run-soft": Mix((("lora", 0.2), ("reft", 0.3), ("prefix", 0.5)), "prob"),
    }
    with engine(models) as served:
        for name, who in pairs.items():
            own, other = all_said(served, [ask(name, PROMPT), ask(who, PROMPT)])
            assert own == other and own.routing == team_of(models, who).routing
        vote = all_said(served, [ask("run-vote", PROMPT)])[0]
        assert vote.routing[0][1] in (0.5, 0.7, 0.8, 1.0, pytest.approx(0.5))


def test_a_vote_is_one_chunk_and_says_who_won(models: dict[str, Model]) -> None:
    async def run() -> None:
        with engine(models) as served:
            short = Sampling(temperature=0.0, max_tokens=1)
            one = ask(Vote(("lora", "reft", "base")), PROMPT, short, n_logprobs=1)
            pieces, answer = await listened(await served.submit(one))
            alone = {name: await said(served, ask(name, PROMPT, short)) for name in ("lora", "reft", "base")}
            (winner, share) = answer.routing[0]
            assert len(pieces) == 1 and answer.text == alone[winner].text and len(answer.logprobs) == len(answer.ids)
            n_alike = sum(other.text == answer.text for other in alone.values())
            assert share == pytest.approx(n_alike / 3)

    asyncio.run(run())


@pytest.mark.parametrize("who", [TRIO, Vote(("lora", "prefix", "base"))], ids=["mix", "vote"])
def test_members_leave_together_when_nobody_listens(models: dict[str, Model], who: Who) -> None:
    async def run() -> None:
        with engine(models) as served:
            await said(served, ask("lora", PROMPT))
            passes = watch(served._slots, "forward")
            reply = await served.submit(ask(who, PROMPT, ENDLESS))
            while not any(max(map(len, ids)) == 1 for _, ids, _ in passes):
                await asyncio.sleep(0.001)
            assert {len(seats) for seats, *_ in passes} == {3} and len(served._slots or ()) == 3
            reply.cancel()
            _, answer = await listened(reply)
            assert answer.finish in ("cancelled", "stop") and len(served._slots or ()) == 0

    asyncio.run(run())


def test_what_breaks_a_member_fails_its_request_and_nobody_else(models: dict[str, Model]) -> None:
    with engine(models) as served:
        wanted = all_said(served, [ask("lora", PROMPT), ask(Vote(("lora", "reft")), PROMPT)])
        inner = served._slots.forward  # type: ignore[union-attr]

        def forward(seats: Any, *given: Any) -> Any:
            if any(seat.adapter == "prefix" for seat in seats):
                raise ZeroDivisionError("inside")
            return inner(seats, *given)

        served._slots.forward = forward  # type: ignore[union-attr,method-assign]

        async def run() -> list[Any]:
            asks = [
                ask("lora", PROMPT),
                ask(TRIO, PROMPT),
                ask(Vote(("lora", "reft")), PROMPT),
                ask(Vote(("prefix",)), PROMPT),
            ]
            return await asyncio.gather(*(said(served, one) for one in asks), return_exceptions=True)

        done = asyncio.run(run())
        assert [done[0], done[2]] == wanted and all(isinstance(done[place], Refusal) for place in (1, 3))
        assert served.load().n_failures == 2 and len(served._slots or ()) == 0


@pytest.mark.parametrize("who", [TRIO, Vote(("lora", "reft", "base"))], ids=["mix", "vote"])
def test_a_member_whose_output_is_no_number_fails_the_request(models: dict[str, Model], who: Who) -> None:
    stack: Any = models["lora"].stack
    table = next(iter(stack.loras.tables.values()))
    kept = table.dense[stack.place("lora")].clone()
    with engine(models, cache_mb=0) as served:
        wanted = all_said(served, [ask("reft", PROMPT)])
        table.dense[stack.place("lora")] = math.nan
        stack._forget_plans()

        async def run() -> list[Any]:
            return await asyncio.gather(
                *(said(served, ask(one, PROMPT)) for one in (who, "reft")), return_exceptions=True
            )

        done = asyncio.run(run())
        table.dense[stack.place("lora")] = kept
        stack._forget_plans()
        assert isinstance(done[0], Refusal) and done[0].status == 500 and [done[1]] == wanted
        assert len(served._slots or ()) == 0 and served.load().n_failures == 1


def test_a_team_larger_than_the_slots_runs_by_itself(models: dict[str, Model]) -> None:
    asks = [ask("lora", PROMPT), ask(TRIO, PROMPT), ask("reft", PROMPT), ask(Vote(("lora", "reft")), PROMPT)]
    with engine(models, n_slots=1) as tight, engine(models) as wide:
        passes = watch(tight._slots, "forward")
        assert all_said(tight, asks) == all_said(wide, asks)
        assert {tuple(seat.adapter for seat in seats) for seats, *_ in passes} == {
            ("lora",), ("reft",), ("lora", "prefix", "reft"), ("lora", "reft"),
        }  # fmt: skip


def test_answers_to_one_request_draw_noise_of_their_own(models: dict[str, Model]) -> None:
    with engine(models) as served:
        for who in ("lora", TRIO, Vote(("lora", "reft"))):
            warm = Sampling(temperature=2.0, top_p=1.0, max_tokens=12, seed=3)
            asks = [ask(who, PROMPT, warm, row=row) for row in (0, 1, 2, 0)]
            answers = [answer.ids for answer in all_said(served, asks)]
            assert answers[0] == answers[3] and len(set(answers)) == 3


def test_log_probabilities_come_with_the_pieces(models: dict[str, Model]) -> None:
    async def run() -> None:
        with engine(models) as served:
            for who in ("lora", TRIO):
                reply = await served.submit(ask(who, PROMPT, GREEDY, n_logprobs=2))
                n_seen = []
                async for _ in reply:
                    n_seen.append(len(reply.logprobs))
                told = reply.answer.logprobs
                assert n_seen == sorted(n_seen) and n_seen[0] >= 1 and n_seen[-1] <= len(told)
                assert [one.id for one in told] == list(reply.answer.ids) and tuple(reply.logprobs) == told
                for one in told:
                    assert one.logprob == one.top[0].logprob < 0 and one.id == one.top[0].id and len(one.top) == 2
            assert (await said(served, ask("lora", PROMPT))).logprobs == ()
            assert all(not one.top for one in (await said(served, ask("lora", PROMPT, n_logprobs=0))).logprobs)

    asyncio.run(run())


def test_a_bias_on_a_token_that_is_none_is_refused(models: dict[str, Model]) -> None:
    with engine(models) as served, pytest.raises(Refusal, match="no token 96") as raised:
        all_said(served, [ask("lora", PROMPT, Sampling(logit_bias={96: 1.0}))])
    assert (raised.value.status, raised.value.param) == (400, "logit_bias")


class TestRouting:
    def test_the_router_picks_who_answers(self, models: dict[str, Model]) -> None:
        made = with_router(models, Deaf([0.1, 0.8, 0.1]))
        with engine(made) as served:
            routed, named, plain = all_said(served, [ask(Auto(), PROMPT), ask("run", PROMPT), ask("reft", PROMPT)])
            assert routed.ids == named.ids == plain.ids and routed.routing == (("run/reft", 1.0),)
            reply = asyncio.run(served.submit(ask(Auto(), PROMPT)))
            assert reply.served.name == "run/reft"

    def test_whom_nobody_fits_the_default_answers(self, models: dict[str, Model]) -> None:
        for default, wanted in (("base", "base"), ("lora", "run/lora")):
            with engine(with_router(models, Deaf([0.1, 0.2, 0.7]), default=default)) as served:
                assert all_said(served, [ask(Auto(), PROMPT)])[0].routing == ((wanted, 1.0),)

    def test_several_experts_answer_as_a_mixture(self, models: dict[str, Model]) -> None:
        made = with_router(models, Deaf([0.3, 0.6, 0.1]), top_k=2)
        with engine(made) as served:
            routed, mixed = all_said(served, [ask(Auto(), PROMPT), ask(Mix((("reft", 2.0), ("lora", 1.0))), PROMPT)])
            assert routed.ids == mixed.ids and dict(routed.routing) == pytest.approx(
                {"run/reft": 2 / 3, "run/lora": 1 / 3}
            )

    def test_a_conversation_stays_with_its_expert_until_another_wins_by_the_margin(
        self, models: dict[str, Model]
    ) -> None:
        router = Deaf([0.6, 0.4, 0.0], [0.45, 0.55, 0.0], [0.2, 0.8, 0.0], [0.45, 0.55, 0.0], [0.45, 0.55, 0.0])
        run, routing = with_router(models, router)["run"], Routing()
        first = ask("run", [1])
        second = replace(first, turns=(*first.turns, Turn("assistant", "2"), Turn("user", "3")))
        third = replace(first, turns=(*second.turns, Turn("assistant", "4"), Turn("user", "5")))
        chosen = [routing.choice(run, one).expert for one in (first, second, third)]
        assert chosen == ["lora", "lora", "reft"]
        assert routing.choice(run, replace(second, key="of somebody else")).expert == "reft"
        edited = replace(second, turns=(*first.turns, Turn("assistant", "otherwise"), Turn("user", "3")))
        assert routing.choice(run, edited).expert == "lora"

    def test_only_the_last_conversations_are_remembered(self, models: dict[str, Model]) -> None:
        run, routing = with_router(models, Deaf([0.6, 0.4, 0.0]))["run"], Routing(n_kept=3)
        for number in range(10):
            routing.choice(run, ask("run", [number]))
        assert len(routing._chosen) == 3

    def test_a_router_that_breaks_fails_its_request_alone(self, models: dict[str, Model]) -> None:
        with engine(with_router(models, Deaf())) as served:
            wanted = all_said(served, [ask("lora", PROMPT)])
            with pytest.raises(IndexError):
                all_said(served, [ask(Auto(), PROMPT)])
            assert all_said(served, [ask("lora", PROMPT)]) == wanted and served.load().n_waiting == 0

    def test_two_routers_have_to_be_told_apart(self, models: dict[str, Model]) -> None:
        made = with_router(models, Deaf([1.0, 0.0, 0.0]))
        again = replace(made["run"], served=replace(made["run"].served, name="again"))
        with pytest.raises(Refusal, match="Name one: run, again"):
            team_of(made | {"again": again}, Auto())
