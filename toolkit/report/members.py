"""Several adapters in a run: every member's numbers, whether combining them helped, and who is good at whose talk."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from toolkit.card import Compared, compared
from toolkit.report.answers import side_by_side
from toolkit.report.made import made_parts
from toolkit.report.markup import EMPTY, bars, folded, heat, joined, paragraph, section, table, under
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, counted, metric_name, number, same, shortened, span, told, within

FIRST = ("loss", "bits per byte", "accuracy", "macro f1", "log loss", "chrf", "ended", "repetition")
COMBINATION = Say("the combination", "조합")


def experts_section(seen: Seen) -> Markup:
    """Members, combination and how it was made; nothing where the run has one adapter."""
    experts, combination = within(seen.facts, "experts"), within(seen.facts, "combination")
    if not experts:
        return EMPTY
    name = f"{combination.get('kind')} ({combination.get('how')})" if combination else ""
    heading = Say(f"Experts and their {name}", f"전문가와 조합: {name}") if name else Say("Experts", "전문가")
    return section(
        "experts",
        heading,
        paragraph(_verdict(seen, combination, name), "lead"),
        _table_of_all(seen, experts, combination),
        _made_how(experts),
        _weights(combination),
        _on(combination),
        *made_parts(seen),
        _answers(seen, experts, bool(combination)),
    )


def _verdict(seen: Seen, combination: Mapping[str, Any], name: str) -> Say:
    best = shortened(seen.facts.get("best", ""), 80)
    if not combination:
        return Say(
            f"On held-out talk {best} is best; the run answers with it.",
            f"남겨 둔 대화에서 가장 나은 전문가는 {best}이고, 이 실행은 그 전문가로 대답합니다.",
        )
    found = within(combination, "verdict")
    if not found:
        return Say(
            "Whole answers were voted on: there is no loss to compare.",
            "대답 전체를 두고 투표했으므로 견줄 손실이 없습니다.",
        )
    return Say(str(found.get("sentence", "")), verdict_ko(found, name))


def verdict_ko(found: Mapping[str, Any], name: str) -> str:
    """The verdict of `ensemble.compare` in Korean, from its numbers."""
    measure = "손실" if found.get("measure") == "loss" else "틀린 비율"
    unit = "%" if found.get("measure") == "loss" else "점"
    gain, low, high = (number(found.get(key)) or 0.0 for key in ("gain", "low", "high"))
    word = (
        "도움이 됩니다"
        if found.get("helps")
        else "도움이 되지 않고 하나만 쓰는 편이 낫습니다"
        if found.get("hurts")
        else "우연을 넘어서는 도움이 되지 않습니다"
    )
    return (
        f"{name}: {word}. {measure} {told(found.get('of_combination'), 4)}, 가장 나은 구성원({found.get('best')})은"
        f" {told(found.get('of_best'), 4)}: {-100 * gain:+.1f} {unit} ({-100 * high:+.1f}~{-100 * low:+.1f}; 남겨 둔"
        f" 대화 {counted(found.get('n'))}개, 시드 하나)."
    )


def _table_of_all(seen: Seen, experts: Mapping[str, Any], combination: Mapping[str, Any]) -> Markup:
    """The base, every member and the combination: a row each."""
    measured: list[tuple[Words, Mapping[str, Any]]] = []
    if seen.before:
        measured.append((Say("base", "베이스"), seen.before))
    measured += [(shortened(name, 80), within(of, "results")) for name, of in experts.items()]
    if combination:
        measured.append((COMBINATION, seen.after))
    numbers = [{(row.metric, row.lang): row for row in compared({"after": of})} for _, of in measured]
    keys = [(metric, "") for metric in FIRST if any((metric, "") in of for of in numbers)]
    rest = [key for key in dict.fromkeys(key for of in numbers for key in of) if key not in keys]

    def shown(columns: list[tuple[str, str]], caption: Say) -> Markup:
        head: list[Words] = [Say("who", "누가")]
        head += [metric_name(metric) + (f" {lang}" if lang else "") for metric, lang in columns]
        rows: list[list[Words]] = [
            [name, *(_cell(of.get(key)) for key in columns)] for (name, _), of in zip(measured, numbers, strict=True)
        ]
        return table(caption, head, rows)

    more = Say("Every other number of each", "그 밖의 모든 수치")
    everybody = Say("Everybody on the same held-out talk", "남겨 둔 같은 대화로 모두를 잰 값")
    return joined([shown(keys, everybody), folded(more, shown(rest, more)) if rest else EMPTY])


def _cell(row: Compared | None) -> str:
    return "" if row is None or row.after is None else f"{row.after:,.4f}"


def _made_how(experts: Mapping[str, Any]) -> Markup:
    head = (
        Say("expert", "전문가"),
        Say("adapter", "어댑터"),
        Say("where from", "출처"),
        Say("steps", "단계"),
        Say("time", "시간"),
        Say("tokens", "토큰"),
        Say("lowest watched loss", "최저 검증 손실"),
    )
    rows: list[list[Words]] = []
    for name, of in experts.items():
        fit, run = within(of, "fit"), of.get("run") if isinstance(of, Mapping) else None
        origin: Words = shortened(run, 80) if run else Say("trained here", "이 실행에서 학습")
        kind = shortened(within(experts, name).get("adapter") or "", 40)
        rows.append(
            [
                shortened(name, 80),
                kind,
                origin,
                counted(fit.get("steps")),
                span(fit.get("seconds")),
                counted(fit.get("n_tokens")),
                told(fit.get("best_loss"), 4),
            ]
        )
    return folded(Say("How each was trained", "전문가별 학습"), table(head[0], head, rows, texts=3))


def _weights(combination: Mapping[str, Any]) -> Markup:
    found = {shortened(name, 80): of for name, of in within(combination, "weights").items() if number(of) is not None}
    return bars(
        Say("Weights", "가중치"),
        (Say("member", "구성원"), Say("weight", "가중치")),
        found,
        [told(of) for of in found.values()],
    )


def _on(combination: Mapping[str, Any]) -> Markup:
    """Whose talk (rows), whose loss (columns)."""
    matrix = within(combination, "on")
    if not matrix:
        return EMPTY
    columns = list(dict.fromkeys(name for of in matrix.values() for name in within(of)))
    columns = [
        *(name for name in columns if name != "combination"),
        *(name for name in columns if name == "combination"),
    ]
    values = {shortened(owner, 80): [number(of.get(name)) for name in columns] for owner, of in matrix.items()}
    shown = [[told(value, 3) for value in row] for row in values.values()]
    head = [COMBINATION if name == "combination" else same(shortened(name, 80)) for name in columns]
    caption = Say(
        "Loss on each expert's own held-out talk (rows); the darker, the lower within a row",
        "전문가별로 남겨 둔 대화(행)에서의 손실. 한 행 안에서 낮을수록 짙습니다",
    )
    oracle = number(combination.get("oracle"))
    ideal = paragraph(
        Say(
            f"With every talk answered by its own expert the loss is {told(oracle, 4)}.",
            f"대화마다 제 전문가가 답한다면 손실은 {told(oracle, 4)}입니다.",
        )
    )
    drawn = heat(caption, Say("talk of", "누구의 대화"), head, values, shown=shown, is_low_best=True)
    return under(
        Say("Who is good at whose talk", "누가 누구의 대화에 강한가"), drawn, ideal if oracle is not None else EMPTY
    )


def _answers(seen: Seen, experts: Mapping[str, Any], is_combined: bool) -> Markup:
    """What every member answered to the same prompts."""
    prompts = seen.samples(seen.after)
    if not prompts:
        return EMPTY
    names: list[Words] = [shortened(name, 80) for name in experts]
    said = [{one.get("name"): one for one in seen.samples(within(of, "results"))} for of in experts.values()]
    if is_combined:
        names, said = [*names, COMBINATION], [*said, {one.get("name"): one for one in prompts}]
    if not any(said):
        return EMPTY
    by_lang: dict[str, list[Mapping[str, Any]]] = {}
    for one in prompts:
        by_lang.setdefault(str(one.get("lang") or ""), []).append(one)
    drawn = [side_by_side(lang, some[:12], names, said) for lang, some in by_lang.items()]
    return folded(Say("What each of them answered", "각자의 대답"), joined(drawn))
