"""Learning in a stack: each adapter's numbers are its own, whoever comes, goes, or learns beside it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.stacked_world import OPTIONS, SEEN, make_base, off, some_rows
from toolkit.adapters.kinds import kind_of
from toolkit.recipe.model import Lora, Reft
from toolkit.stack.adapter import new_adapter
from toolkit.stack.gradients import clip_gradients
from toolkit.stack.stack import Gates, Stack

ROWS = some_rows(8)


def learning_stack(**options: Any) -> Stack:
    stack = Stack(make_base())
    for seed, (name, one) in enumerate(options.items()):
        stack.add(name, new_adapter(stack.base, one, seed=seed, token_ids=SEEN), learns=True)
    return stack


def loss_of(stack: Stack, rows: Tensor, names: list[str | None], **given: Any) -> Tensor:
    logits = stack(rows, stack.owners(names), **given).logits
    every = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return every.view(len(rows), -1).mean(1).sum()


def step(stack: Stack, optimizers: dict[str, Any], rows: Tensor, names: list[str | None], **given: Any) -> None:
    loss_of(stack, rows, names, **given).backward()
    for optimizer in optimizers.values():
        optimizer.step()
        optimizer.zero_grad()


def adamw(stack: Stack, name: str, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(stack.learning(name).values()), rate)


def test_an_optimizer_keeps_its_leaves_while_others_come_and_go() -> None:
    """Newcomers beyond the capacity move every table; the bits of the one that learns stay."""
    results = []
    for is_busy in (False, True):
        stack = learning_stack(it=Lora(rank=4))
        optimizers = {"it": adamw(stack, "it")}
        leaves = list(stack.learning("it").values())
        for turn in range(6):
            if is_busy:
                stack.add(f"other-{turn}", new_adapter(stack.base, Lora(rank=4), seed=9), learns=turn % 2 == 0)
            if is_busy and turn == 4:
                stack.remove("other-0")
                stack.replace("other-1", new_adapter(stack.base, Reft(rank=2), seed=9))
            step(stack, optimizers, ROWS[:2], ["it", "it"])
        assert all(one is other for one, other in zip(leaves, stack.learning("it").values(), strict=True))
        results.append(stack.adapter("it").tensors)
    assert max(off(results[0][key], results[1][key]) for key in results[0]) == 0


@pytest.mark.parametrize("when", ["before forward", "before backward", "after the step"])
def test_an_ordinary_optimizer_may_forget_gradients_at_any_time(when: str) -> None:
    results = []
    for is_ordinary in (False, True):
        stack = learning_stack(it=Lora(rank=4), twin=Lora(rank=4))
        optimizer = adamw(stack, "it")
        for _ in range(3):
            if is_ordinary and when == "before forward":
                optimizer.zero_grad()
            loss = loss_of(stack, ROWS[:2], ["it", "twin"])
            if is_ordinary and when == "before backward":
                optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if is_ordinary and when == "after the step":
                optimizer.zero_grad()
            if not is_ordinary:
                stack.zero_grad(["it"])
        results.append(stack.adapter("it").tensors)
    assert max(off(results[0][key], results[1][key]) for key in results[0]) == 0


def test_one_may_learn_where_another_has_left_and_a_frozen_one_stayed() -> None:
    results = []
    for has_history in (False, True):
        stack = learning_stack(first=Lora(rank=4)) if has_history else Stack(make_base())
        stack.add("frozen", new_adapter(stack.base, Lora(rank=4), seed=8))
        if has_history:
            step(stack, {"first": adamw(stack, "first")}, ROWS[:2], ["first", "frozen"])
            stack.remove("first")
            with torch.no_grad():
                stack(ROWS[:2], stack.owners(["frozen", None]))
        stack.add("it", new_adapter(stack.base, Lora(rank=4), seed=0), learns=True)
        optimizers = {"it": adamw(stack, "it")}
        for _ in range(3):
            step(stack, optimizers, ROWS[:4], ["it", "it", "frozen", "frozen"])
        results.append(stack.adapter("it").tensors)
    started = new_adapter(make_base(), Lora(rank=4), seed=0).tensors
    assert max(off(results[0][key], started[key]) for key in started) > 1e-3
    assert max(off(results[0][key], results[1][key]) for key in results[0]) == 0


def test_under_autocast_gradients_are_those_of_float32_to_the_precision_of_bf16() -> None:
    names: list[str | None] = ["lora", "reft", "prefix", None]
    grads = []
    for is_half in (False, True):
        stack = learning_stack(lora=OPTIONS["lora"], reft=OPTIONS["reft"], prefix=OPTIONS["prefix"])
        with torch.autocast("cpu", torch.bfloat16, enabled=is_half):
            loss_of(stack, ROWS[:4], names).backward()
        own = [[leaf.grad.flatten() for leaf in stack.learning(name).values()] for name in stack.slots]  # type: ignore[union-attr]
        grads.append([torch.cat(one) for one in own])
    for exact, half in zip(*grads, strict=True):
        assert functional.cosine_similarity(exact, half, dim=0) > 0.98


def test_a_larger_rank_beside_it_changes_no_more_than_rounding() -> None:
    results = []
    for others in ({}, {"wide": Lora(rank=9)}):
        stack = learning_stack(it=Lora(rank=4), **others)
        optimizers = {"it": adamw(stack, "it", 1e-3)}
        for _ in range(4):
            step(stack, optimizers, ROWS[:4], ["it", "it", *(["wide"] * 2 if others else [None] * 2)])
        results.append(stack.adapter("it").tensors)
    assert max(off(results[0][key], results[1][key]) for key in results[0]) < 1e-4


def test_accumulated_gradients_are_the_sum_of_their_batches() -> None:
    stack = learning_stack(lora=OPTIONS["lora"], reft=OPTIONS["reft"], words=OPTIONS["embedding"])
    names: list[str | None] = ["lora", "reft", "words"]
    whole = loss_of(stack, ROWS[:6], names * 2)
    whole.backward()
    wanted = {name: [leaf.grad.clone() for leaf in stack.learning(name).values()] for name in stack.slots}  # type: ignore[union-attr]
    stack.zero_grad()
    for part in (ROWS[:3], ROWS[3:6]):
        loss_of(stack, part, names).backward()
    for name, grads in wanted.items():
        for one, leaf in zip(grads, stack.learning(name).values(), strict=True):
            assert leaf.grad is not None and off(one, leaf.grad) < 1e-6


def test_clipping_one_adapter_is_torchs_clipping_and_leaves_the_others() -> None:
    stack = learning_stack(lora=OPTIONS["lora"], twin=OPTIONS["lora"], reft=OPTIONS["reft"])
    loss_of(stack, ROWS[:3], ["lora", "twin", "reft"]).backward()
    untouched = [leaf.grad.clone() for leaf in stack.learning("twin").values()]  # type: ignore[union-attr]
    plain = [torch.zeros_like(leaf).requires_grad_() for leaf in stack.learning("lora").values()]
    for one, leaf in zip(plain, stack.learning("lora").values(), strict=True):
        one.grad = leaf.grad.clone()  # type: ignore[union-attr]
    wanted = torch.nn.utils.clip_grad_norm_(plain, 0.1)
    found = clip_gradients(stack, {"lora": 0.1, "reft": 1e9})
    assert off(found[0], wanted) < 1e-6 and wanted > 0.1
    assert clip_gradients(stack, {"lora": 1e9})[0] <= 0.1001
    for one, leaf in zip(plain, stack.learning("lora").values(), strict=True):
        assert off(one.grad, leaf.grad) < 1e-7  # type: ignore[arg-type]
    assert all(
        torch.equal(one, leaf.grad)  # type: ignore[arg-type]
        for one, leaf in zip(untouched, stack.learning("twin").values(), strict=True)
    )


def test_one_optimizer_over_the_dense_tensors_with_a_rate_per_place_equals_one_optimizer_each() -> None:
    rates = {"slow": 1e-3, "fast": 1e-2}
    results = []
    for is_dense in (False, True):
        stack = learning_stack(slow=Lora(rank=4), fast=Lora(rank=2))
        for _ in range(3):
            loss_of(stack, ROWS[:4], ["slow", "slow", "fast", "fast"]).backward()
            with torch.no_grad():
                if is_dense:
                    for dense in stack.dense("lora").values():
                        rate = torch.zeros(len(dense))
                        for name, own in rates.items():
                            rate[stack.place(name)] = own
                        dense -= rate.view(-1, *[1] * (dense.dim() - 1)) * dense.grad
                else:
                    for name, own in rates.items():
                        for leaf in stack.learning(name).values():
                            leaf -= own * leaf.grad
            stack.zero_grad()
        results.append({name: stack.adapter(name).tensors for name in rates})
    for name in rates:
        assert max(off(results[0][name][key], results[1][name][key]) for key in results[0][name]) == 0


def test_padding_and_free_places_never_get_a_gradient() -> None:
    stack = learning_stack(narrow=Lora(rank=2), wide=Lora(rank=6), reft=Reft(rank=1), reft_3=Reft(rank=3))
    with torch.no_grad():
        for name in stack.slots:
            for leaf in stack.learning(name).values():
                leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
    loss_of(stack, ROWS[:5], ["narrow", "wide", "reft", "reft_3", None]).backward()
    for kind, name, rank in (("lora", "narrow", 2), ("reft", "reft", 1)):
        for key, dense in stack.dense(kind).items():
            gradient = dense.grad
            assert gradient is not None and not gradient[0].any(), key
            assert not gradient[stack.place(name), rank:].any(), key
            assert not gradient[3:].any(), key


def test_dropout_follows_each_rows_draw_and_not_its_neighbours() -> None:
    options = {"it": Lora(rank=4, dropout=0.5), "edit": Reft(rank=2, dropout=0.5)}
    stack = learning_stack(**options, other=Lora(rank=4, dropout=0.3))
    with torch.no_grad():
        for name in stack.slots:
            for leaf in stack.learning(name).values():
                leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
        draws = torch.tensor([11, 12, 13])
        logits = stack(ROWS[:3], stack.owners(["it", "edit", "other"]), draws=draws).logits
        same = stack(ROWS[:2], stack.owners(["it", "edit"]), draws=draws[:2]).logits
        other = stack(ROWS[:2], stack.owners(["it", "edit"]), draws=draws[1:]).logits
        without = stack(ROWS[:2], stack.owners(["it", "edit"])).logits
    assert off(logits[:2], same) < 1e-6
    for row in (0, 1):
        assert off(other[row], same[row]) > 1e-3 and off(without[row], same[row]) > 1e-3


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    from toolkit.stack.grouped import dropped, plan_rows

    plan = plan_rows([1, 1, 2, 2], apart=False)
    assert plan is not None
    values = dropped(torch.ones(2, 200, 64), plan, torch.tensor([0.25, 0.25, 0.0, 0.9]), torch.arange(4), 7)
    by_row = values.view(4, -1)
    assert by_row[2].unique().tolist() == [1.0]
    for row, share in ((0, 0.25), (1, 0.25), (3, 0.9)):
        assert abs((by_row[row] == 0).float().mean().item() - share) < 0.02
        assert abs(by_row[row].mean().item() - 1) < 0.05
    assert off(by_row[0], by_row[1]) > 0


def test_a_gate_learns_over_frozen_adapters_that_stay_what_they_are() -> None:
    stack = Stack(make_base())
    for seed, name in enumerate(("lora", "reft")):
        stack.add(name, new_adapter(stack.base, OPTIONS[name], seed=seed))
    before = {name: stack.hash(name) for name in stack.slots}
    weights = torch.full((2, 11, 2), 0.5, requires_grad=True)
    stack(ROWS[:2], [-1, -1], gates=Gates(("lora", "reft"), weights)).logits.mean().backward()
    assert weights.grad is not None and weights.grad.shape == (2, 11, 2)
    assert {name: stack.hash(name) for name in stack.slots} == before
    assert not stack.dense("lora") and not stack.learning("lora")


def test_checkpointed_layers_learn_the_same_inside_routed() -> None:
    """Activation checkpointing runs layers again in backward, which a plain call refuses."""
    results = []
    for is_checkpointed in (False, True):
        stack = learning_stack(it=Lora(rank=4), twin=Lora(rank=4))
        owner = stack.owners(["it", "twin"])
        if is_checkpointed:
            stack.base.train()
            stack.base.activation_checkpointing_enable()
        with stack.routed(owner):
            stack.base(**stack.prepare(ROWS[:2], owner)).logits.square().mean().backward()
        results.append([leaf.grad.clone() for leaf in stack.learning("it").values()])  # type: ignore[union-attr]
    assert any(bool(one.any()) for one in results[0])
    assert max(off(one, other) for one, other in zip(*results, strict=True)) == 0


@pytest.mark.parametrize("name", ["lora", "prefix", "reft", "embedding"])
def test_a_new_adapter_is_what_its_kind_attaches_and_leaves_the_stack_alone(name: str) -> None:
    stack = learning_stack(lora=OPTIONS["lora"], reft=OPTIONS["reft"])
    with torch.no_grad():
        before = stack(ROWS[:3], [0, 1, -1]).logits
        made = new_adapter(stack.base, OPTIONS[name], seed=5, token_ids=SEEN)
        assert off(stack(ROWS[:3], [0, 1, -1]).logits, before) == 0
    kind = kind_of(OPTIONS[name])
    wanted = kind.parameters(kind.attach(make_base(), OPTIONS[name], seed=5, token_ids=SEEN))
    stack.add("new", made, learns=True)
    found = stack.adapter("new").tensors
    assert max(off(wanted[key], found[key]) for key in wanted) < 1e-6
    assert not any(parameter.requires_grad for parameter in stack.base.parameters())
