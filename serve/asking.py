"""From a checked request to the engine's replies: how tokens are chosen, one ask for each choice, turns that fit."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from serve.engines.contract import Ask, Engine, Reply, Served, Who
from serve.refusal import Refusal
from serve.schemas import Message, Sampled
from toolkit.corpus.talk import Turn
from toolkit.sampling import Sampling

BLOCK = 8  # turns that are left out at a time, so that what is kept stays the same for several requests in a row


@dataclass(frozen=True)
class Plan:
    """What is asked of the engine: a conversation or a text for each prompt, each answered `n` times.

    schema: see Ask.
    """

    request_id: str
    who: Who
    prompts: tuple[tuple[Turn, ...], ...]
    sampling: Sampling
    n: int
    n_logprobs: int | None
    key: str
    may_drop: bool = False
    schema: str | None = None


async def submit_all(engine: Engine, plan: Plan) -> tuple[list[Reply], int]:
    """A reply for every choice, prompt by prompt, and how many turns were left out.

    Raises Refusal as Engine.submit does; none of the replies goes on then.
    """
    replies: list[Reply] = []
    n_dropped = 0
    try:
        for turns in plan.prompts:
            first, kept = await _fitting(engine, plan, turns)
            replies.append(first)
            n_dropped += len(turns) - len(kept)
            for row in range(1, plan.n):
                replies.append(await engine.submit(_ask(plan, kept, row)))
    except BaseException:
        for reply in replies:
            reply.cancel()
        raise
    return replies, n_dropped


def sampling_of(asked: Sampled, limit: int | None, served: Served, max_tokens: int) -> Sampling:
    """How tokens are chosen: what the request says, else what the run says; without a seed, a new one each time."""
    own, plain = served.defaults, Sampling()
    said = {
        name: getattr(asked, name)
        for name in (
            "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
        )
    }  # fmt: skip
    chosen = {name: own.get(name, getattr(plain, name)) if value is None else value for name, value in said.items()}
    chosen["top_p"] = max(chosen["top_p"], 1e-6)  # 0 means the likeliest token alone
    return Sampling(
        **chosen,
        logit_bias=asked.bias,
        max_tokens=limit or min(own.get("max_tokens", plain.max_tokens), max_tokens),
        stop=tuple(asked.stop or ()),
        seed=secrets.randbits(63) if asked.seed is None else asked.seed,
    )


def turns_of(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The messages as a corpus has them."""
    return tuple(
        Turn("system" if message.role == "developer" else message.role, message.content) for message in messages
    )


def shortened(turns: Sequence[Turn], n_blocks: int) -> tuple[Turn, ...] | None:
    """The turns less the oldest `n_blocks` blocks of them; None where nothing would be left to answer.

    What opens the conversation as its system stays, and what is kept begins with a user's turn.
    """
    n_system = next((place for place, turn in enumerate(turns) if turn.role != "system"), len(turns))
    first = n_system + n_blocks * BLOCK
    while first < len(turns) and turns[first].role != "user":
        first += 1
    if first < len(turns):
        return (*turns[:n_system], *turns[first:])
    last = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=-1)
    was_tried = n_system + (n_blocks - 1) * BLOCK >= last
    return None if last <= n_system or was_tried else (*turns[:n_system], *turns[last:])


async def _fitting(engine: Engine, plan: Plan, turns: tuple[Turn, ...]) -> tuple[Reply, tuple[Turn, ...]]:
    """The first reply, and the turns it was given."""
    kept, n_blocks = turns, 0
    while True:
        try:
            return await engine.submit(_ask(plan, kept, 0)), kept
        except Refusal as refusal:
            if refusal.code != "context_length_exceeded" or not plan.may_drop:
                raise
            n_blocks += 1
            fewer = shortened(turns, n_blocks)
            if fewer is None or len(fewer) >= len(kept):
                raise
            kept = fewer


def _ask(plan: Plan, turns: tuple[Turn, ...], row: int) -> Ask:
    return Ask(plan.request_id, plan.who, turns, plan.sampling, plan.n_logprobs, row, plan.key, plan.schema)
