"""Everything that is wrong with a recipe: told at once, each once, with line, key and remedy."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from toolkit.recipe.model import Recipe
from toolkit.recipe.read import read_recipe
from toolkit.recipe.words import CALLED, NO_KEY, PLACE_OF

ROOT = Path(__file__).parents[2]
HEAD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"


Problems = Callable[..., list[str]]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("trian: {epochs: 3}", "line 4  trian: not a key of a recipe. Did you mean 'train'?"),
        ("adapter: {rnak: 8}", "line 4  adapter.rnak: not a key of a lora adapter. Did you mean 'rank'?"),
        (
            "adapter:\n  kind: prefix\n  tokns: 8",
            "line 6  adapter.tokns: not a key of a prefix adapter. Did you mean 'tokens'?",
        ),
        (
            "adapter: {kind: reft, laiers: all}",
            "line 4  adapter.laiers: not a key of a reft adapter. Did you mean 'layers'?",
        ),
        (
            "train:\n  epochs: 3\n  batchsize: 3",
            "line 6  train.batchsize: not a key of train. Did you mean 'batch_size'?",
        ),
        ("train: {evaluate_evry: 1}", "train.evaluate_evry: not a key of train. Did you mean 'evaluate_every'?"),
        ("evaluate: {promts: null}", "evaluate.promts: not a key of evaluate. Did you mean 'prompts'?"),
        ("serve: {tempreature: 1}", "serve.tempreature: not a key of serve. Did you mean 'temperature'?"),
        ("Train: {epochs: 3}", "Train: is spelled train"),
        ("train: {batch-size: 3}", "train.batch-size: is spelled batch_size"),
        ("xyzzy: 1", "xyzzy: not a key of a recipe. It has: name, task, base"),
        ("trian: 1\nserve: {top_p: 2}", "line 4  trian"),
        (
            "adapter: {kind: embedding, rank: 8}",
            "adapter.rank: is a key of a lora adapter and of a reft adapter, not of an embedding adapter. Remove it",
        ),
        (
            "adapter: {kind: ia3, target_modules: [k_proj]}",
            "adapter.target_modules: not a key of an adapter of PEFT. PEFT's own keys stand under options: {target",
        ),
        ("adapter: {kind: ia3, init_ia3_weights: true}", "stand under options: {init_ia3_weights: …}"),
        ("exprets: {}", "line 4  exprets: not a key of a recipe. Did you mean 'experts'?"),
        ("combin: {kind: route}", "line 4  combin: not a key of a recipe. Did you mean 'combine'?"),
        ("learning_rate: 1e-3", "learning_rate: stands in the wrong section. Write train.learning_rate"),
        ("epochs: 3", "epochs: stands in the wrong section. Write train.epochs"),
        ("rank: 3", "rank: stands in the wrong section. Write adapter.rank"),
        ("train: {rank: 3}", "train.rank: stands in the wrong section. Write adapter.rank"),
        (
            "adapter: {learning_rate: 1.0}",
            "adapter.learning_rate: stands in the wrong section. Write train.learning_rate",
        ),
    ],
)
def test_an_unknown_key_is_told_with_what_was_meant(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert any(says in one for one in found), found
    assert len(found) == (2 if "top_p" in more else 1)


@pytest.mark.parametrize(
    ("head", "says"),
    [
        (
            "nme: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 1  nme: not a key of a recipe. Did you mean 'name'?",
        ),
        (
            "name: mine\nbase: {modle: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  base.modle: not a key of an existing base. Did you mean 'model'?",
        ),
        (
            "name: mine\nbase: {model: spoken-mini, candidates: [a, b]}\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  base.candidates: a base is named (model), made (new) or chosen from several (candidates)",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: {trian: ['maltu:probes.jsonl']}\n",
            "line 3  data.trian: not a key of data. Did you mean 'train'?",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndataset: ['maltu:probes.jsonl']\n",
            "line 3  dataset: here it is data.train. A list of files",
        ),
        (
            "name: mine\nmodel_name_or_path: spoken-mini\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  model_name_or_path: here it is base.model",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl'], clean: {min_turn: 2}}\n",
            "line 3  data.clean.min_turn: not a key of clean. Did you mean 'min_turns'?",
        ),
        (
            "name: mine\nbase: spoken-mini\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  base: must be a section. Write base: {model: spoken-mini}",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: my.jsonl\n",
            "line 3  data: must be a section. Write data: {train: [my.jsonl]}",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: {train: my.jsonl}\n",
            "line 3  data.train: must be a list, as in [my.jsonl], not 'my.jsonl'",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: {train: []}\n",
            "line 3  data.train: is an empty list. Name at least one",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata: {train: [{path: x.jsonl, type: alpaca}]}\n",
            "line 3  data.train.0.type: not a key of a file with a weight: {path: my.jsonl, weight: 2}. The shape of",
        ),
        ("base: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n", "name: is missing. Write name: mine"),
        (
            "name: mine\nbase: {}\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  base.model: is missing. Write base: {model: spoken-mini}",
        ),
        (
            "name: mine\nbase: {model: spoken-mini}\ndata:\n",
            "line 3  data: is missing. Write data: {train: [my.jsonl]}",
        ),
        (
            "name: mine\nbase: {new: {hiden: 64}}\ndata: {train: ['maltu:probes.jsonl']}\nadapter: {kind: full}\n",
            "line 2  base.new.hiden: not a key of a new base's shape. Did you mean 'hidden'?",
        ),
        (
            "name: mine\nbase: {new: 3}\ndata: {train: ['maltu:probes.jsonl']}\n",
            "line 2  base.new: must be a section with keys below it, not 3",
        ),
        (
            "name: mine\nbase: {new: {}, model: x}\ndata: {train: ['maltu:probes.jsonl']}\nadapter: {kind: full}\n",
            "line 2  base.model: a base exists already (model) or is made (new), not both. Remove one",
        ),
        (
            "name: m\nbase: {new: {}, quantize: nf4}\ndata: {train: ['maltu:probes.jsonl']}\nadapter: {kind: full}\n",
            "line 2  base.quantize: is a key of an existing base and of bases to choose from, not of a base made from",
        ),
    ],
)
def test_one_mistake_at_the_head_gives_one_complaint(problems: Problems, head: str, says: str) -> None:
    found = problems(head=head)
    assert len(found) == 1 and found[0].startswith(says), found


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("adapter: {r: 8}", "adapter.r: here it is called rank"),
        ("adapter: {lora_r: 8}", "adapter.lora_r: here it is called rank"),
        ("adapter: {lora_alpha: 8}", "adapter.lora_alpha: here it is called alpha"),
        ("adapter: {target_modules: [q_proj]}", "adapter.target_modules: here it is called targets"),
        ("adapter: {lora_dropout: 0.1}", "adapter.lora_dropout: here it is called dropout"),
        ("adapter: {kind: prefix, num_virtual_tokens: 8}", "adapter.num_virtual_tokens: here it is called tokens"),
        ("adapter: {kind: prefix, lora_r: 8}", "here it is called rank, and a prefix adapter has none. Remove it"),
        ("lora_rank: 8", "lora_rank: here it is adapter.rank"),
        ("finetuning_type: lora", "finetuning_type: here it is adapter.kind"),
        ("cutoff_len: 512", "cutoff_len: here it is train.max_length"),
        ("train: {cutoff_len: 512}", "train.cutoff_len: here it is called max_length"),
        ("sequence_len: 512", "sequence_len: here it is train.max_length"),
        ("max_seq_length: 512", "max_seq_length: here it is train.max_length"),
        ("num_train_epochs: 3", "num_train_epochs: here it is train.epochs"),
        ("num_epochs: 3", "num_epochs: here it is train.epochs"),
        ("per_device_train_batch_size: 2", "here it is train.micro_batch. Leave it auto"),
        ("micro_batch_size: 2", "micro_batch_size: here it is train.micro_batch"),
        ("gradient_accumulation_steps: 8", "no key here: it is worked out: train.batch_size counts"),
        ("output_dir: out", "output_dir: here it is called name. The run goes to runs/NAME"),
        ("lr: 1e-3", "lr: here it is train.learning_rate"),
        ("lr_scheduler_type: cosine", "lr_scheduler_type: here it is train.schedule"),
        ("warmup_steps: 10", "here it is train.warmup_ratio. A share of all steps, as in 0.05"),
        ("bf16: true", "bf16: here it is train.precision. Write precision: bf16, or leave it auto"),
        ("fp16: true", "fp16: here it is train.precision"),
        ("load_in_4bit: true", "load_in_4bit: here it is base.quantize. Write quantize: nf4"),
        ("load_in_8bit: true", "load_in_8bit: no key here: 8-bit bases are not offered"),
        ("gradient_checkpointing: true", "gradient_checkpointing: here it is train.activation_checkpointing"),
        ("val_set_size: 0.1", "val_set_size: here it is data.valid"),
        ("eval_steps: 10", "eval_steps: here it is train.evaluate_every. In epochs, as in 0.25"),
        ("save_steps: 10", "save_steps: no key here: checkpoints are written by time"),
        ("logging_steps: 10", "logging_steps: no key here: every step is written to metrics.jsonl"),
        ("template: qwen", "template: no key here: the base's own chat template is used"),
        ("report_to: wandb", "report_to: here it is called track. A list, as in [tensorboard]"),
        ("wandb_project: x", "wandb_project: here it is called track. Write track: [wandb]"),
        ("sample_packing: true", "sample_packing: here it is train.packing"),
        ("train_on_inputs: false", "train_on_inputs: no key here: only what the assistant says is learned"),
        ("학습률: 1e-3", "학습률: here it is train.learning_rate"),
        ("train: {에폭: 3}", "train.에폭: here it is called epochs"),
        ("adapter: lora", "adapter: must be a section. Write adapter: {kind: lora}"),
        ("adapter: qlora", "adapter: must be a section. Write adapter: {kind: lora}, with base: {quantize: nf4}"),
        ("adapter: {kind: qlora}", "adapter.kind: here it is called lora, with base: {quantize: nf4}"),
        ("adapter: {kind: dora}", "adapter.kind: here it is called lora, with dora: true"),
        ("adapter: {kind: loreft}", "adapter.kind: here it is called reft"),
        ("adapter: {kind: prefix_tuning}", "adapter.kind: here it is called prefix"),
        ("adapter: {kind: xlora}", "adapter.kind: mixing adapters by a learned gate is not in this version"),
        ("adapter: {kind: prefx, tokens: 3}", "adapter.kind: 'prefx' is not a kind of adapter. Did you mean 'prefix'?"),
        (
            "adapter: {kind: zzz}",
            "'zzz' is not a kind of adapter: lora, prefix, reft, embedding, full, or a kind of PEFT",
        ),
        ("adapter: {kind: null}", "adapter.kind: null is not a kind of adapter"),
        ("train: {optimizer: adamw_torch}", "train.optimizer: 'adamw_torch': here it is called adamw"),
        ("train: {schedule: cosine_with_restarts}", "train.schedule: 'cosine_with_restarts': here it is called cosine"),
        ("train: {precision: bfloat16}", "train.precision: 'bfloat16': here it is called bf16"),
        ("evaluate: {metrics: [perplexity]}", "evaluate.metrics.0: 'perplexity': here it is called loss"),
        ("task: sft", "task: 'sft': here it is called chat"),
    ],
)
def test_the_words_of_other_tools_are_answered(problems: Problems, more: str, says: str) -> None:
    found = problems(more)
    assert len(found) == 1 and says in found[0], found


def test_the_tables_of_words_point_at_keys_that_exist() -> None:
    described = json.loads((ROOT / "recipes" / "recipe.schema.json").read_text(encoding="utf-8"))
    top, names = described["properties"], {name for one in described["$defs"].values() for name in one["properties"]}
    for key in CALLED:
        section, _, name = key.rpartition(".")
        assert name in (names if section else top), key
        assert not section or section.split(".")[0] in top, key
    assert len(PLACE_OF) == sum(len(words.split()) for words in CALLED.values())
    assert len(PLACE_OF) + len(NO_KEY) > 300 and not set(PLACE_OF) & set(NO_KEY)


def test_all_problems_come_at_once_in_the_order_of_lines(problems: Problems) -> None:
    found = problems(
        "trian: 1\nadapter: {kind: prefix, rnak: 1}\ntrain:\n  packing: true\n  epochs: -1\n  lr: 3\ntrack: [x]\n",
        "serve.top_p=2",
        head="name: base\nbase: {model: spoken-mini}\ndata: {train: [gone.jsonl]}\n",
    )
    keys = [one.split(":")[0] for one in found]
    assert keys == [
        "line 1  name",
        "line 3  data.train.0",
        "line 4  trian",
        "line 5  adapter.rnak",
        "line 7  train.packing",
        "line 8  train.epochs",
        "line 9  train.lr",
        "line 10  track.0",
        "override serve.top_p=2",
    ]


def test_a_wrong_kind_is_not_also_a_contradiction(problems: Problems) -> None:
    assert len(problems("adapter: {kind: ful}\ntrain: {optimizer: muon}")) == 1
    assert len(problems("finetuning_type: full\ntrain: {optimizer: muon}")) == 1


def test_a_mistake_in_a_file_that_an_override_mends_is_no_mistake(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(HEAD + "train: {epochs: viele}\n")
    assert read_recipe(tmp_path / "r.yaml", ["train.epochs=1"]).train.epochs == 1


PROBE = """
import sys
from pathlib import Path
from toolkit.errors import RecipeError
from toolkit.recipe.read import read_recipe
from toolkit.recipe.show import to_yaml
read_recipe(Path(sys.argv[1]), to_run=True) and to_yaml(read_recipe(Path(sys.argv[1])))
try:
    read_recipe(Path(sys.argv[1]), ["adapter.rnak=3", "base.quantize=nf4"])
except RecipeError:
    heavy = {"torch", "transformers", "peft", "trl", "numpy", "datasets", "bitsandbytes", "pandas", "asyncio"}
    print(sorted(heavy & set(sys.modules)))
"""


def test_reading_a_recipe_and_its_errors_loads_nothing_heavy(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(HEAD)
    told = subprocess.run([sys.executable, "-c", PROBE, file], cwd=ROOT, capture_output=True, text=True, check=True)
    assert told.stdout == "[]\n"


def test_every_section_refuses_a_key_that_it_does_not_have() -> None:
    described = Recipe.model_json_schema()
    sections = [described, *described["$defs"].values()]
    assert len(sections) > 12
    assert all(section["additionalProperties"] is False for section in sections)
