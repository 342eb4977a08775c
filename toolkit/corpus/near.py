"""Near duplicates: which talks say almost the same, found without comparing every pair.

Each talk's text becomes a set of character n-grams, the set a MinHash signature (datasketch), and talks whose
signatures agree in a whole band are compared by their estimated Jaccard similarity. Many signatures lie in a file.
Sources: Broder, "On the resemblance and containment of documents" (1997); Leskovec, Rajaraman and Ullman, "Mining
of Massive Datasets", chapter 3.

Cost: about 50 µs and 512 bytes of signature a talk, and memory for some 60 bytes a talk beside them.
"""

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from toolkit.corpus.talk import Talk

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
Signs = npt.NDArray[np.uint32]

N_PERMUTATIONS = 128
SHORTEST = 20  # characters; shorter texts are compared for equality alone
FEWEST_GRAMS = 10  # of a text's own, when those that many texts share are taken away
GRAM_DENSE, GRAM_LATIN = 3, 5  # characters in a gram: Hangul and other scripts that say much in one sign, and Latin
DENSE_FROM = 0x1100  # Hangul, kana and Chinese characters all lie above
DENSE_SHARE = 0.2
SAMPLE, SMALLEST_SAMPLE, SHARED = 2000, 200, 0.3
BATCH_CHARS = 1_000_000
PIECE = 16_384  # grams hashed at once: bounds memory for a text as long as a book
MAX_LEADERS = 32
MEMORY_BYTES = 64_000_000
PAIRS_AT_ONCE = 32_768
CERTAINTY = 0.97  # with which two talks exactly as similar as the threshold share a band


@dataclass(frozen=True)
class Near:
    """Clusters of talks: for each talk, the place of the first talk of its cluster.

    `loose` clusters keep talks together when they are split; of a `strict` one, all but the first are near duplicates.
    """

    loose: Ints
    strict: Ints


def find_near(talks: Sequence[Talk], loose: float, strict: float | None, workdir: Path | None) -> Near:
    """Cluster talks whose estimated Jaccard similarity reaches `loose`, and among them those that reach `strict`.

    Clusters are transitive. System turns are not compared; neither are grams that more than SHARED of a sample of talks
    have (the words of a prompt template), where the sample holds at least SMALLEST_SAMPLE. Texts under SHORTEST
    characters cluster only when equal, and only loosely. `strict` must not be below `loose`. Deterministic.
    Raises: OSError where many signatures find no room on the disk.
    """
    forests = _Forest(len(talks)), _Forest(len(talks))
    signs, is_signed, digests = _sign_all(talks, workdir)
    _join_equal(digests, np.arange(len(talks)), forests[0])
    signed = np.flatnonzero(is_signed)
    width = _band_width(loose)
    for start in range(0, N_PERMUTATIONS - width + 1, width):
        keys = _band_keys(signs, signed, start, width)
        _match_buckets(keys, signed, signs, (loose, strict), forests)
    return Near(forests[0].roots, forests[1].roots)


def compared(talk: Talk) -> str:
    """What of a talk is compared: its words without the system turn, in small letters, one space between them."""
    return " ".join(" ".join(turn.content for turn in talk.turns if turn.role != "system").lower().split())


def _sign_all(talks: Sequence[Talk], workdir: Path | None) -> tuple[Signs, npt.NDArray[np.bool_], Hashes]:
    """Signatures [talks, N_PERMUTATIONS], whether a talk has one, and a hash of each compared text."""
    from datasketch import MinHash  # takes half a second, for SciPy

    shape = (len(talks), N_PERMUTATIONS)
    signs = _room(shape, workdir)
    is_signed, digests = np.zeros(len(talks), dtype=np.bool_), np.zeros(len(talks), dtype=np.uint64)
    shared = _shared_grams(talks)
    sketch = MinHash(num_perm=N_PERMUTATIONS, hashfunc=int, scheme="affine32")
    for first, texts in _batches(talks):
        for place, (text, grams) in enumerate(zip(texts, _grams(texts), strict=True), first):
            digests[place] = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
            own = _without(grams, shared)
            if len(text) >= SHORTEST and len(own) >= FEWEST_GRAMS:
                sketch.clear()
                for start in range(0, len(own), PIECE):
                    sketch.update_batch(own[start : start + PIECE].tolist())
                signs[place] = sketch.hashvalues
                is_signed[place] = True
    return signs, is_signed, digests


def _room(shape: tuple[int, int], workdir: Path | None) -> Signs:
    if shape[0] * shape[1] * 4 <= MEMORY_BYTES:
        return np.zeros(shape, dtype=np.uint32)
    with tempfile.TemporaryFile(dir=workdir, prefix="signatures-") as file:  # the mapping outlives it
        if hasattr(os, "posix_fallocate"):  # a mapped file that finds the disk full later kills the process
            os.posix_fallocate(file.fileno(), 0, shape[0] * shape[1] * 4)
        return np.memmap(file, dtype=np.uint32, mode="w+", shape=shape)


def _batches(talks: Sequence[Talk]) -> Iterator[tuple[int, list[str]]]:
    """Compared texts in order, BATCH_CHARS at a time, with the place of the first."""
    first, texts, room = 0, list[str](), BATCH_CHARS
    for talk in talks:
        texts.append(compared(talk))
        room -= len(texts[-1])
        if room < 0:
            yield first, texts
            first, texts, room = first + len(texts), [], BATCH_CHARS
    if texts:
        yield first, texts


