"""Training speed of one LoRA on spoken-mini against bare SFTTrainer scripts, interleaved; time to first step; peak
memory.

python benchmarks/train.py [rounds]        (about 2 minutes a round on 2 cores)

Contestants, all on the same conversations, 8 a step, LoRA rank 16 on all linears, assistant tokens only, float32 on
CPU:
  ours      python -m toolkit.train's own path (packed inside the micro batch, our head loss, freed memory kept)
  unpacked  the same without packing
  returned  ours, freed memory given back to the system as the C library does by itself
  bare      a well-set SFTTrainer script: use_cpu, no bf16, no activation checkpointing, assistant_only_loss
  defaults  the same script with TRL's defaults (bf16, activation checkpointing), few steps
Tokens are counted without padding. A step's time is from the end of the step before; the first WARM steps are left out.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from machine import load, save, say, spread, surroundings

STEPS, WARM = 40, 5
FEW = 10  # steps of the contestant that is ten times slower


def rows() -> list[list[dict[str, str]]]:
    """The casual dialogues, Korean and English."""
    from toolkit.shipped import shipped

    lines = [line for lang in ("ko", "en") for line in shipped(f"talk/casual.{lang}.jsonl").open(encoding="utf-8")]
    return [json.loads(line)["messages"] for line in lines]


def ours(folder: Path, packing: bool, keeps: bool = True) -> list[tuple[float, int]]:
    """(seconds since start, tokens so far) after every step."""
    import torch
    from rich.console import Console

    from toolkit.adapters.kinds import kind_of
    from toolkit.bases.load import load_base
    from toolkit.bundle import Run
    from toolkit.corpus.render import Renderer
    from toolkit.corpus.talk import Talk, Turn
    from toolkit.fit.display import Display
    from toolkit.fit.one import Job, fit_one
    from toolkit.fit.plan import Plan
    from toolkit.pages import keep_pages
    from toolkit.quiet import quiet
    from toolkit.recipe.model import Base, Lora, Recipe
    from toolkit.track import open_track

    marks: list[tuple[float, int]] = []

    class Marks(Display):
        def step(self, step: int, loss: float, n_tokens: int) -> None:
            marks.append((time.perf_counter(), n_tokens))

    if keeps:
        keep_pages()
    with quiet():
        base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
        talks = [Talk(tuple(Turn(m["role"], m["content"]) for m in row), "x") for row in rows()]  # type: ignore[arg-type]
        some = list(Renderer(base.tokenizer, base.template, 512).training_all(talks))
        recipe = Recipe.model_validate(
            {"name": "b", "base": {"model": "spoken-mini"}, "data": {"train": ["x"]}, "train": {"max_steps": STEPS}}
        )
        run = Run(folder / "b")
        run.path.mkdir()
        model = kind_of(Lora()).attach(base.model, Lora(), seed=0)
        plan = Plan(2e-3, 512, 8, 1, packing, "fp32", False)
        data = [(row.input_ids, row.labels) for row in some]
        job = Job(recipe, plan, model, base.tokenizer, data, None, run, open_track(run.path, (), {}, 0, say))
        fit_one(job, lambda total: Marks(Console(quiet=True), total, is_quiet=True))
    return marks


def bare(folder: Path, is_well_set: bool) -> list[tuple[float, int]]:
    """The script that a careful user of TRL would write."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from toolkit.shipped import shipped

    path = str(shipped("base/spoken-mini"))
    marks: list[tuple[float, int]] = []
    well = {"use_cpu": True, "bf16": False, "activation_checkpointing": False} if is_well_set else {"use_cpu": True}
    settings = SFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=STEPS if is_well_set else FEW,
        learning_rate=2e-3,
        max_length=512,
        assistant_only_loss=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        **well,
    )

    class Marks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            marks.append((time.perf_counter(), int(trainer._total_train_tokens)))

    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=settings,
        train_dataset=Dataset.from_list([{"messages": row} for row in rows()]),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[Marks()],
    )
    trainer.train()
    return marks


CONTESTANTS = {
    "ours": lambda folder: ours(folder, True),
    "unpacked": lambda folder: ours(folder, False),
    "returned": lambda folder: ours(folder, True, keeps=False),
    "bare": lambda folder: bare(folder, True),
    "defaults": lambda folder: bare(folder, False),
}


def work(name: str) -> None:
    """One contestant in a process of its own; prints tokens per second and peak memory as JSON."""
    import warnings

    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        marks = CONTESTANTS[name](Path(folder))
    warm = WARM if len(marks) > 2 * WARM else 2
    (begin, before), (end, after) = marks[warm], marks[-1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    say("RESULT " + json.dumps({"tokens_per_s": (after - before) / (end - begin), "peak_mb": peak}))


def first_step() -> float:
    """Seconds from the command to the first logged step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "toolkit.train", "maltu:recipes/casual_chat.yaml", "train.max_steps=1"]
        started = time.time()
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": folder}
        subprocess.run([*command, "--runs", folder, "--quiet"], check=True, capture_output=True, env=environment)
        lines = (Path(folder) / "casual_chat" / "metrics.jsonl").read_text().splitlines()
        at = next(row["time"] for row in map(json.loads, lines) if "loss" in row)
    return float(at - started)


def main() -> None:
    """Interleaved rounds, medians and spread, ratios within each round."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    results = load(__file__) or {"rounds": []}
    results["surroundings"] = surroundings()
    while len(results["rounds"]) < rounds:
        one: dict[str, Any] = {}
        for name in CONTESTANTS:
            command = [sys.executable, __file__, "--work", name]
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            one[name] = json.loads(done.stdout.split("RESULT ")[1])
        one["first_step_s"] = first_step()
        results["rounds"].append(one)
        save(__file__, results)
    say(str(results["surroundings"]))
    for name in CONTESTANTS:
        speeds = [one[name]["tokens_per_s"] for one in results["rounds"]]
        ratios = [one[name]["tokens_per_s"] / one["bare"]["tokens_per_s"] for one in results["rounds"]]
        peaks = [one[name]["peak_mb"] for one in results["rounds"]]
        say(f"{name:<9} {spread(speeds)} tokens/s; against bare {spread(ratios)}; peak {spread(peaks)} MB")
    say(f"command to first step {spread([one['first_step_s'] for one in results['rounds']])} s")


if __name__ == "__main__":
    work(sys.argv[2]) if sys.argv[1:2] == ["--work"] else main()
