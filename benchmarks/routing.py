"""Whether a router knows which of four voices a conversation is for, and what it does with text that is for none.

    python benchmarks/routing.py [--seeds 0 1 2] [--kinds classifier] [--data FOLDER] [--part test] [--rounds 30]

About a minute and a half for each seed and kind, and one for the times. The experts are data/talk's voices, split as a
run splits them (toolkit.corpus.gather); routers learn from train alone. Measured on the held-out part, after one and
after three user turns (talks that have as many), per language and pooled over the seeds: accuracy (a row sent to
`other` is wrong) with its 95 % interval (talks drawn with replacement), beside naive Bayes over character n-grams that
learnt the first one or three turns of the same talk, from both languages at once and from its own alone: the better of
the two is what counts. Calibration error, beside what a perfectly calibrated router would show on as many rows; rows
sent to `other`. Then text that is for none, which no router has seen: 500 lines of translation/ko_en, Korean and
English, and of classification/nsmc (valid files). Last the router's time against the time to first token, interleaved,
on spoken-mini and on a random Llama of 135 M.
Hyperparameters were chosen without the test part; `--part valid` measures on valid. Goes on where an earlier call
stopped (benchmarks/runs/routing.json has every row). Stops with the reason where the data is not there. Figures go to
benchmarks/routing.json.
"""

import argparse
import gzip
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import load, save, say, spread, surroundings
from scipy.stats import binomtest  # type: ignore[import-untyped]
from stack import make_base  # the random Llama of 135 M

ROOT = Path(__file__).parent.parent
WORK = ROOT / "benchmarks" / "runs" / "routing.py"
sys.path.insert(0, str(ROOT))

from toolkit.bases.load import LoadedBase, load_base  # noqa: E402
from toolkit.combine.route import VERSION, Kind, Router  # noqa: E402
from toolkit.corpus.gather import Corpus, gather  # noqa: E402
from toolkit.corpus.render import Renderer  # noqa: E402
from toolkit.corpus.talk import Talk, Turn  # noqa: E402
from toolkit.ensemble.router import train_router  # noqa: E402
from toolkit.ensemble.router_report import OTHER  # noqa: E402
from toolkit.evaluate.baselines import naive_bayes  # noqa: E402
from toolkit.evaluate.metrics import accuracy, confusion, expected_calibration_error  # noqa: E402
from toolkit.generate import Sampling, generate  # noqa: E402
from toolkit.recipe.model import Base, Data  # noqa: E402

VOICES = ("casual", "polite", "teacher", "listener")
LANGUAGES = ("ko", "en")
TURNS = (1, 3)
KINDS = ("classifier", "centroid")
PLAIN = ("naive Bayes", "naive Bayes, own language")  # what is to be beaten
N_DRAWS = 1000
LABELS = [*VOICES, OTHER]
PAIRS, REVIEWS = "translation/ko_en.valid.jsonl.gz", "classification/nsmc_sentiment_ko.valid.jsonl.gz"
N_LINES = 500
GOALS = {"above": 0.10, "after": {1: 0.75, 3: 0.85}, "calibration": 0.05, "in other": 0.05, "unrelated": 0.80}
SHARES = {"spoken-mini": 0.35, "random-135m": 0.15}  # of the time to first token
Row = dict[str, Any]


def users(talk: Talk, n: int) -> list[Turn]:
    """The first `n` user turns."""
    return [turn for turn in talk.turns if turn.role == "user"][:n]


def voice_of(talk: Talk) -> str:
    """The voice whose file a talk is from."""
    return Path(talk.source).name.split(".")[0]


def unrelated(data: Path) -> dict[str, list[str]]:
    """Text for none of the voices, the same lines every time."""
    found = {}
    for name, file, key in (("pairs ko", PAIRS, "ko"), ("pairs en", PAIRS, "en"), ("reviews", REVIEWS, "text")):
        with gzip.open(data / file, "rt", encoding="utf-8") as lines:
            texts = [str(json.loads(line)[key]) for line in lines]
        found[name] = random.Random(0).sample(texts, N_LINES)
    return found


def chances(router: Router, base: LoadedBase, texts: Sequence[Sequence[Turn]]) -> list[dict[str, float]]:
    """The router's row for each text, by label."""
    rows = router.probabilities(base.model, base.tokenizer, texts).tolist()
    return [dict(zip(LABELS, row, strict=True)) for row in rows]


