"""What a run of several adapters stands on: one corpus, split once, and of it what each of them learns.

All files of all experts are gathered together, so that nothing that one learns is what another is judged by. An expert
that exists already (`run:`) brings its talk along, and what it learned in its own run is left out of the held-out part.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from toolkit import bundle
from toolkit.bases.load import LoadedBase
from toolkit.bundle import Run
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.known import mark, marks
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk
from toolkit.disk import hash_text
from toolkit.ensemble.experts import Task
from toolkit.errors import AdapterError, DataError, Problem, RecipeError
from toolkit.evaluate.classify import label_set
from toolkit.fit.plan import Plan, make_plan
from toolkit.fit.prepare import (
    Rows,
    make_renderer,
    open_base,
    place_here,
    render_rows,
    shape_of,
    training_rows,
)
from toolkit.loaded import WHOLE_MODEL
from toolkit.recipe.combine import Gate, Merge, Route, Vote
from toolkit.recipe.experts import expert_recipes, stands_alone, union
from toolkit.recipe.model import Recipe
from toolkit.recipe.read import read_recipe
from toolkit.shipped import resolve
from toolkit.stack.adapter import read_adapter

Pairs = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Ground:
    """Talk, base and renderer of all experts, and who they are.

    shared: the run's recipe with the files of all of them. trained: learns here, on the shared base. found: has been
    trained before, in that run. apart: members of a vote on bases of their own, or whole models: runs of their own, to
    be trained (a recipe; `own` is its talk) or there (a run). known: marks of talk that was learned outside this run.
    rows: rendered, in the order of `corpus`.
    """

    recipe: Recipe
    shared: Recipe
    trained: Mapping[str, Recipe]
    found: Mapping[str, Run]
    apart: Mapping[str, Recipe | Run]
    files: Mapping[str, tuple[str, ...]]
    known: frozenset[str]
    corpus: Corpus
    base: LoadedBase
    renderer: Renderer
    rows: Rows
    own: Mapping[str, Corpus] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All experts, in the order of the recipe."""
        return tuple(self.files)

    def rows_of(self, name: str) -> Rows:
        """An expert's own rows, with its own weights' places."""
        own = [self.shared.data.train_files.index(file) for file in self.files[name]]
        place_of = {place: number for number, place in enumerate(own)}
        parts: dict[str, list[Rendered]] = {}
        kept: dict[str, list[int]] = {}
        for part, entries in self._entries.items():
            mine = [at for at, entry in enumerate(entries) if entry in place_of or (entry < 0 and part != "train")]
            parts[part] = [getattr(self.rows, part)[at] for at in mine]
            kept[part] = [self.rows.kept_talks[part][at] for at in mine]
        entry = [place_of[place] for place in self._entries["train"] if place in place_of]
        return Rows(parts["train"], parts["valid"], parts["test"], {}, kept, entry)

    def task(self) -> Task:
        """What one adapter learns from everything, as the recipe says without its combination: members of a bag or of
        boosting are made of it."""
        recipe = self.recipe.model_copy(update={"experts": None, "combine": None})
        rows = [(list(ids), list(labels)) for ids, labels in training_rows(recipe, self.base, self.rows)]
        held = [(row.input_ids, row.labels) for row in self.rows.valid]
        ids = sorted({i for ids, _ in rows for i in ids}) if recipe.adapter.kind == "embedding" else None
        return Task("main", recipe, rows, held, ids)

    def tasks(self) -> list[Task]:
        """What the experts that are trained here learn."""
        return [
            Task(name, recipe, self.learned_by(name), self.watched_by(name), self.token_ids(name))
            for name, recipe in self.trained.items()
        ]

    def learned_by(self, name: str) -> Pairs:
        """What an expert trained here learns: token ids and labels, a conversation a row, by its own weights."""
        rows = self.rows_of(name)
        if not rows.train:
            files = ", ".join(self.files[name])
            says = (
                f"nothing is left to learn of {files}: empty after cleaning, held out, or the same conversations stand"
            )
            says += " in a file of another expert, which keeps them. Give it talk of its own."
            raise DataError(self.recipe.name, [Problem(f"experts.{name}", says)])
        return [(list(ids), list(labels)) for ids, labels in training_rows(self.trained[name], self.base, rows)]

    def watched_by(self, name: str) -> Pairs:
        """What an expert is measured on while it learns."""
        return [(row.input_ids, row.labels) for row in self.rows_of(name).valid]

    def talks_of(self, name: str) -> list[Talk]:
        """What an expert learns."""
        return [self.corpus.train[at] for at in self.rows_of(name).kept_talks["train"]]

    def owner(self, part: str) -> list[str | None]:
        """For each row of a part the one expert that learns such talk; None where it is none's, or several's."""
        found: list[str | None] = []
        for entry in self._entries[part]:
            file = self.shared.data.train_files[entry] if entry >= 0 else None
            owners = [name for name, files in self.files.items() if file in files]
            found.append(owners[0] if len(owners) == 1 else None)
        return found

    def plan(self, recipe: Recipe, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Plan:
        """What `auto` means for one expert. Raises RecipeError for numbers that contradict each other."""
        longest = max(len(ids) for ids, _ in rows)
        return make_plan(recipe, shape_of(self.base.model, self.base.context), place_here(), longest)

    def token_ids(self, name: str) -> list[int] | None:
        """The ids of the training talk: what an embedding adapter learns, and nobody else asks for."""
        if self.trained[name].adapter.kind != "embedding":
            return None
        return sorted({i for row in self.rows_of(name).train for i in row.input_ids})

    @cached_property
    def _entries(self) -> dict[str, list[int]]:
        """For each row of a part the place of its file in `shared`."""
        corpus, kept = self.corpus, self.rows.kept_talks
        return {
            "train": list(self.rows.entry),
            "valid": [int(corpus.entry_valid[at]) for at in kept["valid"]],
            "test": [int(corpus.entry_test[at]) for at in kept["test"]],
        }


def open_ground(recipe: Recipe) -> Ground:
    """Read all talk, open the base, render. Nothing is written.

    Raises: DataError, BaseError, RunError as a run of one adapter does, and for an expert that exists but was trained
    on another base, holds no single adapter, or left nothing to judge by.
    """
    shared, files, found = shared_of(recipe)
    named = {name: one for name, one in expert_recipes(recipe).items() if isinstance(one, Recipe)}
    apart: dict[str, Recipe | Run] = {name: one for name, one in named.items() if stands_alone(recipe, one)}
    trained = {name: one for name, one in named.items() if name not in apart}
    corpus = gather(shared.data, shared.train.seed, None)
    known = frozenset(one for run in found.values() for one in _learned_in(recipe, run))
    own = {name: gather(named[name].data, named[name].train.seed, None) for name in apart}  # each splits by itself
    known |= {one for talk in own.values() for one in marks(talk.train)}
    corpus = _without(corpus, known)
    base = open_base(shared, corpus)
    renderer = make_renderer(shared, base)
    for name, run in found.items():
        if _is_apart(recipe, name, run, base):
            apart[name] = run
        else:
            _refuse_unfit(recipe, name, run, base, renderer)
    found = {name: run for name, run in found.items() if name not in apart}
    _refuse_talk(recipe, corpus)
    rows = render_rows(shared, renderer, corpus)
    return Ground(recipe, shared, trained, found, apart, files, known, corpus, base, renderer, rows, own)


def shared_of(recipe: Recipe) -> tuple[Recipe, dict[str, tuple[str, ...]], dict[str, Run]]:
    """The recipe with every file of every expert, each once, without weights; the files of each; the runs named.

    Raises: RecipeError for runs that are not there; RunError for one that cannot be read.
    """
    named = expert_recipes(recipe)
    _refuse_gone(recipe, named)
    found = {name: bundle.open_run(Path(one)) for name, one in named.items() if not isinstance(one, Recipe)}
    files = {
        name: one.data.train_files if isinstance(one, Recipe) else _files_of(found[name]) for name, one in named.items()
    }
    every = [file for of in files.values() for file in of]
    if not any(isinstance(one, Recipe) for one in named.values()):
        every += recipe.data.train_files  # nobody learns it: it judges
    _refuse_formats(recipe, found)
    own = tuple(dict.fromkeys(every))
    shared = union(recipe)
    return shared.model_copy(update={"data": shared.data.model_copy(update={"train": own})}), files, found


def is_run(path: str) -> bool:
    """Whether there is a run folder."""
    return (Path(path) / bundle.RUN_FILE).exists()


def _refuse_gone(recipe: Recipe, named: Mapping[str, Recipe | str]) -> None:
    """Raise RecipeError with every expert that exists, and is not there."""
    problems = [
        Problem(
            f"experts.{name}.run",
            f"there is no run in {one} (no {bundle.RUN_FILE}), and it is read until this run is finished. Bring it back"
            " to that place, or name another.",
        )
        for name, one in named.items()
        if isinstance(one, str) and not is_run(one)
    ]
    if problems:
        raise RecipeError(recipe.name, problems)


def _refuse_formats(recipe: Recipe, found: Mapping[str, Run]) -> None:
    """Raise RecipeError for a run whose files have named columns, or labels, and others than the recipe says."""
    ours, problems = recipe.data.format, []
    for name, run in found.items():
        theirs = _recipe_of(run).data.format
        if theirs != ours and not (isinstance(ours, str) and isinstance(theirs, str)):
            says = (
                f"{run.path} read its files by another data.format, and all experts' files are read by one. Write its"
            )
            says += " format into this recipe, or bring the files of both into one form."
            problems.append(Problem(f"experts.{name}.run", says))
    if problems:
        raise RecipeError(recipe.name, problems)


def _files_of(run: Run) -> tuple[str, ...]:
    """The files that an existing run learned from, as far as they are here: without them it answers all the same, but
    nothing can be learned about its talk."""
    return _here(_recipe_of(run).data.train_files)


def _here(files: Sequence[str]) -> tuple[str, ...]:
    return tuple(file for file in files if file.startswith("hub:") or resolve(file).exists())


def _recipe_of(run: Run) -> Recipe:
    return read_recipe(run.recipe_file, to_run=False)


def _learned_in(recipe: Recipe, run: Run) -> list[str]:
    """Marks of what an existing run learned. Raises: RecipeError where it does not say."""
    file = run.path / bundle.LEARNED_FILE
    try:
        return [str(one) for one in json.loads(file.read_text(encoding="utf-8"))["marks"]]
    except (OSError, ValueError, KeyError, TypeError):
        says = f"{run.path} does not say what it learned ({file.name} is missing or damaged), so it might be judged by"
        says += " its own lessons. Train it again, or copy the whole run folder."
        raise RecipeError(recipe.name, [Problem("experts", says)]) from None


def _without(corpus: Corpus, known: Collection[str]) -> Corpus:
    """The corpus without held-out talk that an expert has learned in a run of its own."""
    if not known:
        return corpus
    parts = {}
    for part in ("valid", "test"):
        talks: Sequence[Talk] = getattr(corpus, part)
        stays = np.asarray([mark(talk) not in known for talk in talks], dtype=bool)
        if len(talks) and not stays.any():
            says = f"all of it was learned by an expert of `run:`. Add talk that none has seen, or set data.{part}: 0."
            raise DataError("experts", [Problem(f"data.{part}", says)])
        parts[part] = getattr(corpus, part).select(stays)
        parts[f"entry_{part}"] = getattr(corpus, f"entry_{part}")[stays]
    return replace(corpus, **parts)


def _is_apart(recipe: Recipe, name: str, run: Run, base: LoadedBase) -> bool:
    """Whether an existing run answers on a base of its own. Raises: RecipeError for one that cannot be a member."""
    facts = run.finished("base")
    is_whole = (run.path / WHOLE_MODEL).is_dir()
    if not is_whole and "main" not in run.adapters():
        says = f"{run.path} holds no adapter of its own to combine. Name a run of one adapter."
        raise RecipeError(recipe.name, [Problem(f"experts.{name}.run", says)])
    if not is_whole and facts["base"].get("hash") == base.hash:
        return False
    if not isinstance(recipe.combine, Vote):
        says = f"{run.path} answers on {facts['base'].get('model')}, another base than {base.source}."
        says += " Only combine: {kind: vote} joins different bases."
        raise RecipeError(recipe.name, [Problem(f"experts.{name}.run", says)])
    return True


def _refuse_unfit(recipe: Recipe, name: str, run: Run, base: LoadedBase, renderer: Renderer) -> None:
    """Raise RecipeError for an existing adapter that the combination cannot take, before anybody is trained."""
    facts, problems = run.facts(), []
    try:
        kind = read_adapter(run.adapter(), base.model, base_hash=base.hash).kind
    except AdapterError as unfit:
        raise RecipeError(recipe.name, [Problem(f"experts.{name}.run", str(unfit))]) from unfit
    if facts.get("task") != recipe.task:
        problems.append(f"{run.path} was trained for task {facts.get('task')}, and this is {recipe.task}.")
    if facts.get("template") != hash_text(renderer.template):
        problems.append(f"{run.path} was trained with another chat template. Train it again on this base.")
    if isinstance(recipe.combine, Gate) and kind not in ("lora", "reft"):
        problems.append(f"{run.path} is of kind {kind}; a gate weighs lora and reft. Mix or route it instead.")
    if isinstance(recipe.combine, Merge):
        others = {one.adapter.kind for one in expert_recipes(recipe).values() if isinstance(one, Recipe)}
        if others - {kind}:
            says = f"{run.path} is of kind {kind}, the others of {', '.join(sorted(others))}; a merge needs one kind."
            problems.append(f"{says} Mix or route them instead.")
    if problems:
        raise RecipeError(recipe.name, [Problem(f"experts.{name}.run", says) for says in problems])


def _refuse_talk(recipe: Recipe, corpus: Corpus) -> None:
    """Raise DataError for talk that the combination can do nothing with: told before anybody is trained."""
    if isinstance(recipe.combine, Route) and any(talk.turns[-1].role == "text" for talk in corpus.train[:1]):
        says = "running text has no user whose words a router could read. Give dialogues, or mix the experts."
        raise DataError(recipe.name, [Problem("combine.kind", says)])
    if recipe.task == "classify":
        known = set(label_set(list(corpus.train)))
        for part in ("valid", "test"):
            unknown = sorted({talk.label or "" for talk in getattr(corpus, part)} - known)
            if unknown:
                says = f"{', '.join(unknown)}: held out, and not among the labels learned ({', '.join(sorted(known))})."
                raise DataError(recipe.name, [Problem(f"data.{part}", f"{says} Put rows with them in data.train.")])
