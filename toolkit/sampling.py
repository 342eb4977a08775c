"""How a token is chosen from logits: the only sampler, pure functions over the rows of a step.

Each row has a Sampling of its own, and what is chosen for it depends on its own logits, sampling, text and noise: all
that follows works row by row, with the same arithmetic whatever stands beside it.
"""

# B rows of a step, V vocabulary, N likeliest tokens, X places that are changed.

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from toolkit.errors import InputError, Problem

_MASK64 = (1 << 64) - 1
_GREEDY_BELOW = 1e-5  # a temperature below it would overflow float32
_BLOCK = 64  # neighbours whose probabilities are summed before anything is summed along a row
_AT_ONCE = 2**17  # numbers of a block of rows that stays in a CPU's cache, and is no load for its allocator
_FEW, _MANY = 256, 4096  # how many of the likeliest tokens are looked at first, and after that


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. temperature 0 is greedy; top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other
    penalties 0 leave everything as it is.

    In this order: repetition_penalty (over prompt and answer, arXiv 1909.05858); logit_bias (added to the logits of the
    token ids it names), presence_penalty (taken from every token the answer has already) and frequency_penalty (taken
    as often as the answer has it), as OpenAI's API defines them; temperature, top_k, top_p (arXiv 1904.09751), min_p
    (arXiv 2407.01082). logit_bias is given as a mapping and kept as sorted pairs.
    Raises: InputError with every value that is out of range.
    """

    temperature: float = 0.7
    top_p: float = 0.9
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuse what is out of range, all of it at once."""
        bias = dict(self.logit_bias)
        object.__setattr__(self, "logit_bias", tuple(sorted(bias.items())))
        allowed = {
            "temperature": (0.0 <= self.temperature <= 100.0, "from 0 (greedy) to 100"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0, at most 1 (everything)"),
            "top_k": (self.top_k >= 0, "0 (everything) or more"),
            "min_p": (0.0 <= self.min_p < 1.0, "from 0 (everything), below 1"),
            "repetition_penalty": (0.0 < self.repetition_penalty < 100.0, "above 0, below 100; 1 changes nothing"),
            "max_tokens": (self.max_tokens >= 1, "at least 1"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a tuple of strings, none of them empty"),
            "presence_penalty": (-2.0 <= self.presence_penalty <= 2.0, "from -2 to 2; 0 changes nothing"),
            "frequency_penalty": (-2.0 <= self.frequency_penalty <= 2.0, "from -2 to 2; 0 changes nothing"),
            "logit_bias": (
                all(token >= 0 and -100.0 <= value <= 100.0 for token, value in bias.items()),
                "token ids, each with a number from -100 to 100",
            ),
        }
        wrong = [(name, says) for name, (fits, says) in allowed.items() if not fits]
        if wrong:
            problems = [Problem(name, f"{getattr(self, name)!r} is out of range: {says}.") for name, says in wrong]
            raise InputError("sampling", problems)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, always."""
        return self.temperature < _GREEDY_BELOW

    @property
    def bends(self) -> bool:
        """Whether anything is done to the logits before the temperature."""
        return bool(
            self.logit_bias or self.repetition_penalty != 1.0 or self.presence_penalty or self.frequency_penalty
        )

    def check_vocabulary(self, n_vocabulary: int) -> None:
        """Raise InputError for a logit_bias on a token id that a vocabulary of this size has not."""
        beyond = [token for token, _ in dict(self.logit_bias).items() if token >= n_vocabulary]
        if beyond:
            says = f"there is no token {beyond[0]}; ids go from 0 to {n_vocabulary - 1}."
            raise InputError("sampling", [Problem("logit_bias", says)])


class Text(Protocol):
    """What a row has read and written: its prompt's tokens, and how often its answer has each of its own."""

    @property
    def read(self) -> frozenset[int]:
        """The prompt's tokens."""

    @property
    def counts(self) -> Mapping[int, int]:
        """The answer's tokens, and how often each."""


def choose(logits_BV: Tensor, samplings: Sequence[Sampling], noise_B: Sequence[float]) -> list[int]:
    """The next token of every row, from logits that `bent` and `masked` have had. `noise_B` are numbers in
    [0, 1): where in the cumulative probabilities, in id order, a row lands.

    Id order, not rank order: two tokens that change rank by rounding alone do not change places.
    """
    tokens = [0] * len(samplings)
    n_rows = len(samplings) if logits_BV.device.type != "cpu" else max(1, _AT_ONCE // logits_BV.shape[-1])
    for is_greedy in (True, False):
        rows = [row for row, one in enumerate(samplings) if one.is_greedy is is_greedy]
        for part in (rows[first : first + n_rows] for first in range(0, len(rows), n_rows)):
            own = [samplings[row] for row in part]
            own_BV = _rows_of(logits_BV, part).float()
            if is_greedy:
                chosen = own_BV.argmax(-1).tolist()
            else:
                heat_B1 = _column([one.temperature for one in own], own_BV)
                kept_BV = keep_likely(torch.softmax(own_BV / heat_B1, dim=-1), own)
                chosen = _landed(kept_BV, [noise_B[row] for row in part])
            for row, token in zip(part, chosen, strict=True):
                tokens[row] = token
    return tokens


def bent(logits_BV: Tensor, samplings: Sequence[Sampling], texts: Sequence[Text]) -> Tensor:
    """Logits after the penalties and the bias of each row; the same tensor where no row has any."""
    rows: list[int] = []
    ids: list[int] = []
    divided: list[float] = []
    added: list[float] = []
    for row, (sampling, text) in enumerate(zip(samplings, texts, strict=True)):
        if sampling.bends:
            own = _bends(sampling, text)
            rows += [row] * len(own)
            ids += own
            divided += [by for by, _ in own.values()]
            added += [value for _, value in own.values()]
    if not rows:
        return logits_BV
    places = torch.tensor(rows, device=logits_BV.device), torch.tensor(ids, device=logits_BV.device)
    logits_BV = logits_BV.to(torch.float32, copy=True)
    old_X = logits_BV[places]
    by_X, value_X = old_X.new_tensor(divided), old_X.new_tensor(added)
    logits_BV[places] = torch.where(old_X > 0, old_X / by_X, old_X * by_X) + value_X
    return logits_BV


def masked(logits_BV: Tensor, may_BV: Sequence[Tensor | None]) -> Tensor:
    """Logits less what a row's mask leaves out; the same tensor where no row has one. What a model holds impossible,
    all of what is left, is equally likely then.
    """
    rows = [row for row, may_V in enumerate(may_BV) if may_V is not None]
    if not rows:
        return logits_BV
    logits_BV = logits_BV.to(torch.float32, copy=True)
    for row in rows:
        may_V = may_BV[row].to(logits_BV.device)  # type: ignore[union-attr]
        own_V = logits_BV[row].where(may_V, -torch.inf)
        logits_BV[row] = own_V if own_V.max() > -torch.inf else torch.zeros_like(own_V).where(may_V, -torch.inf)
    return logits_BV


def keep_likely(probs_BV: Tensor, samplings: Sequence[Sampling]) -> Tensor:
    """Probabilities with those that a row's top_k, top_p and min_p leave out at 0; not renormalised. Equal
    probabilities share one fate.
    """
    floor_B1 = probs_BV.new_zeros(len(samplings), 1)
    n_vocabulary = probs_BV.shape[-1]
    ranked = [row for row, one in enumerate(samplings) if 0 < one.top_k < n_vocabulary]
    if ranked:
        top_BN = likeliest(probs_BV[ranked], max(samplings[row].top_k for row in ranked))
        last_B1 = torch.tensor([[samplings[row].top_k - 1] for row in ranked], device=probs_BV.device)
        floor_B1[ranked] = top_BN.gather(1, last_B1)
    nucleus = [row for row, one in enumerate(samplings) if one.top_p < 1.0]
    if nucleus:
        shares = [samplings[row].top_p for row in nucleus]
        own_BV = probs_BV if len(nucleus) == len(samplings) else probs_BV[nucleus]
        floor_B1[nucleus] = torch.maximum(floor_B1[nucleus], _nucleus_floor(own_BV, shares, floor_B1[nucleus]))
    least = [one.min_p for one in samplings]
    if any(least):
        floor_B1 = torch.maximum(floor_B1, _column(least, probs_BV) * probs_BV.amax(-1, keepdim=True))
    return probs_BV.where(probs_BV >= floor_B1, 0.0)


def likeliest(probs_BV: Tensor, n: int) -> Tensor:
    """The `n` largest values of each row, the largest first, [B, n].

    On a CPU numpy's partition and sort: torch's topk of 256 took ten times as long, its sort sixty times.
    """
    if probs_BV.device.type != "cpu":
        return probs_BV.topk(n).values
    values = probs_BV.detach().numpy()
    if n < values.shape[-1]:
        values = np.partition(values, values.shape[-1] - n, axis=-1)[:, -n:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def logprobs_of(logits_V: Tensor, token: int, n: int) -> tuple[float, list[tuple[int, float]]]:
    """A token's log-probability, and the `n` likeliest tokens with theirs: of the model as it is, before any penalty,
    bias, temperature or filter."""
    logp_V = torch.log_softmax(logits_V.float(), dim=-1)
    values, ids = logp_V.topk(min(n, len(logp_V)))
    return float(logp_V[token]), list(zip(ids.tolist(), values.tolist(), strict=True))


def noise(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that depends on nothing but its arguments (a chain of splitmix64 finalisers over the three of
    them).
    """
    state = 0
    for word in (seed, row, position):
        state = ((state ^ (word & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return (state >> 32) / 2**32


def _bends(sampling: Sampling, text: Text) -> dict[int, tuple[float, float]]:
    """By token id: what its logit is divided by (or, below 0, multiplied with), and what is added afterwards."""
    bias, penalty = dict(sampling.logit_bias), sampling.repetition_penalty
    own = {token: (1.0, value) for token, value in bias.items()}
    if sampling.presence_penalty or sampling.frequency_penalty:
        for token, count in text.counts.items():
            taken = sampling.presence_penalty + count * sampling.frequency_penalty
            own[token] = (1.0, bias.get(token, 0.0) - taken)
    if penalty != 1.0:
        for token in text.read | text.counts.keys():
            own[token] = (penalty, own.get(token, (1.0, 0.0))[1])
    return own


def _nucleus_floor(probs_BV: Tensor, shares: Sequence[float], lowest_B1: Tensor) -> Tensor:
    """The least probability inside the smallest set that holds a share of what is at least `lowest_B1`, [B, 1].

    Looks at the likeliest few tokens, and at more of them only for the rows where those do not reach the share.
    """
    n_vocabulary, floor_B1 = probs_BV.shape[-1], torch.empty_like(lowest_B1)
    left = list(range(len(shares)))
    for n in sorted({min(n, n_vocabulary) for n in (_FEW, _MANY, n_vocabulary)}):
        top_BN = likeliest(probs_BV if len(left) == len(shares) else probs_BV[left], n)
        is_in_BN = top_BN >= lowest_B1[left]
        reached_BN = top_BN.double().where(is_in_BN, 0.0).cumsum(-1)
        all_B1 = reached_BN[:, -1:]
        is_cut_B1 = lowest_B1[left] > 0
        wanted_B1 = _column([shares[row] for row in left], reached_BN) * all_B1.where(is_cut_B1, 1.0)
        is_inside_BN = is_in_BN & (reached_BN - top_BN < wanted_B1)
        found_B1 = top_BN.where(is_inside_BN, float("inf")).amin(-1, keepdim=True)
        holds_all_B1 = ~is_in_BN[:, -1:] if n < n_vocabulary else torch.ones_like(is_cut_B1)
        done_B = torch.where(is_cut_B1, holds_all_B1, holds_all_B1 | (all_B1 >= wanted_B1))[:, 0].tolist()
        done = [place for place, is_done in enumerate(done_B) if is_done]
        floor_B1[[left[place] for place in done]] = found_B1[done]
        left = [row for row, is_done in zip(left, done_B, strict=True) if not is_done]
        if not left:
            break
    return floor_B1


def _landed(kept_BV: Tensor, noise_B: Sequence[float]) -> list[int]:
    """The id in which each row's noise lands: first the block of ids, then the id in it. Sums are in float64."""
    n_pad = -kept_BV.shape[-1] % _BLOCK
    padded_BV = torch.nn.functional.pad(kept_BV, (0, n_pad)) if n_pad else kept_BV
    blocks_BMK = padded_BV.view(len(noise_B), -1, _BLOCK)
    reached_BM = blocks_BMK.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted_B1 = _column(noise_B, reached_BM) * reached_BM[:, -1:]
    block_B1 = torch.searchsorted(reached_BM, wanted_B1, right=True).clamp(max=reached_BM.shape[-1] - 1)
    before_B1 = torch.nn.functional.pad(reached_BM, (1, 0)).gather(1, block_B1)
    own_BK = blocks_BMK[torch.arange(len(noise_B), device=kept_BV.device), block_B1[:, 0]].double()
    inside_B1 = torch.searchsorted(before_B1 + own_BK.cumsum(-1), wanted_B1, right=True)
    last_B1 = _BLOCK - 1 - (own_BK > 0).flip(-1).int().argmax(-1, keepdim=True)  # where rounding reaches beyond
    return (block_B1 * _BLOCK + torch.minimum(inside_B1, last_B1))[:, 0].tolist()


def _rows_of(tensor_BV: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, where they lie if they lie side by side."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return tensor_BV[rows[0] : rows[-1] + 1]
    return tensor_BV[torch.tensor(rows, device=tensor_BV.device)]


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).unsqueeze(-1)
