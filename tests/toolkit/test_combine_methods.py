"""Every method is described, and nothing else is."""

import dataclasses
from typing import get_args

import pytest

from toolkit.combine.lowrank import exact, linear, svd
from toolkit.combine.methods import METHODS, Method, method_named, names_of
from toolkit.combine.mix import Over, mixed
from toolkit.combine.sparse import SPARSE
from toolkit.combine.vote import Vote, majority, vote_labels
from toolkit.errors import InputError
from toolkit.recipe.combine import MERGES

FUNCTIONS = {"exact": exact, "svd": svd, "linear": linear, **SPARSE}


def test_every_method_that_can_be_applied_is_described_once() -> None:
    assert names_of("merge") == tuple(FUNCTIONS)
    assert names_of("mix") == get_args(Over)
    assert names_of("vote") == (*get_args(Vote), "majority")
    assert len({(method.kind, method.name) for method in METHODS}) == len(METHODS) == 22
    assert {name for names in MERGES.values() for name in names} == set(FUNCTIONS)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.kind}-{method.name}")
def test_a_description_says_all_that_a_page_needs(method: Method) -> None:
    for field in dataclasses.fields(method):
        text = getattr(method, field.name)
        assert text and text == text.strip(), field.name
    assert method.says.endswith(".") and method.training.endswith(".") and method.serving.endswith(".")
    assert any(character.isdigit() for character in method.paper)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_docstring_of_a_merge_names_the_paper_of_its_description(name: str) -> None:
    said = " ".join((FUNCTIONS[name].__doc__ or "").split())
    papers = [part.strip(" ;.,") for part in method_named("merge", name).paper.split("arXiv")[1:]]
    assert all(paper.split(";")[0] in said for paper in papers)
    assert papers or "Psychometrika 1(3)" in said


@pytest.mark.parametrize("function", [mixed, vote_labels, majority])
def test_so_do_those_of_mixing_and_voting(function: object) -> None:
    assert any(year in (function.__doc__ or "") for year in ("1998", "2002", "2203.11171"))


def test_a_method_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match=r"'slerp' is no method\. Use one of: exact, svd, linear"):
        method_named("merge", "slerp")
