"""The parts of benchmarks/gpu.py that answer: equality with plain PEFT, and the speed of rows of many adapters.

How equal is equal? Two computations that differ only in the order of their roundings can each be as far from exact
arithmetic as the other. So the yardstick is measured, not chosen: how far the plain model in the same type lies from
the same model in the next wider one (bf16 from float32, float32 from float64), as a share of the length of what is
compared. The stack may lie MARGIN times that far from the plain model (twice is what two equal errors of opposite
sign give), and the adapter has to move the answer by WEIGHT times what is allowed, or the comparison would say nothing.
"""

# B rows, T tokens, V vocabulary.

import random
import statistics
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from gpu_world import (
    MARGIN,
    Work,
    asked,
    copy_of,
    gradients,
    loss_by_row,
    make_base,
    many_loras,
    off,
    strong_adapter,
    wear,
    with_peft,
)
from machine import say
from torch import Tensor

WEIGHT, EQUAL = 3.0, "equal"
KINDS: dict[str, Any] = {
    "lora": asked("lora"),
    "lora-8": asked("lora", rank=8, rank_stabilised=True),
    "prefix": asked("prefix"),
    "reft": asked("reft"),
    "embedding": asked("embedding"),
}
# Rows of all kinds, mixed; some adapters own several, so that decoding brings their rows together.
OWNERS = (None, "lora", "prefix", "reft", "embedding", "lora-8", "lora", "lora-8", "lora", "lora", "prefix", "lora-8")
# (name, type of the base, the wider type that counts as exact, as training runs it on a card)
TYPES = (
    ("fp32", torch.float32, torch.float64, False),
    ("bf16", torch.bfloat16, torch.float32, False),
    ("bf16 under autocast", torch.bfloat16, torch.float32, True),
)
DISTINCT = {8: (1, 2, 4, 8), 32: (1, 2, 4, 8, 16, 32), 64: (64,)}
SPREAD_B = 0.02


def equality(work: Work) -> None:
    """Rows of a stack, of every kind and of none, against plain models: answers, also cached, and gradients."""
    torch.set_float32_matmul_precision("highest")
    differing: list[str] = []
    found: dict[str, Any] = {}
    for name, *types in TYPES:
        if not work.has_time(name, 15):
            continue
        since = work.card.mark()
        ways = work.fits(name, partial(_compared, work, *types))
        if ways is not None:
            found[name] = ways
            differing += [f"{name}, {way}, {kind}" for way, one in ways.items() for kind in _unequal(one)]
            work.keep("cases", found)
            work.keep("peak_mb", {**work.found.get("peak_mb", {}), name: work.card.peak_mb(since)})
            say(f"  {name}: compared; {len(differing)} comparisons failed so far")
        work.card.clean()
    if differing:
        raise ArithmeticError(f"{len(differing)} comparisons fail: {'; '.join(differing[:8])}")


def _unequal(way: dict[str, Any]) -> list[str]:
    return [f"{kind} ({one['verdict']})" for kind, one in way.items() if one["verdict"] != EQUAL]


def _compared(work: Work, dtype: torch.dtype, exact_dtype: torch.dtype, is_half: bool) -> dict[str, Any]:
    """By way of computing and kind: how far off, and the yardstick."""
    from toolkit.stack.stack import Stack

    size, card = work.size, work.card
    noise = torch.Generator().manual_seed(7)
    rows = [
        torch.randint(5, size.llama["vocab_size"], (size.row - index % 5,), generator=noise)
        for index in range(len(OWNERS))
    ]
    seen = sorted(set(torch.cat(rows).tolist()))[::2]
    base = make_base(size, card, dtype)
    adapters = {name: strong_adapter(base, options, 3, seen) for name, options in KINDS.items()}
    plain = _plain(work, copy_of(base, size, card, dtype), adapters, rows, seen, is_half)
    exact = _plain(work, copy_of(base, size, card, exact_dtype), adapters, rows, seen, False)
    with card.half(enabled=is_half), torch.no_grad():
        bare = [base(input_ids=row.to(card.device).unsqueeze(0)).logits[0].float() for row in rows]
    stack = Stack(base)
    ways: dict[str, list[Tensor]] = {}
    for learns in (False, True):
        for name, adapter in adapters.items():
            stack.add(name, adapter, learns=learns)
        with card.half(enabled=is_half):
            if learns:
                ways["gradients"] = _stack_gradients(work, stack, rows)
            else:
                ways["whole"], ways["cached"] = _whole(work, stack, rows), _cached(work, stack, rows)
        stack.close()
    eps = torch.finfo(dtype).eps
    return {
        way: _judged(found, plain["gradients"], exact["gradients"], None, eps)
        if way == "gradients"
        else _judged(found, plain["logits"], exact["logits"], bare, eps)
        for way, found in ways.items()
    }


