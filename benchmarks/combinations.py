"""What each shipped combination reaches, as a user runs it: every member, the best of them, the combination, and
whether it helps beyond chance.

python benchmarks/combinations.py [recipe …] [--seeds 0]     (all eight about half an hour a seed on 2 idle cores; goes
on where it stopped)

Runs lie in benchmarks/runs. Beside the recipes as they ship: tone_merge with equal weights, tone_gate by arrow and per
layer, tone_mix over probabilities. Printed: seconds, the members' losses (or error rates), the combination's, the
oracle's where every talk belongs to one expert, and the verdict. docs/methods.md is written from what this leaves
(`python -m toolkit.combine.describe`).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import load, save, say, surroundings

RUNS = Path(__file__).parent / "runs"
# name: the recipe, and what is said differently from it
CASES: dict[str, tuple[str, ...]] = {
    "tone_experts": ("tone_experts",),
    "tone_gate": ("tone_gate",),
    "tone_gate arrow": ("tone_gate", "combine.how=arrow"),
    "tone_gate per layer": ("tone_gate", "combine.per=layer"),
    "tone_merge": ("tone_merge",),
    "tone_merge equal": ("tone_merge", "combine.weights=equal"),
    "tone_mix": ("tone_mix",),
    "tone_mix prob": ("tone_mix", "combine.over=prob"),
    "vote_kinds": ("vote_kinds",),
    "vote_bases": ("vote_bases",),
    "bag_voices": ("bag_voices",),
    "boost_voices": ("boost_voices",),
}


def train(case: str, seed: int) -> tuple[str, float]:
    """Run the command as a user would; the run's name, and seconds from start to result."""
    recipe, *overrides = CASES[case]
    name = f"{case.replace(' ', '_')}-{seed}"
    command = [sys.executable, "-m", "toolkit.train", f"maltu:recipes/{recipe}.yaml", f"name={name}"]
    started = time.perf_counter()
    subprocess.run([*command, f"train.seed={seed}", *overrides, "--runs", str(RUNS), "--quiet"], check=True)
    return name, time.perf_counter() - started


def found_of(name: str) -> dict[str, Any]:
    """What of a run is kept: the combination with its verdict, and the loss or error rate of every member."""
    facts = json.loads((RUNS / name / "run.json").read_text(encoding="utf-8"))
    combination = facts["combination"]
    measures = ("loss", "accuracy", "log loss")
    members = {
        expert: {measure: of["results"][measure]["all"] for measure in measures if measure in of["results"]}
        for expert, of in facts["experts"].items()
    }
    after = {
        measure: facts["results"]["after"][measure]["all"]
        for measure in measures
        if measure in facts["results"]["after"]
    }
    return {
        "kind": combination["kind"],
        "how": combination["how"],
        "members": members,
        "after": after,
        "oracle": combination["oracle"],
        "verdict": combination["verdict"],
        "fit_s": facts["fit"]["seconds"],
    }


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    asked = parser.parse_args()
    results = load(__file__) or {"cases": {}}
    results["surroundings"] = surroundings()
    say(str(results["surroundings"]))
    for seed in asked.seeds:
        for case in asked.cases or CASES:
            kept = results["cases"].setdefault(case, {})
            if str(seed) not in kept:
                name, seconds = train(case, seed)
                kept[str(seed)] = {"seconds": seconds, **found_of(name)}
                save(__file__, results)
            one = kept[str(seed)]
            told = one["verdict"]["sentence"] if one["verdict"] else "no loss to compare"
            oracle = f" Oracle {one['oracle']:.4f}." if one["oracle"] else ""
            say(f"{case}, seed {seed}: {one['seconds']:.0f} s. {told}{oracle}")


if __name__ == "__main__":
    main()
