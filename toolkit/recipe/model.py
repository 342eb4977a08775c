"""What a recipe may say: every section, its keys, their bounds and defaults.

`auto` stays the word here: what it becomes depends on the base and the machine, and is decided when both are known.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, GetJsonSchemaHandler, Tag
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from toolkit.recipe.adapter import Adapter, Embedding, Full, Lora, PeftKind, Prefix, Reft
from toolkit.recipe.candidates import Candidates
from toolkit.recipe.combine import Combine
from toolkit.recipe.section import AutoBool, AutoInt, AutoRate, Section, SomeStrings, composed
from toolkit.recipe.space import Range, Search
from toolkit.recipe.track import Trackers

__all__ = [
    "Adapter", "Base", "Candidates", "Clean", "Columns", "Data", "Embedding", "Evaluate", "Full", "Labels", "Lora",
    "NewBase", "NewShape", "PeftKind", "Prefix", "Range", "Recipe", "Reft", "Search", "Serve", "Train", "WeightedFile",
]  # fmt: skip

RESERVED_NAMES = frozenset({"base", "auto"})
NOT_FOR_EXPERTS = {
    "main": "the adapter of a run with one",
    "combination": "what all experts together are called",
    "other": "what tables call whoever is no expert",
}
DEVICES = frozenset({"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(1, 10))})
REFUSED_SIGNS = ':/\\=,<>|"?*'


def _is_run_name(name: str) -> str:
    if name.lower() in RESERVED_NAMES:
        raise ValueError(f"'{name}' is reserved: a server answers to it without any run. Choose another name")
    if name.split(".")[0].rstrip().lower() in DEVICES:  # with whatever ending
        raise ValueError(f"'{name}' names a device on Windows, so no folder there can have it. Choose another name")
    found = sorted({sign for sign in name if sign in REFUSED_SIGNS or not sign.isprintable()})
    if found:
        signs = " ".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in found)
        raise ValueError(
            f"a run's name is a folder and a model name, so it cannot hold {signs}. Use letters, digits, - and _"
        )
    if name != name.strip() or name.startswith((".", "-", "~")) or name.endswith("."):
        raise ValueError(f"'{name}' cannot be a folder's name: begin and end with a letter or a digit")
    if len(name.encode()) > 200:
        raise ValueError(f"is {len(name.encode())} bytes long; a folder's name holds at most 200. Shorten it")
    return name


def _is_path_of_columns(column: str) -> str:
    if not all(part.strip() for part in column.split(".")):
        raise ValueError(f"'{column}' has an empty part; write a column's name, or a path as in messages.0.content")
    return column


def _has_place_for_text(template: str) -> str:
    if template.count("{text}") != 1:
        raise ValueError("must hold {text} once: the place where the text goes")
    return template


def _is_expert_name(name: str) -> str:
    taken = NOT_FOR_EXPERTS.get(name.lower())
    if taken is not None:
        raise ValueError(f"'{name}' is reserved: {taken}. Choose another name")
    if "." in name:
        raise ValueError("an expert's name is also part of a key, so it cannot hold a dot. Write - or _")
    return name


RunName = Annotated[str, Field(min_length=1), BeforeValidator(composed), AfterValidator(_is_run_name)]
ExpertName = Annotated[RunName, AfterValidator(_is_expert_name)]
Column = Annotated[str, Field(min_length=1), AfterValidator(_is_path_of_columns)]


class Base(Section):
    """An existing base model."""

    called: ClassVar[str] = "an existing base"
    model: str = Field(min_length=1, description="catalogue name, hub id (owner/name), or folder")
    revision: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="branch, tag or commit of a hub id"
    )
    quantize: Literal["none", "nf4"] = Field(default="none", description="nf4: the frozen base in 4 bits (QLoRA)")
    trust_remote_code: bool = Field(default=False, description="run Python code that lies beside the weights")


class NewShape(Section):
    """The shape of a base made from scratch."""

    called: ClassVar[str] = "a new base's shape"
    hidden: int = Field(default=192, ge=16, le=8192, description="width; a multiple of twice the heads")
    layers: int = Field(default=6, ge=1, le=128, description="transformer blocks")
    heads: int = Field(default=3, ge=1, le=128, description="attention heads")
    vocab: int = Field(
        default=8192, ge=300, le=262_144, description="tokens of the byte-level BPE that is trained first"
    )
    context: int = Field(default=512, ge=64, le=131_072, description="positions")


class NewBase(Section):
    """A base made from scratch: its tokenizer is trained first, then the model."""

    called: ClassVar[str] = "a base made from scratch"
    new: NewShape = Field(description="the shape of the base")


class Columns(Section):
    """Rows with one question and one answer; a column may be a path with numbers, as in messages.-1.content."""

    called: ClassVar[str] = "a columns format"
    kind: Literal["columns"] = "columns"
    user: Column = Field(description="column of what the user says")
    assistant: Column = Field(description="column of the answer")


class Labels(Section):
    """Rows with a text and its label; the label is learned as the answer."""

    called: ClassVar[str] = "a labels format"
    kind: Literal["labels"] = "labels"
    text: Column = Field(description="column of the text")
    label: Column = Field(description="column of the label")
    names: dict[str, Annotated[str, Field(min_length=1)]] | None = Field(
        default=None, description="label in the file: word to answer with"
    )
    template: Annotated[str, AfterValidator(_has_place_for_text)] = Field(
        default="{text}", description="the prompt; {text} is the text"
    )


def _format_kind(value: object) -> str | None:
    if isinstance(value, str):
        return "<word>"
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return None if kind is None else f"<{kind}>"


Format = Annotated[
    Annotated[Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"], Tag("<word>")]
    | Annotated[Columns, Tag("<columns>")]
    | Annotated[Labels, Tag("<labels>")],
    Discriminator(_format_kind),
]


def _is_share(value: object) -> str:
    return "<value>" if isinstance(value, int | float) else "<files>"


Held = Annotated[
    Annotated[float, Field(ge=0, le=0.5), Tag("<value>")] | Annotated[SomeStrings, Tag("<files>")],
    Discriminator(_is_share),
]


class Clean(Section):
    """How talk is cleaned before anything learns from it."""

    called: ClassVar[str] = "clean"
    unicode: Literal["NFC", "NFKC", "none"] = Field(default="NFC", description="normal form of every text")
    duplicates: Literal["exact", "none"] = Field(default="exact", description="exact: keep one of equal conversations")
    near_duplicates: Annotated[float, Field(ge=0.5, le=1)] | None = Field(
        default=0.9, description="similarity from which one is kept; null: all"
    )
    mask_private: Literal["user", "all", "none"] = Field(
        default="user", description="whose e-mails, phone, resident and card numbers are masked"
    )
    min_turns: int = Field(default=2, ge=1, le=1000, description="shorter conversations are dropped")
    too_long: Literal["drop_old_turns", "drop"] = Field(
        default="drop_old_turns",
        description="over max_length: leave out the oldest turns, or the whole conversation",
    )
    max_dropped: float = Field(default=0.05, ge=0, le=1, description="more than this share dropped stops the run")


class WeightedFile(Section):
    """A file to learn from, more or less often than the others."""

    called: ClassVar[str] = "a file with a weight"
    path: str = Field(min_length=1, description="the file, as data.train names one")
    weight: float = Field(default=1.0, gt=0, le=1000, description="how often its rows are seen in an epoch, on average")


def _file_form(value: object) -> str:
    return "<weighted>" if isinstance(value, dict | WeightedFile) else "<word>"


TrainFile = Annotated[
    Annotated[str, Field(min_length=1), Tag("<word>")] | Annotated[WeightedFile, Tag("<weighted>")],
    Discriminator(_file_form),
]
TrainFiles = Annotated[tuple[TrainFile, ...], Field(strict=False, min_length=1)]


class Data(Section):
    """Where the talk comes from and how it is split."""

    called: ClassVar[str] = "data"
    train: TrainFiles = Field(
        description="jsonl, jsonl.gz, csv, parquet, hub:NAME[:config][:split], maltu:NAME (shipped); or {path, weight}"
    )
    valid: Held = Field(default=0.1, description="share held out while training, or files; 0: none")
    test: Held = Field(default=0.1, description="share held out until the end, or files; 0: none")
    format: Format = Field(default="auto", description="shape of the rows; auto: sniffed")
    system: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="system turn put before conversations without one"
    )
    clean: Clean = Field(default=Clean(), description="cleaning")

    @property
    def train_files(self) -> tuple[str, ...]:
        """The names of the files to learn from, without their weights."""
        return tuple(one if isinstance(one, str) else one.path for one in self.train)

    @property
    def train_weights(self) -> tuple[float, ...]:
        """The weight of each file to learn from; 1 where none is written."""
        return tuple(1.0 if isinstance(one, str) else one.weight for one in self.train)


class Train(Section):
    """How the adapter learns."""

    called: ClassVar[str] = "train"
    epochs: float = Field(default=3.0, gt=0, le=10_000, description="passes over the training talk")
    max_steps: Annotated[int, Field(ge=1)] | None = Field(default=None, description="optimizer steps; overrules epochs")
    batch_size: int = Field(
        default=8, ge=1, le=65_536, description="conversations per optimizer step over all devices, packed or not"
    )
    micro_batch: AutoInt = Field(
        default="auto", description="conversations per forward pass and device; auto: what memory holds"
    )
    learning_rate: AutoRate = Field(default="auto", description="peak learning rate; auto: by adapter kind and base")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="learning rate after the warm-up"
    )
    warmup_ratio: float = Field(
        default=0.05, ge=0, lt=1, description="share of the steps in which the learning rate rises"
    )
    optimizer: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: matrices by Muon, the rest by AdamW; full training only"
    )
    weight_decay: float = Field(
        default=0.0, ge=0, lt=1, description="share of each weight taken off, times the learning rate"
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="longer gradients are shortened; null: never"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="auto: bf16 where the device has it, fp32 on CPU"
    )
    activation_checkpointing: AutoBool = Field(default="auto", description="compute activations twice to save memory")
    packing: AutoBool = Field(default="auto", description="several conversations in one row, none sees the other")
    max_length: AutoInt = Field(
        default="auto", description="tokens per conversation; auto: the base's trained context, at most 2048"
    )
    evaluate_every: float = Field(default=0.25, gt=0, description="epochs between evaluations on the held-out talk")
    early_stop_patience: Annotated[int, Field(ge=1)] | None = Field(
        default=2, description="evaluations without progress before it stops; null: never"
    )
    keep: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False)] = Field(
        default=(), description="steps whose checkpoints stay"
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="of shuffling, dropout and new weights")


CLASSIFY_METRICS = ("accuracy", "macro_f1", "log_loss")
Metric = Literal[
    "loss",
    "bits_per_byte",
    "chrf",
    "bleu",
    "rouge",
    "distinct_2",
    "repetition",
    "length",
    "ends",
    "levels",
    "spoken",
    "accuracy",
    "macro_f1",
    "log_loss",
]


class Evaluate(Section):
    """What is measured before and after."""

    called: ClassVar[str] = "evaluate"
    prompts: Annotated[str, Field(min_length=1)] | None = Field(
        default="maltu:probes.jsonl", description="prompts answered before and after"
    )
    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = Field(
        default=("loss", "bits_per_byte", "chrf", "distinct_2", "repetition"),
        description="what is written into metrics.jsonl",
    )


class Serve(Section):
    """Defaults of a server for this run only."""

    called: ClassVar[str] = "serve"
    temperature: float = Field(default=0.7, ge=0, le=2, description="0: always the likeliest token")
    top_p: float = Field(default=0.9, gt=0, le=1, description="share of the likelihood that is sampled from")
    max_tokens: int = Field(default=256, ge=1, le=1_000_000, description="longest answer")


def _base_form(value: object) -> str | None:
    if isinstance(value, dict):
        return next((f"<{form}>" for form in ("new", "model", "candidates") if form in value), "<model>")
    forms = {Base: "<model>", NewBase: "<new>", Candidates: "<candidates>"}
    return next((tag for form, tag in forms.items() if isinstance(value, form)), None)


SomeBase = Annotated[Annotated[Base, Tag("<model>")] | Annotated[NewBase, Tag("<new>")], Discriminator(_base_form)]


class ExpertData(Section):
    """The talk of an expert."""

    called: ClassVar[str] = "an expert's data"
    train: TrainFiles = Field(description="its own files; without them, those of the recipe")


class Expert(Section):
    """What an expert may have of its own, for editors; experts.py lays it over the recipe, where it is checked."""

    called: ClassVar[str] = "an expert"
    data: ExpertData | None = Field(default=None, description="the talk it learns from")
    adapter: Adapter | None = Field(default=None, description="what learns; another kind brings its own defaults")
    train: Train | None = Field(default=None, description="how it learns, key by key")
    base: SomeBase | None = Field(default=None, description="another base, under combine: {kind: vote} only")
    run: Annotated[str, Field(min_length=1)] | None = Field(
        default=None, description="the folder of a run that exists, and nothing besides"
    )


class _LikeAnExpert:
    """Editors are told of `Expert`; what is kept is what was written."""

    def __get_pydantic_json_schema__(self, _: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        described = handler(Expert.__pydantic_core_schema__)
        for form in handler.resolve_ref_schema(described)["properties"]["adapter"]["anyOf"]:
            if "oneOf" in form:  # keys without a kind fit several kinds
                form["anyOf"] = form.pop("oneOf")
        return described


def _or_nothing(value: object) -> object:
    return {} if value is None else value


Overrides = Annotated[dict[str, Any], BeforeValidator(_or_nothing), _LikeAnExpert()]


class Recipe(Section):
    """Everything a run does, and nothing outside it."""

    called: ClassVar[str] = "a recipe"
    name: RunName = Field(description="also the run folder's name")
    task: Literal["chat", "classify", "text2text"] = Field(
        default="chat", description="text2text: summarise, translate, rewrite"
    )
    base: Annotated[
        Annotated[Base, Tag("<model>")] | Annotated[NewBase, Tag("<new>")] | Annotated[Candidates, Tag("<candidates>")],
        Discriminator(_base_form),
    ] = Field(description="the model that learns to talk this way")
    data: Data = Field(description="the talk")
    adapter: Adapter = Field(default=Lora(), description="what learns, chosen by kind")
    train: Train = Field(default=Train(), description="how it learns")
    search: Search | None = Field(default=None, description="find the best values by trials; null: none are searched")
    experts: Annotated[dict[ExpertName, Overrides], Field(min_length=1)] | None = Field(
        default=None, description="several adapters in one run, by name: what each has of its own, or {run: FOLDER}"
    )
    combine: Combine | None = Field(default=None, description="how several adapters answer as one")
    evaluate: Evaluate = Field(default=Evaluate(), description="what is measured")
    track: Trackers = Field(
        default=("tensorboard",), description="where numbers go beside metrics.jsonl; wandb is offline without a key"
    )
    serve: Serve = Field(default=Serve(), description="defaults when served")
