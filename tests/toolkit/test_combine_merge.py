"""What a merge makes of adapters of every kind, what it reports, and what it refuses."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.combined_world import in_peft, random_adapters, stacked_logits
from tests.stacked_world import TOLERANCE, World, make_base, off, some_rows, worn
from toolkit.adapters.reft import orthonormal
from toolkit.combine import sparse
from toolkit.combine.merge import merge
from toolkit.combine.sparse import SPARSE
from toolkit.errors import AdapterError, InputError
from toolkit.recipe.combine import MERGES
from toolkit.recipe.model import Embedding, Lora, Prefix, Reft
from toolkit.stack.adapter import Adapter, new_adapter, read_adapter, write_adapter
from toolkit.stack.lora import scale_of

ROWS = some_rows(2)
LOW = ("linear", "svd", *SPARSE)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lora(rank: int = 4, n_in: int = 6, n_out: int = 8, layer: str = "up", seed: int = 0, **config: Any) -> Adapter:
    """A LoRA of one layer, by hand."""
    prefix = f"base_model.model.{layer}.lora_"
    tensors = {
        f"{prefix}A.weight": numbers(rank, n_in, seed=seed).float(),
        f"{prefix}B.weight": numbers(n_out, rank, seed=seed + 9).float(),
    }
    return Adapter("lora", tensors, {"r": rank, "lora_alpha": rank, "target_modules": [layer], **config})


def update_of(adapter: Adapter, layer: str = "up") -> Tensor:
    """What an adapter of scale 1 adds to a layer's weight."""
    prefix = f"base_model.model.{layer}.lora_"
    assert scale_of(adapter.config, layer, adapter.config["r"]) == 1.0
    return adapter.tensors[f"{prefix}B.weight"] @ adapter.tensors[f"{prefix}A.weight"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("llama") / "adapters")


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Adapter]:
    options = {"lora": Lora(rank=3), "reft": Reft(rank=2), "embedding": Embedding(), "prefix": Prefix(tokens=2)}
    return random_adapters(tmp_path_factory.mktemp("kinds"), **options)


