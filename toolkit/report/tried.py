"""A search: how it went, what mattered, each parameter alone, and what ending poor trials early saved."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from toolkit.report.chart import Line, chart
from toolkit.report.markup import EMPTY, bars, inline_code, joined, paragraph, section, table, under
from toolkit.report.scale import Point
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, counted, number, percent, shortened, span, told, within, within_list

TRIAL = Say("trial", "시도")
LOSS = Say("held-out loss (nats a token)", "검증 손실(토큰당 nat)")
# Columns of trials.csv that are no keys of a recipe.
NOT_KEYS = {
    "number", "state", "loss", "lowest_loss", "best_step", "steps", "steps_planned", "seconds", "n_tokens",
    "parameters", "memory_mb", "started", "ended", "again_of", "reason",
}  # fmt: skip
MOST_SLICES = 9
MOST_CATEGORIES = 12
DONE = Say("trained to the end", "끝까지 학습한 시도")
EARLY = Say("ended early, at its lowest", "일찍 끝낸 시도(최저값)")


def search_section(seen: Seen) -> Markup:
    """All of it; nothing where the run was no search."""
    facts = within(seen.facts, "search")
    if not facts:
        return EMPTY
    link = Markup('<p><a href="search/plots.html">{}</a></p>').format(
        Say(
            "Larger plots, and every trial's curve: search/plots.html",
            "더 큰 그림과 시도마다의 곡선: search/plots.html",
        )
    )
    has_plots = (seen.path / "search" / "plots.html").exists()
    return section(
        "search",
        Say("Search", "탐색"),
        paragraph(_lead(facts)),
        paragraph(_saved(facts)) if number(within(facts, "steps").get("saved_by_pruning")) else EMPTY,
        _best(facts),
        _history(seen.trials),
        _importances(facts),
        _slices(seen.trials),
        _kinds(facts),
        link if has_plots else EMPTY,
    )


def _lead(facts: Mapping[str, Any]) -> Say:
    from toolkit.search.words import say_lead, say_loss  # here: loads optuna

    counts, best = within(facts, "trials"), within(facts, "best")
    n_ended = counted(sum(int(number(counts.get(state)) or 0) for state in ("complete", "pruned", "failed")))
    time, done = span(facts.get("seconds")), counted(counts.get("complete"))
    korean = f"{time.ko} 동안 {n_ended}번 시도해 {done}번을 끝까지 학습했습니다."
    if best:
        korean += f" 가장 나은 {best.get('number')}번 시도의 검증 손실은 {say_loss(best['loss'])}입니다."
    return Say(say_lead(facts), korean)


def _saved(facts: Mapping[str, Any]) -> Say:
    from toolkit.search.words import say_saved  # here: loads optuna

    steps = within(facts, "steps")
    n, planned, share = (
        counted(steps.get("saved_by_pruning")),
        counted(steps.get("planned")),
        percent(steps.get("saved_share")),
    )
    return Say(
        say_saved(facts), f"가망 없는 시도를 일찍 끝내 계획한 {planned}단계 가운데 {n}단계({share})를 아꼈습니다."
    )


def _best(facts: Mapping[str, Any]) -> Markup:
    best = within_list(facts, "best_trials")
    keys = list(dict.fromkeys(key for one in best for key in within(one, "values")))
    head: list[Words] = [TRIAL, LOSS, *(inline_code(key) for key in keys), Say("time", "시간")]
    rows: list[list[Words]] = [
        [
            counted(one.get("number")),
            told(one.get("loss"), 4),
            *(_value(within(one, "values").get(key)) for key in keys),
            span(one.get("seconds")),
        ]
        for one in best
    ]
    return table(Say("The best trials", "가장 나은 시도"), head, rows)


def _value(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else shortened(value, 60)


def _history(trials: Sequence[Mapping[str, str]]) -> Markup:
    done, early = _points(trials, "complete"), _points(trials, "pruned")
    best = list(itertools.accumulate(done, lambda so_far, one: (one[0], min(so_far[1], one[1]))))
    if not done and not early:
        return EMPTY
    if best:
        last = max(x for x, _ in (*done, *early))
        best = best if best[-1][0] == last else [*best, (last, best[-1][1])]
    lines = [
        Line(Say("best so far", "그때까지의 최저"), best, 2, "stairs"),
        Line(EARLY, early, 4, "rings"),
        Line(DONE, done, 1, "dots"),
    ]
    low = min(y for _, y in (done or early))
    caption = Say(
        f"{len(done)} trials trained to the end and {len(early)} ended early; the lowest loss is {low:.4f}.",
        f"끝까지 학습한 시도 {len(done)}번, 일찍 끝낸 시도 {len(early)}번. 가장 낮은 손실은 {low:.4f}입니다.",
    )
    return under(
        Say("How the search went", "탐색의 진행"), chart([one for one in lines if one.points], TRIAL, LOSS, caption)
    )


def _points(trials: Sequence[Mapping[str, str]], state: str, key: str = "number") -> list[Point]:
    """(value of a column, loss) of the trials in a state."""
    found = (
        (parsed(one.get(key)), parsed(one.get("loss") or one.get("lowest_loss")))
        for one in trials
        if one.get("state") == state
    )
    return [(x, y) for x, y in found if x is not None and y is not None]


def parsed(text: str | None) -> float | None:
    """The finite number that a cell holds, or None."""
    try:
        return number(float(text or ""))
    except ValueError:
        return None


def _importances(facts: Mapping[str, Any]) -> Markup:
    found = {key: share for key, of in within(facts, "importances").items() if (share := number(of)) is not None}
    note = str(facts.get("importances_note") or "")
    korean = "대략의 순서일 뿐, 정밀한 값은 아닙니다." if found else "무엇이 중요했는지 말하기에는 시도가 모자랍니다."
    told_note = paragraph(Say(note, korean), "note") if note else EMPTY
    caption = Say("Share of what tells good trials from all trials", "좋은 시도를 가르는 데 차지하는 비중")
    shown = [percent(share) for share in found.values()]
    drawn = bars(caption, (Say("parameter", "매개변수"), Say("share", "비중")), found, shown)
    return under(Say("What mattered", "무엇이 중요했나"), drawn, told_note)


def _slices(trials: Sequence[Mapping[str, str]]) -> Markup:
    """The loss over the values of each parameter that took more than one."""
    keys = [key for key in (trials[0] if trials else {}) if key not in NOT_KEYS]
    drawn = [found for key in keys if (found := _slice(trials, key))]
    if not drawn:
        return EMPTY
    return under(
        Say("Each parameter alone", "매개변수 하나씩"),
        Markup('<div class="panels">{}</div>').format(joined(drawn[:MOST_SLICES])),
    )


def _slice(trials: Sequence[Mapping[str, str]], key: str) -> Markup:
    known = [one for one in trials if one.get(key) and one.get("state") in ("complete", "pruned")]
    values = list(dict.fromkeys(one[key] for one in known))
    if len(values) < 2:
        return EMPTY
    numbers = {value: parsed(value) for value in values}
    is_numeric = all(found is not None for found in numbers.values())
    categories: list[str] = []
    if not is_numeric or len(values) <= 5:
        categories = sorted(values, key=lambda value: (numbers[value] or 0.0, value))[:MOST_CATEGORIES]
        places = {value: str(at) for at, value in enumerate(categories)}
        known = [{**one, key: places[one[key]]} for one in known if one[key] in places]
    done, early = _points(known, "complete", key), _points(known, "pruned", key)
    lines = [Line(EARLY, early, 4, "rings"), Line(DONE, done, 1, "dots")]
    best = min(done, key=lambda point: point[1], default=None)
    caption = Say(f"{key}: {len(done) + len(early)} trials", f"{key}: 시도 {len(done) + len(early)}번")
    if best is not None:
        at = categories[int(best[0])] if categories else f"{best[0]:.4g}"
        caption = caption + Say(f", best at {at}.", f", {at}에서 가장 낮습니다.")
    return chart(
        [line for line in lines if line.points],
        Say(key, key),
        LOSS,
        caption,
        categories=[shortened(value, 16) for value in categories],
        may_be_log=True,
        is_small=True,
    )


def _kinds(facts: Mapping[str, Any]) -> Markup:
    head = (
        Say("kind", "종류"),
        LOSS,
        TRIAL,
        Say("trainable parameters", "학습되는 파라미터"),
        Say("time", "시간"),
        Say("memory of the adapter (MB)", "어댑터의 메모리(MB)"),
        Say("trials", "시도"),
    )
    rows: list[list[Words]] = [
        [
            shortened(one.get("kind"), 60),
            told(one.get("loss"), 4),
            counted(one.get("number")),
            counted(one.get("parameters")),
            span(one.get("seconds")),
            counted(one.get("memory_mb")),
            counted(one.get("ended")),
        ]
        for one in within_list(facts, "kinds")
    ]
    return table(Say("Kinds of adapter compared", "어댑터 종류 비교"), head, rows)
