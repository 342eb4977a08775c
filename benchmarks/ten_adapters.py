"""Do ten cheap adapters, taught side by side and combined, beat one effort in the same time?

python benchmarks/ten_adapters.py [--seconds 180] [--seeds 0 1 2] [--only NAME …] [--members 10] [--rounds 5]
    [--batch-size 8] [--rank 8] [--learning-rate auto] [--full-rate auto] [--out FILE.json] [--tiny] [--table]
    (about 3 hours whole on 2 idle cores; resumable: what FILE holds is kept)

Talk: nsmc (film reviews, 10,000 rows, 2 labels) and 3i4k (intents, all 46,000 rows, 7 labels) from
../shared/data/classification, and talk (the casual dialogues). 2,000 rows of nsmc's and 3i4k's own held-out files, and
the tenth of talk, are what is judged; 400 rows more (a tenth) are watched by those that watch.
Systems, on spoken-mini, all with the same rows, batch size and seconds of training:
  full     every weight, through fit/one           lora     one adapter
  bag      ten adapters on bootstrap samples       seeds    ten adapters on all rows, seeds apart
  boost    rounds one after another (SAMME; text: steps on the held-out loss), measuring included
bag and seeds vote hard, soft (mean probability) and logprob (mean log-probability); of talk per token, not hard.
--only takes data, systems and cost: nsmc 3i4k talk, full lora bag seeds boost, cost.

Time: every system's schedule has to end when its time does, so its number of steps is settled before. Its speed is
measured first, for 6 % of the time (4 s at least), on adapters that are thrown away and outside its clock, the first
steps left out; 98 % of the seconds at that speed are the steps. The clock runs from a loaded base and rendered rows to
the saved adapter, and what it really showed is printed and kept. Boosting gets equal parts of the time for its rounds:
a round is one pass over a pool of rows and a pass that scores them, so the pool is as large as both fit.
Judging is outside of every clock.

Each line compares a system with full and lora: error rates, or losses, over the same conversations, all seeds
together, with a paired bootstrap interval over conversations. The interval tells whether it is more than chance.
cost: ten members against ten fit/one runs after each other, the same steps, at up to 128 tokens a member and step
and above, interleaved; from the steady steps, and whole. Goal: 0.8, 0.9, and 0.25 on a GPU.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from machine import load, save, say, surroundings
from ten_cost import cost, cost_table
from ten_world import (
    ENDLESS,
    Ground,
    Settings,
    fit_full,
    now,
    open_field,
    probe_full,
    probe_members,
    steps_in,
    working,
)

from toolkit.combine.mix import Mixture, Over
from toolkit.combine.rows import answering
from toolkit.ensemble.bag import Bag, out_of_bag
from toolkit.ensemble.boost import Rounds, boost
from toolkit.ensemble.experts import Task, fit_members
from toolkit.ensemble.subjects import Table, vote
from toolkit.evaluate.classify import classify_talks, gold_labels, likeliest
from toolkit.evaluate.metrics import Interval, bootstrap_difference, bootstrap_interval
from toolkit.quiet import quiet
from toolkit.score import supervised_log_likelihoods

FIELDS, SYSTEMS, COST = ("nsmc", "3i4k", "talk"), ("full", "lora", "bag", "seeds", "boost"), "cost"
HOWS: tuple[Any, ...] = ("hard", "soft", "logprob")
Sums = list[list[float]]  # for each conversation what is lost (1: wrong; nats) and what it is divided by


# Judging


def judged(ground: Ground, table: Table, names: Sequence[str], weights: Mapping[str, float]) -> dict[str, Sums]:
    """What each way of combining these members loses on every conversation of the table."""
    if table.labels:
        return {how: mistakes(table, vote(table, names, how, weights)) for how in HOWS}
    rows = [(row.input_ids, row.labels) for row in table.rows]
    ways: tuple[tuple[str, Over], ...] = (("soft", "prob"), ("logprob", "logprob"))
    found = {}
    for how, over in ways:
        used = tuple(weights[name] for name in names)
        with answering(table.stack, list(names), Mixture, weights=used, over=over) as model:
            found[how] = losses(supervised_log_likelihoods(model, rows))
    return found


def mistakes(table: Table, said: Sequence[Mapping[str, float]]) -> Sums:
    """1 for each wrong label."""
    return [[float(one != gold), 1.0] for one, gold in zip(likeliest(said), gold_labels(table.talks), strict=True)]


def losses(values: Sequence[Sequence[float]]) -> Sums:
    """Nats and tokens of each conversation."""
    return [[-sum(row), float(len(row))] for row in values]


def judged_model(ground: Ground, model: torch.nn.Module) -> Sums:
    """The same of a whole model."""
    of = ground.field
    table = ground.table(of.test, ground.stack_of(ground.run("none"), ()))
    if of.labels:
        return mistakes(table, classify_talks(model, ground.renderer, table.talks, of.labels))
    return losses(supervised_log_likelihoods(model, [(row.input_ids, row.labels) for row in table.rows]))


# Systems


def full(ground: Ground, seed: int) -> dict[str, Any]:
    """Every weight."""
    rows = ground.pairs(ground.field.train)
    steps = steps_in(ground.settings.seconds, probe_full(ground, rows, seed))
    worn, seconds = fit_full(ground, rows, ground.recipe("full", steps, seed))
    return {"steps": steps, "seconds": seconds, "sums": {"alone": judged_model(ground, worn.model)}}


def lora(ground: Ground, seed: int) -> dict[str, Any]:
    """One adapter."""
    return members(ground, seed, 1, is_bootstrap=False)


def bag(ground: Ground, seed: int) -> dict[str, Any]:
    """Members on samples."""
    return members(ground, seed, ground.settings.members, is_bootstrap=True)


def seeds(ground: Ground, seed: int) -> dict[str, Any]:
    """Members on everything."""
    return members(ground, seed, ground.settings.members, is_bootstrap=False)


def members(ground: Ground, seed: int, n: int, *, is_bootstrap: bool) -> dict[str, Any]:
    """So many adapters side by side in the time there is."""
    made = Bag.of(ground.pairs(ground.field.train), n, seed=1000 * seed, is_bootstrap=is_bootstrap)
    speed = probe_members(ground, made.tasks(ground.recipe("lora", ENDLESS, seed), ()))
    steps = steps_in(ground.settings.seconds, speed, n)
    run = ground.run("run")
    tasks = made.tasks(ground.recipe("lora", steps, seed), ())
    started = now(ground)
    fit_members(tasks, ground.base, run, plan_of=ground.plan_of)
    seconds = now(ground) - started
    stack = ground.stack_of(run, made.names)
    table = ground.table(ground.field.test, stack)
    equal = dict.fromkeys(made.names, 1.0 / n)
    sums = judged(ground, table, made.names, equal)
    found: dict[str, Any] = {"steps": steps, "members": n, "seconds": seconds}
    if n == 1:
        return {**found, "sums": {"alone": sums["soft"]}}
    each = [mean(judged(ground, table, [name], {name: 1.0})["soft"]) for name in made.names]
    found["each alone"] = {"mean": statistics.mean(each), "best": min(each), "worst": max(each)}
    found["out of bag"] = out_of_bag(made, ground.table(ground.field.train, stack), "soft")
    return {**found, "sums": sums}


def boosted(ground: Ground, seed: int) -> dict[str, Any]:
    """Rounds in turn. See the head of this file."""
    own, of = ground.settings, ground.field
    first = Task("probe", ground.recipe("lora", ENDLESS, seed), ground.pairs(of.train), ())
    step_s = 1 / probe_members(ground, [first])
    row_s = score_s(ground)
    held = of.held[: max(8, int(0.1 * own.seconds / own.rounds / row_s))]  # a tenth of a round at most
    round_s = 0.98 * own.seconds / own.rounds - len(held) * row_s
    steps = max(2, int(round_s / (step_s + own.batch_size * row_s)))
    pool = [
        of.train[at] for at in torch.randperm(len(of.train), generator=torch.Generator().manual_seed(seed)).tolist()
    ]
    pool = [talk for talk in pool if ground.rows([talk])[0].n_supervised][: steps * own.batch_size]
    run, said = ground.run("run"), []
    stack = ground.stack_of(run, ())
    task = Task("boost", ground.recipe("lora", steps, seed), ground.pairs(pool), ())
    started = now(ground)
    made = boost(
        task,
        ground.table(pool, stack),
        ground.table(held, stack),
        lambda one: fit_members([one], ground.base, run, plan_of=ground.plan_of),
        run,
        Rounds(own.rounds, own.rounds, 1000 * seed),
        said.append,
    )
    seconds = now(ground) - started
    assert made is not None  # nobody asked it to stop
    sums = judged(ground, ground.table(of.test, stack), list(made.weights), made.weights)[made.how]
    return {"steps": steps, "pool": len(pool), "seconds": seconds, **made.facts(), "sums": {"weighted": sums}}


def score_s(ground: Ground) -> float:
    """Seconds that scoring one conversation takes."""
    some = ground.field.train[:200]
    stack = ground.stack_of(ground.run("none"), ())
    ground.table(some[:8], stack).values(None)
    table = ground.table(some, stack)
    started = now(ground)
    table.labelled(None) if table.labels else table.values(None)
    return (now(ground) - started) / len(some)


ROOMS: dict[str, Callable[[Ground, int], dict[str, Any]]] = {
    "full": full,
    "lora": lora,
    "bag": bag,
    "seeds": seeds,
    "boost": boosted,
}


# Results


def mean(sums: Sums) -> float:
    """Error rate, or nats a token."""
    return sum(value for value, _ in sums) / sum(count for _, count in sums)


def written(results: Mapping[str, Any]) -> dict[str, Any]:
    """For the file: of labels a sign a conversation, 1 for a wrong one."""

    def shorter(sums: Sums) -> Sums | str:
        is_of_labels = all(pair[1] == 1 and pair[0] in (0, 1) for pair in sums)
        return "".join(str(int(pair[0])) for pair in sums) if is_of_labels else sums

    return {**results, "runs": _each(results["runs"], shorter)}


def read(file: str) -> dict[str, Any]:
    """What `written` made, as it was; empty where there is no file."""
    results = load(file)

    def longer(sums: Sums | str) -> Sums:
        return [(float(sign), 1.0) for sign in sums] if isinstance(sums, str) else sums

    return {**results, "runs": _each(results["runs"], longer)} if results else {}


def _each(runs: Mapping[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    return {key: {**one, "sums": {how: change(sums) for how, sums in one["sums"].items()}} for key, one in runs.items()}


def pooled(runs: Sequence[Sums]) -> list[tuple[float, float]]:
    """The same conversations of several seeds, each as one."""
    return [(sum(v for v, _ in of), sum(n for _, n in of)) for of in zip(*runs, strict=True)]


def compare(rival: Sequence[Sums], ours: Sequence[Sums], *, has_labels: bool) -> Interval:
    """By how much ours loses less: points of the error rate, or the share of the loss."""
    measure = bootstrap_difference if has_labels else bootstrap_interval
    return measure(pooled(rival), pooled(ours))


def table_of(of: str, results: Mapping[str, Any]) -> str:
    """Every system of one field over the seeds that are there, against full and lora, as Markdown."""
    runs: dict[str, dict[int, Sums]] = {}
    steps: dict[str, str] = {}
    for key, one in results["runs"].items():
        name, system, seed = key.split()
        if name == of:
            for how, sums in one["sums"].items():
                runs.setdefault(f"{system} {how}", {})[int(seed)] = sums
            steps[system] = f"{one['steps']} in {one['seconds']:.0f} s"
    has_labels = of != "talk"
    lines = [
        f"| {of} | {'accuracy' if has_labels else 'loss'} by seed | mean | less error than full | than lora | steps |",
        "|---|---|---|---|---|---|",
    ]
    for label, by_seed in runs.items():
        values = [1 - mean(sums) if has_labels else mean(sums) for sums in by_seed.values()]
        against = []
        for rival in ("full alone", "lora alone"):
            both = [seed for seed in by_seed if seed in runs.get(rival, {})]
            if not both or rival == label:
                against.append("")
                continue
            gain = compare(
                [runs[rival][seed] for seed in both], [by_seed[seed] for seed in both], has_labels=has_labels
            )
            against.append(f"{100 * gain.value:+.2f} ({100 * gain.low:+.2f} to {100 * gain.high:+.2f})")
        shown = " ".join(f"{value:.4f}" for value in values)
        lines.append(
            f"| {label} | {shown} | {statistics.mean(values):.4f} | {against[0]} | {against[1]} |"
            f" {steps[label.split()[0]]} |"
        )
    return "\n".join(lines)


def wanted(only: Sequence[str], among: Sequence[str]) -> list[str]:
    """Those of a kind that were named; all where none was."""
    named = [name for name in among if name in only]
    return named or list(among)


def main() -> None:
    """Run what is missing, then print tables."""
    asked = arguments()
    own = Settings(
        asked.seconds, asked.members, asked.rounds, asked.batch_size, asked.rank, asked.learning_rate, asked.full_rate,
        asked.tiny,
    )  # fmt: skip
    results = read(asked.out)
    if results.get("settings", own.facts()) != own.facts():
        raise SystemExit(f"{asked.out}: holds other settings ({results['settings']}). Take another --out.")
    results |= {"settings": own.facts(), "seeds": sorted({*results.get("seeds", []), *asked.seeds})}
    results.setdefault("surroundings", surroundings())
    results.setdefault("runs", {})
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    say(f"{results['surroundings']}, {card}, {torch.get_num_threads()} threads, seeds {asked.seeds}, {own}")
    fields = wanted(asked.only, FIELDS)
    only_cost = bool(asked.only) and set(asked.only) <= {COST}
    for name in [] if asked.table or only_cost else fields:
        of = open_field(name, is_tiny=own.is_tiny)
        say(f"{name}: {len(of.train):,} to learn from, {len(of.held)} to watch, {len(of.test):,} to judge by")
        for seed in asked.seeds:
            for system in wanted(asked.only, SYSTEMS):
                key = f"{name} {system} {seed}"
                if key in results["runs"]:
                    continue
                with quiet(), working(own, of) as ground:
                    results["runs"][key] = ROOMS[system](ground, seed)
                save(asked.out, written(results))
                found = results["runs"][key]
                told = ", ".join(f"{how} {mean(sums):.4f}" for how, sums in found["sums"].items())
                say(f"{key}: {found['steps']} steps in {found['seconds']:.1f} s, lost {told}")
    if not asked.table and (not asked.only or COST in asked.only) and "cost" not in results:
        with quiet():
            results["cost"] = cost(own, open_field("talk", is_tiny=own.is_tiny))
        save(asked.out, written(results))
    for name in fields:
        if any(key.startswith(f"{name} ") for key in results["runs"]):
            say(f"\n{table_of(name, results)}")
    if "cost" in results:
        say(f"\n{cost_table(results['cost'])}")


def arguments() -> argparse.Namespace:
    """What was asked for; --tiny takes other defaults."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])

    def rate(text: str) -> float | str:
        return text if text == "auto" else float(text)

    parser.add_argument("--tiny", action="store_true", help="a smoke test: seconds of training on made-up talk")
    parser.add_argument("--seconds", type=float, help="of training, a system (180)")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--only", nargs="+", default=(), choices=(*FIELDS, *SYSTEMS, COST))
    parser.add_argument("--members", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--learning-rate", type=rate, default="auto")
    parser.add_argument("--full-rate", type=rate, default="auto")
    parser.add_argument("--out", default=str(Path(__file__).with_suffix(".json")))
    parser.add_argument("--table", action="store_true", help="print what --out holds, run nothing")
    asked = parser.parse_args()
    defaults = {"seconds": 1.0, "seeds": [0], "members": 3, "rounds": 2} if asked.tiny else {
        "seconds": 180.0, "seeds": [0, 1, 2], "members": 10, "rounds": 5
    }  # fmt: skip
    for key, value in defaults.items():
        if getattr(asked, key) is None:
            setattr(asked, key, value)
    return asked


if __name__ == "__main__":
    main()