class TestLora:
    def test_ranks_alphas_patterns_and_scalings_may_differ(self) -> None:
        one = lora(2, lora_alpha=6)  # 3
        two = lora(4, seed=3, lora_alpha=4, use_rslora=True)  # 2
        three = lora(3, seed=5, lora_alpha=1, alpha_pattern={"up": 12})  # 4
        merged = merge({"셋": three, "하나": one, "둘": two}, [0.25, 0.5, -1.0])
        plain = [update_of(lora(rank, seed=seed)) for rank, seed in ((2, 0), (4, 3), (3, 5))]
        torch.testing.assert_close(update_of(merged.adapter), 1.5 * plain[0] - 2.0 * plain[1] + 1.0 * plain[2])
        assert merged.adapter.config["r"] == 9 and merged.error < 1e-6

    def test_equal_weights_are_the_default_and_sum_to_one(self) -> None:
        merged = merge({"a": lora(), "b": lora(seed=4)})
        torch.testing.assert_close(update_of(merged.adapter), 0.5 * update_of(lora()) + 0.5 * update_of(lora(seed=4)))
        assert merged.weights == {"a": 0.5, "b": 0.5} and merged.told == ()

    def test_the_error_of_each_layer_and_of_all_is_against_the_exact_sum(self) -> None:
        found = {}
        for name, seed in (("a", 0), ("b", 20)):
            one, other = lora(seed=seed), lora(layer="down", seed=seed + 1)
            found[name] = replace(one, tensors={**one.tensors, **other.tensors})
        exact, merged = merge(found).adapter, merge(found, method="svd", rank=2)
        gaps = {
            name: float((update_of(merged.adapter, name) - update_of(exact, name)).norm()) for name in ("up", "down")
        }
        sums = {name: float(update_of(exact, name).norm()) for name in ("up", "down")}
        for name in ("up", "down"):
            assert math.isclose(merged.errors[name], gaps[name] / sums[name], rel_tol=1e-4)
        assert math.isclose(merged.error, math.hypot(*gaps.values()) / math.hypot(*sums.values()), rel_tol=1e-4)
        assert 0.1 < merged.error < 1.0

    def test_a_sum_that_is_nothing_has_no_error_where_nothing_came_out(self) -> None:
        merged = merge({"a": lora(), "b": lora()}, [1.0, -1.0])
        assert merged.error == 0.0 and update_of(merged.adapter).abs().max() < 1e-5
        opposite = merge({"a": lora(), "b": lora()}, [1.0, -1.0], method="ties", density=0.5)
        assert opposite.error in (0.0, math.inf)

    @pytest.mark.parametrize("method", LOW)
    def test_no_method_but_the_exact_one_has_more_error_than_rounding_where_members_are_equal(
        self, method: str
    ) -> None:
        density = 1.0 if method in SPARSE else None
        merged = merge({"a": lora(), "b": lora()}, [0.3, 0.7], method=method, density=density)
        torch.testing.assert_close(update_of(merged.adapter), update_of(lora()))
        assert merged.error < 1e-6

    @pytest.mark.parametrize("density", [0.5, 1.0])
    @pytest.mark.parametrize("method", SPARSE)
    def test_methods_that_drop_numbers_work_on_whole_updates(self, method: str, density: float) -> None:
        pair = {"a": lora(4, lora_alpha=6), "b": lora(2, seed=4, lora_alpha=3, use_rslora=True)}
        full = [1.5 * update_of(lora(4)), 3 / math.sqrt(2) * update_of(lora(2, seed=4))]
        draws = [sparse.draw_of(7, name, "up") for name in pair]
        wanted = SPARSE[method](full, [0.4, 0.8], density, draws)
        merged = merge(pair, [0.4, 0.8], method=method, density=density, rank=6, seed=7)
        torch.testing.assert_close(update_of(merged.adapter), wanted, rtol=1e-4, atol=1e-4)

    def test_dare_depends_on_the_seed_and_not_on_the_order_of_members(self) -> None:
        pair = {"a": lora(), "b": lora(seed=4)}
        turned = {name: pair[name] for name in ("b", "a")}
        options: dict[str, Any] = {"method": "dare_linear", "density": 0.5, "rank": 6}
        first, again, other, swapped = (
            update_of(merge(found, [0.4, 0.6] if found is pair else [0.6, 0.4], seed=seed, **options).adapter)
            for found, seed in ((pair, 0), (pair, 0), (pair, 1), (turned, 0))
        )
        assert torch.equal(first, again)
        torch.testing.assert_close(first, swapped)
        assert off(first, other) > 0.1

    def test_density_decides_how_much_of_an_update_stays(self) -> None:
        errors = [merge({"a": lora()}, method="magnitude_prune", density=one, rank=6).error for one in (0.1, 0.5, 1.0)]
        assert errors[0] > errors[1] > errors[2]
        assert merge({"a": lora()}, method="magnitude_prune", rank=6).error == errors[1]

    @pytest.mark.parametrize(("method", "rank"), [("exact", 7), ("svd", 4), ("ties", 7), ("dare_linear", 7)])
    def test_its_rank_is_what_the_description_says(self, method: str, rank: int, world: World) -> None:
        found = {name: read_adapter(world.folders[name], make_base()) for name in ("lora", "lora-alpha")}
        found["lora-alpha"] = random_rank(found["lora-alpha"], 3)
        merged = merge(found, method=method)
        assert merged.adapter.config["r"] == rank
        assert {tensor.shape[0] for name, tensor in merged.adapter.tensors.items() if ".lora_A." in name} == {rank}

    def test_a_rank_that_holds_no_more_is_cut_and_it_is_said(self) -> None:
        merged = merge({"a": lora(2), "b": lora(2, seed=4)}, method="svd", rank=50)
        assert merged.adapter.config["r"] == 4 and "Rank 50 can hold no more than 4" in merged.told[0]
        assert merged.error < 1e-6

    def test_layers_that_only_some_have_get_the_sum_over_those_and_it_opens_in_peft(
        self, world: World, tmp_path: Path
    ) -> None:
        options = {"a": Lora(rank=2, targets=("q_proj", "up_proj")), "b": Lora(rank=5, targets=("up_proj",))}
        found = random_adapters(tmp_path, **options)
        for method in ("exact", "ties"):
            turned = {name: found[name] for name in ("b", "a")}  # the first one's config names too few layers
            merged = merge(turned, [0.5, 0.5], method=method, density=1.0 if method == "ties" else None)
            model = in_peft(merged.adapter, tmp_path / method, "llama")
            layer = model.base_model.model.model.layers[0].self_attn.q_proj
            mine = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            prefix = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
            factors = [found["a"].tensors[f"{prefix}{half}.weight"] for half in ("B", "A")]
            torch.testing.assert_close(mine, 0.5 * 2.0 * factors[0] @ factors[1], rtol=1e-4, atol=1e-6)
            with torch.no_grad():
                logits = model(input_ids=ROWS, attention_mask=torch.ones_like(ROWS)).logits
            assert off(logits, stacked_logits(world, merged.adapter, ROWS)) < TOLERANCE

    def test_the_members_are_not_changed_and_the_result_is_its_own(self) -> None:
        one = lora()
        before = {name: tensor.clone() for name, tensor in one.tensors.items()}
        merged = merge({"a": one}, [1.0])
        for tensor in merged.adapter.tensors.values():
            tensor.zero_()
        assert all(torch.equal(one.tensors[name], before[name]) for name in before)

    def test_members_in_bf16_are_summed_in_float32(self) -> None:
        half = replace(lora(), tensors={name: tensor.bfloat16() for name, tensor in lora().tensors.items()})
        merged = merge({"a": half, "b": half}, [0.3, 0.4])
        wanted = 0.7 * (half.tensors["base_model.model.up.lora_B.weight"].float()
                        @ half.tensors["base_model.model.up.lora_A.weight"].float())  # fmt: skip
        torch.testing.assert_close(update_of(merged.adapter), wanted)
        assert {tensor.dtype for tensor in merged.adapter.tensors.values()} == {torch.float32}