def plain_chances(corpus: Corpus, talks: Sequence[Talk], n: int) -> dict[str, list[dict[str, float]]]:
    """Naive Bayes over the first `n` user turns, by what it learnt from: all talk, and that of the same language."""
    told: dict[str, list[dict[str, float]]] = {name: [{}] * len(talks) for name in PLAIN}
    for name, langs in ((PLAIN[0], LANGUAGES), *((PLAIN[1], (lang,)) for lang in LANGUAGES)):
        known = [talk for talk in corpus.train if talk.lang in langs]
        places = [at for at, talk in enumerate(talks) if talk.lang in langs]
        learned, asked = ([_said(talk, n) for talk in some] for some in (known, [talks[at] for at in places]))
        for at, of in zip(places, naive_bayes(learned, list(map(voice_of, known)), asked, VOICES), strict=True):
            told[name][at] = of
    return told


def _said(talk: Talk, n: int) -> str:
    return "\n".join(turn.content for turn in users(talk, n))


def held_rows(corpus: Corpus, part: str, routers: dict[str, Router], base: LoadedBase) -> list[Row]:
    """What every router, and naive Bayes, says to every held-out talk after one and three user turns."""
    rows: list[Row] = []
    for n in TURNS:
        talks = [talk for talk in getattr(corpus, part) if len(users(talk, n)) == n]
        told = plain_chances(corpus, talks, n)
        told |= {kind: chances(router, base, [users(talk, n) for talk in talks]) for kind, router in routers.items()}
        for at, talk in enumerate(talks):
            of = {name: {k: round(v, 5) for k, v in said[at].items()} for name, said in told.items()}
            rows.append({"talk": talk.source, "turns": n, "lang": talk.lang, "gold": voice_of(talk), "chances": of})
    return rows


def one_seed(seed: int, part: str, kinds: Sequence[Kind], base: LoadedBase, away: dict[str, list[str]]) -> Row:
    """Train the routers on a split and ask them."""
    corpus = gather(Data(train=tuple(f"maltu:talk/{v}.{lang}.jsonl" for v in VOICES for lang in LANGUAGES)), seed, None)
    talks = {voice: [talk for talk in corpus.train if voice_of(talk) == voice] for voice in VOICES}
    routers: dict[str, Router] = {}
    found: Row = {"unrelated": {}, "reports": {}, "training_seconds": {}}
    for kind in kinds:
        started = time.perf_counter()
        routers[kind], found["reports"][kind] = train_router(base, talks, kind=kind, seed=seed)
        found["training_seconds"][kind] = round(time.perf_counter() - started, 1)
        sent = found["unrelated"][kind] = {}
        for name, texts in away.items():
            told = chances(routers[kind], base, [[Turn("user", text)] for text in texts])
            sent[name] = statistics.mean(max(of, key=of.__getitem__) == OTHER for of in told)
    return {"rows": held_rows(corpus, part, routers, base), **found}


def drawn(rows: Sequence[Row]) -> list[np.ndarray]:
    """Places of rows, N_DRAWS times over: talks drawn with replacement, a talk with all its rows."""
    of_talk: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        of_talk.setdefault(row["talk"], []).append(at)
    groups = [np.array(places) for places in of_talk.values()]
    noise = np.random.default_rng(0)
    return [
        np.concatenate([groups[at] for at in noise.integers(len(groups), size=len(groups))]) for _ in range(N_DRAWS)
    ]


def bounds(values: Sequence[float]) -> list[float]:
    """Where 95 % of the drawn values lie."""
    return [round(float(value), 4) for value in np.percentile(values, [2.5, 97.5])]


def right(rows: Sequence[Row], name: str) -> np.ndarray:
    """For each row whether a contestant named its voice."""
    return np.array([max(of := row["chances"][name], key=of.__getitem__) == row["gold"] for row in rows], dtype=float)


