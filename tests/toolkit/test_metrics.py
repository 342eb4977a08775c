"""Every number against one computed by hand or by the package that defines it."""

import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from toolkit.evaluate.metrics import (
    accuracy,
    bits_per_byte,
    bootstrap_interval,
    chrf,
    confusion,
    distinct_n,
    expected_calibration_error,
    log_loss,
    macro_f1,
    nfc,
    repetition_4gram,
)

DECOMPOSED = "\u1100\u1161\u11ab\u1103\u1161"  # 간다, letter by letter


def test_nfc_composes_hangul() -> None:
    assert nfc(DECOMPOSED) == "간다" and len(DECOMPOSED) == 5


def test_chrf_of_the_reference_itself_is_100_and_of_other_words_low() -> None:
    assert chrf(["오늘 뭐 먹지?"], ["오늘 뭐 먹지?"]) == pytest.approx(100.0)
    assert chrf(["abc"], ["오늘 뭐 먹지?"]) < 1.0


def test_chrf_reads_decomposed_hangul_as_composed() -> None:
    assert chrf([DECOMPOSED], ["간다"]) == pytest.approx(100.0)


def test_chrf_wants_a_reference_for_every_answer() -> None:
    with pytest.raises(ValueError, match="1 answers and 0 references"):
        chrf(["a"], [])


def test_distinct_counts_different_pairs_over_all_texts() -> None:
    assert distinct_n(["나는 간다", "나는 간다 또"], 2) == 2 / 3
    assert distinct_n(["하나"], 2) == 0.0 == distinct_n([], 2)


def test_punctuation_is_a_unit_and_case_is_not() -> None:
    assert distinct_n(["Oh, no. oh, NO."], 2) == pytest.approx(4 / 7)


def test_repetition_is_the_share_of_4grams_said_before_in_the_same_text() -> None:
    assert repetition_4gram(["a b c d a b c d"]) == pytest.approx(1 / 5)
    assert repetition_4gram(["a b c d", "a b c d"]) == 0.0
    assert repetition_4gram(["짧다", ""]) == 0.0


def test_a_long_circle_weighs_more_than_a_short_answer() -> None:
    assert repetition_4gram(["그래 " * 40, "오늘은 비가 와서 우산 챙겼어"]) > 0.9


def test_a_circle_without_spaces_is_a_circle() -> None:
    assert repetition_4gram(["ㅋ" * 40]) > 0.9 and repetition_4gram(["ㅋㅋㅋㅋㅋㅋ"]) == 0.0


def test_bits_per_byte_of_one_bit_a_byte_is_one() -> None:
    assert bits_per_byte(math.log(2) * 12, 12) == pytest.approx(1.0)
    assert math.isnan(bits_per_byte(1.0, 0))


GOLD = ["a", "a", "a", "b", "b", "c"]
SAID = ["a", "b", "a", "b", "c", "b"]


def test_accuracy_is_the_share_that_is_right() -> None:
    assert accuracy(GOLD, SAID) == 3 / 6


def test_confusion_and_macro_f1_equal_those_of_scikit_learn() -> None:
    assert confusion(GOLD, SAID, "abc") == confusion_matrix(GOLD, SAID, labels=list("abc")).tolist()
    assert macro_f1(GOLD, SAID, "abc") == pytest.approx(f1_score(GOLD, SAID, average="macro"))


def test_a_label_that_occurs_nowhere_does_not_lower_macro_f1() -> None:
    assert macro_f1(["a", "b"], ["a", "b"], "abz") == 1.0


def test_log_loss_is_the_mean_surprise_at_the_gold_label() -> None:
    surprise = log_loss(["a", "b"], [{"a": 0.5, "b": 0.5}, {"a": 0.75, "b": 0.25}])
    assert surprise == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert log_loss(["a"], [{"a": 0.0, "b": 1.0}]) == pytest.approx(-math.log(1e-15))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = [{"a": 0.95, "b": 0.05}] * 4
    assert expected_calibration_error(["a", "a", "b", "b"], sure) == pytest.approx(0.45)
    two_bins = [{"a": 1.0, "b": 0.0}, {"a": 0.6, "b": 0.4}]
    assert expected_calibration_error(["a", "b"], two_bins) == pytest.approx(0.3)


@pytest.mark.parametrize("measured", [accuracy, lambda gold, said: macro_f1(gold, said, "ab")])
def test_lists_that_do_not_match_are_refused(measured: object) -> None:
    with pytest.raises(ValueError, match="2 labels against 1"):
        measured(["a", "b"], ["a"])  # type: ignore[operator]


def talks(mean: float, n: int = 200) -> list[tuple[float, float]]:
    draw = np.random.default_rng(0)
    lengths = draw.integers(5, 40, n)
    return [
        (float(length * (mean + noise)), float(length))
        for length, noise in zip(lengths, draw.normal(0, 0.3, n), strict=True)
    ]


def test_bootstrap_value_is_the_fall_of_the_mean() -> None:
    found = bootstrap_interval([(10.0, 2.0), (20.0, 2.0)], [(9.0, 2.0), (15.0, 2.0)], n=50)
    assert found.value == pytest.approx(1 - 24 / 30) and found.low <= found.value <= found.high


def test_bootstrap_is_narrow_around_a_clear_fall_and_holds_zero_without_one() -> None:
    clear = bootstrap_interval(talks(5.0), [(nll * 0.88, n) for nll, n in talks(5.0)], n=300)
    assert (clear.low, clear.high) == (pytest.approx(0.12), pytest.approx(0.12))
    shuffled = talks(5.0)[::-1]
    none = bootstrap_interval(talks(5.0), shuffled, n=300)
    assert none.low < 0.0 < none.high


def test_bootstrap_repeats_with_its_seed() -> None:
    a, b = talks(5.0), talks(5.0)[::-1]
    assert bootstrap_interval(a, b, n=50, seed=1) == bootstrap_interval(a, b, n=50, seed=1)
    assert bootstrap_interval(a, b, n=50, seed=1) != bootstrap_interval(a, b, n=50, seed=2)


def test_bootstrap_wants_the_same_conversations() -> None:
    with pytest.raises(ValueError, match="2 and 1 conversations"):
        bootstrap_interval([(1.0, 1.0)] * 2, [(1.0, 1.0)])
