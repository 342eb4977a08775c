"""What names mean: words of the `model` of a request that cannot be a run's name, and whose a name is. serve/who.py
reads requests.
"""

BASE = "base"
AUTO = "auto"
MIX, VOTE = "mix", "vote"
_SIGNS = ":/=,"


def is_of(name: str, run: str | None) -> bool:
    """Whether a name that answers is this run's: its own, or that of an expert of it."""
    return run is not None and (name == run or name.startswith(f"{run}/"))


def refuse_name(name: str) -> str | None:
    """Why a run folder's name cannot be a model's, or None where it can."""
    if name in (BASE, AUTO, MIX, VOTE) or any(sign in name for sign in _SIGNS) or not name.isprintable():
        signs = " ".join(_SIGNS)
        return (
            f"the name {name!r} means something else in a request. Rename the folder (no {signs}; not base, auto, mix "
            "or vote)."
        )
    return None
