"""Adapters of layers that read the same input, added at once: what adding them one by one gives."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.stacked_world import World, make_base, off
from toolkit.recipe.model import Lora
from toolkit.stack.adapter import new_adapter
from toolkit.stack.stack import Stack

QKV = tuple(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")
WIDTHS = (32, 16, 16)
MLP = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up"))
ORDERS = {
    "distinct": ["lora", "lora-7", "lora-alpha"],
    "in groups": ["lora", "lora", "lora-7", "lora-7"],
    "brought together": ["lora", "lora-7", "lora", "lora-7", "lora", "lora-7"],
    "beside the base": ["lora", None, "reft", "lora-7"],
    "one": ["lora"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("beside") / "adapters")


@torch.no_grad()
def both(stack: Stack, names: Sequence[str | None], modules: tuple[str, ...], widths: Any, n_tokens: int) -> Any:
    """The outputs of some layers with their adapters: one by one, and at once."""
    noise = torch.Generator().manual_seed(n_tokens)
    x = torch.randn(len(names), n_tokens, 32, generator=noise)
    y = torch.randn(len(names), n_tokens, sum(widths), generator=noise)
    with stack.routed(stack.owners(names)):
        parts = zip(modules, y.split(list(widths), dim=-1), strict=True)
        wanted = torch.cat([stack.update(module, x, part.clone()) for module, part in parts], dim=-1)
        assert off(wanted, y) > 0.01
        stack.update_parts(modules, x, y, widths)
    return y, wanted


def only(stack: Stack, name: str) -> Stack:
    """A stack with one of another's adapters."""
    made = Stack(make_base())
    made.add(name, stack.adapter(name))
    return made


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("n_tokens", [1, 5])
@pytest.mark.parametrize(("modules", "widths"), [(QKV, WIDTHS), (MLP, (64, 64))], ids=["qkv", "mlp"])
@pytest.mark.parametrize("keep_mb", [512, 0], ids=["kept", "no room"])
def test_layers_at_once_are_the_layers_one_by_one(
    world: World, order: str, n_tokens: int, modules: tuple[str, ...], widths: Any, keep_mb: int
) -> None:
    stack = world.stack(("lora", "lora-7", "lora-alpha", "reft"), keep_mb=keep_mb)
    for _ in range(2):  # the second time from what was kept
        found, wanted = both(stack, ORDERS[order], modules, widths, n_tokens)
        assert off(found, wanted) < 1e-6


def test_layers_without_an_adapter_stay_as_they_are(world: World) -> None:
    stack = Stack(make_base())
    for seed, targets in enumerate([("q_proj", "v_proj"), ("k_proj",)]):
        adapter = new_adapter(stack.base, Lora(rank=3 + seed, targets=list(targets)), seed=seed)
        noisy = {name: tensor + 0.1 for name, tensor in adapter.tensors.items()}
        stack.add(f"a{seed}", type(adapter)("lora", noisy, adapter.config))
    found, wanted = both(stack, ["a0", "a1", None, "a0"], QKV, WIDTHS, 1)
    assert off(found, wanted) < 1e-6
    found, wanted = both(only(stack, "a0"), ["a0", None], QKV, WIDTHS, 2)
    assert off(found, wanted) < 1e-6


def test_what_is_kept_is_counted_and_given_back(world: World) -> None:
    stack = world.stack(("lora", "lora-7"))
    room = stack._room.n_bytes
    both(stack, ["lora", "lora-7"], QKV, WIDTHS, 1)
    assert stack._room.n_bytes < room
    stack.close()
    assert stack._room.n_bytes == room


def test_batches_of_the_same_adapters_share_what_is_kept(world: World) -> None:
    stack = world.stack(("lora", "lora-7"))
    for n_rows in (2, 3):
        found, wanted = both(stack, ["lora"] * n_rows + ["lora-7"] * n_rows, QKV, WIDTHS, 5)
        assert off(found, wanted) < 1e-6
    assert len(stack._plans) == 2 and len(stack.loras._besides) == 1


def test_other_adapters_make_room(world: World) -> None:
    stack = world.stack(("lora", "lora-7"))
    both(stack, ["lora"], QKV, WIDTHS, 1)
    ((places, layers),) = stack.loras._besides.items()
    stack._room.n_bytes = 0
    found, wanted = both(stack, ["lora"], MLP, (64, 64), 1)  # nothing but its own
    assert off(found, wanted) < 1e-6 and len(layers) == 1
    found, wanted = both(stack, ["lora-7"], QKV, WIDTHS, 1)
    assert off(found, wanted) < 1e-6 and places not in stack.loras._besides and stack._room.n_bytes >= 0


def test_no_more_groups_are_kept_than_a_server_needs(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolkit.stack.lora.N_KEPT", 2)
    stack = world.stack(("lora", "lora-7", "lora-alpha"))
    room = stack._room.n_bytes
    for names in (["lora"], ["lora-7"], ["lora"], ["lora-alpha"]):
        both(stack, names, QKV, WIDTHS, 1)
    kept = [stack._plans_of((stack.slots[name],))["lora"] for name in ("lora", "lora-alpha")]  # the last two
    assert list(stack.loras._besides) == [plan.places for plan in kept if plan is not None]
    assert stack._room.n_bytes < room
    stack.close()
    assert stack._room.n_bytes == room


def test_an_adapter_that_learns_is_read_anew_every_time(world: World) -> None:
    stack = Stack(make_base())
    stack.add("a", new_adapter(stack.base, Lora(rank=3), seed=0), learns=True)
    for step in range(2):
        with torch.no_grad():
            for leaf in stack.learning("a").values():
                leaf += 0.1 * (1 + step)
        found, wanted = both(stack, ["a"], QKV, WIDTHS, 1)
        assert off(found, wanted) < 1e-6
