"""Votes over labels and over answers, on numbers small enough to check by hand."""

import math
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.combined_world import GREEDY, PROMPTS, words
from tests.stacked_world import World
from toolkit.combine.mix import Mix
from toolkit.combine.vote import VoteOfAnswers, first_best, majority, normalised, vote_labels
from toolkit.errors import InputError, MaltuError
from toolkit.generate import Sampling

HOWS = ("hard", "soft", "logprob")
NEVER = -math.inf


def scores(*members: list[list[float]]) -> Tensor:
    """Log-likelihoods [K, R, L] from probabilities."""
    return torch.tensor(members).log()


# Two for the first label, barely; one for the second, certainly; so the ways of voting disagree.
SPLIT = scores([[0.5, 0.4, 0.1]], [[0.5, 0.4, 0.1]], [[0.01, 0.98, 0.01]])


class TestLabels:
    def test_hard_counts_heads(self) -> None:
        voted = vote_labels(SPLIT, "hard")
        assert voted.choice_R.tolist() == [0]
        torch.testing.assert_close(voted.probs_RL, torch.tensor([[2 / 3, 1 / 3, 0.0]], dtype=torch.float64))

    def test_soft_averages_probabilities(self) -> None:
        voted = vote_labels(SPLIT, "soft")
        assert voted.choice_R.tolist() == [1]
        torch.testing.assert_close(
            voted.probs_RL, torch.tensor([[1.01 / 3, 1.78 / 3, 0.21 / 3]]).double(), rtol=1e-6, atol=1e-6
        )

    def test_logprob_averages_their_logarithms(self) -> None:
        voted = vote_labels(SPLIT, "logprob", [0.2, 0.3, 0.5])
        product = torch.tensor([0.5, 0.4, 0.1]) ** 0.5 * torch.tensor([0.01, 0.98, 0.01]) ** 0.5
        torch.testing.assert_close(voted.probs_RL[0], (product / product.sum()).double(), rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("how", HOWS)
    def test_scores_that_are_not_normalised_are_made_to(self, how: Any) -> None:
        noise = torch.Generator().manual_seed(0)
        shifted = SPLIT + 5 * torch.randn(3, 1, 1, generator=noise)
        torch.testing.assert_close(vote_labels(shifted, how).probs_RL, vote_labels(SPLIT, how).probs_RL)

    @pytest.mark.parametrize("how", HOWS)
    def test_rows_are_voted_apart_and_sum_to_one(self, how: Any) -> None:
        many = torch.randn(4, 30, 5, generator=torch.Generator().manual_seed(1))
        together = vote_labels(many, how, [0.1, 0.2, 0.3, 0.4])
        torch.testing.assert_close(together.probs_RL.sum(-1), torch.ones(30).double())
        alone = vote_labels(many[:, 7:8], how, [0.1, 0.2, 0.3, 0.4])
        assert together.choice_R[7] == alone.choice_R[0] and len(set(together.choice_R.tolist())) > 1

    @pytest.mark.parametrize("how", HOWS)
    def test_one_member_or_all_the_weight_is_that_members_vote(self, how: Any) -> None:
        many = torch.randn(3, 30, 5, generator=torch.Generator().manual_seed(2))
        wanted = many[1].argmax(-1).tolist()
        assert vote_labels(many[1:2], how).choice_R.tolist() == wanted
        assert vote_labels(many, how, [0.0, 3.0, 0.0]).choice_R.tolist() == wanted

    @pytest.mark.parametrize("how", HOWS)
    def test_ties_go_to_the_label_that_stands_first(self, how: Any) -> None:
        """Also where the same shares were summed in another order, and within one member."""
        tied = scores([[0.1, 0.6, 0.3]], [[0.1, 0.3, 0.6]])
        assert vote_labels(tied, how).choice_R.tolist() == [1]
        assert vote_labels(scores([[0.2, 0.4, 0.4]]), how).choice_R.tolist() == [1]
        shares = [0.1, 0.2, 0.3, 0.3, 0.3]
        weighed = scores([[0.1, 0.1, 0.8]], [[0.1, 0.1, 0.8]], [[0.1, 0.8, 0.1]], [[0.8, 0.1, 0.1]], [[0.4, 0.3, 0.3]])
        assert vote_labels(weighed[:4], "hard", shares[:4]).choice_R.tolist() == [0]

    def test_first_best_is_the_first_of_equal_ones(self) -> None:
        assert first_best(torch.tensor([[1.0, 2.0, 2.0], [3.0, 1.0, 3.0]]), 0.0).tolist() == [1, 0]
        assert first_best(torch.tensor([NEVER, NEVER]), 0.0).item() == 0

    def test_a_label_that_a_member_excludes(self) -> None:
        given = scores([[0.7, 0.3, 0.0]], [[0.0, 0.3, 0.7]])
        assert vote_labels(given, "logprob").probs_RL.tolist() == [[0.0, 1.0, 0.0]]
        assert vote_labels(given, "soft").choice_R.tolist() == [0]

    @pytest.mark.parametrize(
        ("given", "how", "weights", "says"),
        [
            (SPLIT, "median", None, "'median' is no way to vote over labels. Use hard, soft or logprob"),
            (SPLIT, "majority", None, "no way to vote over labels"),
            (SPLIT[0], "soft", None, "members by rows by labels"),
            (SPLIT[:0], "soft", None, "members by rows by labels"),
            (SPLIT[:, :, :0], "soft", None, "members by rows by labels"),
            (SPLIT * math.nan, "hard", None, "no numbers"),
            (-SPLIT * math.inf, "hard", None, "no numbers"),
            (SPLIT, "hard", [1.0, 1.0, -1.0], "-1 is negative"),
            (SPLIT, "soft", [1.0, 1.0, -1.0], "-1 is negative"),
            (SPLIT, "logprob", [1.0, -1.0, 0.0], "sum to 0"),
            (SPLIT, "soft", [1.0, 1.0], "2 weights for 3"),
            (SPLIT, "soft", [0.0, 0.0, 0.0], "every weight is 0"),
            (SPLIT, "soft", [math.nan, 1.0, 1.0], "nan is no weight"),
        ],
    )
    def test_what_cannot_be_voted_on_is_refused(self, given: Tensor, how: Any, weights: Any, says: str) -> None:
        with pytest.raises(InputError) as caught:
            vote_labels(given, how, weights)
        assert says in str(caught.value)

    def test_nothing_left_to_choose_is_said(self) -> None:
        with pytest.raises(MaltuError, match="Between them"):
            vote_labels(scores([[1.0, 0.0]], [[0.0, 1.0]]), "logprob")

    def test_no_rows_have_no_choices(self) -> None:
        assert vote_labels(SPLIT[:, :0], "hard").choice_R.tolist() == []
        assert vote_labels(SPLIT[:, :0], "logprob").choice_R.tolist() == []


class TestAnswers:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("오늘 뭐 먹지?", unicodedata.normalize("NFD", "오늘 뭐 먹지?")),
            ("Seoul.", "seoul"),
            ("  서울   타워 \n", "서울 타워"),
            ("좋아!!", "좋아"),
            ("글쎄…", "글쎄..."),
            ("STRASSE", "straße"),
            ("네。", "네"),
            ("응~", "응 ~"),
        ],
    )
    def test_spelling_that_says_the_same_counts_together(self, one: str, other: str) -> None:
        assert one != other and normalised(one) == normalised(other)

    @pytest.mark.parametrize(("one", "other"), [("?", "!"), ("C#", "C"), ("50%", "50"), ("3.5", "35"), ("", "?")])
    def test_spelling_that_says_something_else_does_not(self, one: str, other: str) -> None:
        assert normalised(one) != normalised(other)

    def test_the_most_frequent_wins_in_the_words_of_the_first(self) -> None:
        won = majority(["부산", "서울.", "서울", "부산항", "서울!"])
        assert (won.answer, won.member) == ("서울.", 1) and math.isclose(won.share, 0.6)

    def test_a_tie_goes_to_the_answer_that_stands_first(self) -> None:
        assert majority(["나", "가", "가", "나"]).answer == "나"
        assert majority(["나", *["가"] * 6], [0.6] + [0.1] * 6).answer == "나"  # the six sum to 0.5000000000000001

    def test_weights_decide_and_one_without_weight_has_no_say(self) -> None:
        assert majority(["가", "가", "나"], [1, 1, 5]).answer == "나"
        won = majority(["나.", "가", "나"], [0, 1, 2])
        assert (won.answer, won.member) == ("나", 2)

    def test_one_answer_is_itself(self) -> None:
        assert majority(["  네! "]).answer == "  네! "

    @pytest.mark.parametrize(
        ("answers", "weights", "says"),
        [([], None, "none to choose from"), (["가"], [1, 2], "2 weights for 1"), (["가", "나"], [2, -1], "negative")],
    )
    def test_what_cannot_be_voted_on_is_refused(self, answers: list[str], weights: Any, says: str) -> None:
        with pytest.raises(InputError, match=says):
            majority(answers, weights)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def test_the_answer_is_what_most_members_say_alone(world: World, tmp_path: Path) -> None:
    """Two copies of one adapter outvote another, wherever it stands."""
    stack = world.stack(["lora", "reft"])
    stack.add("또", world.folders["reft"])
    for members in (["lora", "reft", "또"], ["reft", "lora", "또"]):
        answers = VoteOfAnswers.of(members).answer(stack, words(), PROMPTS, GREEDY)
        assert answers == Mix.of(["reft"]).answer(stack, words(), PROMPTS, GREEDY)
    assert answers != Mix.of(["lora"]).answer(stack, words(), PROMPTS, GREEDY)


def test_members_that_end_early_leave_the_others_their_own_adapters(world: World) -> None:
    """Each member's answer, in a batch with the others, is that of itself alone."""
    names = ["lora", "prefix", "lora-7", "embedding", None]
    stack, sampling = world.stack(), Sampling(temperature=0.0, max_tokens=12)
    first = Mix.of(["lora"]).answer(stack, words(), PROMPTS, sampling)
    sampling = replace(
        sampling, stop=tuple(f"말{answer.ids[place]}" for answer, place in zip(first, (2, 5, 8), strict=True))
    )
    alone = {name: Mix.of([name]).answer(stack, words(), PROMPTS, sampling) for name in names}
    for place, name in enumerate(names):
        weights = [1.0 + (number == place) * 9 for number in range(len(names))]
        assert VoteOfAnswers.of(names, weights).answer(stack, words(), PROMPTS, sampling) == alone[name]
    assert len({len(answer.ids) for answers in alone.values() for answer in answers}) > 1
