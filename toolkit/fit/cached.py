"""Rendered rows, kept in the user's cache by the hash of all that they depend on: the second process that trains on a
corpus, and the next search over it, read token ids instead of talk.
"""

import contextlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from toolkit import disk
from toolkit.bases.load import LoadedBase
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.render import Rendered
from toolkit.errors import RunError
from toolkit.fit.inputs import version_of
from toolkit.fit.plan import max_length
from toolkit.fit.prepare import PARTS, Rows, make_renderer, render_rows
from toolkit.recipe.model import Recipe

VERSION = 1
MOST_HELD = 3  # lengths beside the recipe's own, where trials try several


class CachedRows:
    """The rows of one recipe's data on one base, at any length. Nothing is read before it is asked for.

    `data`: SHA-256 of every file by name, as `inputs_of` gives it; data of a hub has none, and is never cached.
    """

    def __init__(self, recipe: Recipe, base: LoadedBase, data: Mapping[str, str]) -> None:
        self._recipe, self._base, self._data = recipe, base, dict(data)
        self._held: dict[int, Rows] = {}

    @cached_property
    def corpus(self) -> Corpus:
        """The talk itself. Raises: DataError."""
        return gather(self._recipe.data, self._recipe.train.seed, None)

    def of(self, recipe: Recipe) -> Rows:
        """The rows at this recipe's length; in everything else that makes rows it is the recipe given at first.

        Raises: DataError where the talk does not do; RecipeError for a length that the base does not hold.
        """
        length, own = max_length(recipe, self._base.context), max_length(self._recipe, self._base.context)
        if length not in self._held:
            is_own = length == own
            made = (self._read(length) if is_own else None) or self._make(recipe, length, is_kept=is_own)
            for old in [one for one in self._held if one != own][: 1 - MOST_HELD]:
                del self._held[old]
            self._held[length] = made
        return self._held[length]

    def _make(self, recipe: Recipe, length: int, *, is_kept: bool) -> Rows:
        rows = render_rows(recipe, make_renderer(recipe, self._base), self.corpus)
        file = self._file(length) if is_kept else None
        if file is not None:
            with contextlib.suppress(RunError):  # a cache that cannot be written costs time, never the run
                disk.make_folder(file.parent)
                disk.write_file(file, lambda target: save_file(_tensors(rows), target, {"facts": _facts(rows)}))
        return rows

    def _read(self, length: int) -> Rows | None:
        file = self._file(length)
        if file is None:
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                facts = json.loads(opened.metadata()["facts"])
                return _rows({name: opened.get_tensor(name) for name in opened.keys()}, facts)
        except (OSError, KeyError, ValueError, RuntimeError, TypeError, SafetensorError):
            return None  # not there, or damaged: rendered again

    def _file(self, length: int) -> Path | None:
        if any(name.startswith("hub:") for name in self._data):
            return None
        recipe, base = self._recipe, self._base
        told = recipe.data.model_dump(mode="json")
        told["train"] = list(recipe.data.train_files)  # weights are applied later
        parts: list[Any] = [
            VERSION,
            version_of("maltu"),
            version_of("transformers"),
            recipe.task,
            told,
            self._data,
            recipe.train.seed,
            base.hash,
            base.template,
            length,
        ]
        key = disk.hash_text(json.dumps(parts, sort_keys=True, ensure_ascii=False))
        return disk.cache_folder() / "rows" / f"{key}.safetensors"


def _tensors(rows: Rows) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {"entry": torch.tensor(rows.entry, dtype=torch.long)}
    for part in PARTS:
        some: list[Rendered] = getattr(rows, part)
        found[f"{part}.lengths"] = torch.tensor([len(row.input_ids) for row in some], dtype=torch.long)
        found[f"{part}.talks"] = torch.tensor(rows.kept_talks[part], dtype=torch.long)
        for name in ("input_ids", "labels", "is_end"):
            flat = [value for row in some for value in getattr(row, name)]
            found[f"{part}.{name}"] = torch.tensor(flat, dtype=torch.bool if name == "is_end" else torch.int32)
    return found


def _facts(rows: Rows) -> str:
    return json.dumps({"dropped": rows.dropped})


def _rows(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Rows:
    parts: dict[str, list[Rendered]] = {}
    for part in PARTS:
        lengths = tensors[f"{part}.lengths"].tolist()
        cut = {name: torch.split(tensors[f"{part}.{name}"], lengths) for name in ("input_ids", "labels", "is_end")}
        parts[part] = [
            Rendered(ids.tolist(), labels.tolist(), ends.tolist())
            for ids, labels, ends in zip(*(cut[name] for name in ("input_ids", "labels", "is_end")), strict=True)
        ]
    talks = {part: tensors[f"{part}.talks"].tolist() for part in PARTS}
    return Rows(**parts, dropped=dict(facts["dropped"]), kept_talks=talks, entry=tensors["entry"].tolist())