class TestReftAndEmbedding:
    def test_a_sum_of_edits_is_a_loreft_again_that_a_folder_holds(self, world: World, tmp_path: Path) -> None:
        found = {name: read_adapter(world.folders[name], make_base()) for name in ("reft", "reft-5")}
        merged = merge(found, [0.8, -0.6]).adapter
        assert merged.config["rank"] == 7 and merged.config["layers"] == "all"
        for name, tensor in merged.tensors.items():
            if name.endswith(".rotation"):
                torch.testing.assert_close(tensor @ tensor.T, torch.eye(7))
                torch.testing.assert_close(orthonormal(tensor), tensor)
        assert set(merged.tensors) == {f"layers.{n}.{part}" for n in (0, 1) for part in ("rotation", "weight", "bias")}

    def test_edits_of_some_layers_open_again_as_those(self, world: World, tmp_path: Path) -> None:
        merged = merge({"it": read_adapter(world.folders["reft-5"], make_base())}, [0.5]).adapter
        assert merged.config["layers"] == [1]
        (tmp_path / "merged").mkdir()
        write_adapter(merged, tmp_path / "merged", make_base())
        with torch.no_grad():
            logits = worn(tmp_path / "merged", make_base())(input_ids=ROWS).logits
        assert off(logits, stacked_logits(world, merged, ROWS)) < TOLERANCE

    def test_ranks_beyond_the_hidden_size_are_folded_without_loss(self, tmp_path: Path) -> None:
        found = random_adapters(tmp_path, a=Reft(rank=20), b=Reft(rank=20))
        merged = merge(found, [0.5, 0.5])
        assert merged.adapter.config["rank"] == 32 and merged.error < 1e-6

    def test_one_that_is_still_learning_is_summed_as_it_is_used(self, world: World) -> None:
        base = make_base()
        raw = new_adapter(base, Reft(rank=2), seed=3)
        assert raw.is_raw
        moved = {name: 3.0 * tensor if name.endswith("rotation") else tensor for name, tensor in raw.tensors.items()}
        raw = replace(raw, tensors=moved)
        merged = merge({"a": raw}).adapter
        assert off(stacked_logits(world, merged, ROWS), stacked_logits(world, raw, ROWS)) < TOLERANCE

    def test_deltas_are_trimmed_by_themselves_and_tokens_that_one_has_not_learnt_count_as_nothing(self) -> None:
        config = {"vocabulary": 9, "hidden": 2, "n_tokens": 2}
        one = Adapter(
            "embedding", {"token_ids": torch.tensor([5, 2]), "delta": torch.tensor([[4.0, 1], [2, 3]])}, config
        )
        two = Adapter(
            "embedding", {"token_ids": torch.tensor([7, 5]), "delta": torch.tensor([[1.0, 2], [6, 1]])}, config
        )
        pair: Mapping[str, Adapter] = {"a": one, "b": two}
        merged = merge(pair, [0.5, 0.5], method="magnitude_prune", density=0.5)
        assert merged.adapter.tensors["token_ids"].tolist() == [2, 5, 7]
        assert merged.adapter.tensors["delta"].tolist() == [[0.0, 1.5], [5.0, 0.0], [0.0, 1.0]]
        assert merged.adapter.config["n_tokens"] == 3
        wanted = math.sqrt(1 + 1 + 0.25) / math.sqrt(1 + 2.25 + 25 + 1 + 0.25 + 1)
        assert math.isclose(merged.error, wanted, rel_tol=1e-6) and list(merged.errors) == ["delta"]
        assert merge(pair).adapter.tensors["delta"].tolist() == [[1.0, 1.5], [5.0, 1.0], [0.5, 1.0]]


