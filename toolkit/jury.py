"""Everybody of a run of several adapters on the same held-out talk, and what the comparison says."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from toolkit.bundle import Run
from toolkit.combine.speaker import MAIN
from toolkit.ensemble.compare import Sums, Verdict, mean, verdict
from toolkit.ensemble.ground import Ground
from toolkit.ensemble.make import Made
from toolkit.ensemble.subjects import Combined, OneMember, Table, member, oracle
from toolkit.evaluate.classify import gold_labels, likeliest
from toolkit.evaluate.subject import Subject
from toolkit.evaluate.talk import HeldOut
from toolkit.judge import Judge

SHOWN = ("loss", "bits per byte", "accuracy", "macro f1", "log loss", "chrf")
N_ANSWERS = 3  # of every member in the card


@dataclass(frozen=True)
class Heard:
    """What the jury found. after: the numbers and answers of whoever answers for the run, as Judge gives them. best:
    the member that was best on the talk watched while training, and that a run without a combination answers with.
    facts: for run.json.
    """

    after: dict[str, Any]
    best: str
    facts: dict[str, Any]


def hear(ground: Ground, made: Made, judge: Judge) -> Heard:
    """Measure every member and the combination. Cost: each member reads the held-out talk once and answers every
    prompt, and so does the combination.
    """
    held = judge.held
    table = Table(ground.base, ground.renderer, made.stack, held.talks, held.rows, held.labels, made.apart)
    members = made.members
    measured = {name: judge.measure(member(table, name)) for name in members}
    best = best_of(made.watched, table, members)
    experts = {name: _expert(ground, made, name, measured[name]) for name in members}
    if made.spec is None:
        is_measured = bool(len(made.watched.talks) or len(table.talks))
        return Heard(measured[best], best, {"experts": experts, "best": best, "best_is_measured": is_measured})
    combined: Subject = OneMember(table, MAIN) if made.speaker is None else Combined(table, made.speaker)
    after = judge.measure(combined)
    facts: dict[str, Any] = {**made.spec.facts(), "report": dict(made.report)}
    found = _verdict(table, members, combined, chosen_here=not ground.rows.test and _is_fitted(ground))
    name = f"{made.spec.kind} ({made.spec.how})"
    facts["verdict"] = None if found is None else found.facts(name)
    facts["on"] = _by_owner(ground, table, combined, judge, members)
    facts["oracle"] = _oracle(ground, table, judge)
    return Heard(after, best, {"experts": experts, "best": best, "combination": facts})


def best_of(watched: Table, table: Table, members: Sequence[str]) -> str:
    """The member with the lowest error on the talk watched while training; on the held-out talk where there is none."""
    of = watched if len(watched.talks) else table
    if not len(of.talks):
        return members[0]
    found = {name: mean(sums_of(of, member(of, name)) or [(0.0, 1.0)]) for name in members}
    return min(members, key=lambda name: (found[name], members.index(name)))


def sums_of(table: Table, who: Subject) -> Sums | None:
    """Of every held-out talk (mistakes, 1) where there are labels, else (nats, tokens); None: no such thing."""
    if table.labels:
        gold, said = gold_labels(table.talks), likeliest(who.labelled(table.talks, table.labels))
        return [(float(one != other), 1.0) for one, other in zip(gold, said, strict=True)]
    found = who.held_out(table.rows, [talk.lang for talk in table.talks])
    return None if found is None else [(nll, float(n)) for nll, n in found.sums()]


def _verdict(table: Table, members: Sequence[str], combined: Subject, *, chosen_here: bool) -> Verdict | None:
    """None where nothing is held out, or the combination has neither a loss nor labels."""
    if not len(table.talks):
        return None
    ours = sums_of(table, combined)
    theirs = {name: sums for name in members if (sums := sums_of(table, member(table, name))) is not None}
    if ours is None or not theirs:
        return None
    return verdict(theirs, ours, "error rate" if table.labels else "loss", chosen_here=chosen_here)


def _is_fitted(ground: Ground) -> bool:
    """Whether something of the combination was chosen on the talk that is watched."""
    combine = ground.recipe.combine
    return getattr(combine, "weights", None) == "search" or (combine is not None and combine.kind in ("gate", "boost"))


def _expert(ground: Ground, made: Made, name: str, measured: Mapping[str, Any]) -> dict[str, Any]:
    run, recipe, fitted = ground.found.get(name), ground.trained.get(name), made.fitted.get(name)
    own = made.apart[name].facts if name in made.apart else {}
    apart = ground.apart.get(name)
    run = apart if isinstance(apart, Run) else run
    return {
        "adapter": own["inputs"]["recipe"].get("adapter.kind")
        if own
        else None
        if recipe is None
        else recipe.adapter.kind,
        "base": own["base"]["model"] if own else ground.base.source,
        "run": None if run is None else str(run.path),
        "fit": own.get("fit") if own else None if fitted is None else asdict(fitted),
        "weights_hash": made.stack.hash(name) if name in made.stack.slots else None,
        "results": dict(measured),
    }


def _by_owner(
    ground: Ground, table: Table, combined: Subject, judge: Judge, members: Sequence[str]
) -> dict[str, dict[str, float]]:
    """On each expert's own held-out talk the loss of every member and of the combination."""
    owners = _owners(ground, judge)
    names = [name for name in ground.names if name in owners]
    if table.labels or not names:
        return {}
    losses: dict[str, HeldOut | None] = {"combination": combined.held_out(table.rows, judge.langs())}
    losses |= {name: member(table, name).held_out(table.rows, judge.langs()) for name in members}
    return {
        owner: {
            name: HeldOut(tuple(one for one, own in zip(of.talks, owners, strict=True) if own == owner)).loss
            for name, of in losses.items()
            if of is not None and len(of.talks) == len(owners)
        }
        for owner in names
    }


