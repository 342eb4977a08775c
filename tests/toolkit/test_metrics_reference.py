"""docs/reference/metrics.md says what evaluation measures: every word of a recipe, every number under its name."""

from pathlib import Path
from typing import get_args

from toolkit.corpus.talk import Turn
from toolkit.evaluate.classify import scores_of
from toolkit.evaluate.reference import MEASURES, document
from toolkit.evaluate.spoken import PairBits, spoken_numbers
from toolkit.evaluate.talk import HeldOut, Prompt, Sample, TalkLoss, measure
from toolkit.judge import ANSWER_TOKENS, NUMBERS
from toolkit.recipe.model import Metric

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
NAMES = {one.metric: one.numbers for one in MEASURES}


def test_the_page_is_what_the_code_says() -> None:
    remedy = "run: python -m toolkit.evaluate.reference > docs/reference/metrics.md"
    assert PAGE.read_text(encoding="utf-8") == document(), remedy


def test_every_metric_of_a_recipe_is_described_once() -> None:
    assert tuple(NAMES) == get_args(Metric) == tuple(NUMBERS)


def test_every_number_belongs_to_its_metric() -> None:
    for metric, numbers in NAMES.items():
        assert all(name.startswith(NUMBERS[metric]) for name in numbers), metric


def test_every_number_that_is_measured_is_described() -> None:
    sample = Sample(Prompt("p", (Turn("user", "뭐 해?"),), "ko", "그냥 있어"), "그냥 있어.", "stop", 4)
    held = HeldOut((TalkLoss(2.0, 2, 1.0, 1, 3, "ko"),))
    found = {name.replace("_", " ") for name in (*measure([sample]).summary(), *held.summary())}
    found |= set(spoken_numbers([sample], {"all": PairBits(1, 1.0, 2.0)}))
    labels = ("a", "b")
    found |= {name.replace("_", " ") for name in scores_of(["a"], [{"a": 0.9, "b": 0.1}], labels).summary()}
    counts = {"n", "n tokens", "n talks"}  # how many, no metric
    assert found - counts == {name for numbers in NAMES.values() for name in numbers}


def test_answers_are_cut_where_the_page_says() -> None:
    assert f"at {ANSWER_TOKENS} tokens" in document()
