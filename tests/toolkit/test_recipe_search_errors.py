"""Everything that is wrong with a search is told before its first trial: each once, with its line, key and remedy."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from toolkit.recipe import world
from toolkit.recipe.model import Evaluate, Recipe
from toolkit.recipe.read import read_recipe
from toolkit.recipe.sense_space import NOT_SEARCHED

HEAD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"
WRITE = "Remove it here, and set it in the recipe itself"

Problems = Callable[..., list[str]]


def space(values: str, more: str = "") -> str:
    return f"search: {{{more}space: {{{values}}}}}"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("search: 3", "search: must be a section with keys below it, not 3"),
        (
            "search: {}",
            "search.space: is missing. Write space: {train.learning_rate: {low: 1e-4, high: 1e-2, log: true}}",
        ),
        ("search: {space: {}}", "search.space: is empty. Write space: {train.learning_rate: {low: 1e-4"),
        ("search: {space: [train.epochs]}", "search.space: must be a section with keys below it, not a list"),
        (space("train.epochs: [1]", "n_trials: 3, "), "search.n_trials: here it is called trials"),
        (space("train.epochs: [1]", "pruners: none, "), "search.pruners: not a key of search. Did you mean 'pruner'?"),
        (space("train.epochs: [1]", "sampler: bayes, "), "search.sampler: must be tpe, random, grid, gp, cmaes or qmc"),
        (space("train.epochs: [1]", "trials: 0, "), "search.trials: must be at least 1, not 0"),
        (space("train.epochs: [1]", "minutes: 0, "), "search.minutes: must be more than 0, not 0"),
        (space("train.epochs: [1]", "workers: all, "), "search.workers: must be auto or a whole number, not 'all'"),
        (space("train.epochs: 3"), "must be a range {low: …, high: …} or a list of choices, not 3. Write [3]"),
        (space("train.epochs: null"), "must be a range {low: …, high: …} or a list of choices, not null"),
        (space("train.epochs: []"), "search.space.train.epochs: is an empty list. Name at least one"),
        (space("train.epochs: {low: 1}"), "search.space.train.epochs.high: is missing. Write high: …"),
        (space("train.epochs: {low: a, high: 3}"), "search.space.train.epochs.low: must be a number, not 'a'"),
        (space("train.epochs: {low: 1, high: .inf}"), "search.space.train.epochs.high: must be a finite number"),
        (space("train.epochs: {low: 1, hgih: 3}"), "train.epochs.hgih: not a key of a range. Did you mean 'high'?"),
        (space("train.epochs: {low: 1, max: 3}"), "search.space.train.epochs.max: here it is called high"),
        (
            space("train.epochs: [[1]]"),
            "search.space.train.epochs.0: a choice is a number, a word, true, false or null",
        ),
        (space("train: {epochs: [1]}"), "not a section. A key is written whole, as in train.epochs"),
        (space("train: {epochs: {low: 1, high: 2}}"), "A key is written whole, as in train.epochs"),
        (space("train: [1]"), "search.space.train: is a section. Write its keys whole, as in train.epochs"),
    ],
)
def test_a_search_of_another_form_is_told_once(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found
    assert found[0].startswith("line 4  search")


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("train.learnin_rate", "not a key of train. Did you mean 'learning_rate'?"),
        ("trian.epochs", "not a key of a recipe. Did you mean 'train'?"),
        ("learning_rate", "stands in the wrong section. Write train.learning_rate"),
        ("lr", "here it is train.learning_rate"),
        ("train.lr", "here it is called learning_rate"),
        ("adapter.r", "here it is called rank"),
        ("adapter.rnak", "not a key of a lora adapter. Did you mean 'rank'?"),
        ("adapter.tokens", "is a key of a prefix adapter, not of a lora adapter. Remove it"),
        ("adapter.rank.x", "adapter.rank has no keys below it"),
        ("experts.a", f"cannot be searched: one adapter is searched first, then combined. {WRITE}"),
        ("키", "not a key of a recipe"),
        ("''", "not a key of a recipe"),
        ("name", f"cannot be searched: it names the run. {WRITE}"),
        ("base.model", f"cannot be searched: all trials share one base. {WRITE}"),
        ("data.valid", f"cannot be searched: it changes what trials are judged by. {WRITE}"),
        ("data.clean.min_turns", "cannot be searched: it changes what trials are judged by"),
        ("evaluate.prompts", "cannot be searched: it changes what trials are judged by"),
        ("train.micro_batch", "cannot be searched: it changes speed and memory, not what is learned"),
        ("train.evaluate_every", "cannot be searched: it changes when trials are compared"),
        ("serve.top_p", "cannot be searched: it changes nothing that is learned"),
        ("search.trials", "cannot be searched: a search does not search itself"),
        ("data.train", "of data only the weights of files are searched. Write data.train.0.weight"),
        ("data.train.weight", "of data only the weights of files are searched. Write data.train.0.weight"),
        ("data.train.0.path", "of a file only its weight is searched. Write data.train.0.weight"),
        ("data.train.1.weight", "there is no file 1: data.train names one file, 0"),
        ("adapter.kind", "a kind brings its own keys. Write adapter: {1: {}}"),
        ("adapter", "must be a map of kinds, each with its own keys"),
    ],
)
def test_a_key_that_cannot_be_searched_is_told_with_the_reason(problems: Problems, key: str, says: str) -> None:
    found = problems(space(f"{key}: [1]"))
    assert len(found) == 1 and says in found[0], found
    assert found[0].startswith("line 4  search.space." + key.strip("'"))


def test_every_key_that_is_not_searched_is_a_key_of_a_recipe() -> None:
    for key in NOT_SEARCHED:
        section, _, name = key.partition(".")
        assert section in Recipe.model_fields, key
        assert not name or name in Recipe.model_fields[section].default.model_fields_set | set(
            type(Recipe.model_fields[section].default).model_fields
        ), key
    assert Evaluate.called in NOT_SEARCHED


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ("train.epochs: {low: 3, high: 1}", "train.epochs: low (3) must be below high (1). Swap them"),
        ("train.epochs: {low: 2, high: 2}", "low and high are both 2. Widen the range, or write 2 in the recipe"),
        ("train.epochs: {low: 0, high: 2, log: true}", "log wants low above 0, not 0. Write a small number"),
        ("train.epochs: {low: 1, high: 2, log: true, step: 1}", "log and step do not go together. Remove one"),
        ("train.epochs: {low: 1, high: 2, step: 0}", "step must be more than 0, not 0"),
        ("train.epochs: {low: 0.5, high: 0.75, step: 0.1}", "steps of 0.1 from 0.5 do not meet 0.75. Write high: 0.7"),
        ("train.batch_size: {low: 4, high: 8, step: 5}", "steps of 5 from 4 do not meet 8. Write a smaller step"),
        ("train.batch_size: {low: 4, high: 8, step: 0.5}", "step must be a whole number, not 0.5"),
        ("train.batch_size: {low: 4.5, high: 8}", "train.batch_size.low: must be a whole number, not 4.5"),
        ("train.epochs: {low: 0, high: 2}", "train.epochs.low: must be more than 0, not 0"),
        ("train.warmup_ratio: {low: 0, high: 2}", "train.warmup_ratio.high: must be less than 1, not 2"),
        ("data.train.0.weight: {low: 0, high: 2}", "data.train.0.weight.low: must be more than 0, not 0"),
        ("train.schedule: {low: 1, high: 2}", "train.schedule takes words, not a range. Write a list of choices"),
        ("adapter.dora: {low: 0, high: 1}", "adapter.dora takes true and false, not a range"),
        ("train.batch_size: [4, 0]", "train.batch_size.1: must be at least 1, not 0"),
        ("train.batch_size: [4, 8.0]", "train.batch_size.1: must be a whole number, not 8.0. Write 8"),
        ("train.schedule: [cosine, linaer]", "train.schedule.1: must be cosine, linear or constant, not 'linaer'"),
        (
            "adapter.alpha: [2x, two]",
            "adapter.alpha.1: must be a number, or a multiple of the rank as in 2x, not 'two'",
        ),
        ("train.batch_size: [4, 8, 4]", "train.batch_size.2: 4 is listed twice. Name it once"),
        ("train.epochs: [1, 1.0]", "train.epochs.1: 1.0 is listed twice. Name it once"),
        ("train.optimizer: [adamw, muon]", "train.optimizer.1: muon is for whole weight matrices"),
        ("train.epochs: [0.2, 1]", "train.epochs.0: with 0.2, train.evaluate_every: 0.5 epochs are more than"),
    ],
)
def test_values_that_the_key_cannot_have_are_told(problems: Problems, values: str, says: str) -> None:
    found = problems(space(values) + "\ntrain: {evaluate_every: 0.5}")
    assert len(found) == 1 and says in found[0], found
    assert found[0].startswith("line 4  search.space.")


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ("{}", "search.space.adapter: must be a map of kinds, each with its own keys. Write {lora: {}, prefix: {}}"),
        (
            "[lora, reft]",
            "search.space.adapter: must be a map of kinds, each with its own keys. Write {lora: {}, reft: {}}",
        ),
        (
            "{lora: [4]}",
            "search.space.adapter.lora: must be a map of keys, as in {train.learning_rate: [0.01]}, not a list",
        ),
        (
            "{lora: {}, prefx: {}}",
            "search.space.adapter.prefx: 'prefx' is not a kind of adapter. Did you mean 'prefix'?",
        ),
        ("{prefx: {tokens: [0]}}", "search.space.adapter.prefx: 'prefx' is not a kind of adapter"),
        ("{adalora: {}}", "search.space.adapter.adalora: it has to be called at every step"),
        (
            "{lora: {tokens: [4]}}",
            "search.space.adapter.lora.tokens: is a key of a prefix adapter, not of a lora adapter",
        ),
        ("{prefix: {r: [4]}}", "search.space.adapter.prefix.r: here it is called rank, and a prefix adapter has none"),
        ("{prefix: {tokens: [4, 0]}}", "search.space.adapter.prefix.tokens.1: must be at least 1, not 0"),
        ("{lora: {adapter.rank: [4]}}", "below a kind its own keys stand without adapter. Write rank"),
        ("{lora: {train.lr: [4]}}", "search.space.adapter.lora.train.lr: here it is called learning_rate"),
        ("{lora: {train.epochs: [1]}}, train.epochs: [2]", "train.epochs is searched for every kind already"),
        ("{reft: {rank: [1]}}, adapter.rank: [2]", "adapter.rank: belongs to one of the kinds that are searched"),
        (
            "{lora: {}, full: {}}, train.optimizer: [adamw, muon]",
            "train.optimizer.1: muon is for whole weight matrices",
        ),
    ],
)
def test_a_conditional_space_is_checked_kind_by_kind(problems: Problems, kinds: str, says: str) -> None:
    found = problems(space(f"adapter: {kinds}"))
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("adapter: {kind: full}\n" + space("train.optimizer: [adamw, muon]"), None),
        (space("adapter: {full: {train.optimizer: [adamw, muon]}, lora: {}}"), None),
        (space("adapter: {full: {}}, train.optimizer: [adamw, muon]"), None),
        ("train: {micro_batch: 4}\n" + space("train.batch_size: [4, 8]"), None),
        ("train: {micro_batch: 4}\n" + space("train.batch_size: {low: 4, high: 12, step: 4}"), None),
        (
            "train: {micro_batch: 4}\n" + space("train.batch_size: [8, 6]"),
            "train.micro_batch (4) must divide every batch",
        ),
        ("train: {micro_batch: 4}\n" + space("train.batch_size: {low: 4, high: 9}"), "must divide every batch"),
        (
            "adapter: {kind: prefix}\n" + space("adapter.projection: [false, true], adapter.init_text: [null, 안녕]"),
            "'안녕' with adapter.projection: true: a prefix that starts from a text has no projection",
        ),
    ],
)
def test_values_are_compared_with_the_recipe_and_with_each_other(
    problems: Problems, tmp_path: Path, more: str, says: str | None
) -> None:
    if says is None:
        (tmp_path / "r.yaml").write_text(HEAD + more)
        assert read_recipe(tmp_path / "r.yaml").search is not None
        return
    found = problems(more)
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize(
    ("sampler", "values", "says"),
    [
        (
            "grid",
            "train.epochs: {low: 1, high: 2}",
            "train.epochs: a grid has points, and this range has none. Write step",
        ),
        ("grid", "train.epochs: {low: 1, high: 2, log: true}", "this range has none. List the values"),
        (
            "grid",
            "train.seed: {low: 1, high: 1000, step: 1}, train.batch_size: {low: 1, high: 1000, step: 1}",
            "search.space: a grid of 1,000,000 points; 10,000 are the most",
        ),
        ("grid", "adapter: {lora: {rank: [1]}, reft: {}}", "search.sampler: grid needs the same keys in every trial"),
        ("gp", "adapter: {lora: {rank: [1]}, reft: {}}", "gp needs the same keys in every trial, and adapter.rank"),
        (
            "qmc",
            "adapter: {lora: {train.epochs: [1]}, reft: {}}",
            "qmc needs the same keys in every trial, and train.ep",
        ),
        ("cmaes", "adapter: {lora: {rank: [1]}, reft: {}}", "cmaes needs the same keys in every trial"),
        ("cmaes", "train.schedule: [linear, cosine]", "cmaes moves in numbers only, and train.schedule is a choice"),
        ("cmaes", "adapter: {lora: {}, reft: {}}", "cmaes moves in numbers only, and adapter is a choice"),
    ],
)
def test_a_sampler_that_the_space_does_not_go_with_is_told(
    problems: Problems, sampler: str, values: str, says: str
) -> None:
    found = problems(space(values, f"sampler: {sampler}, "))
    assert len(found) == 1 and says in found[0], found


def test_a_grid_of_ten_thousand_points_is_taken(tmp_path: Path) -> None:
    more = space(
        "train.seed: {low: 1, high: 100, step: 1}, train.batch_size: {low: 1, high: 100, step: 1}", "sampler: grid, "
    )
    (tmp_path / "r.yaml").write_text(HEAD + more)
    assert read_recipe(tmp_path / "r.yaml").search is not None


def test_a_search_needs_held_out_talk_to_compare_by(problems: Problems) -> None:
    found = problems(space("train.epochs: [1]"), "data.valid=0")
    assert (
        len(found) == 1
        and "data.valid=0: 0 holds nothing out, so a search has nothing to compare trials by" in found[0]
    )


def test_a_base_from_scratch_is_not_searched(problems: Problems) -> None:
    found = problems(space("train.epochs: [1]"), "base={new: {}}", "adapter.kind=full")
    assert len(found) == 1
    assert found[0].startswith("line 4  search: trials are adapters on one base, and here each would make its own. ")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("x.db", "must be null, sqlite:///FILE or postgresql://USER@HOST/NAME, not a word"),
        ("mysql://me:secret@host/db", "must be null, sqlite:///FILE or postgresql://USER@HOST/NAME, not mysql://…"),
        ("postgres://me:secret@host/db", "postgres:// is not read here. Write postgresql://"),
        ("postgresql+psycopg2://me:secret@host/db", "postgresql+psycopg2:// is not read here. Write postgresql://"),
        ("postgresql://me:secret@host", "names no database. Write postgresql://USER@HOST/NAME"),
        ("postgresql://me:secret@host:x/db", "is no address. Write postgresql://USER:PASSWORD@HOST:PORT/NAME"),
        ("sqlite://", "must be null, sqlite:///FILE or postgresql://USER@HOST/NAME, not sqlite://"),
        ("sqlite:///:memory:", "a sqlite storage is a file that workers share"),
        ("sqlite:////gone/찾기.db", "there is no folder '/gone' for this file. Make it first"),
    ],
)
def test_a_storage_that_cannot_be_is_told_without_its_password(problems: Problems, url: str, says: str) -> None:
    found = problems(space("train.epochs: [1]", f"storage: '{url}', "))
    assert len(found) == 1 and found[0].startswith(f"line 4  search.storage: {says}"), found
    assert "secret" not in found[0]


@pytest.mark.parametrize(
    ("more", "module"),
    [
        ("sampler: gp, ", "scipy"),
        ("sampler: qmc, ", "scipy"),
        ("sampler: cmaes, ", "cmaes"),
        ("storage: 'sqlite:///x.db', ", "sqlalchemy"),
        ("storage: 'postgresql://a/b', ", "psycopg"),
    ],
)
def test_a_package_that_the_search_needs_is_looked_for_when_the_recipe_is_read(
    problems: Problems, monkeypatch: pytest.MonkeyPatch, more: str, module: str
) -> None:
    monkeypatch.setattr(world, "find_spec", lambda name: None if name == module else find_spec(name))
    found = problems(space("train.epochs: {low: 1, high: 2}", more))
    assert len(found) == 1 and f"needs {module}" in found[0] and "Run pip install" in found[0], found


def test_all_problems_of_a_search_come_at_once_with_their_lines(problems: Problems) -> None:
    found = problems(
        "search:\n  trials: 0\n  sampler: cmaes\n  space:\n    train.epochs: {low: 2, high: 1}\n    train.lr: [1]\n"
        "    train.batch_size:\n      - 4\n      - 0\n      - 4\n    adapter.rank: {low: 1}\ntrain: {epochs: x}\n"
    )
    assert [one.split(": ")[0] for one in found] == [
        "line 5  search.trials",
        "line 8  search.space.train.epochs",
        "line 9  search.space.train.lr",
        "line 12  search.space.train.batch_size.1",
        "line 13  search.space.train.batch_size.2",
        "line 14  search.space.adapter.rank.high",
        "line 15  train.epochs",
    ]


def test_what_is_wrong_with_the_adapter_is_not_also_wrong_with_its_dimensions(problems: Problems) -> None:
    assert len(problems("adapter: {kind: ful}\n" + space("adapter.rank: [1, 0]"))) == 1


def test_an_override_of_a_space_is_named_where_it_is_wrong(problems: Problems) -> None:
    found = problems(space("train.epochs: [1]"), "search.space.train.batch_size=[4, 0]")
    assert found == [
        "override search.space.train.batch_size=[4, 0]  search.space.train.batch_size.1: must be at least 1, not 0"
    ]


@pytest.mark.parametrize(
    ("train", "says"),
    [
        ("[{path: 'maltu:probes.jsonl', weight: 0}]", "data.train.0.weight: must be more than 0, not 0"),
        (
            "[{path: 'maltu:probes.jsonl', wieght: 2}]",
            "data.train.0.wieght: not a key of a file with a weight. Did you mean",
        ),
        ("[{weight: 2}]", "data.train.0.path: is missing. Write path: my.jsonl"),
        ("[{path: gone.jsonl, weight: 2}]", "data.train.0.path: there is no file 'gone.jsonl'"),
        ("[3]", "data.train.0: must be text, not 3"),
        ("{path: a.jsonl}", "data.train: must be a list, not a section"),
    ],
)
def test_a_wrong_weight_is_told(problems: Problems, train: str, says: str) -> None:
    found = problems(head=HEAD.replace("['maltu:probes.jsonl']", train))
    assert len(found) == 1 and f"line 3  {says}" in found[0], found
