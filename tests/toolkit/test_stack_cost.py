"""What a stack does once: not once a tensor, once a layer, once a pass, or once a pair of adapters."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.stacked_world import OPTIONS, SEEN, TOLERANCE, make_base, off, padded, some_rows
from toolkit.recipe.model import Lora, Reft
from toolkit.stack import lora as lora_room
from toolkit.stack import reft as reft_room
from toolkit.stack.adapter import new_adapter
from toolkit.stack.gradients import clip_gradients
from toolkit.stack.grouped import Gathered, plan_rows
from toolkit.stack.stack import Gates, Stack
from toolkit.stack.table import Table

ROWS = some_rows(8)
FOUR = {name: OPTIONS[name] for name in ("lora", "prefix", "reft", "embedding")}


def learning_stack(**options: Any) -> Stack:
    """Each away from its start, where half of a lora's gradient is zero."""
    stack = Stack(make_base())
    for seed, (name, one) in enumerate(options.items()):
        stack.add(name, new_adapter(stack.base, one, seed=seed, token_ids=SEEN), learns=True)
        with torch.no_grad():
            for leaf in stack.learning(name).values():
                leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(seed))
    return stack


def gradients(stack: Stack, name: str) -> list[Tensor]:
    return [leaf.grad.clone() for leaf in stack.learning(name).values() if leaf.grad is not None]


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """From now on, the first argument of every call of a function is written down."""
    calls: list[Any] = []
    plain: Callable[..., Any] = getattr(owner, name)

    def counting(first: Any, *others: Any, **named: Any) -> Any:
        calls.append(first)
        return plain(first, *others, **named)

    monkeypatch.setattr(owner, name, counting)
    return calls


class TestAdding:
    def test_the_model_is_not_walked_once_a_tensor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        base = make_base()
        stack = Stack(base)
        small, large = (new_adapter(base, Lora(rank=2, targets=parts), seed=0) for parts in (("q_proj",), "all-linear"))
        walks = counted(monkeypatch, nn.Module, "named_modules")
        seen = []
        for name, one in (("small", small), ("large", large)):
            walks.clear()
            stack.add(name, one, learns=True)
            seen.append(sum(module is base or module is base.model for module in walks))
        assert len(large.tensors) > len(small.tensors)
        assert seen[0] == seen[1] <= 1


class TestGradients:
    @pytest.mark.parametrize("limits", [{"lora": 0.1}, {"twin": 0.1, "reft": 0.1}, {"prefix": 0.1, "embedding": 0.1}])
    def test_clipping_changes_the_gradients_of_those_named_alone(self, limits: dict[str, float]) -> None:
        stack = learning_stack(**FOUR, twin=Lora(rank=9))
        names = list(stack.slots)
        stack(ROWS[:5], stack.owners(names)).logits.square().sum().backward()
        before = {name: gradients(stack, name) for name in names}
        clip_gradients(stack, limits)
        for name in names:
            changed = max(off(*pair) for pair in zip(before[name], gradients(stack, name), strict=True))
            assert (changed > 0) == (name in limits), name

    def test_clipping_settles_no_table_once_an_adapter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stack = learning_stack(**{f"it-{n}": Lora(rank=2) for n in range(6)})
        stack(ROWS[:6], range(6)).logits.square().sum().backward()
        settled, asked = counted(monkeypatch, Table, "settle"), counted(monkeypatch, Stack, "learning")
        clip_gradients(stack, dict.fromkeys(stack.slots, 0.1))
        assert len(settled) <= len(stack.loras.tables) and len(asked) == 6

    @pytest.mark.parametrize("gone", [["lora"], ["twin", "reft"], ["prefix", "embedding"], ["lora", "twin"], None])
    def test_zeroing_reaches_those_named_and_nobody_else(self, gone: list[str] | None) -> None:
        stack = learning_stack(**FOUR, twin=Lora(rank=9))
        stack.add("frozen", new_adapter(stack.base, OPTIONS["lora-alpha"], seed=9))
        names = list(stack.slots)
        stack(ROWS[:6], stack.owners(names)).logits.square().sum().backward()
        before = {name: gradients(stack, name) for name in names}
        leaves = {name: list(stack.learning(name).values()) for name in names}
        stack.zero_grad(gone)
        for name in names:
            wanted = [torch.zeros_like(one) if gone is None or name in gone else one for one in before[name]]
            found = [leaf.grad for leaf in leaves[name]]
            assert all(torch.equal(*pair) for pair in zip(wanted, found, strict=True)), name  # type: ignore[arg-type]

    def test_a_zeroed_gradient_is_still_the_one_that_backward_adds_to(self) -> None:
        stack = learning_stack(it=Lora(rank=2), twin=Lora(rank=4))
        results = []
        for _ in range(2):
            stack.zero_grad()
            stack(ROWS[:2], [0, 1]).logits.square().sum().backward()
            results.append(gradients(stack, "it") + gradients(stack, "twin"))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    @pytest.mark.parametrize("names", [None, ["it"]])
    def test_one_whose_optimizer_forgot_its_gradient_has_zeros_after_zeroing(self, names: list[str] | None) -> None:
        stack = learning_stack(it=Lora(rank=2), twin=Lora(rank=4))
        stack(ROWS[:2], [0, 1]).logits.square().sum().backward()
        leaves = list(stack.learning("it").values())
        for leaf in leaves:
            leaf.grad = None
        stack.zero_grad(names)
        assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)

    def test_all_of_a_kind_are_zeroed_by_one_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stack = learning_stack(**{f"it-{n}": Lora(rank=2) for n in range(4)})
        stack(ROWS[:4], range(4)).logits.square().sum().backward()
        zeroed, apart = counted(monkeypatch, torch, "_foreach_zero_"), counted(monkeypatch, Tensor, "zero_")
        stack.zero_grad()
        assert [len(parts) for parts in zeroed] == [len(stack.loras.tables)] and not apart


