"""A gate learns whom to listen to: nothing else learns, a killed training goes on, uneven use is seen and costs."""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.combined_world import random_adapters
from tests.gated_world import at_once, some_gate
from tests.many_world import some_talk
from tests.stacked_world import World, make_base, some_rows
from toolkit.adapters.opened import measuring
from toolkit.combine.gate import Gate, gated
from toolkit.combine.gate_start import arrow_gate, constant_gate
from toolkit.ensemble import gate as room
from toolkit.ensemble.gate import GateSetup, train_gate
from toolkit.errors import AdapterError, InputError, TrainingError
from toolkit.fit.batches import Limits, Row
from toolkit.recipe.combine import Gate as Options
from toolkit.recipe.model import Lora, Reft
from toolkit.score import supervised_log_likelihoods
from toolkit.stack.stack import Stack

NAMES = ("가", "나", "다")
SLOW = pytest.mark.slow
LEARNS = Options(epochs=6.0, learning_rate=3e-2, hidden=8, balance=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@functools.cache
def experts(root: Path) -> dict[str, Any]:
    """Three that say different things: of a random start, enlarged."""
    made = random_adapters(root, 가=Lora(rank=4, alpha=40), 나=Lora(rank=6, alpha=50), 다=Reft(rank=4))
    tensors = {name: tensor * (8.0 if "weight" in name else 1.0) for name, tensor in made["다"].tensors.items()}
    return {**made, "다": replace(made["다"], tensors=tensors)}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture
def stack(root: Path) -> Stack:
    made = Stack(make_base())
    for name, adapter in experts(root).items():
        made.add(name, adapter)
    return made


@functools.cache
def talk(root: Path, seed: int = 0, n_rows: int = 24) -> list[Row]:
    """Rows that one expert each has spoken: the first token says which, and what follows is its likeliest."""
    stack = Stack(make_base())
    for name, adapter in experts(root).items():
        stack.add(name, adapter)
    noise = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    for number in range(n_rows):
        name = NAMES[number % len(NAMES)]
        start = torch.randint(5, 60, (4,), generator=noise).tolist()
        ids = [88 + number % len(NAMES), *start]
        for _ in range(6):
            with torch.no_grad():
                logits = stack(torch.tensor([ids]), stack.owners([name])).logits[0, -1]
            ids.append(int(logits.argmax()))
        rows.append((ids, [-100] * 5 + ids[5:]))
    return rows


def setup(place: Path, **given: Any) -> GateSetup:
    return GateSetup(
        **{"limits": Limits(256, 4096), "pad_id": 0, "place": place, "patience": None, "every": 1.0, **given}
    )


def learned(stack: Stack, rows: Sequence[Row], valid: Sequence[Row], place: Path, options: Options = LEARNS) -> Any:
    made = train_gate(stack, NAMES, rows, valid, options, setup(place))
    assert made is not None
    return made


def loss_of(model: Any, rows: Sequence[Row]) -> float:
    found = [value for row in supervised_log_likelihoods(model, rows) for value in row]
    return -sum(found) / len(found)


@pytest.mark.parametrize(
    ("per", "top_k"),
    [("model", None), ("layer", 2), pytest.param("model", 2, marks=SLOW), pytest.param("layer", None, marks=SLOW)],
)
def test_it_learns_whom_to_listen_to(per: Any, top_k: int | None, stack: Stack, root: Path, tmp_path: Path) -> None:
    options = LEARNS.model_copy(update={"per": per, "top_k": top_k, "epochs": 12.0})
    gate, report = learned(stack, talk(root), talk(root, 1, 12), tmp_path, options)
    assert report["loss"]["gate"] < report["loss"]["equal"] - 0.005
    with gated(stack, gate) as opened:
        assert loss_of(opened, talk(root, 1, 12)) == pytest.approx(report["loss"]["gate"], abs=1e-5)
    for name in NAMES:
        with gated(stack, constant_gate(stack, {other: float(other == name) for other in NAMES})) as alone:
            assert report["loss"]["gate"] < loss_of(alone, talk(root, 1, 12))


def test_the_loss_of_equal_weights_is_that_of_a_constant_gate(stack: Stack, root: Path, tmp_path: Path) -> None:
    _, report = learned(stack, talk(root), talk(root, 1, 12), tmp_path)
    with gated(stack, constant_gate(stack, dict.fromkeys(NAMES, 1.0))) as opened:
        assert report["loss"]["equal"] == pytest.approx(loss_of(opened, talk(root, 1, 12)), abs=1e-5)
    assert report["losses"][0] == pytest.approx(report["loss"]["equal"], abs=1e-5)


@pytest.mark.parametrize("per", ["layer", "model"])
def test_a_gradient_reaches_the_gate_and_nothing_else(per: Any, stack: Stack, root: Path, tmp_path: Path) -> None:
    before = {name: stack.hash(name) for name in NAMES}
    weights = {name: parameter.clone() for name, parameter in stack.base.named_parameters()}
    stack.base.train()
    gate, _ = learned(stack, talk(root), (), tmp_path, LEARNS.model_copy(update={"per": per}))
    assert stack.base.training
    assert all(parameter.grad is None for parameter in stack.base.parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in stack.base.named_parameters())
    assert all(not stack.dense(kind) for kind in ("lora", "reft"))
    assert {name: stack.adapter(name).hash for name in NAMES} == before
    started = room.new_gate(stack, NAMES, per=per, hidden=8)
    moved = {name for name, tensor in gate.tensors.items() if not torch.equal(tensor, started.tensors[name])}
    assert moved == set(gate.tensors) - ({"prior"} if per == "layer" else set())


def test_the_gradient_is_that_of_the_loss_it_reports(stack: Stack, root: Path, tmp_path: Path) -> None:
    start = some_gate(
        stack, NAMES, per="layer"
    )  # its networks listen: what one layer does moves the next one's weights
    with room._Training(stack, start, LEARNS, setup(tmp_path)) as training:
        training._learn(talk(root))
        for name in ("layers.0.up.bias", "layers.0.down.weight", "layers.1.up.weight"):
            leaf = training.leaves[name]
            assert leaf.grad is not None
            way = leaf.grad / leaf.grad.norm()
            sides = []
            for step in (1e-2, -2e-2):
                with torch.no_grad():
                    leaf += step * way
                sides.append(training.measured(talk(root)).loss)
            with torch.no_grad():
                leaf += 1e-2 * way
            assert (sides[0] - sides[1]) / 2e-2 == pytest.approx(float(leaf.grad.norm()), rel=0.05)


@pytest.mark.parametrize("changed", [{"limits": Limits(24, 6)}, {"packing": False}])
def test_how_a_step_is_cut_into_passes_changes_rounding_alone(
    changed: Any, stack: Stack, root: Path, tmp_path: Path
) -> None:
    options = LEARNS.model_copy(update={"epochs": 1.0, "learning_rate": 1e-3})
    made = [
        train_gate(stack, NAMES, talk(root), talk(root, 1, 12), options, setup(tmp_path, **given))
        for given in ({}, changed)
    ]
    assert made[0] is not None and made[1] is not None
    assert made[0][1]["losses"] == pytest.approx(made[1][1]["losses"], abs=1e-5)


# The best one, patience, balance


def test_it_is_never_worse_on_held_out_talk_than_where_it_began(stack: Stack, root: Path, tmp_path: Path) -> None:
    wild = LEARNS.model_copy(update={"learning_rate": 3.0})
    gate, report = learned(stack, some_talk(24), some_talk(12, seed=5), tmp_path, wild)
    assert report["loss"]["gate"] == pytest.approx(min(report["losses"]), abs=1e-5)
    assert report["loss"]["gate"] <= report["loss"]["equal"] + 1e-6
    assert report["best_step"] is not None and set(gate.tensors)


def test_patience_ends_it_early(stack: Stack, root: Path, tmp_path: Path) -> None:
    wild = LEARNS.model_copy(update={"learning_rate": 3.0, "epochs": 50.0})
    made = train_gate(stack, NAMES, some_talk(24), some_talk(12, seed=5), wild, setup(tmp_path, patience=2))
    assert made is not None and made[1]["stopped"] == "early" and made[1]["steps"] < 50


def test_without_held_out_rows_the_last_gate_is_given(stack: Stack, root: Path, tmp_path: Path) -> None:
    _, report = learned(stack, talk(root), (), tmp_path)
    assert report["loss"] is None and report["best_step"] is None and report["steps"] == 18


def test_uneven_use_is_reported_and_balance_costs_it(stack: Stack, root: Path, tmp_path: Path) -> None:
    own = [row for number, row in enumerate(talk(root)) if number % 3 == 0]
    reports = [
        learned(stack, own, own, tmp_path, LEARNS.model_copy(update={"balance": balance, "epochs": 15.0}))[1]
        for balance in (0.0, 10.0)
    ]
    free, even = (report["load"]["가"] for report in reports)
    assert free > 0.5 > even > 0.3
    assert reports[0]["evenness"] < reports[1]["evenness"] <= 1.0
    assert reports[0]["top"] > reports[1]["top"] >= 1 / 3
    assert sum(reports[0]["load"].values()) == pytest.approx(1.0)
    assert json.loads(json.dumps(reports[0]))["load_by_layer"]["1"] == reports[0]["load_by_layer"]["1"]


def test_evaluations_are_told(stack: Stack, root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    train_gate(stack, NAMES, talk(root), talk(root, 1, 12), LEARNS, setup(tmp_path, say=said.append))
    assert said[0].startswith("gate: step 0 of 18, held-out loss ") and said[-1].startswith("gate: step 18 of 18")


# Stopped, killed, going on


def bits(gate: Gate) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in gate.tensors.items()}


def after(n_calls: int) -> Callable[[], bool]:
    left = iter(range(n_calls))
    return lambda: next(left, None) is None


@pytest.mark.parametrize(
    ("n_steps", "per"),
    [
        (7, "model"),
        (4, "layer"),
        *(pytest.param(n_steps, per, marks=SLOW) for n_steps in (0, 1, 17) for per in ("layer", "model")),
    ],
)
def test_a_stopped_training_goes_on_to_the_same_bits(
    n_steps: int, per: Any, stack: Stack, root: Path, tmp_path: Path
) -> None:
    options = LEARNS.model_copy(update={"per": per, "top_k": 2})
    whole, report = learned(stack, talk(root), talk(root, 1, 12), tmp_path / "whole", options)
    given = (stack, NAMES, talk(root), talk(root, 1, 12), options, setup(tmp_path / "halves"))
    assert train_gate(*given, after(n_steps)) is None
    assert len(list((tmp_path / "halves").iterdir())) == 1
    made = train_gate(*given)
    assert made is not None
    assert bits(made[0]) == bits(whole) and made[1]["losses"] == report["losses"]
    assert made[1]["n_tokens"] == report["n_tokens"]


def test_a_killed_one_goes_on_from_its_last_checkpoint(
    stack: Stack, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = learned(stack, talk(root), talk(root, 1, 12), tmp_path / "whole")
    monkeypatch.setattr(room, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(room, "SAVE_SHARE", 0.0)
    left = iter(range(9))

    def killed() -> bool:
        next(left)
        return False

    given = (stack, NAMES, talk(root), talk(root, 1, 12), LEARNS, setup(tmp_path / "killed"))
    with pytest.raises(StopIteration):
        train_gate(*given, killed)
    (saved,) = (tmp_path / "killed").iterdir()
    assert saved.name == "gate-00000008"
    made = train_gate(*given)
    assert made is not None and bits(made[0]) == bits(whole)


def test_a_torn_checkpoint_does_not_count_and_a_damaged_one_is_named(stack: Stack, root: Path, tmp_path: Path) -> None:
    given = (stack, NAMES, talk(root), talk(root, 1, 12), LEARNS, setup(tmp_path))
    assert train_gate(*given, after(3)) is None
    (saved,) = tmp_path.iterdir()
    size = (saved / "state.json").stat().st_size
    (saved / "state.json").write_text("{" + " " * (size - 1), encoding="utf-8")
    with pytest.raises(TrainingError, match=r"gate-00000003: damaged .*--fresh"):
        train_gate(*given)
    (saved / "state.json").write_text("{", encoding="utf-8")
    made = train_gate(*given)
    assert made is not None and made[1]["steps"] == 18


def test_a_checkpoint_of_another_training_is_refused(stack: Stack, root: Path, tmp_path: Path) -> None:
    given = (stack, NAMES, talk(root), talk(root, 1, 12))
    assert train_gate(*given, LEARNS, setup(tmp_path), after(3)) is None
    with pytest.raises(TrainingError, match=r"another training .other hidden, seed.*--fresh"):
        train_gate(*given, LEARNS.model_copy(update={"hidden": 9}), setup(tmp_path, seed=4))


# Arrow, and what is refused


def test_arrow_is_made_through_the_same_door_and_measured(world: World, root: Path, tmp_path: Path) -> None:
    stack, names = world.stack(), ("lora", "lora-7")
    made = train_gate(stack, names, (), talk(root, 1, 12), Options(how="arrow", per="layer"), setup(tmp_path))
    assert made is not None
    gate, report = made
    arrow = arrow_gate(stack, names, per="layer")
    assert torch.equal(at_once(stack, gate, some_rows(2)), at_once(stack, arrow, some_rows(2)))
    assert set(report) == {"loss", "load", "load_by_layer", "evenness", "top"}
    with gated(stack, gate) as opened:
        assert report["loss"]["gate"] == pytest.approx(loss_of(opened, talk(root, 1, 12)), abs=1e-5)


@pytest.mark.parametrize("name", ["prefix", "embedding"])
@pytest.mark.parametrize("how", ["learned", "arrow"])
def test_an_expert_without_weights_per_token_is_refused_by_name(
    how: Any, name: str, world: World, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=f"{name} is of kind {name}"):
        train_gate(world.stack(), ("lora", name), talk(root), (), Options(how=how), setup(tmp_path))


def test_one_expert_and_rows_without_an_answer_are_refused_together(stack: Stack, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"1 of them leave nothing to weigh(.|\n)*no token of them is learned from"):
        train_gate(stack, ["가"], [([5, 6, 7], [-100] * 3)], (), LEARNS, setup(tmp_path))


def test_an_expert_that_still_learns_is_refused(stack: Stack, root: Path, tmp_path: Path) -> None:
    stack.add("라", experts(root)["가"], learns=True)
    with pytest.raises(AdapterError, match="라 still learns"):
        train_gate(stack, ["가", "라"], talk(root), (), LEARNS, setup(tmp_path))


def test_a_loss_that_runs_away_ends_it_with_words(stack: Stack, root: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        stack.base.get_input_embeddings().weight[89] = float("inf")  # type: ignore[operator]
    with pytest.raises(TrainingError, match="gate: step 1: the loss is nan"):
        train_gate(stack, NAMES, talk(root), (), LEARNS, setup(tmp_path))


def test_smaller_passes_are_tried_when_memory_is_full(
    stack: Stack, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes, most = room._Pass.nll, [], 40

    def nll(self: Any, batch: Any) -> Any:
        sizes.append(batch.input_ids_BT.numel())
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("full")
        return real(self, batch)

    monkeypatch.setattr(room._Pass, "nll", nll)
    made = train_gate(stack, NAMES, talk(root), talk(root, 1, 12), Options(epochs=1.0), setup(tmp_path))
    assert made is not None and max(sizes) > most and sizes[-1] <= most
    most = 5
    with pytest.raises(TrainingError, match=r"out of memory with a single conversation of 11 tokens \(full\)"):
        train_gate(stack, NAMES, talk(root), (), LEARNS, setup(tmp_path))


def test_the_base_is_as_it_was_after_an_error(stack: Stack, root: Path, tmp_path: Path) -> None:
    def broken() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_gate(stack, NAMES, talk(root), (), LEARNS, setup(tmp_path), broken)
    assert not any(module._forward_pre_hooks for module in stack.base.modules())
    with measuring(stack.base) as opened, torch.no_grad():
        rows = some_rows(2)
        kept = torch.ones_like(rows)
        assert torch.equal(
            opened.logits(rows, kept, None, kept), make_base()(input_ids=rows, attention_mask=kept).logits.flatten(0, 1)
        )