def numbers(rows: Sequence[Row], name: str, draws: Sequence[np.ndarray]) -> dict[str, Any]:
    """Accuracy, calibration error and share of other of one contestant, with intervals."""
    gold = [row["gold"] for row in rows]
    told = [row["chances"][name] for row in rows]
    said = [max(of, key=of.__getitem__) for of in told]
    labels = [label for label in LABELS if label in told[0]]
    hit = right(rows, name)
    noise = random.Random(0)
    perfect = []
    for _ in range(20):
        as_told = [noise.choices(list(of), list(of.values()))[0] for of in told]
        perfect.append(expected_calibration_error(as_told, told))
    return {
        "n": len(rows),
        "accuracy": round(accuracy(gold, said), 4),
        "accuracy_bounds": bounds([hit[places].mean() for places in draws]),
        "calibration_error": round(expected_calibration_error(gold, told), 4),
        "calibration_error_if_perfect": round(statistics.mean(perfect), 4),
        "other": round(said.count(OTHER) / len(said), 4),
        "confusion": confusion(gold, said, labels),
    }


def compared(rows: Sequence[Row], kinds: Sequence[str], where: str, goal: float | None) -> dict[str, Any]:
    """`numbers` of every contestant, and by how much each router is above the better naive Bayes; printed."""
    draws = drawn(rows)
    of = {name: numbers(rows, name, draws) for name in (*PLAIN, *kinds)}
    plain = max(PLAIN, key=lambda name: of[name]["accuracy"])
    for name, told in of.items():
        low, high = told["accuracy_bounds"]
        line = f"{where:<13}{name:<27}{told['n']:>5} rows  accuracy {told['accuracy']:.3f} ({low:.3f} to {high:.3f})"
        if name in kinds:
            more = right(rows, name) - right(rows, plain)
            told["above"], told["above_bounds"] = round(float(more.mean()), 4), bounds([more[d].mean() for d in draws])
            low, high = told["above_bounds"]
            line += (
                f"{'' if goal is None else f' goal {goal}'}, {told['above']:+.3f} ({low:+.3f} to {high:+.3f}), "
                f"calibration error {told['calibration_error']:.3f} (a perfect router's "
                f"{told['calibration_error_if_perfect']:.3f}), to other {told['other']:.3f}"
            )
        say(line)
    return of


