"""Members of a stack and their combination, as a judge measures them: each token is computed once for each member."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from toolkit.adapters.opened import Opened
from toolkit.bases.load import LoadedBase
from toolkit.combine.route import Choice
from toolkit.combine.rows import Apart, answering
from toolkit.combine.speaker import Speaker
from toolkit.combine.vote import vote_probabilities
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import RunError
from toolkit.evaluate.classify import classify_talks, label_log_likelihoods
from toolkit.evaluate.spoken import Pair, PairBits
from toolkit.evaluate.subject import OneModel, Subject
from toolkit.evaluate.talk import HeldOut, Prompt, Sample, talk_loss
from toolkit.generate import Sampling
from toolkit.loaded import LoadedLabeller, LoadedRun
from toolkit.score import IGNORED, supervised_log_likelihoods
from toolkit.stack.stack import Stack

# R rows, L labels.

Values = list[list[float]]  # for every row the log-likelihood of each supervised token


@dataclass
class Table:
    """What members say of the same rows, kept: experts, the best of them, the router and the oracle read it.

    `rows` and `talks` stand side by side. `apart`: members on bases of their own, which have no tokens in common.
    """

    base: LoadedBase
    renderer: Renderer
    stack: Stack
    talks: Sequence[Talk]
    rows: Sequence[Rendered]
    labels: Sequence[str] = ()
    apart: Mapping[str, LoadedRun | LoadedLabeller] = field(default_factory=dict)
    _values: dict[str | None, Values] = field(default_factory=dict)
    _labelled: dict[str | None, list[dict[str, float]]] = field(default_factory=dict)

    def values(self, name: str | None) -> Values:
        """A member's log-likelihoods of every row; None: the base's."""
        if name not in self._values:
            pairs = [(row.input_ids, row.labels) for row in self.rows]
            with answering(self.stack, [name], Apart) as model:
                self._values[name] = supervised_log_likelihoods(model, pairs)
        return self._values[name]

    def labelled(self, name: str | None) -> list[dict[str, float]]:
        """A member's probabilities of the labels of every talk."""
        if name not in self._labelled and name in self.apart:
            own = self.apart[str(name)]
            said_RL = label_log_likelihoods(own, self.talks, self.labels).softmax(-1)
            self._labelled[name] = [dict(zip(self.labels, row, strict=True)) for row in said_RL.tolist()]
        if name not in self._labelled:
            with answering(self.stack, [name], Apart) as model:
                self._labelled[name] = classify_talks(model, self.renderer, self.talks, self.labels)
        return self._labelled[name]

    def held_out(self, values: Values, langs: Sequence[str | None]) -> HeldOut:
        """Log-likelihoods as a held-out loss."""
        return HeldOut(
            tuple(
                talk_loss(row, of, self.base.tokenizer, lang)
                for row, of, lang in zip(self.rows, values, langs, strict=True)
                if row.n_supervised
            )
        )


@dataclass(frozen=True)
class OneMember:
    """One member of the stack. See evaluate.subject.Subject."""

    table: Table
    name: str | None

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """See Subject; rows are those of the table."""
        return self.table.held_out(self.table.values(self.name), langs)

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """See Subject."""
        with answering(self.table.stack, [self.name], Apart) as model:
            return _as_one(self.table, model).answers(prompts, sampling)

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """See Subject; talks are those of the table."""
        return self.table.labelled(self.name)

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """See Subject."""
        with answering(self.table.stack, [self.name], Apart) as model:
            return _as_one(self.table, model).bits(pairs, as_answer=as_answer)


@dataclass(frozen=True)
class OnItsOwn:
    """A member on a base of its own. Its loss is that of other tokens, and is not compared. See Subject."""

    table: Table
    name: str

    @property
    def _model(self) -> OneModel:
        own = self.table.apart[self.name]
        if isinstance(own, LoadedLabeller):
            raise RunError(f"{own.run.path}: it labels texts; it cannot talk. It votes over labels alone.")
        return OneModel(own.model, own.base.tokenizer, own.renderer)

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """See Subject."""
        return None

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """See Subject."""
        return self._model.answers(prompts, sampling)

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """See Subject; talks are those of the table."""
        return self.table.labelled(self.name)

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """See Subject."""
        return self._model.bits(pairs, as_answer=as_answer)


def member(table: Table, name: str) -> Subject:
    """One member, wherever it answers."""
    return OnItsOwn(table, name) if name in table.apart else OneMember(table, name)


