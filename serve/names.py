"""What the `model` of a request may say: a run, `base`, and the words that later versions will answer to."""

from collections.abc import Collection

from serve.refusal import Refusal

BASE = "base"
AUTO = "auto"
_SIGNS = ":/=,"
_LATER = {"mix:": "a mixture of runs", "vote:": "a vote of runs"}


def find(word: str, names: Collection[str]) -> str:
    """The served name that a request means.

    Raises Refusal: 404 model_not_found with the names there are; 400 for what this version does not do yet.
    """
    if word in names:
        return word
    later = next((says for sign, says in _LATER.items() if word.startswith(sign)), None)
    if word == AUTO:
        later = "choosing the run by what is said"
    elif later is None and "/" in word and word.split("/", 1)[0] in names:
        later = "an expert of a run"
    known = f"The models here: {', '.join(names)}."
    if later is not None:
        raise Refusal(400, f"{_shown(word)} ({later}): not in this version. {known}", "unsupported_parameter", "model")
    raise Refusal(404, f"The model {_shown(word)} does not exist. {known}", "model_not_found", "model")


def refuse_name(name: str) -> str | None:
    """Why a run folder's name cannot be a model's, or None where it can."""
    if name in (BASE, AUTO) or any(sign in name for sign in _SIGNS) or not name.isprintable():
        signs = " ".join(_SIGNS)
        return (
            f"the name {name!r} means something else in a request. Rename the folder (no {signs}, not base, not auto)."
        )
    return None


def _shown(word: str) -> str:
    return repr(word if len(word) <= 80 else word[:80] + "…")
