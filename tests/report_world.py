"""Run folders that nobody trained: everything that a report tells of, made up in milliseconds."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolkit import disk
from toolkit.bundle import Run

RECIPE = """
name: {name}
base: {{model: spoken-mini}}
data: {{train: [내대화.jsonl]}}
adapter: {{kind: lora, rank: 4}}
train: {{epochs: 5}}
"""
PROMPTS = (("ko", "오늘 뭐 먹지?"), ("ko", "비 온다"), ("en", "what's for lunch"), ("en", "rain again"))


def samples(said: str = "그래") -> list[dict[str, Any]]:
    """An answer to each of PROMPTS, all different."""
    return [
        {"name": f"p{at}", "lang": lang, "prompt": prompt, "answer": f"{said} {at}", "finish": "stop", "n_tokens": 3}
        for at, (lang, prompt) in enumerate(PROMPTS)
    ]


def measured(loss: float, said: str = "그래", **more: Any) -> dict[str, Any]:
    """What a judge finds."""
    return {
        "loss": {"all": loss, "ko": loss + 0.2, "en": loss - 0.2},
        "bits per byte": {"all": loss / 2, "ko": loss / 2, "en": loss / 2},
        "repetition": {"all": 0.0},
        "ended": {"all": 1.0},
        "samples": samples(said),
        **more,
    }


def facts(name: str = "tiny") -> dict[str, Any]:
    """run.json of a run of one adapter in which nothing is to be doubted."""
    return {
        "status": "finished",
        "task": "chat",
        "command": f"python -m toolkit.train {name}.yaml train.epochs=5",
        "inputs": {
            "recipe": {
                "name": name,
                "base.model": "spoken-mini",
                "data.train": ["내대화.jsonl"],
                "data.test": 0.1,
                "adapter.kind": "lora",
                "adapter.rank": 4,
                "train.epochs": 5.0,
                "train.seed": 0,
                "evaluate.prompts": "maltu:probes.jsonl",
            },
            "data": {"내대화.jsonl": "a" * 64, "maltu:probes.jsonl": "b" * 64},
            "base": "c" * 64,
        },
        "plan": {"learning_rate": 0.003, "max_length": 512},
        "surroundings": {
            "started": "2025-11-24T10:00:00Z",
            "device": "cpu",
            "threads": 2,
            "processes": 1,
            "versions": {"maltu": "0.1.0", "torch": "2.13.0"},
        },
        "base": {"model": "spoken-mini"},
        "data": {
            "loaded": 100,
            "kept": 99,
            "dropped": {"too_long": 1},
            "fixed": {"unicode": 3},
            "masked": {"phone": 2},
            "parts": {"train": 60, "valid": 9, "test": 30},
            "tokens": {"train": {"median": 41, "nine_in_ten": 77, "longest": 123, "total": 4321}},
            "spoken": {
                "user": {"all": {"n": 9, "mean": 0.81, "share": 0.9}, "ko": {"n": 9, "mean": 0.81, "share": 0.9}}
            },
        },
        "fit": {"stopped": "done", "steps": 40, "best_step": 40, "best_loss": 4.1, "seconds": 20.0, "n_tokens": 9000},
        "memory_mb": 812.5,
        "results": {"before": measured(5.0, "네"), "after": measured(4.0)},
        "labels": [],
    }


def curve(n: int = 40, first: float = 5.0, last: float = 4.0) -> list[dict[str, float]]:
    """Lines of metrics.jsonl: a falling loss, and one held out ten times."""
    lines = []
    for step in range(1, n + 1):
        loss = first + (last - first) * step / n
        lines.append({"step": step, "loss": loss + 0.1 * (step % 3)})
        if step % max(1, n // 10) == 0:
            lines.append({"step": step, "valid_loss": loss})
    return lines


def make_run(
    path: Path, told: Mapping[str, Any] | None = None, lines: Sequence[Mapping[str, Any]] | None = None
) -> Run:
    """A finished run at `path`."""
    run = Run(path)
    disk.make_folder(path)
    run.update(**(facts(path.name) if told is None else told))
    run.recipe_file.write_text(RECIPE.format(name=path.name), encoding="utf-8")
    written = "".join(json.dumps(line) + "\n" for line in (curve() if lines is None else lines))
    (path / "metrics.jsonl").write_text(written, encoding="utf-8")
    return run


def with_search(run: Run) -> None:
    """Make it the result of a search of six trials."""
    values = {"train.learning_rate": 0.0099, "train.batch_size": 4}
    best = {"number": 1, "loss": 4.1, "values": values, "seconds": 9.0}
    run.update(
        search={
            "name": run.name,
            "storage": None,
            "best": best,
            "best_trials": [best],
            "trials": {"complete": 3, "pruned": 2, "failed": 1, "lost": 0, "running": 0},
            "steps": {"taken": 150, "planned": 240, "saved_by_pruning": 90, "saved_share": 0.375},
            "seconds": 60.0,
            "kinds": [
                {"kind": "lora", "loss": 4.1, "number": 1, "state": "complete", "ended": 6, "parameters": 9,
                 "seconds": 9.0, "memory_mb": 5.0}
            ],
            "importances": {"train.learning_rate": 0.75, "train.batch_size": 0.25},
            "importances_note": "From 12 trials: a rough order, not a measurement.",
        }
    )  # fmt: skip
    rows = ["number,state,loss,lowest_loss,train.learning_rate,train.batch_size,steps,memory_mb,reason"]
    rows += [
        "0,complete,4.5,4.5,0.001,8,40,5.0,",
        "1,complete,4.1,4.1,0.0099,4,40,5.0,",
        "2,pruned,,4.9,0.0005,16,10,5.0,",
        "3,pruned,,4.8,0.007,16,10,5.0,",
        "4,failed,,,0.01,8,1,5.0,<b>boom</b>",
        "5,complete,4.2,4.2,0.005,4,40,5.0,",
    ]
    disk.make_folder(run.path / "search")
    (run.path / "search" / "trials.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (run.path / "search" / "plots.html").write_text("<p>plots</p>", encoding="utf-8")


def with_experts(run: Run, kind: str, how: str, report: Mapping[str, Any], *, helps: bool = True) -> None:
    """Make it a combination of two experts."""
    fit = {"steps": 20, "seconds": 9.0, "n_tokens": 4000, "best_loss": 4.2}
    experts = {
        "반말": {"adapter": "lora", "run": None, "fit": fit, "results": measured(4.3, "응")},
        "polite": {"adapter": "prefix", "run": "runs/old", "fit": None, "results": measured(4.6, "네네")},
    }
    sentence = f"The {kind} ({how}) {'helps' if helps else 'does not help'}: loss 4 against 4.3 of 반말."
    run.update(
        experts=experts,
        best="반말",
        combination={
            "kind": kind,
            "how": how,
            "members": ["반말", "polite"],
            "weights": {"반말": 0.7, "polite": 0.3},
            "report": dict(report),
            "verdict": {
                "best": "반말",
                "measure": "loss",
                "of_best": 4.3,
                "of_combination": 4.0,
                "gain": 0.07,
                "low": 0.05 if helps else -0.01,
                "high": 0.09,
                "n": 30,
                "helps": helps,
                "hurts": False,
                "sentence": sentence,
            },
            "on": {
                "반말": {"combination": 4.1, "반말": 4.0, "polite": 4.9},
                "polite": {"combination": 4.2, "반말": 4.8, "polite": 4.1},
            },
            "oracle": 3.95,
        },
    )
