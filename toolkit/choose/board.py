"""The leaderboard: everything that was found, as JSON, as Markdown and in the terminal."""

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from toolkit.bases.fetch import is_folder_name
from toolkit.choose.about import About
from toolkit.choose.rank import LEAST_TALKS, MANY, Place, Ranking
from toolkit.choose.table import Table
from toolkit.disk import stamp
from toolkit.fit.inputs import surroundings
from toolkit.recipe.model import Candidates, Lora, Recipe

FEW = 20  # conversations from which an interval begins to mean something
NONE = "–"
ANSWERED = ("chrf", "distinct 2", "repetition", "ended", "spoken sentences", "accuracy", "macro f1")


@dataclass(frozen=True)
class Left:
    """A candidate without a place. is_wish: it was not tried, by a filter or for lack of memory."""

    model: str
    why: str
    is_wish: bool


@dataclass(frozen=True)
class Board:
    """What a leaderboard is made of. beaten: places of an earlier, briefer round. n_kept: results of earlier calls."""

    recipe: Recipe
    command: str
    parts: dict[str, int]
    ranking: Ranking
    beaten: tuple[Place, ...]
    left: tuple[Left, ...]
    abouts: dict[str, About]
    table: Table | None
    n_kept: int
    seconds: float

    @property
    def several(self) -> Candidates:
        """The recipe's candidates."""
        assert isinstance(self.recipe.base, Candidates)  # looked at by the command
        return self.recipe.base

    @property
    def train_command(self) -> str:
        """The command that trains on the best; empty where there is none."""
        if not self.ranking.places:
            return ""
        several = self.several
        words = [f"base.model={self.ranking.places[0].result.model}"]
        words += [f"base.quantize={several.quantize}"] * (several.quantize != "none")
        words += ["base.trust_remote_code=true"] * several.trust_remote_code
        return f"python -m toolkit.train {self.command} {shlex.join(words)}"

    @property
    def verdict(self) -> str:
        """Who won, or that nobody clearly did, in a sentence or two."""
        ranking = self.ranking
        if not ranking.places:
            return "No candidate could be compared."
        best = ranking.places[0]
        if len(ranking.places) == 1:
            return f"{best.result.model} is the only one that could be compared."
        if ranking.winner is not None:
            second = ranking.places[1]
            assert second.behind is not None  # of a winner the intervals are there
            ahead = f"{second.behind.value:.3f} ({second.behind.low:.3f} to {second.behind.high:.3f})"
            return f"{best.result.model} is best: {ahead} {best.result.measure} below {second.result.model}."
        names = ", ".join(place.result.model for place in ranking.leaders[1:])
        return (
            f"No clear winner: {best.result.model} measured best, and what sets it apart from {names} may be chance on"
            f" {ranking.n_talks:,} held-out conversation{'s' if ranking.n_talks != 1 else ''}."
        )

    @property
    def notes(self) -> list[str]:
        """What a reader has to know of the figures."""
        n, found = self.ranking.n_talks, []
        if self.ranking.places and n < LEAST_TALKS:
            found.append("One held-out conversation: there is no interval. Hold out more (data.test).")
        elif self.ranking.places and n < FEW:
            found.append(
                f"Only {n} held-out conversations: intervals from so few are rough. Hold out more (data.test)."
            )
        if not self.parts["test"]:
            found.append(
                "data.test is 0: the talk that the learning rate was picked on is the judge too, so figures are a"
                " little too good."
            )
        if not isinstance(self.recipe.adapter, Lora):
            kind = self.recipe.adapter.kind
            found.append(f"The recipe's adapter is {kind}; candidates were compared with a LoRA of rank {Lora().rank}.")
        results = [place.result for place in (*self.ranking.places, *self.beaten)]
        if results and self.recipe.task != "classify" and not any(one.spoken for one in results):
            found.append(
                "How spoken they are was not measured: no pairs of spoken and written text in these languages."
            )
        if self.beaten:
            brief = self.beaten[0].result.minutes
            found.append(
                f"More than {MANY} candidates: all learned for {brief:g} minutes, and the best of them for"
                f" {self.several.minutes_each:g}. Figures of the two rounds do not compare."
            )
        if self.n_kept:
            found.append(f"{self.n_kept} results are of an earlier call; nothing they depend on has changed.")
        found += [f"{one.model}: {note}." for one in results for note in one.notes]
        return found


