"""A search of 16 trials against transformers' `hyperparameter_search` over SFTTrainer: wall time, and how good the best
adapter is on talk that neither saw.

python benchmarks/search.py [--seeds 0 1 2] [--only NAME …] [--trials 16] [--epochs 1] [--out FILE.json] [--table]
                            (about half an hour a seed on 2 idle cores; resumable: what FILE holds is kept)

Learning rate (5e-4 to 1e-2, log) and batch size (4, 8, 16) of casual_chat's LoRA, the same conversations to learn
from, to watch and to judge by, held-out loss every quarter of an epoch, no early stopping. Each contestant is a fresh
tree of processes; the clock runs from the command to its end, imports and all. Everybody begins with the recipe's own
values, and everybody's best adapter is judged afterwards, outside the clock, by the same function. The contestants
of a seed run in a shuffled order. --table prints what FILE holds as Markdown and runs nothing.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from machine import load, save, say, surroundings

HERE = Path(__file__).resolve().parent
RECIPE = HERE.parent / "recipes" / "casual_chat.yaml"
PACKAGES = ("torch", "transformers", "trl", "peft", "optuna")
SPACE = {"train.learning_rate": {"low": 5e-4, "high": 1e-2, "log": True}, "train.batch_size": [4, 8, 16]}
FIRST = ("3e-3", "8")  # what `auto` and the recipe say
RIVALS = ("(i)", "(ii)", "(iii)")
Sums = list[list[float]]


@dataclass(frozen=True)
class Contestant:
    """Who runs: the rival's script with options, or our command with keys of the recipe's `search`."""

    says: str
    script: str | None = None
    options: tuple[str, ...] = ()
    keys: dict[str, Any] = field(default_factory=dict)


def alone(side_by_side: int) -> Contestant:
    """Ours in one process, without pruning."""
    says = f"ours, 1 process, {side_by_side} in a stack, no pruning"
    return Contestant(says, keys={"pruner": "none", "workers": 1, "side_by_side": side_by_side})


CONTESTANTS = {
    "(i)": Contestant("hyperparameter_search, no pruning", "search_rival.py"),
    "(ii)": Contestant(
        "hyperparameter_search, its successive halving", "search_rival.py", ("--pruner", "successive_halving")
    ),
    "(iii)": Contestant("hyperparameter_search, 2 processes of 1 thread", "search_rival.py", ("--workers", "2")),
    "one base": Contestant("(i), the base loaded once", "search_parts.py", ("one_base",)),
    "lean head": Contestant("(i), base loaded once, no fused head", "search_parts.py", ("lean_head",)),
    "K=1": alone(1),
    "K=2": alone(2),
    "K=4": alone(4),
    "K=8": alone(8),
    "K=16": alone(16),
    "2 processes": Contestant(
        "ours, 2 processes, 1 in a stack, no pruning", keys={"pruner": "none", "workers": 2, "side_by_side": 1}
    ),
    "no pruning": Contestant("ours, planned by itself, no pruning", keys={"pruner": "none"}),
    "default": Contestant("ours, as it comes: planned by itself, successive halving"),
}


@dataclass(frozen=True)
class Settings:
    """What is the same for all contestants of a seed."""

    trials: int
    epochs: float


def run_one(name: str, settings: Settings, seed: int) -> dict[str, Any]:
    """One contestant in an empty folder: seconds, its search in numbers, its best adapter's sums on test talk."""
    contestant = CONTESTANTS[name]
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        if contestant.script is None:
            command, read = ours(folder, contestant, settings, seed)
        else:
            command, read = rival(folder, contestant, settings, seed)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(folder / "cache")}
        environment.pop("OMP_NUM_THREADS", None)  # threads are for each contestant to choose
        before, started = os.getloadavg()[0], time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parent)
        seconds = time.perf_counter() - started
        if done.returncode:
            raise SystemExit(f"{name}, seed {seed}: exit {done.returncode}\n{(done.stdout + done.stderr)[-4000:]}")
        adapter, found = read()
        sums = test_sums(adapter, settings, seed)
    return {"seconds": seconds, "load_before": before, **found, "loss": mean(sums), "sums": sums}


def ours(
    folder: Path, contestant: Contestant, settings: Settings, seed: int
) -> tuple[list[str], Callable[[], tuple[Path, dict[str, Any]]]]:
    """Our command, and how to read what it leaves."""
    import yaml

    recipe = recipe_of(settings, seed)
    recipe["search"] = {"sampler": "tpe", "trials": settings.trials, "space": SPACE, **contestant.keys}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True), encoding="utf-8")
    run = folder / "runs" / recipe["name"]

    def read() -> tuple[Path, dict[str, Any]]:
        facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
        search = facts["search"]
        kept = {key: search[key] for key in ("best", "trials", "steps")}
        return run / "adapters" / "main", {**kept, "own_loss": facts["results"]["after"]["loss"]["all"]}

    return [sys.executable, "-m", "toolkit.train", str(file), "--runs", str(run.parent), "--quiet"], read


