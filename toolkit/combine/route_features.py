"""What a router reads of a conversation: the last user turns, as hashed pieces of words, as signs of how they are
typed, and as hidden states.

Of the base only the embedding and the first quarter of the layers run, over at most 64 tokens. The pieces are counted
in buckets of a hash that is the same on every machine; the signs have the buckets behind those.
"""

# C conversations, T tokens, H hidden size, N pieces and signs of all texts together, G buckets, of them L of pieces.

import itertools
import math
import threading
import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolkit.adapters import anatomy
from toolkit.combine.route_style import N_SIGNS, signs
from toolkit.corpus.talk import Turn

N_BUCKETS = 2**16  # of pieces
N_ALL = N_BUCKETS + N_SIGNS
N_TOKENS = 64  # of the last user turns, the opening token included
N_CHARACTERS = 600  # of the last user turns, for the pieces
CHARACTERS = (1, 2, 3, 4)  # n-grams
BATCH = 32
FARTHEST = 5.0  # standard deviations; a number farther off counts as this far
RARE = 3  # talks that hold a bucket, or fewer
Ints = NDArray[np.int64]
_SPACE, _FACTOR, _MIX = np.uint64(32), np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)


def last_user_turns(conversation: Sequence[Turn]) -> str:
    """What the user said, turn by turn on lines, NFC; answers are left out, since they are an expert's own.

    A conversation of running text alone is that text; one without a word of the user is empty.
    """
    said = [turn.content for turn in conversation if turn.role in ("user", "text")]
    return unicodedata.normalize("NFC", "\n".join(said)).strip()


@dataclass(frozen=True)
class Pieces:
    """Buckets of C texts, one after the other, and how often each occurs; text i begins at starts[i]."""

    buckets: Ints
    counts: NDArray[np.float32]
    starts: Ints

    def weighed(self, rarity_G: Tensor) -> Tensor:
        """What each bucket counts, [N]: (1 + ln count) x rarity, every text's brought to length 1."""
        values = torch.from_numpy(1.0 + np.log(self.counts)) * rarity_G[torch.from_numpy(self.buckets)]
        row = torch.from_numpy(self.rows)
        length_C = torch.zeros(len(self.starts)).index_add_(0, row, values * values).sqrt().clamp_min(1e-9)
        return values / length_C[row]

    def familiarity(self, known_L: Tensor, but_C: Tensor | None = None) -> Tensor:
        """How well the experts' talks know each text, [C, 3]: the mean logarithm of how many hold a piece, the share of
        pieces that none holds, and that few hold. but_C: how many talks that hold all of a text do not count. Signs do
        not count: there are few, and every talk holds them.
        """
        spelled = self.buckets < N_BUCKETS
        row = torch.from_numpy(self.rows[spelled])
        known = known_L[torch.from_numpy(self.buckets[spelled])]
        if but_C is not None:
            known = known - but_C[row]
        told_N3 = torch.stack([torch.log(known.clamp_min(0) + 0.5) / 3, 2.0 * (known <= 0), 2.0 * (known <= RARE)], 1)
        total_C3 = torch.zeros(len(self.starts), 3).index_add_(0, row, told_N3)
        return total_C3 / torch.bincount(row, minlength=len(self.starts)).clamp_min(1)[:, None]

    @property
    def rows(self) -> Ints:
        """The text of every entry, [N]."""
        return np.repeat(np.arange(len(self.starts)), self.sizes)

    @property
    def sizes(self) -> Ints:
        """How many buckets each text has."""
        ends = np.append(self.starts[1:], len(self.buckets))
        return ends - self.starts


def pieces(texts: Sequence[str]) -> Pieces:
    """Words, pairs of words, and n-grams of 1 to 4 characters inside words and at their edges, lower case, digits
    alike; and the signs of how it is typed (route_style.py); of the last N_CHARACTERS. Costs about 0.1 ms a text.
    """
    ends = (unicodedata.normalize("NFC", text)[-N_CHARACTERS:] for text in texts)
    each = (np.concatenate([_hashed(text), N_BUCKETS + np.array(signs(text), dtype=np.int64)]) for text in ends)
    found = [np.unique(buckets, return_counts=True) for buckets in each]
    sizes = [len(buckets) for buckets, _ in found]
    empty = np.zeros(0, dtype=np.int64)
    return Pieces(
        np.concatenate([empty, *(buckets for buckets, _ in found)]),
        np.concatenate([empty, *(counts for _, counts in found)]).astype(np.float32),
        np.concatenate([empty, np.cumsum([0, *sizes[:-1]], dtype=np.int64)])[: len(texts)],
    )


