"""What every benchmark prints first and writes last: machine, versions, medians with spread, JSON beside the script."""

import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def surroundings(packages: Sequence[str] = ("torch", "transformers", "trl", "peft")) -> dict[str, Any]:
    """Machine and versions."""
    name = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "versions": {package: version(package) for package in packages},
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def spread(values: Sequence[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g}, {len(values)} rounds)"


def load(script: str) -> dict[str, Any]:
    """What an earlier call of this script left, to go on from."""
    path = Path(script).with_suffix(".json")
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def save(script: str, results: dict[str, Any]) -> None:
    """Write JSON beside the script, whole or not at all."""
    path = Path(script).with_suffix(".json")
    beside = path.with_suffix(".json.writing")
    beside.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    os.replace(beside, path)


def say(text: str) -> None:
    """A line on standard output, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