def summary(seeds: dict[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """Everything over all seeds together, printed and returned."""
    rows = [row for of in seeds.values() for row in of["rows"]]
    found: dict[str, Any] = {}
    for n in TURNS:
        for lang in (*LANGUAGES, "both"):
            mine = [row for row in rows if row["turns"] == n and lang in (row["lang"], "both")]
            goal = None if lang == "both" else GOALS["after"][n]
            found[f"after {n} {lang}"] = compared(mine, kinds, f"after {n} {lang}", goal)
    for kind in kinds:
        for name in next(iter(seeds.values()))["unrelated"][kind]:
            shares = [of["unrelated"][kind][name] for of in seeds.values()]
            told = shared(statistics.mean(shares), N_LINES)
            found[f"unrelated {name} {kind}"] = told
            low, high = told["bounds"]
            say(
                f"unrelated {name:<9}{kind:<12}to other {told['share']:.3f} ({low:.3f} to {high:.3f}), seeds "
                f"{spread(shares)} (goal {GOALS['unrelated']})"
            )
        of_own = [row["chances"][kind] for row in rows]
        share = sum(max(of, key=of.__getitem__) == OTHER for of in of_own) / len(of_own)
        told = shared(share, len({row["talk"] for row in rows}))
        found[f"in-domain to other {kind}"] = told
        low, high = told["bounds"]
        say(f"in-domain {kind:<12}to other {share:.3f} ({low:.3f} to {high:.3f}) (goal at most {GOALS['in other']})")
    return found


def shared(share: float, n: int) -> dict[str, Any]:
    """A share of `n` different texts with its interval (Wilson); seeds that saw the same texts do not narrow it."""
    of = binomtest(round(share * n), n).proportion_ci(method="wilson")
    return {"share": round(share, 4), "bounds": [round(float(of.low), 4), round(float(of.high), 4)], "n": n}


def times(base: LoadedBase, rounds: int) -> dict[str, Any]:
    """Milliseconds of a router's decision and of the first token after the same talk (and, stricter, of the bare
    forward pass over its prompt), in every round one after the other, on either base (ids are those of spoken-mini's
    tokenizer). A random router's work is that of a trained one.
    """
    data = Data(train=("maltu:talk/casual.ko.jsonl", "maltu:talk/polite.en.jsonl"))
    talks = list(gather(data, 0, None).test)[:rounds]
    render = Renderer(base.tokenizer, base.template)
    found: dict[str, Any] = {}
    for name, goal in SHARES.items():
        model: Any = base.model if name == "spoken-mini" else make_base(name)
        router = blank_router(model)
        taken: dict[str, list[float]] = {"router": [], "first token": [], "bare forward": []}
        for talk in [talks[0], *talks]:
            asked = list(talk.turns[:-1])
            prompt = render.prompt(asked)
            started = time.perf_counter()
            router.probabilities(model, base.tokenizer, [asked])
            routed = time.perf_counter()
            generate(model, base.tokenizer, [prompt], Sampling(temperature=0.0, max_tokens=1))
            taken["router"].append(1000 * (routed - started))
            first = time.perf_counter()
            with torch.no_grad():
                model(input_ids=torch.tensor([prompt]), logits_to_keep=1)
            taken["first token"].append(1000 * (first - routed))
            taken["bare forward"].append(1000 * (time.perf_counter() - first))
        of = {key: [round(value, 3) for value in values[1:]] for key, values in taken.items()}
        found[name] = {"goal": goal, **of}
        for other in ("first token", "bare forward"):
            share = statistics.median(a / b for a, b in zip(of["router"], of[other], strict=True))
            found[name][f"share of {other}"] = round(share, 4)
            took = f"router {spread(of['router'])} ms, {other} {spread(of[other])} ms"
            say(f"{name}: {took}: {share:.1%} (goal at most {goal:.0%})")
    return found


def blank_router(model: Any) -> Router:
    """A router of four experts for a base, of random numbers."""
    from toolkit.adapters import anatomy
    from toolkit.combine.route import shapes

    width = 2 * anatomy.hidden_size(model)
    noise = torch.Generator().manual_seed(0)
    tensors = {name: torch.rand(shape, generator=noise) for name, shape in shapes(len(VOICES), width).items()}
    return Router("classifier", VOICES, width, "", tensors)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the split and of training")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["classifier"], help="which routers")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of unrelated text")
    parser.add_argument("--part", choices=["test", "valid"], default="test", help="which held-out talk to judge by")
    parser.add_argument("--rounds", type=int, default=30, help="conversations that time is measured on, 0 for none")
    asked = parser.parse_args()
    missing = [asked.data / file for file in (PAIRS, REVIEWS) if not (asked.data / file).exists()]
    if missing:
        say(f"skipped: {missing[0]} is not there. Name the folder that holds it with --data.")
        return
    around = surroundings(("torch", "transformers", "scikit-learn", "numpy")) | {"router": VERSION}
    say(f"{around}  seeds {asked.seeds}  part {asked.part}")
    WORK.parent.mkdir(exist_ok=True)
    results = load(str(WORK))
    if results.get("machine") != around:
        results = {"machine": around, "parts": {}}
    results["day"] = datetime.now(UTC).date().isoformat()
    base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
    away = unrelated(asked.data)
    seeds = results["parts"].setdefault(asked.part, {}).setdefault("seeds", {})
    for seed in asked.seeds:
        if not set(asked.kinds) <= set(seeds.get(str(seed), {}).get("reports", {})):
            seeds[str(seed)] = one_seed(seed, asked.part, asked.kinds, base, away)
            save(str(WORK), results)
        told = seeds[str(seed)]
        say(f"seed {seed}: trained in {told['training_seconds']} s; {told['reports'][asked.kinds[0]]['all']}")
    used = {str(seed): seeds[str(seed)] for seed in asked.seeds}
    results["parts"][asked.part]["summary"] = summary(used, asked.kinds)
    if asked.rounds and "times" not in results:
        results["times"] = times(base, asked.rounds)
    save(str(WORK), results)
    save(__file__, {**results, "parts": {part: without_rows(of) for part, of in results["parts"].items()}})


def without_rows(part: dict[str, Any]) -> dict[str, Any]:
    """What of a part is worth keeping: everything but the chances of every row."""
    seeds = {seed: {key: of[key] for key in of if key != "rows"} for seed, of in part["seeds"].items()}
    return {**part, "seeds": seeds}


if __name__ == "__main__":
    main()
