"""Searches that cannot be, given to the command: told with exit code 2 before anything is loaded or written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["search.space={train.lerning_rate: [0.1]}"],
            ["search.space.train.lerning_rate: not a key of train. Did you mean 'learning_rate'?"],
        ),
        (["search.space={train.epochs: {low: 3, high: 1}}"], ["low (3) must be below high (1). Swap them"]),
        (
            ["search.space={train.learning_rate: {low: 0, high: 0.1, log: true}}"],
            ["log wants low above 0, not 0. Write a small number"],
        ),
        (
            [
                "search.sampler=grid",
                "search.space.train.batch_size={low: 1, high: 1000, step: 1}",
                "search.space.train.seed={low: 1, high: 1000, step: 1}",
            ],
            ["a grid of 1,000,000 points; 10,000 are the most"],
        ),
        (["search.trials=4"], ["search.space: is missing. Write space: {train.learning_rate: {low: 1e-4"]),
        (
            ["search.space={base.model: [a, b]}", "search.storage=mysql://me:secret@host/db"],
            [
                "2 problems",
                "all trials share one base",
                "search.storage=mysql://me:***@host/db: must be null, sqlite:///FILE",
            ],
        ),
        (["search.space={train.epochs: [1]}", "data.valid=0"], ["so a search has nothing to compare trials by"]),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_anything_is_written(
    command: Callable[..., Any], here: Path, overrides: list[str], parts: list[str]
) -> None:
    said = command(*overrides)
    said.refuses("tiny.yaml: ", *parts)
    assert "secret" not in said.err + said.out
    assert not (here / "runs").exists()


def test_a_file_without_weight_is_refused_with_its_line(command: Callable[..., Any], here: Path) -> None:
    recipe = here / "tiny.yaml"
    recipe.write_text(recipe.read_text().replace("[talk.jsonl]", "[{path: talk.jsonl, weight: -1}]"))
    command().refuses("line 4  data.train.0.weight: must be more than 0, not -1")
