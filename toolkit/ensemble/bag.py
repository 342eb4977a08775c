"""Bagging (Breiman 1996): members of one recipe, each on a sample of its own, that vote; and what they say of the talk
that they did not see.

A sample is drawn by conversation, with replacement, as many as there are: each member sees about 63 % of them. Without
a sample all members learn everything, and differ by their seeds alone (deep ensembles, Lakshminarayanan et al. 2017).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from toolkit.combine.mix import Mixture, Over
from toolkit.combine.rows import answering
from toolkit.combine.speaker import PER_TOKEN
from toolkit.combine.vote import Vote, vote_labels
from toolkit.ensemble.experts import Task
from toolkit.ensemble.subjects import Table
from toolkit.ensemble.weights import label_logp
from toolkit.evaluate.classify import gold_labels
from toolkit.fit.batches import Row
from toolkit.recipe.model import Recipe
from toolkit.score import supervised_log_likelihoods

# K members, R rows, L labels.

MOST_ROWS = 1000  # conversations of the out-of-bag estimate
SEEDS = 2**32


def bootstrap(seed: int, n: int, member: int) -> list[int]:
    """The sample of one member: n numbers below n, drawn with replacement, in order. The same every time."""
    drawn: list[int] = np.sort(np.random.default_rng([seed, member]).integers(0, n, n)).tolist()
    return drawn


def conversations(rows: Sequence[Row]) -> list[list[int]]:
    """Row numbers, those of one conversation together: it stands there several times where its file weighs more."""
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault(words_of(row), []).append(number)
    return list(found.values())


@dataclass(frozen=True)
class Bag:
    """Who learns what.

    names: of the members. seed: of the first; the others count on from it. copies: for each conversation its rows.
    drawn: for each member the conversations it learns, with repetition. is_bootstrap: whether they were drawn.
    """

    names: tuple[str, ...]
    seed: int
    rows: Sequence[Row]
    copies: Sequence[Sequence[int]]
    drawn: Mapping[str, Sequence[int]]
    is_bootstrap: bool

    @classmethod
    def of(cls, rows: Sequence[Row], n_members: int, *, seed: int, is_bootstrap: bool = True) -> "Bag":
        """A bag of members over these training rows, as an epoch has them."""
        copies = conversations(rows)
        n = len(copies)
        names = tuple(f"member-{number}" for number in range(1, n_members + 1))
        drawn = {
            name: bootstrap(seed, n, member) if is_bootstrap else list(range(n)) for member, name in enumerate(names)
        }
        return cls(names, seed, rows, copies, drawn, is_bootstrap)

    def seed_of(self, name: str) -> int:
        """Of a member's start, order and dropout."""
        return (self.seed + self.names.index(name)) % SEEDS

    def rows_of(self, name: str) -> list[Row]:
        """What a member learns in an epoch; without a sample all rows in their own order."""
        numbers = sorted(number for place in self.drawn[name] for number in self.copies[place])
        return [self.rows[number] for number in numbers]

    def tasks(self, recipe: Recipe, valid: Sequence[Row], token_ids: Sequence[int] | None = None) -> list[Task]:
        """For each member the recipe with its own seed and rows; the first has the recipe's where the bag's seed is."""
        tasks = []
        for name in self.names:
            own = recipe.train.model_copy(update={"seed": self.seed_of(name)})
            tasks.append(Task(name, recipe.model_copy(update={"train": own}), self.rows_of(name), valid, token_ids))
        return tasks

    def unseen(self) -> list[tuple[str, ...]]:
        """For each conversation the members that do not learn it."""
        seen = {name: frozenset(drawn) for name, drawn in self.drawn.items()}
        return [tuple(name for name in self.names if place not in seen[name]) for place in range(len(self.copies))]

    def facts(self) -> dict[str, Any]:
        """As JSON; `bootstrap(seed, conversations, number of the member from 0)` gives each sample again."""
        return {
            "seed": self.seed,
            "bootstrap": self.is_bootstrap,
            "conversations": len(self.copies),
            "members": {
                name: {"seed": self.seed_of(name), "different": len(set(self.drawn[name]))} for name in self.names
            },
        }


# Out of the bag


