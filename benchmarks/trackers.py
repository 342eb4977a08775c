"""What trackers cost a run: all of them on, nothing reachable. Goals: at most 3 % of training inside tracker calls,
10 s to start, 5 s to close.

python benchmarks/trackers.py [rounds] [--steps N]        (about a minute a round on 2 cores; resumable)

Each round trains casual_chat's adapter twice in processes of their own, without trackers and with tensorboard, wandb
(no key, so offline) and trackio, in turn. Inside tracker calls counts twice: what the training thread waited for
them, and what the trackers' own threads took of the processor. Whatever address they try leads nowhere.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import load, save, say, spread, surroundings

ALL = "[tensorboard, wandb, trackio]"
GOALS = {"share": 0.03, "start_s": 10.0, "close_s": 5.0}
PACKAGES = ("torch", "tensorboard", "wandb", "trackio")
NOWHERE = "http://127.0.0.1:9"


def work(names: str, steps: int) -> dict[str, Any]:
    """One run in this process: seconds of training, in calls, to open and to close the trackers."""
    from toolkit import pipeline
    from toolkit import steps as room
    from toolkit.recipe.read import read_recipe
    from toolkit.shipped import resolve
    from toolkit.steps import Options
    from toolkit.track import Track

    found: dict[str, Any] = {}
    open_really, close_really = room.open_track, Track.close

    def opened(*arguments: Any) -> Track:
        started = time.perf_counter()
        track = open_really(*arguments)
        found.update(start_s=time.perf_counter() - started, kept=dict(track.trackers), said_by=sorted(track.trackers))
        return track

    def closed(track: Track) -> None:
        found["calls_s"] = track.seconds
        started = time.perf_counter()
        close_really(track)
        found["close_s"] = time.perf_counter() - started

    room.open_track = opened
    Track.close = closed  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder:
        overrides = [f"track={names}", f"train.max_steps={steps}", "train.early_stop_patience=null"]
        recipe = read_recipe(resolve("maltu:recipes/casual_chat.yaml"), overrides)
        pipeline.run(recipe, Options(runs=Path(folder), quiet=True))
        facts = json.loads((Path(folder) / recipe.name / "run.json").read_text(encoding="utf-8"))
    kept = found.pop("kept")
    found["train_s"] = facts["fit"]["seconds"]
    found["threads_cpu_s"] = {name: one.cpu_s for name, one in kept.items()}
    found["threads_busy_s"] = {name: one.busy_s for name, one in kept.items()}
    return found


def one_run(names: str, steps: int) -> dict[str, Any]:
    """The same in a process of its own, with a home of its own and no way out."""
    with tempfile.TemporaryDirectory() as home:
        told = {key: value for key, value in os.environ.items() if not key.startswith(("WANDB_", "TRACKIO_"))}
        told |= {"HOME": home, "HF_HOME": home, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": f"{home}/cache"}
        told |= {"WANDB_BASE_URL": NOWHERE, "HTTP_PROXY": NOWHERE, "HTTPS_PROXY": NOWHERE}
        command = [sys.executable, __file__, "--work", names, "--steps", str(steps)]
        done = subprocess.run(command, capture_output=True, text=True, env=told)
    if done.returncode:
        raise SystemExit(f"{names}: exit {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
    found: dict[str, Any] = json.loads(done.stdout.split("RESULT ")[1])
    return found


def main() -> None:
    """Rounds of both, medians with their range, each goal beside its figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of a run")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        say("RESULT " + json.dumps(work(asked.work, asked.steps)))
        return
    results = load(__file__)
    if results.get("steps") != asked.steps:
        results = {"steps": asked.steps, "rounds": []}
    results["surroundings"] = surroundings(PACKAGES)
    say(str(results["surroundings"]))
    while len(results["rounds"]) < asked.rounds:
        results["rounds"].append({"none": one_run("[]", asked.steps), "all": one_run(ALL, asked.steps)})
        save(__file__, results)
    rounds = [one["all"] for one in results["rounds"]]
    shares = [(one["calls_s"] + sum(one["threads_cpu_s"].values())) / one["train_s"] for one in rounds]
    waits = [one["calls_s"] / one["train_s"] for one in rounds]
    longer = [one["all"]["train_s"] / one["none"]["train_s"] for one in results["rounds"]]
    say(f"on: {rounds[0]['said_by']}; {asked.steps} steps in {spread([one['train_s'] for one in rounds])} s")
    say(f"inside tracker calls, of training: {spread(shares)}  (goal {GOALS['share']}); of it waited: {spread(waits)}")
    say(f"start-up {spread([one['start_s'] for one in rounds])} s  (goal {GOALS['start_s']:g})")
    say(f"closing {spread([one['close_s'] for one in rounds])} s  (goal {GOALS['close_s']:g})")
    say(f"training with all of them, against none: {spread(longer)} times")


if __name__ == "__main__":
    main()
