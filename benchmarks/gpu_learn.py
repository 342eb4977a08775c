"""The parts of benchmarks/gpu.py that learn: K adapters in one stack or one after another, packing, and 4 bits."""

# K adapters, B rows, T tokens.

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from gpu_world import (
    MARGIN,
    Card,
    Work,
    adamw,
    asked,
    copy_of,
    llama_config,
    loss_by_row,
    make_base,
    many_loras,
    off,
    wear,
)
from machine import say, spread
from torch import Tensor

WARM = 2  # steps before a clock is read: kernels are chosen, the optimizer makes its state


class Alone:
    """One adapter on plain PEFT, learning."""

    def __init__(self, card: Card, base: Any, adapter: Any) -> None:
        self.card, self.model = card, wear(base, adapter, asked("lora"))
        self.optimizer = adamw([one for one in self.model.parameters() if one.requires_grad], card)

    def step(self, ids_BT: Tensor) -> Tensor:
        """One optimizer step; its loss, as a list of one."""
        with self.card.half():
            logits = self.model(input_ids=ids_BT, use_cache=False).logits
        sums, counts = loss_by_row(logits, ids_BT)
        loss = sums.sum() / counts.sum()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach().unsqueeze(0)


class Together:
    """K adapters learning on a stack, each by an optimizer of its own, or all by one over the dense tensors.

    Gradients are set to zero in one call over the dense tensors; adapter by adapter it would be a kernel for every
    adapter and tensor.
    """

    def __init__(self, card: Card, stack: Any, adapters: Sequence[Any]) -> None:
        self.card, self.stack, self.count = card, stack, len(adapters)
        for index, adapter in enumerate(adapters):
            stack.add(f"a{index}", adapter, learns=True)
        self.dense = list(stack.dense("lora").values())
        self.apart = [adamw(stack.learning(name), card) for name in stack.slots]
        self.one: list[torch.optim.Optimizer] = []

    def step(self, ids_XT: Tensor, *, by_one: bool = False, marks: dict[str, list[float]] | None = None) -> Tensor:
        """One step of every adapter, rows sorted by owner; their losses. `marks` takes milliseconds of its parts."""
        clock = self.card.clock if marks is not None else float
        at = [clock()]
        owner = [index for index in range(self.count) for _ in range(len(ids_XT) // self.count)]
        with self.card.half():
            logits = self.stack(ids_XT, owner, use_cache=False).logits
        sums, counts = loss_by_row(logits, ids_XT)
        losses = sums.view(self.count, -1).sum(1) / counts.view(self.count, -1).sum(1)
        at.append(clock())
        losses.sum().backward()
        at.append(clock())
        if by_one and not self.one:
            self.one = [adamw(self.dense, self.card)]
        for optimizer in self.one if by_one else self.apart:
            optimizer.step()
        at.append(clock())
        torch._foreach_zero_([dense.grad for dense in self.dense])
        at.append(clock())
        for name, start, end in zip(("forward", "backward", "optimizer", "zero"), at, at[1:], strict=False):
            if marks is not None:
                marks.setdefault(name, []).append(1000 * (end - start))
        return losses.detach()


def search(work: Work) -> None:
    """K adapters in one stack against one after another with plain PEFT; bf16 base, float32 adapters, autocast."""
    size, card = work.size, work.card
    base = make_base(size, card, torch.bfloat16)
    adapters = many_loras(base, max(size.counts), spread=0.0)
    other = copy_of(base, size, card, torch.bfloat16)
    race(work, (base, other), adapters, size.shapes, size.counts)


def race(
    work: Work,
    bases: tuple[Any, Any],
    adapters: Sequence[Any],
    shapes: Sequence[tuple[int, int]],
    counts: Sequence[int],
) -> None:
    """Rounds of both contestants for every shape of batch and number of adapters, kept under `cases`.

    One after another, K adapters take K times as long for K times the tokens: one adapter's speed stands for them.
    """
    from toolkit.stack.stack import Stack

    since = work.card.mark()
    alone, cases = Alone(work.card, bases[0], adapters[0]), {}
    for rows, length in shapes:
        for count in counts:
            key = f"K = {count}, {rows} x {length} tokens each"
            if not work.has_time(key, 8 + count):
                return
            stack = Stack(bases[1])
            who = (alone, stack, adapters[:count])
            case = work.fits(key, partial(_raced, work, who, (rows, length), since))
            stack.close()
            work.card.clean()
            if case is None:
                break  # more adapters would not fit either
            cases[key] = case
            work.keep("cases", cases)
            say(f"  {key}: {spread(case['ratio'])} times one after another")


def _raced(work: Work, who: tuple[Alone, Any, Sequence[Any]], shape: tuple[int, int], since: int) -> dict[str, Any]:
    """`since`: bytes in use before there was an adapter, so that peaks are what learning takes beside the bases."""
    (alone, stack, adapters), card, (rows, length) = who, work.card, shape
    noise = torch.Generator().manual_seed(5)
    vocabulary, n_rows = work.size.llama["vocab_size"], len(adapters) * rows
    ids = torch.randint(5, vocabulary, (n_rows, length), generator=noise).to(card.device)
    own = ids[:rows]
    card.mark()
    for _ in range(WARM):
        alone.step(own)
    peaks = {"peft": card.peak_mb(since)}
    before = card.mark()
    together = Together(card, stack, adapters)
    first = together.step(ids)
    for _ in range(WARM - 1):
        together.step(ids)
    peaks["stack"] = card.peak_mb(before)
    together.step(ids, by_one=True)
    calls: dict[str, tuple[int, Callable[[], Tensor]]] = {
        "peft": (own.numel(), lambda: alone.step(own)),
        "stack": (ids.numel(), lambda: together.step(ids)),
        "stack, one optimizer": (ids.numel(), lambda: together.step(ids, by_one=True)),
    }
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(work.size.rounds):
        for name, (n_tokens, step) in calls.items():
            speeds[name].append(_speed(work, n_tokens, step))
    marks: dict[str, list[float]] = {}
    for _ in range(work.size.steps):
        last = together.step(ids, marks=marks)
    losses = {"first": first.mean().item(), "last": last.mean().item()}
    if not losses["last"] < losses["first"]:
        raise ArithmeticError(f"the mean loss of {len(adapters)} adapters did not fall: {losses}")
    return {
        "tokens_per_s": speeds,
        "ratio": _ratios(speeds, "stack", "peft"),
        "ratio_one_optimizer": _ratios(speeds, "stack, one optimizer", "peft"),
        "step_ms": {name: min(every) for name, every in marks.items()},
        "losses": losses,
        "peak_mb": peaks,
    }


def _ratios(speeds: Mapping[str, list[float]], ours: str, theirs: str) -> list[float]:
    """Round by round, since both were timed beside each other."""
    return [one / other for one, other in zip(speeds[ours], speeds[theirs], strict=True)]


def _speed(work: Work, n_tokens: int, step: Callable[[], Tensor]) -> float:
    started = work.card.clock()
    for _ in range(work.size.steps):
        step()
    return n_tokens * work.size.steps / (work.card.clock() - started)


# Packing


def packing(work: Work) -> None:
    """Tokens a second of one LoRA over short conversations, a row each or packed by toolkit.fit.rows.Collate."""
    from toolkit.fit.rows import Collate

    size, card = work.size, work.card
    base = make_base(size, card, torch.bfloat16)
    alone = Alone(card, base, many_loras(base, 1, spread=0.0)[0])
    cases: dict[str, Any] = {}
    for n_talks in (8, 32):
        key = f"{n_talks} conversations a step"
        if not work.has_time(key, 12):
            return
        talks = [_talks(work, n_talks, seed) for seed in range(size.batches)]
        batches = {
            name: [{key: tensor.to(card.device) for key, tensor in Collate(0, packs)(some).items()} for some in talks]
            for name, packs in (("padded", False), ("packed", True))
        }
        case = work.fits(key, partial(_packed, work, alone, batches))
        if case is not None:
            cases[key] = case
            work.keep("cases", cases)
            say(f"  {key}: packed {spread(case['ratio'])} times padded")
        work.card.clean()


def _talks(work: Work, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Conversations of random tokens, long tail included; the first third is the user's and not learned."""
    noise = torch.Generator().manual_seed(seed)
    lengths = (work.size.talk * torch.exp(0.7 * torch.randn(count, generator=noise))).clamp(8, work.size.longest)
    rows = [torch.randint(5, work.size.llama["vocab_size"], (int(n),), generator=noise).tolist() for n in lengths]
    return [{"input_ids": row, "labels": [-100] * (len(row) // 3) + row[len(row) // 3 :]} for row in rows]


def _packed(work: Work, alone: Alone, batches: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    card = work.card
    case: dict[str, Any] = {"tokens_per_s": {}, "peak_mb": {}, "filled": {}}
    for name, some in batches.items():
        tokens, places = sum(int(one["n_tokens"]) for one in some), sum(one["input_ids"].numel() for one in some)
        case["filled"][name] = tokens / places
        case["tokens_per_s"][name] = []
    case["equality"] = _same_losses(work, alone, batches["padded"][0], batches["packed"][0])
    for turn in range(-1, work.size.rounds):
        for name, some in batches.items():
            before = card.mark()
            started = card.clock()
            for one in some:
                _loss(alone, one).backward()
                alone.optimizer.step()
                alone.optimizer.zero_grad()
            seconds = card.clock() - started
            if turn < 0:  # kernels are chosen, and memory is measured
                case["peak_mb"][name] = card.peak_mb(before)
            else:
                case["tokens_per_s"][name].append(sum(int(one["n_tokens"]) for one in some) / seconds)
    return {**case, "ratio": _ratios(case["tokens_per_s"], "packed", "padded")}


def _same_losses(work: Work, alone: Alone, padded: dict[str, Tensor], packed: dict[str, Tensor]) -> dict[str, float]:
    """How far the losses of packed conversations, token by token, lie from those of padded ones; too far is an error.

    Around their mean, since a random model's losses are nearly all alike. The bound is bf16's own rounding, as in
    Contest.check; packed rows that do see their neighbours (no positions) have to lie clearly farther off.
    """
    leaky = {name: tensor for name, tensor in packed.items() if name != "position_ids"}
    with torch.no_grad():
        by_talk = [_by_talk(alone, one, packed if one is leaky else one) for one in (padded, packed, leaky)]
    order = sorted(by_talk[0])
    plain, found, wrong = (torch.cat([own[talk] for talk in order]) for own in by_talk)
    centred = plain - plain.mean()
    found_off, leaky_off = (off(one - plain.mean(), centred) for one in (found, wrong))
    allowed = torch.finfo(torch.bfloat16).eps * (4 * work.size.llama["num_hidden_layers"]) ** 0.5
    if not (found_off <= allowed and leaky_off > 2 * found_off):
        raise ArithmeticError(
            f"packed rows lie {found_off:.2g} from padded ones, leaking ones {leaky_off:.2g} (allowed: {allowed:.2g})"
        )
    return {"off": found_off, "off_if_leaking": leaky_off, "allowed": allowed}


def _by_talk(alone: Alone, given: dict[str, Tensor], batch: dict[str, Tensor]) -> dict[tuple[int, ...], Tensor]:
    """The losses of every conversation of a batch, by its tokens; `given` is what the model is given of it."""
    ids, labels = batch["input_ids"], batch["labels"]
    shown = {name: tensor for name, tensor in given.items() if name not in ("labels", "n_tokens")}
    with alone.card.half():
        logits = alone.model(**shown, use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="none"
    ).view(len(ids), -1)
    found = {}
    for row, own in enumerate(ids):
        starts = (batch["position_ids"][row] == 0).nonzero().flatten().tolist() if "position_ids" in batch else [0]
        for start, end in zip(starts, [*starts[1:], len(own)], strict=True):
            real = own[start:end][own[start:end] != 0]  # padding is token 0, which no conversation has
            if len(real):
                found[tuple(real.tolist())] = losses[row, start : start + len(real) - 1]
    return found


def _loss(alone: Alone, batch: dict[str, Tensor]) -> Tensor:
    """Collate leaves the first token of every conversation unlearned, so a packed one is not learned from the last."""
    given = {name: tensor for name, tensor in batch.items() if name not in ("labels", "n_tokens")}
    with alone.card.half():
        logits = alone.model(**given, use_cache=False).logits
    sums, counts = loss_by_row(logits, batch["labels"])
    return sums.sum() / counts.sum()


# 4 bits


def qlora(work: Work) -> None:
    """On a base in nf4: the stack against PEFT in answers, speed and memory. Says so where bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        work.keep("not_here", "bitsandbytes is not installed: pip install 'maltu[gpu]'")
        say("  bitsandbytes is not installed; nothing measured")
        return
    size, card = work.size, work.card
    with tempfile.TemporaryDirectory() as folder:
        since = card.mark()
        plain = make_base(size, card, torch.bfloat16)
        sizes = {"bf16": card.used_mb(since)}
        plain.save_pretrained(folder)
        adapters = many_loras(plain, max(size.counts), spread=0.02)
        del plain
        card.clean()
        since = card.mark()
        base = _in_4_bits(folder, work)
        card.clean()
        work.keep("weights_mb", {**sizes, "nf4": card.used_mb(since)})
        other = _in_4_bits(folder, work)
    counts = [count for count in size.counts if count in (1, 4, 16)]
    race(work, (base, other), [_untrained(one) for one in adapters], size.shapes[:1], counts)
    if work.has_time("equality", 8):
        work.keep("equality", _equal_in_4_bits(work, other, adapters))


def _untrained(adapter: Any) -> Any:
    """The same with B at zero, as training starts."""
    return replace(adapter, tensors={name: t * 0 if ".lora_B." in name else t for name, t in adapter.tensors.items()})


def _in_4_bits(folder: str, work: Work) -> Any:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        config=llama_config(work.size),
        dtype=torch.bfloat16,
        quantization_config=options,
        device_map={"": work.card.device},
    )
    from toolkit.adapters import anatomy

    anatomy.pin_quantised_numbers(model)
    return model.eval()


def _equal_in_4_bits(work: Work, base: Any, adapters: list[Any]) -> dict[str, Any]:
    """Rows of three adapters and of the base in a stack against PEFT alone, measured by PEFT's own distance from the
    float32 model that the 4-bit weights stand for (benchmarks/gpu_parts.py has the reason)."""
    from toolkit.adapters import anatomy
    from toolkit.adapters.kinds import kind_of
    from toolkit.stack.stack import Stack

    noise = torch.Generator().manual_seed(9)
    ids = torch.randint(5, work.size.llama["vocab_size"], (4, work.size.row), generator=noise).to(work.card.device)
    stack = Stack(base)
    for index in range(3):
        stack.add(f"a{index}", adapters[index])
    with torch.no_grad():
        found = stack(ids, [0, 1, 2, -1]).logits
    stack.close()

    def alone(model: Any) -> list[Tensor]:
        answers = []
        with torch.no_grad():
            for index in range(3):
                worn = wear(model, adapters[index], asked("lora"))
                answers.append(worn(input_ids=ids[index : index + 1]).logits[0].float())
                model = kind_of(asked("lora")).detach(worn)
            answers.append(model(input_ids=ids[3:]).logits[0].float())
        return answers

    plain = alone(base)
    exact = alone(anatomy.without_quantisation(base))
    rows = [
        {"off": off(found[index], plain[index]), "own_rounding": off(plain[index], exact[index])} for index in range(4)
    ]
    if any(not one["off"] <= MARGIN * one["own_rounding"] for one in rows):
        raise ArithmeticError(f"rows on the 4-bit base are off PEFT's by more than rounding: {rows}")
    return {"rows": rows}
