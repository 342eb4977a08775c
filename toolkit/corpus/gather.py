"""From what a recipe says about data to three sets of clean talk: the door of this folder for the pipeline."""

import tempfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from toolkit.corpus.clean import DUPLICATES, CleanReport, clean_talks
from toolkit.corpus.load import MAX_PROBLEMS, load_numbered
from toolkit.corpus.near import Ints
from toolkit.corpus.split import draw
from toolkit.corpus.store import Talks
from toolkit.corpus.talk import Talk
from toolkit.errors import DataError, MaltuError, Problem
from toolkit.recipe.model import Data

TRAIN, VALID, TEST = 0, 1, 2
REMEDIES = {
    "empty": "rows without words; take them out, or check that data.format names the right columns",
    "one_sided": "no question with an answer after it; check the roles, or use format text for running text",
    "too_few_turns": "fewer turns than data.clean.min_turns; lower it, or join the rows of one conversation",
    "exact_duplicate": "the same conversation stood there before; fine, unless the export wrote rows twice",
    "near_duplicate": "almost the same as an earlier one; raise data.clean.near_duplicates, or null to keep them",
}


def _nowhere() -> Ints:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Corpus:
    """Talk to learn from, to watch while learning, and to judge by at the end; and what cleaning did to all of it.

    entry: for each talk to learn from, the place in data.train of the file that it came from (of duplicates the first).
    entry_valid, entry_test: the same for talk that is held out; -1 where it came from a file named for that alone.
    """

    train: Talks
    valid: Talks
    test: Talks
    report: CleanReport
    entry: Ints = field(repr=False, compare=False)
    entry_valid: Ints = field(repr=False, compare=False, default_factory=_nowhere)
    entry_test: Ints = field(repr=False, compare=False, default_factory=_nowhere)


def gather(data: Data, seed: int, workdir: Path | None) -> Corpus:
    """Load, clean and split what the recipe names.

    Shares of data.train go to valid and test by cluster (split.py). Files named for valid or test are held out whole,
    and what is a duplicate of theirs by data.clean is dropped from train (test before valid before train); looser
    resemblance between given files is left alone. Temporary files lie in `workdir` and vanish by themselves.
    Raises: DataError with every bad row; where nothing is left of a part that is asked for; and where more than
    data.clean.max_dropped of the talks loaded had to be dropped (duplicates are no damage and do not count).
    MaltuError where temporary files find no room.
    """
    came_from, entry = array("b"), array("q")
    try:
        cleaned = clean_talks(_load(data, came_from, entry), data.clean, workdir)
    except OSError as error:  # what goes wrong while the user's files are read is a problem of theirs already
        place = workdir or tempfile.gettempdir()
        says = f"{place}: temporary files for many talks cannot be written there ({error.strerror or error})"
        raise MaltuError(f"{says}. Make room there, about three times the size of the data") from error
    _refuse_damage(cleaned.report, data.clean.max_dropped)
    part = np.frombuffer(came_from, dtype=np.int8).astype(np.int64)[cleaned.origin]
    learned = np.flatnonzero(part == TRAIN)
    _refuse_empty(data, part, cleaned.report)
    drawn_from = np.where(part == TRAIN, np.asarray(entry, dtype=np.int64)[cleaned.origin], -1)
    shares = (_share(data.valid), _share(data.test))
    part[learned] = draw(cleaned.talks.select(learned), cleaned.report.cluster[learned], shares, seed)
    train, valid, test = (cleaned.talks.select(part == number) for number in (TRAIN, VALID, TEST))
    entries = (drawn_from[part == number] for number in (TRAIN, VALID, TEST))
    return Corpus(train, valid, test, cleaned.report, *entries)


def _share(held: float | Sequence[str]) -> float:
    return float(held) if isinstance(held, float | int) else 0.0


def _load(data: Data, came_from: "array[int]", entry: "array[int]") -> Iterator[Talk]:
    """Talks of test, valid and train files in this order, so that of duplicates the held-out one is kept."""
    problems: list[Problem] = []
    for number, files in ((TEST, data.test), (VALID, data.valid), (TRAIN, data.train_files)):
        if isinstance(files, float | int):
            continue
        try:
            for place, talk in load_numbered(files, data.format, data.system):
                came_from.append(number)
                entry.append(place)
                yield talk
        except DataError as error:
            problems.extend(error.problems)
            if len(problems) >= MAX_PROBLEMS:
                break
    if problems:
        raise DataError("data", problems)


def _refuse_damage(report: CleanReport, max_dropped: float) -> None:
    if report.damaged > max_dropped * report.loaded:
        says = (
            f"{report.damaged} of {report.loaded} conversations ({report.damaged / report.loaded:.1%}) had to be "
            f"dropped, more than {max_dropped:.1%}. Mend the data, or raise data.clean.max_dropped{_table(report)}"
        )
        raise DataError("data", [Problem("data.clean.max_dropped", says)])


def _refuse_empty(data: Data, part: Ints, report: CleanReport) -> None:
    named = ((TRAIN, "train", data.train_files), (VALID, "valid", data.valid), (TEST, "test", data.test))
    for number, key, files in named:
        if not isinstance(files, float | int) and not (part == number).any():
            says = f"nothing is left of {', '.join(files)} after cleaning{_table(report)}"
            raise DataError("data", [Problem(f"data.{key}", says)])


def _table(report: CleanReport) -> str:
    """What was dropped, a line for each reason with its remedy and its first example; duplicates last."""
    reasons = sorted(report.dropped, key=lambda reason: (reason in DUPLICATES, -report.dropped[reason]))
    lines = (
        (f"{report.dropped[reason]:>7,} {reason}: {REMEDIES[reason]}", report.examples[reason][0]) for reason in reasons
    )
    return "".join(f"\n      {line}\n              such as {example}" for line, example in lines)
