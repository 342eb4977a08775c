"""What each shipped recipe reaches, as a user runs it; and whether the casual voice is a voice of its own.

python benchmarks/recipes.py [recipe …]        (all seven about 15 minutes on 2 cores; resumable: finished runs are
shown)

Runs lie in benchmarks/runs. Printed: seconds from command to result, held-out loss before and after (nats per
supervised and per content token), answers to the probes, labels beside their baselines. With casual_chat also a
polite LoRA of equal size, measured on the casual test talk, with a paired bootstrap interval over conversations; and
ten pairs for the README, the first five probes of each language.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import load, save, say, surroundings

RECIPES = (
    "casual_chat",
    "polite_prefix",
    "teacher_reft",
    "listener_embedding",
    "voice_classify",
    "rewrite_spoken",
    "topic_line",
)
RUNS = Path(__file__).parent / "runs"
POLITE = (
    "name=polite_lora",
    "data.train=[maltu:talk/polite.ko.jsonl, maltu:talk/polite.en.jsonl]",
    "evaluate.prompts=null",
)


def train(recipe: str, *overrides: str) -> float:
    """Run the command as a user would; seconds from start to result."""
    started = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "toolkit.train",
        f"maltu:recipes/{recipe}.yaml",
        *overrides,
        "--runs",
        str(RUNS),
        "--quiet",
    ]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


def facts_of(name: str) -> dict[str, Any]:
    """run.json of a run."""
    facts: dict[str, Any] = json.loads((RUNS / name / "run.json").read_text(encoding="utf-8"))
    return facts


def voice_margin() -> dict[str, dict[str, float]]:
    """By how much the casual adapter's content loss on casual test talk is below a polite one's, with its interval."""
    from toolkit.corpus.gather import gather
    from toolkit.evaluate.metrics import bootstrap_interval
    from toolkit.evaluate.talk import held_out_loss
    from toolkit.loaded import load_run
    from toolkit.recipe.read import read_recipe
    from toolkit.shipped import shipped

    recipe = read_recipe(shipped("recipes/casual_chat.yaml"))
    talks = list(gather(recipe.data, recipe.train.seed, None).test)
    sums = {}
    for name in ("polite_lora", "casual_chat"):
        run = load_run(RUNS / name, "cpu")
        rows = list(run.renderer.training_all(talks))
        sums[name] = held_out_loss(run.model, run.base.tokenizer, rows, [talk.lang for talk in talks])
    found = {}
    for lang, casual in {"all": sums["casual_chat"], **sums["casual_chat"].by_language()}.items():
        polite = sums["polite_lora"] if lang == "all" else sums["polite_lora"].by_language()[lang]
        interval = bootstrap_interval(polite.content_sums(), casual.content_sums())
        found[lang] = {"fall": interval.value, "low": interval.low, "high": interval.high}
    return found


def show(name: str, seconds: float) -> None:
    """The numbers of one run."""
    facts = facts_of(name)
    before, after = facts["results"]["before"], facts["results"]["after"]
    say(f"\n{name}: {seconds:.0f} s, {facts['fit']['steps']} steps, best at {facts['fit']['best_step']}")
    for metric, values in after.items():
        for lang, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, float):
                old = (before.get(metric) or {}).get(lang)
                change = f"  {100 * (value / old - 1):+.1f} %" if old and "loss" in metric else ""
                say(f"  {metric} {lang}: {'' if old is None else f'{old:.3f} -> '}{value:.3f}{change}")


def pairs() -> str:
    """Ten prompts, the first five of each language, with the answers before and after, as Markdown."""
    facts = facts_of("casual_chat")["results"]
    lines = ["| prompt | base | casual_chat |", "|---|---|---|"]
    for lang in ("ko", "en"):
        shown = [
            (b, a)
            for b, a in zip(facts["before"]["samples"], facts["after"]["samples"], strict=True)
            if a["lang"] == lang
        ]
        lines += [f"| {a['prompt']} | {cell(b['answer'])} | {cell(a['answer'])} |" for b, a in shown[:5]]
    return "\n".join(lines)


def cell(text: str) -> str:
    """A text that stays in its table cell."""
    return " ".join(text.split()).replace("|", "\\|") or "(nothing)"


def main() -> None:
    """Run what is named, or everything."""
    results = load(__file__) or {"seconds": {}}
    results["surroundings"] = surroundings()
    say(str(results["surroundings"]))
    for recipe in sys.argv[1:] or RECIPES:
        if recipe not in results["seconds"] or not (RUNS / recipe).exists():
            results["seconds"][recipe] = train(recipe)
        show(recipe, results["seconds"][recipe])
        results[recipe] = {
            k: v for k, v in facts_of(recipe)["results"]["after"].items() if k not in ("samples", "confusion")
        }
        save(__file__, results)
        if recipe == "casual_chat":
            train(recipe, *POLITE)
            results["voice"] = voice_margin()
            save(__file__, results)
            say(f"  against a polite LoRA of equal size on casual test talk: {results['voice']}")
            say(pairs())


if __name__ == "__main__":
    main()
