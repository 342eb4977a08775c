"""What was probably meant: the nearest of some words, the nearest file."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path


def nearest(word: str, words: Iterable[str], likeness: float = 0.6) -> str | None:
    """The one of `words` that is nearly `word`, or None."""
    spelled = {known.lower(): known for known in words}
    found = get_close_matches(word.lower(), spelled, n=1, cutoff=likeness)
    return spelled[found[0]] if found else None


def nearest_file(path: Path) -> str | None:
    """A path in the same folder whose name is nearly that of `path`, or None."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except (OSError, ValueError):
        return None
    found = nearest(path.name, names, 0.75)
    return None if found is None else str(path.parent / found)


def did_you_mean(guess: str | None) -> str:
    """A sentence to hang on a message; empty without a guess."""
    return "" if guess is None else f". Did you mean '{guess}'?"