def out_of_bag(bag: Bag, table: Table, how: Vote, *, most: int = MOST_ROWS) -> dict[str, Any] | None:
    """How good the bag is, by its own training talk: each conversation is left to the members that did not learn it.

    `table`: of the training talk, all members in its stack. labels: accuracy and log-loss of their vote. text: the loss
    of their average (a hard vote is over whole answers and has none: then that of mean probabilities). "alone" is the
    mean of those members, each by itself. None: nobody left anything out. At most `most` conversations are looked at,
    drawn by the bag's seed. It errs on the safe side: about a third of the members vote on a conversation.
    Cost: about 0.37 passes over these rows a member, twice for text.
    """
    unseen = dict(zip((words_of(bag.rows[of[0]]) for of in bag.copies), bag.unseen(), strict=True))
    fits = [n for n, row in enumerate(table.rows) if unseen.get(words_of((row.input_ids, row.labels)))]
    order = np.random.default_rng(bag.seed).permutation(len(fits))[:most]
    places = sorted(fits[at] for at in order.tolist())
    if not places:
        return None
    voters = [unseen[words_of((table.rows[n].input_ids, table.rows[n].labels))] for n in places]
    found = _labels_out(table, places, voters, how) if table.labels else _text_out(table, places, voters, how)
    n_voters = sum(map(len, voters)) / len(voters)
    return {"n": len(places), "of": len(table.rows), "members each": n_voters, **found}


def _part(table: Table, places: Sequence[int]) -> Table:
    """A table of some of its rows, with nothing known of them yet."""
    return Table(
        table.base,
        table.renderer,
        table.stack,
        [table.talks[n] for n in places],
        [table.rows[n] for n in places],
        table.labels,
    )


def _labels_out(table: Table, places: Sequence[int], voters: Sequence[tuple[str, ...]], how: Vote) -> dict[str, Any]:
    labels = list(table.labels)
    gold = torch.tensor([labels.index(label) for label in gold_labels([table.talks[n] for n in places])])
    said: dict[tuple[str, int], torch.Tensor] = {}
    for name in sorted({name for of in voters for name in of}):
        mine = [at for at, of in enumerate(voters) if name in of]
        logp_RL = label_logp(_part(table, [places[at] for at in mine]).labelled(name), labels)
        said |= {(name, at): logp_L for at, logp_L in zip(mine, logp_RL, strict=True)}
    voted = [vote_labels(torch.stack([said[name, at] for name in of])[:, None], how) for at, of in enumerate(voters)]
    probs_RL = torch.cat([one.probs_RL for one in voted])
    chosen_R = torch.cat([one.choice_R for one in voted])
    right = [sum(float(said[name, at].argmax() == gold[at]) for name in of) / len(of) for at, of in enumerate(voters)]
    return {
        "accuracy": float((chosen_R == gold).double().mean()),
        "log loss": float(-probs_RL.gather(1, gold[:, None]).clamp(min=1e-15).log().mean()),
        "accuracy alone": sum(right) / len(right),
    }


def _text_out(table: Table, places: Sequence[int], voters: Sequence[tuple[str, ...]], how: Vote) -> dict[str, Any]:
    over: Over = "logprob" if PER_TOKEN.get(how) == "logprob" else "prob"
    groups: dict[tuple[str, ...], list[Row]] = {}
    for n, of in zip(places, voters, strict=True):
        groups.setdefault(of, []).append((table.rows[n].input_ids, table.rows[n].labels))
    values: list[float] = []
    for of, rows in groups.items():
        equal = (1.0 / len(of),) * len(of)
        with answering(table.stack, list(of), Mixture, weights=equal, over=over) as model:
            values += [value for row in supervised_log_likelihoods(model, rows) for value in row]
    alone = 0.0
    for name in sorted({name for of in voters for name in of}):
        mine = [at for at, of in enumerate(voters) if name in of]
        said = _part(table, [places[at] for at in mine]).values(name)
        alone += sum(sum(row) / len(voters[at]) for at, row in zip(mine, said, strict=True))
    return {"loss": -sum(values) / len(values), "over": over, "loss alone": -alone / len(values)}


def words_of(row: Row) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What makes a row the same conversation as another."""
    return tuple(row[0]), tuple(row[1])
