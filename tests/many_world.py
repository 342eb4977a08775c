"""What the tests of packed fitting share: members on a tiny base, and a crew that writes down what it hears."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.stacked_world import SEEN, make_base
from toolkit.fit.batches import Limits, Row
from toolkit.fit.fitted import Fitted
from toolkit.fit.many import Crew, Look, Setup, find_saved, fit_many
from toolkit.fit.member import Learner, Member
from toolkit.fit.plan import Plan
from toolkit.recipe.model import Recipe
from toolkit.stack.adapter import Adapter, new_adapter
from toolkit.stack.stack import Stack

SETUP = Setup(side_by_side=4, limits=Limits(256, 4096), pad_id=0)


def some_talk(n_rows: int, seed: int = 0, shortest: int = 6, longest: int = 14) -> list[Row]:
    """Rows of random ids; the second half of each is learned."""
    noise = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for _ in range(n_rows):
        n = int(torch.randint(shortest, longest + 1, (1,), generator=noise))
        ids = torch.randint(5, 60, (n,), generator=noise).tolist()
        rows.append((ids, [-100] * (n // 2) + ids[n // 2 :]))
    return rows


def recipe_of(name: str, adapter: Mapping[str, Any], **train: Any) -> Recipe:
    """A recipe of the least words."""
    return Recipe.model_validate(
        {
            "name": name,
            "base": {"model": "없는-말"},
            "data": {"train": ["말.jsonl"]},
            "adapter": dict(adapter),
            "train": {"batch_size": 4, "epochs": 2.0, "evaluate_every": 0.5, "early_stop_patience": None, **train},
        }
    )


def member_of(
    name: str,
    adapter: Mapping[str, Any] | None = None,
    rows: Sequence[Row] | None = None,
    valid: Sequence[Row] = (),
    **train: Any,
) -> Member:
    """A member with its own recipe; `learning_rate` defaults to 1e-2."""
    recipe = recipe_of(name, adapter or {"kind": "lora", "rank": 4}, **train)
    rate = 1e-2 if recipe.train.learning_rate == "auto" else recipe.train.learning_rate
    packing = recipe.adapter.kind != "prefix"
    plan = Plan(float(rate), 64, recipe.train.batch_size, 1, packing, "fp32", False)
    started = new_adapter(make_base(), recipe.adapter, seed=recipe.train.seed, token_ids=SEEN)
    return Member(name, recipe, plan, list(some_talk(12) if rows is None else rows), list(valid), started)


class Listening(Crew):
    """Hands out members in order, and keeps all it is told. `prune`: names by the evaluation that ends them;
    `stop_after`: steps of the stack after which it asks to stop."""

    def __init__(
        self, members: Sequence[Member], prune: Mapping[str, int] | None = None, stop_after: int | None = None
    ) -> None:
        self.coming, self.prune, self.stop_after = list(members), dict(prune or {}), stop_after
        self.looks: list[Look] = []
        self.adapters: dict[str, Adapter] = {}
        self.fitted: dict[str, Fitted] = {}
        self.reasons: dict[str, str] = {}
        self.losses: dict[str, list[float]] = {}
        self.together: list[tuple[str, ...]] = []
        self.n_alive = 0

    def next(self) -> Member | None:
        return self.coming.pop(0) if self.coming else None

    def looked(self, looks: Sequence[Look]) -> Collection[str]:
        self.looks += looks
        return [look.name for look in looks if self.prune.get(look.name) == look.number]

    def alive(self) -> None:
        self.n_alive += 1

    def left(self, name: str, fitted: Fitted, adapter: Adapter) -> None:
        self.fitted[name], self.adapters[name] = fitted, adapter

    def failed(self, name: str, fitted: Fitted, reason: str) -> None:
        self.fitted[name], self.reasons[name] = fitted, reason

    def stepped(self, learners: Sequence[Learner], losses: Mapping[str, float]) -> bool:
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        self.together.append(tuple(losses))
        return self.stop_after is not None and len(self.together) >= self.stop_after

    def looks_of(self, name: str) -> list[float]:
        return [look.loss for look in self.looks if look.name == name]


def fit(place: Path, members: Sequence[Member], setup: Setup = SETUP, **crew: Any) -> Listening:
    """Let them learn on a fresh base."""
    heard = Listening(members, **crew)
    fit_many(Stack(make_base()), heard, setup, place)
    return heard


def going_on(place: Path, members: Sequence[Member]) -> list[Member]:
    """The same members, each going on from the last checkpoint if it is in there."""
    from dataclasses import replace

    return [replace(member, continues=find_saved(place, member.name)) for member in members]
