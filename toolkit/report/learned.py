"""How the loss went while a run learned."""

from collections.abc import Sequence

from markupsafe import Markup

from toolkit.report.chart import N_COLORS, Line, chart
from toolkit.report.markup import EMPTY, paragraph, section, under
from toolkit.report.seen import Seen
from toolkit.report.words import Say, counted, number, same, shortened, span, told, within
from toolkit.trackers.contract import LOSS_OF, OF_GATE, VALID_LOSS_OF

STEP = Say("optimizer step", "학습 단계")
LOSS = Say("loss (nats a token)", "손실(토큰당 nat)")
MOST_LINES = 12  # in one drawing
OF_EACH = (
    (VALID_LOSS_OF, Say("Held-out loss while learning", "학습 중의 검증 손실")),
    (LOSS_OF, Say("Loss while learning", "학습 손실")),
)
ENDS = {
    "done": Say("all steps were taken", "계획한 단계를 모두 마쳤습니다"),
    "early": Say(
        "it stopped early, since the held-out loss no longer fell", "검증 손실이 더 줄지 않아 일찍 멈췄습니다"
    ),
}


def curves_section(seen: Seen) -> Markup:
    """Loss and held-out loss by step; what came of it in a sentence. Nothing where no step was written down."""
    learned, watched = seen.points("loss"), seen.points("valid_loss")
    if seen.learners():
        return _curves_of_several(seen)
    if not learned and not watched:
        return EMPTY
    fit = within(seen.facts, "fit")
    lines = [
        Line(Say("while learning", "학습"), learned, 2),
        Line(Say("held out", "검증"), watched, 1),
    ]
    many = len(learned) > 240
    note = Say(
        "The shaded band holds the losses of the single steps; the line is their mean.",
        "옅은 띠는 각 단계의 손실이고, 선은 그 평균입니다.",
    )
    return section(
        "curves",
        Say("How the loss went", "손실 곡선"),
        paragraph(_sentence(seen)),
        chart([line for line in lines if line.points], STEP, LOSS, curve_caption(seen)),
        paragraph(note, "note") if many else EMPTY,
        _best(seen) if number(fit.get("best_step")) is not None else EMPTY,
    )


def _curves_of_several(seen: Seen) -> Markup:
    """A curve for each that learned: held out, then while learning; and of a gate that learned after them."""
    names = seen.learners()
    shown = names[:MOST_LINES]
    drawn = [
        *(_one_each(seen, shown, prefix, says) for prefix, says in OF_EACH),
        _one_each(seen, ["loss", "valid_loss"], OF_GATE, Say("The gate", "게이트")),
    ]
    n = len(names) - len(shown)
    rest = Say(f"{n} more are in metrics.jsonl.", f"나머지 {n}개는 metrics.jsonl에 있습니다.")
    says = Say("Every curve counts its own steps.", "학습 단계는 곡선마다 따로 셉니다.")
    note = paragraph(rest, "note") if n else EMPTY
    return section("curves", Say("How the loss went", "손실 곡선"), paragraph(says, "note"), *drawn, note)


def _one_each(seen: Seen, names: Sequence[str], prefix: str, says: Say) -> Markup:
    lines = [
        Line(shortened(name, 60), points, at + 1, is_dashed=at >= N_COLORS)
        for at, name in enumerate(names)
        if (points := seen.points(prefix + name))
    ]
    ends = ", ".join(f"{same(line.name).en} {line.points[-1][1]:.3f}" for line in lines)
    return under(says, chart(lines, STEP, LOSS, says + Say(f"; at the end: {ends}.", f". 끝에서: {ends}.")))


def curve_caption(seen: Seen) -> Say:
    """The curves in words."""
    parts = []
    for points, says in (
        (seen.points("loss"), Say("Loss while learning", "학습 손실")),
        (seen.points("valid_loss"), Say("held-out loss", "검증 손실")),
    ):
        if points:
            first, last, low = points[0][1], points[-1][1], min(y for _, y in points)
            parts.append(
                says
                + Say(
                    f" from {first:.3f} to {last:.3f} (lowest {low:.3f})",
                    f" {first:.3f} → {last:.3f}(최저 {low:.3f})",
                )
            )
    text = parts[0]
    for more in parts[1:]:
        text = text + "; " + more
    return Say(text.en[:1].upper() + text.en[1:] + ".", text.ko + ".")


def _sentence(seen: Seen) -> Say:
    fit = within(seen.facts, "fit")
    steps, tokens, time = counted(fit.get("steps")), counted(fit.get("n_tokens")), span(fit.get("seconds"))
    end = ENDS.get(str(fit.get("stopped")), Say("", ""))
    return Say(
        f"{steps} steps over {tokens} tokens in {time.en}; {end.en}.",
        f"{tokens}토큰으로 {steps}단계를 {time.ko} 동안 학습했고, {end.ko}.",
    )


def _best(seen: Seen) -> Markup:
    fit = within(seen.facts, "fit")
    step, loss = counted(fit.get("best_step")), told(fit.get("best_loss"), 4)
    return paragraph(
        Say(
            f"What is kept is step {step}, where the held-out loss was lowest ({loss}).",
            f"저장한 것은 검증 손실이 가장 낮았던 {step}단계입니다({loss}).",
        )
    )
