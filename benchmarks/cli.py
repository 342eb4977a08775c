"""How long `--help` and a recipe error take, from command to prompt. Goal: each under 0.5 s.

python benchmarks/cli.py [rounds]
"""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import save, say, spread, surroundings


def main() -> None:
    """Interleaved rounds of three commands."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    with tempfile.TemporaryDirectory() as folder:
        wrong = Path(folder) / "wrong.yaml"
        wrong.write_text("name: x\nbase: {modle: spoken-mini}\ndata: {train: [missing.jsonl]}\nadapter: {rnak: 3}\n")
        commands = {
            "maltu --help": ["-m", "toolkit", "--help"],
            "train --help": ["-m", "toolkit.train", "--help"],
            "recipe error": ["-m", "toolkit.train", str(wrong)],
        }
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(rounds):
            for name, command in commands.items():
                started = time.perf_counter()
                done = subprocess.run([sys.executable, *command], capture_output=True, check=False)
                seconds[name].append(time.perf_counter() - started)
                if done.returncode != (2 if name == "recipe error" else 0):
                    raise SystemExit(f"{name}: exit code {done.returncode}: {done.stderr.decode()}")
    say(str(surroundings(("pydantic", "rich"))))
    for name, values in seconds.items():
        say(f"{name:<14} {spread(values)} s")
    save(__file__, {"surroundings": surroundings(("pydantic", "rich")), "seconds": seconds})


if __name__ == "__main__":
    main()
