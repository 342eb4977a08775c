"""Does a short audition order bases as full training does? Kendall's tau over eight bases and three seeds, and the
time of `choose` against that of training all of them. Goals: tau at least 0.8, at most a quarter of the time.

python benchmarks/choose.py FOLDER [--seeds 0 1 2] [--data ../shared/data] [--epochs 6] [--out FILE.json] [--table]
                            (hours on 2 cores; resumable: what FOLDER and FILE hold is kept)
python benchmarks/choose.py FOLDER --tiny          (minutes: two small bases, one seed; shows that it works, no more)

The bases: six made by `base: {new}` of two sizes, two vocabularies and two token budgets (once, kept in FOLDER, each
meant to take less than 10 minutes: seconds are printed), spoken-mini, and ../shared/data/models/stories260K.
They are taught casual_chat's talk; what the six learned from is other talk.

Full training: casual_chat's LoRA to its end at three learning rates (auto, a third, three times), each a run of
`python -m toolkit.train`; the best by held-out loss counts. The seed decides split, order and start. `choose` gets as
many minutes each as make at most a quarter of what full training took, halving included. Both are judged on the same
test talk. A pair of bases is ordered by its paired bootstrap interval over conversations, and tied where that holds 0;
tau is the sum of products of the two orders' signs over the root of the product of their sums of squares (tau-b,
for ties that are no equivalence). Where choose tried a base only briefly, its pairs are compared as they were then.
"""

import argparse
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from machine import load, save, say, surroundings

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
PACKAGES = ("torch", "transformers", "trl", "peft")
SIZES = {"small": "hidden: 96, layers: 3, heads: 3", "large": "hidden: 256, layers: 5, heads: 4"}
MADE = (  # size, vocabulary, optimizer steps (of 16 windows of 256 tokens)
    ("small", 2048, 100),
    ("small", 2048, 400),
    ("small", 8192, 400),
    ("large", 2048, 100),
    ("large", 8192, 100),
    ("large", 8192, 400),
)
TINY = (("small", 512, 4), ("small", 512, 40))
VOICES = ("polite", "teacher", "listener")
PUBLIC = ("songys_chatbot_ko", "xpersona_ko", "chatterbot_ko", "chatterbot_en", "taskmaster4_en")
MOST_MINUTES = 10.0  # of making one base
SHARE, TAU = 0.25, 0.8
FACTORS = (1.0, 1 / 3, 3.0)
OVERHEAD_S = 45.0  # what one audition takes beside learning: imports, loading, measuring
PASSES = 6.0  # minutes_each of everybody, at the most, that eight bases in two rounds learn
Signs = dict[tuple[str, str], int]


@dataclass(frozen=True)
class Settings:
    """What is the same for all seeds. `minutes`: of each base in `choose`; None: what a quarter of the time allows."""

    folder: Path
    data: Path
    epochs: float
    made: tuple[tuple[str, int, int], ...]
    factors: tuple[float, ...]
    minutes: float | None
    public: tuple[str, ...] = PUBLIC


def toolkit(*words: str) -> float:
    """Call the toolkit as a user does, offline; seconds from the command to its end."""
    told = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, env=told)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: exit {done.returncode}\n{(done.stdout + done.stderr)[-3000:]}")
    return time.perf_counter() - started


# The bases


def bases(settings: Settings, results: dict[str, Any]) -> list[str]:
    """The folders and names of all of them; those that are not there yet are made."""
    found = ["spoken-mini"]
    stories = settings.data / "models" / "stories260K"
    if stories.is_dir():
        found.append(str(stories.resolve()))
    else:
        say(f"{stories} is not there, so one base fewer is compared. Name its folder with --data.")
    for size, vocab, steps in settings.made:
        name = f"{size}-{vocab}-{steps}"
        model = settings.folder / "bases" / name
        if not model.is_dir():
            results.setdefault("made_s", {})[name] = made(settings, name, size, vocab, steps)
            runs = settings.folder / "making"
            model.parent.mkdir(exist_ok=True)
            shutil.move(runs / name / "model", model)
            shutil.rmtree(runs / name)
        seconds = results.get("made_s", {}).get(name)
        late = " OVER 10 MINUTES" if seconds and seconds > 60 * MOST_MINUTES else ""
        say(f"base {name}: {'made before' if seconds is None else f'made in {seconds:.0f} s'}{late}")
        found.append(str(model.resolve()))
    return found


