"""Before and after: every number, and what base and run answered to the same prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from toolkit.card import Compared
from toolkit.report.markup import EMPTY, answer_table, folded, joined, paragraph, section, table, under, user_text
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, lang_name, metric_name, shortened, within

N_OPEN = 6  # answers of a language that are shown at once
N_MOST = 60  # and of those that are folded
PROMPT, ANSWER = 400, 1200  # signs


def before_and_after(seen: Seen) -> Markup:
    """Numbers in a table, answers side by side."""
    rows = seen.numbers
    simple = within(seen.after, "baselines")
    has_before = any(row.before is not None for row in rows if row.metric not in simple)
    return section(
        "before-after",
        Say("Before and after", "학습 전과 후") if has_before else Say("Measured", "측정값"),
        paragraph(judged_by(seen)),
        _numbers(seen.name, [row for row in rows if row.metric not in simple], has_before),
        number_table(
            Say("What simple methods reach on the same talk", "같은 대화에서 간단한 방법이 얻는 값"),
            Say("value", "값"),
            [row for row in rows if row.metric in simple],
            has_before=False,
        ),
        _answers(seen, has_before=bool(seen.samples(seen.before))),
    )


def judged_by(seen: Seen) -> Say:
    """What the numbers are of."""
    parts = within(seen.facts, "data", "parts")
    n = seen.n_judged_by
    if not n:
        return Say("No talk was held out, so no loss was measured.", "따로 남겨 둔 대화가 없어 손실을 재지 않았습니다.")
    if parts.get("test"):
        return Say(
            f"Losses are of {n:,} held-out conversations that nothing was learned or chosen by.",
            f"손실은 학습에도 선택에도 쓰지 않은 대화 {n:,}개로 쟀습니다.",
        )
    return Say(
        f"Losses are of the {n:,} conversations that were watched while learning: a little too good.",
        f"손실은 검증에 쓴 대화 {n:,}개로 쟀으므로 실제보다 조금 좋게 나옵니다.",
    )


def _numbers(name: str, rows: Sequence[Compared], has_before: bool) -> Markup:
    """Of all languages together, and of each in a fold; what is of one language alone stands with all."""
    together = {row.metric for row in rows if not row.lang}
    main = [row for row in rows if not row.lang or row.metric not in together]
    rest = [row for row in rows if row not in main]
    caption = Say("Numbers before and after", "학습 전후의 수치") if has_before else Say("Numbers", "수치")
    by_language = number_table(Say("By language", "언어별"), name, rest, has_before)
    return Markup('<div class="beside">{}{}</div>').format(number_table(caption, name, main, has_before), by_language)


def number_table(caption: Say, name: Words, rows: Sequence[Compared], has_before: bool) -> Markup:
    """A number a row: before, after and, where lower is better, the change."""
    head: list[Words] = [Say("metric", "지표")]
    head += [Say("base", "베이스"), name, Say("change", "변화")] if has_before else [name]
    lines: list[list[Words]] = []
    for row in rows:
        title: Words = metric_name(row.metric)
        if row.lang:
            title = joined([title, Markup(" <small>{}</small>").format(lang_name(row.lang))])
        before, after, change = row.texts()
        mark = "good" if change.startswith("-") else "bad" if change.startswith("+") else ""
        moved = Markup('<span class="{}">{}</span>').format(mark, change.replace("-", "−")) if change else EMPTY
        lines.append([title, before, after, moved] if has_before else [title, after])
    return table(caption, head, lines)


def _answers(seen: Seen, *, has_before: bool) -> Markup:
    old = {one.get("name"): one for one in seen.samples(seen.before)}
    by_lang: dict[str, list[Mapping[str, Any]]] = {}
    for one in seen.samples(seen.after):
        by_lang.setdefault(str(one.get("lang") or ""), []).append(one)
    if not by_lang:
        return EMPTY
    parts: list[Markup] = []
    for lang, answers in by_lang.items():
        columns = [{one.get("name"): one for one in answers}]
        names: list[Words] = [seen.name]
        if has_before:
            columns, names = [old, *columns], [Say("base", "베이스"), *names]
        parts.append(side_by_side(lang, answers, names, columns))
    says = Say("Answers to the same prompts", "같은 질문에 대한 대답")
    return under(says, joined(parts))


def side_by_side(
    lang: str,
    prompts: Sequence[Mapping[str, Any]],
    names: Sequence[Words],
    columns: Sequence[Mapping[Any, Mapping[str, Any]]],
) -> Markup:
    """A prompt a row, a column for each who answered; the first N_OPEN open, more of them folded."""
    title = lang_name(lang) if lang else Say("Prompts", "질문")
    head: list[Words] = [Say("prompt", "질문"), *names]

    def rows(some: Sequence[Mapping[str, Any]]) -> list[list[Words]]:
        return [
            [_said(one.get("prompt"), one, PROMPT), *(_answer(of.get(one.get("name"))) for of in columns)]
            for one in some
        ]

    more = prompts[N_OPEN:N_MOST]
    n_left = len(prompts) - N_MOST
    tail = paragraph(Say(f"{n_left:,} more stand in samples.md.", f"{n_left:,}개가 samples.md에 더 있습니다."), "note")
    shown, rest = answer_table(title, head, rows(prompts[:N_OPEN])), answer_table(title, head, rows(more))
    says = Say(f"{len(more)} more", f"{len(more)}개 더") + " · " + title
    return joined([shown, folded(says, rest, tail if n_left > 0 else EMPTY) if more else EMPTY])


def _answer(one: Mapping[str, Any] | None) -> Markup:
    if one is None:
        return EMPTY
    cut = Markup('<small class="flag">{}</small>').format(Say("not ended", "끝나지 않음"))
    said = _said(one.get("answer"), one, ANSWER) if one.get("answer") else _nothing()
    return joined([said, EMPTY if ended(one) else cut])


def _nothing() -> Markup:
    return Markup('<small class="flag">{}</small>').format(Say("said nothing", "아무 말도 하지 않음"))


def ended(one: Mapping[str, Any]) -> bool:
    """Whether an answer ended by itself."""
    return bool(one.get("finish", "stop") == "stop")


def _said(text: Any, one: Mapping[str, Any], most: int) -> Markup:
    return user_text(shortened("" if text is None else text, most), one.get("lang"))
