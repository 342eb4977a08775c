"""What a router learns from: the experts' talk as far as it has come, and text that is no expert's."""

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from toolkit.combine.route_features import last_user_turns
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, InputError, Problem
from toolkit.generate import Sampling, generate
from toolkit.shipped import shipped

FIRST_WEIGHT = 3.0  # of a talk's first message, against each later moment of the talk
MOST_TALKS, MOST_TURNS = 3000, 8  # of an expert, spread evenly over its talks; of a talk, its first
N_SAID, SAID_TOKENS = 1200, 24  # texts that the base says unasked, and how long each may be
LONGEST = 3  # strangers in a row that make a longer one
_LETTER = re.compile(r"[^\W\d_]")


@dataclass(frozen=True)
class Rows:
    """Texts to learn from. owner: the expert's number, or the number of experts and more for kinds of strangers.
    talk: the talk a text is from, numbered over all experts; below 0 for strangers. turns: how many user turns the text
    holds from the talk's first on, 0 where it is a later turn alone. weight: what it counts.
    """

    texts: list[str]
    owner: list[int]
    talk: list[int]
    turns: list[int]
    weight: list[float]

    def add(self, text: str, owner: int, talk: int, turns: int, weight: float) -> None:
        """One more."""
        self.texts.append(text)
        self.owner.append(owner)
        self.talk.append(talk)
        self.turns.append(turns)
        self.weight.append(weight)


def rows_of(talks: Mapping[str, Sequence[Talk]]) -> Rows:
    """Every talk after one, two, three… user turns, and each later user turn alone; a talk weighs the same whatever its
    length, but for its first message, which weighs FIRST_WEIGHT. At most MOST_TALKS of an expert and MOST_TURNS of a
    talk are taken, which bounds time and memory.

    Raises: InputError for fewer than two experts, and with every expert that has fewer than two talks in which the user
    says something.
    """
    rows = Rows([], [], [], [], [])
    problems = []
    number = 0
    for owner, (name, mine) in enumerate(talks.items()):
        before = number
        step = max(1.0, len(mine) / MOST_TALKS)
        for talk in (mine[int(place * step)] for place in range(min(len(mine), MOST_TALKS))):
            number += _add_talk(rows, talk, owner, number)
        if number - before < 2:
            says = f"{number - before} conversations with a user's words: a router learns from two or more an expert."
            problems.append(Problem(name, f"{says} Give it data, or leave it out of the route."))
    if len(talks) < 2:
        says = f"{', '.join(talks) or 'none'}: a router chooses between two experts or more. Name another, or drop"
        problems.append(Problem("experts", f"{says} combine."))
    if problems:
        raise InputError("router", problems)
    return rows


def _add_talk(rows: Rows, talk: Talk, owner: int, number: int) -> int:
    said = [turn for turn in talk.turns if turn.role in ("user", "text") and turn.content.strip()][:MOST_TURNS]
    texts = [(last_user_turns(said[: n + 1]), n + 1) for n in range(len(said))]
    texts += [(last_user_turns([turn]), 0) for turn in said[1:]]
    for text, turns in texts:
        rows.add(text, owner, number, turns, (FIRST_WEIGHT if turns == 1 else 1.0) / len(texts))
    return int(bool(said))


def strangers(base_model: Any, tokenizer: Any, taken: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Text that is no expert's, of two kinds: written sentences that ship with Maltu (data/speech), and what the base
    says unasked, N_SAID times. What is among `taken`, the experts' own texts, is left out.

    Cost: N_SAID rows of at most SAID_TOKENS tokens from the base. Raises: DataError where the shipped files are missing
    or damaged.
    """
    own = set(taken)
    kinds = (_written(), _said(base_model, tokenizer, seed))
    written, said = ([text for text in dict.fromkeys(kind) if text not in own] for kind in kinds)
    return written, said


def add_strangers(rows: Rows, texts: Sequence[str], owner: int, seed: int) -> None:
    """Add texts that are no expert's: in groups of LONGEST, each of them alone and some of the group in a row, so that
    length alone tells nothing. A group counts as one talk, numbered below 0; all together weigh 1.
    """
    draw = random.Random(seed)
    order = draw.sample(list(texts), len(texts))
    groups = [order[start : start + LONGEST] for start in range(0, len(order), LONGEST)]
    last = min([0, *rows.talk])
    weight = 1.0 / max(1, len(texts) + len(groups))
    for number, group in enumerate(groups, 1):
        for text in [*group, "\n".join(group[: draw.randint(2, LONGEST)])]:
            rows.add(text, owner, last - number, 0, weight)


def _written() -> list[str]:
    found = []
    for lang in ("ko", "en"):
        path = shipped(f"speech/register.{lang}.jsonl")
        try:
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found += [last_user_turns([Turn("user", row["written"])]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as broken:
            says = f"cannot be read ({type(broken).__name__}: {broken}). Restore it from the repository."
            raise DataError(str(path), [Problem("", says)]) from None
    return found


def _said(model: Any, tokenizer: Any, seed: int) -> list[str]:
    opening = next((i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None), 0)
    sampling = Sampling(temperature=1.0, top_p=1.0, max_tokens=SAID_TOKENS, seed=seed)
    answers = generate(model, tokenizer, [[opening]] * N_SAID, sampling)
    texts = (last_user_turns([Turn("user", answer.text.replace("\ufffd", ""))]) for answer in answers)
    return [text for text in texts if _LETTER.search(text)]
