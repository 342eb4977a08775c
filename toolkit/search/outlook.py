"""What a search would do, before it does it: its space, how it looks for values, how it uses this machine."""

from collections.abc import Iterator

from rich.console import Console

from toolkit.fit.prepare import weigh
from toolkit.fit.preview import Previewed
from toolkit.recipe.model import Recipe
from toolkit.recipe.search import Dimension, dimensions
from toolkit.recipe.space import Range, Search, without_password
from toolkit.search.split import count_cores, limits_of, split_machine, trials_together
from toolkit.search.trials import say_value

WEIGHT_BYTES = 4  # of a parameter in memory, on the CPU where processes are counted


def show_outlook(recipe: Recipe, seen: Previewed, console: Console) -> None:
    """Print it below the preview of one trial."""
    assert recipe.search is not None  # who asks looked
    console.rule("the search")
    for name, value in (*_rules(recipe.search), *_machine(recipe, seen)):
        console.print(f"{name:<24}{value}", markup=False, soft_wrap=True)
    console.print("space")
    for dimension in dimensions(recipe):
        console.print(f"  {dimension.name:<30}{say_values_of(dimension)}", markup=False, soft_wrap=True)


def say_values_of(dimension: Dimension) -> str:
    """The values of a dimension in words."""
    values = dimension.values
    if not isinstance(values, Range):
        return ", ".join(say_value(value) for value in values)
    text = f"{say_value(values.low)} to {say_value(values.high)}"
    return text + (", log" if values.log else "") + (f", in steps of {say_value(values.step)}" if values.step else "")


def _rules(search: Search) -> Iterator[tuple[str, str]]:
    yield "sampler", search.sampler
    yield "pruner", search.pruner
    ends = [f"{search.trials:,}"]
    ends += [] if search.minutes is None else [f"{search.minutes:g} minutes at most"]
    ends += [] if search.patience is None else [f"until {search.patience:,} in a row are no better"]
    yield "trials", ", ".join(ends)
    yield (
        "storage",
        "search/journal.log in the run folder" if search.storage is None else without_password(search.storage),
    )


def _machine(recipe: Recipe, seen: Previewed) -> Iterator[tuple[str, str]]:
    split = split_machine(recipe, seen.place, count_cores(), WEIGHT_BYTES * seen.shape.parameters)
    longest = max(len(row.input_ids) for row in (*seen.rows.train, *seen.rows.valid))
    limits = limits_of(seen.shape, seen.place, seen.plan, longest)
    rows = [(row.input_ids, row.labels) for row in weigh(recipe, seen.rows)]
    together = trials_together(recipe, seen.place, limits, rows)
    yield "processes", f"{split.workers} here, of {split.threads} thread{'s' * (split.threads != 1)}"
    yield "trials side by side", f"{together} in each process"
