"""Which label a model gives a text, computed between the steps of those who are being answered."""

from collections.abc import Mapping, Sequence

from serve.engines.models import Model
from serve.engines.teams import Team
from serve.refusal import Refusal, unsupported
from toolkit.bundle import Run
from toolkit.combine.rows import Apart, answering
from toolkit.corpus.talk import Turn
from toolkit.errors import BaseError, DataError, InputError, RecipeError
from toolkit.evaluate.classify import classify
from toolkit.recipe.model import Labels
from toolkit.recipe.read import read_recipe

TEXT = "{text}"


def labeller(team: Team) -> Model:
    """The one model that labels. Raises Refusal: 400 for several that answer as one."""
    model = team.models[0]
    if team.kind != "one" or model.spec is not None:
        raise unsupported("model", f"{team.served.name}: several answer there as one. Name the one that labels.")
    return model


def labels_of(model: Model, asked: Sequence[str] | None) -> tuple[str, ...]:
    """The labels to choose from. Raises Refusal: 400 where neither the request nor the run has any."""
    labels = tuple(asked or model.loaded.labels)
    if not labels:
        says = f"{model.served.name} was not taught labels. Say which there are: labels."
        raise Refusal(400, says, "missing_required_parameter", "labels")
    return labels


def wording(run: Run, task: str) -> str:
    """What a run of task classify was shown around each text, with {text} in its place."""
    if task != "classify":
        return TEXT
    try:
        format = read_recipe(run.recipe_file, to_run=False).data.format
    except RecipeError as error:
        raise Refusal(400, f"{run.name}: its recipe cannot be read ({error}).", "run_unfit", "model") from None
    return (format.template or TEXT) if isinstance(format, Labels) else TEXT


def label(model: Model, text: str, labels: Sequence[str]) -> Mapping[str, float]:
    """The probability of every label. Raises Refusal: 400 for a text that is too long, or a label that cannot be."""
    turns = [(Turn("user", text),)]
    try:
        if model.stack is None:
            return classify(model.loaded.model, model.loaded.renderer, turns, labels)[0]
        with answering(model.stack, [model.adapter], Apart) as opened:
            return classify(opened, model.loaded.renderer, turns, labels)[0]
    except (BaseError, DataError) as error:
        raise Refusal(400, str(error), "invalid_value", "labels") from None
    except InputError as error:
        raise Refusal(400, str(error), "context_length_exceeded", "input") from None
