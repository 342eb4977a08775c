"""What benchmarks/ten_adapters.py stands on: its data, the clock of a system, and training that ends with its time."""

import itertools
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from toolkit.bases.load import LoadedBase, load_base
from toolkit.bundle import Run
from toolkit.corpus.gather import gather
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble.experts import Hooks, Seen, Task, fit_members
from toolkit.ensemble.subjects import Table
from toolkit.evaluate.classify import label_set
from toolkit.fit.alone import Lesson, Silent, Worn, fit_worn, wear
from toolkit.fit.batches import Row
from toolkit.fit.plan import Plan, make_plan
from toolkit.fit.prepare import place_here, shape_of
from toolkit.loaded import pick_device
from toolkit.recipe.model import Base, Data, Recipe
from toolkit.stack.stack import Stack

FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "classification"
BASE = "spoken-mini"
HELD, TEST = 400, 2000  # conversations: to watch (boosting, weights), and to judge by
NSMC_ROWS = 10_000
SPARE = 0.98  # of the time is planned: what is left pays for starting and saving
PROBE, LEAST_PROBE_S = 0.06, 4.0  # share of a system's time that its speed is measured for, outside its clock
ENDLESS = 10**6  # steps of a training that is stopped
NAMES = {
    "nsmc": {"negative": "부정", "positive": "긍정"},
    "3i4k": {
        "statement": "서술", "question": "질문", "command": "명령", "fragment": "조각말",
        "intonation_dependent": "억양", "rhetorical_question": "반문", "rhetorical_command": "반어",
    },
}  # fmt: skip
FILES = {"nsmc": ("nsmc_sentiment_ko", "감정", NSMC_ROWS), "3i4k": ("3i4k_intent_ko", "의도", None)}
THINGS, GOOD, BAD = ("영화", "노래", "책", "게임"), ("최고야", "재밌어", "좋아"), ("별로야", "지루해", "싫어")


@dataclass(frozen=True)
class Settings:
    """What all systems share. seconds: of training a system."""

    seconds: float
    members: int
    rounds: int
    batch_size: int
    rank: int
    learning_rate: float | str
    full_rate: float | str
    is_tiny: bool

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return dict(vars(self))


@dataclass(frozen=True)
class Field:
    """One kind of talk: to learn, to watch, to judge by. No labels: the loss is measured."""

    name: str
    train: list[Talk]
    held: list[Talk]
    test: list[Talk]
    labels: tuple[str, ...]


def open_field(name: str, *, is_tiny: bool) -> Field:
    """Read and split it, the same way every time."""
    if is_tiny:
        return tiny_field(name)
    if name == "talk":
        data = Data.model_validate({"train": ["maltu:talk/casual.ko.jsonl", "maltu:talk/casual.en.jsonl"]})
        corpus = gather(data, 0, None)
        return Field(name, list(corpus.train), list(corpus.valid), list(corpus.test), ())
    file, word, most = FILES[name]
    if not (FOLDER / f"{file}.train.jsonl.gz").exists():
        raise SystemExit(
            f"{FOLDER}: {file}.train.jsonl.gz is not there. Lay the data beside the repository, or --only talk."
        )
    shape = {
        "kind": "labels",
        "text": "text",
        "label": "label",
        "names": NAMES[name],
        "template": "{text}\n" + word + ":",
    }
    told = {
        "train": [str(FOLDER / f"{file}.train.jsonl.gz")], "test": [str(FOLDER / f"{file}.valid.jsonl.gz")],
        "valid": 0, "format": shape, "clean": {"near_duplicates": None, "max_dropped": 0.1},
    }  # fmt: skip
    corpus = gather(Data.model_validate(told), 0, None)
    order = np.random.default_rng(0).permutation(len(corpus.train))[: None if most is None else most + HELD].tolist()
    tested = np.random.default_rng(1).permutation(len(corpus.test))[:TEST].tolist()
    talks = [corpus.train[at] for at in order]
    return Field(name, talks[HELD:], talks[:HELD], [corpus.test[at] for at in tested], label_set(talks))


def tiny_field(name: str) -> Field:
    """A handful of made-up talk of the same shape."""
    talks = []
    for number, (thing, place) in enumerate(itertools.product(THINGS, range(24))):
        is_good = place % 2 == 0
        text = f"{thing} {place} {(GOOD if is_good else BAD)[place // 2 % 3]}"
        label = "긍정" if is_good else "부정"
        answer = f"그렇구나, {label}이네" if name == "talk" else label
        turns = (Turn("user", text), Turn("assistant", answer))
        talks.append(Talk(turns, f"tiny:{number}", None if name == "talk" else label, "ko"))
    order = [talks[at] for at in np.random.default_rng(0).permutation(len(talks)).tolist()]
    held, test, train = order[:16], order[16:32], order[32:]
    return Field(name, train, held, test, () if name == "talk" else ("긍정", "부정"))


def open_base() -> LoadedBase:
    """A fresh base on this machine's device."""
    return load_base(Base(model=BASE), str(pick_device("auto")), torch.float32)


