"""The talk that a run learned from: what was read, kept and dropped, how long and how spoken it is."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from toolkit.report.markup import EMPTY, bars, joined, paragraph, section, table
from toolkit.report.seen import Seen
from toolkit.report.words import Say, Words, counted, lang_name, number, percent, reason_name, told, within

PARTS: Mapping[str, Say] = {
    "train": Say("to learn from", "학습용"),
    "valid": Say("to watch while learning", "검증용(학습 중에 점검)"),
    "test": Say("to judge by at the end", "평가용(끝에 한 번)"),
}
ROLES: Mapping[str, Say] = {
    "system": Say("system", "시스템"),
    "user": Say("user", "사용자"),
    "assistant": Say("assistant", "어시스턴트"),
    "text": Say("running text", "글"),
}


def data_section(seen: Seen) -> Markup:
    """What became of every conversation."""
    data = within(seen.facts, "data")
    if not data:
        return EMPTY
    loaded, kept = counted(data.get("loaded")), counted(data.get("kept"))
    lead = Say(f"{loaded} conversations were read and {kept} kept.", f"대화 {loaded}개를 읽어 {kept}개를 남겼습니다.")
    return section("data", Say("Data", "데이터"), paragraph(lead), _parts(data), _left_out(data), _manner(data))


def _parts(data: Mapping[str, Any]) -> Markup:
    lengths = within(data, "tokens")
    columns = ("median", "nine_in_ten", "longest", "total")
    has_lengths = any(within(lengths, part) for part in PARTS)
    head: list[Words] = [Say("part", "용도"), Say("conversations", "대화")]
    if has_lengths:
        head += [Say("median tokens", "토큰 중앙값"), Say("9 in 10 up to", "90 %까지"), Say("longest", "최대")]
        head += [Say("tokens in all", "토큰 합계")]
    rows: list[list[Words]] = []
    for part, says in PARTS.items():
        n = within(data, "parts").get(part)
        own = [counted(within(lengths, part).get(column)) for column in columns] if has_lengths else []
        rows.append([says, counted(n), *own])
    return table(Say("How it was shared out", "나눈 결과"), head, rows)


def _left_out(data: Mapping[str, Any]) -> Markup:
    kinds = (
        ("dropped", Say("Dropped", "버린 것")),
        ("fixed", Say("Mended", "고친 것")),
        ("masked", Say("Masked", "가린 것")),
    )
    rows = []
    for kind, says in kinds:
        found = {reason_name(reason): n for reason, of in within(data, kind).items() if (n := number(of))}
        shown = [counted(n) for n in found.values()]
        rows.append(bars(says, (Say("reason", "이유"), Say("how many", "개수")), found, shown))
    if not any(rows):
        return paragraph(Say("Nothing was dropped.", "버린 것이 없습니다."))
    return joined(rows)


def _manner(data: Mapping[str, Any]) -> Markup:
    """How spoken each role's turns are, where it was scored."""
    roles = within(data, "spoken")
    langs = [lang for lang in ("ko", "en") if any(number(within(of, lang).get("n")) for of in roles.values())]
    if not langs:
        return EMPTY
    rows: list[list[Words]] = []
    for role in roles:
        own = [within(roles, role, lang) for lang in langs]
        told_of = [
            f"{told(of.get('mean'), 2)} ({percent(of.get('share'))})" if number(of.get("n")) else "" for of in own
        ]
        rows.append([ROLES.get(role, Say(role, role)), *told_of])
    caption = Say(
        "How spoken it is, from 0 (written) to 1 (spoken), and the share of turns that are spoken",
        "얼마나 입말다운가(0은 글말, 1은 입말), 괄호 안은 입말인 발화의 비율",
    )
    return table(caption, [Say("role", "역할"), *(lang_name(lang) for lang in langs)], rows)
