"""Rows in their slots, and what a step does to them: tokens in, one forward pass, tokens chosen, pieces of text out.

A pass that breaks is tried again request by request, so that what breaks it fails alone. A text that was read or
written is kept for the next that begins alike. Rows behind a gate have a pass of their own for each gate.
"""

# R rows of a forward pass, A of them asked about, K lanes of a voice, V vocabulary.

import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from serve.engines.reuse import Reuse
from serve.engines.row import Event, Lane, Piece, Row, Voice
from serve.engines.slots import Seat, Slots
from toolkit.errors import MaltuError
from toolkit.writing import next_tokens

_log = logging.getLogger("maltu.serve.rows")
Over = Callable[[Row, Event, float | None], None]


@dataclass
class Counts:
    """Tokens of prompts, those of them that were not computed again, and in how many requests."""

    n_prompt: int = 0
    n_reused: int = 0
    n_hits: int = 0


class Batch:
    """See the head of this file. over: told of a row that has ended, with its last event and, for an answer that ran to
    its end, how long it took. failed: told of a row that broke. One thread, under torch.inference_mode.
    """

    def __init__(self, slots: Slots | None, reuse: Reuse, over: Over, failed: Callable[[Row, Exception], None]) -> None:
        self.slots, self.reuse, self.counts = slots, reuse, Counts()
        self.events: list[tuple[Row, Event]] = []
        self._over, self._failed = over, failed
        self._ended: set[Row] = set()  # rows that ended in the pass that runs

    def enter(self, row: Row) -> None:
        """Give a row its slots, and what is known already of its prompt."""
        row.times.begun = time.time_ns()
        self.counts.n_prompt += row.n_prompt * len(row.lanes)
        if self.slots is None or row.ticket.is_alone:
            return
        try:
            for lane in row.lanes:
                lane.seat = self.slots.open(lane.model.adapter, lane.model.gate)
            self._recall(row)
        except Exception as error:  # no memory left
            self._failed(row, error)

    def run(self, writing: Sequence[Row], reading: Sequence[tuple[Row, int]]) -> bool:
        """One token for everybody who writes, then a chunk of reading. Whether any pass went well."""
        went = self._advance([(lane, lane.voice.writing.ids[-1:]) for row in writing for lane in row.lanes])
        chunks = [(row, row.prompt[row.ticket.n_read :][:n_tokens]) for row, n_tokens in reading]
        return self._advance([(lane, chunk) for row, chunk in chunks for lane in row.lanes]) or went

    def run_alone(self, row: Row) -> bool:
        """One token of an answer on a model of its own, or a few until a piece of text is certain. Whether it went
        well.
        """
        if row.pieces is None:
            row.pieces = row.start_alone()
        try:
            self._show(row, next(row.pieces))
        except StopIteration:
            self._conclude(row, time.monotonic() - row.since)
        except Exception as error:  # whatever breaks inside a model must not take the others along
            self._failed(row, row.voices[0].writing.failure or error)
            return False
        row.times.first = row.times.first or time.time_ns()
        return True

    def cut_off(self, row: Row) -> None:
        """Nobody listens to a row any more: what it has is its answer."""
        if row.pieces is not None:
            while row not in self._ended:
                self.run_alone(row)  # it sees for itself that it was cancelled
            return
        for voice in row.voices:
            if not voice.is_over:
                self._show(row, voice.writing.end("cancelled"))
        self._conclude(row)

    def leave(self, row: Row, *, keeps: bool) -> None:
        """A row's slots are free. keeps: what it read and wrote may be used again."""
        self._ended.add(row)
        for voice in row.voices:
            self._leave(voice, keeps)
        if row.pieces is not None:
            row.pieces.close()

    def reset(self) -> None:
        """Forget everything: the loop broke."""
        if self.slots is not None:
            self.slots.reset()
        self.reuse.clear()
        self._ended.clear()

    def _recall(self, row: Row) -> None:
        """What every lane knows of the prompt already, less its last token, which is always computed."""
        assert self.slots is not None
        found = [self.reuse.find(lane.scope, row.prompt[:-1]) for lane in row.lanes]
        n_known = min(n_tokens for n_tokens, _ in found)
        if not n_known:
            return
        for lane, (_, pieces) in zip(row.lanes, found, strict=True):
            firsts = itertools.accumulate((len(piece[0]) for piece in pieces), initial=0)
            cut = [tuple(part[: n_known - first] for part in one) for one, first in zip(pieces, firsts, strict=False)]
            self.slots.recall(_seat(lane), [piece for piece in cut if len(piece[0])])
        row.ticket.n_read = n_known
        self.counts.n_reused += n_known * len(row.lanes)
        self.counts.n_hits += 1

    def _advance(self, given: Sequence[tuple[Lane, Sequence[int]]]) -> bool:
        """Give lanes their next tokens, and voices whose prompt was read a token of their text. Whether any got."""
        self._ended.clear()
        seated = [one for one in given if one[0].seat is not None]
        went = False
        for gate in dict.fromkeys(id(lane.model.gate) for lane, _ in seated):
            part = sorted((one for one in seated if id(one[0].model.gate) == gate), key=lambda one: _seat(one[0]).slot)
            lanes, logits_AV = self._forward(part)
            went |= bool(lanes)
            self._count(lanes, {lane: len(ids) for lane, ids in part})
            asked = [lane for lane in lanes if not lane.voice.row.ticket.n_left]
            self._say([lane for lane in asked if lane.voice.row not in self._ended], asked, logits_AV)
        return went

    def _forward(self, given: Sequence[tuple[Lane, Sequence[int]]]) -> tuple[list[Lane], Tensor]:
        """Who got their tokens, in one pass, and what follows for those whose prompt has been read by now; where it
        breaks, request by request, less those that break alone.
        """
        lanes = [lane for lane, _ in given]
        if not lanes or self.slots is None:
            return [], torch.empty(0)
        try:
            asked = [lane.voice.row.ticket.n_left <= len(ids) for lane, ids in given]
            return lanes, self.slots.forward([_seat(lane) for lane in lanes], [ids for _, ids in given], asked)
        except Exception as error:
            rows = list(dict.fromkeys(lane.voice.row for lane in lanes))
            if len(rows) == 1:
                self._failed(rows[0], error)
                return [], torch.empty(0)
            _log.warning("a step of %d rows broke (%s): trying each alone", len(lanes), error)
            parts = [self._forward([one for one in given if one[0].voice.row is row]) for row in rows]
            whole = [part for part in parts if part[0]]
            logits = [logits_AV for _, logits_AV in whole] or [torch.empty(0)]
            return [lane for part, _ in whole for lane in part], torch.cat(logits)

    def _count(self, lanes: Sequence[Lane], n_given: dict[Lane, int]) -> None:
        """Note how far prompts have been read; rows that have read theirs go to where the others write."""
        for row in dict.fromkeys(lane.voice.row for lane in lanes):
            if not row.ticket.n_left:
                continue
            row.ticket.n_read += n_given[row.lanes[0]]
            if not row.ticket.n_left and self.slots is not None:
                for lane in row.lanes:
                    self.slots.settle(_seat(lane))

    def _say(self, told: Sequence[Lane], asked: Sequence[Lane], logits_AV: Tensor) -> None:
        """Choose a token for every voice of these lanes, of those that were asked about."""
        if not told:
            return
        voices = list(dict.fromkeys(lane.voice for lane in told))
        if len(voices) == len(asked):
            own_RV = logits_AV
        else:
            place_of = {lane: place for place, lane in enumerate(asked)}
            rows, parts = [], []
            for voice in voices:
                try:
                    parts.append(voice.logits(logits_AV[[place_of[lane] for lane in voice.lanes]].float()))
                    rows.append(voice)
                except MaltuError as error:  # a member's logits are no numbers
                    self._failed(voice.row, error)
            voices = rows
            if not voices:
                return
            own_RV = torch.stack(parts)
        for voice, token in zip(voices, next_tokens(own_RV, [voice.writing for voice in voices]), strict=True):
            if voice.row not in self._ended:
                self._take(voice, token)

    def _take(self, voice: Voice, token: int | None) -> None:
        """A token is chosen; None: there was nothing to choose from."""
        row = voice.row
        if voice.writing.failure is not None:
            self._failed(row, voice.writing.failure)
            return
        if token is None:
            says = f"the output of {row.ask.model} is not a number: its training diverged. Train with a lower rate."
            self._failed(row, ArithmeticError(says))
            return
        if not voice.writing.ids:
            row.times.first = row.times.first or time.time_ns()
            for lane in voice.lanes:
                self._keep(lane)  # its prompt has been read, and well
        self._show(row, voice.writing.take(token))
        if all(one.is_over for one in row.voices):
            self._conclude(row, time.monotonic() - row.since)
        elif voice.is_over:
            self._leave(voice, keeps=True)
            row.ticket.n_rows -= len(voice.lanes)

    def _show(self, row: Row, piece: str) -> None:
        if piece and row.tells:
            self.events.append((row, Piece(piece, len(row.voices[0].writing.logprobs))))

    def _conclude(self, row: Row, took_s: float | None = None) -> None:
        rest, answer = row.conclude()
        if rest:
            self.events.append((row, Piece(rest, len(answer.logprobs))))
        self._over(row, answer, took_s)

    def _leave(self, voice: Voice, keeps: bool) -> None:
        for lane in voice.lanes:
            if lane.seat is not None and self.slots is not None:
                if keeps:
                    self._keep(lane)
                self.slots.close(lane.seat)
                lane.seat = None

    def _keep(self, lane: Lane) -> None:
        """Remember what a lane has read, for the next text that begins alike."""
        assert self.slots is not None
        seat, slots, row = _seat(lane), self.slots, lane.voice.row
        ids = [*row.prompt, *lane.voice.writing.ids][: slots.n_tokens(seat)]
        self.reuse.keep(lane.scope, ids, lambda first, last: slots.copied(seat, first, last))


def _seat(lane: Lane) -> Seat:
    if lane.seat is None:
        raise RuntimeError(f"{lane.voice.row.ask.id} has no seat")
    return lane.seat