def _hashed(text: str) -> Ints:
    words = unicodedata.normalize("NFC", text.lower())[-N_CHARACTERS:].split()
    if not words:
        return np.zeros(0, dtype=np.int64)
    letters = np.frombuffer(f" {' '.join(words)} ".encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    letters[(letters >= 48) & (letters <= 57)] = 48
    is_space = letters == _SPACE
    hashes = []
    rolled = np.zeros(0, dtype=np.uint64)
    for n in CHARACTERS:
        count = len(letters) - n + 1
        if count < 1:
            break
        rolled = letters.copy() if n == 1 else rolled[:count] * _FACTOR + letters[n - 1 :]
        inside = np.ones(count, dtype=bool)
        for at in range(1, n - 1):
            inside &= ~is_space[at : at + count]
        if n <= 2:
            inside &= ~is_space[:count] if n == 1 else ~(is_space[:count] & is_space[1 : 1 + count])
        hashes.append(rolled[inside] * _MIX + np.uint64(n))
    spelled = [*words, *map(" ".join, itertools.pairwise(words))]
    crcs = np.array([zlib.crc32(word.encode()) for word in spelled], dtype=np.uint64) * _FACTOR
    mixed = np.concatenate([*hashes, crcs])
    mixed ^= mixed >> np.uint64(31)
    mixed *= _MIX
    return (mixed >> np.uint64(64 - int(math.log2(N_BUCKETS)))).astype(np.int64)


def quarter(model: Any) -> int:
    """How many layers a router runs: a quarter of them, at least one."""
    return max(1, len(anatomy.decoder_layers(model)) // 4)


def hidden(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """For each text the mean and the largest of its tokens' hidden states after the first quarter of the layers,
    [C, 2H] in float32 on the CPU. Texts in one call are padded to the longest of their batch.

    Cost: a forward pass of the embedding and those layers over at most N_TOKENS tokens a text; no later layer runs.
    Raises: AdapterError for a model whose layers cannot be found.
    """
    most = getattr(anatomy.text_config(model), "max_position_embeddings", None) or N_TOKENS
    encoded = [_ids(tokenizer, text, min(N_TOKENS, most)) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
    found = torch.zeros(len(texts), 2 * anatomy.hidden_size(model))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        found[places] = _pooled(model, [encoded[i] for i in places])
    return found


def _ids(tokenizer: Any, text: str, n_tokens: int) -> list[int]:
    """The last ids of a text behind one that opens it, whose hidden state says nothing of the text."""
    opening = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id, 0) if i is not None), 0)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return [opening, *ids[1 - n_tokens :]]


def _pooled(model: Any, rows: Sequence[list[int]]) -> Tensor:
    device = anatomy.device_of(model)
    longest = max(map(len, rows))
    ids_CT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    mask_CT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device)
    states_CTH = states_after(model, quarter(model), ids_CT, mask_CT).float()
    said_CT = mask_CT.bool()
    said_CT[:, 0] = said_CT.sum(1) == 1  # the opening token counts where nothing follows it
    mean_CH = (states_CTH * said_CT[..., None]).sum(1) / said_CT.sum(1, keepdim=True)
    most_CH = states_CTH.masked_fill(~said_CT[..., None], -torch.inf).amax(1)
    return torch.cat([mean_CH, most_CH], dim=1).cpu()


class _ReachedError(Exception):
    """The last layer that is needed has run."""


def states_after(model: Any, n_layers: int, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The hidden states that the first `n_layers` layers hand on, [B, T, H]; what comes after them does not run.

    Works on any causal language model of Hugging Face. Other threads may use the model meanwhile.
    """
    mine, kept = threading.get_ident(), []

    def stop(_module: nn.Module, _given: Any, output: Any) -> None:
        if threading.get_ident() == mine:
            kept.append(output[0] if isinstance(output, tuple) else output)
            raise _ReachedError

    handle = anatomy.decoder_layers(model)[n_layers - 1].register_forward_hook(stop)
    was_training = model.training
    if was_training:  # both walk over all modules
        model.eval()
    try:
        with torch.no_grad():
            model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
    except _ReachedError:
        pass
    finally:
        handle.remove()
        if was_training:
            model.train()
    states: Tensor = kept[0]
    return states
