"""The sampler against the plainest one there is, row by row, whatever stands beside a row."""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from toolkit.errors import InputError
from toolkit.sampling import Sampling, bent, choose, keep_likely, likeliest, logprobs_of, noise

WARM = Sampling(temperature=1.0, top_p=1.0)


@dataclasses.dataclass
class Read:
    """A text as the sampler asks for it."""

    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()

    @property
    def read(self) -> frozenset[int]:
        return frozenset(self.prompt)

    @property
    def counts(self) -> Mapping[int, int]:
        return Counter(self.answer)


def logits(n_rows: int, n_vocabulary: int, seed: int, spread: float = 3.0) -> Tensor:
    return spread * torch.randn(n_rows, n_vocabulary, generator=torch.Generator().manual_seed(seed))


def plainly_kept(probs: list[float], sampling: Sampling) -> set[int]:
    """Which tokens a row keeps, by the books."""
    order = sorted(range(len(probs)), key=lambda token: -probs[token])
    if 0 < sampling.top_k < len(probs):
        last = probs[order[sampling.top_k - 1]]
        order = [token for token in order if probs[token] >= last]
    if sampling.top_p < 1.0:
        whole = math.fsum(probs[token] for token in order) if 0 < sampling.top_k < len(probs) else 1.0
        reached, floor = 0.0, 0.0
        for token in order:
            if reached >= sampling.top_p * whole:
                break
            reached, floor = reached + probs[token], probs[token]
        order = [token for token in order if probs[token] >= floor]
    return {token for token in order if probs[token] >= sampling.min_p * max(probs) and probs[token] > 0}


SAMPLINGS = some.builds(
    Sampling,
    temperature=some.sampled_from([0.0, 0.3, 0.7, 1.0, 4.0]),
    top_p=some.sampled_from([1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 1.0]),
    top_k=some.sampled_from([0, 1, 2, 40, 300, 5000]),
    min_p=some.sampled_from([0.0, 0.0, 0.05, 0.9]),
    repetition_penalty=some.sampled_from([1.0, 1.0, 1.3, 0.8]),
    presence_penalty=some.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=some.sampled_from([0.0, 0.0, 0.7]),
    logit_bias=some.dictionaries(some.integers(0, 299), some.floats(-100, 100), max_size=3),
)


@settings(max_examples=60, deadline=None)
@given(some.lists(SAMPLINGS, min_size=1, max_size=6), some.integers(0, 10**6), some.sampled_from([300, 5003]))
def test_a_row_gets_the_same_token_alone_as_beside_any_others(
    samplings: list[Sampling], seed: int, n_vocabulary: int
) -> None:
    given_BV = logits(len(samplings), n_vocabulary, seed)
    texts = [Read(range(row, row + 20), [row, row, 7]) for row in range(len(samplings))]
    noise_B = [noise(seed, row, 0) for row in range(len(samplings))]
    together = choose(bent(given_BV, samplings, texts), samplings, noise_B)
    for row, sampling in enumerate(samplings):
        own_1V = bent(given_BV[row : row + 1], [sampling], [texts[row]])
        assert choose(own_1V, [sampling], noise_B[row : row + 1]) == [together[row]]


@settings(max_examples=60, deadline=None)
@given(SAMPLINGS, some.integers(0, 10**6), some.sampled_from([9, 300, 5003]), some.sampled_from([0.05, 1.0, 4.0]))
def test_what_is_kept_is_what_the_definitions_say(
    sampling: Sampling, seed: int, n_vocabulary: int, spread: float
) -> None:
    probs_1V = torch.softmax(logits(1, n_vocabulary, seed, spread), -1)
    kept = set(keep_likely(probs_1V, [sampling])[0].nonzero()[:, 0].tolist())
    assert kept == plainly_kept(probs_1V[0].tolist(), sampling)


def test_temperature_zero_takes_the_likeliest_token() -> None:
    given_BV = torch.tensor([[0.0, 3.0, 1.0], [2.0, -1.0, 0.0]])
    assert choose(given_BV, [Sampling(temperature=0.0)] * 2, [0.9, 0.9]) == [1, 0]


@pytest.mark.parametrize("n_pad", [0, 1, 61, 200])
def test_noise_lands_in_the_cumulative_probabilities(n_pad: int) -> None:
    """In id order, whichever block of ids they lie in."""
    given_1V = torch.cat([torch.full((1, n_pad), -math.inf), torch.log(torch.tensor([[0.2, 0.5, 0.3]]))], dim=1)
    landed = [choose(given_1V, [WARM], [u])[0] - n_pad for u in (0.0, 0.19, 0.21, 0.69, 0.71, 0.9999)]
    assert landed == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("place", [0, 1, 63, 64, 199])
def test_a_token_of_probability_zero_is_never_drawn(place: int) -> None:
    given_1V = torch.full((1, 200), -math.inf)
    given_1V[0, place] = 0.0
    assert {choose(given_1V, [WARM], [u])[0] for u in (0.0, 0.5, 1 - 2**-32)} == {place}


