"""The combine section: how several adapters answer as one. A union chosen by `kind`.

What the kinds do is described in toolkit/combine/methods.py; what they cannot mean is told by sense_combine.py.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from toolkit.recipe.section import Section, composed

SPARSE = ("ties", "dare_linear", "dare_ties", "magnitude_prune")  # methods of a merge that drop numbers
MAY_TURN_AWAY = ("exact", "linear", "svd")  # methods of a merge in which a negative weight has a meaning
# What each method of a merge adds up: kinds of adapter.
MERGES = {
    "lora": ("exact", "svd", "linear", *SPARSE),
    "embedding": ("exact", "linear", *SPARSE),
    "reft": ("exact",),
}


def _weights_form(value: object) -> str:
    return "<shares>" if isinstance(value, dict) else "<word>"


Weights = Annotated[
    Annotated[Literal["equal", "search"], Tag("<word>")]
    | Annotated[dict[Annotated[str, BeforeValidator(composed)], float], Field(min_length=1), Tag("<shares>")],
    Discriminator(_weights_form),
]
How = Literal["hard", "soft", "logprob"]


class Combination(Section):
    """What every way of combining shares."""

    called: ClassVar[str] = "a combination"


class Route(Combination):
    """One expert answers, or a few do: chosen for each request by what the user says."""

    called: ClassVar[str] = "a route"
    kind: Literal["route"] = "route"
    router: Literal["centroid", "classifier", "embedding"] = Field(
        default="classifier",
        description="centroid: the nearest mean; classifier: a small network; embedding: through an encoder of yours",
    )
    top_k: int = Field(default=1, ge=1, le=1024, description="how many experts answer together; 1: the likeliest")
    default: Annotated[str, BeforeValidator(composed), Field(min_length=1)] = Field(
        default="base", description="who answers what fits nobody: an expert's name, or base"
    )
    margin: float = Field(
        default=0.1, ge=0, lt=1, description="by how much another expert has to win a conversation that has one"
    )
    encoder: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="router embedding: a sentence-transformers folder or hub id"
    )


class Merge(Combination):
    """One adapter is made of several: a weighted sum, or a relative of it. Serves as one."""

    called: ClassVar[str] = "a merge"
    kind: Literal["merge"] = "merge"
    method: Literal["exact", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = Field(
        default="exact", description="exact: the true weighted sum, its rank the sum of the ranks"
    )
    weights: Weights = Field(default="equal", description="equal, search (by held-out loss), or one for each")
    rank: Annotated[int, Field(ge=1, le=65_536)] | None = Field(
        default=None, description="of svd (null: the largest) and of methods that drop numbers (null: the sum of ranks)"
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        default=None, description="share of the numbers that ties, dare_* and magnitude_prune keep; null: 0.5"
    )
    trials: int = Field(default=24, ge=1, le=100_000, description="weights that are tried under weights: search")


class Mix(Combination):
    """All experts read the same words; at every token their distributions are averaged."""

    called: ClassVar[str] = "a mix"
    kind: Literal["mix"] = "mix"
    over: Literal["logprob", "prob"] = Field(
        default="logprob", description="logprob: what one expert excludes is excluded; prob: what one wants is possible"
    )
    weights: Weights = Field(default="equal", description="equal, search (fitted on held-out talk), or one for each")


class Gate(Combination):
    """A small network weighs the experts for every token, inside the layers (arXiv 2402.07148)."""

    called: ClassVar[str] = "a gate"
    kind: Literal["gate"] = "gate"
    per: Literal["layer", "model"] = Field(
        default="model", description="layer: weights of its own in every layer; model: one set, from the first layer"
    )
    how: Literal["learned", "arrow"] = Field(
        default="learned", description="arrow: from the experts' own weights, nothing is trained (arXiv 2405.11157)"
    )
    top_k: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="experts that a token uses; null: all"
    )
    hidden: int = Field(default=32, ge=1, le=65_536, description="width of the network")
    epochs: float = Field(default=2.0, gt=0, le=10_000, description="times it sees the experts' talk")
    learning_rate: float = Field(default=3e-3, gt=0, lt=100, description="of the network; the experts stay as they are")
    balance: float = Field(default=0.01, ge=0, le=100, description="how much uneven use of the experts costs")


class Vote(Combination):
    """Every member answers, or scores every label; the vote decides."""

    called: ClassVar[str] = "a vote"
    kind: Literal["vote"] = "vote"
    how: How = Field(
        default="soft",
        description="of labels: hard, by the likeliest of each; soft, by mean probability; logprob. Of answers: hard",
    )
    weights: Weights = Field(default="equal", description="equal, search (fitted on held-out rows), or one for each")


class Bag(Combination):
    """Members of one recipe, each on a sample of its own (Breiman 1996); they vote."""

    called: ClassVar[str] = "a bag"
    kind: Literal["bag"] = "bag"
    members: int = Field(default=10, ge=2, le=1000, description="how many are trained, side by side")
    vote: How = Field(default="soft", description="labels as in a vote; of text, soft and logprob average each token")
    bootstrap: bool = Field(
        default=True, description="each draws rows with replacement; false: all rows, another seed for each"
    )


class Boost(Combination):
    """Members of one recipe in turn, each on rows weighted by the errors so far (SAMME, Zhu et al. 2009); they vote."""

    called: ClassVar[str] = "a boost"
    kind: Literal["boost"] = "boost"
    rounds: int = Field(default=5, ge=2, le=1000, description="how many at most")
    patience: int = Field(default=1, ge=1, le=1000, description="rounds in a row that do not help before it stops")


COMBINES: dict[str, type[Combination]] = {
    section.model_fields["kind"].default: section for section in (Route, Merge, Mix, Gate, Vote, Bag, Boost)
}
MAKES_MEMBERS = ("bag", "boost")  # of one recipe; the others combine `experts`


def _kind_of(value: object) -> str | None:
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return None if kind is None else f"<{kind}>"


Combine = Annotated[
    Annotated[Route, Tag("<route>")]
    | Annotated[Merge, Tag("<merge>")]
    | Annotated[Mix, Tag("<mix>")]
    | Annotated[Gate, Tag("<gate>")]
    | Annotated[Vote, Tag("<vote>")]
    | Annotated[Bag, Tag("<bag>")]
    | Annotated[Boost, Tag("<boost>")],
    Discriminator(_kind_of),
]


def how_of(combine: Combine) -> str:
    """Which way of its kind a combination is: for most kinds the name of a method in toolkit/combine/methods.py.

    For a bag it is how its members vote (methods describes it by how they come about), and a vote over answers is
    `hard`, there `majority`. A boost is `samme`, which is for labels; over text it is `likelihood`.
    """
    keys = {"route": "router", "merge": "method", "mix": "over", "gate": "how", "vote": "how", "bag": "vote"}
    return str(getattr(combine, keys[combine.kind])) if combine.kind in keys else "samme"


def set_by_hand(combine: Combine) -> Iterator[tuple[str, object]]:
    """The keys of a combination that differ from their defaults, and `kind`."""
    for name, field in type(combine).model_fields.items():
        value = getattr(combine, name)
        if name == "kind" or value != field.default:
            yield name, value
