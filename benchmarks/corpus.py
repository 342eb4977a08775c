"""How fast a corpus is gathered, and in how much memory: load, clean with near duplicates, split.

    python benchmarks/corpus.py [SIZE …]        (default 10000 100000 1000000; a million takes some minutes)

Generates rows with planted exact and near duplicates (seeded, the same on every machine), gathers them in a process of
its own, and prints rows/s, peak memory and how many of the planted duplicates were found. Seconds of
one core stand beside the wall clock, because they mean the same on a machine that is busy. Figures go to
benchmarks/corpus.json; a size that is there with the same machine and versions is not run again (--again runs it).
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

SIZES = (10_000, 100_000, 1_000_000)
OUT = Path(__file__).with_suffix(".json")
SEED = 20261124
EXACT, NEAR = 0.03, 0.07  # shares of rows that repeat an earlier one, or nearly so
PACKAGES = ("datasketch", "numpy", "pydantic")
SYLLABLES = (
    "가나다라마바사아자차하고노도로모보소오조기니디리미비시이지은는을를에서와과도만요어해네게까지마저라도처럼보다"
)
LETTERS = "etaoinshrdlucmfwypvbgk"


def make_words(rng: random.Random, signs: str, shortest: int, longest: int) -> list[str]:
    """Four thousand words over an alphabet."""
    return ["".join(rng.choices(signs, k=rng.randint(shortest, longest))) for _ in range(4000)]


def write_rows(path: Path, n_rows: int) -> dict[str, int]:
    """Dialogues of two to six turns, two thirds Korean; returns how many duplicates were planted."""
    rng = random.Random(SEED)
    korean, english = make_words(rng, SYLLABLES, 1, 4), make_words(rng, LETTERS, 2, 8)
    planted = {"exact": 0, "near": 0}
    recent: list[list[str]] = []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n_rows):
            kind = rng.random()
            if recent and kind < EXACT:
                turns = rng.choice(recent)
                planted["exact"] += 1
            elif recent and kind < EXACT + NEAR:
                turns = nearly(rng, rng.choice(recent))
                planted["near"] += 1
            else:
                words = korean if rng.random() < 0.67 else english
                turns = [" ".join(rng.choices(words, k=rng.randint(6, 14))) for _ in range(2 * rng.randint(1, 3))]
                recent.append(turns)
                if len(recent) > 5000:
                    recent[rng.randrange(5000)] = recent.pop()
            roles = ("user", "assistant")
            messages = [{"role": roles[place % 2], "content": turn} for place, turn in enumerate(turns)]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return planted


def nearly(rng: random.Random, turns: list[str]) -> list[str]:
    """The turns with an end that most people would not notice: one turn gets one more sign."""
    changed = list(turns)
    changed[rng.randrange(len(changed))] += rng.choice(("ㅋ", "!", "~", "요"))
    return changed


def measure(path: Path, folder: Path) -> dict[str, object]:
    """Gather the file in this process: seconds, peak memory, what was dropped, sizes of the parts."""
    from toolkit.corpus.gather import gather
    from toolkit.recipe.model import Data

    start = time.perf_counter()
    corpus = gather(Data(train=(str(path),)), SEED, folder)
    seconds = time.perf_counter() - start
    cpu_s = time.process_time()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    digest = hashlib.sha256()
    for talk in corpus.valid[:1000]:
        digest.update(talk.source.rsplit(":", 1)[1].encode() + b"\n")
    return {
        "seconds": round(seconds, 1),
        "cpu_s": round(cpu_s, 1),
        "peak_mb": round(peak / 1e6),
        "loaded": corpus.report.loaded,
        "dropped": dict(corpus.report.dropped),
        "parts": [len(corpus.train), len(corpus.valid), len(corpus.test)],
        "valid_hash": digest.hexdigest()[:12],
    }


def run_size(n_rows: int) -> dict[str, object]:
    """Generate, gather in a fresh process, and add what was planted."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        planted = write_rows(folder / "rows.jsonl", n_rows)
        size_mb = round((folder / "rows.jsonl").stat().st_size / 1e6, 1)
        command = [sys.executable, __file__, "--measure", str(folder / "rows.jsonl")]
        answer = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    figures: dict[str, object] = json.loads(answer.stdout)
    rates = {f"rows_per_{key}": round(n_rows / float(str(figures[key]))) for key in ("seconds", "cpu_s")}
    return {"rows": n_rows, "file_mb": size_mb, "planted": planted, **rates, **figures}


def machine() -> dict[str, object]:
    """What the figures depend on beside the code."""
    return {
        "cores": os.cpu_count(),
        "cpu": platform.processor() or platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def main() -> None:
    """Run the sizes asked for that are not there yet, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=SIZES, metavar="SIZE")
    parser.add_argument("--again", action="store_true", help="run sizes that are there already")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.measure:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        print(json.dumps(measure(asked.measure, asked.measure.parent)))
        return
    found = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    where = machine()
    print("  ".join(f"{key} {value}" for key, value in where.items()), f"seed {SEED}", sep="  ")
    for n_rows in asked.sizes:
        known = found.get(str(n_rows))
        if asked.again or known is None or known["machine"] != where:
            day = datetime.now(UTC).date().isoformat()
            found[str(n_rows)] = {"machine": where, "seed": SEED, "day": day, **run_size(n_rows)}
            OUT.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        row = found[str(n_rows)]
        print(
            f"{row['rows']:>9,} rows  {row['file_mb']:>7} MB  {row['seconds']:>7} s ({row['cpu_s']} s of one core)  "
            f"{row['rows_per_seconds']:>6,} rows/s ({row['rows_per_cpu_s']:,} a core second)  "
            f"peak {row['peak_mb']:>5,} MB  planted {row['planted']}  dropped {row['dropped']}  parts {row['parts']}"
        )


if __name__ == "__main__":
    main()
