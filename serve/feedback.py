"""What people say about answers: thumbs, pairs, corrections. What the server itself knows of an answer (model, weights,
sampling) it adds by the answer's id, as long as it remembers it; without, feedback says less, and says so.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, RootModel

from serve.reading import Strict
from serve.schemas import CONVERSATION, N_CHOICES, N_MESSAGES, Message
from serve.store import Kept, Record

if TYPE_CHECKING:
    from serve.asking import Plan
    from serve.engines.contract import Reply

N_REMEMBERED = 10_000  # answers
N_COMMENT = 2000
RESPONSE_ID = r"^(chatcmpl|cmpl)-[0-9a-f]{32}$"


class Said(Strict):
    """An answer that feedback is about. response_id: the `id` that it came with; choice: which of `n`.

    model: who said it, where the server may have forgotten.
    """

    content: str
    response_id: str | None = Field(None, pattern=RESPONSE_ID)
    choice: int = Field(0, ge=0, lt=N_CHOICES)
    model: str | None = Field(None, min_length=1, max_length=1000)


class About(Strict):
    """What every piece of feedback has: the turns before the answer, and whatever its author adds."""

    messages: list[Message] = Field(min_length=1, max_length=N_MESSAGES)
    conversation: str | None = Field(None, pattern=CONVERSATION, description="your own id of it, to delete by later")
    comment: str | None = Field(None, max_length=N_COMMENT)


class Thumb(About):
    """An answer was good, or was not."""

    kind: Literal["thumb"]
    answer: Said
    value: Literal["up", "down"]


class Pair(About):
    """Two answers to the same turns, and which was better."""

    kind: Literal["pair"]
    a: Said
    b: Said
    winner: Literal["a", "b", "tie", "both_bad"]


class Correction(About):
    """What should have been said instead."""

    kind: Literal["correction"]
    answer: Said
    corrected: str = Field(min_length=1)


class Feedback(RootModel[Annotated[Thumb | Pair | Correction, Field(discriminator="kind")]]):
    """A request to /v1/feedback."""


@dataclass(frozen=True)
class Fact:
    """What the server knows of one of its answers."""

    response_id: str
    choice: int
    owner: str
    model: str
    weights_hash: str
    routing: Mapping[str, Any] | None
    sampling: Mapping[str, Any]


class Recent:
    """The last answers, by id; the oldest are forgotten, and all of them when the server stops."""

    def __init__(self, n_most: int = N_REMEMBERED) -> None:
        self._n_most = n_most
        self._facts: OrderedDict[tuple[str, int], Fact] = OrderedDict()

    def add(self, facts: "list[Fact]") -> None:
        """Remember answers."""
        for fact in facts:
            self._facts[fact.response_id, fact.choice] = fact
        while len(self._facts) > self._n_most:
            self._facts.popitem(last=False)

    def find(self, said: Said, owner: str) -> Fact | None:
        """What is known of an answer that this owner got."""
        fact = self._facts.get((said.response_id or "", said.choice))
        return fact if fact is not None and fact.owner == owner else None


def facts_of(response_id: str, owner: str, plan: "Plan", replies: "list[Reply]") -> list[Fact]:
    """What is known of the choices of one answer."""
    found = []
    for place, reply in enumerate(replies):
        served = reply.served
        routing = None if served.combination is None else {"kind": served.combination, "weights": dict(served.members)}
        sampling = asdict(plan.sampling)
        found.append(Fact(response_id, place, owner, served.name, served.weights_hash, routing, sampling))
    return found


def kept_of(fact: Fact, turns: "list[dict[str, str]]", text: str, conversation: str | None) -> Kept:
    """A choice as it is kept with its conversation."""
    own = {"messages": turns, "content": text, **_known(fact)}
    id = fact.response_id if not fact.choice else f"{fact.response_id}-{fact.choice}"
    return Kept(id, fact.owner, conversation, own)


def record_of(feedback: Thumb | Pair | Correction, owner: str, recent: Recent) -> tuple[Record, bool]:
    """Feedback as it is stored, and whether the server knew all the answers it is about."""
    answers = [feedback.a, feedback.b] if isinstance(feedback, Pair) else [feedback.answer]
    facts = [recent.find(said, owner) for said in answers]
    payload: dict[str, Any] = {
        "messages": [message.model_dump() for message in feedback.messages],
        "answers": [_answer(said, fact) for said, fact in zip(answers, facts, strict=True)],
        "comment": feedback.comment,
    }
    if isinstance(feedback, Thumb):
        payload["value"] = feedback.value
    elif isinstance(feedback, Pair):
        payload["winner"] = feedback.winner
    else:
        payload["corrected"] = feedback.corrected
    ids = [f"{fact.response_id}-{fact.choice}" for fact in facts if fact is not None]
    subject = "|".join(sorted(ids)) if len(ids) == len(answers) else None
    return Record(feedback.kind, owner, payload, feedback.conversation, subject), None not in facts


def shown(record: Record) -> dict[str, Any]:
    """Stored feedback as the API shows it to whom it belongs."""
    head = {"id": record.id, "object": "feedback", "created": record.created_ms // 1000, "kind": record.kind}
    return head | {"conversation": record.conversation, **record.payload}


def _answer(said: Said, fact: Fact | None) -> dict[str, Any]:
    own = {"content": said.content, "response_id": said.response_id, "choice": said.choice}
    if fact is None:
        return own | {"model": said.model, "weights_hash": None, "routing": None, "sampling": None, "known": False}
    return own | _known(fact) | {"known": True}


def _known(fact: Fact) -> dict[str, Any]:
    facts = {"model": fact.model, "weights_hash": fact.weights_hash, "routing": fact.routing}
    return facts | {"sampling": dict(fact.sampling)}