def test_tokens_come_as_often_as_they_are_likely() -> None:
    given_1V = logits(1, 130, 0, 1.0)
    drawn = choose(given_1V.expand(4000, -1), [WARM] * 4000, [(row + 0.5) / 4000 for row in range(4000)])
    shares = torch.bincount(torch.tensor(drawn), minlength=130) / 4000
    torch.testing.assert_close(shares, given_1V.softmax(-1)[0], rtol=0, atol=1 / 2000)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(top_k=2, top_p=1.0), [1, 3]),
        (Sampling(top_p=0.6), [1, 3]),
        (Sampling(top_p=0.39), [1]),
        (Sampling(top_p=1.0, min_p=0.5), [1, 3]),
        (Sampling(top_k=3, top_p=0.5), [1, 3]),
    ],
)
def test_filters_keep_the_likely(sampling: Sampling, kept: list[int]) -> None:
    probs = torch.tensor([[0.1, 0.4, 0.15, 0.35]])
    assert keep_likely(probs, [sampling])[0].nonzero()[:, 0].tolist() == kept


def test_equal_probabilities_share_one_fate() -> None:
    probs = torch.tensor([[0.2, 0.2, 0.4, 0.2]])
    for sampling in (Sampling(top_k=2, top_p=1.0), Sampling(top_p=0.5), Sampling(top_p=0.5, top_k=3)):
        assert bool((keep_likely(probs, [sampling]) > 0).all())


@pytest.mark.parametrize("n", [1, 3, 256, 1999, 2000])
def test_the_likeliest_are_those_of_a_full_sort(n: int) -> None:
    probs_BV = torch.softmax(logits(3, 2000, 0), -1)
    assert torch.equal(likeliest(probs_BV, n), probs_BV.sort(-1, descending=True).values[:, :n])


def test_a_repetition_penalty_weakens_what_was_read_and_written() -> None:
    given_BV = torch.tensor([[2.0, 1.5, -9.0], [-1.0, -1.5, -9.0], [2.0, 1.5, -9.0]])
    samplings, texts = [Sampling(repetition_penalty=2.0)] * 2, [Read([0]), Read([], [0])]
    weak_BV = bent(given_BV, [*samplings, WARM], [*texts, Read([0])])
    assert weak_BV.tolist() == [[1.0, 1.5, -9.0], [-2.0, -1.5, -9.0], [2.0, 1.5, -9.0]]


def test_presence_and_frequency_count_the_answer_alone() -> None:
    given_1V = torch.zeros(1, 4)
    text = Read([3, 3, 3], [0, 1, 1])
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    assert bent(given_1V, [sampling], [text]).tolist() == [[-0.75, -1.0, 0.0, 0.0]]
    assert given_1V.tolist() == [[0.0] * 4]


def test_a_bias_is_added_after_the_repetition_penalty() -> None:
    sampling = Sampling(repetition_penalty=2.0, logit_bias={1: -3.0, 2: 5.0}, presence_penalty=1.0)
    assert bent(torch.full((1, 4), 4.0), [sampling], [Read([1], [0])]).tolist() == [[1.0, -1.0, 9.0, 4.0]]


def test_rows_without_penalties_are_not_copied() -> None:
    given_BV = torch.zeros(2, 4)
    assert bent(given_BV, [WARM, Sampling()], [Read(), Read([1], [2])]) is given_BV


def test_log_probabilities_are_those_of_the_model() -> None:
    given_V = logits(1, 50, 1)[0]
    value, top = logprobs_of(given_V, 7, 3)
    wanted = given_V.log_softmax(-1)
    assert value == float(wanted[7]) and [token for token, _ in top] == wanted.topk(3).indices.tolist()
    assert logprobs_of(given_V, 7, 0) == (value, []) and len(logprobs_of(given_V, 7, 99)[1]) == 50


def test_noise_is_even_and_differs_by_seed_row_and_position() -> None:
    drawn = [noise(seed, row, position) for seed in range(20) for row in range(20) for position in range(20)]
    shares = torch.histc(torch.tensor(drawn), bins=10, min=0.0, max=1.0) / len(drawn)
    assert len(set(drawn)) == len(drawn) and 0.0 <= min(drawn) and max(drawn) < 1.0
    assert shares.min() > 0.09 and shares.max() < 0.11


def test_sampling_names_every_value_out_of_range() -> None:
    with pytest.raises(InputError, match="8 problems"):
        Sampling(
            temperature=-1.0, top_p=0.0, max_tokens=0, stop=("",), min_p=float("nan"), presence_penalty=2.1,
            frequency_penalty=-3.0, logit_bias={1: 0.0, 5: 101.0},
        )  # fmt: skip


def test_a_bias_is_kept_as_sorted_pairs_whatever_it_was_given_as() -> None:
    assert Sampling(logit_bias={9: 1.0, 2: -1.0}).logit_bias == ((2, -1.0), (9, 1.0))
    assert Sampling(logit_bias={9: 1.0}) == Sampling(logit_bias=((9, 1.0),)) and hash(Sampling(logit_bias={9: 1.0}))
