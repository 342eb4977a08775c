"""What a careful reader would doubt in a combination and in a search."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from toolkit.report.seen import Seen
from toolkit.report.words import Say, counted, number, percent, shortened, told, within

ALONE = 0.9  # of a gate's load
MISSED = 0.6  # accuracy of a router
UNHEARD = 0.1  # of an expert's own texts
EDGE = 0.03  # of the range, from its end
FAILED = 0.2  # of all trials


def of_combination(seen: Seen) -> Iterator[Say]:
    """It does not help, a member is not best on its own talk, a router guesses, or one expert has it all."""
    combination = within(seen.facts, "combination")
    verdict = within(combination, "verdict")
    if verdict and not verdict.get("helps"):
        best = shortened(verdict.get("best"), 80)
        hurts = bool(verdict.get("hurts"))
        sure = "" if hurts else " beyond chance"
        korean = "합치면 하나만 쓸 때보다 나빠집니다" if hurts else "합쳐서 나아졌다고 보기 어렵습니다"
        yield Say(
            f"The combination does not help{sure}: {best} alone has {told(verdict.get('of_best'), 4)}, all together"
            f" {told(verdict.get('of_combination'), 4)}.",
            f"{korean}. {best} 하나만 쓰면 {told(verdict.get('of_best'), 4)}, 합치면"
            f" {told(verdict.get('of_combination'), 4)}입니다.",
        )
    yield from _not_at_home(combination)
    report = within(combination, "report")
    accuracy = number(within(report, "after 1").get("accuracy"))
    if accuracy is not None and accuracy < MISSED:
        yield Say(
            f"After one user turn the router finds the right expert in {percent(accuracy)} of texts.",
            f"사용자가 한 번 말한 뒤에 라우터가 맞는 전문가를 고르는 비율은 {percent(accuracy)}입니다.",
        )
    yield from _never_chosen(report)
    load = {name: of for name, value in within(report, "load").items() if (of := number(value)) is not None}
    heaviest = max(load, key=lambda name: load[name], default=None)
    if heaviest is not None and len(load) > 1 and load[heaviest] > ALONE:
        yield Say(
            f"The gate gives {shortened(heaviest, 80)} {percent(load[heaviest])} of the weight: the others hardly"
            " speak.",
            f"게이트가 {shortened(heaviest, 80)}에 가중치의 {percent(load[heaviest])}를 몰아줍니다. 나머지는 거의"
            " 쓰이지 않습니다.",
        )


def _never_chosen(report: Mapping[str, Any]) -> Iterator[Say]:
    """Experts to whom the router hardly ever sends what is theirs."""
    rows = within(report, "all").get("confusion") or ()
    for at, (name, row) in enumerate(zip(report.get("labels") or (), rows, strict=False)):  # no row of "other"
        counts = [number(n) or 0.0 for n in row]
        own, n_all = math.fsum(counts[at : at + 1]), math.fsum(counts)
        if n_all and own / n_all < UNHEARD:
            yield Say(
                f"The router sends {shortened(name, 80)} only {counted(own)} of the {counted(n_all)} texts that are its"
                " own. Give it more talk, or talk that sounds different.",
                f"라우터가 {shortened(name, 80)}의 글 {counted(n_all)}개 가운데 {counted(own)}개만 제 전문가에게"
                " 보냅니다. 대화를 더 모으거나, 다른 전문가와 더 뚜렷이 다른 대화를 주세요.",
            )


def _not_at_home(combination: Mapping[str, Any]) -> Iterator[Say]:
    for owner, of in within(combination, "on").items():
        losses = {name: loss for name, value in within(of).items() if (loss := number(value)) is not None}
        others = {name: loss for name, loss in losses.items() if name not in (owner, "combination")}
        if owner in losses and others and min(others.values()) < losses[owner]:
            better = min(others, key=lambda name: others[name])
            yield Say(
                f"On {shortened(owner, 80)}'s own talk {shortened(better, 80)} is better"
                f" ({told(others[better], 3)} against {told(losses[owner], 3)}).",
                f"{shortened(owner, 80)}의 대화인데도 {shortened(better, 80)} 쪽이 더 낫습니다"
                f"(손실 {told(others[better], 3)} 대 {told(losses[owner], 3)}).",
            )


def of_search(seen: Seen) -> Iterator[Say]:
    """The best value lies at the end of its range, or many trials failed."""
    search = within(seen.facts, "search")
    counts = within(search, "trials")
    n_failed = number(counts.get("failed")) or 0.0
    n_all = sum(number(counts.get(state)) or 0.0 for state in ("complete", "pruned", "failed"))
    if n_all and n_failed / n_all > FAILED:
        yield Say(
            f"{counted(n_failed)} of {counted(n_all)} trials failed; the reasons stand in search/trials.csv.",
            f"시도 {counted(n_all)}번 가운데 {counted(n_failed)}번이 실패했습니다. 이유는 search/trials.csv에"
            " 있습니다.",
        )
    for key, value in within(search, "best", "values").items():
        low, high = (number(seen.recipe.get(f"search.space.{key}.{end}")) for end in ("low", "high"))
        found = number(value)
        if low is None or high is None or found is None or not low < high:
            continue
        is_log = bool(seen.recipe.get(f"search.space.{key}.log")) and low > 0 and found > 0
        at = math.log(found / low) / math.log(high / low) if is_log else (found - low) / (high - low)
        if at < EDGE or at > 1 - EDGE:
            end = Say("lower", "아래") if at < EDGE else Say("upper", "위")
            yield Say(
                f"The best {key} ({found:.4g}) lies at the {end.en} end of its range: look beyond it.",
                f"{key}: 가장 나은 값({found:.4g})이 범위의 {end.ko}쪽 끝에 있습니다. 범위를 넓혀 보세요.",
            )
