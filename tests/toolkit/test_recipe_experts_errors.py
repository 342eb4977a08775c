"""Everything that is wrong with the experts of a recipe is told before anything is trained: once, with its line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from toolkit.recipe import world
from toolkit.recipe.model import Recipe
from toolkit.recipe.sense_experts import NOT_OWN

HEAD = "name: 모두\nbase: {model: spoken-mini}\n"
CASUAL = "maltu:talk/casual.ko.jsonl"
Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("own", "says"),
    [
        ("{name: b}", "a.name: cannot differ between experts: a run has one name"),
        ("{task: classify}", "a.task: cannot differ between experts: experts of one run do one task. Write it once"),
        ("{evaluate: {prompts: null}}", "a.evaluate: cannot differ between experts: all are judged alike"),
        ("{serve: {top_p: 1}}", "a.serve: cannot differ between experts"),
        ("{track: []}", "a.track: cannot differ between experts"),
        ("{search: {}}", "a.search: cannot differ between experts: search one adapter first, then combine. Remove it"),
        ("{experts: {}}", "a.experts: cannot differ between experts: an expert has no experts. Remove it"),
        ("{combine: {}}", "a.combine: cannot differ between experts"),
        (
            "{data: {valid: 0.2}}",
            "a.data.valid: cannot differ between experts: all their talk is read, cleaned and split",
        ),
        ("{data: {system: 안녕}}", "a.data.system: cannot differ between experts: all their talk is read"),
        ("{data: {format: text}}", "a.data.format: cannot differ between experts"),
        (
            "{base: {model: x}}",
            "a.base: cannot differ between experts: they stand on one base, and only combine: {kind: vote}",
        ),
        ("{train: {precision: bf16}}", "a.train.precision: cannot differ between experts: they learn side by side"),
        ("{train: {packing: true}}", "a.train.packing: cannot differ between experts: they learn side by side"),
        ("{train: {max_length: 64}}", "a.train.max_length: cannot differ between experts: all their talk is rendered"),
        (
            "{adapter: {dora: true}}",
            "a.adapter.dora: experts stand side by side on one base, and lora with DoRA cannot",
        ),
        ("{adapter: {kind: ia3}}", "a.adapter.kind: experts stand side by side on one base, and ia3 cannot"),
        ("{train: {micro_batch: 2}}", "a.train.micro_batch: cannot differ between experts: they learn side by side"),
        (
            "{train: {activation_checkpointing: true}}",
            "a.train.activation_checkpointing: cannot differ between experts",
        ),
        ("{train: {keep: [3]}}", "a.train.keep: cannot differ between experts: checkpoints of single experts are not"),
        ("{adapter: {rnak: 3}}", "a.adapter.rnak: not a key of a lora adapter. Did you mean 'rank'?"),
        ("{adapter: {tokens: 3}}", "a.adapter.tokens: is a key of a prefix adapter, not of a lora adapter"),
        ("{adapter: {kind: prefx}}", "a.adapter.kind: 'prefx' is not a kind of adapter. Did you mean 'prefix'?"),
        ("{adapter: {rank: 0}}", "a.adapter.rank: must be at least 1, not 0"),
        ("{adapter: lora}", "a.adapter: must be a section. Write adapter: {kind: lora}"),
        ("{adapter: {kind: full}}", "a.adapter.kind: full training changes the base itself, which the experts share"),
        ("{train: {epochs: two}}", "a.train.epochs: must be a number, not 'two'"),
        ("{train: {lr: 1e-3}}", "a.train.lr: here it is called learning_rate"),
        ("{train: {optimizer: muon}}", "a.train.optimizer: muon is for whole weight matrices"),
        (
            "{train: {epochs: 0.2}}",
            "a.train.epochs: with this, train.evaluate_every: 0.5 epochs are more than the run has",
        ),
        ("{train: 3}", "a.train: must be a section with keys below it, not 3"),
        ("{data: x.jsonl}", "a.data: must be a section. Write data: {train: [x.jsonl]}"),
        ("{data: {train: x.jsonl}}", "a.data.train: must be a list, as in [x.jsonl], not 'x.jsonl'"),
        ("{data: {train: []}}", "a.data.train: is an empty list. Name at least one"),
        ("{data: {trian: [x]}}", "a.data.trian: not a key of data. Did you mean 'train'?"),
        ("{data: {train: [{path: x, wieght: 3}]}}", "a.data.train.0.wieght: not a key of a file with a weight"),
        ("{learning_rate: 1e-3}", "a.learning_rate: stands in the wrong section. Write train.learning_rate"),
        ("{lora_r: 3}", "a.lora_r: here it is adapter.rank"),
        ("{adaptor: {}}", "a.adaptor: not a key of an expert. Did you mean 'adapter'?"),
        ("{runs: x}", "a.runs: not a key of an expert. Did you mean 'run'?"),
        ("{run: x, train: {epochs: 1}}", "a.train: stands beside run, and a run that exists is taken as it is"),
        ("{run: 3}", "a.run: must be the folder of a run, as in runs/polite, not 3"),
        ("{run: ''}", "a.run: must be the folder of a run, as in runs/polite, not ''"),
        ("runs/a", "a: must be a section. Write {run: runs/a} for a run that exists"),
        ("3", "a: must be a section with keys below it, not 3"),
        ("{}", "b: learns the same as a. Give it other data, another adapter, or another train.seed"),
    ],
)
def test_what_an_expert_cannot_say_is_told_once_with_its_line(problems: Problems, own: str, says: str) -> None:
    found = problems(f"train: {{evaluate_every: 0.5}}\nexperts:\n  a: {own}\n  b: {{}}\n")
    found = [one for one in found if "there is no run 'x'" not in one]
    assert len(found) == 1 and f"experts.{says}" in found[0], found
    assert found[0].startswith(f"line {7 if says.startswith('b') else 6}  experts.")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("main", "experts.main: 'main' is reserved: the adapter of a run with one"),
        ("base", "experts.base: 'base' is reserved: a server answers to it without any run"),
        ("Combination", "experts.Combination: 'Combination' is reserved: what all experts together are called"),
        ("other", "experts.other: 'other' is reserved: what tables call whoever is no expert"),
        ("NUL", "experts.NUL: 'NUL' names a device on Windows, so no folder there can have it"),
        ("com9", "experts.com9: 'com9' names a device on Windows"),
        ("'a:b'", "experts.a:b: a run's name is a folder and a model name, so it cannot hold :"),
        ("v1.2", "experts.v1.2: an expert's name is also part of a key, so it cannot hold a dot. Write - or _"),
        ("''", "experts.: is empty. Write something, or remove it"),
    ],
)
def test_a_name_that_no_expert_can_have_is_refused_once(problems: Problems, name: str, says: str) -> None:
    found = problems(f"experts: {{{name}: {{train: {{seed: 1}}}}}}\ncombine: {{kind: route}}\n")
    assert len(found) == 1 and says in found[0], found


def test_names_that_differ_in_capitals_alone_are_refused(problems: Problems) -> None:
    found = problems("experts: {Polite: {}, polite: {train: {seed: 1}}}")
    assert (
        len(found) == 1 and "experts.polite: differs from 'Polite' in capitals alone, and both are folders" in found[0]
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("experts: 3", "experts: must be a section with keys below it, not 3"),
        ("experts: {}", "experts: is empty. Write experts: {polite: {data: {train: [polite.jsonl]}}"),
        ("expert: {}", "expert: here it is called experts"),
        ("moe: {}", "moe: here it is called combine. Write combine: {kind: gate}"),
        ("models: []", "models: here it is called experts. A map of names"),
        ("num_experts: 4", "num_experts: no key here: experts are counted as they are named. Remove it"),
        (
            f"experts: {{a: {{data: {{train: ['{CASUAL}']}}}}}}",
            "data.train: every expert names its own files, so nobody",
        ),
        ("search: {space: {train.epochs: [1, 2]}}\nexperts: {a: {}}", "search: search one adapter first, then combine"),
        (
            "train: {keep: [3]}\nexperts: {a: {}}",
            "train.keep: checkpoints of single steps are kept of one adapter alone",
        ),
        (
            "adapter: {kind: full}\nexperts: {a: {}}",
            "experts.a: with this, adapter.kind: full training changes the base",
        ),
    ],
)
def test_what_does_not_go_with_experts_is_told(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found


def test_a_base_from_scratch_has_no_experts(problems: Problems) -> None:
    for own in ("{}", "{adapter: {kind: lora}}"):
        found = problems(f"experts: {{a: {own}}}", "base={new: {}}", "adapter.kind=full")
        assert len(found) == 1 and "several adapters stand on one base that exists. Make the base in a run" in found[0]


def test_an_expert_does_not_learn_what_judges(problems: Problems) -> None:
    more = f"experts: {{a: {{data: {{train: ['{CASUAL}']}}}}, b: {{}}}}"
    found = problems(more, f"data.valid=['{CASUAL}']")
    assert len(found) == 1 and "so what is learned would also be the judge" in found[0]


def test_a_file_of_an_expert_that_is_not_there_is_told_with_its_line(problems: Problems) -> None:
    found = problems("experts:\n  a: {data: {train: [gone.jsonl]}}\n  b: {}\n")
    assert len(found) == 1 and found[0].startswith("line 5  experts.a.data.train.0: there is no file 'gone.jsonl'")
    alone = problems("experts:\n  a: {data: {train: [gone.jsonl]}}\n", head=HEAD)
    assert len(alone) == 1 and alone[0].startswith("line 4  experts.a.data.train.0: there is no file 'gone.jsonl'")


def test_one_file_has_one_name_in_all_experts(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{}\n")
    a, b = f"{tmp_path}/b.jsonl", f"{tmp_path}/../{tmp_path.name}/b.jsonl"
    found = problems(f"experts: {{a: {{data: {{train: ['{a}', '{a}']}}}}, b: {{data: {{train: ['{b}']}}}}, c: {{}}}}")
    assert ["is listed twice" in one for one in found] == [True, False]
    assert "experts.b.data.train.0: is the file that experts.a names" in found[1] and "Name it alike" in found[1]


def test_a_run_that_is_not_there_is_told(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "runs" / "polite").mkdir(parents=True)
    (tmp_path / "runs" / "done").mkdir()
    (tmp_path / "runs" / "done" / "run.json").write_text("{}")
    names = {"a": "pollite", "b": "polite", "c": "done", "d": "done"}
    found = problems(
        "experts:\n" + "".join(f"  {key}: {{run: '{tmp_path}/runs/{run}'}}\n" for key, run in names.items())
    )
    assert [one.split(": ")[0] for one in found] == [
        f"line {n}  experts.{k}.run" for n, k in ((5, "a"), (6, "b"), (8, "d"))
    ]
    assert "Did you mean" in found[0] and "holds no run.json" in found[1] and "is the run of c too" in found[2]


def test_what_an_expert_needs_of_this_machine_is_looked_for(
    problems: Problems, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = problems("experts: {a: {adapter: {targets: [embed_tokens, q_proj]}}}")
    assert len(found) == 1 and "experts.a.adapter.targets: this base ties its head to its embeddings" in found[0]
    monkeypatch.setattr(world, "find_spec", lambda _: None)
    labels = "task: classify\nexperts: {a: {base: {model: owner/x, quantize: nf4}}, b: {}}\ncombine: {kind: vote}\n"
    told = problems(labels, "data.format={kind: labels, text: a, label: b}", "track=[]")
    assert len(told) == 1 and "experts.a.base.quantize: nf4 needs bitsandbytes" in told[0], told


def test_all_problems_of_experts_come_at_once_with_their_lines(problems: Problems) -> None:
    found = problems(
        "experts:\n  a:\n    serve: {top_p: 1}\n    train: {epochs: -1, packing: true}\n    adapter: {rnak: 1}\n"
        "  b: {train: {lr: 1}, data: {valid: 0}}\ntrain: {epochs: x}\n"
    )
    assert [one.split(": ")[0] for one in found] == [
        "line 6  experts.a.serve",
        "line 7  experts.a.train.packing",
        "line 7  experts.a.train.epochs",
        "line 8  experts.a.adapter.rnak",
        "line 9  experts.b.data.valid",
        "line 9  experts.b.train.lr",
        "line 10  train.epochs",
    ]


@pytest.mark.parametrize(
    "more",
    [
        "adapter: {kind: ful}\nexperts: {a: {}, b: {adapter: {rank: 4}}}",
        "adapter: {kind: prefx}\nexperts: {a: {}, b: {adapter: {tokens: 4}}}",
        "adapter: {kind: prefix}\ntrain: {packing: true}\nexperts: {a: {}, b: {train: {seed: 1}}}",
    ],
)
def test_what_is_wrong_with_the_recipe_is_not_also_wrong_with_its_experts(problems: Problems, more: str) -> None:
    found = problems(more)
    assert len(found) == 1 and "experts" not in found[0], found


def test_an_override_of_an_expert_is_named_where_it_is_wrong(problems: Problems) -> None:
    (told,) = problems("experts: {a: {}}", "experts.a.train.epochs=0")
    assert told == "override experts.a.train.epochs=0: must be more than 0, not 0"


def test_every_key_that_is_not_an_expert_s_own_is_a_key_of_a_recipe() -> None:
    def has(section: Any, key: str) -> bool:
        name, _, rest = key.partition(".")
        return name in section.model_fields and (not rest or has(section.model_fields[name].annotation, rest))

    assert all(has(Recipe, key) for key in NOT_OWN)
