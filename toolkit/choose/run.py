"""A choice in order: read this file to know what `choose` does. A folder of the choice holds:

recipe.yaml; candidates/, a result (or the reason why there is none) for each and each round; leaderboard.json; .md
"""

import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from toolkit import disk
from toolkit.bases.fetch import find_folder
from toolkit.bases.files import hash_files, weight_files
from toolkit.bundle import RUN_FILE, Run
from toolkit.choose.about import About, Filters, about, objections, too_large
from toolkit.choose.board import Board, Left, show, to_json, to_markdown
from toolkit.choose.job import Job, recipe_of
from toolkit.choose.rank import Place, Ranking, rank, rungs, survivors
from toolkit.choose.result import Result, read_result
from toolkit.choose.stand import some_prompts
from toolkit.choose.table import read_table
from toolkit.corpus.gather import gather
from toolkit.errors import BaseError, Problem, RecipeError, RunError
from toolkit.fit.inputs import inputs_of, version_of
from toolkit.fit.prepare import place_here
from toolkit.recipe.model import Base, Candidates, Recipe
from toolkit.recipe.show import to_yaml, without_secrets

VERSION = 1  # of what a result means: results of another are measured again
ENDED_BY = {-9: " (killed: often because memory ran out)", -11: " (it crashed)"}
Runner = Callable[[Recipe, Job], Result | str]


@dataclass(frozen=True)
class Options:
    """How the command was called."""

    runs: Path
    filters: Filters = field(default_factory=Filters)
    table: Path | None = None
    quiet: bool = False
    command: str = ""


@dataclass
class Choice:
    """What is known so far: who takes part, who does not and why, and the results of the rounds."""

    abouts: dict[str, About]
    left: list[Left] = field(default_factory=list)
    beaten: list[Place] = field(default_factory=list)  # in an earlier, briefer round, the best first
    n_kept: int = 0  # results that an earlier call left


