"""What the tests of choosing a base share: results that were never measured, and a runner that hands them out."""

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolkit.choose.job import Job
from toolkit.choose.result import Result
from toolkit.recipe.model import Recipe

MODEL = "spoken-mini"


def some_result(
    model: str, mean: float, *, n_talks: int = 40, noise: float = 0.3, seed: int = 0, own: float = 0.0, **more: Any
) -> Result:
    """Talks of 100 bytes around a mean in bits per byte; `noise` is the talks' own, shared by all results of a seed,
    `own` that of this result alone."""
    shared = np.random.default_rng(seed).normal(0.0, noise, n_talks)
    alone = np.random.default_rng(zlib.crc32(model.encode())).normal(0.0, own, n_talks) if own else np.zeros(n_talks)
    values = mean + shared + alone
    talks = {str(number): (100 * float(value), 300.0, 100.0) for number, value in enumerate(values)}
    told: dict[str, Any] = {
        "key": "", "model": model, "base_hash": "", "device": "cpu", "minutes": 3.0, "measure": "bits per byte",
        "talks": talks, "n_unknown": 0, "rates": ({"learning_rate": 0.003, "steps": 9, "best_step": 9, "loss": 2.0},),
        "learning_rate": 0.003, "seconds": 120.0, "steps": 9, "steps_asked": 30, "n_tokens": 6000,
        "parameters": 5_000_000,
        "context": 512, "template_from": "base", "memory_mb": 400.0, "wall_s": 150.0,
        "numbers": {"chrf": {"all": 12.5, "ko": 12.0}}, "spoken": {"before all": 0.1, "after all": 0.4},
        "first_token_ms": 20.0, "tokens_per_s": 90.0, "bytes_per_s": 300.0,
    }  # fmt: skip
    return Result(**{**told, **more})


class Handing:
    """A runner (toolkit.choose.run.Runner) that measures nothing: results by model, or why there is none."""

    def __init__(self, by_model: Mapping[str, Result | str | BaseException]) -> None:
        self.by_model, self.asked = dict(by_model), list[tuple[str, float]]()

    def __call__(self, recipe: Recipe, job: Job) -> Result | str:
        self.asked.append((job.model, job.minutes))
        found = self.by_model[job.model]
        if isinstance(found, BaseException):
            raise found
        if isinstance(found, str):
            return found
        made = Result(**{**vars(found), "key": job.key, "minutes": job.minutes})
        made.write(Path(job.out))
        return made


def write_recipe(folder: Path, candidates: Sequence[str], more: str = "", **keys: Any) -> Path:
    """pick.yaml on talk.jsonl in this folder."""
    several = {"candidates": list(candidates), "minutes_each": 3.0, **keys}
    listed = ", ".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in several.items())
    (folder / "pick.yaml").write_text(
        f"name: 말투\nbase: {{{listed}}}\ndata: {{train: [talk.jsonl], clean: {{near_duplicates: null}}}}\n"
        f"evaluate: {{prompts: null}}\n{more}",
        encoding="utf-8",
    )
    return folder / "pick.yaml"
