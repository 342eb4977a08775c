"""What the `model` of a request may say: a run, RUN/EXPERT, base, auto, mix:a=0.7,b=0.3, vote:a,b,c.

A bare expert's name is enough where one run alone has it. The engine judges whether names can answer together.
"""

import math
import re
from collections.abc import Collection, Sequence

from serve.engines.contract import Auto, Mix, One, Vote, Who
from serve.names import AUTO, MIX, VOTE
from serve.refusal import Refusal, no_model, shown
from serve.schemas import N_MEMBERS, Options
from toolkit.combine.mix import Over

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
_MOST_WEIGHT = 1e6


def read_who(word: str, options: Options | None, names: Collection[str]) -> Who:
    """Who is meant to answer, every name as `names` has it.

    Raises Refusal: 404 model_not_found for a name that is none, with those there are; 400 for a bare expert's name that
    several runs have (with the candidates), for words that do not read, and where `model` and `maltu` disagree.
    """
    if options is not None and options.mix is not None:
        _check_word(word, MIX)
        return _mix(list(options.mix.items()), names, options.over or "logprob", "maltu.mix")
    if options is not None and options.vote is not None:
        _check_word(word, VOTE)
        return _vote(options.vote, names, "maltu.vote")
    if word in names:
        return One(word)
    if word == AUTO:
        return Auto()
    kind, colon, rest = word.partition(":")
    if colon and kind == MIX:
        return _mix([_pair(part) for part in rest.split(",")], names, "logprob", "model")
    if colon and kind == VOTE:
        return _vote([part.strip() for part in rest.split(",")], names, "model")
    if word in (MIX, VOTE):
        raise _refuse(f"{word}: name who, as in model {_example(word)!r}, or in maltu.{word}.", "model")
    return One(_found(word, names, "model"))


def _mix(pairs: Sequence[tuple[str, float]], names: Collection[str], over: Over, param: str) -> Mix:
    weights = [(_found(name, names, param), weight) for name, weight in pairs]
    _check_members([name for name, _ in weights], param)
    for name, weight in weights:
        if not abs(weight) <= _MOST_WEIGHT:
            raise _refuse(f"the weight of {shown(name)} is no number up to {_MOST_WEIGHT:g}.", param)
    return Mix(tuple(weights), over)


def _vote(words: Sequence[str], names: Collection[str], param: str) -> Vote:
    found = [_found(word, names, param) for word in words]
    _check_members(found, param)
    return Vote(tuple(found))


def _pair(part: str) -> tuple[str, float]:
    name, sign, weight = part.partition("=")
    if not sign:
        raise _refuse(f"{shown(part)} has no weight: write {_example(MIX)!r}.", "model")
    if not _NUMBER.fullmatch(weight.strip()):
        raise _refuse(f"{shown(weight)} is no weight: write {_example(MIX)!r}.", "model")
    value = float(weight)
    return name.strip(), value if math.isfinite(value) else _MOST_WEIGHT * 2


def _check_members(found: Sequence[str], param: str) -> None:
    if len(found) > N_MEMBERS:
        raise _refuse(f"{len(found)} names; at most {N_MEMBERS} answer together.", param)
    twice = next((name for name in found if found.count(name) > 1), None)
    if twice is not None:
        raise _refuse(f"{shown(twice)} stands twice. Name it once.", param)


def _check_word(word: str, wanted: str) -> None:
    if word != wanted:
        raise _refuse(f"maltu.{wanted} says who answers, so model has to say {wanted!r}, not {shown(word)}.", "model")


def _found(word: str, names: Collection[str], param: str) -> str:
    """The name that a word means: itself, or that of the one run's expert."""
    if word in names:
        return word
    candidates = [name for name in names if "/" in name and name.split("/", 1)[1] == word]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise _refuse(f"{shown(word)} could be any of {', '.join(candidates)}. Name the run too.", param)
    raise no_model(word, names, param)


def label_of(who: Who) -> str:
    """A word for who answers, of a bounded set: for metrics."""
    if isinstance(who, One):
        return who.name
    return {Mix: MIX, Vote: VOTE, Auto: AUTO}[type(who)]


def _example(kind: str) -> str:
    return "mix:polite=0.7,casual=0.3" if kind == MIX else "vote:polite,casual"


def _refuse(message: str, param: str) -> Refusal:
    return Refusal(400, message, "invalid_value", param)