def to_json(board: Board) -> dict[str, Any]:
    """leaderboard.json."""
    ranking = board.ranking
    places = [_place(board, number, place) for number, place in enumerate(ranking.places, start=1)]
    beaten = [_place(board, number, place) for number, place in enumerate(board.beaten, start=1 + len(places))]
    return {
        "name": board.recipe.name,
        "task": board.recipe.task,
        "made": stamp(),
        "command": f"python -m toolkit choose {board.command}",
        "surroundings": surroundings(),
        "minutes_each": board.several.minutes_each,
        "seconds": round(board.seconds, 1),
        "talk": {**board.parts, "judged_by": "test" if board.parts["test"] else "valid", "compared": ranking.n_talks},
        "verdict": board.verdict,
        "winner": ranking.winner.result.model if ranking.winner else None,
        "leaders": [place.result.model for place in ranking.leaders],
        "train_with": board.train_command,
        "leaderboard": places,
        "beaten_in_a_briefer_round": beaten,
        "left_out": [vars(left) for left in board.left],
        "figures_of_others": None
        if board.table is None
        else {"file": board.table.file, "figures": [vars(figure) for figure in board.table.figures]},
        "notes": board.notes,
    }


def _place(board: Board, number: int, place: Place) -> dict[str, Any]:
    one, known = place.result, board.abouts[place.result.model]
    return {
        "rank": number,
        "model": one.model,
        "measure": one.measure,
        "value": _plain(place.value),
        "interval": None if place.interval is None else [_plain(place.interval.low), _plain(place.interval.high)],
        "behind": None if place.behind is None else {key: _plain(of) for key, of in vars(place.behind).items()},
        "may_be_as_good_as_the_best": place.is_tied,
        "bare_base": _plain(place.before),
        "gain_per_minute": _plain(place.gain_per_minute),
        "learned_tokens_per_s": _plain(one.learned_per_s),
        "licence": known.licence,
        "commercial": known.commercial,
        "languages": known.languages,
        **{key: of for key, of in vars(one).items() if key not in ("model", "measure", "key")},
    }


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


Rows = list[list[str]]


def measured_rows(board: Board) -> tuple[list[str], Rows]:
    """Heads and rows of what was measured, the best first."""
    places = [*board.ranking.places, *board.beaten]
    measure = places[0].result.measure if places else ""
    numbers = [name for name in ANSWERED if any(name in place.result.numbers for place in places)]
    heads = ["", "base", measure, "95 %", "bare", "gain / min", "min", "rate", "spoken", *numbers]
    rows = []
    for at, place in enumerate(places, start=1):
        one = place.result
        spoken = [one.spoken.get(f"{when} all") for when in ("before", "after")]
        rows.append(
            [
                str(at) + ("=" if place.is_tied and place in board.ranking.places else ""),
                one.model,
                f"{place.value:.3f}",
                NONE if place.interval is None else f"{place.interval.low:.3f}–{place.interval.high:.3f}",
                f"{place.before:.3f}",
                f"{place.gain_per_minute:.2f}",
                f"{one.seconds / 60:.1f}",
                f"{one.learning_rate:.1g}",
                NONE if spoken[1] is None else f"{_signed(spoken[0])} → {_signed(spoken[1])}",
                *(_number(one.numbers.get(name, {}).get("all")) for name in numbers),
            ]
        )
    return heads, rows


def cost_rows(board: Board) -> tuple[list[str], Rows]:
    """Heads and rows of what each base is and costs."""
    heads = ["base", "weights", "memory MB", "learned tokens/s", "answer tokens/s", "bytes/s", "first token ms"]
    rows = []
    for place in (*board.ranking.places, *board.beaten):
        one, known = place.result, board.abouts[place.result.model]
        rows.append(
            [
                one.model,
                f"{one.parameters / 1e6:,.1f} M",
                f"{one.memory_mb:,.0f}",
                f"{one.learned_per_s:,.0f}",
                *(
                    NONE if of is None else f"{of:,.0f}"
                    for of in (one.tokens_per_s, one.bytes_per_s, one.first_token_ms)
                ),
                known.licence or "not known",
                known.speaks,
            ]
        )
    return [*heads, "licence", "languages"], rows


