"""Everything of the stack and of packed training that wants a GPU, on one card, in one run of under nine minutes.

python benchmarks/gpu.py [--parts equality speed search packing qlora] [--budget 540] [--out FOLDER] [--again]
python benchmarks/gpu.py --device cpu --tiny        (every part on a tiny shape, to see that the code runs)

Needs torch, transformers and peft (and bitsandbytes for 4 bits) beside this checkout, and no network: the base is a
random Llama of 488 M parameters, made on the spot. Each part is a process with a time limit of its own, so that one
that fails, or leaves the card unusable, takes no other with it. FOLDER/gpu.json is written after every part (beside
this script where no FOLDER is given; gpu_tiny.json under --tiny); a part that is finished is not run again on the same
card with the same versions unless --again is given. A part that no longer fits the budget is listed as left out.

  equality  rows of a stack against plain PEFT and the base: every kind, fp32, bf16, autocast; answers and gradients
  speed     prefill and decode, 1 to 64 distinct adapters at 8, 32 and 64 rows, against base, PEFT, adapter_names
  search    1 to 16 adapters learning in one stack against one after another with plain PEFT
  packing   training with and without packing (toolkit.fit.rows.Collate)
  qlora     learning as in search on a base in nf4, its size, and rows of a stack against PEFT there

Peak memory is above what lay on the card before: speed, cache and activations of one call; search and qlora, adapters,
gradients, optimizer and activations, the base not; packing, one step's; equality, everything.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from machine import load, save, say, spread, surroundings

PACKAGES = ("torch", "transformers", "peft", "optuna", "bitsandbytes")
GRACE_S = 10.0  # what a process may take beyond its limit before it is ended


@dataclass(frozen=True)
class Limit:
    """Seconds that a part may take, start included, and those below which it is not begun."""

    most: float
    least: float


LIMITS = {
    "equality": Limit(90, 40),
    "speed": Limit(150, 70),
    "search": Limit(140, 60),
    "packing": Limit(50, 30),
    "qlora": Limit(75, 40),
}


def main() -> None:
    """See the head of this file."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(LIMITS), choices=list(LIMITS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="FOLDER")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--work", nargs=2, metavar=("PART", "SECONDS"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent.parent))  # a borrowed machine has this checkout, not installed
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.work:
        sys.exit(work(asked, asked.work[0], started + float(asked.work[1])))
    results, file = begun(asked), results_file(asked)
    for part in asked.parts:
        if results["parts"].get(part, {}).get("state") == "done" and not asked.again:
            say(f"{part}: finished before (--again runs it once more)")
            continue
        left = asked.budget - (time.monotonic() - started) - GRACE_S
        if left < LIMITS[part].least:
            results["parts"][part] = {"state": "left out", "why": f"{max(left, 0):.0f} s of the budget were left"}
        else:
            results["parts"][part] = run_part(asked, part, min(left, LIMITS[part].most))
        save(str(file), results)
    results["seconds"] = round(time.monotonic() - started, 1)
    results["table"] = table(results["parts"])
    save(str(file), results)
    say(heading(results))
    say("\n".join(f"| {' | '.join(row)} |" for row in results["table"]))
    sys.exit(1 if any(results["parts"][part]["state"] == "failed" for part in asked.parts) else 0)


def results_file(asked: argparse.Namespace, part: str = "") -> Path:
    """What machine.save and machine.load take for a script: the JSON lies beside it."""
    return Path(asked.out / f"gpu{'_tiny' if asked.tiny else ''}{f'_{part}' if part else ''}.py")


