"""What a combination cannot mean: too few members, weights of nobody, kinds of adapter that it does not take."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from toolkit.recipe.adapter import Full
from toolkit.recipe.combine import (
    MAKES_MEMBERS,
    MAY_TURN_AWAY,
    MERGES,
    SPARSE,
    Bag,
    Boost,
    Combine,
    Gate,
    Merge,
    Mix,
    Route,
    Vote,
    set_by_hand,
)
from toolkit.recipe.experts import is_stacked, stands_alone
from toolkit.recipe.model import NewBase, Recipe
from toolkit.recipe.nearest import did_you_mean, nearest
from toolkit.recipe.sense import Clash
from toolkit.recipe.sense_experts import called, instead, sound

INSTEAD = "Choose mix or vote, which need nothing of their weights"


def misfits_of_combine(recipe: Recipe) -> Iterator[Clash]:
    """Everything that is wrong with combining what a recipe trains, where its sections are right one by one."""
    if recipe.experts is None and recipe.combine is None:
        return
    yield from _beside_others(recipe)
    combine = recipe.combine
    if combine is None:
        return
    yield from _members(recipe, combine)
    yield from _held_out(recipe, combine)
    members = {} if combine.kind in MAKES_MEMBERS else sound(recipe)
    of_kind: Mapping[type, Callable[..., Iterator[Clash]]] = {
        Route: _route, Merge: _merge, Mix: _mix, Gate: _gate, Vote: _vote, Bag: _made, Boost: _made
    }  # fmt: skip
    yield from of_kind[type(combine)](recipe, combine, members)
    if isinstance(combine, Merge | Mix | Vote) and isinstance(combine.weights, dict) and recipe.experts:
        yield from _weights(tuple(recipe.experts), combine, combine.weights)


def _beside_others(recipe: Recipe) -> Iterator[Clash]:
    here = "experts" if recipe.experts is not None else "combine"
    if recipe.search is not None:
        says = f"search one adapter first, then combine: a recipe has search or {here}, not both. Remove one"
        yield Clash("search", says, (here,))
    if isinstance(recipe.base, NewBase):
        says = "several adapters stand on one base that exists. Make the base in a run of its own, and name its folder"
        yield Clash("base.new", says, (here,))
    if recipe.train.keep:
        says = "checkpoints of single steps are kept of one adapter alone. Remove it"
        yield Clash("train.keep", says, (here,))


def _members(recipe: Recipe, combine: Combine) -> Iterator[Clash]:
    n_experts = len(recipe.experts or {})
    if combine.kind in MAKES_MEMBERS:
        if n_experts:
            says = f"a {combine.kind} makes its members itself, of one recipe. Remove experts, or choose kind: vote"
            yield Clash("experts", says, ("combine.kind",))
    elif n_experts == 0:
        says = f"{type(combine).called} needs experts. Write experts: {{NAME: {{…}}, NAME: {{…}}}}, or choose kind: bag"
        yield Clash("combine", says, ("experts", "combine.kind"))
    elif n_experts == 1:
        says = f"one expert alone, and {type(combine).called} needs two. Add one, or remove combine"
        yield Clash("experts", says, ("combine.kind",))


def _held_out(recipe: Recipe, combine: Combine) -> Iterator[Clash]:
    weights = getattr(combine, "weights", None)
    if recipe.data.test == 0 and (combine.kind in MAKES_MEMBERS or weights == "search"):
        chosen = "the members were not stopped on" if isinstance(combine, Bag) else "the weights were not chosen on"
        says = f"0 holds nothing out, so nothing is left to judge by that {chosen}. Give it a share, as in test: 0.1"
        yield Clash("data.test", says, ("combine",))
    if recipe.data.valid != 0:
        return
    why = "boost cannot tell when another round no longer helps" if isinstance(combine, Boost) else ""
    if weights == "search":
        why = "weights have nothing to be searched by"
    if why:
        yield Clash("data.valid", f"0 holds nothing out, so {why}. Write valid: 0.1", ("combine",))


def _route(recipe: Recipe, combine: Route, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    names = tuple(recipe.experts or {})
    yield from _top_k(names, combine.top_k)
    if names and combine.default != "base" and combine.default not in names:
        guess = did_you_mean(nearest(combine.default, (*names, "base")))
        says = f"'{combine.default}' is no expert{guess or '. There are: ' + ', '.join(('base', *names))}"
        yield Clash("combine.default", says, ("experts",))
    if combine.router == "embedding" and combine.encoder is None:
        says = "router: embedding reads through a model of yours. Write encoder: FOLDER, or choose router: classifier"
        yield Clash("combine.encoder", says, ("combine.router",))
    if combine.router != "embedding" and combine.encoder is not None:
        says = f"is read by router: embedding alone, and this one is {combine.router}. Remove it"
        yield Clash("combine.encoder", says, ("combine.router",))
    yield from _in_one_stack(recipe, combine, members)


def _merge(recipe: Recipe, combine: Merge, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    method = combine.method
    if combine.rank is not None and method in ("exact", "linear"):
        own = "the sum of the experts' ranks" if method == "exact" else "the rank of the experts"
        yield Clash("combine.rank", f"{method} has {own}. Remove it, or write method: svd", ("combine.method",))
    if combine.density is not None and method not in SPARSE:
        says = f"{method} drops nothing. Remove it, or choose a method of {', '.join(SPARSE)}"
        yield Clash("combine.density", says, ("combine.method",))
    if combine.trials != Merge.model_fields["trials"].default and combine.weights != "search":
        says = "nothing is tried unless weights are searched. Remove it, or write weights: search"
        yield Clash("combine.trials", says, ("combine.weights",))
    kinds = {name: one.adapter.kind for name, one in members.items()}
    unfit = [name for name, kind in kinds.items() if kind not in MERGES or not is_stacked(members[name])]
    needs = ("experts", "adapter", "combine.kind")
    if unfit:
        remedy = INSTEAD if all(is_stacked(members[name]) for name in unfit) else instead(recipe)
        listed = _listed(members, unfit)
        yield Clash("combine.kind", f"a merge adds up lora adapters, and {listed} has no sum. {remedy}", needs)
    elif len(set(kinds.values())) > 1:
        listed = _listed(members, kinds)
        yield Clash("combine.kind", f"adapters of different kinds have no sum ({listed}). {INSTEAD}", needs)
    elif kinds and method not in MERGES[next(iter(kinds.values()))]:
        kind = next(iter(kinds.values()))
        says = f"{method} is not defined for {kind} adapters. Write {' or '.join(MERGES[kind])}"
        yield Clash("combine.method", says, needs)
    ranks = {name: getattr(one.adapter, "rank", 0) for name, one in members.items()}
    if method == "linear" and not unfit and len(set(kinds.values())) == 1 and len(set(ranks.values())) > 1:
        listed = ", ".join(f"{name} {rank}" for name, rank in ranks.items())
        says = f"linear wants experts of one rank ({listed}). Give them one, or write method: exact or svd"
        yield Clash("combine.method", says, ("experts", "adapter"))


def _mix(recipe: Recipe, combine: Mix, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    yield from _in_one_stack(recipe, combine, members)


def _gate(recipe: Recipe, combine: Gate, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    yield from _top_k(tuple(recipe.experts or {}), combine.top_k)
    unfit = [name for name, one in members.items() if one.adapter.kind not in ("lora", "reft") or not is_stacked(one)]
    if unfit:
        remedy = "Choose route or mix" if all(is_stacked(members[name]) for name in unfit) else instead(recipe)
        says = f"a gate weighs lora and reft adapters, and {_listed(members, unfit)} is neither. {remedy}"
        yield Clash("combine.kind", says, ("experts", "adapter"))
    others = [name for name, one in members.items() if one.adapter.kind == "reft"]
    if combine.how == "arrow" and others and not unfit:
        says = f"arrow reads the factors of lora adapters, and {_listed(members, others)} has none. Write how: learned"
        yield Clash("combine.how", says, ("experts", "adapter"))
    if combine.how == "arrow":
        for key, _ in set_by_hand(combine):
            if key in ("hidden", "epochs", "learning_rate", "balance"):
                says = "arrow trains nothing. Remove it, or write how: learned"
                yield Clash(f"combine.{key}", says, ("combine.how",))


def _vote(recipe: Recipe, combine: Vote, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    if recipe.task == "classify":
        return
    if combine.how != "hard":
        says = (
            f"{combine.how} averages over labels, which task: {recipe.task} does not have. Write how: hard (the answer "
            "that most give), or kind: mix (averages every token)"
        )
        yield Clash("combine.how", says, ("task",))
    apart = [name for name, one in members.items() if stands_alone(recipe, one)]
    if apart:
        says = (
            f"{', '.join(apart)}: members on bases of their own vote over labels, under task: classify. Name one base, "
            "and kinds that share it (lora without DoRA, prefix, reft, embedding)"
        )
        yield Clash("combine.kind", says, ("task", "experts"))


def _made(recipe: Recipe, combine: Bag | Boost, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    del members
    if isinstance(recipe.adapter, Full):
        says = f"every member of a {combine.kind} would be a whole model. Choose another kind, as in lora"
        yield Clash("adapter.kind", says, ("combine.kind",))
    elif not is_stacked(recipe):
        says = f"members of a {combine.kind} stand side by side on one base, and {called(recipe)} cannot"
        at = "adapter.dora" if recipe.adapter.kind == "lora" else "adapter.kind"
        yield Clash(at, f"{says}. {instead(recipe)}", ("combine.kind", "adapter.kind"))


def _top_k(names: Sequence[str], top_k: int | None) -> Iterator[Clash]:
    if top_k is not None and len(names) > 1 and top_k > len(names):
        yield Clash("combine.top_k", f"{top_k} of {len(names)} experts. Write at most {len(names)}", ("experts",))


def _in_one_stack(recipe: Recipe, combine: Combine, members: Mapping[str, Recipe]) -> Iterator[Clash]:
    unfit = [name for name, one in members.items() if not is_stacked(one) and not isinstance(one.adapter, Full)]
    if unfit:
        says = (
            f"experts of {type(combine).called} stand side by side on one base, and {_listed(members, unfit)} cannot. "
            f"{instead(recipe)}"
        )
        yield Clash("combine.kind", says, ("experts", "adapter"))


def _listed(members: Mapping[str, Recipe], names: Sequence[str] | Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({called(members[name])})" for name in names)


def _weights(names: Sequence[str], combine: Merge | Mix | Vote, weights: Mapping[str, float]) -> Iterator[Clash]:
    for name, value in weights.items():
        at = ("combine", "weights", name)
        if name not in names:
            guess = did_you_mean(nearest(name, names))
            says = f"no expert has this name{guess or '. There are: ' + ', '.join(names)}"
            yield Clash(at, says, ("experts",))
        elif value < 0 and not _may_be_negative(combine):
            yield Clash(at, f"{value:g} is negative, which {_where(combine)} has no meaning for. Write 0 or more")
    missing = [name for name in names if name not in weights]
    if missing:
        says = f"{', '.join(missing)}: without a weight. Give one to every expert; 0 leaves it out"
        yield Clash("combine.weights", says, ("experts",))
        return
    total = math.fsum(weights.values())
    if not any(weights.values()):
        yield Clash("combine.weights", "every weight is 0, so nothing is left. Give one that is not")
    elif (
        isinstance(combine, Mix) and combine.over == "logprob" and total <= 1e-9 * math.fsum(map(abs, weights.values()))
    ):
        yield Clash("combine.weights", f"they sum to {total:g}, and shares are made of them. Give a sum above 0")


def _may_be_negative(combine: Merge | Mix | Vote) -> bool:
    if isinstance(combine, Merge):
        return combine.method in MAY_TURN_AWAY
    return isinstance(combine, Mix) and combine.over == "logprob"


def _where(combine: Merge | Mix | Vote) -> str:
    if isinstance(combine, Merge):
        return f"method: {combine.method}"
    return "a mix over prob" if isinstance(combine, Mix) else "a vote"
