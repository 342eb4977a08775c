"""How a search uses a machine: processes, trials side by side, threads. Rules that were measured: docs/log.md."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import psutil

from toolkit.fit.batches import Limits, Row
from toolkit.fit.head import MAX_LOGITS
from toolkit.fit.plan import MEMORY_SHARE, Place, Plan, Shape, activation_bytes
from toolkit.recipe.model import Recipe

CPU_TOKENS = 1024  # of one forward pass on a CPU: from there on memory traffic eats what batching saves
JOIN_TOKENS = 512  # a step of so many tokens keeps a CPU busy by itself: trials side by side gain nothing
GPU_TOKENS = 65_536
MOST_TOGETHER = 16
MEMBERS_SHARE = 0.1  # of free memory may go to weights, gradients, moments and best tensors of those that learn
SMALL_BYTES = 400e6  # weights of a base up to which processes of one thread are worth a copy of it each
PROCESS_BYTES = 1.2e9  # what a process takes beside its base: libraries, rows, activations


@dataclass(frozen=True)
class Split:
    """Processes on this machine, and the threads of each; the number of trials side by side is found once the base is
    there.
    """

    workers: int
    threads: int


def count_cores() -> int:
    """Physical cores that this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def split_machine(recipe: Recipe, place: Place, n_cores: int, base_bytes: int) -> Split:
    """On a GPU one process; on a CPU one a core, as long as the base is small and memory holds them all."""
    assert recipe.search is not None  # a search was asked for
    asked = recipe.search.workers
    if isinstance(asked, int):
        return Split(asked, max(1, n_cores // asked))
    if place.device != "cpu" or base_bytes > SMALL_BYTES:
        return Split(1, n_cores)
    fits = int(place.free_bytes * MEMORY_SHARE // (PROCESS_BYTES + 2 * base_bytes))
    workers = max(1, min(n_cores, recipe.search.trials, fits))
    return Split(workers, max(1, n_cores // workers))


def limits_of(shape: Shape, place: Place, plan: Plan, longest: int) -> Limits:
    """What one forward pass holds: tokens by device and memory, and the logits of its supervised tokens."""
    n_supervised = max(1, MAX_LOGITS // shape.vocab)
    if place.device == "cpu":
        return Limits(max(CPU_TOKENS, longest), n_supervised)
    each = activation_bytes(shape, longest, replace(plan, activation_checkpointing=False)) / longest  # a stack has none
    fits = int(place.free_bytes * MEMORY_SHARE // each)
    return Limits(max(longest, min(GPU_TOKENS, fits)), n_supervised)


def trials_together(recipe: Recipe, place: Place, limits: Limits, rows: Sequence[Row], member_bytes: int = 1) -> int:
    """How many trials one process teaches at once, where the recipe leaves it open: as many as fill a forward pass and
    find room, at `member_bytes` each, in a tenth of what is free.
    """
    assert recipe.search is not None  # a search was asked for
    asked = recipe.search.side_by_side
    if isinstance(asked, int):
        return asked
    step = recipe.train.batch_size * sum(len(ids) for ids, _ in rows) / max(1, len(rows))
    return min(recipe.search.trials, fill(step, place.device, limits.n_tokens, place.free_bytes / member_bytes))


def fill(step: float, device: str, n_tokens: int, n_fit: float) -> int:
    """How many members of `step` tokens a step fill a forward pass of `n_tokens`, where a tenth of what is free, which
    holds `n_fit` of them, has room for them. On a CPU a pass is full early.
    """
    wanted = JOIN_TOKENS if device == "cpu" else n_tokens
    return max(1, min(MOST_TOGETHER, int(wanted // max(step, 1.0)), int(n_fit * MEMBERS_SHARE)))