def _oracle(ground: Ground, table: Table, judge: Judge) -> float | None:
    """The loss if every talk were answered by the expert that learned such talk; None where some belong to no one."""
    owners = _owners(ground, judge)
    if table.labels or table.apart or not owners or None in owners:
        return None
    return table.held_out(oracle(table, owners), judge.langs()).loss


def _owners(ground: Ground, judge: Judge) -> list[str | None]:
    return ground.owner("test" if ground.rows.test else "valid") if judge.held.rows else []


def section_of(facts: Mapping[str, Any]) -> str:
    """What the jury found as Markdown: a table of all, the verdict, and answers of everybody."""
    experts, combination = facts["experts"], facts.get("combination")
    rows: dict[str, Mapping[str, Any]] = {name: of["results"] for name, of in experts.items()}
    parts = ["## Experts\n"]
    if combination is not None:
        spec = f"{combination['kind']} ({combination['how']})"
        parts[0] = f"## Experts and their {spec}\n"
        if combination["verdict"]:
            parts.append(combination["verdict"]["sentence"] + "\n")
        else:
            parts.append("There is no loss to compare: whole answers were voted on, or nothing was held out.\n")
        if combination["oracle"] is not None:
            parts.append(f"With every talk answered by its own expert the loss is {combination['oracle']:.4f}.\n")
        if combination["weights"]:
            told = ", ".join(f"{name} {weight:.3g}" for name, weight in combination["weights"].items())
            parts.append(f"Weights: {told}.\n")
    else:
        told = f"On the talk watched while learning {facts['best']} is best" if facts["best_is_measured"] else ""
        parts.append(f"{told or facts['best'] + ' stands first, and nothing was held out'}; the run answers with it.\n")
    shown = [metric for metric in SHOWN if any(metric in of for of in rows.values())]
    parts.append("\n".join([f"| {' | '.join(['expert', *shown])} |", "|---" * (len(shown) + 1) + "|"]))
    for name, of in rows.items():
        parts[-1] += f"\n| {' | '.join([name, *(_cell(of.get(metric)) for metric in shown)])} |"
    parts[-1] += "\n"
    answers = [line for name, of in rows.items() for line in _answers(name, of)]
    return "\n".join([*parts, *answers])


def _cell(values: Any) -> str:
    value = values.get("all") if isinstance(values, Mapping) else None
    return "" if value is None else f"{value:.4f}"


def _answers(name: str, of: Mapping[str, Any]) -> list[str]:
    said = of.get("samples", ())[:N_ANSWERS]
    if not said:
        return []
    lines = [f"    {_plain(one['prompt'])}  ->  {_plain(one['answer'])}" for one in said]
    return [f"{name} answers:\n", *lines, ""]


def _plain(text: str) -> str:
    return " ".join(str(text).split())
