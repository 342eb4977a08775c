"""From trained experts to a combination: merged, weighed, routed or gated as the recipe says."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit import disk
from toolkit.bundle import Run
from toolkit.combine.contract import Given, called, shares
from toolkit.combine.gate import Gate
from toolkit.combine.merge import Merged, merge
from toolkit.combine.mix import may_be_negative
from toolkit.combine.route import Router
from toolkit.combine.speaker import GATE, MAIN, ROUTER, Speaker, Spec, open_apart, own_run
from toolkit.ensemble.bag import Bag, out_of_bag
from toolkit.ensemble.boost import Rounds, boost
from toolkit.ensemble.experts import Hooks, Task, fit_members
from toolkit.ensemble.gate import GateSetup, train_gate
from toolkit.ensemble.ground import Ground
from toolkit.ensemble.router import train_router
from toolkit.ensemble.subjects import Table
from toolkit.ensemble.weights import fit_label_weights, fit_mix_weights, search_merge_weights
from toolkit.evaluate.classify import gold_labels, label_set
from toolkit.fit.fitted import Fitted
from toolkit.fit.plan import count_steps
from toolkit.fit.prepare import place_here, shape_of
from toolkit.loaded import LoadedLabeller, LoadedRun
from toolkit.recipe import combine as words
from toolkit.search.split import limits_of
from toolkit.stack.stack import Stack


class _AskedError(Exception):
    """Somebody wants the run to stop."""


@dataclass(frozen=True)
class Workshop:
    """Where a combination is made: what the experts stand on, the run folder, and whom training asks and tells."""

    ground: Ground
    folder: Run
    hooks: Hooks

    def fit(self, tasks: Sequence[Task]) -> dict[str, Fitted] | None:
        """Train these into the run; None: asked to stop."""
        return fit_members(tasks, self.ground.base, self.folder, plan_of=self.ground.plan, hooks=self.hooks)

    def say_or_stop(self, line: str) -> None:
        """A line on the way of what cannot save and go on. Raises: _AskedError where somebody wants it to stop."""
        self.hooks.say(line)
        if self.hooks.wants_stop():
            raise _AskedError


@dataclass(frozen=True)
class Made:
    """A combination. members: in the order that breaks ties. speaker: who answers for it, None where one adapter does
    (`main`). watched: what was held out to watch. report: what is to be said of its making, as JSON. fitted: how the
    training of each member went; one that existed is not among them.
    """

    members: tuple[str, ...]
    spec: Spec | None
    stack: Stack
    speaker: Speaker | None
    watched: Table
    fitted: Mapping[str, Fitted]
    report: Mapping[str, Any] = field(default_factory=dict)
    apart: Mapping[str, LoadedRun | LoadedLabeller] = field(default_factory=dict)

    def total(self) -> Fitted:
        """The training of all members as one, those that are runs inside this one among them."""
        of = [*self.fitted.values(), *(Fitted(**one.facts["fit"]) for one in self.apart.values())]
        return Fitted(
            "done",
            sum(one.steps for one in of),
            None,
            None,
            sum(one.seconds for one in of),
            sum(one.n_tokens for one in of),
        )


def count_steps_of(ground: Ground) -> int:
    """How many optimizer steps training takes at most, all members together."""
    combine = ground.recipe.combine
    if isinstance(combine, words.Bag | words.Boost):
        n_members = combine.members if isinstance(combine, words.Bag) else combine.rounds
        task = ground.task()
        return n_members * count_steps(len(task.rows), task.recipe)[1]
    return sum(count_steps(len(task.rows), task.recipe)[1] for task in ground.tasks())


def make(shop: Workshop) -> Made | None:
    """Train the members and make of them what the recipe's `combine` says; None: asked to stop, and all is saved.

    Raises: TrainingError for members that could not be trained; what the combination raises for members that it cannot
    take; DiskError. The same call goes on.
    """
    ground, combine = shop.ground, shop.ground.recipe.combine
    if isinstance(combine, words.Bag):
        return _bag(shop, combine)
    if isinstance(combine, words.Boost):
        return _boost(shop, combine)
    fitted = shop.fit(ground.tasks())
    if fitted is None:
        return None
    stack = Stack(ground.base.model, base_hash=ground.base.hash)
    apart = {name: open_apart(own_run(shop.folder, name)) for name in ground.apart}
    for name in ground.names:
        if name not in apart:
            stack.add(name, shop.folder.adapter(name))
    watched = table_of(ground, stack, "valid", apart)
    if combine is None:
        return Made(ground.names, None, stack, None, watched, fitted)
    maker: Callable[[Workshop, Stack, Table, Any], tuple[Spec, dict[str, Any], Router | Gate | None] | None]
    maker = MAKERS[combine.kind]
    made = maker(shop, stack, watched, combine)
    if made is None:
        return None
    spec, report, network = made
    if spec.kind == "merge":
        return Made(spec.members, spec, stack, None, watched, fitted, report)
    speaker = Speaker(
        ground.base,
        ground.renderer,
        stack,
        spec,
        router=network if isinstance(network, Router) else None,
        gate=network if isinstance(network, Gate) else None,
        apart=apart,
    )
    return Made(spec.members, spec, stack, speaker, watched, fitted, report, apart)


def table_of(
    ground: Ground, stack: Stack, part: str, apart: Mapping[str, LoadedRun | LoadedLabeller] | None = None
) -> Table:
    """What members say of a part of the talk."""
    talks = [getattr(ground.corpus, part)[at] for at in ground.rows.kept_talks[part]]
    labels = label_set(tuple(ground.corpus.train)) if ground.recipe.task == "classify" else ()
    return Table(ground.base, ground.renderer, stack, talks, getattr(ground.rows, part), labels, apart or {})


# The kinds that make their members


def _bag(shop: Workshop, asked: words.Bag) -> Made | None:
    ground, task = shop.ground, shop.ground.task()
    bag = Bag.of(task.rows, asked.members, seed=task.recipe.train.seed, is_bootstrap=asked.bootstrap)
    fitted = shop.fit(bag.tasks(task.recipe, task.valid, task.token_ids))
    if fitted is None:
        return None
    stack = Stack(ground.base.model, base_hash=ground.base.hash)
    for name in bag.names:
        stack.add(name, shop.folder.adapter(name))
    report = {**bag.facts(), "out of bag": out_of_bag(bag, table_of(ground, stack, "train"), asked.vote)}
    return _voted(shop, stack, "bag", asked.vote, dict.fromkeys(bag.names, 1 / len(bag.names)), fitted, report)


def _boost(shop: Workshop, asked: words.Boost) -> Made | None:
    ground, task = shop.ground, shop.ground.task()
    stack = Stack(ground.base.model, base_hash=ground.base.hash)
    found = boost(
        task,
        table_of(ground, stack, "train"),
        table_of(ground, stack, "valid"),
        lambda one: shop.fit([one]),
        shop.folder,
        Rounds(asked.rounds, asked.patience, task.recipe.train.seed),
        shop.hooks.say,
    )
    if found is None:
        return None
    return _voted(shop, stack, "boost", found.how, dict(found.weights), found.fitted, found.facts())


def _voted(
    shop: Workshop,
    stack: Stack,
    kind: str,
    how: str,
    weights: Mapping[str, float],
    fitted: Mapping[str, Fitted],
    report: Mapping[str, Any],
) -> Made:
    """Members of one recipe with their vote."""
    ground = shop.ground
    spec = Spec(kind, how, tuple(weights), weights)
    speaker = Speaker(ground.base, ground.renderer, stack, spec)
    return Made(spec.members, spec, stack, speaker, table_of(ground, stack, "valid"), fitted, report)


# The kinds that combine experts


def _merge(
    shop: Workshop, stack: Stack, watched: Table, asked: words.Merge
) -> tuple[Spec, dict[str, Any], None] | None:
    adapters = {name: stack.adapter(name) for name in shop.ground.names}
    seed = shop.ground.recipe.train.seed

    def merged(weights: Given) -> Merged:
        return merge(adapters, weights, method=asked.method, rank=asked.rank, density=asked.density, seed=seed)

    weights: Given = None
    report: dict[str, Any] = {}
    if asked.weights == "search":
        try:
            weights, report["trials"] = search_merge_weights(
                merged, watched, tuple(adapters), asked.trials, seed, shop.say_or_stop
            )
        except _AskedError:
            return None
    elif not isinstance(asked.weights, str):
        weights = asked.weights
    made = merged(weights)
    for told in made.told:
        shop.hooks.say(told)
    if MAIN in stack.slots:
        stack.remove(MAIN)
    stack.add(MAIN, made.adapter)
    target = shop.folder.adapter(MAIN)
    disk.make_folder(target.parent)
    disk.write_folder(target, lambda folder: stack.save(MAIN, folder, base=shop.ground.base.source))
    report |= {"error": made.error if math.isfinite(made.error) else None, "told": list(made.told)}
    return Spec("merge", asked.method, tuple(adapters), dict(made.weights)), report, None


def _mix(shop: Workshop, stack: Stack, watched: Table, asked: words.Mix) -> tuple[Spec, dict[str, Any], None]:
    weights: Given = None
    report: dict[str, Any] = {}
    if asked.weights == "search":
        weights, report["fitted"] = fit_mix_weights(watched, shop.ground.names, asked.over)
    elif not isinstance(asked.weights, str):
        weights = asked.weights
    spec = _spec(shop, "mix", asked.over, weights, may_be_negative=may_be_negative(asked.over))
    return spec, report, None


def _vote(shop: Workshop, stack: Stack, watched: Table, asked: words.Vote) -> tuple[Spec, dict[str, Any], None]:
    weights: Given = None
    report: dict[str, Any] = {}
    if asked.weights == "search" and watched.labels:
        gold = gold_labels(watched.talks)
        weights, report["fitted"] = fit_label_weights(watched, shop.ground.names, gold, asked.how)
    elif asked.weights == "search":  # whole answers have no slope: the weights that the members' probabilities want
        weights, report["fitted"] = fit_mix_weights(watched, shop.ground.names, "prob")
    elif not isinstance(asked.weights, str):
        weights = asked.weights
    return _spec(shop, "vote", asked.how, weights), report, None


def _route(shop: Workshop, stack: Stack, watched: Table, asked: words.Route) -> tuple[Spec, dict[str, Any], Router]:
    ground = shop.ground
    talks = {name: ground.talks_of(name) for name in ground.names}
    router, report = train_router(
        ground.base, talks, kind=asked.router, seed=ground.recipe.train.seed, encoder=asked.encoder
    )
    router.save(shop.folder.path / ROUTER)
    spec = Spec("route", asked.router, ground.names, {}, asked.default, asked.margin, asked.top_k)
    return spec, dict(report), router


def _gate(shop: Workshop, stack: Stack, watched: Table, asked: words.Gate) -> tuple[Spec, dict[str, Any], Gate] | None:
    ground = shop.ground
    rows = [(row.input_ids, row.labels) for row in ground.rows.train]
    held = [(row.input_ids, row.labels) for row in ground.rows.valid]
    plan = ground.plan(ground.shared, rows)
    longest = max(len(ids) for ids, _ in (*rows, *held))
    setup = GateSetup(
        limits_of(shape_of(ground.base.model, ground.base.context), place_here(), plan, longest),
        ground.base.tokenizer.pad_token_id or 0,
        shop.folder.checkpoints / GATE,
        ground.recipe.train.seed,
        ground.recipe.train.batch_size,
        precision=plan.precision if plan.precision in ("fp32", "bf16") else "fp32",
        say=shop.hooks.say,
        begun=shop.hooks.gate_begun,
        log=shop.hooks.gate,
    )
    made = train_gate(stack, ground.names, rows, held, asked, setup, shop.hooks.wants_stop)
    if made is None:
        return None
    gate, report = made
    gate.save(shop.folder.path / GATE)
    return Spec("gate", asked.how, ground.names), report, gate


def _spec(shop: Workshop, kind: str, how: str, weights: Given, *, may_be_negative: bool = False) -> Spec:
    """With weights that sum to 1; says where those given did not."""
    names = shop.ground.names
    used = shares(called(names), weights, may_be_negative=may_be_negative)
    if used.told:
        shop.hooks.say(used.told)
    return Spec(kind, how, names, dict(zip(names, used.values, strict=True)))


MAKERS: Mapping[str, Callable[..., Any]] = {
    "merge": _merge,
    "mix": _mix,
    "vote": _vote,
    "route": _route,
    "gate": _gate,
}
