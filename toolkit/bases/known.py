"""One row of the catalogue: its figures, their sources, our estimate of memory, and where a loaded config disagrees.

A figure that was read nowhere is None, and `gaps` says so. Imports no torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from math import ceil
from typing import Any, Literal

READ = date(2026, 11, 24)
FIGURES = ("languages", "parameters", "licence", "commercial", "context", "template")

Template = Literal["marked", "unmarked", "present"]
"""marked: has {% generation %} markers; unmarked: has none; present: there is a template, its markers were not read."""


@dataclass(frozen=True)
class Source:
    """An address that was really read, and the day."""

    url: str
    read: date = READ


@dataclass(frozen=True)
class Shape:
    """The sizes that decide memory; `kv_heads` and `head_dim` as transformers names them."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of the seven linear layers of one decoder layer: q, k, v, o, gate, up, down."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.hidden, query), (self.hidden, key), (self.hidden, key), (query, self.hidden))
        wide = (self.hidden, self.intermediate)
        return (*attention, wide, wide, wide[::-1])


@dataclass(frozen=True)
class KnownBase:
    """One base of the catalogue. None is «not read anywhere»; `sources` holds the address of every figure that was."""

    name: str
    hub_id: str | None
    shipped: bool = False
    languages: tuple[str, ...] | None = None
    more_languages: int = 0  # languages the source counts beyond those named here
    parameters: int | None = None
    licence: str | None = None
    commercial: bool | None = None
    context: int | None = None
    template: Template | None = None
    spoken: bool | None = None  # trained on spoken style: only where a source says so
    shape: Shape | None = None
    remote_code: bool = False
    note: str = ""
    sources: Mapping[str, Source] = field(default_factory=dict)

    @property
    def lora_mb(self) -> int | None:
        """Our estimate for LoRA, rank 16, one row of 1,024 tokens; None without a shape."""
        return estimate_mb(self.shape, self.parameters, nf4=False)

    @property
    def qlora_mb(self) -> int | None:
        """The same over a base in nf4."""
        return estimate_mb(self.shape, self.parameters, nf4=True)


def estimate_mb(
    shape: Shape | None, parameters: int | None, *, nf4: bool, rank: int = 16, tokens: int = 1024
) -> int | None:
    """MiB that one training step of a LoRA on every linear layer takes at its peak: an estimate, not a measurement.

    Base in bf16 (2 bytes a parameter; nf4 with double quantisation: 4.127 bits for the linear layers, and the largest
    of them unpacked once), adapter in fp32 with its gradient and two Adam moments (16 bytes), activations kept without
    checkpointing (28 hidden + 10 intermediate + 8 query width + 4 key width + 28 rank + 8 bytes a token and layer:
    fitted exactly to the tensors torch 2.13 saves for a Llama layer under PEFT 0.21.2 with SDPA), logits at once
    (14 bytes a token and vocabulary entry). Left out: the CUDA context and what the allocator wastes.
    """
    if shape is None or parameters is None:
        return None
    matrices = shape.matrices()
    linear = shape.layers * sum(rows * columns for rows, columns in matrices)
    adapter = shape.layers * rank * sum(rows + columns for rows, columns in matrices)
    query, key = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = 28 * shape.hidden + 10 * shape.intermediate + 8 * query + 4 * key + 28 * rank + 8
    weights = 2.0 * parameters
    if nf4:
        weights += linear * (4.127 / 8 - 2) + 2 * max(rows * columns for rows, columns in matrices)
    return ceil((weights + 16 * adapter + tokens * (shape.layers * per_token + 14 * shape.vocab)) / 2**20)


def gaps(known: KnownBase) -> tuple[str, ...]:
    """The figures that no source gave: those of `FIGURES`, and the markers of a template that was not read itself."""
    missing = [figure for figure in FIGURES if getattr(known, figure) is None]
    return (*missing, "template markers") if known.template == "present" else tuple(missing)


def differences(known: KnownBase, config: Any) -> list[str]:
    """What a loaded transformers config says otherwise than the row does; empty where they agree or nothing is known.

    A longer context is reported only beyond twice: configs leave room for the answer. Parameters are counted from the
    config and may be a tenth off, because cards round.
    """
    text = config.get_text_config() if callable(getattr(config, "get_text_config", None)) else config
    loaded, found = shape_of(text), []
    if known.shape is not None and loaded is not None:
        pairs = ((name, getattr(known.shape, name), getattr(loaded, name)) for name in Shape.__dataclass_fields__)
        found += [_differs(known, "shape", name, ours, theirs) for name, ours, theirs in pairs if ours != theirs]
    context = getattr(text, "max_position_embeddings", None)
    if known.context and context and not known.context <= context <= 2 * known.context:
        found.append(_differs(known, "context", "context", known.context, context))
    if known.parameters and loaded is not None and _is_plain(text):
        counted = count_parameters(loaded, tied=bool(getattr(text, "tie_word_embeddings", False)))
        if abs(counted - known.parameters) > 0.1 * known.parameters:
            found.append(_differs(known, "parameters", "parameters", known.parameters, counted))
    return found


def shape_of(config: Any) -> Shape | None:
    """The shape a text config declares, or None where it is not that of a plain decoder."""
    layers = "num_hidden_layers" if hasattr(config, "num_hidden_layers") else "num_layers"
    names = (layers, "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    sizes: list[Any] = [getattr(config, name, None) for name in names]
    if not all(isinstance(size, int) for size in sizes):
        return None
    n_layers, hidden, intermediate, heads, vocab = sizes
    kv_heads: int = getattr(config, "num_key_value_heads", None) or heads
    head_dim: int = getattr(config, "head_dim", None) or hidden // heads
    return Shape(n_layers, hidden, intermediate, heads, kv_heads, head_dim, vocab)


def count_parameters(shape: Shape, *, tied: bool) -> int:
    """Parameters of a gated decoder of that shape, norms and biases left out (under a hundredth of them)."""
    linear = sum(rows * columns for rows, columns in shape.matrices())
    return shape.vocab * shape.hidden * (1 if tied else 2) + shape.layers * linear


def _is_plain(config: Any) -> bool:
    """Every layer is attention with one gated MLP: no experts, no convolutions, so that counting holds."""
    kinds = set(getattr(config, "layer_types", None) or ())
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    return not experts and kinds <= {"full_attention", "sliding_attention", "chunked_attention"}


def _differs(known: KnownBase, figure: str, name: str, ours: int, theirs: int) -> str:
    source = known.sources[figure].url if figure in known.sources else "no source"
    return f"{known.name}: {name} is {theirs:,} in the loaded config, {ours:,} in the catalogue ({source})"