class TestWhatIsKept:
    """`torch.tensor` of a list, on a GPU, waits for all that was asked of it before."""

    def test_the_second_pass_makes_no_tensor_from_a_list(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stack = learning_stack(**FOUR, dropped=Lora(rank=2, dropout=0.3), edits=Reft(rank=3, dropout=0.3))
        stack.add("more", new_adapter(stack.base, Reft(rank=2, layers=(1,)), seed=4))
        ids, mask = padded([row[: 4 + n] for n, row in enumerate(ROWS)], "left", 12)
        names = [*stack.slots, None]
        owner = stack.owners(names).tolist()
        gates = Gates(("lora", "reft", "dropped"), torch.full((8, 12, 3), 0.3))
        made: list[str] = []
        plain = torch.tensor

        def counting(*given: Any, **named: Any) -> Tensor:
            made.append(sys._getframe(1).f_globals["__name__"])
            return plain(*given, **named)

        monkeypatch.setattr(torch, "tensor", counting)
        for n_pass in range(3):
            made.clear()
            stack(ids, owner, attention_mask=mask, gates=gates, draws=torch.arange(8))
            found = [room for room in made if room.startswith("toolkit.")]
            assert bool(found) == (n_pass == 0), found

    def test_what_an_answer_in_inference_mode_kept_serves_a_training_step(self) -> None:
        results = []
        for is_first in (True, False):
            stack, gates = learning_stack(**FOUR), Gates(("lora", "reft"), torch.full((4, 11, 2), 0.3))
            owner = stack.owners(list(FOUR)).tolist()
            if is_first:
                with torch.inference_mode():
                    stack(ROWS[:4], owner, gates=gates)
            stack(ROWS[:4], owner, gates=gates).logits.square().sum().backward()
            results.append([one for name in FOUR for one in gradients(stack, name)])
        assert max(off(*pair) for pair in zip(*results, strict=True)) == 0

    def test_scales_that_equal_places_are_kept_apart_from_them(self) -> None:
        """Of places 1 and 2 with scales 1.0 and 2.0, as keys the same."""
        stack = learning_stack(one=Lora(rank=2, alpha=2), two=Lora(rank=2, alpha=4))
        assert [stack.place(name) for name in ("one", "two")] == [1, 2]
        weights = torch.eye(2).unsqueeze(1).expand(2, 11, 2)
        with torch.no_grad():
            for _ in range(2):
                mixed = stack(ROWS[:2], [-1, -1], gates=Gates(("one", "two"), weights)).logits
                assert off(mixed, stack(ROWS[:2], [0, 1]).logits) < TOLERANCE

    def test_dropout_finds_its_shares_and_draws_where_the_base_lies(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On the meta device, in place of a GPU; transformers asks a mask for its values, which meta has not."""
        asked = Tensor.__bool__
        monkeypatch.setattr(Tensor, "__bool__", lambda it: it.device.type == "meta" or asked(it))
        stack = Stack(make_base().to("meta"))
        for name, options in (("lora", Lora(rank=2, dropout=0.3)), ("reft", Reft(rank=2, dropout=0.3))):
            stack.add(name, new_adapter(make_base(), options, seed=0), learns=True)
        seen: list[str] = []
        for room in (lora_room, reft_room):
            plain = room.dropped

            def noting(values: Tensor, plan: Any, *given: Any, plain: Any = plain) -> Any:
                seen.extend(one.device.type for one in given if isinstance(one, Tensor))
                return plain(values, plan, *given)

            monkeypatch.setattr(room, "dropped", noting)
        stack(ROWS[:2].to("meta"), [0, 1], draws=torch.arange(2))
        assert len(seen) > 4 and set(seen) == {"meta"}

    def test_rows_brought_together_are_kept_for_each_device(self) -> None:
        plan = plan_rows([1, 2] * 8, apart=False)
        assert plan is not None
        with torch.no_grad():
            for kind in ("cpu", "meta", "cpu"):
                found = plan.gathered(torch.zeros(16, 1, 4, device=kind), 64)
                assert isinstance(found, Gathered) and found.rows.device.type == found.back_B.device.type == kind
                found.plan.n_kept_bytes = 3
        plan.n_kept_bytes = 1
        assert plan.all_kept_bytes == 7


class TestAutocast:
    @pytest.mark.parametrize("learns", [True, False])
    @pytest.mark.parametrize("n_rows", [3, 16])
    def test_an_activation_in_bf16_is_read_as_it_is_and_gives_the_same_bits(
        self, learns: bool, n_rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """16 rows of one token are brought together where nothing learns."""
        stack = learning_stack(it=Lora(rank=40), twin=Lora(rank=2))
        name = "model.layers.1.mlp.up_proj"
        noise = torch.Generator().manual_seed(1)
        x, y = (torch.randn(n_rows, 1, width, generator=noise).bfloat16() for width in (32, 64))
        owner = [0, 1] * 8 if n_rows == 16 else [0, 1, -1]
        read = counted(monkeypatch, torch, "bmm")
        with torch.set_grad_enabled(learns), stack.routed(owner):
            with torch.autocast("cpu", torch.bfloat16):
                found = stack.update(name, x, y.clone())
                assert [one.dtype for one in read] == [torch.bfloat16]
                assert torch.equal(found, stack.update(name, x.float(), y.clone()))
            exact = stack.update(name, x.float(), y.float())
        assert found.dtype == torch.bfloat16
        assert off(found, exact) < 0.02 * exact.abs().max().item()

    def test_dropout_multiplies_in_float32(self) -> None:
        stack, noise = learning_stack(it=Lora(rank=4, dropout=0.1)), torch.Generator().manual_seed(1)
        x, y = (torch.randn(2, 9, width, generator=noise).bfloat16() for width in (32, 64))
        with torch.no_grad(), stack.routed([0, 0], draws=torch.arange(2)), torch.autocast("cpu", torch.bfloat16):
            found, wanted = (stack.update("model.layers.1.mlp.up_proj", one, y.clone()) for one in (x, x.float()))
        assert torch.equal(found, wanted) and not torch.equal(found, y)

    def test_whole_gradients_are_those_of_activations_turned_to_float32(self, monkeypatch: pytest.MonkeyPatch) -> None:
        results = []
        for turned in (False, True):
            if turned:
                for room in (lora_room, reft_room):
                    monkeypatch.setattr(room, "as_read", lambda x, dtype: x.to(dtype))
                monkeypatch.setattr("toolkit.stack.grouped.as_read", lambda x, dtype: x.to(dtype))
            stack = learning_stack(lora=OPTIONS["lora"], reft=OPTIONS["reft"], drop=Lora(rank=4, dropout=0.3))
            with torch.autocast("cpu", torch.bfloat16):
                logits = stack(ROWS[:4], [0, 1, 2, -1], draws=torch.arange(4)).logits
            functional.cross_entropy(logits.float().flatten(0, 1), ROWS[:4].flatten()).backward()
            results.append([one for name in stack.slots for one in gradients(stack, name)])
        assert any(bool(one.any()) for one in results[0])
        assert max(off(*pair) for pair in zip(*results, strict=True)) == 0
