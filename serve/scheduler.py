"""Whose turn it is: pure policy over tickets, without tensors, threads or clocks. serve/engines/rows.py obeys it.

Admission. A free slot goes to the model with the fewest running answers, then to the one whose last turn is longest
ago, then to the request that came first. A request whose keys and values do not fit beside those that run is overtaken
by what fits, but at most PATIENCE times; then the slots empty until it fits.
Steps. A step is one token for everybody who writes, and one chunk of prompts for those who are still being read: small
while most are writing, so that a long prompt stalls nobody, large while most wait to be read. Chunks go to the shortest
rest of a prompt and to the oldest request by turns: the short are not kept waiting, the long are not starved. Answers
on models of their own get their tokens by turns, one a step. A request may be several rows (one for each member of a
mixture or a vote): they run together or not at all, and count as rows wherever rows are counted.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

PATIENCE = 16
_FIRST_GUESS_S = 2.0  # how long an answer takes, before one was seen


@dataclass(frozen=True)
class Limits:
    """n_slots: answers that run side by side. n_queue: requests that may wait. n_cells: rows times their longest
    length that the cache may hold (one row always fits). chunk, small_chunk: prompt tokens read in a step.
    """

    n_slots: int = 32
    n_queue: int = 64
    n_cells: int = 2**16
    chunk: int = 256
    small_chunk: int = 64


@dataclass(eq=False)
class Ticket:
    """What is known here of a request. n_columns: what it may come to need, prefix and longest answer counted.

    is_alone: it runs on a model of its own, apart from the rows. n_rows: how many slots it takes, fewer once some of
    its rows are over. n_read: how much of its prompt has been read, by each of its rows.
    """

    model: str
    n_prompt: int
    n_columns: int
    is_alone: bool = False
    n_rows: int = 1
    n_read: int = 0
    n_overtaken: int = 0

    @property
    def n_left(self) -> int:
        """What of its prompt is still to be read."""
        return self.n_prompt - self.n_read


@dataclass(frozen=True)
class Step:
    """What runs now. reading: who is read, and how many tokens further. alone: one answer at most, in its turn."""

    writing: tuple[Ticket, ...]
    reading: tuple[tuple[Ticket, int], ...]
    alone: Ticket | None


class Scheduler:
    """See the head of this file. Not for several threads at once."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []
        self._last_turn: dict[str, int] = {}
        self._n_turns = 0
        self._n_steps = self._n_chunks = 0
        self._mean_s = _FIRST_GUESS_S

    @property
    def n_rows(self) -> int:
        """Slots that are taken."""
        return sum(ticket.n_rows for ticket in self.running)

    def is_full(self, n_coming: int = 0) -> bool:
        """Whether a new request finds no room, with `n_coming` on their way here."""
        n_taken = len(self.waiting) + self.n_rows + n_coming
        return n_taken >= self.limits.n_slots + self.limits.n_queue

    def retry_after_s(self, n_coming: int = 0) -> int:
        """When it is worth coming again: what waits, at the pace of the answers so far; 1 to 60."""
        turns = (len(self.waiting) + n_coming + 1) / self.limits.n_slots
        return min(60, max(1, math.ceil(turns * self._mean_s)))

    def join(self, ticket: Ticket) -> None:
        """A request waits from now on."""
        self.waiting.append(ticket)

    def leave(self, ticket: Ticket, took_s: float | None = None) -> None:
        """A request is over, wherever it stood. took_s: how long it took, for an answer that ran to its end."""
        for place in (self.waiting, self.running):
            if ticket in place:
                place.remove(ticket)
        if took_s is not None:
            self._mean_s += 0.2 * (took_s - self._mean_s)

    def admit(self) -> tuple[Ticket, ...]:
        """Who runs from now on."""
        admitted: list[Ticket] = []
        while self.waiting and self.n_rows < self.limits.n_slots:
            ticket = self._next()
            if ticket is None:
                break
            self.waiting.remove(ticket)
            self.running.append(ticket)
            self._n_turns += 1
            self._last_turn[ticket.model] = self._n_turns
            admitted.append(ticket)
        return tuple(admitted)

    def step(self) -> Step:
        """What runs now, of those who were admitted."""
        self._n_steps += 1
        rows = [ticket for ticket in self.running if not ticket.is_alone]
        alone = [ticket for ticket in self.running if ticket.is_alone]
        writing = tuple(ticket for ticket in rows if not ticket.n_left)
        return Step(
            writing=writing,
            reading=self._chunk([ticket for ticket in rows if ticket.n_left], len(writing)),
            alone=alone[self._n_steps % len(alone)] if alone else None,
        )

    def _next(self) -> Ticket | None:
        """The next to be admitted, or None where nobody fits."""
        overdue = next((ticket for ticket in self.waiting if ticket.n_overtaken >= PATIENCE), None)
        if overdue is not None:
            return overdue if self._fits(overdue) else None
        n_running = Counter(ticket.model for ticket in self.running)
        order = sorted(self.waiting, key=lambda ticket: (n_running[ticket.model], self._last_turn.get(ticket.model, 0)))
        for place, ticket in enumerate(order):
            if self._fits(ticket):
                for passed in order[:place]:
                    passed.n_overtaken += 1
                return ticket
        return None

    def _fits(self, ticket: Ticket) -> bool:
        """Whether slots and memory are left for it; a request that is larger than both runs by itself."""
        if not self.running:
            return True
        if self.n_rows + ticket.n_rows > self.limits.n_slots:
            return False
        beside = [one for one in self.running if not one.is_alone]
        if ticket.is_alone or not beside:
            return True
        rows = [ticket, *beside]
        n_cells = sum(one.n_rows for one in rows) * max(one.n_columns for one in rows)
        return n_cells <= self.limits.n_cells

    def _chunk(self, unread: list[Ticket], n_writing: int) -> tuple[tuple[Ticket, int], ...]:
        """Who is read now, and how far: the first as far as it goes, and beside it whoever makes good use of a chunk
        that is padded to its longest.
        """
        if not unread:
            return ()
        self._n_chunks += 1
        budget = self.limits.chunk if len(unread) > n_writing else self.limits.small_chunk
        if self._n_chunks % 2:
            unread = sorted(unread, key=lambda ticket: ticket.n_left)
        rows = unread[:1]
        width = least = min(unread[0].n_left, max(1, budget // unread[0].n_rows))
        n_rows = unread[0].n_rows
        for n_tickets, ticket in enumerate(unread[1:], 2):
            n_rows += ticket.n_rows
            if n_rows * least > budget:
                break
            wider = min(max(ticket.n_left for ticket in unread[:n_tickets]), budget // n_rows)
            if _worth(unread[:n_tickets], wider) > _worth(rows, width):
                rows, width = unread[:n_tickets], wider
        return tuple((ticket, min(ticket.n_left, width)) for ticket in rows)


def _worth(tickets: Sequence[Ticket], width: int) -> int:
    """The tokens that a chunk of this width reads, less its padding."""
    return sum(ticket.n_rows * (2 * min(ticket.n_left, width) - width) for ticket in tickets)
