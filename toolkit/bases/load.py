"""Load a base: its tokenizer with the template that turns are written in, and its weights.

Only safetensors are opened and only trusted code runs; on a CPU weights are fp32 whatever the file holds.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit.bases.families import family_of
from toolkit.bases.fetch import find_folder
from toolkit.bases.files import TOKENIZER_FILES, hash_files, read_config, weight_files
from toolkit.bases.pieces import ids_of
from toolkit.bases.templates import control_pattern, message, open_template, unmarked
from toolkit.errors import BaseError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from toolkit.recipe.model import Base

_NO_LIMIT = 10**7  # tokenizers without a limit say 10**30
_CONTEXT_UNKNOWN = 2048
_CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


@dataclass(frozen=True)
class LoadedTokenizer:
    """What can be known of a base without its weights.

    template: what turns are written with; template_from: `base`, or which of our own families it is. context: tokens
    it was trained on at once. config: its config.json. source: the base as the user wrote it.
    """

    tokenizer: PreTrainedTokenizerBase
    template: str
    template_from: str
    context: int
    config: dict[str, Any]
    source: str
    folder: Path


@dataclass(frozen=True)
class LoadedBase:
    """A base ready to run, in eval mode. hash: sha256 over weights, tokenizer and config files, the same wherever they
    lie.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: str
    template_from: str
    source: str
    folder: Path
    hash: str
    context: int
    device: torch.device
    dtype: torch.dtype


def load_tokenizer(base: Base) -> LoadedTokenizer:
    """The tokenizer and the template of a base; fetches no weights. Raises BaseError, whatever is wrong."""
    return _open_tokenizer(base, find_folder(base, weights=False))


def load_base(base: Base, device: torch.device | str, dtype: torch.dtype) -> LoadedBase:
    """The whole base on `device`. dtype is that of the weights, and of the arithmetic under nf4; a CPU always gets
    fp32.

    Raises BaseError, whatever is wrong with the base, its files, the network or the memory.
    """
    import torch

    place = torch.device(device)
    if place.type == "cpu":
        dtype = torch.float32
    folder = find_folder(base, weights=True)
    _check_causal(read_config(folder, base.model, base.trust_remote_code), base)
    opened = _open_tokenizer(base, folder)
    weights = weight_files(folder, base.model)
    model = _load_model(base, folder, place, dtype)
    embeddings: Any = model.get_input_embeddings()
    n_embeddings = int(embeddings.weight.shape[0])
    if len(opened.tokenizer) > n_embeddings:
        raise BaseError(
            f"{base.model}: its tokenizer knows {len(opened.tokenizer):,} tokens, its weights {n_embeddings:,}: they "
            "do not belong together. Get both from the same place."
        )
    return LoadedBase(
        model=model,
        tokenizer=opened.tokenizer,
        template=opened.template,
        template_from=opened.template_from,
        source=base.model,
        folder=folder,
        hash=hash_files(folder, weights),
        context=opened.context,
        device=place,
        dtype=dtype,
    )


def _open_tokenizer(base: Base, folder: Path) -> LoadedTokenizer:
    config = read_config(folder, base.model, base.trust_remote_code)
    if not any((folder / name).is_file() for name in TOKENIZER_FILES[:5]):
        raise BaseError(f"{base.model}: there is no tokenizer in {folder}. Put the tokenizer.json of this model there.")
    from transformers import AutoTokenizer

    try:
        with hushed():
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=base.trust_remote_code, local_files_only=True
            )
    except Exception as error:  # a broken file shows as any error of any library below
        raise BaseError(f"{base.model}: its tokenizer cannot be read ({brief(error)}). Get its files again.") from None
    tokenizer.clean_up_tokenization_spaces = False  # decoding must give back what was encoded
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    template, template_from = _choose_template(tokenizer, base.model)
    _check_round_trip(tokenizer, template, base.model)
    context = context_of(tokenizer, config)
    return LoadedTokenizer(tokenizer, template, template_from, context, config, base.model, folder)


def _choose_template(tokenizer: PreTrainedTokenizerBase, source: str) -> tuple[str, str]:
    """(template, where it is from): the base's own where it can be trained on, else ours for the tokens it has."""
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default") or next(iter(own.values()), None)
    added = {str(token.content) for token in tokenizer.added_tokens_decoder.values()}
    family = family_of(added, None if own else tokenizer.eos_token)
    problem = "its tokenizer has no end token, so no answer would ever stop. Use another base."
    if own:
        try:
            open_template(own, tokenizer)
            return own, "base"
        except BaseError as error:
            problem = str(error)
    if family is None:
        raise BaseError(f"{source}: {problem}")
    return family.template, f"ours ({family.name})"


