"""The micro batch shrinks until it fits, and only on devices that tell when it does not."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from toolkit.errors import TrainingError
from toolkit.fit.memory import find_micro_batch
from toolkit.fit.plan import Plan

PLAN = Plan(1e-3, 512, 8, 1, False, "fp32", False)
ROWS = [([5] * n, [-100] + [5] * (n - 1)) for n in range(2, 22)]


class Full(nn.Module):
    """Runs out of memory above a number of tokens, as a device with little memory does."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.weight, self.n_tokens, self.tried = nn.Parameter(torch.ones(1)), n_tokens, list[tuple[int, int]]()

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        self.tried.append((input_ids.shape[0], input_ids.shape[1]))
        if input_ids.numel() > self.n_tokens:
            raise torch.OutOfMemoryError("no room")
        return SimpleNamespace(loss=(self.weight * torch.rand(1, device=input_ids.device)).sum())


def find(model: Full, plan: Plan = PLAN) -> Plan:
    # "meta" stands for a device that tells; its tensors hold nothing, so the model above is given where it may be.
    return find_micro_batch(model.to("meta"), ROWS, plan, 0, torch.device("meta"))


def test_what_fits_stays() -> None:
    model = Full(10_000)
    assert find(model) == PLAN
    assert model.tried == [(8, 21)]


def test_it_is_halved_until_it_fits_on_the_longest_rows_and_the_step_stays() -> None:
    model = Full(50)
    plan = find(model)
    assert (plan.micro_batch, plan.accumulation) == (2, 4)
    assert model.tried == [(8, 21), (4, 21), (2, 21)]


def test_not_even_one_is_an_error_with_remedies() -> None:
    with pytest.raises(TrainingError, match=r"21 tokens.*max_length"):
        find(Full(5))


def test_on_a_cpu_the_estimate_decides() -> None:
    model = Full(0)
    assert find_micro_batch(model, ROWS, PLAN, 0, torch.device("cpu")) == PLAN and not model.tried


def test_the_random_state_and_the_gradients_are_left_alone() -> None:
    before, model = torch.get_rng_state(), Full(10_000)
    find(model)
    assert torch.get_rng_state().equal(before) and model.weight.grad is None
