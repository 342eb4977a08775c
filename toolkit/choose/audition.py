"""One candidate from beginning to end: loaded, taught for some minutes, measured. A process of its own does it, so that
memory is counted and given back, and one that dies takes nobody along.

    python -m toolkit.choose.audition JOB.json
"""

import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from toolkit import disk
from toolkit.adapters.kinds import kind_in_folder
from toolkit.bases.encoder import is_encoder
from toolkit.bases.load import LoadedBase, load_base
from toolkit.choose.encoder import audition_encoder
from toolkit.choose.job import Job, recipe_of
from toolkit.choose.lesson import Learned, learn
from toolkit.choose.measure import speeds
from toolkit.choose.result import Result
from toolkit.choose.stand import Stand, margins
from toolkit.errors import MaltuError
from toolkit.evaluate.spoken import spoken_numbers
from toolkit.fit.cached import CachedRows
from toolkit.fit.memory import peak_mb
from toolkit.fit.prepare import make_renderer, place_here, weight_dtype
from toolkit.pages import keep_pages
from toolkit.quiet import quiet
from toolkit.recipe.model import Base, Recipe
from toolkit.stack.adapter import write_adapter


def audition(recipe: Recipe, job: Job, wants_stop: Callable[[], bool] = lambda: False) -> Result:
    """Load, teach and measure one candidate. `recipe`: that of all of them.

    Raises: BaseError, AdapterError, DataError or TrainingError for one that cannot be compared, with the reason.
    """
    started = time.monotonic()
    own = recipe_of(recipe, job.model)
    assert isinstance(own.base, Base)  # recipe_of made it
    if own.task == "classify" and is_encoder(own.base):
        return audition_encoder(own, job, wants_stop)
    device = place_here().device
    base = load_base(own.base, device, weight_dtype(own, device))
    cached = CachedRows(own, base, job.data)
    rows, renderer = cached.of(own), make_renderer(own, base)
    stand = Stand(own, base, renderer, cached.corpus, rows)
    bare = stand.noted(base.model)
    before, bits_before = stand.sums(bare), stand.bits(bare)
    with tempfile.TemporaryDirectory() as made:
        learned = learn(own, base, rows, job.minutes, Path(made) / "checkpoints", wants_stop)
        memory = peak_mb(base.device)
        worn = _worn(base, learned, Path(made) / "adapter")
        after, numbers = stand.measured(worn)
        bits_after = stand.bits(after)
        speed = speeds(worn, base, stand.prompt_ids())
    return Result(
        key=job.key,
        model=job.model,
        base_hash=base.hash,
        device=device,
        minutes=job.minutes,
        measure=stand.measure,
        talks=stand.talks(stand.sums(after), before),
        n_unknown=sum(row.n_unknown for row in stand.rows),
        rates=learned.rates,
        learning_rate=learned.learning_rate,
        seconds=learned.seconds,
        steps=learned.steps,
        steps_asked=learned.steps_asked,
        n_tokens=learned.n_tokens,
        parameters=sum(parameter.numel() for parameter in base.model.parameters()),
        context=base.context,
        template_from=base.template_from,
        memory_mb=memory,
        wall_s=time.monotonic() - started,
        numbers=numbers | spoken_numbers(after.samples, bits_after) if bits_after else numbers,
        spoken=margins("before", bits_before) | margins("after", bits_after),
        first_token_ms=speed[0] if speed else None,
        tokens_per_s=speed[1] if speed else None,
        bytes_per_s=speed[1] * stand.bytes_per_token() if speed else None,
        notes=stand.notes(),
    )


def _worn(base: LoadedBase, learned: Learned, folder: Path) -> nn.Module:
    folder.mkdir()
    write_adapter(learned.adapter, folder, base.model, base=base.source, base_hash=base.hash)
    worn = kind_in_folder(folder).load(base.model, folder, base_hash=base.hash)
    worn.eval()
    return worn


def why_failed(error: BaseException) -> str:
    """What is said of a candidate that could not be compared."""
    if isinstance(error, MaltuError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory. Take base.quantize=nf4 on a GPU, a shorter train.max_length, or a smaller base"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def main(argv: Sequence[str]) -> int:
    """Do the job in a file, and leave the result or the reason beside it. Returns the exit code."""
    told = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    parent = os.getppid()
    job = Job(**told)
    from toolkit.recipe.read import read_recipe

    keep_pages()  # as training does
    with quiet():
        try:
            recipe = read_recipe(Path(job.recipe), to_run=False, to_choose=True)
            audition(recipe, job, lambda: os.getppid() != parent).write(Path(job.out))
        except Exception as error:  # whatever its files, its code or its numbers do: it is named, the others go on
            traceback.print_exc(file=sys.stderr)
            disk.write_json(job.failed, {"failed": why_failed(error)})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
