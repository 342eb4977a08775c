"""What ten members of a stack cost against ten fit/one runs after each other: a part of benchmarks/ten_adapters.py."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ten_world import Field, Ground, Settings, fit_full, now, speed_of, working

from toolkit.ensemble.experts import Hooks, Seen, Task, fit_members

SHAPES = {"to 128": (2, 60), "above": (8, 110)}  # conversations a step, tokens each at most
STEPS, ROUNDS = 24, 3


def cost(settings: Settings, of: Field) -> dict[str, Any]:
    """Seconds a step of all members, and whole, of a stack and of as many fit/one runs."""
    n_rounds, steps = (1, 8) if settings.is_tiny else (ROUNDS, STEPS)
    found: dict[str, Any] = {}
    for shape, (batch_size, longest) in SHAPES.items():
        with working(settings, of) as ground:
            rows = [row for row in ground.pairs(of.train) if len(row[0]) <= longest]
            recipes = [ground.recipe("lora", steps, seed, batch_size) for seed in range(settings.members)]
            tasks = [Task(f"m{seed}", recipe, rows, ()) for seed, recipe in enumerate(recipes)]
            tokens = batch_size * sum(len(ids) for ids, _ in rows) / len(rows)
            ways: dict[str, list[dict[str, float]]] = {"planned": [], "all at once": [], "fit/one": []}
            for _ in range(n_rounds):
                ways["planned"].append(in_a_stack(ground, tasks, None))
                ways["all at once"].append(in_a_stack(ground, tasks, settings.members))
                ways["fit/one"].append(one_by_one(ground, tasks))
        found[shape] = {"tokens": tokens, **ways}
    return found


def in_a_stack(ground: Ground, tasks: Sequence[Task], side_by_side: int | None) -> dict[str, float]:
    """One training of all."""
    marks: list[tuple[float, int]] = []

    def watch(seen: Sequence[Seen]) -> None:
        marks.append((now(ground), (marks[-1][1] if marks else 0) + len(seen)))

    run, started = ground.run("run"), now(ground)
    hooks = Hooks(watch=watch)
    fit_members(tasks, ground.base, run, plan_of=ground.plan_of, side_by_side=side_by_side, hooks=hooks)
    return {"whole": now(ground) - started, "step": len(tasks) / speed_of(marks)}


def one_by_one(ground: Ground, tasks: Sequence[Task]) -> dict[str, float]:
    """The same adapters through fit/one, after each other; their bases are loaded outside of the clock."""
    whole = steady = 0.0
    for task in tasks:
        marks: list[tuple[float, int]] = []
        rows, recipe = task.rows, task.recipe
        _, seconds = fit_full(
            ground,
            rows,
            recipe,
            stepped=lambda marks=marks: marks.append((now(ground), len(marks) + 1)),  # type: ignore[misc]
        )
        whole, steady = whole + seconds, steady + 1 / speed_of(marks)
    return {"whole": whole, "step": steady}


def cost_table(found: Mapping[str, Any]) -> str:
    """Ratios within each round."""
    lines = ["| tokens a member and step | members | of the steps of fit/one | whole |", "|---|---|---|---|"]
    for one in found.values():
        for way in ("planned", "all at once"):
            ratios = {
                key: [ours[key] / theirs[key] for ours, theirs in zip(one[way], one["fit/one"], strict=True)]
                for key in ("step", "whole")
            }
            told = {key: f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" for key, of in ratios.items()}
            lines.append(f"| {one['tokens']:.0f} | {way} | {told['step']} | {told['whole']} |")
    return "\n".join(lines)
