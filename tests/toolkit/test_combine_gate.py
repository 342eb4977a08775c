"""Gates as they are applied: their weights, what they refuse, their folders, Arrow's prototypes."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.combined_world import random_adapters
from tests.gated_world import EXPERTS, at_once, shaken, some_gate
from tests.stacked_world import BASES, World, make_base, off, some_rows
from toolkit.combine.gate import CONFIG, TENSORS, Gate, gated, trace
from toolkit.combine.gate_start import arrow_gate, constant_gate, new_gate
from toolkit.errors import AdapterError, InputError, RunError
from toolkit.recipe.model import Lora
from toolkit.stack.lora import PREFIX
from toolkit.stack.stack import Stack

LORAS = ("lora", "lora-7", "lora-alpha")
ROW = [5, 17, 40, 9, 61, 12]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@pytest.fixture
def stack(world: World) -> Stack:
    return world.stack()


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


# Weights


@pytest.mark.parametrize("per", ["layer", "model"])
def test_a_new_gate_gives_every_expert_the_same(per: Any, stack: Stack) -> None:
    found = trace(stack, new_gate(stack, EXPERTS, per=per), ROW)
    weights = torch.tensor(found.weights)
    assert weights.shape == (len(ROW), 2, 3)
    assert off(weights, torch.full_like(weights, 1 / 3)) < 1e-6


def test_a_seed_makes_the_same_gate_again_and_another_one_another(stack: Stack) -> None:
    first, again, other = (new_gate(stack, EXPERTS, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first.tensors[name], again.tensors[name]) for name in first.tensors)
    assert not torch.equal(first.tensors["layers.1.down.weight"], other.tensors["layers.1.down.weight"])


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("per", ["layer", "model"])
def test_top_k_keeps_the_largest_and_makes_them_sum_to_one(top_k: int, per: Any, stack: Stack) -> None:
    gate = some_gate(stack, per=per, top_k=top_k)
    weights = torch.tensor(trace(stack, gate, ROW).weights)
    read = weights[:, 1:] if per == "model" else weights
    assert ((read > 0).sum(-1) == top_k).all()
    assert off(weights.sum(-1), torch.ones(len(ROW), 2)) < 1e-6
    every = torch.tensor(trace(stack, replace(gate, top_k=3), ROW).weights)
    first = 1 if per == "model" else 0  # what it reads is the same in both
    assert torch.equal(weights[:, first].argmax(-1), every[:, first].argmax(-1))


def test_per_model_reads_once_and_layer_0_has_the_prior(stack: Stack) -> None:
    gate = some_gate(stack, per="model")
    weights = torch.tensor(trace(stack, gate, ROW).weights)
    assert off(weights[:, 0], gate.tensors["prior"].softmax(-1).expand(len(ROW), -1)) < 1e-6
    assert float(weights[:, 1].std(0).max()) > 0.01


def test_per_layer_every_layer_has_weights_of_its_own(stack: Stack) -> None:
    weights = torch.tensor(trace(stack, some_gate(stack, per="layer"), ROW).weights)
    assert float(weights[:, 0].std(0).max()) > 0.01 and off(weights[:, 0], weights[:, 1]) > 0.01


@pytest.mark.parametrize("per", ["layer", "model"])
def test_what_comes_later_changes_no_weight(per: Any, stack: Stack) -> None:
    gate = some_gate(stack, per=per)
    before, after = trace(stack, gate, ROW), trace(stack, gate, [*ROW, 88, 23])
    assert off(torch.tensor(after.weights)[: len(ROW)], torch.tensor(before.weights)) < 1e-6


def test_a_trace_is_plain_data(stack: Stack) -> None:
    found = trace(stack, some_gate(stack), ROW)
    assert found.tokens == tuple(ROW) and found.experts == EXPERTS
    assert json.loads(json.dumps(asdict(found)))["mean"] == [list(token) for token in found.mean]
    assert torch.tensor(found.mean).sum(-1).tolist() == pytest.approx([1.0] * len(ROW))
    assert off(torch.tensor(found.weights).mean(1), torch.tensor(found.mean)) < 1e-6
    with pytest.raises(InputError, match="no tokens"):
        trace(stack, some_gate(stack), [])


def test_a_gate_works_for_a_forward_pass_of_the_stack_itself(stack: Stack) -> None:
    gate, rows = some_gate(stack), some_rows(2)
    with gate.gates(stack) as gates, torch.no_grad():
        first = stack(rows, [-1, -1], gates=gates).logits
        second = stack(rows[:1, :5], [-1], gates=gates).logits
    assert off(first, at_once(stack, gate, rows)) == 0
    assert off(second, at_once(stack, gate, rows[:1, :5])) == 0


def test_nothing_hangs_on_the_base_between_passes_or_after_an_error(stack: Stack) -> None:
    with gated(stack, some_gate(stack)) as opened:
        assert hooks(stack.base) == 0
        opened.logits(some_rows(1), torch.ones(1, 11), None)
        assert hooks(stack.base) == 0
        with pytest.raises(AdapterError):
            opened.logits(some_rows(1), torch.ones(1, 3), None)
    assert hooks(stack.base) == 0
    with torch.no_grad():
        assert off(stack(some_rows(2), [-1, -1]).logits, make_base()(input_ids=some_rows(2)).logits) == 0


def test_dropout_is_off_while_it_lasts(stack: Stack) -> None:
    stack.base.train()
    with gated(stack, some_gate(stack)):
        assert not stack.base.training
    assert stack.base.training


# What is refused


@pytest.mark.parametrize("name", ["prefix", "embedding"])
@pytest.mark.parametrize("make", [new_gate, arrow_gate])
def test_an_expert_without_weights_per_token_is_refused_by_name(make: Any, name: str, stack: Stack) -> None:
    with pytest.raises(AdapterError, match=f"{name} is of kind {name}"):
        make(stack, ("lora", name))


@pytest.mark.parametrize(("names", "says"), [(("lora", "없는것"), "없는것"), (("lora", "lora"), "twice"), ((), "none")])
def test_an_expert_that_is_not_there_or_stands_twice_is_refused(names: Any, says: str, stack: Stack) -> None:
    with pytest.raises(AdapterError, match=says):
        new_gate(stack, names)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"top_k": 0}, "top_k: 0 of 3 experts"),
        ({"top_k": 4}, "top_k: 4 of 3 experts"),
        ({"hidden": 0}, "hidden: 0 is no width"),
        ({"per": "token"}, "per: 'token' is no place. Use one of: layer, model"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(given: Any, says: str, stack: Stack) -> None:
    with pytest.raises(InputError, match=says):
        new_gate(stack, EXPERTS, **given)


@pytest.mark.parametrize("weights", [{}, {"lora": -1.0}, {"lora": float("nan")}, {"lora": 0.0, "reft": 0.0}])
def test_constant_weights_that_are_no_shares_are_refused(weights: dict[str, float], stack: Stack) -> None:
    with pytest.raises(InputError, match="are no shares"):
        constant_gate(stack, weights)


def test_a_base_of_one_layer_has_no_gate_per_model(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig

    from tests.stacked_world import SIZES

    monkeypatch.setitem(BASES, "short", lambda: LlamaConfig(**{**SIZES, "num_hidden_layers": 1}))
    stack = Stack(make_base("short"))
    from toolkit.stack.adapter import new_adapter

    for name in ("a", "b"):
        stack.add(name, new_adapter(stack.base, Lora(rank=2), seed=0))
    with pytest.raises(AdapterError, match="Use per: layer"):
        new_gate(stack, ("a", "b"))
    assert new_gate(stack, ("a", "b"), per="layer").networks == (0,)


def test_a_gate_of_another_base_is_refused(stack: Stack) -> None:
    gate = replace(some_gate(stack), n_features=64)
    with pytest.raises(AdapterError, match=r"2 layers of 64, and this one has 2 of 32"), gated(stack, gate):
        pass


def test_another_adapter_under_an_experts_name_is_refused(stack: Stack, world: World) -> None:
    gate = some_gate(stack)
    stack.replace("lora-7", world.folders["lora-alpha"])
    with pytest.raises(AdapterError, match="lora-7 is not the adapter that the gate was made for"), gated(stack, gate):
        pass


def test_an_expert_that_left_the_stack_is_named(stack: Stack) -> None:
    gate = some_gate(stack)
    stack.remove("reft")
    with pytest.raises(AdapterError, match="reft: this stack has no adapter"), gate.gates(stack):
        pass


# Folders


@pytest.mark.parametrize("how", ["layer", "model", "top-k", "arrow"])
def test_a_saved_gate_comes_back_bit_for_bit(how: str, stack: Stack, tmp_path: Path) -> None:
    gates: dict[str, Callable[[], Gate]] = {
        "layer": lambda: some_gate(stack, per="layer"),
        "model": lambda: some_gate(stack),
        "top-k": lambda: some_gate(stack, top_k=2),
        "arrow": lambda: arrow_gate(stack, LORAS, per="layer"),
    }
    gate = gates[how]()
    gate.save(tmp_path / "gate")
    again = Gate.load(tmp_path / "gate")
    assert sorted(path.name for path in (tmp_path / "gate").iterdir()) == [CONFIG, TENSORS]
    assert off(at_once(stack, again, some_rows(2)), at_once(stack, gate, some_rows(2))) == 0
    said = [{key: value for key, value in vars(one).items() if key != "tensors"} for one in (gate, again)]
    assert said[0] == said[1]


def _config(**changed: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(said | changed), encoding="utf-8")

    return change


def _tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(folder: Path) -> None:
        tensors = load_file(folder / TENSORS)
        change(tensors)
        save_file(tensors, folder / TENSORS)

    return changed


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda folder: (folder / CONFIG).unlink(), r"holds no gate \(gate.json is missing\)"),
    "no tensors": (lambda folder: (folder / TENSORS).unlink(), "holds no gate"),
    "truncated": (lambda folder: (folder / TENSORS).write_bytes(b"half"), "damaged"),
    "no json": (lambda folder: (folder / CONFIG).write_text("{"), "damaged"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[]"), "damaged"),
    "newer": (_config(version=9), "a gate of version 9"),
    "per": (_config(per="head"), "per head"),
    "twice": (_config(experts=["가", "가", "나"]), "experts"),
    "fewer experts": (_config(experts=["lora", "reft"]), r"is \(3,\) where \(2,\) fits"),
    "top_k": (_config(top_k=7), "top_k 7"),
    "wider": (_config(n_features=64), r"layers.1.down.weight is \(5, 32\) where \(5, 64\) fits"),
    "per layer": (_config(per="layer"), "layers.0.down.weight is missing"),
    "missing": (_tensors(lambda tensors: tensors.pop("layers.1.up.bias")), "layers.1.up.bias is missing"),
    "more": (_tensors(lambda tensors: tensors.update(x=torch.zeros(1))), "x has no place in it"),
    "nan": (_tensors(lambda tensors: tensors["prior"].fill_(float("nan"))), "prior holds values that are no finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_with_the_reason(damage: str, stack: Stack, tmp_path: Path) -> None:
    some_gate(stack).save(tmp_path / "gate")
    harm, says = DAMAGES[damage]
    harm(tmp_path / "gate")
    with pytest.raises(RunError, match=says) as caught:
        Gate.load(tmp_path / "gate")
    assert str(tmp_path / "gate") in str(caught.value)


# Arrow


def dense(stack: Stack, name: str, module: str) -> torch.Tensor:
    """B A of one linear layer, as a matrix."""
    tensors = stack.adapter(name).tensors
    a, b = (tensors[f"{PREFIX}{module}.lora_{part}.weight"].double() for part in "AB")
    return b @ a


def test_arrows_prototypes_are_the_top_right_singular_vectors(stack: Stack) -> None:
    gate = arrow_gate(stack, ("lora", "lora-alpha"), per="layer")
    for layer in (0, 1):
        assert gate.reads[layer] == f"model.layers.{layer}.self_attn.q_proj"
        for place, name in enumerate(("lora", "lora-alpha")):
            whole = torch.cat([dense(stack, name, f"model.layers.{layer}.self_attn.{part}_proj") for part in "qkv"])
            v = torch.linalg.svd(whole).Vh[0]
            assert abs(float(v @ gate.tensors[f"layers.{layer}.prototypes"][place].double())) == pytest.approx(1.0)


def test_arrow_weighs_more_whoever_enlarges_what_is_read(stack: Stack) -> None:
    gate = arrow_gate(stack, LORAS)
    x = 3.0 * gate.tensors["layers.1.prototypes"][1]
    assert int(gate.probabilities(1, x[None, None]).argmax()) == 1
    assert off(gate.probabilities(1, x[None, None]), gate.probabilities(1, -x[None, None])) == 0


def test_a_gate_per_model_of_arrow_takes_layer_1_for_all_above(stack: Stack) -> None:
    gate = arrow_gate(stack, LORAS)
    assert gate.networks == (1,) and gate.network_of(0) is None and gate.network_of(7) == 1


@pytest.mark.parametrize("base", BASES)
def test_arrow_reads_what_the_first_adapted_layers_read_on_every_base(base: str, tmp_path: Path) -> None:
    made = random_adapters(tmp_path, base, 가=Lora(rank=2), 나=Lora(rank=3))
    stack = Stack(make_base(base))
    for name, adapter in made.items():
        stack.add(name, adapter)
    gate = arrow_gate(stack, tuple(made), per="layer")
    assert sorted(gate.reads) == [0, 1]
    assert off(torch.tensor(trace(stack, gate, ROW).mean), torch.full((len(ROW), 2), 0.5)) > 1e-3


def test_arrow_refuses_what_has_no_update_to_read(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="reft is of kind reft"):
        arrow_gate(stack, ("lora", "reft"))
    narrow = random_adapters(tmp_path, 좁은=Lora(rank=2, targets=("down_proj",)))
    stack.add("좁은", narrow["좁은"])
    with pytest.raises(AdapterError, match=r"좁은 changes nothing in layer 1 \(q_proj, k_proj, v_proj\)"):
        arrow_gate(stack, ("lora", "좁은"))
    still = stack.adapter("lora")
    zeros = {key: tensor * ("lora_B" not in key) for key, tensor in still.tensors.items()}
    stack.add("처음", replace(still, tensors=zeros))
    with pytest.raises(AdapterError, match="처음 changes nothing"):
        arrow_gate(stack, ("lora", "처음"))


def test_it_is_described(stack: Stack) -> None:
    assert some_gate(stack).method.name == "learned" and arrow_gate(stack, LORAS).method.name == "arrow"
    assert "2402.07148" in some_gate(stack).method.paper
    assert shaken(arrow_gate(stack, LORAS)).method.kind == "gate"
