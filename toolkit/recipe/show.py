"""A recipe written out again, and the JSON schema of recipes for editors.

`python -m toolkit.recipe.show > recipes/recipe.schema.json` writes the schema anew.
"""

import json
import sys
from typing import Any

import yaml

from toolkit.recipe.model import Recipe
from toolkit.recipe.space import without_password
from toolkit.recipe.tree import RecipeDumper


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with every key written out; reading it again gives an equal recipe."""
    values = _plain(recipe.model_dump(mode="python"))
    return yaml.dump(values, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=118)


def without_secrets(recipe: Recipe) -> Recipe:
    """The recipe as it may be shown and written down: with *** for the password of a search's storage."""
    search = recipe.search
    if search is None or search.storage is None:
        return recipe
    return recipe.model_copy(update={"search": search.model_copy(update={"storage": without_password(search.storage)})})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def schema() -> str:
    """The JSON schema of a recipe, as recipes/recipe.schema.json keeps it."""
    described = Recipe.model_json_schema()
    described["required"].remove("data")  # experts may each name their own files
    del described["$defs"]["Data"]["required"]
    needs_files = {"required": ["data"], "properties": {"data": {"required": ["train"]}}}
    described |= {"if": {"required": ["experts"]}, "else": needs_files}
    described = {"$schema": "https://json-schema.org/draft/2020-12/schema", **described, "title": "A recipe of Maltu"}
    return json.dumps(described, ensure_ascii=False, indent=2) + "\n"


if __name__ == "__main__":
    sys.stdout.write(schema())
