"""The conformance test of kinds in a stack: what toolkit/stack/shelf.py promises, for every kind.

A new shelf is done when its kind stands in stacked_world.OPTIONS and this passes.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from tests.stacked_world import OPTIONS, SEEN, TOLERANCE, World, make_base, off, padded, save_random, some_rows, worn
from toolkit.adapters.kinds import kind_in_folder, kind_of
from toolkit.stack.adapter import new_adapter
from toolkit.stack.stack import Stack

ROWS = some_rows(4)
NEIGHBOURS = [None, "lora-alpha", "reft"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


def answered(stack: Stack, rows: Tensor, names: list[str | None], **given: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = stack(rows, stack.owners(names), **given).logits
    return logits


def losses(logits: Tensor, rows: Tensor) -> Tensor:
    """Mean loss of each row."""
    every = functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
    return every.view(len(rows), -1).mean(1)


def learning_stack(options: dict[str, Any], base: str = "llama") -> Stack:
    stack = Stack(make_base(base))
    for seed, (name, one) in enumerate(options.items()):
        stack.add(name, new_adapter(stack.base, one, seed=seed, token_ids=SEEN), learns=True)
    return stack


@pytest.mark.parametrize("name", OPTIONS)
class TestEveryStackedKind:
    def test_its_rows_equal_plain_peft_alone_and_the_others_keep_theirs(self, name: str, world: World) -> None:
        names = [name, *NEIGHBOURS]
        logits = answered(world.stack(), ROWS, names)
        for index, one in enumerate(names):
            assert off(logits[index], world.alone(one, ROWS[index])) < TOLERANCE, one
        assert off(logits[0], world.alone(None, ROWS[0])) > 0.01

    def test_a_new_neighbour_and_its_leaving_change_nothing(self, name: str, world: World) -> None:
        stack = world.stack([name])
        before = answered(stack, ROWS, [name, name, None, None])
        stack.add("neighbour", world.folders["lora-alpha" if name != "lora-alpha" else "lora"])
        stack.add("other", world.folders["reft" if name != "reft" else "prefix"])
        assert off(answered(stack, ROWS, [name, name, None, None]), before) == 0
        stack.replace("neighbour", world.folders["embedding" if name != "embedding" else "prefix"])
        stack.remove("other")
        assert off(answered(stack, ROWS, [name, name, None, None]), before) == 0

    def test_removal_restores_the_base_exactly(self, name: str, world: World) -> None:
        plain = make_base()
        hooks = sum(len(module._forward_hooks) for module in plain.modules())
        stack = world.stack([name])
        stack.remove(name)
        assert off(stack.base(input_ids=ROWS).logits, plain(input_ids=ROWS).logits) == 0
        assert sum(len(module._forward_hooks) for module in stack.base.modules()) == hooks
        assert not any("lora" in key or "maltu" in key for key in stack.base.state_dict())

    def test_base_rows_have_the_bits_of_the_base(self, name: str, world: World) -> None:
        names = [None, name, None, "lora-alpha"]
        logits = answered(world.stack(), ROWS, names)
        with torch.no_grad():
            plain = make_base()(input_ids=ROWS).logits
        assert off(logits[[0, 2]], plain[[0, 2]]) <= (TOLERANCE if name.startswith("prefix") else 0)

    def test_saved_again_it_is_what_it_was(self, name: str, world: World, tmp_path: Path) -> None:
        stack = world.stack([name])
        folder = tmp_path / "again"
        folder.mkdir()
        stack.save(name, folder, base="작은 말")
        other = world.stack([])
        other.add("x", folder)
        assert other.hash("x") == stack.hash(name)
        assert off(answered(other, ROWS, ["x"] * 4), answered(stack, ROWS, [name] * 4)) == 0
        rows = ROWS[:1]
        with torch.no_grad():
            plain = worn(folder, make_base())(input_ids=rows, attention_mask=torch.ones_like(rows)).logits[0]
        assert off(plain, world.alone(name, ROWS[0])) == 0
        assert kind_in_folder(folder).name == OPTIONS[name].kind

    def test_a_cached_or_chunked_answer_equals_one_pass(self, name: str, world: World) -> None:
        stack, names = world.stack(), [name, *NEIGHBOURS]
        whole = answered(stack, ROWS, names)
        for cuts in ([6, 11], [4, 8, 9, 10, 11]):
            parts, cache, start = [], None, 0
            for end in cuts:
                with torch.no_grad():
                    out = stack(ROWS[:, start:end], stack.owners(names), past_key_values=cache, use_cache=True)
                parts.append(out.logits)
                cache, start = out.past_key_values, end
            assert off(torch.cat(parts, 1), whole) < TOLERANCE

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_padding_changes_no_row(self, name: str, side: str, world: World) -> None:
        names = [name, *NEIGHBOURS]
        rows = [ROWS[0, :5], ROWS[1], ROWS[2, :3], ROWS[3, :8]]
        ids, mask = padded(rows, side, 13)
        logits = answered(world.stack(), ids, names, attention_mask=mask)
        for index, row in enumerate(rows):
            assert off(logits[index][mask[index].bool()], world.alone(names[index], row)) < TOLERANCE

    def test_a_new_one_starts_and_learns_as_its_kind_does_alone(self, name: str) -> None:
        """Against plain PEFT (or the kind's own module) after three steps of AdamW: a tolerance that grows with the
        learning rate."""
        rate, options = 3e-3, OPTIONS[name]
        kind = kind_of(options)
        model = kind.attach(make_base(), options, seed=0, token_ids=SEEN)
        alone = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], rate)
        stack = learning_stack({"it": options, "neighbour": OPTIONS["lora-alpha"]})
        stacked = torch.optim.AdamW(list(stack.learning("it").values()), rate)
        owner = stack.owners(["it", "it", "neighbour", None])
        for _ in range(3):
            losses(
                model(input_ids=ROWS[:2], attention_mask=torch.ones_like(ROWS[:2])).logits, ROWS[:2]
            ).sum().backward()
            losses(stack(ROWS, owner).logits, ROWS).sum().backward()
            for optimizer in (alone, stacked):
                optimizer.step()
                optimizer.zero_grad()
        wanted, found = kind.parameters(model), stack.adapter("it").tensors
        assert wanted.keys() == found.keys()
        assert max(off(wanted[key].detach(), found[key]) for key in wanted) < 0.1 * rate

    def test_its_gradient_comes_from_its_rows_and_reaches_no_other(self, name: str) -> None:
        other = "lora-alpha" if OPTIONS[name].kind != "lora" else "reft"
        stack = learning_stack({"it": OPTIONS[name], "twin": OPTIONS[name], "neighbour": OPTIONS[other]})
        with torch.no_grad():  # away from the start, where half of a lora's gradient is zero
            for one in stack.slots:
                for leaf in stack.learning(one).values():
                    leaf += 0.05 * torch.randn(leaf.shape, generator=torch.Generator().manual_seed(3))
        owner = stack.owners(["it", "twin", "neighbour", None])
        losses(stack(ROWS, owner).logits, ROWS)[0].backward()
        assert all(leaf.grad is not None and leaf.grad.abs().max() > 0 for leaf in stack.learning("it").values())
        for one in ("twin", "neighbour"):
            assert all(leaf.grad is None or not leaf.grad.any() for leaf in stack.learning(one).values())
        assert all(parameter.grad is None for parameter in stack.base.parameters())

    def test_stacked_and_alone_learn_the_same_bits(self, name: str) -> None:
        """Exactly, where the batch has no wider prefix and no larger rank, which change the order of sums."""
        twins = {"it": OPTIONS[name], "twin": OPTIONS[name], "words": OPTIONS["embedding"]}
        results = []
        for options in (twins, {"it": OPTIONS[name]}):
            stack = learning_stack(options)
            optimizers = {
                one: torch.optim.AdamW(list(stack.learning(one).values()), 1e-3 * (1 + 2 * (one == "twin")))
                for one in options
            }
            rows = some_rows(6)[: 2 * len(options)]
            owner = stack.owners([one for one in options for _ in range(2)])
            for _ in range(4):
                losses(stack(rows, owner).logits, rows).view(-1, 2).mean(1).sum().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            results.append(stack.adapter("it").tensors)
        assert max(off(results[0][key], results[1][key]) for key in results[0]) == 0

    def test_a_saved_one_goes_on_learning(self, name: str, tmp_path: Path) -> None:
        folder = save_random(OPTIONS[name], make_base(), tmp_path / "it")
        stack = Stack(make_base())
        stack.add("it", folder, learns=True)
        optimizer = torch.optim.AdamW(list(stack.learning("it").values()), 3e-3)
        seen = []
        for _ in range(6):
            loss = losses(stack(ROWS, stack.owners(["it"] * 4)).logits, ROWS).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.item())
        assert seen[-1] < seen[0]
