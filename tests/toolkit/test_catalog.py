"""The catalogue: every figure has its source, and a loaded config that says otherwise is told."""

import json
import math
import subprocess
import sys
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit.bases.catalog import BASES, differences, find, gaps, nearest, page
from toolkit.bases.known import FIGURES, KnownBase, Shape, Source, count_parameters, estimate_mb, shape_of
from toolkit.shipped import shipped

ROOT = Path(__file__).parents[2]
SMALL = Shape(layers=2, hidden=64, intermediate=160, heads=4, kv_heads=2, head_dim=16, vocab=1000)


def config_of(shape: Shape, **more: object) -> SimpleNamespace:
    """A text config as transformers would declare it."""
    return SimpleNamespace(
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocab,
        **more,
    )


def small_base(**more: object) -> KnownBase:
    sources = {"shape": Source("https://example.org/card"), "context": Source("https://example.org/card")}
    return KnownBase("small", "someone/small", shape=SMALL, sources=sources, **more)  # type: ignore[arg-type]


def test_importing_the_catalogue_loads_no_torch():
    code = "import sys, toolkit.bases.catalog; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_every_name_and_hub_id_is_there_once():
    names = [base.name for base in BASES]
    hubs = [base.hub_id for base in BASES if base.hub_id]
    assert len(set(names)) == len(names) > 8 and len(set(hubs)) == len(hubs)
    assert all(name == name.lower() and "/" not in name for name in names)


def test_a_base_is_shipped_or_on_the_hub_and_never_both():
    assert all(base.shipped != bool(base.hub_id) for base in BASES)
    assert [base.name for base in BASES if base.shipped] == ["spoken-mini"]


@pytest.mark.parametrize("base", BASES, ids=lambda base: base.name)
def test_a_figure_stands_exactly_where_a_source_stands(base: KnownBase):
    given = {figure for figure in (*FIGURES, "spoken", "shape") if getattr(base, figure) is not None}
    assert set(base.sources) - {"note"} == given


def test_sources_are_addresses_with_a_day():
    sources = [source for base in BASES for source in base.sources.values()]
    assert len(sources) > 100
    assert all(s.url.startswith(("https://", "data/")) and s.read >= date(2026, 11, 24) for s in sources)


def test_at_least_eight_rows_have_every_figure_sourced():
    assert sum(not gaps(base) for base in BASES) >= 8


def test_licences_marked_non_commercial_are_never_marked_commercial():
    closed = [b for b in BASES if b.licence and any(word in b.licence for word in ("NC", "Research"))]
    assert closed and all(base.commercial is False for base in closed)


@pytest.mark.parametrize("base", [b for b in BASES if b.shape and b.parameters], ids=lambda base: base.name)
def test_the_shape_that_was_read_gives_the_parameters_that_were_read(base: KnownBase):
    tied, untied = (count_parameters(base.shape, tied=tied) for tied in (True, False))
    assert min(abs(count - base.parameters) for count in (tied, untied)) <= 0.1 * base.parameters


def test_sizes_stay_between_the_embedded_base_and_eight_billion():
    assert all(1e8 <= base.parameters <= 8.2e9 for base in BASES if base.parameters and not base.shipped)


def test_a_base_is_found_by_its_name_or_hub_id_whatever_the_case():
    assert find("qwen2.5-0.5b") is find("Qwen/Qwen2.5-0.5B-Instruct") is find("QWEN2.5-0.5B") is not None


@pytest.mark.parametrize("name", ["", "말투", "qwen2.5", "./spoken-mini", "someone/spoken-mini"])
def test_an_unknown_name_is_none(name: str):
    assert find(name) is None


def test_a_misspelled_name_is_answered_with_the_nearest():
    assert nearest("spoken_mini")[0] == "spoken-mini"
    assert nearest("Qwen3-1.7")[0] == "qwen3-1.7b"
    assert "exaone-4.0-1.2b" in nearest("LGAI-EXAONE/EXAONE-4.0-1.2")
    assert nearest("오늘 뭐 먹지?") == ()


def test_a_config_that_agrees_gives_no_difference():
    known = small_base(context=512, parameters=count_parameters(SMALL, tied=True))
    assert differences(known, config_of(SMALL, max_position_embeddings=1024, tie_word_embeddings=True)) == []


def test_a_config_of_another_size_is_told_with_both_figures_and_the_source():
    found = differences(small_base(), config_of(Shape(2, 64, 160, 4, 2, 16, 2000)))
    assert found == ["small: vocab is 2,000 in the loaded config, 1,000 in the catalogue (https://example.org/card)"]


