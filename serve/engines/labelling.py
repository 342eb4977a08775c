"""Which label a model gives a text, computed between the steps of those who are being answered."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from serve.engines.contract import Served
from serve.engines.models import Model
from serve.engines.teams import Team
from serve.refusal import Refusal, unsupported
from toolkit.bundle import Run
from toolkit.combine.rows import Apart, answering
from toolkit.combine.vote import Vote, vote_probabilities
from toolkit.corpus.talk import Turn
from toolkit.errors import BaseError, DataError, InputError, RecipeError
from toolkit.evaluate.classify import classify
from toolkit.recipe.model import Labels
from toolkit.recipe.read import read_recipe

TEXT = "{text}"
VOTES = ("vote", "bag", "boost")  # kinds of runs whose members vote over labels


@dataclass(frozen=True)
class Labeller:
    """Who labels: one model, or the members of a run, which vote as the run was made to. weights: of each member."""

    served: Served
    models: tuple[Model, ...]
    weights: tuple[float, ...]
    how: Vote

    def voted(self, said: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
        """The probability of every label, from what each model finds of it (`label`)."""
        if len(said) == 1:
            return said[0]
        return vote_probabilities([[of] for of in said], self.how, self.weights)[0]


def labeller(team: Team) -> Labeller:
    """Who labels. Raises Refusal: 400 for several that answer as one, unless they are a run whose members vote over
    labels."""
    if team.kind == "one" and team.models[0].spec is None:
        return Labeller(team.served, team.models, (1.0,), "soft")
    if team.spec is None or team.spec.kind not in VOTES or team.served.task != "classify":
        raise unsupported("model", f"{team.served.name}: several answer there as one. Name the one that labels.")
    return Labeller(team.served, team.models, team.weights, cast("Vote", team.spec.how))


def labels_of(who: Labeller, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The labels to choose from. Raises Refusal: 400 where neither the request nor the run has any."""
    labels = tuple(asked or who.models[0].loaded.labels)
    if not labels:
        says = f"{who.served.name} was not taught labels. Say which there are: labels."
        raise Refusal(400, says, "missing_required_parameter", "labels")
    return labels


@dataclass(frozen=True)
class Wording:
    """What a run was shown with each text: around it, with {text} in its place, and a system turn before it."""

    around: str = TEXT
    system: str | None = None

    def turns(self, text: str) -> tuple[Turn, ...]:
        """A text as the run was taught to read it."""
        own = Turn("user", self.around.replace(TEXT, text))
        return (own,) if self.system is None else (Turn("system", self.system), own)


def wording(run: Run, task: str) -> Wording:
    """What a run of task classify was shown with each text; of other runs nothing is known. Raises Refusal: 400."""
    if task != "classify":
        return Wording()
    try:
        data = read_recipe(run.recipe_file, to_run=False).data
    except RecipeError as error:
        raise Refusal(400, f"{run.name}: its recipe cannot be read ({error}).", "run_unfit", "model") from None
    return Wording((data.format.template or TEXT) if isinstance(data.format, Labels) else TEXT, data.system)


def label(model: Model, turns: Sequence[Turn], labels: Sequence[str]) -> Mapping[str, float]:
    """The probability of every label. Raises Refusal: 400 for a text that is too long, or a label that cannot be."""
    try:
        if model.stack is None:
            return classify(model.loaded.model, model.loaded.renderer, [turns], labels)[0]
        with answering(model.stack, [model.adapter], Apart) as opened:
            return classify(opened, model.loaded.renderer, [turns], labels)[0]
    except (BaseError, DataError) as error:
        raise Refusal(400, str(error), "invalid_value", "labels") from None
    except InputError as error:
        raise Refusal(400, str(error), "context_length_exceeded", "input") from None
