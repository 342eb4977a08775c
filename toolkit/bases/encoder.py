"""An encoder (BERT and the like) as a base that labels texts: which bases are one, and how it is opened.

It has a head with one output a label where a causal language model has words; no template, and no talk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.bases.fetch import find_folder
from toolkit.bases.files import hash_files, read_config, weight_files
from toolkit.bases.load import brief, context_of, hushed
from toolkit.errors import BaseError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.recipe.model import Base

_TALKING_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_POOLER = "pooler"


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder with a head for `labels`, in eval mode. hash: as LoadedBase's, of the files alone.

    head: full names of the modules between the encoder and the labels. What of them the files do not hold is random, so
    all of them learn beside an adapter. context: tokens that it reads at once, its own marks included.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    head: tuple[str, ...]
    labels: tuple[str, ...]
    source: str
    folder: Path
    hash: str
    context: int
    device: torch.device
    dtype: torch.dtype


def is_encoder(base: Base) -> bool:
    """Whether a base is an encoder, by its config.json; fetches no weights. Raises: BaseError where it has none."""
    return is_encoder_config(read_config(find_folder(base, weights=False), base.model, base.trust_remote_code))


def is_encoder_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of an encoder which transformers can put a head for labels on.

    An architecture that fills in masked words, and was not saved as one that writes them one after another.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    kind = config.get("model_type")
    heads = [str(name) for name in config.get("architectures") or []]
    return (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and not config.get("is_encoder_decoder")
        and not config.get("is_decoder")
        and not any(head.endswith(_TALKING_HEADS) for head in heads)
    )


def load_encoder(
    base: Base, labels: Sequence[str], device: torch.device | str, dtype: torch.dtype, *, seed: int
) -> LoadedEncoder:
    """An encoder and a head for these labels, in their order; `seed`: what the new parts of the head follow from.

    Raises: BaseError, whatever is wrong with the base, its files or the memory, and for a base in 4 bits.
    """
    import torch

    if base.quantize != "none":
        raise BaseError(f"{base.model}: an encoder is not held in 4 bits in this version. Set base.quantize: none.")
    place = torch.device(device)
    dtype = torch.float32 if place.type == "cpu" else dtype
    folder = find_folder(base, weights=True)
    config = read_config(folder, base.model, base.trust_remote_code)
    if not is_encoder_config(config):
        named = ", ".join(map(str, config.get("architectures") or [])) or config.get("model_type")
        raise BaseError(f"{base.model}: {named} is no encoder that could label texts. Use BERT or one of its kin.")
    tokenizer = _tokenizer(base, folder)
    weights = weight_files(folder, base.model)
    model, new = _model(base, folder, labels, place, dtype, seed=seed)
    embeddings: Any = model.get_input_embeddings()
    n_embeddings = int(embeddings.weight.shape[0])
    if len(tokenizer) > n_embeddings:
        raise BaseError(
            f"{base.model}: its tokenizer knows {len(tokenizer):,} tokens, its weights {n_embeddings:,}: they do not "
            "belong together. Get both from the same place."
        )
    return LoadedEncoder(
        model=model,
        tokenizer=tokenizer,
        head=_head(model, new, base.model),
        labels=tuple(labels),
        source=base.model,
        folder=folder,
        hash=hash_files(folder, weights),
        context=min(context_of(tokenizer, config), _positions(model)),
        device=place,
        dtype=dtype,
    )


def sketch_encoder(base: Base, labels: Sequence[str]) -> LoadedEncoder:
    """What can be known of an encoder without its weights: the model lies on the meta device, and has no hash.

    Raises: BaseError as `load_encoder` does, as far as no weights are needed.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder = find_folder(base, weights=False)
    known = read_config(folder, base.model, base.trust_remote_code)
    code = base.trust_remote_code
    config = AutoConfig.from_pretrained(folder, trust_remote_code=code, local_files_only=True, num_labels=len(labels))
    make: Any = AutoModelForSequenceClassification.from_config  # not typed
    with torch.device("meta"):
        model = make(config, trust_remote_code=code)
    tokenizer = _tokenizer(base, folder)
    return LoadedEncoder(
        model=model,
        tokenizer=tokenizer,
        head=_head(model, (), base.model),
        labels=tuple(labels),
        source=base.model,
        folder=folder,
        hash="",
        context=min(context_of(tokenizer, known), _positions(model)),
        device=torch.device("meta"),
        dtype=torch.float32,
    )


def _tokenizer(base: Base, folder: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        with hushed():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=base.trust_remote_code, local_files_only=True
            )
    except Exception as error:  # a broken file shows as any error of any library below
        raise BaseError(f"{base.model}: its tokenizer cannot be read ({brief(error)}). Get its files again.") from None
    if tokenizer.pad_token_id is None:
        raise BaseError(f"{base.model}: its tokenizer has no padding token, which batches need. Use another encoder.")
    return tokenizer


def _model(
    base: Base, folder: Path, labels: Sequence[str], device: torch.device, dtype: torch.dtype, *, seed: int
) -> tuple[PreTrainedModel, list[str]]:
    """The model and the names of the tensors that no file holds in this shape."""
    import torch
    import transformers

    loader: Any = transformers.AutoModelForSequenceClassification
    names = dict(enumerate(labels))
    try:
        with hushed(), torch.random.fork_rng([]):
            torch.manual_seed(seed)  # a new head is made on the CPU
            model, found = loader.from_pretrained(
                folder,
                dtype=dtype,
                num_labels=len(labels),
                id2label=names,
                label2id={label: number for number, label in names.items()},
                problem_type="single_label_classification",
                ignore_mismatched_sizes=True,  # the head of another set of labels
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=base.trust_remote_code,
                output_loading_info=True,
            )
            model = model.to(device).eval()
    except Exception as error:  # damaged weights, too little memory: any error of any library below
        raise BaseError(
            f"{base.model}: its weights cannot be loaded on {device} ({brief(error)}). Get its files again, or take a "
            "smaller base where memory is what lacks."
        ) from None
    mismatched = [str(name[0]) for name in found["mismatched_keys"]]
    return model, sorted({*found["missing_keys"], *mismatched})


def _head(model: PreTrainedModel, new: Iterable[str], source: str) -> tuple[str, ...]:
    """The modules that have parameters and are not the encoder's own, and its pooler where no file holds that.

    Raises: BaseError where the files lack anything else.
    """
    encoder = model.base_model_prefix
    head = {name for name, module in model.named_children() if name != encoder and _has_parameters(module)}
    for name in new:
        parts = name.split(".")
        if parts[:2] == [encoder, _POOLER]:
            head.add(f"{encoder}.{_POOLER}")
        elif parts[0] not in head:
            raise BaseError(
                f"{source}: its weight files lack tensors of the encoder ({name}), which would be random. Get the "
                "files of the whole model."
            )
    return tuple(sorted(head))


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _positions(model: PreTrainedModel) -> int:
    """How many positions the table of the encoder holds; RoBERTa and its kin keep the first ones for padding."""
    tables: list[Any] = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    found = [
        int(table.num_embeddings) - (0 if table.padding_idx is None else int(table.padding_idx) + 1)
        for table in tables
        if hasattr(table, "num_embeddings")
    ]
    return min(found, default=2**31)