def _judged(
    found: list[Tensor], plain: list[Tensor], exact: list[Tensor], bare: list[Tensor] | None, eps: float
) -> dict[str, Any]:
    """By kind, the row that is worst off: by how much, the yardstick there, what its adapter moves, and the verdict."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for index, name in enumerate(tuple(KINDS) if bare is None else OWNERS):
        own = max(off(plain[index], exact[index]), eps)
        one: dict[str, Any] = {"off": off(found[index], plain[index]), "own_rounding": own, "verdict": EQUAL}
        if bare is not None and name is not None:
            one["adapter_moves"] = off(bare[index], plain[index])
            if one["adapter_moves"] < WEIGHT * MARGIN * own:
                one["verdict"] = "the adapter moves too little to tell"
        if not one["off"] <= MARGIN * own:
            one["verdict"] = "differs"
        by_kind.setdefault(name or "base", []).append(one)
    return {kind: max(ones, key=lambda one: (one["verdict"] != EQUAL, one["off"])) for kind, ones in by_kind.items()}


def _plain(
    work: Work, base: Any, adapters: Mapping[str, Any], rows: list[Tensor], seen: list[int], is_half: bool
) -> dict[str, list[Tensor]]:
    """Each row alone on a plain model: logits by row, gradients by adapter."""
    from toolkit.adapters.kinds import kind_of

    logits: dict[int, Tensor] = {}
    grads: list[Tensor] = []
    for name in (None, *KINDS):
        model = base if name is None else wear(base, adapters[name], KINDS[name], seen)
        for index, owner in enumerate(OWNERS):
            if owner != name:
                continue
            ids = rows[index].to(work.card.device).unsqueeze(0)
            with torch.set_grad_enabled(name is not None), work.card.half(enabled=is_half):
                out = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
                logits[index] = out[0].detach().to(torch.promote_types(out.dtype, torch.float32))
                if name is not None:
                    sums, counts = loss_by_row(out, ids)
                    (sums / counts).sum().backward()
        if name is not None:
            grads.append(_flat(gradients(model, adapters[name].kind)))
            base = kind_of(KINDS[name]).detach(model)
    return {"logits": [logits[index] for index in range(len(OWNERS))], "gradients": grads}


def _flat(grads: Mapping[str, Tensor | None]) -> Tensor:
    """All gradients of an adapter, one after another by name."""
    missing = [name for name, grad in grads.items() if grad is None]
    if missing:
        raise ArithmeticError(f"{missing[0]} and {len(missing) - 1} more got no gradient")
    return torch.cat([grad.double().flatten() for _, grad in sorted(grads.items()) if grad is not None])


def _padded(work: Work, rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[index, place], mask[index, place] = row, 1
    return ids.to(work.card.device), mask.to(work.card.device)


def _whole(work: Work, stack: Any, rows: list[Tensor]) -> list[Tensor]:
    ids, mask = _padded(work, rows, "right")
    with torch.no_grad():
        logits = stack(ids, stack.owners(OWNERS), attention_mask=mask).logits
    return [logits[index][mask[index].bool()] for index in range(len(rows))]


def _cached(work: Work, stack: Any, rows: list[Tensor]) -> list[Tensor]:
    """Padded on the left; a chunk into the cache, then a token at a time."""
    ids, mask = _padded(work, rows, "left")
    owner, cache, parts, start = stack.owners(OWNERS), None, [], 0
    for end in range(ids.shape[1] - 4, ids.shape[1] + 1):
        with torch.no_grad():
            out = stack(ids[:, start:end], owner, attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        parts.append(out.logits)
    logits = torch.cat(parts, 1)
    return [logits[index][mask[index].bool()] for index in range(len(rows))]


def _stack_gradients(work: Work, stack: Any, rows: list[Tensor]) -> list[Tensor]:
    ids, mask = _padded(work, rows, "right")
    out = stack(ids, stack.owners(OWNERS), attention_mask=mask).logits
    sums, counts = loss_by_row(out, ids.masked_fill(mask == 0, -100))
    (sums / counts).sum().backward()
    return [_flat({leaf: tensor.grad for leaf, tensor in stack.learning(name).items()}) for name in KINDS]


# Speed


def speed(work: Work) -> None:
    """Prefill and decode of rows of many adapters, in bf16, against the base, one PEFT adapter, and adapter_names."""
    contest, found = Contest(work), {}
    cases = [(n_rows, distinct) for n_rows, every in DISTINCT.items() for distinct in every]
    for turn in range(work.size.rounds + 1):  # turn 0 warms up, and checks that what is timed is right
        for n_rows, distinct in cases:
            key = f"{n_rows} rows, {distinct} distinct"
            if not work.has_time(f"{key}, round {turn}", 10 if turn else 20):
                break
            if turn and key not in found:
                continue  # the card has no room for it
            calls, ids = contest.calls(n_rows, distinct), contest.prompt(n_rows)
            with suppress(_NoRoom):
                checked = {} if turn else contest.check(key, calls, ids)
                one = {who: contest.timed(key, who, call, ids) for who, call in calls.items()}
                if turn:
                    found[key]["rounds"].append(one)
                else:
                    found[key] = {**checked, "peak_mb": {who: own["peak_mb"] for who, own in one.items()}, "rounds": []}
            work.keep("cases", found)
        else:
            say(f"  round {turn} of {work.size.rounds}")
            continue
        break
    for one in found.values():
        one["share_of_base"] = {
            what: {who: _share(one["rounds"], who, what) for who in ("peft-one", "peft-names", "stack")}
            for what in ("prefill_ms", "decode_ms")
        }
    work.keep("cases", found)


def _share(rounds: list[Any], who: str, what: str) -> float | None:
    """The median of the base's time over another's, taken within each round."""
    return statistics.median(one["base"][what] / one[who][what] for one in rounds) if rounds else None


class _NoRoom(Exception):
    """The card's memory does not suffice; it was noted."""