def made(settings: Settings, name: str, size: str, vocab: int, steps: int) -> float:
    """Make one base from talk in other voices, and public talk where it is there; the seconds that it took."""
    own = [f"maltu:talk/{voice}.{lang}.jsonl" for voice in VOICES for lang in ("ko", "en")]
    public = [settings.data / "base" / f"{corpus}.train.jsonl.gz" for corpus in settings.public]
    files = [*own, *(str(path.resolve()) for path in public if path.exists())]
    recipe = settings.folder / f"{name}.yaml"
    recipe.write_text(
        f"name: {name}\nbase: {{new: {{{SIZES[size]}, vocab: {vocab}, context: 512}}}}\n"
        f"data: {{train: {json.dumps(files)}, valid: 0.01, test: 0,"
        " clean: {near_duplicates: null, max_dropped: 0.5}}\nadapter: {kind: full}\n"
        f"train: {{max_steps: {steps}, batch_size: 16, optimizer: muon, schedule: linear, weight_decay: 0.1,"
        " max_length: 256, evaluate_every: 100, early_stop_patience: null}\n"
        "evaluate: {prompts: null, metrics: [loss]}\ntrack: []\n",
        encoding="utf-8",
    )
    return toolkit("toolkit.train", str(recipe), "--runs", str(settings.folder / "making"), "--quiet")


# Full training


def recipe_of(settings: Settings, models: Sequence[str], seed: int, minutes: float) -> Path:
    """The recipe of a seed, with all bases to choose from."""
    path = settings.folder / f"pick-{seed}.yaml"
    path.write_text(
        f"name: pick-{seed}\nbase: {{candidates: {json.dumps(list(models))}, minutes_each: {minutes:.3f}}}\n"
        "data: {train: [maltu:talk/casual.ko.jsonl, maltu:talk/casual.en.jsonl]}\nadapter: {kind: lora, rank: 16}\n"
        f"train: {{epochs: {settings.epochs}, batch_size: 8, evaluate_every: 0.5, early_stop_patience: 3,"
        f" seed: {seed}}}\nevaluate: {{prompts: null, metrics: [loss]}}\ntrack: []\n",
        encoding="utf-8",
    )
    return path


def auto_rate(settings: Settings, model: str) -> float:
    """The learning rate that auto means on a base of this size."""
    from toolkit.choose.about import about
    from toolkit.fit.plan import LEARNING_RATES
    from toolkit.recipe.model import Base

    parameters = about(Base(model=model)).parameters or 0
    small, middle, large = LEARNING_RATES["lora"]
    return small if parameters <= 30e6 else middle if parameters <= 600e6 else large


