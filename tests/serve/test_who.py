"""What `model` may say, and what it means."""

from typing import Any

import pytest

from serve.engines.contract import Auto, Mix, One, Vote, Who
from serve.refusal import Refusal
from serve.schemas import Options
from serve.who import label_of, read_who

NAMES = ("base", "casual", "말투", "voices", "voices/polite", "voices/brief", "others", "others/brief")


def read(word: str, **options: Any) -> Who:
    return read_who(word, Options.model_validate(options) if options else None, NAMES)


def refused(word: str, **options: Any) -> Refusal:
    with pytest.raises(Refusal) as raised:
        read(word, **options)
    return raised.value


@pytest.mark.parametrize("word", NAMES)
def test_a_served_name_is_itself(word: str) -> None:
    assert read(word) == One(word)


def test_an_experts_bare_name_is_enough_where_one_run_has_it() -> None:
    assert read("polite") == One("voices/polite")


def test_an_experts_bare_name_that_several_have_is_answered_with_the_candidates() -> None:
    refusal = refused("brief")
    assert (refusal.status, refusal.param) == (400, "model")
    assert "voices/brief" in refusal.message and "others/brief" in refusal.message


def test_auto_lets_the_router_pick() -> None:
    assert read("auto") == Auto()


@pytest.mark.parametrize(
    ("word", "weights"),
    [
        ("mix:casual=0.7,말투=0.3", (("casual", 0.7), ("말투", 0.3))),
        ("mix: polite = 1 , voices/brief = -.5", (("voices/polite", 1.0), ("voices/brief", -0.5))),
        ("mix:base=1e-3,casual=2", (("base", 0.001), ("casual", 2.0))),
    ],
)
def test_a_mixture_is_names_with_weights(word: str, weights: tuple[tuple[str, float], ...]) -> None:
    assert read(word) == Mix(weights)


def test_the_same_mixture_can_be_json() -> None:
    assert read("mix", mix={"casual": 0.7, "polite": 0.3}) == Mix((("casual", 0.7), ("voices/polite", 0.3)))
    assert read("mix", mix={"casual": 1}, over="prob") == Mix((("casual", 1.0),), "prob")


def test_a_vote_is_names() -> None:
    assert read("vote:casual, polite,base") == read("vote", vote=["casual", "voices/polite", "base"])
    assert read("vote:casual") == Vote(("casual",))


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("mix:casual", "has no weight"),
        ("mix:", "has no weight"),
        ("mix:casual=nan", "is no weight"),
        ("mix:casual=1e999", "no number up to"),
        ("mix:casual=1,casual=2", "stands twice"),
        ("mix:polite=1,voices/polite=2", "stands twice"),
        ("mix:casual=0x10", "is no weight"),
        ("mix:brief=1", "could be any of"),
        ("vote:casual,casual", "stands twice"),
        ("mix", "name who"),
        ("vote", "name who"),
    ],
)
def test_a_combination_that_does_not_read_is_refused(word: str, says: str) -> None:
    refusal = refused(word)
    assert (refusal.status, refusal.param) == (400, "model") and says in refusal.message


def test_too_many_members_are_refused() -> None:
    names = tuple(f"m{n}" for n in range(20))
    with pytest.raises(Refusal, match="at most 16"):
        read_who("vote:" + ",".join(names), None, names)


def test_model_and_options_have_to_agree() -> None:
    assert refused("casual", mix={"casual": 1}).param == "model"
    assert refused("mix", vote=["casual"]).param == "model"
    assert refused("mix", mix={"nobody": 1}).param == "maltu.mix"


@pytest.mark.parametrize(
    "word", ["gpt-4o", "../casual", "other/brief", "Casual", "casual ", "x" * 200, "mix:x=1", "vote:"]
)
def test_an_unknown_name_is_answered_with_those_there_are(word: str) -> None:
    refusal = refused(word)
    assert (refusal.status, refusal.param, refusal.code) == (404, "model", "model_not_found")
    assert "base, casual, 말투" in refusal.message and len(refusal.message) < 300


def test_metrics_know_combinations_by_their_kind() -> None:
    assert list(map(label_of, map(read, ("casual", "auto", "mix:casual=1", "vote:base")))) == [
        "casual",
        "auto",
        "mix",
        "vote",
    ]
