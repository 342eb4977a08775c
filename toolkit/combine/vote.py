"""Voting: members answer, or score labels, each for itself; what most of them say is the answer."""

# K members, R rows, L labels.

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from toolkit.combine.contract import Combination, Given, Weights, called, shares
from toolkit.combine.mix import mixed
from toolkit.combine.rows import Apart, answering
from toolkit.errors import InputError, Problem
from toolkit.generate import Answer, Sampling, generate
from toolkit.stack.stack import Stack

Vote = Literal["hard", "soft", "logprob"]
TIED = 1e-9  # shares that differ by less are equal: sums of the same weights in another order
FINAL = ".,;:!?~…·。，、；：！？～"


@dataclass(frozen=True)
class Labels:
    """What was voted: `choice_R` the number of each row's label, `probs_RL` each label's share of the vote."""

    choice_R: Tensor
    probs_RL: Tensor


@dataclass(frozen=True)
class Majority:
    """The answer that won, the number of the first member that gave it, and its share of the weights."""

    answer: str
    member: int
    share: float


def vote_labels(loglik_KRL: Tensor, how: Vote = "soft", weights: Sequence[float] | None = None) -> Labels:
    """The label of each row, from what K members' log-likelihoods of every label are (length-normalised, say).

    hard: each member votes for its likeliest label (Dietterich 2000). soft: probabilities are averaged, logprob: their
    logarithms, renormalised (the sum and product rules of Kittler et al. 1998). A tie goes to the label that stands
    first, a member's own too. Weights None: equal; others are made to sum to 1.
    Raises: InputError for weights as `shares` does, another `how`, or scores that are not [K, R, L] without NaN;
    MaltuError for a row in which a member excludes every label, or all labels are excluded between them.
    """
    if how not in ("hard", "soft", "logprob"):
        raise InputError("vote", [Problem("", f"'{how}' is no way to vote over labels. Use hard, soft or logprob.")])
    if loglik_KRL.dim() != 3 or 0 in (loglik_KRL.shape[0], loglik_KRL.shape[2]):
        says = f"are {tuple(loglik_KRL.shape)}; members by rows by labels are needed."
        raise InputError("log-likelihoods", [Problem("", says)])
    if bool((loglik_KRL.isnan() | loglik_KRL.isposinf()).any()):
        raise InputError("log-likelihoods", [Problem("", "some are no numbers. Look at the training of that member.")])
    loglik_KRL = loglik_KRL.double()
    names = [str(number) for number in range(len(loglik_KRL))]
    shared = shares(names, weights, may_be_negative=how == "logprob").values
    if how == "hard":
        votes_KRL = torch.nn.functional.one_hot(first_best(loglik_KRL, 0.0), loglik_KRL.shape[2]).double()
        probs_RL = (votes_KRL * votes_KRL.new_tensor(shared).view(-1, 1, 1)).sum(0)
    else:
        probs_RL = mixed(loglik_KRL, shared, over="prob" if how == "soft" else "logprob").exp()
    return Labels(first_best(probs_RL, TIED), probs_RL)


def vote_probabilities(
    said: Sequence[Sequence[Mapping[str, float]]], how: Vote = "soft", weights: Sequence[float] | None = None
) -> list[dict[str, float]]:
    """`vote_labels` of probabilities: `said` has for each member, of every row, the probability of each label.

    Each label's share of the vote, in the order of the first member's labels. A probability of 0 counts as 1e-300.
    Raises: as `vote_labels` does.
    """
    labels = list(said[0][0]) if said and said[0] else []
    if not labels:
        return []
    loglik_KRL = torch.tensor(
        [[[math.log(max(of[label], 1e-300)) for label in labels] for of in one] for one in said], dtype=torch.float64
    )
    probs_RL = vote_labels(loglik_KRL, how, weights).probs_RL
    return [dict(zip(labels, row, strict=True)) for row in probs_RL.tolist()]


def majority(answers: Sequence[str], weights: Sequence[float] | None = None) -> Majority:
    """The answer with the largest share of the weights, answers that are `normalised` alike counted together.

    It is given in the words of the first member that said it; a tie goes to the answer that stands first
    (self-consistency, arXiv 2203.11171). Raises: InputError for weights as `shares` does, or without an answer.
    """
    if not answers:
        raise InputError("answers", [Problem("", "there is none to choose from. Give at least one.")])
    shared = shares([str(number) for number in range(len(answers))], weights).values
    votes: dict[str, float] = {}
    first: dict[str, int] = {}
    for number, (answer, weight) in enumerate(zip(answers, shared, strict=True)):
        if weight:
            key = normalised(answer)
            votes[key] = votes.get(key, 0.0) + weight
            first.setdefault(key, number)
    most = max(votes.values())
    winner = next(key for key, share in votes.items() if share >= most - TIED)
    return Majority(answers[first[winner]], first[winner], votes[winner])


def normalised(answer: str) -> str:
    """A short answer for comparing: NFC, no case, single spaces, no punctuation at its end (unless that is all)."""
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", answer).casefold())
    text = re.sub(r"\s+", " ", text).strip()
    return text.rstrip(FINAL + " ") or text


def first_best(scores: Tensor, tied: float) -> Tensor:
    """The number of the largest score along the last axis; the first of those within `tied` of it."""
    best = scores >= scores.amax(-1, keepdim=True) - tied
    places = torch.arange(scores.shape[-1], device=scores.device)
    return places.where(best, scores.shape[-1]).amin(-1)


@dataclass(frozen=True)
class VoteOfAnswers(Combination):
    """Every member answers as a whole, and the majority is the answer; see Combination. `of` makes one."""

    kind: ClassVar[str] = "vote"
    members: tuple[str | None, ...]
    weights: Weights
    how: str = "majority"

    @classmethod
    def of(cls, members: Sequence[str | None], weights: Given = None) -> "VoteOfAnswers":
        """Weights by name or in order, None for equal ones; made to sum to 1 (`weights.told` says where they did not).

        Raises: InputError as `shares` and `called` do.
        """
        return cls(tuple(members), shares(called(members), weights))

    def answer(
        self,
        stack: Stack,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ends: AbstractSet[int] | None = None,
    ) -> list[Answer]:
        """See Combination.answer. Each member of weight 0 is left out. Cost: the prompts one after another, a row for
        each member, in one forward pass a token; where answers are sampled, each member draws noise of its own."""
        stack.owners(self.members)
        active = [place for place, weight in enumerate(self.weights.values) if weight]
        values = [self.weights.values[place] for place in active]
        found = []
        with answering(stack, [self.members[place] for place in active], Apart) as opened:
            for prompt in prompts:
                room = len(active) * (len(prompt) + sampling.max_tokens)
                said = generate(opened, tokenizer, [prompt] * len(active), sampling, ends=ends, batch_tokens=room)
                found.append(said[majority([answer.text for answer in said], values).member])
        return found
