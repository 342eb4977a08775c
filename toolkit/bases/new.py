"""A base from scratch: its tokenizer, its model, the optimizer that trains it, and the windows it is trained on.

Nothing here reads a file or runs a loop: `toolkit.fit` hands in texts and token ids, and trains.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from toolkit.bases.families import OURS
from toolkit.errors import BaseError
from toolkit.recipe.model import NewShape

DOCUMENT = "<|endoftext|>"
END_OF_TURN = "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
SPECIAL_TOKENS = (DOCUMENT, *ROLES, END_OF_TURN)
_N_BYTES = 256
_ROPE_THETA = 10_000.0


def train_tokenizer(texts: Iterable[str], vocab: int, *, context: int = 512) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from `texts`: any text survives encoding and decoding, but for its normalisation to NFC.

    The special tokens take the ids from 0 in the order of SPECIAL_TOKENS: DOCUMENT opens a document and pads,
    END_OF_TURN ends a turn and a generation. The template is ours. The vocabulary is smaller than `vocab` when the
    texts hold too few pairs seen twice. The same texts give the same tokenizer, in any process.
    Raises: BaseError where the texts hold nothing to learn from, or `vocab` has no room for a single pair.
    Cost: about 9 s for 30 MB of text on two cores. Source: byte-level BPE, GPT-2; special tokens are never merged into.
    """
    smallest = _N_BYTES + len(SPECIAL_TOKENS)
    if vocab <= smallest:
        raise BaseError(
            f"A vocabulary of {vocab} has no room beside {smallest} bytes and special tokens. Ask for 300 or more."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() <= smallest:
        raise BaseError(
            "The texts hold nothing to learn a tokenizer from. A new base needs far more text: add files to data.train."
        )
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=DOCUMENT,
        pad_token=DOCUMENT,
        eos_token=END_OF_TURN,
        extra_special_tokens=list(ROLES),
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = OURS
    return fast


def new_model(shape: NewShape, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings and random weights, the same ones for the same shape, tokenizer size and seed.

    Each block starts as the identity (what it adds to the stream is multiplied by zero), the other matrices at a
    standard deviation of half of one over the root of their inputs. The global random state stays as it was.
    Raises: BaseError where the width does not divide into heads of an even size.
    """
    if shape.hidden % (2 * shape.heads):
        raise BaseError(
            f"A hidden width of {shape.hidden} does not divide into {shape.heads} heads of an even size."
            f" Take base.new.hidden: {2 * shape.heads * max(1, round(shape.hidden / (2 * shape.heads)))}."
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=intermediate_size(shape.hidden),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        head_dim=shape.hidden // shape.heads,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config)
    _initialise(model, torch.Generator().manual_seed(seed))
    return model


def intermediate_size(hidden: int) -> int:
    """Width of the gated feed-forward layer: 8/3 of the hidden width, to the nearest multiple of 64."""
    return max(64, 64 * round(hidden * 8 / 3 / 64))


@torch.no_grad()
def _initialise(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim != 2:
            parameter.fill_(1.0)
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
        elif name.endswith("embed_tokens.weight"):
            parameter.normal_(0.0, 0.02, generator=generator)
        else:
            parameter.normal_(0.0, 0.5 / math.sqrt(parameter.shape[1]), generator=generator)


class MuonAdamW(torch.optim.Optimizer):
    """Muon for one part of the parameters and AdamW for the other, behaving as one optimizer.

    Both halves work on this optimizer's own groups and state, so that schedulers, `state_dict` and `load_state_dict`
    meet one optimizer only, and a run that was saved and loaded goes on bit for bit. Every group says which half it
    belongs to: `kind` muon or adamw. The learning rate is AdamW's for both: Muon's steps are scaled to that size.
    Sources: Muon, torch.optim.Muon; the scale, arXiv 2502.16982 section 2.2.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], learning_rate: float) -> None:
        super().__init__([dict(group) for group in groups], {"lr": learning_rate})
        self._make_halves()

    def _make_halves(self) -> None:
        # Each half adds its own defaults to the groups it is given; they are this optimizer's own groups, not copies.
        self._halves: dict[str, torch.optim.Optimizer] = {}
        if muon := self._groups_of("muon"):
            self._halves["muon"] = torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")
        if adamw := self._groups_of("adamw"):
            self._halves["adamw"] = torch.optim.AdamW(adamw, betas=(0.9, 0.95))

    def _groups_of(self, kind: str) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["kind"] == kind]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One more group; its `kind` must say muon or adamw, or its parameters would silently never learn."""
        if param_group.get("kind") not in ("muon", "adamw"):
            raise ValueError(f"a group of parameters needs kind 'muon' or 'adamw', not {param_group.get('kind')!r}")
        super().add_param_group(param_group)
        if hasattr(self, "_halves"):
            self._make_halves()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a saved or copied state; the halves are made anew on it."""
        super().__setstate__(state)
        self._make_halves()

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, at its group's learning rate of this moment."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for kind, half in self._halves.items():
            half.param_groups, half.state = self._groups_of(kind), self.state
            half.step()
        return loss


def optimizer_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: matrices inside the layers for Muon, all the rest for AdamW, undecayed.

    Embeddings and the head are tables of vectors, not maps between layers, so they stay with AdamW, tied or not.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        tables.add(id(head.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in tables]
    chosen = {id(p) for p in matrices}
    return [
        {"params": matrices, "kind": "muon", "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in chosen], "kind": "adamw", "weight_decay": 0.0},
    ]


def build_muon(model: nn.Module, learning_rate: float, weight_decay: float) -> MuonAdamW:
    """The optimizer that trains all of `model`; the Trainer takes it as `optimizers=(optimizer, scheduler or None)`."""
    return MuonAdamW(optimizer_groups(model, weight_decay), learning_rate)


def windows(rows: Iterable[Sequence[int]], length: int, document: int) -> Iterator[list[int]]:
    """Join documents into one stream and cut it into windows of `length` ids; every id of every row is in exactly one.

    Each row is preceded by the id `document`, unless it opens with it already. The last window may be shorter. Empty
    rows are left out.
    Raises: ValueError where a window has no room for a token and the one that follows it.
    """
    if length < 2:
        raise ValueError(f"a window of {length} holds nothing to predict: take at least 2")
    pending: list[int] = []
    for row in rows:
        if not row:
            continue
        pending = list(chain(pending, () if row[0] == document else (document,), row))
        while len(pending) >= length:
            yield pending[:length]
            pending = pending[length:]
    if pending:
        yield pending