def full(
    settings: Settings, models: Sequence[str], seed: int, results: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Train every base to the end at every rate; what is there already is kept."""
    runs = settings.folder / f"full-{seed}"
    done = results.setdefault("full", {})
    for model in models:
        for number, factor in enumerate(settings.factors):
            name = f"{Path(model).name}-{number}"
            if name in done:
                continue
            rate = f"train.learning_rate={factor * auto_rate(settings, model):.3g}"
            words = [str(recipe_of(settings, models, seed, 1.0)), f"base.model={model}", f"name={name}", rate]
            seconds = toolkit("toolkit.train", *words, "--runs", str(runs), "--quiet")
            fitted = json.loads((runs / name / "run.json").read_text(encoding="utf-8"))["fit"]
            done[name] = {"model": model, "seconds": seconds, "loss": fitted["best_loss"], "steps": fitted["steps"]}
            say(f"seed {seed}  full {name}: held-out loss {fitted['best_loss']:.4f}, {seconds:.0f} s")
            keep()


def measured_full(settings: Settings, models: Sequence[str], seed: int, results: dict[str, Any]) -> dict[str, Any]:
    """For each base the sums of its best full run on every test conversation, as choose measures them."""
    import torch

    from toolkit.adapters.kinds import kind_in_folder
    from toolkit.bases.load import load_base
    from toolkit.choose.job import recipe_of as of_candidate
    from toolkit.choose.stand import Stand
    from toolkit.fit.cached import CachedRows
    from toolkit.fit.prepare import make_renderer
    from toolkit.quiet import quiet
    from toolkit.recipe.read import read_recipe

    found: dict[str, Any] = {}
    several = read_recipe(recipe_of(settings, models, seed, 1.0), to_choose=True)
    for model in models:
        mine = {name: of for name, of in results["full"].items() if of["model"] == model}
        best = min(mine, key=lambda name: mine[name]["loss"])
        with quiet():
            recipe = of_candidate(several, model)
            base = load_base(recipe.base, "cpu", torch.float32)  # type: ignore[arg-type]  # of_candidate made it one
            cached = CachedRows(recipe, base, {})
            stand = Stand(recipe, base, make_renderer(recipe, base), cached.corpus, cached.of(recipe))
            folder = settings.folder / f"full-{seed}" / best / "adapters" / "main"
            worn = kind_in_folder(folder).load(base.model, folder, base_hash=base.hash)
            sums = stand.sums(stand.noted(worn))
        found[model] = stand.talks(sums, [0.0] * len(sums))
    return found


# Both orders


def signs(results: dict[str, Any], briefly: dict[str, Any]) -> Signs:
    """For each pair of bases which is lower: -1 the first, 1 the second, 0 tied. `briefly`: what to compare those
    pairs by of which one has no entry in `results`."""
    from toolkit.choose.rank import difference

    found: Signs = {}
    for one, other in itertools.combinations(sorted({*results, *briefly}), 2):
        both = (results[one], results[other]) if one in results and other in results else (briefly[one], briefly[other])
        behind = difference(*both)
        found[one, other] = 0 if behind is None or behind.low <= 0 <= behind.high else 1 if behind.value > 0 else -1
    return found


def tau(one: Signs, other: Signs) -> float:
    """Kendall's tau-b of two sets of signs over the same pairs; 1.0 where both are tied throughout."""
    pairs = sorted(one.keys() & other.keys())
    top = sum(one[pair] * other[pair] for pair in pairs)
    squares = [sum(signs[pair] ** 2 for pair in pairs) for signs in (one, other)]
    return top / math.sqrt(squares[0] * squares[1]) if all(squares) else float(squares[0] == squares[1])


def chosen(settings: Settings, models: Sequence[str], seed: int, minutes: float) -> tuple[float, Signs, Any]:
    """Call choose; its seconds, its signs, and a result of every base to measure full training like."""
    from toolkit.choose.result import Result

    runs = settings.folder / f"choose-{seed}"
    seconds = toolkit(
        "toolkit", "choose", str(recipe_of(settings, models, seed, minutes)), "--runs", str(runs), "--quiet"
    )
    found = json.loads((runs / f"pick-{seed}-choose" / "leaderboard.json").read_text(encoding="utf-8"))
    last: dict[str, Result] = {}
    brief: dict[str, Result] = {}
    places = [*found["leaderboard"], *found["beaten_in_a_briefer_round"]]
    finalists = {row["model"] for row in found["leaderboard"]}
    for file in sorted((runs / f"pick-{seed}-choose" / "candidates").glob("*min.json")):
        told = json.loads(file.read_text(encoding="utf-8"))
        result = Result(**told)
        is_last = abs(result.minutes - found["minutes_each"]) < 1e-9
        (last if is_last else brief)[result.model] = result
    if found["left_out"]:
        say(f"seed {seed}  choose left out: {found['left_out']}")
    say(f"seed {seed}  choose: {[(Path(row['model']).name, row['value']) for row in places]}; {found['verdict']}")
    if len(last) < len(finalists):
        raise SystemExit("choose: a finalist has no result")
    return seconds, signs(last, brief), {**brief, **last}


def one_seed(
    settings: Settings, models: Sequence[str], seed: int, results: dict[str, Any], keep: Callable[[], None]
) -> None:
    """Full training, then choose in the time that is allowed, then both orders beside each other."""
    full(settings, models, seed, results, keep)
    if "tau" in results:
        return
    full_s = sum(of["seconds"] for of in results["full"].values())
    n = len(models)
    allowed = (SHARE * full_s - OVERHEAD_S * (n + n // 2)) / 60 / PASSES * (8 / n)
    minutes = settings.minutes or max(0.2, round(allowed, 2))
    seconds, of_choose, by_model = chosen(settings, models, seed, minutes)
    sums = measured_full(settings, models, seed, results)
    whole = {model: replace(by_model[model], talks=talks) for model, talks in sums.items() if model in by_model}
    of_full = signs(whole, {})
    results["minutes_each"], results["choose_s"], results["full_s"] = minutes, seconds, full_s
    results["signs"] = {f"{a} | {b}": [of_choose[a, b], of_full[a, b]] for a, b in of_full if (a, b) in of_choose}
    results["full_values"] = {
        model: sum(t[0] for t in of.values()) / sum(t[2] for t in of.values()) for model, of in sums.items()
    }
    results["share"], results["tau"] = seconds / full_s, tau(of_choose, of_full)
    keep()


def show(results: dict[str, Any]) -> None:
    """What was found, a line a seed."""
    for seed, of in sorted(results["seeds"].items()):
        if "tau" not in of:
            continue
        order = sorted(of["full_values"].items(), key=lambda item: item[1])
        say(f"seed {seed}  full training: {[(Path(model).name, round(value, 3)) for model, value in order]}")
        ties = sum(two[1] == 0 for two in of["signs"].values())
        against = sum(two[0] * two[1] < 0 for two in of["signs"].values())
        say(
            f"seed {seed}  tau {of['tau']:.3f} (goal {TAU}), {len(of['signs'])} pairs, {ties} tied in full training,"
            f" {against} the other way round; {of['minutes_each']:g} min each; choose {of['choose_s']:.0f} s, full"
            f" training {of['full_s']:.0f} s: {of['share']:.3f} of it (goal {SHARE})"
        )
    taus = [of["tau"] for of in results["seeds"].values() if "tau" in of]
    if taus:
        say(f"tau over {len(taus)} seeds: mean {sum(taus) / len(taus):.3f}, lowest {min(taus):.3f}")


def main() -> None:
    """Make, train, choose, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where bases and runs are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--data", type=Path, default=HERE.parent.parent / "shared" / "data", help="public talk and models"
    )
    parser.add_argument("--epochs", type=float, default=6.0, help="of full training, at the most")
    parser.add_argument("--minutes", type=float, help="of each base in choose, instead of what the time allows")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--table", action="store_true", help="print what FILE holds and run nothing")
    parser.add_argument("--tiny", action="store_true", help="a smoke run into FOLDER/tiny.json")
    asked = parser.parse_args()
    out = asked.folder / "tiny.json" if asked.tiny else asked.out
    results = load(str(out)) or {"seeds": {}}
    if not asked.table:
        asked.folder.mkdir(parents=True, exist_ok=True)
        epochs, factors = (0.5, (1.0,)) if asked.tiny else (asked.epochs, FACTORS)
        made, minutes = (TINY, 0.1) if asked.tiny else (MADE, asked.minutes)
        public = () if asked.tiny else PUBLIC
        settings = Settings(asked.folder.resolve(), asked.data, epochs, made, factors, minutes, public)
        results["surroundings"] = surroundings(PACKAGES)
        say(str(results["surroundings"]))
        models = bases(settings, results)
        save(str(out), results)
        for seed in asked.seeds[:1] if asked.tiny else asked.seeds:
            own = results["seeds"].setdefault(str(seed), {})
            one_seed(settings, models, seed, own, lambda: save(str(out), results))
    show(results)


if __name__ == "__main__":
    main()
