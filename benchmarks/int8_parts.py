"""What benchmarks/int8.py measures apart from time: the loss in eight bits, and whether bits depend on neighbours."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from machine import say

sys.path.insert(0, str(Path(__file__).parent.parent))  # before this folder, where serve.py lies

from serve.engines.slots import Slots
from toolkit.bundle import open_run
from toolkit.corpus.gather import gather
from toolkit.corpus.render import IGNORED, Renderer
from toolkit.evaluate.metrics import bootstrap_interval
from toolkit.recipe.model import Data
from toolkit.stack.stack import Stack

VOICES = [f"{voice}.{lang}" for voice in ("casual", "polite", "teacher", "listener") for lang in ("ko", "en")]
N_ADAPTERS = 8
KINDS = {"float32": torch.float32, "int8": torch.float64}  # of the stack's adapters


def make_slots(base: Any, adapters: dict[str, Any]) -> dict[str, Slots]:
    """The same base and adapters in both."""
    made = {}
    for kind, dtype in KINDS.items():
        stack = Stack(base.model, base_hash=base.hash, dtype=dtype, keep_mb=1024)
        for name, adapter in adapters.items():
            stack.add(name, adapter)
        made[kind] = Slots(stack, "lean", int8=kind == "int8")
    return made


@torch.inference_mode()
def losses(slots: Slots, adapter: str | None, rows: Sequence[Any]) -> list[tuple[float, int]]:
    """Nats and supervised tokens of every text."""
    nats = [0.0] * len(rows)
    for first in range(0, len(rows), 32):
        some = range(first, min(first + 32, len(rows)))
        seats = {row: slots.open(adapter) for row in some}
        for place in range(max(len(rows[row].input_ids) for row in some) - 1):
            here = [row for row in some if place + 1 < len(rows[row].input_ids)]
            logits_RV = slots.forward([seats[row] for row in here], [[rows[row].input_ids[place]] for row in here])
            labels_R = torch.tensor([rows[row].labels[place + 1] for row in here])
            lost_R = torch.nn.functional.cross_entropy(logits_RV, labels_R, ignore_index=IGNORED, reduction="none")
            for row, lost in zip(here, lost_R.tolist(), strict=True):
                nats[row] += lost
        slots.reset()
    return [(lost, row.n_supervised) for lost, row in zip(nats, rows, strict=True)]


def measure_loss(base: Any, run: str | None, n_talks: int | None) -> dict[str, Any]:
    """By base or adapter: both losses, and by which share the second is above, with its interval."""
    talks = list(gather(Data.model_validate({"train": [f"maltu:talk/{one}.jsonl" for one in VOICES]}), 0, None).test)[
        :n_talks
    ]
    rows = [row for row in Renderer(base.tokenizer, base.template).training_all(talks) if row.n_supervised]
    adapters = {} if run is None else {"run": open_run(run).adapter("main")}
    both, found = make_slots(base, adapters), {}
    for name in (None, *adapters):
        plain, rounded = (losses(slots, name, rows) for slots in both.values())
        fall = bootstrap_interval(plain, rounded)
        loss = [sum(nats for nats, _ in sums) / sum(n for _, n in sums) for sums in (plain, rounded)]
        found[name or "base"] = {"loss": loss, "rise": [-fall.value, -fall.high, -fall.low], "talks": len(rows)}
        rise, low, high = (100 * share for share in found[name or "base"]["rise"])
        say(f"loss {name or 'base'}: {loss[0]:.4f} to {loss[1]:.4f}, {rise:+.2f} % ({low:+.2f} to {high:+.2f})")
    return found


def texts_of(count: int, n_vocabulary: int, length: int | None = None) -> list[list[int]]:
    """Token ids, of many lengths or of one."""
    noise = torch.Generator().manual_seed(0)
    sizes = [length or int(torch.randint(20, 90, (1,), generator=noise)) for _ in range(count)]
    return [torch.randint(5, n_vocabulary, (size,), generator=noise).tolist() for size in sizes]


@torch.inference_mode()
def written(slots: Slots, names: Sequence[str | None], texts: Sequence[list[int]], piece: int) -> list[torch.Tensor]:
    """The logits after every text and after 8 tokens more, the texts read in pieces beside each other."""
    seats, left = [slots.open(name) for name in names], [list(text) for text in texts]
    found: list[list[torch.Tensor]] = [[] for _ in texts]
    while rows := [row for row, rest in enumerate(left) if rest]:
        given = [left[row][: piece + row % 5] for row in rows]
        logits_RV = slots.forward([seats[row] for row in rows], given)
        for row, ids, logits_V in zip(rows, given, logits_RV, strict=True):
            del left[row][: len(ids)]
            found[row] += [] if left[row] else [logits_V]
    for step in range(8):
        for own, logits_V in zip(found, slots.forward(seats, [[text[step]] for text in texts]), strict=True):
            own.append(logits_V)
    slots.reset()
    return [torch.stack(own) for own in found]


def measure_bits(both: dict[str, Slots], n_vocabulary: int) -> dict[str, Any]:
    """By kind, then by who is there: the share of positions whose logits are the same to the bit."""
    found: dict[str, Any] = {}
    for kind, slots in both.items():
        for count in (8, 32):
            texts = texts_of(count, n_vocabulary)
            names = [f"a{row % N_ADAPTERS}" if row % 2 else None for row in range(count)]
            alone = [written(slots, [name], [text], 10**6)[0] for name, text in zip(names, texts, strict=True)]
            same = [(a == b).all(1) for a, b in zip(alone, written(slots, names, texts, 11), strict=True)]
            found.setdefault(kind, {})[str(count)] = torch.cat(same).float().mean().item()
    say(
        "same bits "
        + "; ".join(f"{kind}: {of['8']:.4f} among 8, {of['32']:.4f} among 32" for kind, of in found.items())
    )
    return found
