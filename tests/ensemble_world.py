"""What the tests of ensembles share: a tiny base from a folder, short Korean talk, recipes that train in moments."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.searching_world import write_base
from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble.experts import Hooks, Seen, Task, fit_members
from toolkit.fit.batches import Row
from toolkit.fit.fitted import Fitted
from toolkit.fit.plan import Place, Plan, make_plan
from toolkit.fit.prepare import shape_of
from toolkit.recipe.model import Base, Recipe
from toolkit.stack.adapter import read_adapter

LABELS = ("부정", "중립", "긍정")
WORDS = {"부정": ("별로야", "지루해"), "중립": ("그냥 그래", "모르겠어"), "긍정": ("최고야", "재밌어")}
THINGS = ("영화", "노래", "밥", "책", "날씨", "게임")


def open_base(folder: Path) -> LoadedBase:
    """A random Llama of two layers with the tokenizer of the shipped base."""
    return load_base(Base(model=str(write_base(folder))), "cpu", torch.float32)


def some_talks(n: int, first: int = 0, *, is_labelled: bool = False) -> list[Talk]:
    """Different short talks; the answer follows from what is asked."""
    talks = []
    for number in range(first, first + n):
        label = LABELS[number % 3]
        text = f"{THINGS[number % 6]} {WORDS[label][number // 3 % 2]} {number}"
        answer = label if is_labelled else f"{label}이구나 {number % 5}"
        turns = (Turn("user", text), Turn("assistant", answer))
        talks.append(Talk(turns, f"말:{number}", label if is_labelled else None, "ko"))
    return talks


def rendered(base: LoadedBase, talks: Sequence[Talk]) -> list[Rendered]:
    """Their rows."""
    return list(Renderer(base.tokenizer, base.template, 128).training_all(talks))


def pairs(rows: Sequence[Rendered]) -> list[Row]:
    """Token ids and labels."""
    return [(row.input_ids, row.labels) for row in rows]


def recipe_on(base: LoadedBase, adapter: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """A recipe of few steps on this base."""
    told = {"batch_size": 4, "max_steps": 6, "learning_rate": 0.01, "evaluate_every": 0.5, "early_stop_patience": None}
    return Recipe.model_validate(
        {
            "name": "말투",
            "base": {"model": str(base.folder)},
            "data": {"train": ["말.jsonl"]},
            "adapter": adapter or {"kind": "lora", "rank": 4},
            "train": {**told, **train},
        }
    )


class Bench:
    """A base, talk and a run folder; `fit` trains tasks into it."""

    def __init__(self, root: Path, n_rows: int = 18, *, is_labelled: bool = False) -> None:
        self.base = open_base(root / "base")
        self.renderer = Renderer(self.base.tokenizer, self.base.template, 128)
        self.talks = some_talks(n_rows, is_labelled=is_labelled)
        self.held = some_talks(9, 1000, is_labelled=is_labelled)
        self.rows = pairs(rendered(self.base, self.talks))
        self.valid = pairs(rendered(self.base, self.held))
        self.root = root
        self.run = Run(root / "run")
        self.seen: list[Sequence[Seen]] = []
        self.said: list[str] = []

    def plan_of(self, recipe: Recipe, rows: Sequence[Row]) -> Plan:
        """As a run would make it."""
        shape = shape_of(self.base.model, self.base.context)
        return make_plan(recipe, shape, Place("cpu", 1, 10**9), max(len(ids) for ids, _ in rows))

    def task(self, name: str, adapter: dict[str, Any] | None = None, **train: Any) -> Task:
        """One that learns all the talk."""
        return Task(name, recipe_on(self.base, adapter, **train), self.rows, self.valid)

    def fit(
        self, tasks: Sequence[Task], *, stop_after: int | None = None, run: Run | None = None, **more: Any
    ) -> dict[str, Fitted] | None:
        """Train; `stop_after`: steps of all after which somebody wants to stop."""
        self.seen = []
        hooks = Hooks(
            self.said.append, lambda: stop_after is not None and len(self.seen) >= stop_after, self.seen.append
        )
        return fit_members(tasks, self.base, run or self.run, plan_of=self.plan_of, hooks=hooks, **more)

    def hashes(self, run: Run | None = None) -> dict[str, str]:
        """What every adapter of a run computes."""
        place = run or self.run
        return {name: read_adapter(place.adapter(name), self.base.model).hash for name in place.adapters()}
