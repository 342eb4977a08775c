"""Everything that is wrong with a combination is told before anything is trained: once, with its line and remedy."""

from collections.abc import Callable
from importlib.util import find_spec

import pytest

from toolkit.recipe import world

TWO = "experts: {casual: {train: {seed: 1}}, polite: {train: {seed: 2}}}\n"
LABELS = "task: classify\n"
AS_LABELS = "data.format={kind: labels, text: a, label: b}"

Problems = Callable[..., list[str]]


def told(problems: Problems, combine: str, experts: str = TWO, *overrides: str) -> str:
    found = problems(f"{experts}combine: {combine}\n", *overrides)
    assert len(found) == 1, found
    return found[0]


@pytest.mark.parametrize(
    ("combine", "says"),
    [
        ("3", "combine: must be a section with keys below it, not 3"),
        ("route", "combine: must be a section. Write combine: {kind: route}"),
        ("moe", "combine: must be a section. Write combine: {kind: gate}"),
        ("{}", "combine.kind: is missing. Write kind: route, merge, mix, gate, vote, bag or boost"),
        ("{top_k: 2}", "combine.kind: is missing. Write kind: route, merge"),
        (
            "{kind: rout}",
            "combine.kind: must be route, merge, mix, gate, vote, bag or boost, not 'rout'. Did you mean 'route'?",
        ),
        ("{kind: moe}", "combine.kind: here it is called gate"),
        ("{kind: ties}", "combine.kind: here it is called merge, with method: ties"),
        ("{kind: 3}", "combine.kind: must be route, merge, mix, gate, vote, bag or boost, not 3"),
        ("{kind: merge, merge_method: ties}", "combine.merge_method: here it is called method"),
        ("{kind: merge, combination_type: ties}", "combine.combination_type: here it is called method"),
        ("{kind: merge, svd_rank: 3}", "combine.svd_rank: here it is called rank"),
        ("{kind: merge, method: cat}", "combine.method: 'cat': here it is called exact"),
        ("{kind: merge, method: ties_svd}", "combine.method: 'ties_svd': here it is called ties"),
        (
            "{kind: merge, method: slerp}",
            "combine.method: must be exact, svd, linear, ties, dare_linear, dare_ties or magn",
        ),
        (
            "{kind: merge, normalize: true}",
            "combine.normalize: no key here: weights of a mix and of a vote always come to 1",
        ),
        ("{kind: mix, method: ties}", "combine.method: is a key of a merge, not of a mix. Remove it"),
        ("{kind: mix, merge_method: ties}", "combine.merge_method: here it is called method, and a mix has none"),
        ("{kind: gate, xlora_size: 8}", "combine.xlora_size: here it is called hidden"),
        ("{kind: gate, top_k_lora: 2}", "combine.top_k_lora: here it is called top_k"),
        ("{kind: gate, batch_size: 2}", "combine.batch_size: stands in the wrong section. Write train.batch_size"),
        ("{kind: gate, how: hard}", "combine.how: must be learned or arrow, not 'hard'"),
        ("{kind: vote, how: majority}", "combine.how: 'majority': here it is called hard"),
        ("{kind: route, ruoter: centroid}", "combine.ruoter: not a key of a route. Did you mean 'router'?"),
        ("{kind: route, router: knn}", "combine.router: 'knn': here it is called centroid"),
        ("{kind: route, margin: 1}", "combine.margin: must be less than 1, not 1"),
        ("{kind: route, top_k: 0}", "combine.top_k: must be at least 1, not 0"),
        ("{kind: mix, weights: uniform}", "combine.weights: 'uniform': here it is called equal"),
        (
            "{kind: mix, weights: [1, 2]}",
            "combine.weights: must be equal, search, or a map as in {polite: 0.7, casual: 0.3}",
        ),
        ("{kind: mix, weights: 0.5}", "combine.weights: must be equal, search, or a map"),
        ("{kind: mix, weights: {casual: a, polite: 1}}", "combine.weights.casual: must be a number, not 'a'"),
        ("{kind: mix, weights: {casual: .inf, polite: 1}}", "combine.weights.casual: must be a finite number"),
        ("{kind: merge, density: 0}", "combine.density: must be more than 0, not 0"),
        ("{kind: bag, members: 1}", "combine.members: must be at least 2, not 1"),
        ("{kind: bag, n_estimators: 5}", "combine.n_estimators: here it is called members"),
        ("{kind: boost, rounds: 1}", "combine.rounds: must be at least 2, not 1"),
        ("{kind: boost, members: 3}", "combine.members: is a key of a bag, not of a boost. Remove it"),
    ],
)
def test_a_combination_of_another_form_is_told_once(problems: Problems, combine: str, says: str) -> None:
    found = told(problems, combine, "" if "bag" in combine[:12] or "boost" in combine[:12] else TWO)
    assert says in found and found.startswith(
        f"line {4 if 'bag' in combine[:12] or 'boost' in combine[:12] else 5}  combine"
    )


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            "combine: {kind: route}",
            "combine: a route needs experts. Write experts: {NAME: {…}, NAME: {…}}, or choose kind: bag",
        ),
        (
            "experts: {a: {}}\ncombine: {kind: route}",
            "experts: one expert alone, and a route needs two. Add one, or remove",
        ),
        ("experts: {a: {}}\ncombine: {kind: merge}", "experts: one expert alone, and a merge needs two"),
        (f"{TWO}combine: {{kind: bag}}", "experts: a bag makes its members itself, of one recipe. Remove experts"),
        (f"{TWO}combine: {{kind: boost}}", "experts: a boost makes its members itself, of one recipe. Remove experts"),
        (
            "search: {space: {train.epochs: [1, 2]}}\ncombine: {kind: bag}",
            "search: search one adapter first, then combine",
        ),
        (
            "search: {space: {combine.members: [3, 5]}}",
            "search.space.combine.members: cannot be searched: one adapter is",
        ),
        (
            "train: {keep: [1]}\ncombine: {kind: bag}",
            "train.keep: checkpoints of single steps are kept of one adapter alone",
        ),
        ("adapter: {kind: full}\ncombine: {kind: bag}", "adapter.kind: every member of a bag would be a whole model"),
        (
            "adapter: {dora: true}\ncombine: {kind: bag}",
            "adapter.dora: members of a bag stand side by side on one base, and lora with DoRA cannot. Choose lora",
        ),
        (
            "adapter: {kind: ia3}\ncombine: {kind: boost}",
            "adapter.kind: members of a boost stand side by side on one base, and ia3 cannot. Choose lora",
        ),
        ("merge_method: ties", "merge_method: here it is combine.method"),
        ("members: 3", "members: stands in the wrong section. Write combine.members"),
        ("density: 0.5", "density: stands in the wrong section. Write combine.density"),
        ("mixture_of_experts: 3", "mixture_of_experts: here it is called combine. Write combine: {kind: gate}"),
    ],
)
def test_what_a_combination_does_not_go_with_is_told(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found


@pytest.mark.parametrize("kind", ["bag", "boost"])
def test_a_base_from_scratch_is_made_in_a_run_of_its_own(problems: Problems, kind: str) -> None:
    found = problems(f"adapter: {{kind: full}}\ncombine: {{kind: {kind}}}", "base={new: {}}")
    assert ["each" in one or "every member" in one for one in found] == [True, False]
    assert "several adapters stand on one base that exists. Make the base in a run of its own" in found[1]


@pytest.mark.parametrize(
    ("combine", "says"),
    [
        (
            "{kind: mix, weights: {casual: 1}}",
            "weights: polite: without a weight. Give one to every expert; 0 leaves it out",
        ),
        (
            "{kind: mix, weights: {casual: 1, polite: 1, pollite: 1}}",
            "pollite: no expert has this name. Did you mean 'polite'?",
        ),
        (
            "{kind: mix, weights: {casual: 1, polite: 1, 누구: 1}}",
            "누구: no expert has this name. There are: casual, polite",
        ),
        ("{kind: mix, weights: {casual: 0, polite: 0}}", "weights: every weight is 0, so nothing is left"),
        ("{kind: mix, weights: {casual: 1, polite: -1}}", "weights: they sum to 0, and shares are made of them"),
        (
            "{kind: mix, over: prob, weights: {casual: 2, polite: -1}}",
            "polite: -1 is negative, which a mix over prob has no",
        ),
        (
            "{kind: vote, how: hard, weights: {casual: 2, polite: -1}}",
            "polite: -1 is negative, which a vote has no meaning",
        ),
        (
            "{kind: merge, method: ties, weights: {casual: 2, polite: -1}}",
            "polite: -1 is negative, which method: ties has no",
        ),
        (
            "{kind: merge, method: dare_linear, weights: {casual: 2, polite: -1}}",
            "which method: dare_linear has no meaning",
        ),
        (
            "{kind: merge, rank: 8}",
            "combine.rank: exact has the sum of the experts' ranks. Remove it, or write method: svd",
        ),
        ("{kind: merge, method: linear, rank: 8}", "combine.rank: linear has the rank of the experts. Remove it"),
        (
            "{kind: merge, density: 0.5}",
            "combine.density: exact drops nothing. Remove it, or choose a method of ties, dare_lin",
        ),
        ("{kind: merge, method: svd, density: 0.5}", "combine.density: svd drops nothing"),
        ("{kind: merge, trials: 5}", "combine.trials: nothing is tried unless weights are searched"),
        ("{kind: route, top_k: 3}", "combine.top_k: 3 of 2 experts. Write at most 2"),
        ("{kind: gate, top_k: 3}", "combine.top_k: 3 of 2 experts. Write at most 2"),
        ("{kind: route, default: polit}", "combine.default: 'polit' is no expert. Did you mean 'polite'?"),
        ("{kind: route, default: xyz}", "combine.default: 'xyz' is no expert. There are: base, casual, polite"),
        ("{kind: route, router: centroid, encoder: a/b}", "combine.encoder: is read by router: embedding alone"),
        (
            "{kind: gate, how: arrow, hidden: 8}",
            "combine.hidden: arrow trains nothing. Remove it, or write how: learned",
        ),
        ("{kind: vote}", "combine.how: soft averages over labels, which task: chat does not have. Write how: hard"),
        ("{kind: vote, how: logprob}", "combine.how: logprob averages over labels, which task: chat does not have"),
    ],
)
def test_what_a_combination_cannot_mean_is_told_once(problems: Problems, combine: str, says: str) -> None:
    found = told(problems, combine)
    assert says in found and found.startswith("line 5  combine."), found


@pytest.mark.parametrize(
    ("combine", "adapters", "says"),
    [
        (
            "{kind: gate}",
            ("{kind: prefix}", "{}"),
            "combine.kind: a gate weighs lora and reft adapters, and a (prefix) is nei",
        ),
        ("{kind: gate}", ("{kind: embedding}", "{dora: true}"), "and a (embedding), b (lora with DoRA) is neither"),
        (
            "{kind: gate, how: arrow}",
            ("{kind: reft}", "{}"),
            "combine.how: arrow reads the factors of lora adapters, and a",
        ),
        (
            "{kind: merge}",
            ("{kind: prefix}", "{}"),
            "combine.kind: a merge adds up lora adapters, and a (prefix) has no sum",
        ),
        (
            "{kind: merge}",
            ("{kind: ia3}", "{dora: true}"),
            "a (ia3), b (lora with DoRA) has no sum. Choose lora, prefix, reft or embedding, without DoRA",
        ),
        (
            "{kind: merge}",
            ("{kind: reft}", "{}"),
            "combine.kind: adapters of different kinds have no sum (a (reft), b (lora))",
        ),
        (
            "{kind: merge, method: ties}",
            ("{kind: reft}", "{kind: reft, rank: 2}"),
            "ties is not defined for reft adapters",
        ),
        (
            "{kind: merge, method: linear}",
            ("{rank: 4}", "{rank: 8}"),
            "linear wants experts of one rank (a 4, b 8). Give them",
        ),
        (
            "{kind: mix}",
            ("{dora: true}", "{}"),
            "experts of a mix stand side by side on one base, and a (lora with DoRA) can",
        ),
        (
            "{kind: route}",
            ("{kind: ia3}", "{}"),
            "experts of a route stand side by side on one base, and a (ia3) cannot",
        ),
        ("{kind: mix}", ("{kind: full}", "{}"), "experts.a.adapter.kind: full training changes the base itself"),
    ],
)
def test_kinds_that_a_combination_does_not_take_are_told_once(
    problems: Problems, combine: str, adapters: tuple[str, str], says: str
) -> None:
    experts = f"experts: {{a: {{adapter: {adapters[0]}}}, b: {{adapter: {adapters[1]}}}}}\n"
    assert says in told(problems, combine, experts)


@pytest.mark.parametrize(
    ("combine", "experts", "why"),
    [
        ("{kind: mix, weights: search}", TWO, "weights have nothing to be searched by"),
        ("{kind: merge, weights: search}", TWO, "weights have nothing to be searched by"),
        ("{kind: boost}", "", "boost cannot tell when another round no longer helps"),
    ],
)
def test_what_is_judged_on_held_out_talk_needs_some(problems: Problems, combine: str, experts: str, why: str) -> None:
    found = told(problems, combine, experts, "data.valid=0")
    assert f"data.valid=0: 0 holds nothing out, so {why}. Write valid: 0.1" in found


@pytest.mark.parametrize(
    ("combine", "experts", "what"),
    [
        ("{kind: mix, weights: search}", TWO, "the weights were not chosen on"),
        ("{kind: merge, weights: search}", TWO, "the weights were not chosen on"),
        ("{kind: boost}", "", "the weights were not chosen on"),
        ("{kind: bag}", "", "the members were not stopped on"),
    ],
)
def test_what_is_chosen_on_held_out_talk_is_judged_on_other(
    problems: Problems, combine: str, experts: str, what: str
) -> None:
    found = told(problems, combine, experts, "data.test=0")
    assert f"data.test=0: 0 holds nothing out, so nothing is left to judge by that {what}. Give it a share" in found


@pytest.mark.parametrize("combine", ["{kind: route}", "{kind: mix}", "{kind: merge}", "{kind: gate}"])
def test_a_vote_is_offered_only_where_it_helps(problems: Problems, combine: str) -> None:
    experts = "experts: {a: {adapter: {dora: true}}, b: {}}\n"
    assert "vote" not in told(problems, combine, experts)
    found = problems(f"{LABELS}{experts}combine: {combine}\n", AS_LABELS, "evaluate.prompts=null")
    assert len(found) == 1 and "without DoRA, or combine by vote" in found[0], found


def test_members_on_several_bases_vote_over_labels(problems: Problems) -> None:
    experts = "experts: {a: {base: {model: owner/name}}, b: {}}\n"
    assert "a: members on bases of their own vote over labels" in told(problems, "{kind: vote, how: hard}", experts)


def test_an_embedding_router_needs_a_model_and_its_package(problems: Problems, monkeypatch: pytest.MonkeyPatch) -> None:
    def has(name: str) -> bool:
        return name == "sentence_transformers" or find_spec(name) is not None

    monkeypatch.setattr(world, "find_spec", lambda name: name if has(name) else None)
    assert "combine.encoder: router: embedding reads through a model of yours" in told(
        problems, "{kind: route, router: embedding}"
    )
    assert "combine.encoder: there is no folder './없는'" in told(
        problems, "{kind: route, router: embedding, encoder: ./없는}"
    )
    monkeypatch.setattr(world, "find_spec", lambda name: None if name == "sentence_transformers" else find_spec(name))
    assert "combine.router: needs sentence-transformers" in told(
        problems, "{kind: route, router: embedding, encoder: a/b}"
    )


def test_all_problems_of_a_combination_come_at_once_with_their_lines(problems: Problems) -> None:
    found = problems(
        "experts: {a: {train: {seed: 1}}, b: {}}\ncombine:\n  kind: merge\n  method: svd\n  density: 0.5\n  trials: 3\n"
        "  weights:\n    a: 1\n    c: 2\nserve: {top_p: 2}\n"
    )
    assert [one.split(": ")[0] for one in found] == [
        "line 8  combine.density",
        "line 9  combine.trials",
        "line 10  combine.weights",
        "line 12  combine.weights.c",
        "line 13  serve.top_p",
    ]


def test_a_broken_expert_is_not_also_missing_from_the_weights(problems: Problems) -> None:
    for expert in ("3", "{adapter: {kind: prefx}}"):
        experts = f"experts: {{casual: {expert}, polite: {{train: {{seed: 1}}}}}}\n"
        assert "experts.casual" in told(problems, "{kind: mix, weights: {casual: 1, polite: 1}}", experts)


def test_a_wrong_kind_of_combination_is_not_also_a_contradiction(problems: Problems) -> None:
    found = told(problems, "{kind: vot, how: soft}", "experts: {a: {base: {model: x}}, b: {}}\n")
    assert "combine.kind" in found


def test_an_override_of_a_combination_is_named_where_it_is_wrong(problems: Problems) -> None:
    (found,) = problems(f"{TWO}combine: {{kind: mix}}\n", "combine.weights={casual: 1}")
    assert found.startswith("override combine.weights={casual: 1}: polite: without a weight. Give one")