def random_rank(adapter: Adapter, rank: int) -> Adapter:
    """The adapter cut to a smaller rank, as its config says too."""
    cut = {name: tensor[:rank] if ".lora_A." in name else tensor[:, :rank] for name, tensor in adapter.tensors.items()}
    return Adapter("lora", cut, {**adapter.config, "r": rank})


class TestTold:
    def test_weights_are_used_as_given_and_their_sum_is_said(self) -> None:
        merged = merge({"a": lora(), "b": lora(seed=4), "다": lora(seed=5)}, {"다": 0.0, "b": 1.0, "a": 1.0})
        torch.testing.assert_close(update_of(merged.adapter), update_of(lora()) + update_of(lora(seed=4)))
        assert merged.told == (
            "The weights sum to 2; a merge uses them as they are.",
            "다: weight 0, so left out.",
        )


def changed(adapter: Adapter, **config: Any) -> Adapter:
    return replace(adapter, config={**adapter.config, **config})


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": ({}, {}, "no adapter is given"),
    "kinds": (("lora", "reft"), {}, r"different kinds have no sum \(lora lora, reft reft\)"),
    "prefix": (("prefix",), {}, "prefixes have no sum"),
    "reft-ties": (("reft",), {"method": "ties"}, "ties is not defined for adapters of kind reft. Use exact"),
    "embedding-svd": (("embedding",), {"method": "svd"}, "svd is not defined for adapters of kind embedding"),
    "linear-ranks": ({"a": lora(4), "b": lora(2)}, {"method": "linear"}, r"one rank \(a 4, b 2\). Use exact, or svd"),
    "shapes": ({"a": lora(), "b": lora(n_in=7)}, {}, r"bases differ in the shape of up \(a 6 to 8, b 7 to 8\)"),
    "dora": ({"a": lora(), "b": lora(use_dora=True)}, {}, "b does more than.*use_dora.*plain LoRA"),
    "bias": ({"a": lora(lora_bias=True)}, {}, "lora_bias"),
    "base-bias": ({"a": lora(bias="lora_only")}, {}, "bias"),
    "pissa": ({"a": lora(init_lora_weights="pissa_niter_4")}, {}, "pissa_niter_4 start changed the base"),
    "kasa": ({"a": lora(kasa_config={"beta": 1})}, {}, "kasa_config"),
    "odd-tensor": (
        {"a": replace(lora(), tensors={**lora().tensors, "base_model.model.up.lora_magnitude_vector": torch.ones(8)})},
        {},
        "lora_magnitude_vector, which is no LoRA",
    ),
    "convolution": (
        {"a": replace(lora(), tensors={"base_model.model.up.lora_A.weight": torch.ones(2, 3, 1, 1)})},
        {},
        "no LoRA of a linear layer",
    ),
    "half": (
        {"a": replace(lora(), tensors={"base_model.model.up.lora_A.weight": torch.ones(2, 3)})},
        {},
        "A and B of up in a do not fit",
    ),
    "empty": ({"a": Adapter("lora", {}, {})}, {}, "a holds no tensor"),
    "nan": (
        {"a": replace(lora(), tensors={name: math.nan * tensor for name, tensor in lora().tensors.items()})},
        {},
        "not finite",
    ),
    "full": ({"a": Adapter("full", {"x": torch.ones(1)}, {})}, {}, "kind full have no sum"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_has_no_sum_is_refused_by_name(case: str, kinds: dict[str, Adapter]) -> None:
    found, options, says = BAD[case]
    given = {name: kinds[name] for name in found} if isinstance(found, tuple) else found
    with pytest.raises(AdapterError, match=says) as caught:
        merge(given, **options)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "config", "says"),
    [
        ("reft", {"hidden": 64}, "differ in hidden"),
        ("reft", {"n_layers": 9}, "differ in n_layers"),
        ("embedding", {"vocabulary": 7}, "differ in vocabulary"),
        ("embedding", {"base_hash": "other"}, "trained on different bases"),
    ],
)
def test_members_of_other_bases_are_refused_even_without_weight(
    kind: str, config: dict[str, Any], says: str, kinds: dict[str, Adapter]
) -> None:
    with pytest.raises(AdapterError, match=says):
        merge({"a": kinds[kind], "b": changed(kinds[kind], **config)}, [1.0, 0.0])


