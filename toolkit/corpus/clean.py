"""Talks made fit to learn from, and an account of what was done to them.

In this order: text to its normal form, turns put in order, private data masked, exact duplicates dropped, near
duplicates clustered and dropped. Streams: the talks kept go to a spool (store.py), in a file when they are many.
"""

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from toolkit.corpus.near import Ints, find_near
from toolkit.corpus.private import mask
from toolkit.corpus.row import cut
from toolkit.corpus.store import Spool, Talks
from toolkit.corpus.talk import Role, Talk, Turn
from toolkit.corpus.tidy import language_of, settle, tidy_text
from toolkit.recipe.model import Clean

LOOSE = 0.7  # similarity from which talks stay on the same side of a split
MAX_EXAMPLES = 3
DUPLICATES = ("exact_duplicate", "near_duplicate")
PRIVATE_ROLES: Mapping[str, frozenset[Role]] = {
    "none": frozenset(),
    "user": frozenset({"user", "text"}),
    "all": frozenset({"system", "user", "assistant", "text"}),
}


@dataclass(frozen=True)
class CleanReport:
    """What cleaning did.

    dropped: talks by reason (tidy.settle names them; exact_duplicate, near_duplicate). fixed: talks by what was done to
    their turns. masked: pieces of private data by rule. examples: up to MAX_EXAMPLES dropped talks by reason, as
    `file:line: text`. cluster: for each talk kept, the number of its cluster of similar talks, from 0 without gaps.
    """

    loaded: int
    kept: int
    dropped: Mapping[str, int]
    fixed: Mapping[str, int]
    masked: Mapping[str, int]
    examples: Mapping[str, tuple[str, ...]]
    cluster: Ints = field(repr=False, compare=False)

    @property
    def damaged(self) -> int:
        """Talks dropped because something is wrong with them. Duplicates do not count: one of each is still there."""
        return sum(number for reason, number in self.dropped.items() if reason not in DUPLICATES)


@dataclass(frozen=True)
class Cleaned:
    """The talks kept, in order, and the report; origin[i] is the place that talk i had among the talks that came in."""

    talks: Talks
    report: CleanReport
    origin: Ints = field(repr=False, compare=False)


def clean_talks(talks: Iterable[Talk], options: Clean, workdir: Path | None) -> Cleaned:
    """Clean talks as the recipe says; of duplicates the first is kept.

    `near_duplicates` (a similarity from 0.5 to 1) drops all but the first of each cluster of talks at least that
    similar; null drops none. Either way talks that are LOOSE similar or more (or as similar as that threshold, if it is
    lower) get the same cluster number, so that no split tears them apart. `mask_private: user` masks user turns and
    running text, and in the other turns of that talk the same values where they are repeated.
    Cost: about 0.1 ms a talk. Memory: at most MEMORY_MB of store.py for talks, and some 100 bytes for each.
    """
    sieve = _Sieve(options, workdir)
    for talk in talks:
        sieve.take(talk)
    kept = sieve.spool.finish()
    strict = options.near_duplicates
    near = find_near(kept, min(LOOSE, strict or LOOSE), strict, workdir)
    is_first = near.strict == np.arange(len(kept))
    for place in np.flatnonzero(~is_first).tolist():
        sieve.drop(kept[place], "near_duplicate")
    kept = kept.select(is_first)
    cluster = np.unique(near.loose[is_first], return_inverse=True)[1].astype(np.int64)
    report = CleanReport(
        loaded=sieve.n_taken,
        kept=len(kept),
        dropped=dict(sieve.dropped),
        fixed=dict(sieve.fixed),
        masked=dict(sieve.masked),
        examples={reason: tuple(shown) for reason, shown in sieve.examples.items()},
        cluster=cluster,
    )
    return Cleaned(kept, report, np.asarray(sieve.origin, dtype=np.int64)[is_first])


class _Sieve:
    """What is counted while talks go by one at a time."""

    def __init__(self, options: Clean, workdir: Path | None) -> None:
        self.options, self.spool = options, Spool(workdir)
        self.n_taken = 0
        self.origin = array("q")
        self.dropped, self.fixed, self.masked = Counter[str](), Counter[str](), Counter[str]()
        self.examples: dict[str, list[str]] = {}
        self._seen: set[int] = set()

    def take(self, talk: Talk) -> None:
        """Clean one talk; keep it or count why not."""
        place, self.n_taken = self.n_taken, self.n_taken + 1
        tidy = [replace_content(turn, tidy_text(turn.content, self.options.unicode)) for turn in talk.turns]
        settled = settle(tidy, self.options.min_turns)
        reason = settled.reason
        if reason is None and not settled.turns:
            reason = "empty"
        if reason is not None:
            self.drop(talk, reason)
            return
        lang = talk.lang or language_of(" ".join(turn.content for turn in settled.turns))
        turns, masked = self._mask(settled.turns, lang == "ko")
        label = None if talk.label is None else tidy_text(talk.label, self.options.unicode)
        clean = replace(talk, turns=turns, lang=lang, label=label)
        if self.options.duplicates == "exact" and self._is_repeated(clean):
            self.drop(talk, "exact_duplicate")
            return
        self.fixed.update(settled.fixed)
        self.masked.update(masked)
        self.origin.append(place)
        self.spool.add(clean)

    def drop(self, talk: Talk, reason: str) -> None:
        """Count a talk out, and remember the first few."""
        self.dropped[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(f"{talk.source}: {cut(' / '.join(turn.content for turn in talk.turns), 100)}")

    def _mask(self, turns: tuple[Turn, ...], is_korean: bool) -> tuple[tuple[Turn, ...], Counter[str]]:
        roles = PRIVATE_ROLES[self.options.mask_private]
        found = {place: mask(turn.content, is_korean) for place, turn in enumerate(turns) if turn.role in roles}
        values = frozenset[str]().union(*(masked.values for masked in found.values()))
        if not values:
            return turns, Counter()
        for place, turn in enumerate(turns):
            if place not in found:
                found[place] = mask(turn.content, is_korean, only=values)
        counts = Counter[str]()
        for masked in found.values():
            counts.update(masked.counts)
        return tuple(replace_content(turn, found[place].text) for place, turn in enumerate(turns)), counts

    def _is_repeated(self, talk: Talk) -> bool:
        """Whether the same turns were taken before (by 64-bit hash: by chance in one of 37 million corpora)."""
        parts = "\x1e".join(f"{turn.role}\x1f{turn.content}" for turn in talk.turns)
        digest = int.from_bytes(hashlib.blake2b(parts.encode(), digest_size=8).digest())
        if digest in self._seen:
            return True
        self._seen.add(digest)
        return False


def replace_content(turn: Turn, content: str) -> Turn:
    """The turn with this content; the turn itself where it is the same."""
    return turn if content == turn.content else Turn(turn.role, content)