@dataclass
class Combined:
    """The combination of a speaker: a mix, a gate, a route or a vote. Asked twice, it reads once. See
    evaluate.subject.Subject; rows and talks are those of the table."""

    table: Table
    speaker: Speaker
    _held: HeldOut | None = None

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        """See Subject. A vote over whole answers, or over labels, has no loss."""
        if self._votes_on_labels or self.speaker.is_whole:
            return None
        if self._held is None:
            self._held = self._measured(rows, langs)
        return self._held

    def _measured(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> HeldOut | None:
        if self.speaker.spec.kind == "route":
            return self.table.held_out(routed(self.table, self.speaker), langs)
        with self.speaker.opened() as model:
            return _as_one(self.table, model).held_out(rows, langs)

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """See Subject."""
        said = self.speaker.answer([prompt.turns for prompt in prompts], sampling)
        return [
            Sample(prompt, answer.text.strip(), answer.finish, len(answer.ids))
            for prompt, answer in zip(prompts, said, strict=True)
        ]

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """See Subject; talks are those of the table."""
        if self._votes_on_labels:
            return vote(self.table, self.speaker.spec.members, self.speaker.spec.how, self.speaker.spec.weights)
        if self.speaker.spec.kind == "route":
            choices = self.speaker.pick([talk.turns[:-1] for talk in talks])
            return [self._of_one(place, choice) for place, choice in enumerate(choices)]
        with self.speaker.opened() as model:
            return _as_one(self.table, model).labelled(talks, labels)

    def _of_one(self, place: int, choice: Choice) -> dict[str, float]:
        """The labels of one talk by whom the router chose: one expert's are in the table, several answer together."""
        if sum(weight > 0 for weight in choice.weights.values()) < 2:
            return self.table.labelled(choice.expert)[place]
        with self.speaker.opened(choice) as model:
            return _as_one(self.table, model).labelled([self.table.talks[place]], self.table.labels)[0]

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """See Subject. Where there is no one model to ask: none."""
        if self.speaker.is_whole or self._votes_on_labels or self.speaker.spec.kind == "route":
            return None
        with self.speaker.opened() as model:
            return _as_one(self.table, model).bits(pairs, as_answer=as_answer)

    @property
    def _votes_on_labels(self) -> bool:
        return bool(self.table.labels) and self.speaker.spec.kind in ("vote", "bag", "boost")


def vote(table: Table, members: Sequence[str], how: str, weights: Mapping[str, float]) -> list[dict[str, float]]:
    """What members vote of every talk's labels, as probabilities; see combine.vote."""
    said = [table.labelled(name) for name in members]
    return vote_probabilities(said, how, [weights[name] for name in members])  # type: ignore[arg-type]


# Routing along a talk


def turns_of(row: Rendered) -> list[int]:
    """For every supervised token the number of the answer that it is in, from 0."""
    found: list[int] = []
    number = -1
    for before, label in pairwise([IGNORED, *row.labels]):
        if label != IGNORED:
            number += before == IGNORED
            found.append(number)
    return found


def asked_before(talk: Talk, n_answers: int) -> list[Sequence[Turn]]:
    """What was said before each of the last n answers of a talk (a row may have lost its oldest turns)."""
    places = [place for place, turn in enumerate(talk.turns) if turn.role == "assistant"]
    return [talk.turns[:place] for place in places[len(places) - n_answers :]]


def routes_of(table: Table, speaker: Speaker) -> list[list[Choice]]:
    """For every row whom the router sends each of its answers to, answer after answer, as a server would."""
    asked = []
    for talk, row in zip(table.talks, table.rows, strict=True):
        n_answers = max(turns_of(row), default=-1) + 1
        asked.append(asked_before(talk, n_answers))
    found: list[list[Choice]] = [[] for _ in asked]
    for number in range(max(map(len, asked), default=0)):
        mine = [place for place, of in enumerate(asked) if len(of) > number]
        before = [found[place][-1] if found[place] else None for place in mine]
        for place, choice in zip(mine, speaker.pick([asked[place][number] for place in mine], before), strict=True):
            found[place].append(choice)
    return found


def routed(table: Table, speaker: Speaker) -> Values:
    """Log-likelihoods of every row under the experts that the router chose, answer by answer."""
    values: Values = []
    for place, choices in enumerate(routes_of(table, speaker)):
        own = [_one_answer(table, speaker, place, choice, number) for number, choice in enumerate(choices)]
        values.append([value for of_answer in own for value in of_answer])
    return values


def _one_answer(table: Table, speaker: Speaker, place: int, choice: Choice, number: int) -> list[float]:
    """Log-likelihoods of one answer of a row."""
    row = table.rows[place]
    turn = turns_of(row)
    if sum(weight > 0 for weight in choice.weights.values()) < 2:
        return [value for value, of in zip(table.values(choice.expert)[place], turn, strict=True) if of == number]
    numbered = iter(turn)
    labels = [label if label != IGNORED and next(numbered) == number else IGNORED for label in row.labels]
    with speaker.opened(choice) as model:
        return supervised_log_likelihoods(model, [(row.input_ids, labels)])[0]


def oracle(table: Table, experts: Sequence[str | None]) -> Values:
    """Log-likelihoods of every row under the expert that it belongs to; `experts`: for each row, None the base."""
    return [table.values(experts[place])[place] for place in range(len(table.rows))]


def _as_one(table: Table, model: Opened) -> OneModel:
    return OneModel(model, table.base.tokenizer, table.renderer)