def _grams(texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
    """A 32-bit hash for every n-gram of every text, repeats included; empty where a text is shorter than a gram."""
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    ends = np.cumsum([len(text) for text in texts])
    hashed = {n: _hash_windows(codes, n) for n in (GRAM_DENSE, GRAM_LATIN)}
    n_dense = np.concatenate(([0], np.cumsum(codes >= DENSE_FROM)))
    found = []
    for text, end in zip(texts, ends.tolist(), strict=True):
        start = end - len(text)
        is_dense = n_dense[end] - n_dense[start] >= DENSE_SHARE * len(text)
        n = GRAM_DENSE if is_dense else GRAM_LATIN
        found.append(hashed[n][start : max(start, end - n + 1)])
    return found


def _hash_windows(codes: Hashes, n: int) -> npt.NDArray[np.uint32]:
    """A hash of each run of n codes: a polynomial modulo 2^64, mixed (the finalizer of SplitMix64), its upper half."""
    if len(codes) < n:
        return np.zeros(0, dtype=np.uint32)
    n_windows = len(codes) - n + 1
    mixed = np.full(n_windows, n, dtype=np.uint64)
    for place in range(n):
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + n_windows]
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (mixed >> np.uint64(32)).astype(np.uint32)


def _shared_grams(talks: Sequence[Talk]) -> npt.NDArray[np.uint32]:
    """Sorted grams that more than SHARED of an evenly drawn sample of talks have; none where the sample is small."""
    n_sampled = min(SAMPLE, len(talks))
    if n_sampled < SMALLEST_SAMPLE:
        return np.zeros(0, dtype=np.uint32)
    places = np.linspace(0, len(talks) - 1, n_sampled).astype(int).tolist()
    texts = [compared(talks[place])[: BATCH_CHARS // 100] for place in places]
    seen, counts = np.unique(np.concatenate([np.unique(grams) for grams in _grams(texts)]), return_counts=True)
    shared: npt.NDArray[np.uint32] = seen[counts > SHARED * n_sampled]
    return shared


def _without(grams: npt.NDArray[np.uint32], shared: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    if not len(shared):
        return grams
    near = np.minimum(np.searchsorted(shared, grams), len(shared) - 1)
    own: npt.NDArray[np.uint32] = grams[shared[near] != grams]
    return own


def _band_width(threshold: float) -> int:
    """The most rows a band may have so that two talks just as similar as the threshold still meet with CERTAINTY."""
    widths = range(1, 17)
    return max((r for r in widths if 1 - (1 - threshold**r) ** (N_PERMUTATIONS // r) >= CERTAINTY), default=1)


def _band_keys(signs: Signs, signed: Ints, start: int, width: int) -> Hashes:
    """One number for each signed talk's band; equal bands have equal numbers."""
    keys = np.empty(len(signed), dtype=np.uint64)
    for first in range(0, len(signed), PAIRS_AT_ONCE):
        band = signs[signed[first : first + PAIRS_AT_ONCE], start : start + width].astype(np.uint64)
        mixed = np.zeros(len(band), dtype=np.uint64)
        for column in band.T:
            mixed = (mixed ^ column) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(29)
        keys[first : first + PAIRS_AT_ONCE] = mixed
    return keys


class _Forest:
    """Union-find over whole arrays: the root of a cluster is its smallest member, and roots are always looked up."""

    def __init__(self, n: int) -> None:
        self.roots: Ints = np.arange(n, dtype=np.int64)

    def join(self, a: Ints, b: Ints) -> None:
        """Unite the clusters of a[i] and b[i] for every i."""
        while True:
            a, b = self.roots[a], self.roots[b]
            differ = a != b
            if not differ.any():
                return
            a, b = a[differ], b[differ]
            np.minimum.at(self.roots, np.maximum(a, b), np.minimum(a, b))
            while not np.array_equal(shorter := self.roots[self.roots], self.roots):
                self.roots = shorter


def _join_equal(keys: Hashes, rows: Ints, forest: _Forest) -> None:
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    forest.join(rows, rows[first][inverse])


def _match_buckets(
    keys: Hashes, rows: Ints, signs: Signs, thresholds: tuple[float, float | None], forests: tuple[_Forest, _Forest]
) -> None:
    """Compare the talks of each bucket (equal keys) with its first, then those left over with their first, and so on.

    A talk leaves its bucket when it matches at the strictest threshold; after MAX_LEADERS rounds other bands must do.
    """
    loose, strict = thresholds
    leave = loose if strict is None else strict
    leave_forest = forests[0] if strict is None else forests[1]
    order = np.argsort(keys, kind="stable")
    rows, keys = rows[order], keys[order]
    for _ in range(MAX_LEADERS):
        is_first = np.ones(len(rows), dtype=np.bool_)
        is_first[1:] = keys[1:] != keys[:-1]
        if is_first.all():
            return
        leaders, others = rows[is_first][np.cumsum(is_first) - 1][~is_first], rows[~is_first]
        is_known = leave_forest.roots[leaders] == leave_forest.roots[others]
        alike = np.ones(len(others))
        alike[~is_known] = _estimate(signs, leaders[~is_known], others[~is_known])
        forests[0].join(leaders[alike >= loose], others[alike >= loose])
        if strict is not None:
            forests[1].join(leaders[alike >= strict], others[alike >= strict])
        rows, keys = others[alike < leave], keys[~is_first][alike < leave]


def _estimate(signs: Signs, a: Ints, b: Ints) -> npt.NDArray[np.float64]:
    """Estimated Jaccard similarity of pairs: the share of permutations with the same minimum."""
    alike = np.empty(len(a))
    for first in range(0, len(a), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        alike[part] = (signs[a[part]] == signs[b[part]]).mean(axis=1)
    return alike
