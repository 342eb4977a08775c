"""What a right recipe becomes: defaults, overrides, writing it out again, the schema and the recipes that ship."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from toolkit.errors import RecipeError
from toolkit.recipe.adapter import PEFT_KINDS, REFUSED_KINDS
from toolkit.recipe.model import Base, Data, Embedding, Full, Labels, Lora, NewBase, PeftKind, Prefix, Recipe, Reft
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import schema, to_yaml
from toolkit.shipped import PREFIX, resolve

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "recipes").glob("*.yaml"))
TEMPLATES = sorted((ROOT / "recipes" / "templates").glob("*.yaml"))
SMALLEST = "name: mine\nbase: {model: spoken-mini}\ndata: {train: [%s]}\n"


@pytest.fixture
def smallest(tmp_path: Path) -> Path:
    talk = tmp_path / "대화.jsonl"
    talk.write_text("{}\n", encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(SMALLEST % talk, encoding="utf-8")
    return file


def again(recipe: Recipe, tmp_path: Path) -> Recipe:
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    return read_recipe(file, to_run=False)


def test_the_smallest_recipe_has_the_defaults_of_the_design(smallest: Path) -> None:
    recipe = read_recipe(smallest)
    assert recipe.task == "chat" and recipe.track == ("tensorboard",)
    assert recipe.adapter == Lora(rank=16, alpha="2x", dropout=0.0, targets="all-linear")
    assert recipe.base == Base(model="spoken-mini", revision=None, quantize="none", trust_remote_code=False)
    assert (recipe.data.valid, recipe.data.test, recipe.data.format, recipe.data.system) == (0.1, 0.1, "auto", None)
    clean = recipe.data.clean
    assert (clean.unicode, clean.duplicates, clean.near_duplicates, clean.mask_private) == ("NFC", "exact", 0.9, "user")
    assert (clean.min_turns, clean.too_long, clean.max_dropped) == (2, "drop_old_turns", 0.05)
    train = recipe.train
    assert (train.epochs, train.max_steps, train.batch_size, train.micro_batch) == (3, None, 8, "auto")
    assert (train.learning_rate, train.schedule, train.warmup_ratio, train.optimizer) == (
        "auto",
        "cosine",
        0.05,
        "adamw",
    )
    assert (train.weight_decay, train.max_grad_norm, train.precision, train.packing) == (0, 1, "auto", "auto")
    assert (train.activation_checkpointing, train.max_length, train.evaluate_every) == ("auto", "auto", 0.25)
    assert (train.early_stop_patience, train.keep, train.seed) == (2, (), 0)
    assert recipe.evaluate.metrics == ("loss", "bits_per_byte", "chrf", "distinct_2", "repetition")
    assert (recipe.serve.temperature, recipe.serve.top_p, recipe.serve.max_tokens) == (0.7, 0.9, 256)


def test_a_recipe_cannot_change_after_reading(smallest: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        read_recipe(smallest).train.epochs = 5


@pytest.mark.parametrize(
    ("adapter", "wanted"),
    [
        ("{rank: 8}", Lora(rank=8)),
        (
            "{kind: lora, alpha: 32, targets: [q_proj, v_proj], init: pissa}",
            Lora(alpha=32, targets=("q_proj", "v_proj"), init="pissa"),
        ),
        ("{kind: prefix, init_text: '오늘 뭐 먹지?'}", Prefix(init_text="오늘 뭐 먹지?")),
        ("{kind: reft, layers: [0, 5]}", Reft(layers=(0, 5))),
        ("{kind: embedding}", Embedding()),
        ("{kind: full}", Full()),
        (
            "{kind: ia3, options: {target_modules: [k_proj]}}",
            PeftKind(kind="ia3", options={"target_modules": ["k_proj"]}),
        ),
        ("null", Lora()),
    ],
)
def test_an_adapter_is_chosen_by_its_kind(smallest: Path, adapter: str, wanted: object) -> None:
    assert read_recipe(smallest, [f"adapter={adapter}"]).adapter == wanted


def test_alpha_as_a_multiple_follows_the_rank() -> None:
    assert Lora(rank=8, alpha="2x").alpha_number == 16
    assert Lora(rank=8, alpha="1.5x").alpha_number == 12
    assert Lora(rank=8, alpha=5).alpha_number == 5


@pytest.mark.slow  # imports peft
def test_the_kinds_of_peft_are_those_that_peft_has() -> None:
    from peft.utils.peft_types import PeftType

    assert {kind.value.lower() for kind in PeftType} - {"lora"} == PEFT_KINDS | set(REFUSED_KINDS)


def test_overrides_go_through_yaml_and_make_the_sections_they_need(smallest: Path) -> None:
    with smallest.open("a", encoding="utf-8") as file:
        file.write("train:\nserve: {top_p: 0.5}\n")
    recipe = read_recipe(
        smallest,
        ["train.epochs=1", "train.learning_rate=1e-3", "serve.temperature=0", "data.clean.min_turns=4", "name=말투"],
    )
    assert (recipe.train.epochs, recipe.train.learning_rate, recipe.name) == (1, 1e-3, "말투")
    assert (recipe.serve.temperature, recipe.serve.top_p, recipe.data.clean.min_turns) == (0, 0.5, 4)


def test_an_override_merges_maps_and_replaces_lists(smallest: Path) -> None:
    recipe = read_recipe(
        smallest, ["train={epochs: 2}", "train={seed: 7}", "track=[]", "data.train=[maltu:probes.jsonl]"]
    )
    assert (recipe.train.epochs, recipe.train.seed, recipe.track) == (2, 7, ())
    assert recipe.data.train == ("maltu:probes.jsonl",)


@pytest.mark.parametrize(
    "overrides",
    [
        ["adapter.kind=prefix", "adapter.tokens=4"],
        ["adapter.tokens=4", "adapter.kind=prefix"],
        ["adapter={kind: prefix, tokens: 4}"],
    ],
)
def test_a_new_kind_replaces_its_section(smallest: Path, overrides: list[str]) -> None:
    with smallest.open("a", encoding="utf-8") as file:
        file.write("adapter: {kind: lora, rank: 8, dora: true}\n")
    assert read_recipe(smallest, overrides).adapter == Prefix(tokens=4)


def test_the_same_kind_keeps_its_section(smallest: Path) -> None:
    with smallest.open("a", encoding="utf-8") as file:
        file.write("adapter: {rank: 8}\n")
    assert read_recipe(smallest, ["adapter.kind=lora", "adapter.dora=true"]).adapter == Lora(rank=8, dora=True)


def test_a_new_base_replaces_the_old_one(smallest: Path) -> None:
    recipe = read_recipe(smallest, ["base.new={layers: 2}", "adapter.kind=full"])
    assert isinstance(recipe.base, NewBase) and recipe.base.new.layers == 2
    assert read_recipe(smallest, ["base.new.layers=2", "base.model=spoken-mini"]).base == Base(model="spoken-mini")


def test_keys_of_names_are_kept_as_they_are_written(smallest: Path) -> None:
    form = "{kind: labels, text: document, label: label, names: {0: 부정, 1: 긍정}, template: '{text}\n감정:'}"
    recipe = read_recipe(smallest, ["task=classify", f"data.format={form}"])
    assert isinstance(recipe.data.format, Labels) and recipe.data.format.names == {"0": "부정", "1": "긍정"}


def test_a_name_is_brought_to_nfc(smallest: Path) -> None:
    assert read_recipe(smallest, ["name=말투"]).name == "말투"


@pytest.mark.parametrize("word", ["no", "on", "1e3x", "12:30", "2026-11-24", "null_", "0x", "~a", "한국어"])
def test_a_word_that_older_yaml_misreads_stays_a_word(smallest: Path, word: str) -> None:
    assert read_recipe(smallest, [f"data.system={word}"]).data.system == word


@pytest.mark.parametrize(("text", "rate"), [("1e-3", 0.001), ("5E-5", 5e-5), ("2.e-4", 2e-4), (".01", 0.01), ("1", 1)])
def test_a_number_is_a_number_however_it_is_written(smallest: Path, text: str, rate: float) -> None:
    assert read_recipe(smallest, [f"train.learning_rate={text}"]).train.learning_rate == rate


def test_a_finished_run_is_read_without_its_files(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(SMALLEST % "gone.jsonl" + "track: [trackio]\n", encoding="utf-8")
    assert read_recipe(file, to_run=False).data.train == ("gone.jsonl",)
    with pytest.raises(RecipeError, match=r"data\.train\.0: there is no file"):
        read_recipe(file)


@pytest.mark.parametrize("file", [*SHIPPED, *TEMPLATES], ids=lambda file: file.name)
def test_a_recipe_written_out_reads_as_an_equal_recipe(file: Path, tmp_path: Path) -> None:
    recipe = read_recipe(file, to_run=False)
    assert again(recipe, tmp_path) == recipe


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    system=texts,
    names=st.dictionaries(texts, texts, max_size=4),
    column=texts.filter(lambda text: all(part.strip() for part in text.split("."))),
    rate=st.floats(1e-300, 99, allow_nan=False),
    targets=st.lists(texts, min_size=1, max_size=3, unique=True),
)
def test_any_text_and_number_survives_being_written_out(
    tmp_path_factory: pytest.TempPathFactory,
    system: str,
    names: dict[str, str],
    column: str,
    rate: float,
    targets: list[str],
) -> None:
    recipe = Recipe.model_validate(
        {
            "name": "mine",
            "task": "classify",
            "base": {"model": "owner/name"},
            "data": {
                "train": ["hub:x"],
                "system": system,
                "format": {"kind": "labels", "text": column, "label": "l" + column, "names": names},
            },
            "adapter": {"kind": "lora", "targets": [f"x{target}" for target in targets]},
            "train": {"learning_rate": rate},
        }
    )
    assert again(recipe, tmp_path_factory.mktemp("again")) == recipe


def test_the_schema_in_the_repository_is_that_of_the_code() -> None:
    kept = (ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8")
    assert kept == schema(), "write it anew: python -m toolkit.recipe.show > recipes/recipe.schema.json"


def test_the_command_that_writes_the_schema_prints_it() -> None:
    told = subprocess.run([sys.executable, "-m", "toolkit.recipe.show"], cwd=ROOT, capture_output=True, check=True)
    assert told.stdout.decode() == schema()


def test_every_key_of_the_schema_is_described() -> None:
    described = json.loads(schema())
    sections = [described, *described["$defs"].values()]
    keys = [(name, key) for section in sections for name, key in section["properties"].items() if name != "kind"]
    assert len(keys) > 60
    assert [name for name, key in keys if "description" not in key] == []


def test_the_recipes_that_ship_are_these() -> None:
    wanted = (
        "bag_voices",
        "boost_voices",
        "casual_chat",
        "casual_chat_search",
        "compare_kinds",
        "listener_embedding",
        "polite_prefix",
        "prefix_search",
        "rewrite_spoken",
        "teacher_reft",
        "tone_experts",
        "tone_gate",
        "tone_merge",
        "tone_mix",
        "topic_line",
        "voice_classify",
        "vote_bases",
        "vote_kinds",
    )
    assert tuple(file.stem for file in SHIPPED) == wanted
    templates = ["bag_sentiment", "boost_intent", "spoken_mini", "summarise", "translate_ko_en"]
    assert [file.stem for file in TEMPLATES] == templates


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_a_shipped_recipe_runs_from_any_folder(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(Path(f"{PREFIX}recipes/{file.name}"))
    assert recipe.name == file.stem
    assert all(name.startswith(PREFIX) and resolve(name).is_file() for name in recipe.data.train_files)


@pytest.mark.parametrize("file", [*SHIPPED, *TEMPLATES], ids=lambda file: file.name)
def test_a_shipped_recipe_opens_with_its_command_and_cost(file: Path) -> None:
    first, second = file.read_text(encoding="utf-8").splitlines()[:2]
    assert first.startswith(f"# python -m toolkit.train {file.relative_to(ROOT).as_posix()}  ")
    assert "2 CPU cores" in first and second.startswith("# yaml-language-server: $schema=")


def test_a_template_says_in_its_first_line_what_it_needs() -> None:
    assert all("needs" in file.read_text(encoding="utf-8").splitlines()[0] for file in TEMPLATES)


def test_sections_can_be_made_in_python_too() -> None:
    recipe = Recipe(name="a", base=Base(model="spoken-mini"), data=Data(train=("a.jsonl",)), adapter=Reft(rank=2))
    assert isinstance(recipe.adapter, Reft) and recipe.adapter.rank == 2


def test_a_section_that_brings_its_kind_does_not_undo_a_key_given_before_it(smallest: Path) -> None:
    assert read_recipe(smallest, ["adapter.tokens=8", "adapter={kind: prefix}"]).adapter == Prefix(tokens=8)
