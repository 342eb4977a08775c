"""Who answers a request: one model, or several that answer as one, found by what the request says."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from serve.engines.contract import Auto, Mix, One, Served, Vote, Who
from serve.engines.models import Model, describe
from serve.refusal import Refusal, no_model, no_router
from toolkit.combine.contract import shares
from toolkit.combine.mix import Over, may_be_negative
from toolkit.combine.speaker import PER_TOKEN, Spec
from toolkit.errors import InputError

Kind = Literal["one", "mix", "vote", "route"]


@dataclass(frozen=True)
class Team:
    """Models that answer together, those of weight 0 left out. served: what they are called; weights sum to 1.

    one: a single model. mix: one text, each token chosen by all of them, over log-probabilities or probabilities. vote:
    a text each, the majority's is the answer. route: not known yet; `models` is the run whose router says who it is.
    routing: what the answer says about who answered. spec: of a run whose members they are.
    """

    served: Served
    kind: Kind
    models: tuple[Model, ...]
    weights: tuple[float, ...] = (1.0,)
    over: Over = "logprob"
    routing: tuple[tuple[str, float], ...] = ()
    spec: Spec | None = None

    @property
    def label(self) -> str:
        """A word of a bounded set: whom requests of this kind take turns with."""
        return self.served.name if self.models[0].served.name == self.served.name else self.kind


def team_of(models: Mapping[str, Model], who: Who) -> Team:
    """Who answers. Raises Refusal as Engine.served does."""
    if isinstance(who, Auto):
        return _routed(models)
    if isinstance(who, One):
        model = _found(models, who.name)
        return _single(model) if model.spec is None else _combined(models, model)
    if isinstance(who, Vote):
        return together(models, "vote", [(name, 1.0) for name in who.names])
    return together(models, "mix", who.weights, who.over)


def together(
    models: Mapping[str, Model],
    kind: Literal["mix", "vote"],
    named: Sequence[tuple[str, float]],
    over: Over = "logprob",
) -> Team:
    """Models by name as one. Raises Refusal as Engine.served does."""
    members = [_found(models, name) for name, _ in named]
    _refuse_unfit(members)
    names, given = [name for name, _ in named], [weight for _, weight in named]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None or not names:
        raise Refusal(400, f"{twice or 'Nobody'}: name every model once, and at least one.", "invalid_value", "model")
    try:
        weights = shares(names, given, may_be_negative=kind == "mix" and may_be_negative(over)).values
    except InputError as wrong:
        raise Refusal(400, str(wrong), "invalid_value", "model") from None
    kept = [(model, weight) for model, weight in zip(members, weights, strict=True) if weight]
    who: Who = Vote(tuple(names)) if kind == "vote" else Mix(tuple(zip(names, weights, strict=True)), over)
    served = describe(str(who), kind, [model.served for model in members], weights, over)
    routing = tuple((model.served.name, weight) for model, weight in kept)
    return Team(served, kind, tuple(model for model, _ in kept), tuple(weight for _, weight in kept), over, routing)


def _single(model: Model) -> Team:
    return Team(model.served, "one", (model,))


def _combined(models: Mapping[str, Model], run: Model) -> Team:
    """A run that has several adapters, as it was made."""
    spec = run.spec
    assert spec is not None
    if spec.kind == "gate":
        return Team(run.served, "one", (run,), routing=run.served.members)
    if spec.kind == "route":
        return Team(run.served, "route", (run,))
    named = [(name, weight) for name, weight in run.served.members if weight]
    if spec.kind == "mix" or spec.how in PER_TOKEN:
        over = cast("Over", spec.how if spec.kind == "mix" else PER_TOKEN[spec.how])
        team = together(models, "mix", named, over)
    else:
        team = together(models, "vote", named)
    return Team(run.served, team.kind, team.models, team.weights, team.over, team.routing, spec)


def _routed(models: Mapping[str, Model]) -> Team:
    """The run whose router picks."""
    routing = [model for model in models.values() if model.spec is not None and model.spec.kind == "route"]
    if not routing:
        raise no_router(models)
    if len(routing) > 1:
        says = f"Several runs have a router. Name one: {', '.join(model.served.name for model in routing)}."
        raise Refusal(400, says, "invalid_value", "model")
    return _combined(models, routing[0])


def _found(models: Mapping[str, Model], name: str) -> Model:
    if name not in models:
        raise no_model(name, models)
    return models[name]


def _refuse_unfit(members: Sequence[Model]) -> None:
    """Refuse, by name, models that cannot read one prompt in one batch."""
    for model in members:
        name, why = model.served.name, None
        if model.spec is not None:
            why = f"is a {model.spec.kind} already: name its experts, or ask it alone"
        elif model.stack is None:
            why = "runs on a model of its own, which shares no batch with others: ask it alone"
        elif model.loaded.renderer.template != members[0].loaded.renderer.template:
            why = (
                f"was taught with another template than {members[0].served.name}, and one prompt has one: ask it alone"
            )
        if why is not None:
            raise Refusal(
                400, f"{name} cannot answer together with others. It {why}.", "unsupported_parameter", "model"
            )
