"""The verdict on a combination: only an interval on one side of zero says that it helps, or that it hurts."""

import random

import pytest

from toolkit.ensemble.compare import verdict


def conversations(mean: float, n: int = 60, seed: int = 0) -> list[tuple[float, float]]:
    """(nats, tokens) of made-up conversations around a mean loss."""
    noise = random.Random(seed)
    return [
        (tokens * (mean + noise.gauss(0, 0.3)), float(tokens)) for tokens in (noise.randint(5, 40) for _ in range(n))
    ]


def test_a_lower_loss_on_the_same_conversations_helps() -> None:
    best = conversations(4.0)
    found = verdict({"반말": best}, [(0.9 * nats, n) for nats, n in best], "loss")
    assert found.helps and not found.hurts
    assert found.gain == pytest.approx(0.1) and found.low == pytest.approx(0.1)
    assert found.sentence("mix (logprob)").startswith("The mix (logprob) helps: loss ")
    assert "-10.0 % (-10.0 to -10.0; 60 held-out conversations, one seed)" in found.sentence("mix (logprob)")


def test_a_higher_one_hurts_and_the_sentence_says_who_is_better() -> None:
    best = conversations(4.0)
    found = verdict({"casual": best}, [(1.1 * nats, n) for nats, n in best], "loss")
    assert found.hurts and not found.helps
    assert "does not help, casual alone is better" in found.sentence("gate (learned)")


def test_what_may_be_chance_is_called_that() -> None:
    found = verdict({"casual": conversations(4.0, seed=1)}, conversations(4.0, seed=2), "loss")
    assert not found.helps and not found.hurts and found.low < 0 < found.high
    assert "does not help beyond chance" in found.sentence("vote (soft)")


def test_mistakes_are_compared_in_points_and_may_be_none() -> None:
    best = [(1.0, 1.0)] * 6 + [(0.0, 1.0)] * 24
    found = verdict({"a": best}, [(0.0, 1.0)] * 30, "error rate")
    assert found.gain == pytest.approx(0.2) and found.of_combination == 0.0
    assert "-20.0 points" in found.sentence("bag (soft)")
    nobody_wrong = verdict({"a": [(0.0, 1.0)] * 30}, [(0.0, 1.0)] * 30, "error rate")
    assert nobody_wrong.gain == 0.0 and not nobody_wrong.helps and not nobody_wrong.hurts


def test_other_conversations_are_no_comparison() -> None:
    with pytest.raises(ValueError, match="paired"):
        verdict({"a": conversations(4.0)}, conversations(4.0, n=59), "loss")


def test_it_is_measured_against_the_member_that_is_best_there_wherever_it_stands() -> None:
    weak, strong = conversations(5.0), conversations(4.0)
    found = verdict({"weak": weak, "강한": strong}, [(0.9 * nats, n) for nats, n in weak], "loss")
    assert found.best == "강한" and found.hurts and not found.helps


def test_a_handful_of_conversations_decides_nothing() -> None:
    found = verdict({"a": [(8.0, 1.0)]}, [(7.9, 1.0)], "loss")
    assert not found.helps and not found.hurts
    assert "cannot be told from so few" in found.sentence("route (classifier)")
    assert "1 held-out conversation," in found.sentence("route (classifier)")
    assert "-0.0" not in verdict({"a": [(0.0, 1.0)] * 3}, [(0.0, 1.0)] * 3, "error rate").sentence("bag (soft)")


def test_weights_fitted_on_the_judge_are_called_that() -> None:
    best = conversations(4.0)
    found = verdict({"a": best}, [(0.9 * nats, n) for nats, n in best], "loss", chosen_here=True)
    assert not found.helps and "fitted on the talk that judges it" in found.sentence("mix (logprob)")
