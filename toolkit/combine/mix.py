"""A mixture: the same row for several members, one distribution for the next token of them all."""

# B prompts in a batch, K members, T new tokens, S tokens so far, N kept positions, V vocabulary.

import math
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.combine.contract import Combination, Given, Weights, called, shares
from toolkit.combine.methods import method_named
from toolkit.combine.rows import Together, answering
from toolkit.errors import InputError, MaltuError, Problem
from toolkit.generate import Answer, Sampling, generate
from toolkit.stack.stack import Stack

Over = Literal["logprob", "prob"]
BATCH_TOKENS = 8192  # cached tokens in one batch, those of all members together


def mixed(logits_KV: Tensor, weights: Sequence[float] | None = None, *, over: Over = "logprob") -> Tensor:
    """Log-probabilities of the mixture, from the logits of its K members; axes between K and V are kept.

    logprob: the weighted average of log-probabilities, renormalised (product of experts, Hinton 2002); what one member
    excludes (-inf) stays excluded, and negative weights turn away from a member (arXiv 2105.03023). prob: the weighted
    average of probabilities (Jacobs et al. 1991). Weights None: equal; others are made to sum to 1.
    Raises: InputError for weights as `shares` does, and logits without a member; MaltuError for logits that are no
    numbers, or where nothing is left possible.
    """
    if logits_KV.dim() < 2 or not len(logits_KV):
        raise InputError("logits", [Problem("", f"are {tuple(logits_KV.shape)}; members by vocabulary are needed.")])
    names = [str(number) for number in range(len(logits_KV))]
    checked = shares(names, weights, may_be_negative=may_be_negative(over))
    return torch.log_softmax(mixed_logits(logits_KV, checked.values, over), dim=-1)


def mixed_logits(logits_KV: Tensor, weights: Sequence[float], over: Over) -> Tensor:
    """Logits of the mixture, for weights that sum to 1: not normalised, but lying where the members' own lie.

    With all the weight on one member they are its logits, so a sampler does with them what it does alone (a repetition
    penalty depends on where they lie). Raises: MaltuError as `mixed` does.
    """
    active = [number for number, weight in enumerate(weights) if weight]
    logits_KV = logits_KV[active]
    logits_KV = logits_KV if logits_KV.dtype == torch.float64 else logits_KV.float()
    level_K = logits_KV.logsumexp(-1, keepdim=True)
    if not bool(level_K.isfinite().all()):
        raise MaltuError(
            "A member's logits are no numbers, or exclude every token. Check its training, and what was masked."
        )
    if len(active) == 1:
        return logits_KV[0]
    weights_K = logits_KV.new_tensor([weights[number] for number in active]).view(-1, *[1] * (logits_KV.dim() - 1))
    logp_KV = logits_KV - level_K
    if over == "prob":
        mixed_V = (logp_KV + weights_K.log()).logsumexp(0)
    else:
        mixed_V = (logp_KV * weights_K).sum(0).masked_fill((logp_KV == -math.inf).any(0), -math.inf)
        if not bool((mixed_V > -math.inf).any(-1).all()):
            raise MaltuError("Between them the members exclude every token. Mix over prob, or leave one out.")
    return mixed_V + (level_K * weights_K).sum(0)


def may_be_negative(over: str) -> bool:
    """Whether a negative weight has a meaning. Raises: InputError for something that cannot be mixed over."""
    method_named("mix", over)
    return over == "logprob"


@dataclass(frozen=True)
class Mixture(Together):
    """Members opened as one model, whose logits are the mixture's; see `Opened`."""

    weights: tuple[float, ...]
    over: Over

    def logits(self, ids_BT: Tensor, mask_BS: Tensor, cache: Any, keep_BT: Tensor | None = None) -> Tensor:
        """See Opened."""
        return mixed_logits(self.each(ids_BT, mask_BS, cache, keep_BT), self.weights, self.over)


@dataclass(frozen=True)
class Mix(Combination):
    """See Combination; `Mix.of` makes one. how: logprob or prob. A sampled answer of one member is its own as well."""

    kind: ClassVar[str] = "mix"
    members: tuple[str | None, ...]
    weights: Weights
    how: Over = "logprob"

    @classmethod
    def of(cls, members: Sequence[str | None], weights: Given = None, how: Over = "logprob") -> "Mix":
        """Weights by name or in order, None for equal ones; made to sum to 1 (`weights.told` says where they did not).

        Raises: InputError as `shares` and `called` do, or for another `how`.
        """
        names = called(members)
        return cls(tuple(members), shares(names, weights, may_be_negative=may_be_negative(how)), how)

    @contextmanager
    def opened(self, stack: Stack) -> Iterator[Mixture]:
        """The members that have weight as one model: for generate, stream and score.

        Raises: AdapterError when the stack lacks a member, one of weight 0 too.
        """
        stack.owners(self.members)
        active = [place for place, weight in enumerate(self.weights.values) if weight]
        values = tuple(self.weights.values[place] for place in active)
        with answering(stack, [self.members[place] for place in active], Mixture, weights=values, over=self.how) as one:
            yield one

    def answer(
        self,
        stack: Stack,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ends: AbstractSet[int] | None = None,
    ) -> list[Answer]:
        """See Combination.answer. Cost: a row for each member that has weight, in one forward pass a token."""
        with self.opened(stack) as model:
            room = BATCH_TOKENS // model.n_members
            return generate(model, tokenizer, prompts, sampling, ends=ends, batch_tokens=room)
