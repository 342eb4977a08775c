"""An exact merge is the weighted sum of updates, and a mixture the average of its members, by plain PEFT's answers."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.combined_world import (
    GREEDY,
    PROMPTS,
    adapters,
    greedy,
    in_peft,
    random_adapters,
    stacked_logits,
    words,
)
from tests.stacked_world import TOLERANCE, Worlds, make_base, off, some_rows
from toolkit.combine.lowrank import Update, distance, norm
from toolkit.combine.merge import merge
from toolkit.combine.methods import names_of
from toolkit.combine.mix import Mix
from toolkit.combine.sparse import SPARSE
from toolkit.recipe.model import Lora
from toolkit.stack.stack import Gates

LORAS = ("lora", "lora-7", "lora-alpha")  # ranks 4, 7, 4; alphas 8, 14, 3; the second is rank-stabilised
WEIGHTS = (0.7, -0.4, 1.1)
BASES = ["llama", "gpt2"]
ROWS = some_rows(3)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    return Worlds(tmp_path_factory)


def opened(folders: dict[str, Path], base: str) -> Any:
    """All adapters in one plain PeftModel."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, *rest = folders.items()
        model = peft.PeftModel.from_pretrained(make_base(base), str(first[1]), adapter_name=first[0])
        for name, folder in rest:
            model.load_adapter(str(folder), name)
    return model.eval()


def logits_of(model: Any, rows: Tensor = ROWS) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=rows, attention_mask=torch.ones_like(rows)).logits
    return logits


def updates(model: Any, name: str) -> dict[str, Update]:
    """The factors of each layer of a PeftModel's adapter, scale included."""
    return {
        key: Update(
            layer.lora_A[name].weight.detach().double(),
            layer.lora_B[name].weight.detach().double() * layer.scaling[name],
        )
        for key, layer in model.named_modules()
        if hasattr(layer, "lora_A") and name in layer.lora_A
    }


@pytest.mark.parametrize("base", BASES)
class TestExact:
    def test_its_layers_give_the_weighted_sum_of_what_plain_peft_models_add(
        self, base: str, worlds: Any, tmp_path: Path
    ) -> None:
        world = worlds(base)
        merged = merge(adapters(world, *LORAS), WEIGHTS)
        mine = in_peft(merged.adapter, tmp_path / "merged", base)
        theirs = opened({name: world.folders[name] for name in LORAS}, base)
        noise, n_layers = torch.Generator().manual_seed(3), 0
        for key, layer in theirs.named_modules():
            if not hasattr(layer, "lora_A"):
                continue
            n_layers += 1
            x_BI = torch.randn(5, layer.lora_A["lora"].weight.shape[1], generator=noise)
            with torch.no_grad():
                plain = layer.base_layer(x_BI)
                wanted = plain.clone()
                for name, weight in zip(LORAS, WEIGHTS, strict=True):
                    layer.set_adapter(name)
                    wanted += weight * (layer(x_BI) - plain)
                found = mine.get_submodule(key)(x_BI)
            assert off(found, wanted) < TOLERANCE, key
            assert off(wanted, plain) > 0.01
        assert n_layers == (14 if base == "llama" else 8)

    def test_its_logits_are_those_of_the_summed_weights(self, base: str, worlds: Any) -> None:
        world = worlds(base)
        summed = make_base(base).state_dict()
        plain = {key: value.clone() for key, value in summed.items()}
        for name, weight in zip(LORAS, WEIGHTS, strict=True):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                alone = opened({name: world.folders[name]}, base).merge_and_unload().state_dict()
            for key, value in summed.items():
                value += weight * (alone[key] - plain[key])
        model = make_base(base)
        model.load_state_dict(summed)
        merged = merge(adapters(world, *LORAS), WEIGHTS)
        assert off(stacked_logits(world, merged.adapter, ROWS), logits_of(model)) < 2 * TOLERANCE
        assert merged.error < 1e-7

    @pytest.mark.parametrize("names", [LORAS, ("reft", "reft-5")])
    def test_it_equals_gates_of_the_same_weights_everywhere(
        self, base: str, names: tuple[str, ...], worlds: Any
    ) -> None:
        world, weights = worlds(base), torch.tensor(WEIGHTS[: len(names)])
        stack = world.stack(names)
        gates = Gates(names, weights.expand(*ROWS.shape, len(names)))
        with torch.no_grad():
            gated = stack(ROWS, [-1] * len(ROWS), gates=gates).logits
        merged = merge(adapters(world, *names), weights.tolist())
        assert off(stacked_logits(world, merged.adapter, ROWS), gated) < TOLERANCE

    def test_embeddings_add_up_token_by_token(self, base: str, worlds: Any) -> None:
        world = worlds(base)
        one = adapters(world, "embedding")["embedding"]
        other = type(one)("embedding", {"token_ids": torch.arange(50, 70), "delta": torch.ones(20, 32)}, one.config)
        merged = merge({"one": one, "other": other}, [0.5, -2.0])
        model = make_base(base)
        with torch.no_grad():
            wanted = model.get_input_embeddings()(ROWS).clone()
            for ids, delta, weight in (
                (one.tensors["token_ids"], one.tensors["delta"], 0.5),
                (torch.arange(50, 70), torch.ones(20, 32), -2.0),
            ):
                table = torch.zeros(96, 32)
                table[ids] = weight * delta
                wanted += table[ROWS]
            logits = model(inputs_embeds=wanted).logits
        assert off(stacked_logits(world, merged.adapter, ROWS), logits) < TOLERANCE


