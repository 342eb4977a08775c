"""Which runs a server was asked for: found by path or name, and all of them on one base. Reads no weights."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from serve.names import refuse_name
from toolkit.bundle import RUN_FILE, Run, open_run
from toolkit.errors import InputError, Problem, RunError

# As in toolkit.loaded and toolkit.combine.speaker, which load torch:
WHOLE_MODEL = "model"  # the folder of a run whose every weight was trained
ENCODER = "encoder"  # the kind of a base that labels texts
OWN_RUNS = "experts"  # the folder of members that are runs of their own


def find_runs(words: Sequence[str], folder: Path) -> tuple[Run, ...]:
    """The run that each word names: a run folder's path, or its name inside `folder`; reads no weights.

    Raises: InputError with every word that is none, is there twice, or stands on another base than the first.
    """
    found: list[Run] = []
    problems: list[Problem] = []
    for word in words:
        path = Path(word) if (Path(word) / RUN_FILE).is_file() else folder / word
        try:
            run = open_run(path.resolve())
            facts = run.finished("base")
        except RunError as error:
            problems.append(Problem(word, str(error) if (path / RUN_FILE).exists() else _no_run(word, folder)))
            continue
        wrong = refuse_name(run.name) or _unfit(run, facts, found)
        if wrong:
            problems.append(Problem(word, wrong))
        else:
            found.append(run)
    if problems:
        raise InputError("python -m serve", problems)
    return tuple(found)


def has_bases(run: Run, facts: Mapping[str, Any]) -> bool:
    """Whether several bases answer for a run, or one that no stack takes: members of a vote on bases of their own, or
    an encoder.
    """
    combination = facts.get("combination")
    members = combination.get("members", ()) if isinstance(combination, dict) else ()
    base = facts.get("base")
    is_encoder = isinstance(base, dict) and base.get("kind") == ENCODER
    return is_encoder or any((run.path / OWN_RUNS / str(name)).is_dir() for name in members)


def stands_alone(run: Run) -> bool:
    """Whether every weight was trained, so that the run is a base of its own."""
    return (run.path / WHOLE_MODEL).is_dir()


def _unfit(run: Run, facts: Mapping[str, Any], found: Sequence[Run]) -> str | None:
    """Why a run cannot be served beside those found before it."""
    if not found:
        return None
    first = found[0]
    if any(run.name == other.name for other in found):
        return f"a run named {run.name} is there already. Rename one of the two folders."
    several = next((r.name for r, of in ((first, first.facts()), (run, facts)) if has_bases(r, of)), None)
    if several is not None:
        return f"{several} has bases of its own, which no other run shares. {_serve_it(run)}"
    alone = next((r for r in (first, run) if stands_alone(r)), None)
    if alone is not None:
        return f"every weight of {alone.name} was trained, so it shares no base with others. {_serve_it(run)}"
    own, shared = facts["base"], first.facts()["base"]
    if own["hash"] != shared["hash"]:
        return (
            f"stands on another base ({own['model']}, {own['hash'][:12]}) than {first.name} ({shared['model']}, "
            f"{shared['hash'][:12]}), and one server serves one base. {_serve_it(run)}"
        )
    return None


def _serve_it(run: Run) -> str:
    return f"Serve it by itself: python -m serve {shlex.quote(str(run.path))} --port 8001"


def _no_run(word: str, folder: Path) -> str:
    names = sorted(p.parent.name for p in folder.glob(f"*/{RUN_FILE}"))
    known = f"Runs in {folder}: {', '.join(names)}." if names else f"There is no run in {folder}; train one first."
    return f"neither a run folder nor a run in {folder}. {known}"