def test_damaged_edits_and_deltas_are_refused(kinds: dict[str, Adapter]) -> None:
    reft, delta = kinds["reft"], kinds["embedding"]
    cut = {name: tensor for name, tensor in reft.tensors.items() if not name.endswith("0.bias")}
    with pytest.raises(AdapterError, match=r"edit layers\.0 of a is not whole"):
        merge({"a": replace(reft, tensors=cut)})
    with pytest.raises(AdapterError, match="does not hold a delta for each"):
        merge({"a": replace(delta, tensors={**delta.tensors, "delta": delta.tensors["delta"][:-1]})})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "slerp"}, "'slerp' is no method. Use one of"),
        ({"rank": 4}, "exact has the sum of the members' ranks"),
        ({"method": "linear", "rank": 4}, "linear has the members' rank"),
        ({"method": "svd", "rank": 0}, "0 is no rank"),
        ({"method": "svd", "rank": True}, "True is no rank"),
        ({"method": "svd", "density": 0.5}, "svd drops nothing"),
        ({"method": "ties", "density": 0.0}, "0.0 is no share"),
        ({"method": "ties", "density": 1.5}, "1.5 is no share"),
        ({"method": "dare_ties", "density": math.nan}, "nan is no share"),
        ({"method": "ties", "density": 2.0, "rank": -1}, "2 problems"),
        ({"weights": [1.0]}, "1 weights for 2 members"),
        ({"weights": [0.0, 0.0]}, "every weight is 0"),
        ({"weights": [math.nan, 1.0]}, "a: nan is no weight"),
        ({"weights": {"a": 1.0, "c": 1.0}}, "c: is no member. There are: a, b"),
    ],
)
def test_what_was_asked_wrongly_is_said(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        merge({"a": lora(), "b": lora(seed=4)}, **options)
    assert says in str(caught.value) and caught.value.exit_code == 2


def test_every_kind_says_what_it_can_do() -> None:
    assert MERGES["lora"] == ("exact", "svd", "linear", *SPARSE)
    assert MERGES["reft"] == ("exact",)
