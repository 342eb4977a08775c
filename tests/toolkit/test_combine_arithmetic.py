"""The arithmetic of merging, low-rank and number by number, on updates small enough to check by hand."""

import math

import pytest
import torch
from torch import Tensor

from toolkit.combine import lowrank, sparse
from toolkit.combine.lowrank import Part, Update
from toolkit.combine.sparse import SPARSE


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parts(*ranks: int, weights: tuple[float, ...], scale: float = 0.5) -> list[Part]:
    return [
        Part(str(seed), weight, scale, numbers(rank, 9, seed=seed), numbers(7, rank, seed=seed + 50))
        for seed, (rank, weight) in enumerate(zip(ranks, weights, strict=True))
    ]


def whole(update: Update) -> Tensor:
    return update.b_OR @ update.a_RI


class TestLowRank:
    @pytest.mark.parametrize("weights", [(0.3, -0.8), (1.0, 0.0)])
    def test_exact_is_the_weighted_sum_of_full_updates(self, weights: tuple[float, ...]) -> None:
        some = parts(2, 5, weights=weights)
        wanted = sum(part.weight * part.full_OI() for part in some)
        assert torch.allclose(whole(lowrank.exact(some)), torch.as_tensor(wanted), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("ranks", [(2, 3), (5, 6), (1,)])
    @pytest.mark.parametrize("rank", [1, 3])
    def test_svd_from_the_factors_is_that_of_the_full_matrix(self, ranks: tuple[int, ...], rank: int) -> None:
        some = parts(*ranks, weights=(0.7, -0.5)[: len(ranks)])
        u, values, v = torch.linalg.svd(whole(lowrank.exact(some)))
        wanted = (u[:, :rank] * values[:rank]) @ v[:rank]
        found = lowrank.svd(some, rank)
        assert found.rank == min(rank, sum(ranks))
        assert torch.allclose(whole(found), wanted, rtol=1e-10, atol=1e-10)

    @pytest.mark.parametrize("shape", [(7, 9), (9, 7)])
    def test_nearest_of_a_whole_matrix_is_its_truncated_svd(self, shape: tuple[int, int]) -> None:
        matrix = numbers(*shape)
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        for rank in (1, 4, 7, 12):
            wanted = (u[:, :rank] * values[:rank]) @ v[:rank]
            assert torch.allclose(whole(lowrank.nearest(matrix, rank)), wanted, rtol=1e-10, atol=1e-10)

    def test_two_equal_members_at_half_a_weight_each_are_not_doubled_by_linear(self) -> None:
        one = parts(3, weights=(0.5,))[0]
        assert torch.allclose(whole(lowrank.linear([one, one])), one.full_OI(), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("weight", [1.0, -2.5])
    def test_linear_of_one_member_is_its_weighted_update(self, weight: float) -> None:
        one = parts(3, weights=(weight,))[0]
        assert torch.allclose(whole(lowrank.linear([one])), weight * one.full_OI(), rtol=1e-12, atol=1e-12)

    def test_no_other_scale_brings_linear_nearer_to_the_sum(self) -> None:
        some = parts(3, 3, weights=(0.6, 0.9))
        found, exact = lowrank.linear(some), lowrank.exact(some)
        best = lowrank.distance(found, exact)
        for factor in (0.0, 0.9, 1.1, 2.0):
            assert lowrank.distance(Update(found.a_RI, found.b_OR * factor), exact) > best

    def test_linear_of_members_that_cancel_is_nothing(self) -> None:
        one, other = parts(3, weights=(1.0,))[0], parts(3, weights=(-1.0,))[0]
        assert not whole(lowrank.linear([one, other])).any()

    def test_norm_and_distance_are_those_of_full_matrices_even_where_factors_cancel(self) -> None:
        left, right = (lowrank.exact(parts(2, 3, weights=weights)) for weights in ((1.0, 1.0), (1.0, 1.0 + 1e-9)))
        assert math.isclose(lowrank.norm(left), float(whole(left).norm()), rel_tol=1e-12)
        wanted = float(whole(Update(parts(2, 3, weights=(1, 1))[1].a_RI, parts(2, 3, weights=(1, 1))[1].b_OR)).norm())
        assert math.isclose(lowrank.distance(left, right), 0.5e-9 * wanted, rel_tol=1e-4)


class TestSparse:
    ONE, TWO = torch.tensor([[4.0, -1.0, 0.5, -3.0]]), torch.tensor([[-1.0, -2.0, 3.0, 0.25]])

    def test_the_largest_stay_and_are_summed(self) -> None:
        found = sparse.magnitude_prune([self.ONE, self.TWO], [0.5, 2.0], 0.5, [0, 0])
        assert found.tolist() == [[2.0, -4.0, 6.0, -1.5]]

    def test_those_that_agree_with_the_elected_sign_are_averaged(self) -> None:
        """Sums: 3, -3, 3.5, -2.75; where both agree their mean, else the one that does."""
        found = sparse.ties([self.ONE, self.TWO], [0.5, 0.5], 1.0, [0, 0])
        assert found.tolist() == [[4.0, -1.5, 1.75, -3.0]]

    def test_what_was_trimmed_has_no_say(self) -> None:
        found = sparse.ties([self.ONE, self.TWO], [0.5, 0.5], 0.5, [0, 0])
        assert found.tolist() == [[4.0, -2.0, 3.0, -3.0]]

    def test_signs_are_elected_by_weight_and_a_weight_of_zero_has_no_vote(self) -> None:
        heavy = sparse.ties([self.ONE, self.TWO], [0.1, 0.9], 1.0, [0, 0])
        torch.testing.assert_close(heavy, torch.tensor([[-1.0, -1.9, 2.75, -3.0]]))
        assert torch.equal(sparse.ties([self.ONE, self.TWO], [0.0, 1.0], 1.0, [0, 0]), self.TWO)

    @pytest.mark.parametrize("method", SPARSE)
    @pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, 1.0), (0.2, 0.5)])
    def test_equal_members_give_the_sum_of_their_weights_times_one(
        self, method: str, weights: tuple[float, float]
    ) -> None:
        found = SPARSE[method]([self.ONE, self.ONE], weights, 1.0, [0, 0])
        torch.testing.assert_close(found, sum(weights) * self.ONE)

    def test_a_negative_weight_takes_away(self) -> None:
        for method in SPARSE.values():
            torch.testing.assert_close(method([self.ONE], [-2.0], 1.0, [0]), -2.0 * self.ONE)

    def test_at_least_one_number_stays(self) -> None:
        assert sparse.trimmed(self.ONE, 0.01).tolist() == [[4.0, 0.0, 0.0, 0.0]]

    def test_dropping_keeps_the_share_enlarges_it_and_is_right_on_average(self) -> None:
        ones = torch.ones(200, 300)
        found = sparse.dropped(ones, 0.25, 7)
        assert found.unique().tolist() == [0.0, 4.0]
        assert abs(found.mean().item() - 1.0) < 0.03
        assert torch.equal(found, sparse.dropped(ones, 0.25, 7)) and not torch.equal(
            found, sparse.dropped(ones, 0.25, 8)
        )

    def test_a_draw_belongs_to_seed_member_and_layer(self) -> None:
        draws = {sparse.draw_of(*one) for one in ((0, "가", "up"), (1, "가", "up"), (0, "나", "up"), (0, "가", "down"))}
        assert len(draws) == 4 and sparse.draw_of(0, "가", "up") in draws

    def test_dare_sums_what_each_member_kept(self) -> None:
        some = [numbers(5, 6), numbers(5, 6, seed=1)]
        kept = [sparse.dropped(update, 0.5, draw) for update, draw in zip(some, (3, 4), strict=True)]
        assert torch.equal(sparse.dare_linear(some, [1.0, 2.0], 0.5, [3, 4]), kept[0] + 2.0 * kept[1])
        assert torch.equal(sparse.dare_ties(some, [1.0, 2.0], 0.5, [3, 4]), sparse.ties(kept, [1.0, 2.0], 1.0, [0, 0]))
