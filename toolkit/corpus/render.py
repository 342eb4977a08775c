"""Turns to token ids and labels: the only renderer, of training and serving alike.

The template writes the talk once; the text is cut where answers begin and end, and each piece is encoded by itself.
The prompt for an answer is the same text up to the same cut, so its ids are how the ids of the whole talk begin,
whatever the tokenizer would merge.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Literal

from toolkit.bases.pieces import PieceEncoder, ids_of
from toolkit.bases.templates import (
    OTHER,
    Message,
    TemplateRefusal,
    check_nesting,
    control_pattern,
    find_answers,
    message,
    open_template,
    plain,
)
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TooLong = Literal["drop_old_turns", "drop"]
Learn = Literal["assistant", "all"]
Dropped = Literal["too_long", "nothing_supervised", "refused_by_template"]
_CHUNK = 512  # talks encoded in one call


@dataclass(frozen=True, slots=True)
class Rendered:
    """One talk as a row of training.

    labels: the id itself where it is learned, IGNORED elsewhere and at the first place. is_end: True where the id
    ends an answer (or a document), so that content loss and bits per byte can leave it out. dropped: why the row must
    not be used (it is empty then); why: the template's own words. n_left_out: oldest turns left out to fit.
    n_unknown: ids of text the tokenizer has no token for.
    """

    input_ids: list[int]
    labels: list[int]
    is_end: list[bool]
    dropped: Dropped | None = None
    why: str = ""
    n_left_out: int = 0
    n_unknown: int = 0

    @property
    def n_supervised(self) -> int:
        """How many places are learned."""
        return sum(label != IGNORED for label in self.labels)

    @property
    def n_content(self) -> int:
        """How many places are learned and are words, not the end of an answer."""
        return sum(label != IGNORED and not end for label, end in zip(self.labels, self.is_end, strict=True))


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    is_learned: bool = False
    is_end: bool = False


class Renderer:
    """Renders talks with one base's tokenizer and one template.

    max_length: the longest row of training, None for any. too_long: what happens to longer ones. learn: `assistant`
    answers alone, or `all` tokens. Raises BaseError where the template cannot be trained on (it says what to do);
    costs a few milliseconds to make.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        max_length: int | None = None,
        too_long: TooLong = "drop_old_turns",
        learn: Learn = "assistant",
    ) -> None:
        self.template, self.max_length, self.too_long, self.learn = template, max_length, too_long, learn
        self._tokenizer = tokenizer
        self._chat, self.shape = open_template(template, tokenizer)
        self._control = control_pattern(self.shape.control)
        self._encoder = PieceEncoder(tokenizer, self.shape.control)
        self._nesting: set[tuple[str, ...]] = set()  # orders of roles that were checked

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end an answer: the template's end of turn, then the tokenizer's own end."""
        tokens = [self.shape.end, *([self._tokenizer.eos_token] if self._tokenizer.eos_token else [])]
        return tuple(dict.fromkeys(ids_of(self._tokenizer, tokens)))

    def prompt(self, turns: Sequence[Turn]) -> list[int]:
        """What serving feeds the model to have it answer: how the ids of any training row that goes on from here begin.

        Running text (one turn of role `text`) goes on without a template. Raises DataError where the template does not
        write such turns, and for a text without a token.
        """
        if turns and turns[0].role == "text":
            return self._opening(turns[0].content)
        try:
            messages = self._messages(turns)
            pieces = self._cut(self._chat.write(messages, prompt=True), messages)
        except TemplateRefusal as refusal:
            raise DataError("messages", [Problem("", _refused(refusal))]) from None
        return [i for ids in self._encoder.encode([[piece.text for piece in pieces]])[0] for i in ids]

    def training(self, talk: Talk) -> Rendered:
        """One talk as a row of training; see training_all."""
        return next(self.training_all([talk]))

    def training_all(self, talks: Iterable[Talk]) -> Iterator[Rendered]:
        """Each talk as a row of training, in order, encoded many at a time.

        Raises DataError where a talk has a system turn and the template has no place for it, BaseError where the
        template turns out not to nest on an order of roles met here.
        """
        rest = iter(talks)
        while chunk := list(islice(rest, _CHUNK)):
            plans = [self._plan(talk.turns, talk.source) for talk in chunk]
            ids = iter(
                self._encoder.encode([[p.text for p in plan] for plan in plans if not isinstance(plan, Rendered)])
            )
            for talk, plan in zip(chunk, plans, strict=True):
                if isinstance(plan, Rendered):
                    yield plan
                else:
                    yield self._fit(talk, self._row(plan, next(ids)))

    def _fit(self, talk: Talk, row: Rendered) -> Rendered:
        """`row`, or the row of the longest end of the talk that is short enough."""
        if self.max_length is None or len(row.input_ids) <= self.max_length:
            return row
        starts = _later_starts(talk.turns) if self.too_long == "drop_old_turns" else []
        fitting = _dropped("too_long")
        low, high = 0, len(starts)
        while low < high:  # the more is left out the shorter the row: search by halves
            middle = (low + high) // 2
            shorter = self._shorter(talk, starts[middle])
            if shorter.dropped is None and len(shorter.input_ids) <= self.max_length:
                fitting, high = shorter, middle
            else:
                low = middle + 1
        return fitting

    def _shorter(self, talk: Talk, start: int) -> Rendered:
        n_system = sum(turn.role == "system" for turn in talk.turns[:start])
        kept = (*(turn for turn in talk.turns[:start] if turn.role == "system"), *talk.turns[start:])
        plan = self._plan(kept, talk.source)
        if isinstance(plan, Rendered):
            return plan
        row = self._row(plan, self._encoder.encode([[piece.text for piece in plan]])[0])
        return replace(row, n_left_out=start - n_system)

    def _plan(self, turns: Sequence[Turn], source: str) -> list[_Piece] | Rendered:
        """The pieces of a row, or the dropped row."""
        if turns and turns[0].role == "text":
            return self._document(turns[0].content)
        try:
            messages = self._messages(turns)
            text = self._chat.write(messages, prompt=False)
            pieces = self._cut(text, messages)
        except TemplateRefusal as refusal:
            if any(turn.role == "system" for turn in turns) and not self.shape.takes_system:
                raise DataError(source, [Problem("", _refused(refusal))]) from None
            return _dropped("refused_by_template", str(refusal))
        return pieces

    def _messages(self, turns: Sequence[Turn]) -> list[Message]:
        """The turns as the template is given them. An empty system turn says nothing and is left out."""
        kept = [turn for turn in turns if turn.role != "system" or turn.content.strip()]
        if not kept:
            raise TemplateRefusal("there is no turn in it")
        if any(turn.role == "system" for turn in kept) and not self.shape.takes_system:
            raise TemplateRefusal(
                "the template of this base has no place for a system turn. Set data.system: null and remove system "
                "turns, or put their text in front of the first user turn"
            )
        return [message(turn.role, turn.content, self._control) for turn in kept]

    def _cut(self, text: str, messages: Sequence[Message]) -> list[_Piece]:
        """A marked text in pieces: what is given, then an answer's words, its end token, what is given, and so on."""
        answers = find_answers(text, self.shape)
        spoken = [turn["content"] for turn in messages if turn["role"] == "assistant"]
        if text.count(OTHER) != len(messages) - len(spoken) or len(answers) != len(spoken):
            raise TemplateRefusal("it leaves a turn out, or writes one twice")
        is_intact = all(text[a.words - 1 : a.end + 1] == content for a, content in zip(answers, spoken, strict=True))
        order = tuple(turn["role"] for turn in messages)
        if order not in self._nesting or not is_intact:
            check_nesting(self._chat, messages, self.shape)
            self._nesting.add(order)
        pieces, at = [], 0
        for answer in answers:
            pieces.append(_Piece(text[at : answer.start]))
            pieces.append(_Piece(text[answer.start : answer.end], answer.is_learned))
            pieces.append(_Piece(text[answer.end : answer.close], answer.is_learned, True))
            at = answer.close
        return [*pieces, _Piece(text[at:])]

    @property
    def unknown_id(self) -> int | None:
        """What stands for text that the tokenizer has no token for; None where it has one for everything."""
        unknown: int | None = self._tokenizer.unk_token_id
        return unknown

    def _document(self, content: str) -> list[_Piece]:
        """Running text, all of it learned: opened and ended by the tokenizer's own tokens, where it has them."""
        tokenizer = self._tokenizer
        opening = [_Piece(str(tokenizer.bos_token), True)] if tokenizer.bos_token_id is not None else []
        ending = [_Piece(str(tokenizer.eos_token), True, True)] if tokenizer.eos_token_id is not None else []
        return [*opening, _Piece(plain(content, self._control), True), *ending]

    def _opening(self, content: str) -> list[int]:
        """The ids of running text that has not ended yet."""
        pieces = [piece.text for piece in self._document(content) if not piece.is_end]
        ids = [i for part in self._encoder.encode([pieces])[0] for i in part]
        if not ids:
            raise DataError("prompt", [Problem("", "there is no token in it. Write something to go on from.")])
        return ids

    def _row(self, plan: Sequence[_Piece], encoded: Sequence[Sequence[int]]) -> Rendered:
        ids: list[int] = []
        labels: list[int] = []
        is_end: list[bool] = []
        for piece, piece_ids in zip(plan, encoded, strict=True):
            ids += piece_ids
            labels += piece_ids if piece.is_learned or self.learn == "all" else [IGNORED] * len(piece_ids)
            is_end += [piece.is_end] * len(piece_ids)
        labels[:1] = [IGNORED] * len(labels[:1])
        last = next((i for i in range(len(labels) - 1, -1, -1) if labels[i] != IGNORED), None)
        if last is None:
            return _dropped("nothing_supervised")
        end = last + 1  # what follows the last learned place teaches nothing
        n_unknown = 0 if self.unknown_id is None else ids.count(self.unknown_id)
        return Rendered(ids[:end], labels[:end], is_end[:end], n_unknown=n_unknown)


def _dropped(reason: Dropped, why: str = "") -> Rendered:
    return Rendered([], [], [], reason, why)


def _refused(refusal: TemplateRefusal) -> str:
    return f"the chat template does not write these turns: {refusal}."


def _later_starts(turns: Sequence[Turn]) -> list[int]:
    """Where a talk may begin once its oldest turns are left out: at every later user turn that an answer follows."""
    last_answer = max((i for i, turn in enumerate(turns) if turn.role == "assistant"), default=0)
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
    return [i for i in range(first + 1, last_answer) if turns[i].role == "user" and turns[i - 1].role != "user"]