def short_rows(board: Board) -> tuple[list[str], Rows]:
    """Heads and rows of what fits into a terminal."""
    _, measured = measured_rows(board)
    _, costs = cost_rows(board)
    heads = ["", "base", "bits/byte", "95 %", "gain/min", "spoken", "MB", "tokens/s"]
    if board.recipe.task == "classify":
        heads[2] = "log loss"
    both = zip(measured, costs, strict=True)
    return heads, [
        [own[0], _short(own[1]), own[2], own[3], own[5], own[8].split()[-1], of[2], of[4]] for own, of in both
    ]


def _short(model: str) -> str:
    """A folder without the way to it."""
    return PurePath(model).name if is_folder_name(model) else model


def other_rows(board: Board) -> tuple[list[str], Rows]:
    """Heads and rows of what others measured."""
    if board.table is None:
        return [], []
    table = board.table
    models = [place.result.model for place in (*board.ranking.places, *board.beaten)]
    models += [left.model for left in board.left if left.model not in models]
    return ["base", *table.benchmarks], [
        [model, *(table.cell(model, of) for of in table.benchmarks)] for model in models
    ]


def _signed(value: float | None) -> str:
    return NONE if value is None else f"{value:+.2f}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


LEGEND = """\
{measure}: on held-out talk, lower is better, comparable between tokenizers. 95 %: interval over conversations
(bootstrap). bare: the base before it learned. gain / min: by how much a minute of learning lowered it. min: minutes
learned, three learning rates side by side. rate: the best of them. spoken: by how many bits per byte spoken text comes
easier than written, before and after. = may be as good as the first."""


def to_markdown(board: Board) -> str:
    """leaderboard.md."""
    parts = [f"# Which base for {board.recipe.name}?\n\n{board.verdict}\n"]
    if board.train_command:
        parts.append(f"    {board.train_command}\n")
    told = board.parts
    parts.append(
        f"{told['train']:,} conversations to learn from, {told['valid']:,} to watch, {told['test']:,} to judge by;"
        f" compared on {board.ranking.n_talks:,}. Made by `python -m toolkit choose {board.command}`.\n"
    )
    places = [*board.ranking.places, *board.beaten]
    if places:
        parts += [_markdown(*measured_rows(board)), LEGEND.format(measure=places[0].result.measure) + "\n"]
        parts += ["## What they are and cost\n", _markdown(*cost_rows(board))]
    if board.table is not None:
        source = f" (the file names as source: {'; '.join(board.table.sources)})" if board.table.sources else ""
        parts.append(
            f"## Figures of others, from {board.table.file}\n\nNot measured here: as the file says{source}. They say"
            " nothing about your talk and took no part in the order above.\n"
        )
        parts.append(_markdown(*other_rows(board)))
    if board.left:
        listed = "\n".join(f"- {left.model}: {_line(left.why)}" for left in board.left)
        parts.append(f"## Left out\n\n{listed}\n")
    if board.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {_line(note)}" for note in board.notes) + "\n")
    return "\n".join(parts)


def _line(text: str) -> str:
    return " ".join(text.split())


def _markdown(heads: Sequence[str], rows: Rows) -> str:
    cells = [[cell.replace("|", r"\|") for cell in row] for row in (heads, *rows)]
    lines = ["| " + " | ".join(row) + " |" for row in cells]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]]) + "\n"


def show(board: Board, console: Console) -> None:
    """The leaderboard in the terminal."""
    heads, rows = short_rows(board)
    if rows:
        console.print(_rich(heads, rows))
    if board.table is not None:
        console.print(f"Figures of others, from {board.table.file}: not measured here", markup=False)
        console.print(_rich(*other_rows(board)))
    for left in board.left:
        console.print(f"left out: {left.model}: {_line(left.why)}", markup=False, soft_wrap=True)
    for note in board.notes:
        console.print(note, markup=False, soft_wrap=True)
    console.print(board.verdict, style="bold", markup=False, soft_wrap=True)


def _rich(heads: Sequence[str], rows: Rows) -> RichTable:
    table = RichTable()
    for head in heads:
        table.add_column(escape(head), justify="left" if head == "base" else "right", no_wrap=head == "base")
    for row in rows:
        table.add_row(*map(escape, row))
    return table