def _check_round_trip(tokenizer: PreTrainedTokenizerBase, text: str, source: str) -> None:
    """Raises BaseError unless a talk comes back from its token ids, white space aside, and the end token is one of its
    own.
    """
    template, shape = open_template(text, tokenizer)
    pattern = control_pattern(shape.control)
    talk = [message("user", "Hello there, what is 1 + 2?", pattern), message("assistant", "It's THREE.", pattern)]
    written = unmarked(template.write(talk, prompt=False))
    back = tokenizer.decode(tokenizer.encode(written, add_special_tokens=False), skip_special_tokens=False)
    if "".join(written.split()) != "".join(str(back).split()):
        raise BaseError(
            f"{source}: its tokenizer does not give back what it is given: {written!r} comes back as {back!r}. It "
            "cannot be used for talk; use another base."
        )
    if ids_of(tokenizer, [shape.end])[0] in (None, tokenizer.unk_token_id):
        raise BaseError(f"{source}: its tokenizer does not know {shape.end!r}, which ends an answer. Use another base.")


def context_of(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any]) -> int:
    """The trained context: the smaller of what the tokenizer and the model say, as far as they say anything."""
    of_text = config.get("text_config") or config
    positions = next((of_text[key] for key in ("max_position_embeddings", "n_positions") if of_text.get(key)), None)
    limits = [limit for limit in (tokenizer.model_max_length, positions) if limit and 0 < limit < _NO_LIMIT]
    return int(min(limits)) if limits else _CONTEXT_UNKNOWN


def _check_causal(config: dict[str, Any], base: Base) -> None:
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.get("auto_map") and base.trust_remote_code:
        return
    kind = config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise BaseError(
            f"{base.model}: this version of transformers does not know the architecture {kind!r}. Use another base, "
            "or a newer transformers."
        )
    heads = [str(name) for name in config.get("architectures") or []]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or (heads and not any(h.endswith(_CAUSAL_HEADS) for h in heads)):
        raise BaseError(
            f"{base.model}: {', '.join(heads) or kind} is not a causal language model, so it cannot talk. Use a base "
            "whose architecture ends in ForCausalLM. (An encoder labels texts: task: classify and adapter kind lora, "
            "without search, experts and combine.)"
        )


def _load_model(base: Base, folder: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    import transformers

    loader: Any = transformers.AutoModelForCausalLM  # its from_pretrained is not typed for output_loading_info
    quantized = _quantization(base, device, dtype) if base.quantize == "nf4" else {}
    try:
        with hushed():
            model, found = loader.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=base.trust_remote_code,
                output_loading_info=True,
                **quantized,
            )
            model = model if quantized else model.to(device)
    except Exception as error:  # damaged weights, an unknown variant, too little memory: any error of any library below
        raise BaseError(
            f"{base.model}: its weights cannot be loaded on {device} ({brief(error)}). Get its files again, or take a "
            "smaller base where memory is what lacks."
        ) from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise BaseError(
            f"{base.model}: its weight files lack {len(missing)} tensors of the model ({missing[0]}), which would be "
            "random. Get the files of the whole model."
        )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Else bitsandbytes 0.50.2 repacks 4-bit weights at the first evaluation, with loss and wrong gradients.
            module.support_avx512bf16_for_cpu = False
    ready: PreTrainedModel = model.eval()
    return ready


def _quantization(base: Base, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that load the frozen base in 4 bits (QLoRA, arXiv 2305.14314: nf4, constants quantized again)."""
    from importlib.util import find_spec

    import transformers

    if find_spec("bitsandbytes") is None:
        raise BaseError(
            f"{base.model}: quantize: nf4 needs bitsandbytes. Install it with `pip install 'maltu[gpu]'`, or set "
            "base.quantize: none."
        )
    configure: Any = transformers.BitsAndBytesConfig
    config = configure(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": device}}


@contextmanager
def hushed() -> Iterator[None]:
    """Keep progress bars and notes of the libraries below off the terminal; errors still raise."""
    from transformers.utils import logging as transformers_logging

    notes: Any = transformers_logging  # its functions are not typed
    verbosity, has_bar = notes.get_verbosity(), notes.is_progress_bar_enabled()
    quantizer = logging.getLogger("bitsandbytes")
    level = quantizer.level
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    quantizer.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        quantizer.setLevel(level)
        notes.set_verbosity(verbosity)
        if has_bar:
            notes.enable_progress_bar()


def brief(error: Exception) -> str:
    """What an error says, on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:300] + "…"
