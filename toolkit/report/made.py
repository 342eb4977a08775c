"""How a combination was made, as its maker told: a router's confusions, a gate's load, a bag's own test, rounds."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from toolkit.report.chart import Line, chart
from toolkit.report.markup import EMPTY, bars, folded, heat, joined, paragraph, table, under
from toolkit.report.seen import Seen
from toolkit.report.words import (
    Say,
    Words,
    counted,
    metric_name,
    number,
    percent,
    same,
    shortened,
    told,
    within,
    within_list,
)

AFTER: Mapping[str, Say] = {
    "after 1": Say("after one user turn", "사용자가 한 번 말한 뒤"),
    "after 3": Say("after three", "세 번 말한 뒤"),
    "all": Say("all", "대화 전체"),
}


def made_parts(seen: Seen) -> list[Markup]:
    """Whatever the maker of the combination reported."""
    combination = within(seen.facts, "combination")
    report, kind = within(combination, "report"), combination.get("kind")
    makers = {"route": _router, "gate": _gate, "bag": _bag, "boost": _boost, "merge": _merge}
    own = makers[kind](report) if kind in makers and report else EMPTY
    return [own, _fitted(report)]


def _router(report: Mapping[str, Any]) -> Markup:
    parts = {name: within(report, name) for name in AFTER if within(report, name)}
    head = (
        Say("what it has heard", "들은 만큼"),
        Say("texts", "글 수"),
        Say("accuracy", "정확도"),
        Say("calibration error", "보정 오차"),
        Say("sent to nobody", "아무에게도 보내지 않음"),
    )
    rows: list[list[Words]] = [
        [
            AFTER[name],
            counted(of.get("n")),
            percent(of.get("accuracy"), 1),
            told(of.get("calibration_error")),
            percent(of.get("other"), 1),
        ]
        for name, of in parts.items()
    ]
    strangers = number(report.get("strangers sent to other"))
    note = Say(
        f"Of talk that is no expert's, {percent(strangers)} is sent to nobody.",
        f"어느 전문가의 것도 아닌 말은 {percent(strangers)}를 아무에게도 보내지 않습니다.",
    )
    labels = [shortened(label, 60) for label in report.get("labels") or ()]
    shown = list(parts.items())[-1:] + list(parts.items())[:-1]
    matrices = [
        confusion_table(of.get("confusion"), labels[: len(of.get("confusion") or ())], labels, AFTER[name])
        for name, of in shown
    ]
    return under(
        Say("The router", "라우터"),
        table(
            Say(
                "How well the router sends texts it has not learned from", "라우터가 처음 보는 글을 얼마나 잘 보내는지"
            ),
            head,
            rows,
        ),
        paragraph(note) if strangers is not None else EMPTY,
        matrices[0] if matrices else EMPTY,
        folded(Say("After fewer turns", "더 적게 들었을 때"), *matrices[1:]),
    )


def confusion_table(rows: Any, gold: list[str], given: list[str], says: Say) -> Markup:
    """Counts: a row for each true label, a column for each that was given; the darker, the more of its row."""
    if not isinstance(rows, list) or not rows or len(rows) != len(gold):
        return EMPTY
    values = {name: [number(n) for n in row] for name, row in zip(gold, rows, strict=True)}
    shown = [[counted(n) for n in row] for row in values.values()]
    caption = says + Say(": rows are the true label, columns the given one", ": 행은 정답, 열은 예측")
    return heat(caption, Say("true ╲ given", "정답 ╲ 예측"), given, values, shown=shown)


def _gate(report: Mapping[str, Any]) -> Markup:
    load = {
        shortened(name, 60): of for name, value in within(report, "load").items() if (of := number(value)) is not None
    }
    loss = within(report, "loss")
    says = Say(
        f"Held-out loss {told(loss.get('gate'), 4)} with the gate against {told(loss.get('equal'), 4)} with equal"
        f" weights; evenness {told(report.get('evenness'), 2)} (1: all alike), the largest weight of a token is"
        f" {told(report.get('top'), 2)} on average.",
        f"검증 손실은 게이트로 {told(loss.get('gate'), 4)}, 같은 가중치로 {told(loss.get('equal'), 4)}. 고른 정도는"
        f" {told(report.get('evenness'), 2)}(1이면 모두 같음), 토큰마다 가장 큰 가중치는 평균"
        f" {told(report.get('top'), 2)}입니다.",
    )
    layers = within(report, "load_by_layer")
    names = list(dict.fromkeys(name for of in layers.values() for name in within(of)))
    values = {str(layer): [number(of.get(name)) for name in names] for layer, of in layers.items()}
    by_layer = heat(
        Say("Load by layer", "층별 비중"),
        Say("layer", "층"),
        [shortened(name, 60) for name in names],
        values,
        shown=[[percent(value) for value in row] for row in values.values()],
    )
    losses = [of for value in report.get("losses") or () if (of := number(value)) is not None]
    points = [(float(at), of) for at, of in enumerate(losses, start=1)]
    curve = chart(
        [Line(Say("held-out loss", "검증 손실"), points)],
        Say("evaluation", "점검"),
        Say("held-out loss", "검증 손실"),
        Say(f"The gate's held-out loss, {len(points)} times.", f"게이트의 검증 손실을 {len(points)}번 잰 것."),
    )
    return under(
        Say("The gate", "게이트"),
        paragraph(says) if loss else EMPTY,
        bars(
            Say("Load", "비중"),
            (Say("expert", "전문가"), Say("mean weight", "평균 가중치")),
            load,
            [percent(of) for of in load.values()],
        ),
        curve if len(points) > 1 else EMPTY,
        folded(Say("Load by layer", "층별 비중"), by_layer) if len(layers) > 1 else EMPTY,
    )


def _bag(report: Mapping[str, Any]) -> Markup:
    out = within(report, "out of bag")
    rows: list[list[Words]] = []
    for name in ("accuracy", "log loss", "loss"):
        if number(out.get(name)) is not None:
            rows.append([metric_name(name), told(out.get(name), 4), told(out.get(f"{name} alone"), 4)])
    n, of, each = counted(out.get("n")), counted(out.get("of")), told(out.get("members each"), 1)
    says = Say(
        f"Each of {n} of {of} learned conversations was left to the members that had not drawn it ({each} on average).",
        f"학습용 대화 {of}개 가운데 {n}개를, 그 대화를 뽑지 않은 구성원(평균 {each}명)으로 쟀습니다.",
    )
    drawn: list[list[Words]] = [
        [shortened(name, 60), counted(within(member).get("different")), counted(within(member).get("seed"))]
        for name, member in within(report, "members").items()
    ]
    head = (Say("member", "구성원"), Say("different conversations", "서로 다른 대화"), Say("seed", "시드"))
    return under(
        Say("Out of the bag", "뽑히지 않은 대화로 재기"),
        paragraph(says) if rows else EMPTY,
        table(
            Say("By its own learned talk", "학습용 대화로 잰 값"),
            (Say("metric", "지표"), Say("the bag", "모두"), Say("one alone", "하나만")),
            rows,
        ),
        folded(Say("What each drew", "구성원별로 뽑은 것"), table(head[0], head, drawn)),
    )


def _boost(report: Mapping[str, Any]) -> Markup:
    rounds = within_list(report, "rounds")
    columns = list(
        dict.fromkeys(key for one in rounds for key in one if number(one[key]) is not None and key != "round")
    )
    rows: list[list[Words]] = [
        [counted(one.get("round")), *(told(one.get(key), 4) for key in columns)] for one in rounds
    ]
    names = {
        "error": Say("weighted error", "가중 오류"),
        "weight": Say("weight", "가중치"),
        "held-out loss": Say("held-out loss", "검증 손실"),
    }
    points = [
        (x, y)
        for one in rounds
        if (x := number(one.get("round"))) is not None and (y := number(one.get("held-out loss"))) is not None
    ]
    last = f"{points[-1][1]:.4f}" if points else ""
    curve = chart(
        [Line(names["held-out loss"], points)],
        Say("round", "라운드"),
        names["held-out loss"],
        Say(f"Held-out loss by round; {last} at the last.", f"라운드별 검증 손실. 마지막 값은 {last}."),
    )
    stopped = str(report.get("stopped") or "")
    why = Say(f"It ended because {stopped}.", f"끝난 이유: {stopped}.")
    head: list[Words] = [Say("round", "라운드"), *(names.get(key) or same(key) for key in columns)]
    return under(
        Say("Round after round", "라운드마다"),
        curve,
        table(Say("The rounds", "라운드"), head, rows),
        paragraph(why) if stopped else EMPTY,
    )


def _merge(report: Mapping[str, Any]) -> Markup:
    error = number(report.get("error"))
    says = Say(
        f"The merged update differs from the exact sum by {percent(error, 2)}.",
        f"합친 어댑터는 정확한 합과 {percent(error, 2)} 차이 납니다.",
    )
    trials = within_list(report, "trials")
    names = list(dict.fromkeys(name for one in trials for name in within(one, "weights")))
    rows: list[list[Words]] = [
        [counted(at), *(told(within(one, "weights").get(name)) for name in names), told(one.get("loss"), 4)]
        for at, one in enumerate(trials)
    ]
    head: list[Words] = [Say("trial", "시도"), *(shortened(name, 60) for name in names), Say("loss", "손실")]
    told_lines = [line for line in report.get("told") or () if isinstance(line, str)]
    notes = joined(paragraph(Markup('<span lang="en">{}</span>').format(line), "note") for line in told_lines)
    return under(
        Say("The merge", "합치기"),
        paragraph(says) if error is not None else EMPTY,
        notes,
        folded(Say(f"{len(rows)} weightings tried", f"시험한 가중치 {len(rows)}가지"), table(head[0], head, rows)),
    )


def _fitted(report: Mapping[str, Any]) -> Markup:
    fitted = within(report, "fitted")
    if not fitted:
        return EMPTY
    n = counted(fitted.get("n_rows"))
    rows: list[list[Words]] = [
        [Say("fitted weights", "맞춘 가중치"), told(fitted.get("loss"), 4)],
        [Say("equal weights", "같은 가중치"), told(fitted.get("of_equal"), 4)],
        [Say("the best member alone", "가장 나은 구성원 하나"), told(fitted.get("of_best"), 4)],
    ]
    caption = Say(
        f"The weights were fitted on {n} watched conversations; the loss there",
        f"가중치는 검증용 대화 {n}개에 맞췄습니다. 그 대화에서의 손실",
    )
    return table(caption, (Say("weights", "가중치"), Say("loss", "손실")), rows)