def rival(
    folder: Path, contestant: Contestant, settings: Settings, seed: int
) -> tuple[list[str], Callable[[], tuple[Path, dict[str, Any]]]]:
    """The rival's command, and how to read what it leaves. It is given the split and does not pay for it."""
    corpus, data, out = corpus_of(settings, seed), folder / "data", folder / "out"
    data.mkdir()
    for part in ("train", "valid"):
        talks = [
            {"messages": [{"role": t.role, "content": t.content} for t in talk.turns]} for talk in getattr(corpus, part)
        ]
        lines = "".join(json.dumps(talk, ensure_ascii=False) + "\n" for talk in talks)
        (data / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    n_rows = len(corpus.train)
    parts = contestant.options if contestant.script == "search_parts.py" else ()
    rest = contestant.options if not parts else ()
    command = [sys.executable, str(HERE / str(contestant.script)), *parts, "--data", str(data), "--out", str(out)]
    command += ["--base", str(base_folder()), "--seed", str(seed), "--trials", str(settings.trials)]
    command += ["--epochs", str(settings.epochs), "--first", *FIRST, *rest]

    def read() -> tuple[Path, dict[str, Any]]:
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        return out / "best", {"best": result["best"], **in_numbers(result["trials"], n_rows, settings.epochs)}

    return command, read


def in_numbers(trials: Sequence[dict[str, Any]], n_rows: int, epochs: float) -> dict[str, Any]:
    """The rival's trials as run.json counts ours."""
    states = [trial["state"] for trial in trials]
    taken = [trial["steps"] or 0 for trial in trials]
    planned = [math.ceil(epochs * math.ceil(n_rows / trial["values"]["batch_size"])) for trial in trials]
    saved = sum(p - t for p, t, state in zip(planned, taken, states, strict=True) if state == "PRUNED")
    return {
        "trials": {"complete": states.count("COMPLETE"), "pruned": states.count("PRUNED")},
        "longest_trial_s": max(trial["seconds"] or 0.0 for trial in trials),
        "steps": {
            "taken": sum(taken),
            "planned": sum(planned),
            "saved_by_pruning": saved,
            "saved_share": saved / sum(planned),
        },
    }


def recipe_of(settings: Settings, seed: int) -> dict[str, Any]:
    """casual_chat with this seed and length, without early stopping and without prompts to answer at the end."""
    import yaml

    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    recipe["train"] |= {"epochs": settings.epochs, "seed": seed, "evaluate_every": 0.25, "early_stop_patience": None}
    recipe["evaluate"] = {"prompts": None, "metrics": ["loss"]}
    return recipe


def corpus_of(settings: Settings, seed: int) -> Any:
    """The conversations of a seed in three parts, as our command draws them."""
    from toolkit.corpus.gather import gather
    from toolkit.recipe.model import Recipe

    return gather(Recipe.model_validate(recipe_of(settings, seed)).data, seed, None)


def base_folder() -> Path:
    """The base's folder."""
    from toolkit.shipped import shipped

    return Path(str(shipped("base/spoken-mini")))


def test_sums(adapter: Path, settings: Settings, seed: int) -> Sums:
    """(negative log-likelihood, supervised tokens) of every test conversation, in plain PEFT around the base."""
    import torch
    from peft import PeftModel

    from toolkit.bases.load import load_base
    from toolkit.corpus.render import Renderer
    from toolkit.evaluate.talk import held_out_loss
    from toolkit.quiet import quiet
    from toolkit.recipe.model import Base

    with quiet():
        base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
        model = PeftModel.from_pretrained(base.model, str(adapter)).eval()
        rows = list(Renderer(base.tokenizer, base.template, base.context).training_all(corpus_of(settings, seed).test))
        return [[nll, n] for nll, n in held_out_loss(model, base.tokenizer, rows).sums()]


def mean(sums: Sequence[Sequence[float]]) -> float:
    """Nats per supervised token."""
    return sum(nll for nll, _ in sums) / sum(n for _, n in sums)


def table(results: dict[str, Any]) -> list[list[str]]:
    """A row a contestant that ran: wall time, ratios to the rivals, work saved, loss, loss against (i)."""
    head = ["", "what", "seconds", *(f"times faster than {rival}" for rival in RIVALS)]
    rows = [[*head, "pruned; steps saved", "best test loss", "against (i)"]]
    for name, contestant in CONTESTANTS.items():
        mine = runs_of(results, name)
        if not mine:
            continue
        ratios = []
        for other in RIVALS:
            theirs = runs_of(results, other)
            ratios.append(middle([theirs[seed]["seconds"] / mine[seed]["seconds"] for seed in mine if seed in theirs]))
        pruned = statistics.median(one["trials"]["pruned"] for one in mine.values())
        saved = statistics.median(one["steps"]["saved_share"] for one in mine.values())
        rows.append(
            [
                name,
                contestant.says,
                middle([one["seconds"] for one in mine.values()], 0),
                *ratios,
                f"{pruned:.0f}; {100 * saved:.0f} %",
                loss_of(mine),
                difference(mine, runs_of(results, "(i)")),
            ]
        )
    return rows


def runs_of(results: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """A contestant's results by seed."""
    return {seed: of_seed[name] for seed, of_seed in results["seeds"].items() if name in of_seed}


def middle(values: Sequence[float], digits: int = 2) -> str:
    """Median and range."""
    if not values:
        return "-"
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def loss_of(mine: dict[str, dict[str, Any]]) -> str:
    """The median over seeds, and the interval of the mean over the conversations of all seeds."""
    from toolkit.evaluate.metrics import bootstrap_interval

    sums = pooled(mine, mine)
    below_one = bootstrap_interval([(n, n) for _, n in sums], sums)  # by how much the mean is below 1 nat
    loss = statistics.median(one["loss"] for one in mine.values())
    return f"{loss:.3f} ({1 - below_one.high:.3f} to {1 - below_one.low:.3f})"


def difference(mine: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> str:
    """By how many per cent my loss is above theirs, with its paired bootstrap interval over conversations."""
    from toolkit.evaluate.metrics import bootstrap_interval

    both = [seed for seed in mine if seed in theirs]
    if not both or mine is theirs or mine == theirs:
        return "-"
    fall = bootstrap_interval(pooled(theirs, both), pooled(mine, both))
    return f"{-100 * fall.value:+.2f} % ({-100 * fall.high:+.2f} to {-100 * fall.low:+.2f})"


def pooled(runs: dict[str, dict[str, Any]], seeds: Sequence[str] | dict[str, Any]) -> list[tuple[float, float]]:
    """The test conversations of these seeds, one after the other."""
    return [(nll, n) for seed in seeds for nll, n in runs[seed]["sums"]]


def show(results: dict[str, Any]) -> None:
    """The table as Markdown, with everything that is needed to read it."""
    around, settings = results["surroundings"], results["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in around["versions"].items())
    seeds = ", ".join(results["seeds"])
    say(f"{around['cpu']}, {around['cores']} cores, Python {around['python']}, {versions}. {settings['trials']} trials")
    say(f"of {settings['epochs']:g} epochs, seeds {seeds}. Medians over seeds with their range; losses in nats per")
    say("supervised token with 95 % bootstrap intervals over test conversations, differences paired.\n")
    head, *rows = table(results)
    for row in (head, ["---"] * len(head), *rows):
        say(f"| {' | '.join(row)} |")
    mine = runs_of(results, "default")
    for other in RIVALS if mine else ():
        say(f"\ndefault against {other}: loss {difference(mine, runs_of(results, other))}")


def main() -> None:
    """Run what is missing, seed by seed, then show everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), metavar="NAME")
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="show what --out holds, run nothing")
    asked = parser.parse_args()
    settings = Settings(asked.trials, asked.epochs)
    results = load(str(asked.out))
    if asked.table:
        if not results:
            raise SystemExit(f"{asked.out}: nothing there yet")
        return show(results)
    results = results or {"settings": vars(settings), "seeds": {}}
    if results["settings"] != vars(settings):
        raise SystemExit(f"{asked.out} holds results of {results['settings']}. Name another file with --out.")
    results["surroundings"] = surroundings(PACKAGES)
    for seed in asked.seeds:
        of_seed = results["seeds"].setdefault(str(seed), {})
        order = list(CONTESTANTS)
        random.Random(seed).shuffle(order)
        for name in [one for one in order if one in asked.only and one not in of_seed]:
            of_seed[name] = run_one(name, settings, seed)
            say(f"seed {seed}  {name:<12}{of_seed[name]['seconds']:>8.1f} s  loss {of_seed[name]['loss']:.4f}")
            save(str(asked.out), results)
    show(results)


if __name__ == "__main__":
    main()
