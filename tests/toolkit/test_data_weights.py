"""Weights of training files: each talk knows its file, and an epoch holds its rows as often as the weight says."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from toolkit.bases.load import LoadedBase
from toolkit.corpus.clean import CleanReport
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.store import Talks
from toolkit.corpus.talk import Talk, Turn
from toolkit.fit.inputs import changes, inputs_of
from toolkit.fit.prepare import Rows, render_rows, training_rows, weigh
from toolkit.recipe.model import Clean, Data, Recipe, WeightedFile
from toolkit.recipe.search import with_values

N = 20
NO_BASE = cast(LoadedBase, SimpleNamespace())  # only a base from scratch is looked at


def write(path: Path, *asked: str) -> str:
    rows = [{"prompt": text, "completion": f"그래, {text}"} for text in asked]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def recipe_of(*train: Any, **train_section: Any) -> Recipe:
    files = [one if isinstance(one, dict) else {"path": one} for one in train]
    base, data = {"model": "spoken-mini"}, {"train": files, "clean": {"near_duplicates": None}}
    return Recipe.model_validate({"name": "가중치", "base": base, "data": data, "train": train_section})


def rows_of(*entries: int) -> Rows:
    rows = [Rendered([number, number], [-100, number], [False, True]) for number in range(len(entries))]
    kept = {"train": list(range(len(entries))), "valid": [], "test": []}
    return Rows(rows, [], [], {}, kept, list(entries))


def seen(recipe: Recipe, rows: Rows) -> list[int]:
    return [ids[0] for ids, _ in training_rows(recipe, NO_BASE, rows)]


def test_each_talk_to_learn_from_knows_its_file(tmp_path: Path) -> None:
    names = [write(tmp_path / f"{letter}.jsonl", *(f"{letter} {i}번" for i in range(N))) for letter in "가나다"]
    train = (names[0], WeightedFile(path=names[1], weight=2.0), names[2])
    corpus = gather(Data(train=train, clean=Clean(near_duplicates=None)), 0, None)
    found = [(int(place), talk.source.split(":")[0]) for place, talk in zip(corpus.entry, corpus.train, strict=True)]
    assert len(found) == 48 and {place for place, _ in found} == {0, 1, 2}
    assert all(names[place] == file for place, file in found)


def test_held_out_files_do_not_shift_the_places(tmp_path: Path) -> None:
    held = write(tmp_path / "h.jsonl", "시험 하나", "시험 둘")
    train = (write(tmp_path / "a.jsonl", "하나", "둘"), write(tmp_path / "b.jsonl", "셋"))
    corpus = gather(Data(train=train, valid=(held,), test=0), 0, None)
    assert [(talk.turns[0].content, int(place)) for talk, place in zip(corpus.train, corpus.entry, strict=True)] == [
        ("하나", 0),
        ("둘", 0),
        ("셋", 1),
    ]


def test_of_duplicates_the_first_file_counts(tmp_path: Path) -> None:
    train = (write(tmp_path / "a.jsonl", "하나", "둘"), write(tmp_path / "b.jsonl", "둘", "셋"))
    corpus = gather(Data(train=train, valid=0, test=0), 0, None)
    assert corpus.entry.tolist() == [0, 0, 1]


def test_the_rows_of_a_part_keep_their_files_when_rendering_drops_some() -> None:
    talks = [Talk((Turn("user", f"{i}"), Turn("assistant", "응")), f"f:{i}") for i in range(4)]
    report = cast(CleanReport, None)
    nothing = Talks([])
    corpus = Corpus(Talks(talks), nothing, nothing, report, cast(Any, [0, 0, 1, 2]))

    class DropsTheSecond:
        def training_all(self, talks: Talks) -> list[Rendered]:
            rows = [Rendered([i], [i], [True]) for i in range(len(talks))]
            return [Rendered([], [], [], dropped="too_long") if i == 1 else row for i, row in enumerate(rows)]

    recipe = recipe_of("a", "b", "c")
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"clean": Clean(max_dropped=1)})})
    assert render_rows(recipe, cast(Renderer, DropsTheSecond()), corpus).entry == [0, 1, 2]


def test_weights_of_one_change_nothing() -> None:
    rows = rows_of(0, 1, 0, 1, 1)
    assert seen(recipe_of("a", "b"), rows) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("weight", "copies"), [(2, {2: N}), (1.5, {1: N // 2, 2: N // 2}), (0.25, {1: 5}), (3, {3: N})]
)
def test_a_row_is_seen_as_often_as_its_file_weighs(weight: float, copies: dict[int, int]) -> None:
    rows = rows_of(*[0] * N, *[1] * N)
    counts = Counter(seen(recipe_of("a", {"path": "b", "weight": float(weight)}), rows))
    assert [counts[i] for i in range(N)] == [1] * N
    assert Counter(counts[i] for i in range(N, 2 * N) if counts[i]) == copies


def test_the_draw_follows_from_the_seed_and_the_file() -> None:
    def drawn(seed: int) -> tuple[list[int], list[int]]:
        half = recipe_of({"path": "a", "weight": 0.5}, {"path": "b", "weight": 0.5}, seed=seed)
        rows = seen(half, rows_of(*[0] * N, *[1] * N))
        return [i for i in rows if i < N], [i - N for i in rows if i >= N]

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)
    assert drawn(3)[0] != drawn(3)[1]


def test_copies_come_in_passes_and_not_side_by_side() -> None:
    assert seen(recipe_of({"path": "a", "weight": 2.0}, "b"), rows_of(0, 1, 0)) == [0, 1, 2, 0, 2]


def test_a_file_of_little_weight_keeps_a_row() -> None:
    assert len(seen(recipe_of("a", {"path": "b", "weight": 0.001}), rows_of(0, 0, 1, 1, 1))) == 3


def test_a_trial_weighs_the_rows_of_the_run_by_its_own_recipe() -> None:
    run, rows = recipe_of("a", {"path": "b", "weight": 2.0}), rows_of(0, 1)
    trial = with_values(run, {"data.train.0.weight": 3.0, "data.train.1.weight": 1.0})
    assert (seen(run, rows), seen(trial, rows)) == ([0, 1, 1], [0, 1, 0, 0])
    assert [row.input_ids[0] for row in weigh(trial, rows)] == seen(trial, rows)


def test_a_weighted_file_is_hashed_like_any_other(tmp_path: Path) -> None:
    plain, weighted = write(tmp_path / "a.jsonl", "하나"), write(tmp_path / "b.jsonl", "둘")
    recipe = recipe_of(plain, {"path": weighted, "weight": 2.0})
    before = inputs_of(recipe)
    assert {plain, weighted} <= before["data"].keys() and len(before["data"][weighted]) == 64
    write(tmp_path / "b.jsonl", "셋")
    assert changes(before, inputs_of(recipe)) == [f"{weighted}: the file changed"]


def test_another_weight_is_a_change_of_the_recipe(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", "하나")
    before, now = (inputs_of(recipe_of({"path": file, "weight": weight})) for weight in (1.0, 2.0))
    (line,) = changes(before, now)
    assert line.startswith("data.train: ") and "2.0" in line