@dataclass
class Ground:
    """A field rendered for the base, and one system's place to work: a folder that goes when it is done."""

    settings: Settings
    field: Field
    base: LoadedBase
    folder: Path
    rendered: dict[int, Rendered] = field(default_factory=dict)

    @property
    def renderer(self) -> Renderer:
        """Of all parts alike."""
        return Renderer(self.base.tokenizer, self.base.template, 512)

    def rows(self, talks: Sequence[Talk]) -> list[Rendered]:
        """Rendered once."""
        new = [talk for talk in talks if id(talk) not in self.rendered]
        self.rendered |= {id(talk): row for talk, row in zip(new, self.renderer.training_all(new), strict=True)}
        return [self.rendered[id(talk)] for talk in talks]

    def pairs(self, talks: Sequence[Talk]) -> list[Row]:
        """Token ids and labels; what has nothing to learn is left out."""
        return [(row.input_ids, row.labels) for row in self.rows(talks) if row.n_supervised]

    def table(self, talks: Sequence[Talk], stack: Stack) -> Table:
        """What members of a stack say of this talk."""
        kept = [(talk, row) for talk, row in zip(talks, self.rows(talks), strict=True) if row.n_supervised]
        return Table(
            self.base, self.renderer, stack, [talk for talk, _ in kept], [row for _, row in kept], self.field.labels
        )

    def recipe(self, kind: str, steps: int, seed: int, batch_size: int | None = None) -> Recipe:
        """Of one adapter, for so many steps. No evaluation: the time is for learning."""
        own, is_full = self.settings, kind == "full"
        return Recipe.model_validate(
            {
                "name": "ten",
                "base": {"model": BASE},
                "data": {"train": ["x"]},
                "adapter": {"kind": "full"} if is_full else {"kind": "lora", "rank": own.rank},
                "train": {
                    "batch_size": batch_size or own.batch_size,
                    "max_steps": steps,
                    "seed": seed,
                    "learning_rate": own.full_rate if is_full else own.learning_rate,
                    "early_stop_patience": None,
                    "evaluate_every": 1e6,
                },
            }
        )

    def plan_of(self, recipe: Recipe, rows: Sequence[Row]) -> Plan:
        """As a run would make it."""
        longest = max(len(ids) for ids, _ in rows)
        return make_plan(recipe, shape_of(self.base.model, self.base.context), place_here(), longest)

    def run(self, name: str) -> Run:
        """A fresh run folder."""
        run = Run(self.folder / name)
        shutil.rmtree(run.path, ignore_errors=True)
        run.path.mkdir(parents=True)
        return run

    def stack_of(self, run: Run, names: Sequence[str]) -> Stack:
        """A stack of adapters that lie in a run."""
        stack = Stack(self.base.model, base_hash=self.base.hash)
        for name in names:
            stack.add(name, run.adapter(name))
        return stack


@contextmanager
def working(settings: Settings, of: Field) -> Iterator[Ground]:
    """A ground with a fresh base, in a folder that is there as long as it is used."""
    with tempfile.TemporaryDirectory() as folder:
        yield Ground(settings, of, open_base(), Path(folder))


# Time


def now(ground: Ground) -> float:
    """Seconds, when everything asked of the device is done."""
    if ground.base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def speed_of(marks: Sequence[tuple[float, int]]) -> float:
    """Steps a second, from (seconds, steps so far) after every step; the first fifth, three at least, is warm-up."""
    warm = min(max(3, len(marks) // 5), len(marks) - 2)
    (begin, before), (end, after) = marks[max(0, warm)], marks[-1]
    return (after - before) / max(end - begin, 1e-9)


@dataclass
class _Probe:
    """Stops a training when its time is over, and keeps when each step was done."""

    ground: Ground
    until: float
    marks: list[tuple[float, int]] = field(default_factory=list)

    def is_over(self) -> bool:
        """Whether enough was seen."""
        return len(self.marks) >= 6 and time.perf_counter() > self.until

    def seen(self, n_steps: int) -> None:
        """Note the steps of one pass."""
        self.marks.append((now(self.ground), (self.marks[-1][1] if self.marks else 0) + n_steps))


def probe_members(ground: Ground, tasks: Sequence[Task]) -> float:
    """Steps a second of all members together, measured on adapters that are thrown away."""
    probe = _Probe(ground, time.perf_counter() + max(PROBE * ground.settings.seconds, _least(ground)))

    def watch(seen: Sequence[Seen]) -> None:
        probe.seen(len(seen))

    hooks = Hooks(wants_stop=probe.is_over, watch=watch)
    fit_members(tasks, ground.base, ground.run("probe"), plan_of=ground.plan_of, hooks=hooks)
    return speed_of(probe.marks)


def probe_full(ground: Ground, rows: Sequence[Row], seed: int) -> float:
    """Steps a second of one full fine-tune, on a model that is thrown away."""
    probe = _Probe(ground, time.perf_counter() + max(PROBE * ground.settings.seconds, _least(ground)))
    fit_full(ground, rows, ground.recipe("full", ENDLESS, seed), probe.is_over, lambda: probe.seen(1))
    return speed_of(probe.marks)


def fit_full(
    ground: Ground,
    rows: Sequence[Row],
    recipe: Recipe,
    wants_stop: Callable[[], bool] = lambda: False,
    stepped: Callable[[], None] = lambda: None,
) -> tuple[Worn, float]:
    """Train a whole model, or one adapter, through fit/one; what came out, and seconds without loading its base."""
    worn = wear(recipe, ground.base.device, None)
    lesson = Lesson(recipe, ground.plan_of(recipe, rows), rows, None)
    silent = Silent(lesson.n_steps, lambda line: None, wants_stop, lambda *_: stepped())
    started = now(ground)
    fit_worn(worn, lesson, ground.run("one"), silent)
    return worn, now(ground) - started


def steps_in(seconds: float, speed: float, n_members: int = 1) -> int:
    """How many steps each of the members can take."""
    return max(2, math.floor(SPARE * seconds * speed / n_members))


def _least(ground: Ground) -> float:
    return 0.3 if ground.settings.is_tiny else LEAST_PROBE_S
