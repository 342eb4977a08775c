"""What a careful reader would doubt in a run: each a sentence that says what was seen and what to try."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from toolkit.report.answers import ended
from toolkit.report.doubts_of_many import of_combination, of_search
from toolkit.report.seen import Seen
from toolkit.report.words import Say, counted, lang_name, metric_name, number, percent, reason_name, told, within

FEW = 30  # held-out conversations
DROPPED = 0.02
ROSE = 1.02  # times the lowest held-out loss
UNENDED = 0.05
REPEATED = 0.05
SAME = 0.3  # of all answers
SLID = 0.1  # of spoken sentences
DUPLICATES = ("exact_duplicate", "near_duplicate")


def doubts_of(seen: Seen) -> list[Say]:
    """Everything suspicious, the gravest first; empty where nothing is."""
    rules: tuple[Callable[[Seen], Iterator[Say]], ...] = (
        _worse,
        of_combination,
        _curve,
        _rising,
        _answers,
        _baselines,
        _spoken,
        _held_out,
        _dropped,
        of_search,
    )
    return [doubt for rule in rules for doubt in rule(seen)]


def _worse(seen: Seen) -> Iterator[Say]:
    """The held-out loss is above that of the base."""
    for row in seen.numbers:
        if row.metric not in ("loss", "bits per byte") or row.before is None or row.after is None:
            continue
        if row.after > row.before:
            metric, lang = metric_name(row.metric), lang_name(row.lang)
            yield Say(
                f"{metric.en} rose from {told(row.before)} to {told(row.after)} ({lang.en}): the run is worse than"
                " its base"
                " there. Look at the data, or try a smaller learning rate.",
                f"베이스보다 나빠진 지표가 있습니다. {metric.ko}, {lang.ko}: {told(row.before)} → {told(row.after)}."
                " 데이터를 살펴보거나 학습률을 낮춰 보세요.",
            )


def _curve(seen: Seen) -> Iterator[Say]:
    fit, watched = within(seen.facts, "fit"), seen.points("valid_loss")
    if not watched:
        return
    best = number(fit.get("best_step"))
    if fit.get("stopped") == "early" and best is not None and best == watched[0][0]:
        yield Say(
            "It stopped early with the very first evaluation as its best: it learned too fast, or the data says little"
            " about what is held out. Try a smaller learning rate.",
            "첫 점검이 가장 좋았고 더 나아지지 않아 일찍 멈췄습니다. 너무 빨리 배웠거나, 학습 데이터가 검증용 대화와"
            " 닮지 않았습니다. 학습률을 낮춰 보세요.",
        )
    elif watched[-1][1] > ROSE * min(loss for _, loss in watched):
        low = min(loss for _, loss in watched)
        yield Say(
            f"The held-out loss rose again, from {low:.3f} to {watched[-1][1]:.3f} at the end. What is kept is the best"
            " step; fewer epochs would do.",
            f"검증 손실이 내려갔다가 다시 올랐습니다(가장 낮을 때 {low:.3f}, 끝에서 {watched[-1][1]:.3f}). 저장한 것은"
            " 가장 좋았던 단계입니다. 에폭을 줄여도 됩니다.",
        )


def _rising(seen: Seen) -> Iterator[Say]:
    learned = seen.points("loss")
    n = len(learned) // 5
    if n:
        first, last = (sum(y for _, y in part) / n for part in (learned[:n], learned[-n:]))
        if last > ROSE * first:
            yield Say(
                f"The loss rose while learning, from about {first:.2f} to {last:.2f}: the learning rate is too high.",
                f"배우는 동안 손실이 {first:.2f}쯤에서 {last:.2f}쯤으로 올랐습니다. 학습률이 너무 높습니다.",
            )


def _answers(seen: Seen) -> Iterator[Say]:
    said = seen.samples(seen.after)
    if not said:
        return
    unended = sum(not ended(one) for one in said) / len(said)
    if unended > UNENDED:
        yield Say(
            f"{percent(unended)} of the answers do not end by themselves.",
            f"대답의 {percent(unended)}가 스스로 끝나지 않습니다.",
        )
    empty = sum(not str(one.get("answer") or "").strip() for one in said) / len(said)
    if empty > UNENDED:
        yield Say(f"{percent(empty)} of the answers are empty.", f"대답의 {percent(empty)}가 비어 있습니다.")
    text, n = Counter(" ".join(str(one.get("answer")).split()) for one in said).most_common(1)[0]
    if len(said) >= 5 and text and n / len(said) > SAME:
        yield Say(
            f"{n} of {len(said)} prompts got the same answer: the run has collapsed onto it.",
            f"질문 {len(said)}개 가운데 {n}개에 똑같이 대답했습니다. 대답이 하나로 굳어 버렸습니다.",
        )
    rows = {row.metric: row for row in seen.numbers if not row.lang}
    repeated = rows.get("repetition")
    if repeated is not None and (repeated.after or 0.0) > max(REPEATED, repeated.before or 0.0):
        yield Say(
            f"Answers repeat themselves ({percent(repeated.after)} of their 4-grams).",
            f"대답이 같은 말을 되풀이합니다(4-gram의 {percent(repeated.after)}).",
        )


def _baselines(seen: Seen) -> Iterator[Say]:
    """A simple method that learned from the same talk does as well."""
    for name, value in within(seen.after, "baselines").items():
        simple, _, metric = str(name).rpartition(" accuracy")
        own = number(within(seen.after, "accuracy").get("all"))
        found = number(value)
        if simple and not metric and own is not None and found is not None and found >= own:
            yield Say(
                f"{simple} alone reaches an accuracy of {told(found)}, and this run {told(own)}.",
                f"{simple}만으로도 정확도가 {told(found)}이고, 이 실행은 {told(own)}입니다.",
            )


def _spoken(seen: Seen) -> Iterator[Say]:
    before, after = (number(within(of, "spoken sentences").get("all")) for of in (seen.before, seen.after))
    if before is not None and after is not None and after < before - SLID:
        yield Say(
            f"Answers slid into written style: {percent(after)} of their sentences are spoken, and {percent(before)}"
            " before.",
            f"대답이 글말투로 기울었습니다. 입말 문장이 {percent(before)}에서 {percent(after)}로 줄었습니다.",
        )


def _held_out(seen: Seen) -> Iterator[Say]:
    parts = within(seen.facts, "data", "parts")
    n = seen.n_judged_by
    if not n:
        yield Say(
            "No talk was held out, so nothing tells whether it got better. Set data.test.",
            "남겨 둔 대화가 없어 나아졌는지 알 수 없습니다. data.test를 정하세요.",
        )
    elif n < FEW:
        yield Say(
            f"Only {n} held-out conversation{'s' * (n != 1)}: differences between such numbers may be chance. Hold"
            " out more (data.test).",
            f"남겨 둔 대화가 {n}개뿐이라 숫자의 차이가 우연일 수 있습니다. 더 남겨 두세요(data.test).",
        )
    if n and not parts.get("test"):
        yield Say(
            "data.test is 0: what was watched while learning is the judge too, so numbers are a little too good.",
            "data.test가 0이라 검증용 대화로 쟀습니다. 숫자가 실제보다 조금 좋게 나옵니다.",
        )


def _dropped(seen: Seen) -> Iterator[Say]:
    data = within(seen.facts, "data")
    loaded = number(data.get("loaded")) or 0.0
    dropped: Mapping[str, Any] = {
        reason: n for reason, of in within(data, "dropped").items() if (n := number(of)) and reason != "old_turns"
    }
    total = sum(dropped.values())
    if not loaded or total <= DROPPED * loaded:
        return
    most = max(dropped, key=lambda reason: dropped[reason])
    name = reason_name(most)
    harmless = all(reason in DUPLICATES for reason in dropped)
    yield Say(
        f"{percent(total / loaded, 1)} of the conversations were dropped, most of them as: {name.en}"
        f" ({counted(dropped[most])})." + (" Duplicates do no harm; a file may be named twice." if harmless else ""),
        f"대화의 {percent(total / loaded, 1)}를 버렸고, 가장 많은 이유는 '{name.ko}'입니다({counted(dropped[most])}개)."
        + (" 중복은 해가 되지 않습니다. 파일을 두 번 적었는지 보세요." if harmless else ""),
    )