def apart(recipe: Recipe, job: Job) -> Result | str:
    """Let a process of its own do the job; its result, or why there is none."""
    out = Path(job.out)
    disk.make_folder(out.parent)
    disk.remove(job.failed)
    told, log = out.with_suffix(".job.json"), out.with_suffix(".log")
    disk.write_json(told, asdict(job))
    command = [sys.executable, "-m", "toolkit.choose.audition", str(told)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        try:
            code = process.wait()
        finally:
            if process.poll() is None:  # Ctrl-C
                process.kill()
                process.wait()
            disk.remove(told)
    result = read_result(out, job.key)
    if result is not None:
        disk.remove(log)
        return result
    if job.failed.exists():
        return str(json.loads(job.failed.read_text(encoding="utf-8"))["failed"])
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return f"its process ended with code {code}{ENDED_BY.get(code, '')}: {lines[-1] if lines else 'it said nothing'}"


def run(recipe: Recipe, options: Options, audition: Runner = apart) -> int:
    """Compare the recipe's candidates, leave a leaderboard, and print the command that trains on the best. Returns the
    exit code: 1 where not one candidate could be compared.

    Raises MaltuError for what is wrong with the recipe, the data or the table; a candidate that fails is named and the
    others go on. Cost: the minutes of each candidate, and about as much again for loading and measuring short ones.
    """
    console = Console(quiet=options.quiet, highlight=False)
    several = recipe.base
    assert isinstance(several, Candidates)  # looked at by the command
    table = read_table(options.table) if options.table else None
    _refuse_unjudged(recipe)
    corpus = gather(recipe.data, recipe.train.seed, None)  # a mistake in the data is told before anything is tried
    some_prompts(recipe_of(recipe, several.candidates[0]))
    hashes = inputs_of(recipe)["data"]
    folder = Run(options.runs / f"{recipe.name}-choose")
    if (folder.path / RUN_FILE).exists():
        raise RunError(f"{folder.path}: is a run, so no choice can lie there. Give the recipe another name=…")
    started = time.monotonic()
    with folder.locked():
        disk.write_text(folder.recipe_file, to_yaml(without_secrets(recipe)))
        choice = _who_takes_part(several, options.filters)
        ranking = _rounds(recipe, choice, hashes, folder.path, audition, console)
        board = Board(
            recipe=recipe,
            command=options.command,
            parts={part: len(getattr(corpus, part)) for part in ("train", "valid", "test")},
            ranking=ranking,
            beaten=tuple(choice.beaten),
            left=tuple(choice.left),
            abouts=choice.abouts,
            table=table,
            n_kept=choice.n_kept,
            seconds=time.monotonic() - started,
        )
        disk.write_json(folder.path / "leaderboard.json", to_json(board))
        disk.write_text(folder.path / "leaderboard.md", to_markdown(board))
    show(board, console)
    page = shlex.quote(str(folder.path / "leaderboard.md"))
    console.print(f"Everything that was measured: {page}", markup=False, soft_wrap=True)
    if not ranking.places:
        return 1
    console.print(f"\n{board.train_command}", markup=False, soft_wrap=True)
    return 0


def _refuse_unjudged(recipe: Recipe) -> None:
    if recipe.data.valid == 0 and recipe.data.test == 0:
        says = "nothing is held out, so candidates cannot be compared. Write valid: 0.1 and test: 0.1"
        raise RecipeError(recipe.name, [Problem("data.test", says)])


def _who_takes_part(several: Candidates, filters: Filters) -> Choice:
    """Leave out what the filters, or the memory that is free, leave out. Raises BaseError where nobody is left."""
    place = place_here()
    choice = Choice({})
    for model in several.candidates:
        base = _base(several, model)
        one = about(base)
        choice.abouts[model] = one
        why = "; ".join(objections(one, filters)) or too_large(one, base, place)
        if why:
            choice.left.append(Left(model, why, is_wish=True))
    if len(choice.left) == len(several.candidates):
        listed = "\n".join(f"  {left.model}: {left.why}" for left in choice.left)
        raise BaseError(
            f"base.candidates: not one of them comes into question.\n{listed}\nAsk for less, or name others."
        )
    return choice


def _base(several: Candidates, model: str) -> Base:
    return Base(model=model, quantize=several.quantize, trust_remote_code=several.trust_remote_code)


def _rounds(
    recipe: Recipe, choice: Choice, hashes: dict[str, str], folder: Path, audition: Runner, console: Console
) -> Ranking:
    """Try everybody; where there are many, briefly at first, and then the best of them for the whole time."""
    several = recipe.base
    assert isinstance(several, Candidates)  # as above
    out = {left.model for left in choice.left}
    models = [model for model in several.candidates if model not in out]
    minutes = rungs(len(models), several.minutes_each)
    for number, each in enumerate(minutes, start=1):
        if len(minutes) > 1:
            console.print(f"Round {number} of {len(minutes)}: {len(models)} bases, {each:g} minutes each.")
        results = []
        for at, model in enumerate(models, start=1):
            with console.status(f"{model} ({at} of {len(models)}, {each:g} min)"):
                found, is_kept = _tried(recipe, _base(several, model), each, hashes, folder, audition)
            choice.n_kept += is_kept
            if isinstance(found, str):
                choice.left.append(Left(model, found, is_wish=False))
                console.print(f"{model}: left out, the reason stands below", markup=False)
                continue
            results.append(found)
            console.print(f"{model}: {'measured before' if is_kept else 'measured'}", markup=False)
        ranking = rank(results)
        choice.left += [Left(one.model, why, is_wish=False) for one, why in ranking.apart]
        if number < len(minutes):
            going_on = survivors(ranking)
            models = [one.model for one in going_on]
            choice.beaten += [place for place in ranking.places if place.result.model not in models]
    return ranking


def _tried(
    recipe: Recipe, base: Base, minutes: float, hashes: dict[str, str], folder: Path, audition: Runner
) -> tuple[Result | str, bool]:
    """A candidate's result or why it has none, and whether an earlier call left it."""
    try:
        files = find_folder(base, weights=True)
        base_hash = hash_files(files, weight_files(files, base.model))
    except (BaseError, OSError) as absent:
        return str(absent), False
    key = _key(recipe, hashes, base_hash, minutes)
    slug = re.sub(r"[^\w.-]+", "_", base.model).strip("_.")[-80:] + "-" + disk.hash_text(base.model)[:6]
    file = folder / "candidates" / f"{slug}.{minutes:g}min.json"
    kept = read_result(file, key)
    if kept is not None:
        return kept, True
    job = Job(str(folder / "recipe.yaml"), base.model, minutes, key, hashes, str(file))
    found = audition(recipe, job)
    return found, False


def _key(recipe: Recipe, hashes: dict[str, str], base_hash: str, minutes: float) -> str:
    """What a result depends on: other bases of the recipe, its name and what comes after training do not count."""
    told = recipe.model_dump(mode="json", exclude={"name", "serve", "track", "search"})
    told["base"] = {key: of for key, of in told["base"].items() if key not in ("candidates", "minutes_each")}
    parts = [VERSION, version_of("maltu"), told, hashes, base_hash, minutes, place_here().device]
    return disk.hash_text(json.dumps(parts, sort_keys=True, ensure_ascii=False))
