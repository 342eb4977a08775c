"""What is kept of texts: the longest common beginning, within bounds, nothing between scopes. Against the plainest
model of it: a list of texts.
"""

import random

import pytest
import torch

from serve.engines.reuse import BLOCK, Columns, Reuse

PER_TOKEN = 4 * 3 * 4  # bytes: keys and values of two layers, each 3 numbers


class Texts:
    """Texts whose columns can be told apart: by token, place and scope."""

    def __init__(self, limit: int = 10**9) -> None:
        self.reuse = Reuse(limit)
        self.n_copied = 0

    def columns(self, scope: str, ids: list[int]) -> Columns:
        # a column depends on all that comes before it, as keys and values do
        seen = torch.tensor([hash((scope, *ids[: place + 1])) % 2**20 for place in range(len(ids))]).float()
        return tuple(seen.view(-1, 1, 1).expand(-1, 1, 3) + layer for layer in range(4))

    def keep(self, scope: str, ids: list[int]) -> None:
        def copied(first: int, last: int) -> Columns:
            self.n_copied += last - first
            return tuple(part[first:last].clone() for part in self.columns(scope, ids))

        self.reuse.keep(scope, ids, copied)

    def found(self, scope: str, ids: list[int]) -> int:
        """How many tokens are there; each of them as it was kept."""
        n_found, pieces = self.reuse.find(scope, ids)
        whole = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
        assert all(torch.equal(*pair) for pair in zip(whole, self.columns(scope, ids[:n_found]), strict=bool(n_found)))
        return n_found


def common(one: list[int], other: list[int]) -> int:
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )


@pytest.mark.parametrize("seed", range(6))
def test_what_is_found_is_the_longest_beginning_in_common_with_any_kept_text(seed: int) -> None:
    dice, texts, kept = random.Random(seed), Texts(), dict[str, list[list[int]]]()
    for _ in range(150):
        scope = dice.choice("ab")
        known = dice.choice(kept.get(scope, [[]]))
        ids = known[: dice.randint(0, len(known))] + [dice.randint(0, 2) for _ in range(dice.choice([0, 1, 5, 40, 90]))]
        assert texts.found(scope, ids) == max((common(ids, one) for one in kept.get(scope, [])), default=0)
        if dice.random() < 0.6:
            texts.keep(scope, ids)
            kept.setdefault(scope, []).append(ids)


def test_what_is_there_already_is_not_copied_again() -> None:
    texts, ids = Texts(), list(range(3 * BLOCK + 5))
    texts.keep("a", ids)
    texts.keep("a", ids)
    assert texts.n_copied == len(ids) and texts.reuse.n_bytes == len(ids) * PER_TOKEN
    texts.keep("a", [*ids, 1, 2])
    assert texts.n_copied <= len(ids) + 5 + 2 and texts.reuse.n_bytes == (len(ids) + 2) * PER_TOKEN
    texts.keep("a", ids[: BLOCK + 3])
    texts.keep("a", [*ids[:BLOCK], *range(900, 900 + BLOCK)])
    assert texts.reuse.n_bytes == (len(ids) + 2 + BLOCK) * PER_TOKEN


def test_nothing_is_found_in_another_scope() -> None:
    texts, ids = Texts(), list(range(50))
    texts.keep("a", ids)
    assert (texts.found("a", ids), texts.found("b", ids), texts.found("a", [9, *ids])) == (50, 0, 0)


@pytest.mark.parametrize("seed", range(4))
def test_memory_stays_within_its_bound_and_what_was_used_last_stays(seed: int) -> None:
    dice, texts = random.Random(seed), Texts(limit=6 * BLOCK * PER_TOKEN)
    shared = [dice.randint(0, 99) for _ in range(BLOCK)]
    for _ in range(200):
        ids = shared + [dice.randint(0, 99) for _ in range(dice.randint(1, 2 * BLOCK))]
        texts.keep(dice.choice("ab"), ids)
        assert texts.reuse.n_bytes <= texts.reuse.limit
        blocks = list(texts.reuse._lately)
        assert texts.reuse.n_bytes == sum(block.n_bytes for block in blocks)
        assert all(block.before in blocks or not block.before.ids for block in blocks if block.before is not None)
    texts.keep("a", ids)
    assert texts.found("a", ids) == len(ids)


def test_a_text_larger_than_the_bound_leaves_nothing() -> None:
    texts = Texts(limit=BLOCK * PER_TOKEN)
    texts.keep("a", list(range(3 * BLOCK)))
    assert texts.reuse.n_bytes <= texts.reuse.limit
    texts.reuse.clear()
    assert texts.reuse.n_bytes == 0 == texts.found("a", list(range(BLOCK)))


def test_without_room_nothing_is_copied() -> None:
    texts = Texts(limit=0)
    texts.keep("a", [1, 2, 3])
    assert texts.n_copied == 0 and texts.found("a", [1, 2, 3]) == 0
