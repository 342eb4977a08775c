"""`compare RUN RUN… [--out FILE.html]`: several runs side by side, in the terminal and as a page; of one run alone its
report is written again.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from toolkit import bundle, disk
from toolkit.errors import InputError, Problem

if TYPE_CHECKING:
    from toolkit.report.seen import Seen

OUT = Path("compare.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """compare RUN RUN… [--out FILE.html]."""
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders; of one its report")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.html",
        help=f"where the page goes (default: {OUT}; of one run, its report.html)",
    )


def compare(arguments: argparse.Namespace) -> int:
    """Read every run first, so that one that is damaged leaves everything as it was. Returns the exit code.

    Raises: InputError for a run that is named twice, or a file that is there and is no page of Maltu; RunError for
    what is no finished run; DiskError.
    """
    from toolkit.report.seen import see
    from toolkit.report.several import several_page
    from toolkit.report.write import REPORT, report_page

    console = Console(highlight=False)
    _refuse_twice(arguments.runs)
    seen = [see(bundle.open_run(path)) for path in arguments.runs]
    alone = len(seen) == 1
    out = arguments.out or (seen[0].path / REPORT if alone else OUT)
    _refuse_foreign(out)
    page = report_page(seen[0]) if alone else several_page(seen, out)
    disk.make_folder(out.parent)
    disk.write_text(out, page)
    if not alone:
        show(seen, console)
    console.print(f"{out}: written.", markup=False, soft_wrap=True)
    return 0


def _refuse_twice(paths: list[Path]) -> None:
    places = [path.resolve() for path in paths]
    twice = sorted({str(path) for path, place in zip(paths, places, strict=True) if places.count(place) > 1})
    if twice:
        raise InputError("compare", [Problem(path, "is named twice. Name each run once.") for path in twice])


def _refuse_foreign(out: Path) -> None:
    """A file of the user's is not written over."""
    from toolkit.report.page import GENERATOR

    if out.is_dir():
        raise InputError("compare", [Problem(f"--out {out}", "is a folder. Name a file in it: --out FOLDER/page.html")])
    if out.exists() and GENERATOR not in out.read_text(encoding="utf-8", errors="replace")[:2000]:
        says = "is there already and is no page of Maltu. Name another file, or move it away."
        raise InputError("compare", [Problem(f"--out {out}", says)])


def show(seen: Sequence["Seen"], console: Console) -> None:
    """Print why numbers may not compare, the numbers, and the keys in which the recipes differ."""
    from toolkit.report.several import best_of, cautions, differences, names_of, numbers_of, written

    names = names_of(seen)
    doubts = cautions(seen)
    table = Table("", *(Column(escape(name), justify="right", overflow="fold") for name in names))
    for (metric, lang), row in numbers_of(seen).items():
        best = best_of(seen, metric, row)
        cells = ["" if of is None else of.texts()[1] for of in row]
        cells = [f"[bold]{cell}[/bold]" if at == best else cell for at, cell in enumerate(cells)]
        table.add_row(escape(f"{metric} {lang}".strip()), *cells)
    console.print(table)
    found = differences(seen)
    if found:
        recipes = Table(*(Column(escape(title), overflow="fold") for title in ("recipe key", *names)))
        for key in found:
            recipes.add_row(escape(key), *map(escape, written(seen, key)))
        console.print(recipes)
    else:
        console.print("Their recipes say the same.")
    for caution in doubts:
        console.print(caution.en, markup=False, soft_wrap=True)
