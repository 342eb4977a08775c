"""Several runs side by side: what differs in their recipes, numbers, curves over one another, answers in columns."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from toolkit.card import Compared
from toolkit.report.answers import side_by_side
from toolkit.report.asked import value_text
from toolkit.report.chart import N_COLORS, Line, chart
from toolkit.report.cost import cost_rows
from toolkit.report.doubts import doubts_of
from toolkit.report.learned import LOSS, STEP
from toolkit.report.markup import EMPTY, folded, inline_code, joined, paragraph, section, table, under
from toolkit.report.page import Tile, page
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, counted, lang_name, metric_name, same, shortened, within

# What decides which talk is held out, besides the files.
OF_THE_SPLIT = ("data.valid", "data.test", "data.clean", "data.format", "data.system", "train.seed")
NOT_COMPARED = ("name",)
OF_TOKENS = ("loss", "content loss")  # compare only where tokenizers do
LOW_IS_BEST = (*OF_TOKENS, "bits per byte", "log loss", "calibration error", "repetition")
HIGH_IS_BEST = ("accuracy", "macro f1", "chrf", "bleu", "rouge", "ended")


def names_of(seen: Sequence[Seen]) -> list[str]:
    """A name for each that tells it from the others: its own, or as much of its path as that takes."""
    parts = [one.path.resolve().parts for one in seen]
    found = []
    for own, one in zip(parts, seen, strict=True):
        others = [other for other in parts if other is not own]
        n = next((n for n in range(1, len(own)) if not any(other[-n:] == own[-n:] for other in others)), len(own))
        found.append(one.name if n == 1 and one.name == own[-1] else "/".join(own[-n:]))
    return found


def cautions(seen: Sequence[Seen]) -> list[Say]:
    """Why numbers of these runs may not be compared; empty where they may."""
    found = []
    if len({one.task for one in seen}) > 1:
        found.append(Say("The runs are for different tasks.", "실행마다 작업이 다릅니다."))
    if len({_held_out(one) for one in seen}) > 1:
        found.append(
            Say(
                "Numbers are not comparable: the runs were judged by different held-out talk. Give them the same data,"
                " shares and seed.",
                "숫자를 견줄 수 없습니다. 평가에 쓴 대화가 서로 다릅니다. 데이터와 비율, 시드를 같게 맞추세요.",
            )
        )
    if len({_base(one) for one in seen}) > 1:
        found.append(
            Say(
                "The bases differ: losses a token compare only where tokenizers are the same; bits per byte always do.",
                "베이스가 다릅니다. 토큰당 손실은 토크나이저가 같을 때만 견줄 수 있고, 1바이트당 비트는 언제나 됩니다.",
            )
        )
    lengths = {within(one.facts, "plan").get("max_length") for one in seen}
    if len(lengths) > 1:
        found.append(
            Say(
                "The longest row differs (max_length), so long conversations may have been cut or dropped differently.",
                "가장 긴 줄(max_length)이 달라, 긴 대화를 다르게 자르거나 버렸을 수 있습니다.",
            )
        )
    return found


def _base(seen: Seen) -> str:
    return str(within(seen.facts, "inputs").get("base"))


def _held_out(seen: Seen) -> str:
    """The same for runs that are judged by the same talk."""
    files = sorted(
        (name, str(digest))
        for name, digest in within(seen.facts, "inputs", "data").items()
        if not name.startswith("run ") and name != seen.recipe.get("evaluate.prompts")
    )
    keys = sorted((key, str(of)) for key, of in seen.recipe.items() if key.startswith(OF_THE_SPLIT))
    parts = within(seen.facts, "data", "parts")
    return repr((files, keys, parts.get("valid"), parts.get("test")))


def differences(seen: Sequence[Seen]) -> dict[str, list[Any]]:
    """The recipe keys in which they differ, in the order of the recipes, with the value of each."""
    keys = dict.fromkeys(key for one in seen for key in one.recipe)
    found = {key: [one.recipe.get(key) for one in seen] for key in keys if key not in NOT_COMPARED}
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def written(seen: Sequence[Seen], key: str) -> list[str]:
    """What each recipe has under a key; nothing for those that do not have it."""
    return [value_text(one.recipe[key]) if key in one.recipe else "" for one in seen]


def numbers_of(seen: Sequence[Seen]) -> dict[tuple[str, str], list[Compared | None]]:
    """(metric, language): what each run came to."""
    each = [{(row.metric, row.lang): row for row in one.numbers} for one in seen]
    return {key: [of.get(key) for of in each] for key in dict.fromkeys(key for of in each for key in of)}


def are_judged_alike(seen: Sequence[Seen]) -> bool:
    """Whether the runs do the same task and were judged by the same talk."""
    return len({(one.task, _held_out(one)) for one in seen}) == 1


def best_of(seen: Sequence[Seen], metric: str, row: Sequence[Compared | None]) -> int | None:
    """Which of the runs is best by a number; None where that cannot be told, or several are."""
    if not are_judged_alike(seen) or (metric in OF_TOKENS and len({_base(one) for one in seen}) > 1):
        return None
    is_low = metric in LOW_IS_BEST
    values = {at: of.after for at, of in enumerate(row) if of is not None and of.after is not None}
    if not (is_low or metric.startswith(HIGH_IS_BEST)) or len(values) < 2:
        return None
    best = min(values.values()) if is_low else max(values.values())
    first = [at for at, value in values.items() if value == best]
    return first[0] if len(first) == 1 else None


def several_page(seen: Sequence[Seen], out: Path) -> str:
    """The page of several runs; links to their own pages are relative to `out`."""
    names = names_of(seen)
    sections = [
        _cautions(seen),
        _numbers(seen, names),
        _curves(seen, names),
        _answers(seen, names),
        _differences(seen, names),
        _costs(seen, names),
        _doubts(seen, names),
        _links(seen, names, out),
    ]
    n = len(seen)
    title = " · ".join(shortened(name, 40) for name in names[:4]) + (f" … (+{n - 4})" if n > 4 else "")
    return page(title, Say(f"{n} runs of Maltu side by side", f"Maltu 실행 {n}개 비교"), _tiles(seen, names), sections)


def _tiles(seen: Sequence[Seen], names: Sequence[str]) -> list[Tile]:
    """Who is best by what counts most; nothing where numbers do not compare."""
    tiles: list[Tile] = []
    for (metric, lang), row in numbers_of(seen).items():
        at = best_of(seen, metric, row)
        won = None if at is None else row[at]
        if at is not None and won is not None and not lang and metric in ("loss", "bits per byte", "accuracy", "chrf"):
            tiles.append((metric_name(metric), won.texts()[1], shortened(names[at], 60)))
    return tiles


def _cautions(seen: Sequence[Seen]) -> Markup:
    items = [Markup("<li>{}</li>").format(caution) for caution in cautions(seen)]
    body = Markup("<ul>{}</ul>").format(joined(items)) if items else EMPTY
    return section("doubts", Say("Before you compare", "비교하기 전에"), body)


def _numbers(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    rows = numbers_of(seen)
    together = {metric for metric, lang in rows if not lang}
    main = {key: row for key, row in rows.items() if not key[1] or key[0] not in together}
    rest = {key: row for key, row in rows.items() if key not in main}
    says = Say("The best of a row is bold.", "행마다 가장 나은 값이 굵은 글씨입니다.")
    by_language = Say("By language", "언어별")
    return section(
        "numbers",
        Say("Numbers", "수치"),
        paragraph(says, "note") if are_judged_alike(seen) else EMPTY,
        _number_table(Say("What each run came to", "실행별 값"), seen, names, main),
        folded(by_language, _number_table(by_language, seen, names, rest)),
    )


def _number_table(
    caption: Say,
    seen: Sequence[Seen],
    names: Sequence[str],
    rows: Mapping[tuple[str, str], Sequence[Compared | None]],
) -> Markup:
    lines: list[list[Words]] = []
    for (metric, lang), row in rows.items():
        best = best_of(seen, metric, row)
        texts = ["" if of is None else of.texts()[1] for of in row]
        title = (
            joined([metric_name(metric), Markup(" <small>{}</small>").format(lang_name(lang))])
            if lang
            else metric_name(metric)
        )
        lines.append(
            [title, *(Markup("<b>{}</b>").format(text) if at == best else text for at, text in enumerate(texts))]
        )
    return table(caption, [Say("metric", "지표"), *(shortened(name, 60) for name in names)], lines)


def _curves(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    """Held-out losses over one another, then those of learning."""
    drawn = []
    for metric, says in (
        ("valid_loss", Say("Held-out loss while learning", "학습 중의 검증 손실")),
        ("loss", Say("Loss while learning", "학습 손실")),
    ):
        lines = [
            Line(shortened(name, 60), one.points(metric), at + 1, is_dashed=at >= N_COLORS)
            for at, (one, name) in enumerate(zip(seen, names, strict=True))
        ]
        lines = [line for line in lines if line.points]
        ends = ", ".join(f"{same(line.name).en} {line.points[-1][1]:.3f}" for line in lines)
        caption = says + Say(f"; at the end: {ends}.", f". 끝에서: {ends}.")
        drawn.append(under(says, chart(lines, STEP, LOSS, caption)))
    bare = [name for one, name in zip(seen, names, strict=True) if not one.points("loss")]
    told = ", ".join(shortened(name, 60) for name in bare)
    note = Say(
        f"No curve of one adapter alone: {told}. How it went there stands in its own report.",
        f"어댑터 하나의 곡선이 없는 실행: {told}. 그 실행의 보고서에서 볼 수 있습니다.",
    )
    if bare and any(drawn):
        drawn.append(paragraph(note, "note"))
    return section("curves", Say("How the loss went", "손실 곡선"), *drawn)


def _answers(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    """Prompts that were answered by more than one of them; a column a run."""
    columns = [{one.get("name"): one for one in of.samples(of.after)} for of in seen]
    asked: dict[Any, Mapping[str, Any]] = {}
    for column in columns:
        for name, one in column.items():
            asked.setdefault((name, one.get("prompt")), one)
    by_lang: dict[str, list[Mapping[str, Any]]] = {}
    for (name, prompt), one in asked.items():
        if sum(column.get(name, {}).get("prompt") == prompt for column in columns) > 1:
            by_lang.setdefault(str(one.get("lang") or ""), []).append(one)
    shown = [shortened(name, 60) for name in names]
    drawn = [side_by_side(lang, prompts, shown, columns) for lang, prompts in by_lang.items()]
    return section("answers", Say("Answers to the same prompts", "같은 질문에 대한 대답"), *drawn)


def _differences(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    found = differences(seen)
    rows: list[list[Words]] = [[inline_code(key), *written(seen, key)] for key in found]
    head: list[Words] = [Say("key", "키"), *(shortened(name, 60) for name in names)]
    nothing = paragraph(Say("Their recipes say the same.", "레시피가 모두 같습니다."))
    caption = Say("Keys in which the recipes differ", "레시피에서 값이 다른 키")
    return section(
        "recipes",
        Say("What differs in their recipes", "레시피의 차이"),
        table(caption, head, rows, texts=len(head)) if rows else nothing,
    )


def _costs(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    each = [cost_rows(one) for one in seen]
    titles: dict[str, Words] = {}
    for rows in each:
        titles |= {same(title).en if isinstance(title, Say | str) else title: title for title, _ in rows}
    known = [
        {same(title).en if isinstance(title, Say | str) else title: value for title, value in rows} for rows in each
    ]
    lines: list[list[Words]] = [[titles[key], *(of.get(key, "") for of in known)] for key in titles]
    head: list[Words] = [Say("what", "항목"), *(shortened(name, 60) for name in names)]
    note = Say(
        "Energy is an estimate: 10 W for each CPU thread or 300 W for a GPU while training. Times compare only on the"
        " same machine.",
        "에너지는 추정입니다. 학습하는 동안 CPU 스레드마다 10 W, GPU는 300 W로 쳤습니다. 시간은 같은 컴퓨터에서만"
        " 견줄 수 있습니다.",
    )
    return section(
        "cost",
        Say("Cost", "비용"),
        table(Say("What each took", "실행별로 들어간 자원"), head, lines),
        paragraph(note, "note"),
    )


def _doubts(seen: Sequence[Seen], names: Sequence[str]) -> Markup:
    parts = []
    for one, name in zip(seen, names, strict=True):
        items = [Markup("<li>{}</li>").format(doubt) for doubt in doubts_of(one)]
        parts.append(under(shortened(name, 80), Markup("<ul>{}</ul>").format(joined(items)) if items else EMPTY))
    return section("each", Say("Worth a second look in each", "실행별로 살펴볼 점"), *parts)


def _links(seen: Sequence[Seen], names: Sequence[str], out: Path) -> Markup:
    rows: list[list[Words]] = []
    for one, name in zip(seen, names, strict=True):
        own = one.path / "report.html"
        where = quote(Path(os.path.relpath(own.resolve(), out.resolve().parent)).as_posix())
        link = Markup('<a href="{}">report.html</a>').format(where) if own.exists() else EMPTY
        learned = counted(within(one.facts, "data", "parts").get("train"))
        command = inline_code(str(one.facts.get("command", "")))
        rows.append([shortened(name, 80), learned, command, link])
    head = (Say("run", "실행"), Say("learned from", "학습한 대화"), Say("command", "명령"), Say("its page", "보고서"))
    return section(
        "runs", Say("The runs", "비교한 실행"), table(Say("Where they come from", "실행의 출처"), head, rows, texts=4)
    )
