"""Talks to train, valid and test: whole clusters of similar talks, drawn by a seed, every language in its share."""

import zlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from toolkit.corpus.clean import Cleaned
from toolkit.corpus.near import Ints
from toolkit.corpus.store import Talks
from toolkit.corpus.talk import Talk
from toolkit.errors import DataError, Problem

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Split:
    """Three views of the same talks, each in the order the talks came."""

    train: Talks
    valid: Talks
    test: Talks


def split_talks(cleaned: Cleaned, valid: float, test: float, seed: int) -> Split:
    """Hold out a share of the talks for validation and for test; the same talks, shares and seed give the same split.

    No cluster is torn apart. Each language gives its share, and inside it each label (where talks have one), as nearly
    as whole clusters allow; a cluster larger than what is still wanted of its kind stays in train.
    Raises: DataError where a part that is asked for would be empty: fewer clusters than parts.
    """
    parts = draw(cleaned.talks, cleaned.report.cluster, (valid, test), seed)
    return Split(*(cleaned.talks.select(parts == number) for number in range(3)))


def draw(talks: Sequence[Talk], cluster: Ints, shares: tuple[float, float], seed: int) -> Ints:
    """For each talk its part: 0 train, 1 valid, 2 test, for shares (valid, test). Promises what split_talks does."""
    if not len(talks):
        raise DataError("data", [Problem("data.train", "no conversation is left to learn from")])
    _, first, cluster = np.unique(cluster, return_index=True, return_inverse=True)
    sizes = np.bincount(cluster)
    wanted = {number: share for number, share in ((2, shares[1]), (1, shares[0])) if share > 0}
    if len(sizes) < 1 + len(wanted):
        raise DataError("data", [Problem("data.train", _too_little(len(talks), len(sizes), shares))])
    strata = _strata(talks, first)
    part = np.zeros(len(sizes), dtype=np.int64)  # of each cluster
    for number, share in wanted.items():
        for (lang, label), n_wanted in _wanted(strata, sizes, share).items():
            shuffle = np.random.default_rng([seed, number, zlib.crc32(f"{lang}\x1f{label}".encode())])
            _fill(part, sizes, shuffle.permutation(strata[lang, label]), n_wanted, number)
    for number in (*wanted, 0):
        if not (part == number).any():
            _give_smallest(part, sizes, number)
    drawn: Ints = part[cluster]
    return drawn


Strata = dict[tuple[str, str], list[int]]


def _strata(talks: Sequence[Talk], first: Ints) -> Strata:
    """Clusters by language and label of their first talk."""
    strata: Strata = {}
    cluster_of = {place: number for number, place in enumerate(first.tolist())}
    for place, talk in enumerate(talks):
        if place in cluster_of:
            strata.setdefault((talk.lang or "", talk.label or ""), []).append(cluster_of[place])
    return strata


def _wanted(strata: Strata, sizes: Ints, share: float) -> dict[tuple[str, str], int]:
    """How many talks each stratum gives: the whole share is dealt to languages, each language's to its labels."""
    held = {key: int(sizes[clusters].sum()) for key, clusters in strata.items()}
    by_lang: Counter[str] = Counter()
    for (lang, _), number in held.items():
        by_lang[lang] += number
    total = max(1, int(share * by_lang.total() + 0.5))
    wanted: dict[tuple[str, str], int] = {}
    for lang, n_lang in _deal(total, by_lang).items():
        wanted |= _deal(n_lang, {key: number for key, number in held.items() if key[0] == lang})
    return wanted


def _deal(total: int, sizes: Mapping[K, int]) -> dict[K, int]:
    """Whole numbers in proportion to sizes that add up to total (largest remainders; the earlier of equals)."""
    whole = sum(sizes.values())
    dealt = {key: total * size // whole for key, size in sizes.items()}
    by_remainder = sorted(sizes, key=lambda key: -(total * sizes[key] % whole))
    for key in by_remainder[: total - sum(dealt.values())]:
        dealt[key] += 1
    return dealt


def _fill(part: Ints, sizes: Ints, clusters: Ints, n_wanted: int, number: int) -> None:
    """Put clusters that are still in train into a part, in this order, as far as they fit into what is wanted."""
    for cluster in clusters.tolist():
        if part[cluster] == 0 and sizes[cluster] <= n_wanted:
            part[cluster] = number
            n_wanted -= int(sizes[cluster])
        if not n_wanted:
            return


def _give_smallest(part: Ints, sizes: Ints, number: int) -> None:
    """Move the smallest cluster of the part that has most of them, so that no part is empty."""
    richest = int(np.bincount(part).argmax())
    clusters = np.flatnonzero(part == richest)
    part[clusters[sizes[clusters].argmin()]] = number


def _too_little(n_talks: int, n_clusters: int, shares: tuple[float, float]) -> str:
    keys = [key for key, share in zip(("data.valid", "data.test"), shares, strict=True) if share > 0]
    alike = f", so much alike that they are {n_clusters} for a split" if n_clusters < n_talks else ""
    off = " and ".join(f"{key}: 0" for key in keys)
    return (
        f"{n_talks} conversation{'s' if n_talks != 1 else ''}{alike}: too little to hold out {' and '.join(keys)} "
        f"and still learn ({1 + len(keys)} are needed). Add conversations, or set {off}"
    )