def begun(asked: argparse.Namespace) -> dict[str, Any]:
    """The results to go on from, empty where those on disk are of another card or other versions."""
    import torch
    from gpu_world import Card

    if asked.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("This machine has no CUDA card that torch can use. To see the code run: --device cpu --tiny")
    if not asked.device.startswith("cuda") and not asked.tiny:
        sys.exit("Without a card the real shape takes hours. To see the code run: --device cpu --tiny")
    here = {**surroundings(tuple(name for name in PACKAGES if is_there(name))), **Card(asked.device).facts()}
    say(str(here))
    found = load(str(results_file(asked)))
    same = ("card", "versions")
    if found and any(found["surroundings"].get(key) != here[key] for key in same):
        say(f"{results_file(asked).with_suffix('.json')} was made on another card or by other versions: begun anew")
        found = {}
    return {"parts": found.get("parts", {}), "surroundings": here, "torch_threads": torch.get_num_threads()}


def is_there(package: str) -> bool:
    """Whether a package is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True


# One part


def run_part(asked: argparse.Namespace, part: str, limit_s: float) -> dict[str, Any]:
    """Run a part in a process of its own; what it found, also where it failed."""
    say(f"{part}: at most {limit_s:.0f} s")
    file, started, said = results_file(asked, part), time.monotonic(), ""
    file.with_suffix(".json").unlink(missing_ok=True)
    command = [sys.executable, __file__, "--work", part, str(limit_s), "--device", asked.device, "--out", asked.out]
    try:
        done = subprocess.run(
            [*map(str, command), *(["--tiny"] if asked.tiny else [])],
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=limit_s + GRACE_S,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"},
        )
        code, said = done.returncode, done.stderr
    except subprocess.TimeoutExpired:
        code, said = -1, f"ended: it ran past its {limit_s:.0f} s"
    found = load(str(file))
    file.with_suffix(".json").unlink(missing_ok=True)
    if code and "error" not in found:
        found["error"] = f"process ended with {code}: {said[-1500:].strip()}"
    state = "failed" if "error" in found else "cut short" if "cut_short" in found else "done"
    say(f"{part}: {state}{': ' + found['error'] if state == 'failed' else ''}")
    return {"state": state, "seconds": round(time.monotonic() - started, 1), **found}


def work(asked: argparse.Namespace, part: str, until: float) -> int:
    """Inside that process: the part; exit status 1 where it failed, the error in its file."""
    warnings.simplefilter("ignore")
    import gpu_learn
    import gpu_parts
    from gpu_world import REAL, TINY, Card, Work
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    doors = {
        "equality": gpu_parts.equality,
        "speed": gpu_parts.speed,
        "search": gpu_learn.search,
        "packing": gpu_learn.packing,
        "qlora": gpu_learn.qlora,
    }
    it = Work(Card(asked.device), TINY if asked.tiny else REAL, results_file(asked, part), until)
    try:
        doors[part](it)
    except Exception as error:  # whatever it is, it is written down, and the other parts go on
        at = traceback.extract_tb(error.__traceback__)[-1]
        it.keep("error", f"{type(error).__name__}: {str(error)[:1000]} ({Path(at.filename).name}:{at.lineno})")
        return 1
    it.keep("is_over", True)
    return 0


# The table


def heading(results: dict[str, Any]) -> str:
    """Card and versions, one line."""
    here = results["surroundings"]
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    more = f", {here['memory_gib']} GiB, CUDA {here['cuda']}" if "cuda" in here else ""
    return f"\n{here['card']}{more}; {here['cpu']}, {here['cores']} cores; Python {here['python']}, {versions}\n"


def table(parts: dict[str, Any]) -> list[list[str]]:
    """Rows of (part, what, figures, peak MB), as Markdown has them."""
    rows = [["part", "what", "figures", "peak MB"], ["---"] * 4]
    for part in LIMITS:
        one = parts.get(part)
        if one is None:
            continue
        rows += ROWS[part](part, one)
        rows += [[part, what, "out of memory", ""] for what in one.get("out_of_memory", {})]
        notes = [one.get("error") or one.get("why") or one.get("not_here") or ""]
        notes += [f"no time for {', '.join(one['cut_short'])}"] if "cut_short" in one else []
        rows.append([part, one["state"], "; ".join(filter(None, notes)).replace("|", "/").replace("\n", " "), ""])
    return rows


def equality_rows(part: str, one: dict[str, Any]) -> list[list[str]]:
    """By type and way: the kind that is worst off."""
    rows = []
    for name, ways in one.get("cases", {}).items():
        for way, kinds in ways.items():
            kind, worst = max(kinds.items(), key=lambda item: item[1]["off"] / item[1]["own_rounding"])
            is_equal = all(each["verdict"] == "equal" for each in kinds.values())
            figures = (
                f"{'equal' if is_equal else 'NOT EQUAL'}: worst {kind}, off {worst['off']:.1e}, "
                f"{worst['off'] / worst['own_rounding']:.2f} of its own rounding"
            )
            rows.append([part, f"{name}, {way}", figures, number(one["peak_mb"][name])])
    return rows


def speed_rows(part: str, one: dict[str, Any]) -> list[list[str]]:
    """The base's milliseconds and what share of its speed each keeps."""
    rows = []
    for key, case in one.get("cases", {}).items():
        if not case["rounds"]:
            continue
        texts = []
        for what in ("prefill_ms", "decode_ms"):
            shares = case.get("share_of_base", {}).get(what, {})
            texts.append(
                f"{what[:-3]}: base {statistics.median(each['base'][what] for each in case['rounds']):.3g} ms; keep "
                + ", ".join(f"{who} {number(share)}" for who, share in shares.items())
            )
        peaks = ", ".join(f"{who} {number(peak)}" for who, peak in case["peak_mb"].items())
        rows.append([part, key, "; ".join(texts) + f" ({len(case['rounds'])} rounds)", peaks])
    return rows


