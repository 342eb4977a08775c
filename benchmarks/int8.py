"""What eight bits give and cost: the lean forward pass with `--cpu-int8` against float32, side by side in one process.

python benchmarks/int8.py [--bases random-10m spoken-mini random-135m] [--rounds 5] [--rows 1 8 32] [--run FOLDER]
(about 15 minutes on 2 idle cores; --tiny tries all of it in two minutes and writes nothing)

Printed, and written beside:
  loss   of spoken-mini on what data/talk holds back for testing, every text given token by token, as answers are
         written; goal: a rise of at most 1 %. --run adds the adapter of a finished run on spoken-mini, on the same talk
  bits   which share of logits has the same bits when a text is read at once and alone, and when it is read in pieces
         among 8 and among 32 others, of the base and of 8 LoRA adapters; goal: all of them
  speed  milliseconds of one step that writes a token in each row, 64 to 96 tokens in, and of reading a prompt of 64;
         float32 and eight bits in turn, medians of the rounds
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from int8_parts import N_ADAPTERS, make_slots, measure_bits, measure_loss, texts_of
from machine import load, save, say, spread, surroundings
from serve_world import noise_adapter, open_base

from serve.engines.int8 import needs_7_bits
from serve.engines.slots import Seat, Slots

N_READ, N_WRITTEN = 64, 32


@torch.inference_mode()
def round_of(both: dict[str, Slots], name: str | None, count: int, n_vocabulary: int) -> dict[str, tuple[float, float]]:
    """By kind: milliseconds of a step, and of reading the prompts."""
    texts, seats, read = texts_of(count, n_vocabulary, N_READ), dict[str, list[Seat]](), {}
    steps: dict[str, list[float]] = {kind: [] for kind in both}
    for kind, slots in both.items():
        seats[kind] = [slots.open(name and f"a{row % N_ADAPTERS}") for row in range(count)]
        started = time.perf_counter()
        slots.forward(seats[kind], texts)
        read[kind] = 1e3 * (time.perf_counter() - started)
    for step in range(N_WRITTEN):
        for kind, slots in both.items():
            started = time.perf_counter()
            slots.forward(seats[kind], [[text[step]] for text in texts])
            steps[kind].append(1e3 * (time.perf_counter() - started))
    for slots in both.values():
        slots.reset()
    return {kind: (statistics.median(steps[kind]), read[kind]) for kind in both}


def measure_speed(both: dict[str, Slots], n_vocabulary: int, counts: Sequence[int], n_rounds: int) -> dict[str, Any]:
    """By adapters and rows, then by kind: milliseconds of every round."""
    found: dict[str, Any] = {}
    for name in (None, "adapters"):
        for count in counts:
            round_of(both, name, count, n_vocabulary)  # shapes are new once
            rounds = [round_of(both, name, count, n_vocabulary) for _ in range(n_rounds)]
            of = found[f"{name or 'base'} {count}"] = {kind: [one[kind] for one in rounds] for kind in both}
            parts = [f"{kind} {spread([one[0] for one in of[kind]])} ms" for kind in both]
            times = spread([one["float32"][0] / one["int8"][0] for one in rounds])
            reads = spread([one["float32"][1] / one["int8"][1] for one in rounds])
            say(f"{name or 'base'}, {count} rows: {'; '.join(parts)}; {times} times; prompts {reads} times")
    return found


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["random-10m", "spoken-mini", "random-135m"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--run", help="a finished run of one adapter on spoken-mini")
    parser.add_argument("--tiny", action="store_true")
    asked = parser.parse_args()
    results = {} if asked.tiny else load(__file__)
    results["surroundings"] = surroundings(("torch", "transformers")) | {"bits": 7 if needs_7_bits() else 8}
    say(str(results["surroundings"]))
    with tempfile.TemporaryDirectory() as folder:
        for name in ["random-10m"] if asked.tiny else asked.bases:
            base = open_base(name, Path(folder))
            n_words, say_of = len(base.tokenizer), results.setdefault(name, {})
            both = make_slots(base, {f"a{seed}": noise_adapter(base, "lora", seed) for seed in range(N_ADAPTERS)})
            say(f"\n{name}")
            say_of["bits"] = measure_bits(both, n_words)
            say_of["speed"] = measure_speed(both, n_words, asked.rows, 1 if asked.tiny else asked.rounds)
            if asked.tiny or name == "spoken-mini":
                mini = open_base("spoken-mini", Path(folder))
                say_of["loss"] = measure_loss(mini, asked.run, 8 if asked.tiny else None)
            if not asked.tiny:
                save(__file__, results)


if __name__ == "__main__":
    main()