@pytest.mark.parametrize(("context", "told"), [(511, True), (512, False), (1024, False), (1025, True)])
def test_a_context_shorter_or_more_than_twice_as_long_is_told(context: int, told: bool):
    assert bool(differences(small_base(context=512), config_of(SMALL, max_position_embeddings=context))) is told


def test_parameters_are_told_beyond_a_tenth():
    counted = count_parameters(SMALL, tied=False)
    config = config_of(SMALL, tie_word_embeddings=False)
    assert differences(small_base(parameters=round(counted * 1.05)), config) == []
    assert "parameters" in differences(small_base(parameters=round(counted * 1.25)), config)[0]


def test_parameters_of_mixtures_and_convolutions_are_not_counted():
    known = small_base(parameters=1)
    for odd in ({"num_local_experts": 8}, {"layer_types": ["conv", "full_attention"]}):
        assert differences(known, config_of(SMALL, **odd)) == []


def test_the_text_part_of_a_multimodal_config_is_compared():
    other = Shape(2, 64, 160, 4, 2, 16, 2000)
    config = SimpleNamespace(vision_config={}, get_text_config=lambda: config_of(other))
    assert shape_of(config) is None and len(differences(small_base(), config)) == 1


def test_the_configs_of_transformers_are_understood():
    transformers = pytest.importorskip("transformers")
    known = find("gemma-3-1b")
    assert known is not None and known.shape is not None
    shape = known.shape
    sizes = {
        "num_hidden_layers": shape.layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
    }
    config = transformers.Gemma3TextConfig(**sizes, max_position_embeddings=32_768)
    assert differences(known, config) == []
    assert len(differences(known, transformers.Gemma3TextConfig(**{**sizes, "num_hidden_layers": 18}))) >= 2


def test_the_row_of_the_shipped_base_is_what_it_ships():
    folder, known = shipped("base/spoken-mini"), find("spoken-mini")
    if not (folder / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not in this tree")
    config = SimpleNamespace(**json.loads((folder / "config.json").read_text("utf-8")))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert known is not None and differences(known, config) == []
    assert known.context == tokenizer["model_max_length"]
    assert known.template == "marked" and "{% generation %}" in (folder / "chat_template.jinja").read_text("utf-8")


def test_the_parameters_of_the_shipped_base_are_those_in_its_weights():
    files = sorted(shipped("base/spoken-mini").glob("*.safetensors"))
    if not files:
        pytest.skip("data/base/spoken-mini is not in this tree")
    total = 0
    for file in files:
        raw = file.read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    assert find("spoken-mini").parameters == total  # type: ignore[union-attr]


def test_the_estimate_is_the_sum_its_docstring_states():
    linear = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 160 * 3)
    adapter = 2 * 16 * (128 * 2 + 96 * 2 + 224 * 3)
    kept = 1024 * (2 * (28 * 64 + 10 * 160 + 8 * 64 + 4 * 32 + 28 * 16 + 8) + 14 * 1000)
    parameters = 64 * 1000 + linear
    assert estimate_mb(SMALL, parameters, nf4=False) == -(-(2 * parameters + 16 * adapter + kept) // 2**20)


def test_nf4_saves_the_weights_of_the_linear_layers_and_nothing_else():
    big = find("qwen3-8b")
    assert big is not None and big.shape is not None and big.lora_mb and big.qlora_mb
    linear = count_parameters(big.shape, tied=True) - big.shape.vocab * big.shape.hidden
    unpacked = 2 * big.shape.hidden * big.shape.intermediate
    assert abs((big.lora_mb - big.qlora_mb) - (linear * (2 - 4.127 / 8) - unpacked) / 2**20) <= 1


def test_no_shape_means_no_estimate():
    assert find("kanana-1.5-8b").lora_mb is None  # type: ignore[union-attr]
    assert estimate_mb(SMALL, None, nf4=True) is None


def test_the_page_in_docs_is_the_one_the_catalogue_writes():
    remedy = "run: python -m toolkit.bases.catalog > docs/bases.md"
    assert (ROOT / "docs" / "bases.md").read_text("utf-8") == page(), remedy


def test_the_page_shows_every_base_and_what_is_missing():
    text = page()
    assert all(f"| `{base.name}` |" in text and f"### {base.name}\n" in text for base in BASES)
    assert "Not read: languages, context." in text