def learning_rows(part: str, one: dict[str, Any]) -> list[list[str]]:
    """Tokens a second of the stack and of PEFT, the ratio, and what a step is made of."""
    rows = []
    for key, case in one.get("cases", {}).items():
        speeds = {who: statistics.median(every) for who, every in case["tokens_per_s"].items()}
        made_of = ", ".join(f"{name} {number(ms)}" for name, ms in case["step_ms"].items())
        figures = (
            f"{', '.join(f'{who} {value:,.0f}' for who, value in speeds.items())} tokens/s; stack against PEFT "
            f"{spread(case['ratio'])}; step, ms: {made_of}"
        )
        rows.append([part, key, figures, ", ".join(f"{who} {number(mb)}" for who, mb in case["peak_mb"].items())])
    if "weights_mb" in one:
        sizes = ", ".join(f"{name} {number(mb)}" for name, mb in one["weights_mb"].items())
        rows.append([part, "weights of the base, MB", sizes, ""])
    if "equality" in one:
        worst = max(one["equality"]["rows"], key=lambda row: row["off"] / row["own_rounding"])
        text = f"equal: off {worst['off']:.1e}, {worst['off'] / worst['own_rounding']:.2f} of its own rounding"
        rows.append([part, "rows of a stack on nf4 against PEFT", text, ""])
    return rows


def packing_rows(part: str, one: dict[str, Any]) -> list[list[str]]:
    """Tokens a second, padding not counted."""
    rows = []
    for key, case in one.get("cases", {}).items():
        texts = [
            f"{name} {statistics.median(every):,.0f} tokens/s ({case['filled'][name]:.0%} of the places are tokens)"
            for name, every in case["tokens_per_s"].items()
        ]
        peaks = ", ".join(f"{name} {number(mb)}" for name, mb in case["peak_mb"].items())
        rows.append([part, key, f"{', '.join(texts)}; packed against padded {spread(case['ratio'])}", peaks])
    return rows


def number(value: float | None) -> str:
    """Three digits; a dash where it is not known."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


ROWS = {
    "equality": equality_rows,
    "speed": speed_rows,
    "search": learning_rows,
    "packing": packing_rows,
    "qlora": learning_rows,
}


if __name__ == "__main__":
    main()