class Contest:
    """The base alone, PEFT and the stack, each with a base of its own and the same adapters, all in bf16."""

    def __init__(self, work: Work) -> None:
        from toolkit.stack.stack import Stack

        self.work, size, card = work, work.size, work.card
        self.base = make_base(size, card, torch.bfloat16)
        adapters = many_loras(self.base, max(max(every) for every in DISTINCT.values()), spread=SPREAD_B)
        self.peft = with_peft(copy_of(self.base, size, card, torch.bfloat16), adapters, torch.bfloat16)
        # Weights gathered for a batch that comes again are kept: what 64 adapters take, which the default of 512 MB
        # would cut to a part.
        self.stack = Stack(copy_of(self.base, size, card, torch.bfloat16), dtype=torch.bfloat16, keep_mb=8192)
        for index, adapter in enumerate(adapters):
            self.stack.add(f"a{index}", adapter)
        work.keep("all_contestants_mb", card.peak_mb())

    def prompt(self, n_rows: int) -> Tensor:
        """Token ids, the same every time."""
        noise, vocabulary = torch.Generator().manual_seed(2), self.work.size.llama["vocab_size"]
        return torch.randint(5, vocabulary, (n_rows, self.work.size.prompt), generator=noise).to(self.work.card.device)

    def calls(self, n_rows: int, distinct: int) -> dict[str, Callable[[Tensor, Any], Any]]:
        """One forward pass of each contestant; owners drawn evenly, in a shuffled order."""
        owners = [row % distinct for row in range(n_rows)]
        random.Random(n_rows * 100 + distinct).shuffle(owners)
        names = [f"a{owner}" for owner in owners]
        more = {"use_cache": True, "logits_to_keep": 1}
        self.peft.set_adapter("a0")
        return {
            "base": lambda ids, cache: self.base(input_ids=ids, past_key_values=cache, **more),
            "peft-one": lambda ids, cache: self.peft(input_ids=ids, past_key_values=cache, **more),
            "peft-names": lambda ids, cache: self.peft(
                input_ids=ids, past_key_values=cache, adapter_names=names, **more
            ),
            "stack": lambda ids, cache: self.stack(ids, owners, past_key_values=cache, **more),
        }

    @torch.no_grad()
    def timed(self, key: str, who: str, call: Callable[[Tensor, Any], Any], ids: Tensor) -> dict[str, Any]:
        """Milliseconds of one prefill and of a decoded token. Raises _NoRoom."""
        card = self.work.card
        n_steps = 2 if who == "peft-names" else self.work.size.decoded  # a loop over adapters: seconds at 64 of them

        def act() -> dict[str, Any]:
            before = card.mark()
            started = card.clock()
            cache = call(ids, None).past_key_values
            filled = card.clock()
            for _ in range(n_steps):
                call(ids[:, :1], cache)
            ended = card.clock()
            decode_ms = 1000 * (ended - filled) / n_steps
            return {"prefill_ms": 1000 * (filled - started), "decode_ms": decode_ms, "peak_mb": card.peak_mb(before)}

        found = self.work.fits(f"{key}, {who}", act)
        if found is None:
            raise _NoRoom
        return found

    @torch.no_grad()
    def check(self, key: str, calls: Mapping[str, Any], ids: Tensor) -> dict[str, float]:
        """How far the stack lies from adapter_names, and a bound on bf16's own rounding; too far is an error.

        The bound: every layer adds to the hidden state twice, each time rounding it by up to half an eps, and rounds
        about as often inside; independent errors add as the root of their number.
        """
        found = self.work.fits(
            f"{key}, check", lambda: off(*(calls[who](ids, None).logits for who in ("stack", "peft-names")))
        )
        if found is None:
            raise _NoRoom
        bound = torch.finfo(torch.bfloat16).eps * (4 * self.work.size.llama["num_hidden_layers"]) ** 0.5
        if not found <= bound:
            raise ArithmeticError(f"{key}: the stack and PEFT disagree by {found:.2g} (allowed: {bound:.2g})")
        return {"off_peft": found, "allowed": bound}
