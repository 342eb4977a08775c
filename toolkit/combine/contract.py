"""What a combination promises: several adapters of one stack answer as one, with weights that were fitted elsewhere.

A combination holds names and numbers alone. It is given the stack to answer over, changes nothing on it, and never
trains. A merge is none: it gives an adapter, which answers like any other.
tests/contracts/test_combine_contract.py is the conformance test; a new combination is done when it passes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from toolkit.combine.methods import Method, method_named
from toolkit.errors import InputError, Problem
from toolkit.generate import Answer, Sampling
from toolkit.stack.stack import Stack

Given = Mapping[str, float] | Sequence[float] | None


@dataclass(frozen=True)
class Weights:
    """A weight for each member, and in words what had to be done to them ("" where nothing had)."""

    values: tuple[float, ...]
    told: str = ""


class Combination(ABC):
    """Members of one stack that answer as one.

    kind: the word in a recipe. members: names of adapters in the stack, in the order that breaks ties; None is the
    base. weights: one for each member, as they are used. how: which of the kind's methods (`methods.py` describes it).
    """

    kind: ClassVar[str]
    members: tuple[str | None, ...]
    weights: Weights
    how: str

    @abstractmethod
    def answer(
        self,
        stack: Stack,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ends: AbstractSet[int] | None = None,
    ) -> list[Answer]:
        """Answer every prompt, in the order given, as `toolkit.generate.generate` does, which says what `ends` are.

        One member alone, or one that has all the weight, answers what its adapter alone would with the same sampling;
        the same call gives the same answers. Stack and base are left as they were.
        Raises: AdapterError when the stack lacks a member; InputError for a prompt that is empty or leaves no room.
        """

    @property
    def method(self) -> Method:
        """How this combination works, in words."""
        return method_named(self.kind, self.how)


def numbers(names: Sequence[str], weights: Given) -> tuple[float, ...]:
    """A weight for each name in order: None gives all the same, which sum to 1; others stay as they are.

    Raises: InputError with every weight that is missing, too many or no finite number, or when nothing has a weight.
    """
    if weights is None:
        return (1.0 / len(names),) * len(names) if names else ()
    problems = []
    if isinstance(weights, Mapping):
        known = ", ".join(names)
        problems += [Problem(name, f"is no member. There are: {known}.") for name in weights if name not in names]
        problems += [
            Problem(name, "has no weight. Give it one; 0 leaves it out.") for name in names if name not in weights
        ]
        found = [(name, weights[name]) for name in names if name in weights]
    else:
        if len(weights) != len(names):
            problems.append(Problem("", f"{len(weights)} weights for {len(names)} members. Give one for each."))
        found = list(zip(names, weights, strict=False))
    for name, value in found:
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            problems.append(Problem(name, f"{value!r} is no weight. Give a finite number."))
    if not problems and not any(value for _, value in found):
        problems.append(Problem("", "every weight is 0, so nothing is left. Give one that is not."))
    if problems:
        raise InputError("weights", problems)
    return tuple(float(value) for _, value in found)


def shares(names: Sequence[str], weights: Given, *, may_be_negative: bool = False) -> Weights:
    """Weights that sum to 1, and a sentence where the ones given did not.

    Raises: InputError as `numbers` does, for a negative weight where it has no meaning, and for a sum that is not
    above 0.
    """
    values = numbers(names, weights)
    total = math.fsum(values)
    problems = [
        Problem(name, f"{value:g} is negative, and a share of a probability or of a vote cannot be. Give 0 or more.")
        for name, value in zip(names, values, strict=True)
        if value < 0 and not may_be_negative
    ]
    if not problems and not total > 1e-9 * math.fsum(map(abs, values)):
        problems.append(Problem("", f"they sum to {total:g}. Give weights whose sum is above 0."))
    if problems:
        raise InputError("weights", problems)
    if abs(total - 1.0) <= 1e-9:
        return Weights(values)
    said = ", ".join(f"{name} {value / total:.4g}" for name, value in zip(names, values, strict=True))
    return Weights(tuple(value / total for value in values), f"The weights sum to {total:g}; they are used as {said}.")


def called(members: Sequence[str | None]) -> tuple[str, ...]:
    """What members are called in messages and as keys of weights: the base is `base`.

    Raises: InputError where there is none, or one stands twice.
    """
    names = tuple("base" if name is None else name for name in members)
    problems = [
        Problem(name, "stands twice. Give it a larger weight.") for name in sorted(set(names)) if names.count(name) > 1
    ]
    if not names:
        problems.append(Problem("", "there is none. Name at least one adapter."))
    if problems:
        raise InputError("members", problems)
    return names