@pytest.mark.parametrize("method", names_of("merge"))
@pytest.mark.parametrize("base", BASES)
def test_with_all_the_weight_on_one_expert_every_method_answers_as_it(base: str, method: str, worlds: Any) -> None:
    world = worlds(base)
    density = 1.0 if method in SPARSE else None
    for name in LORAS:
        weights = {other: float(other == name) for other in LORAS}
        merged = merge(adapters(world, *LORAS), weights, method=method, density=density)
        logits = stacked_logits(world, merged.adapter, ROWS)
        for index, row in enumerate(ROWS):
            assert off(logits[index], world.alone(name, row)) < TOLERANCE
        assert merged.error < 1e-6


@pytest.mark.parametrize("kind", ["reft", "reft-5", "embedding"])
def test_with_all_the_weight_on_one_edit_or_delta_it_answers_as_that(kind: str, worlds: Any) -> None:
    world = worlds("llama")
    methods = ("exact",) if kind.startswith("reft") else ("exact", "linear", *SPARSE)
    for method in methods:
        found = adapters(world, kind)
        density = 1.0 if method in SPARSE else None
        merged = merge({"it": found[kind], "no": found[kind]}, [1.0, 0.0], method=method, density=density)
        logits = stacked_logits(world, merged.adapter, ROWS)
        for index, row in enumerate(ROWS):
            assert off(logits[index], world.alone(kind, row)) < TOLERANCE


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Path]]:
    root = tmp_path_factory.mktemp("trio")
    made = random_adapters(root, a=Lora(rank=4), b=Lora(rank=4, alpha=3), c=Lora(rank=6, alpha=9))
    return made, {name: root / name for name in made}


class TestAgainstPeft:
    """add_weighted_adapter where it is right: plain scaling, and weights that mean the same."""

    @pytest.mark.parametrize(
        ("method", "theirs", "names", "weights", "peft_weights"),
        [
            ("exact", "cat", "abc", (0.5, -0.3, 0.9), (0.5, -0.3, 0.9)),
            ("svd", "svd", "abc", (0.5, -0.3, 0.9), (0.5, -0.3, 0.9)),
            ("magnitude_prune", "magnitude_prune_svd", "abc", (0.5, -0.3, 0.9), (0.5, -0.3, 0.9)),
            ("ties", "ties_svd", "abc", (1 / 3, 1 / 3, 1 / 3), (1.0, 1.0, 1.0)),
        ],
    )
    def test_the_updates_are_the_same(
        self, method: str, theirs: str, names: str, weights: Any, peft_weights: Any, trio: Any, tmp_path: Path
    ) -> None:
        made, folders = trio
        options: dict[str, Any] = {} if method == "exact" else {"rank": 5}
        if method in SPARSE:
            options["density"] = 0.4
        merged = merge({name: made[name] for name in names}, weights, method=method, **options)
        mine = updates(in_peft(merged.adapter, tmp_path / "mine", "llama"), "default")
        model = opened({name: folders[name] for name in names}, "llama")
        given = {"svd_rank": 5, "density": options.get("density")}
        model.add_weighted_adapter(list(names), list(peft_weights), "merged", combination_type=theirs, **given)
        wanted = updates(model, "merged")
        assert mine.keys() == wanted.keys() and len(mine) == 14
        for key, update in wanted.items():
            assert distance(mine[key], update) < 2e-5 * norm(update), key  # PEFT decomposes in float32

    def test_linear_goes_the_same_way_and_never_lies_farther_from_the_sum(self, trio: Any, tmp_path: Path) -> None:
        made, folders = trio
        pair = {name: made[name] for name in "ab"}
        mine = updates(in_peft(merge(pair, [0.6, 0.4], method="linear").adapter, tmp_path / "mine", "llama"), "default")
        exact = updates(in_peft(merge(pair, [0.6, 0.4]).adapter, tmp_path / "exact", "llama"), "default")
        model = opened({name: folders[name] for name in "ab"}, "llama")
        model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "merged", combination_type="linear")
        for key, theirs in updates(model, "merged").items():
            along = norm(mine[key]) / norm(theirs)
            same_way = distance(mine[key], Update(theirs.a_RI, theirs.b_OR * along)) < 1e-5 * norm(mine[key])
            opposite = distance(mine[key], Update(theirs.a_RI, theirs.b_OR * -along)) < 1e-5 * norm(mine[key])
            assert same_way or opposite, key
            assert distance(mine[key], exact[key]) <= distance(theirs, exact[key]) + 1e-6


MEMBERS = ("lora", "prefix", "lora-7", "reft", "embedding")


@pytest.mark.parametrize("over", ["logprob", "prob"])
@pytest.mark.parametrize("base", BASES)
def test_a_stacked_mixture_says_what_the_average_of_separate_plain_models_says(
    base: str, over: str, worlds: Any
) -> None:
    """Token for token: every prompt alone, without a cache, each member a model of its own."""
    world, weights = worlds(base), torch.tensor([0.3, 0.2, 0.25, 0.15, 0.1])

    def next_logits(row: Tensor) -> Tensor:
        logp_KV = torch.stack([world.alone(name, row[0])[-1].double().log_softmax(-1) for name in MEMBERS])
        return weights.double() @ (logp_KV if over == "logprob" else logp_KV.exp())

    mix = Mix.of(MEMBERS, weights.tolist(), over)  # type: ignore[arg-type]
    answers = mix.answer(world.stack(), words(), PROMPTS, GREEDY)
    assert [answer.ids for answer in answers] == [greedy(next_logits, prompt, GREEDY) for prompt in PROMPTS]
    alone = Mix.of(MEMBERS[:1]).answer(world.stack(), words(), PROMPTS, GREEDY)
    assert [answer.ids for answer in answers] != [answer.ids for answer in alone]
