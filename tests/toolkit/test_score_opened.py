"""Adapters of a stack score as one, where a model is expected: mixtures, one member alone, the bare base."""

from typing import Any

import pytest
import torch

from tests.combined_world import words
from tests.stacked_world import World, make_base, some_rows
from toolkit.combine.mix import Mixture, mixed
from toolkit.combine.rows import Apart, answering
from toolkit.corpus.render import Rendered
from toolkit.errors import InputError
from toolkit.evaluate.talk import held_out_loss
from toolkit.score import IGNORED, score, supervised_log_likelihoods
from toolkit.stack.stack import Stack

TRIO = ("lora", "prefix-2", "reft")
WEIGHTS = (0.2, 0.5, 0.3)
PAIRS = [
    ([5, 6, 7, 8], [9, 10]),
    ([5, 6, 7, 8], [11]),
    ([40], [41, 42, 43]),
    ([5, 6, 7, 8], [12, 13, 14]),
    ([60], []),
    ([44, 45], [46]),
    ([50, 51, 52], [53, 54]),
]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param) / "adapters", request.param)


def plainly(world: World, over: Any, prompt: list[int], continuation: list[int]) -> list[float]:
    """The mixture of what each member says alone, a whole row in one plain pass."""
    row = torch.tensor(prompt + continuation)
    logs = mixed(torch.stack([world.alone(name, row) for name in TRIO]), WEIGHTS, over=over)
    return [logs[len(prompt) - 1 + place, token].item() for place, token in enumerate(continuation)]


def assert_close(found: list[list[float]], wanted: list[list[float]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("over", ["logprob", "prob"])
@pytest.mark.parametrize("batch_tokens", [1, 40, 8192])
def test_a_mixture_scores_continuations_as_its_members_do_alone(over: Any, batch_tokens: int, world: World) -> None:
    with answering(world.stack(), TRIO, Mixture, weights=WEIGHTS, over=over) as opened:
        found = score(opened, PAIRS, batch_tokens=batch_tokens)
    assert_close(found, [plainly(world, over, *pair) for pair in PAIRS])


def test_a_mixture_scores_supervised_positions_as_its_members_do_alone(world: World) -> None:
    row, other = some_rows(2, 9)[0].tolist(), some_rows(1, 5, seed=4)[0].tolist()
    at = ((row, (2, 3, 8)), (other, (1, 4)))
    rows = [(ids, [token if i in places else IGNORED for i, token in enumerate(ids)]) for ids, places in at]
    with answering(world.stack(), TRIO, Mixture, weights=WEIGHTS, over="logprob") as opened:
        found = supervised_log_likelihoods(opened, rows)
    assert_close(found, [[plainly(world, "logprob", ids[:i], ids[i:])[0] for i in places] for ids, places in at])


@pytest.mark.parametrize("name", ["lora", "prefix-2", None])
def test_one_member_alone_scores_any_number_of_rows(name: str | None, world: World) -> None:
    with answering(world.stack(), [name], Apart) as opened:
        found = score(opened, PAIRS)
    world.alone(name, some_rows(1)[0])
    assert_close(found, score(world._alone[name], PAIRS))


def test_members_that_answer_a_row_each_are_refused(world: World) -> None:
    with (
        answering(world.stack(), ["lora", "reft"], Apart) as opened,
        pytest.raises(InputError, match="answer a row of their own each"),
    ):
        score(opened, PAIRS[:2])


def test_a_batch_counts_the_rows_of_all_members(world: World) -> None:
    seen: list[int] = []
    stack = world.stack()
    stack.base.get_input_embeddings().register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    rows = [(ids, [IGNORED, *ids[1:]]) for ids in some_rows(8, 6).tolist()]
    with answering(stack, TRIO, Mixture, weights=WEIGHTS, over="prob") as opened:
        supervised_log_likelihoods(opened, rows, batch_tokens=36)
    assert max(seen) <= 36 and sum(seen) == 3 * 8 * 6


def test_only_kept_positions_go_through_the_head() -> None:
    stack = Stack(make_base("llama"))
    widths: list[int] = []
    stack.base.get_output_embeddings().register_forward_hook(
        lambda module, given, out: widths.append(out[..., 0].numel())
    )
    with answering(stack, [None], Apart) as opened:
        supervised_log_likelihoods(opened, [([5] * 30, [IGNORED] * 28 + [5, 5]), ([6] * 20, [IGNORED] * 19 + [6])])
    assert widths == [3]


def test_held_out_loss_takes_what_is_opened(world: World) -> None:
    ids = some_rows(1, 8)[0].tolist()
    row = Rendered(ids, [IGNORED] * 4 + ids[4:], [False] * 7 + [True])
    with answering(world.stack(), TRIO, Mixture, weights=WEIGHTS, over="logprob") as opened:
        found = held_out_loss(opened, words(), [row])
    assert found.loss == pytest.approx(-sum(plainly(world, "logprob", ids[:4], ids[4:])) / 4, rel=1e-4)
