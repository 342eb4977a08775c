"""What several tests of the toolkit share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.read import read_recipe

HEAD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"


@pytest.fixture
def problems(tmp_path: Path) -> Callable[..., list[str]]:
    """The problems of a recipe: HEAD with some lines after it, and overrides."""

    def read(more: str = "", *overrides: str, head: str = HEAD) -> list[str]:
        file = tmp_path / "r.yaml"
        file.write_text(head + more, encoding="utf-8")
        with pytest.raises(RecipeError) as caught:
            read_recipe(file, overrides)
        assert caught.value.exit_code == 2
        return [str(problem) for problem in caught.value.problems]

    return read
