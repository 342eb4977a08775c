"""report.html of a run: what was asked, what came of it, what it cost, and what to doubt."""

from markupsafe import Markup

from toolkit import disk
from toolkit.bundle import Run
from toolkit.card import Compared
from toolkit.report.answers import before_and_after
from toolkit.report.asked import asked_section, use_section
from toolkit.report.cost import cost_section, per_second
from toolkit.report.data import data_section
from toolkit.report.doubts import doubts_of
from toolkit.report.labels import labels_section
from toolkit.report.learned import curves_section
from toolkit.report.markup import joined, section
from toolkit.report.members import experts_section
from toolkit.report.page import Tile, page
from toolkit.report.seen import Seen, see
from toolkit.report.tried import search_section
from toolkit.report.words import Say, counted, metric_name, number, percent, shortened, span, within

REPORT = "report.html"
N_TILES = 5
SHOWN_FIRST = ("loss", "bits per byte", "accuracy", "log loss")


def write_report(run: Run) -> None:
    """Write report.html of a finished run into its folder, whole or not at all.

    Raises: RunError for a run that is not finished or damaged; DiskError.
    """
    disk.write_text(run.path / REPORT, report_page(see(run)))


def report_page(seen: Seen) -> str:
    """The page of one run."""
    sections = [
        doubts_section(seen),
        before_and_after(seen),
        labels_section(seen),
        curves_section(seen),
        experts_section(seen),
        search_section(seen),
        data_section(seen),
        asked_section(seen),
        cost_section(seen),
        use_section(seen),
    ]
    return page(seen.name, _says(seen), tiles_of(seen), sections)


def _says(seen: Seen) -> Say:
    base = shortened(within(seen.facts, "base").get("model", "?"), 80)
    version = within(seen.facts, "surroundings", "versions").get("maltu", "")
    when = str(seen.facts.get("updated", ""))[:10]
    return Say(
        f"A run of Maltu {version} on {base}, finished {when}",
        f"베이스 {base}, Maltu {version}, {when}에 끝난 실행",
    )


def doubts_section(seen: Seen) -> Markup:
    """What to doubt, as a list; nothing where there is nothing."""
    items = [Markup("<li>{}</li>").format(doubt) for doubt in doubts_of(seen)]
    body = Markup("<ul>{}</ul>").format(joined(items)) if items else Markup("")
    return section("doubts", Say("Worth a second look", "살펴볼 점"), body)


def tiles_of(seen: Seen) -> list[Tile]:
    """The few numbers that say most."""
    rows = {row.metric: row for row in seen.numbers if not row.lang}
    tiles = [_tile(rows[metric]) for metric in SHOWN_FIRST if metric in rows]
    ended = rows.get("ended")
    if ended is not None:
        before = Say(f"base {percent(ended.before)}", f"베이스 {percent(ended.before)}")
        tiles.append((metric_name("ended"), percent(ended.after), "" if ended.before is None else before))
    fit = within(seen.facts, "fit")
    if number(fit.get("seconds")) is not None:
        rate = per_second(seen)
        below = Say(f"{rate} tokens a second", f"초당 {rate}토큰") if rate else Say("", "")
        tiles.append((Say("training", "학습"), span(fit.get("seconds")), below))
    parts = within(seen.facts, "data", "parts")
    learned = counted(parts.get("train"))
    n = counted(seen.n_judged_by)
    tiles.append((Say("learned from", "학습한 대화"), learned, Say(f"judged by {n}", f"{n}개로 평가")))
    return tiles[:N_TILES]


def _tile(row: Compared) -> Tile:
    before, after, change = row.texts()
    mark = "good" if change.startswith("-") else "bad"
    moved = Markup(' <span class="{}">{}</span>').format(mark, change.replace("-", "−"))
    base = Say(f"base {before}", f"베이스 {before}") if before else Say("", "")
    return metric_name(row.metric), after, joined([base, moved if change else ""])
