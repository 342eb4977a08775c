"""The adapter section: a union chosen by `kind`, and the kinds of PEFT that may be named."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from toolkit.recipe.section import Section, SomeStrings

# PEFT's own names (peft 0.21.2) in lower case. `lora` is a kind of ours; the rest is refused below, with the reason.
PEFT_KINDS = frozenset(
    "adamss adaption_prompt beft boft c3a deft delora fourierft frod glora gralora hira hra ia3 ln_tuning "
    "loha lokr miss oft osf p_tuning peanut prompt_tuning psoft pvera randlora road shadow shira supertuning "
    "tinylora unilora vblora vera waveft".split()
)
REFUSED_KINDS = {
    "prefix_tuning": "here it is called prefix. Write kind: prefix.",
    "adalora": "it has to be called at every step to move its ranks, which this version does not. Use kind: lora.",
    "cartridge": "it is distilled from one long text, which this version does not do. Use kind: prefix with init_text.",
    "cpt": "its own loss wants a type for every token, which rows of talk do not have. Use kind: prompt_tuning.",
    "lily": "it averages over the whole row, so a token's answer depends on what comes after it. Use kind: lora.",
    "multitask_prompt_tuning": "it wants a task number with every row. Use kind: prompt_tuning.",
    "poly": "it wants a task number with every row. Use kind: lora.",
    "trainable_tokens": "on a tied base it changes the head as well, unseen by the loss. Use kind: embedding.",
    "xlora": "mixing adapters by a learned gate is not in this version. Use kind: lora.",
}
# Kinds that put learned positions before the row: they cannot tell a second packed conversation from the first.
PREFIX_LIKE = frozenset({"prefix", "prompt_tuning", "p_tuning", "adaption_prompt"})
SET_BY_US = frozenset({"task_type", "peft_type", "base_model_name_or_path", "inference_mode", "revision"})


def _is_multiple(text: str) -> str:
    number = text.removesuffix("x")
    if number == text or not number.replace(".", "", 1).isdecimal() or not 0 < float(number) <= 1000:
        raise ValueError(f"must be a number, or a multiple of the rank as in 2x, not '{text}'")
    return text


def _alpha_form(value: object) -> str:
    return "<word>" if isinstance(value, str) else "<value>"


Alpha = Annotated[
    Annotated[str, Field(json_schema_extra={"pattern": r"^\d+(\.\d+)?x$"}), AfterValidator(_is_multiple), Tag("<word>")]
    | Annotated[float, Field(gt=0, le=100_000), Tag("<value>")],
    Discriminator(_alpha_form),
]


class AdapterSection(Section):
    """What every kind of adapter shares."""

    called: ClassVar[str] = "an adapter"


class Lora(AdapterSection):
    """A low-rank update beside linear layers (arXiv 2106.09685)."""

    called: ClassVar[str] = "a lora adapter"
    kind: Literal["lora"] = "lora"
    rank: int = Field(default=16, ge=1, le=1024, description="columns of A, rows of B")
    alpha: Alpha = Field(
        default="2x", description="the update is scaled by alpha / rank; a number, or a multiple of the rank as in 2x"
    )
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="share of the layer's input left out of the update while training"
    )
    targets: Annotated[
        Annotated[Literal["all-linear"], Tag("<word>")] | Annotated[SomeStrings, Tag("<value>")],
        Discriminator(_alpha_form),
    ] = Field(default="all-linear", description="all-linear, or a list of layer names")
    rank_stabilised: bool = Field(default=False, description="scale by alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = Field(
        default=False, description="learn the length of each weight column apart from its direction (arXiv 2402.09353)"
    )
    init: Literal["default", "pissa"] = Field(
        default="default", description="pissa: start from the largest singular values (arXiv 2404.02948)"
    )

    @property
    def alpha_number(self) -> float:
        """Alpha as a number: `2x` is twice the rank."""
        return float(self.alpha[:-1]) * self.rank if isinstance(self.alpha, str) else float(self.alpha)


class Prefix(AdapterSection):
    """Learned keys and values before the row, in every layer (arXiv 2101.00190)."""

    called: ClassVar[str] = "a prefix adapter"
    kind: Literal["prefix"] = "prefix"
    tokens: int = Field(default=16, ge=1, le=1024, description="learned positions in front of every conversation")
    projection: bool = Field(default=False, description="learn through a small network instead of directly")
    init_text: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="start from the keys and values of this text"
    )


class Reft(AdapterSection):
    """LoReFT: a low-rank edit of hidden states (arXiv 2404.03592)."""

    called: ClassVar[str] = "a reft adapter"
    kind: Literal["reft"] = "reft"
    rank: int = Field(default=4, ge=1, le=1024, description="directions that each edited layer may move")
    layers: Annotated[
        Annotated[Literal["all"], Tag("<word>")]
        | Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(strict=False, min_length=1), Tag("<value>")],
        Discriminator(_alpha_form),
    ] = Field(default="all", description="all, or a list of layer numbers from 0")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="share of the edit left out while training")


class Embedding(AdapterSection):
    """Only the input embeddings of the tokens seen in training learn; the head stays as it is."""

    called: ClassVar[str] = "an embedding adapter"
    kind: Literal["embedding"] = "embedding"


class Full(AdapterSection):
    """Every weight of the base learns; the run keeps a whole model."""

    called: ClassVar[str] = "full training"
    kind: Literal["full"] = "full"


class PeftKind(AdapterSection):
    """Another kind of PEFT, by PEFT's name; `options` go to its config as they are."""

    called: ClassVar[str] = "an adapter of PEFT"
    kind: str = Field(description="PEFT's name in lower case", json_schema_extra={"enum": [*sorted(PEFT_KINDS)]})
    options: dict[str, Any] = Field(default_factory=dict, description="keys of that kind's PEFT config")

    @model_validator(mode="after")
    def _kind_and_options_are_ours_to_give(self) -> "PeftKind":
        if self.kind not in PEFT_KINDS:
            raise ValueError(REFUSED_KINDS.get(self.kind, f"'{self.kind}' is not a kind of PEFT"))
        return self


KINDS = {section.model_fields["kind"].default: section for section in (Lora, Prefix, Reft, Embedding, Full)}


def _kind_of(value: object) -> str | None:
    if isinstance(value, PeftKind):
        return "<peft>"
    if isinstance(value, AdapterSection):
        return f"<{getattr(value, 'kind', '')}>"
    if not isinstance(value, dict):
        return None
    kind = value.get("kind", "lora")
    known = isinstance(kind, str) and (kind in PEFT_KINDS or kind in REFUSED_KINDS)
    return "<peft>" if known else f"<{kind}>"


Adapter = Annotated[
    Annotated[Lora, Tag("<lora>")]
    | Annotated[Prefix, Tag("<prefix>")]
    | Annotated[Reft, Tag("<reft>")]
    | Annotated[Embedding, Tag("<embedding>")]
    | Annotated[Full, Tag("<full>")]
    | Annotated[PeftKind, Tag("<peft>")],
    Discriminator(_kind_of),
]
