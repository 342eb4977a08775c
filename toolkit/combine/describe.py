"""docs/methods.md, written from what the code says of itself and from what the benchmarks measured.

python -m toolkit.combine.describe > docs/methods.md
"""

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolkit.combine.methods import METHODS, Method

MEASURED = Path(__file__).parents[2] / "benchmarks" / "combinations.json"
KINDS = {
    "merge": "Merge: several adapters become one",
    "route": "Route: one expert answers, chosen by what is said",
    "gate": "Gate: every token weighs the experts, inside the layers",
    "mix": "Mix: one distribution of all experts, token by token",
    "vote": "Vote: over whole answers, or over labels",
    "bag": "Bag: members on samples of their own",
    "boost": "Boost: members in turn, each on what the others got wrong",
}


def document(measured: Mapping[str, Any]) -> str:
    """The page. measured: what benchmarks/combinations.py wrote, {} where it has not run."""
    parts = [
        "# Ways of combining adapters",
        "Written from the code's own descriptions (`python -m toolkit.combine.describe`). w are weights, k runs\n"
        "over the members. `combine:` in a recipe names the kind.",
    ]
    for kind, title in KINDS.items():
        parts.append(f"## {title}")
        parts += [_described(method) for method in METHODS if method.kind == kind]
        parts += _measured(kind, measured)
    return "\n\n".join(parts) + "\n"


def _described(method: Method) -> str:
    return "\n".join(
        [
            f"### {method.name}",
            "",
            method.says,
            "",
            f"    {method.formula}",
            "",
            f"- Paper: {method.paper}.",
            f"- Training: {method.training}",
            f"- Serving: {method.serving}",
        ]
    )


def _measured(kind: str, measured: Mapping[str, Any]) -> list[str]:
    cases = {name: of for name, of in measured.get("cases", {}).items() if _kind(of) == kind}
    if not cases:
        return []
    lines = [
        "Measured with `python benchmarks/combinations.py`: the shipped recipes on 2 CPU cores, medians over seeds.\n"
        "The gain is over the best member, its interval over the held-out conversations of the first seed.\n",
        "| recipe | best member | combination | gain | it helps | seconds |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_line(name, list(of.values())) for name, of in cases.items()]
    return ["\n".join(lines)]


def _kind(of: Mapping[str, Any]) -> str:
    return str(next(iter(of.values()))["kind"])


def _line(name: str, seeds: list[dict[str, Any]]) -> str:
    seconds = statistics.median(one["seconds"] for one in seeds)
    verdicts = [one["verdict"] for one in seeds if one["verdict"]]
    if not verdicts:
        return f"| {name} | | | no loss to compare | | {seconds:.0f} |"
    first = verdicts[0]
    best, of, gain = (statistics.median(one[key] for one in verdicts) for key in ("of_best", "of_combination", "gain"))
    unit = "%" if first["measure"] == "loss" else "points"
    helps = sum(one["helps"] for one in verdicts)
    hurts = sum(one["hurts"] for one in verdicts)
    word = f"{helps} of {len(verdicts)} seeds" + (f", hurts in {hurts}" if hurts else "")
    interval = f"{100 * first['low']:+.1f} to {100 * first['high']:+.1f}"
    return (
        f"| {name} | {first['measure']} {best:.4g} ({first['best']}) | {of:.4g} | {100 * gain:+.1f} {unit} ({interval})"
        f" | {word} | {seconds:.0f} |"
    )


def main() -> None:
    """Write the page to standard output."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    sys.stdout.write(document(measured))


if __name__ == "__main__":
    main()
