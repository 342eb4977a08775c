"""Search learning rate and batch size of one LoRA with transformers' own `Trainer.hyperparameter_search`.

python benchmarks/search_rival.py --data FOLDER --base FOLDER --out FOLDER [--trials 16] [--epochs 1] [--seed 0]
                                  [--pruner none|successive_halving] [--workers 1]

The script that a careful user of TRL would write, and the rival of benchmarks/search.py. DATA holds train.jsonl and
valid.jsonl, a conversation a line: {"messages": [{"role": …, "content": …}, …]}. Every trial keeps its best
checkpoint by held-out loss in OUT/run-N, as hyperparameter_search names them; OUT/best is the best of them all, and
OUT/result.json says what was tried. Several workers are processes of one thread each that share OUT/journal.log.

What is set, and why: float32 without activation checkpointing (TRL's defaults are up to ten times slower on a CPU);
two conversations at a time, accumulated to the batch, and four when evaluating, the fastest of 1 to 16 on two threads
(8 or 16 at once take 1.6 to 2 times as long a conversation: the head's logits of every position are large); the loss
on answers alone; checkpoints hold the adapter alone and are written only when it got better; no trackers and
no progress bars. The first trial is given (--first): the values somebody would try without a search.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import optuna
    from peft import PeftModel
    from trl import SFTTrainer

LEARNING_RATES = (5e-4, 1e-2)
BATCH_SIZES = (4, 8, 16)
AT_ONCE = 2  # conversations in one pass; a batch is so many of them accumulated
EVALUATE_EVERY = 0.25  # epochs
STUDY = "casual_chat"


def run(
    asked: argparse.Namespace,
    model_of: "Callable[[Path], PeftModel] | None" = None,
    trainer_class: "type[SFTTrainer] | None" = None,
) -> None:
    """Search, alone or with workers; then keep the best."""
    if asked.worker is not None:
        return search(asked, model_of, trainer_class)
    asked.out.mkdir(parents=True, exist_ok=True)
    open_study(asked).enqueue_trial({"learning_rate": asked.first[0], "batch_size": int(asked.first[1])})
    if asked.workers > 1:
        start_workers(asked)
    else:
        search(asked, model_of, trainer_class)
    keep_best(asked)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """What the command says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("data", "base", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=float, nargs=2, default=(3e-3, 8), metavar=("RATE", "BATCH"))
    parser.add_argument("--pruner", choices=("none", "successive_halving"), default="none")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--worker", type=int, default=None, help=argparse.SUPPRESS)  # which one this process is
    found = parser.parse_args(given)
    if found.epochs <= EVALUATE_EVERY:  # the share below would be 1, which transformers takes for every single step
        parser.error(f"--epochs must be above {EVALUATE_EVERY}")
    return found


def search(
    asked: argparse.Namespace,
    model_of: "Callable[[Path], PeftModel] | None",
    trainer_class: "type[SFTTrainer] | None",
) -> None:
    """Run trials until the study has as many as were asked for; workers take the next one whenever they are free."""
    import torch

    if asked.workers > 1:
        torch.set_num_threads(1)
    trainer = make_trainer(asked, model_of or fresh_model, trainer_class)
    study = open_study(asked)
    how = {"sampler": study.sampler, "pruner": study.pruner, "storage": study._storage, "study_name": STUDY}
    while n_begun(study) < asked.trials:
        trainer.hyperparameter_search(
            hp_space=space,
            compute_objective=lambda metrics: best_so_far(trainer, metrics),
            n_trials=asked.trials if asked.workers == 1 else 1,
            direction="minimize",
            backend="optuna",
            load_if_exists=True,
            **how,
        )


def space(trial: "optuna.Trial") -> dict[str, Any]:
    """The names are those of TrainingArguments."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", *LEARNING_RATES, log=True),
        "gradient_accumulation_steps": trial.suggest_categorical("batch_size", BATCH_SIZES) // AT_ONCE,
    }


def best_so_far(trainer: "SFTTrainer", metrics: dict[str, float]) -> float:
    """A trial is worth its best checkpoint, which is what it keeps, not its last."""
    earlier = trainer.state.best_metric  # updated after this is asked
    return metrics["eval_loss"] if earlier is None else min(metrics["eval_loss"], earlier)


def open_study(asked: argparse.Namespace) -> "optuna.Study":
    """The study in OUT/journal.log, made where there is none."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    together = asked.workers > 1
    return optuna.create_study(
        study_name=STUDY,
        storage=JournalStorage(JournalFileBackend(str(asked.out / "journal.log"))),
        sampler=optuna.samplers.TPESampler(seed=asked.seed + 1000 * (asked.worker or 0), constant_liar=together),
        pruner=optuna.pruners.NopPruner() if asked.pruner == "none" else halving(asked),
        load_if_exists=True,
    )


def halving(asked: argparse.Namespace) -> "optuna.pruners.BasePruner":
    """Optuna's successive halving. Optuna asks for the smallest step by hand where trials are of different lengths:
    here the first evaluation of the largest batch.
    """
    import optuna

    first = EVALUATE_EVERY * len(conversations(asked.data / "train.jsonl")) / max(BATCH_SIZES)
    return optuna.pruners.SuccessiveHalvingPruner(min_resource=max(1, int(first)))


def n_begun(study: "optuna.Study") -> int:
    """Trials that run or ran; the enqueued one waits until somebody takes it."""
    import optuna

    return sum(t.state != optuna.trial.TrialState.WAITING for t in study.get_trials(deepcopy=False))


def fresh_model(base: Path) -> "PeftModel":
    """The base with a new LoRA. SFTTrainer gives the model it is made with a fused head but takes no `model_init`, so
    the model of every later trial gets its head here.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora)


def make_trainer(
    asked: argparse.Namespace,
    model_of: "Callable[[Path], PeftModel]",
    trainer_class: "type[SFTTrainer] | None",
) -> "SFTTrainer":
    """A trainer whose every `train` begins with a new model."""
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import SFTConfig, SFTTrainer

    settings = SFTConfig(
        output_dir=str(asked.out),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        assistant_only_loss=True,  # the base's template marks its answers with {% generation %}
        max_length=1024,
        num_train_epochs=asked.epochs,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        weight_decay=0.0,
        per_device_train_batch_size=AT_ONCE,
        per_device_eval_batch_size=4,
        eval_strategy="steps",
        eval_steps=EVALUATE_EVERY / asked.epochs,  # a share of all steps, whatever the batch
        save_strategy="best",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        save_total_limit=1,
        save_only_model=True,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        seed=asked.seed,
    )
    trainer = (trainer_class or SFTTrainer)(
        model=model_of(asked.base),
        args=settings,
        train_dataset=Dataset.from_list(conversations(asked.data / "train.jsonl")),
        eval_dataset=Dataset.from_list(conversations(asked.data / "valid.jsonl")),
        processing_class=AutoTokenizer.from_pretrained(asked.base),
    )
    trainer.model_init = lambda: model_of(asked.base)
    trainer.remove_callback(PrinterCallback)
    return trainer


def conversations(file: Path) -> list[dict[str, Any]]:
    """The lines of a jsonl file."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def start_workers(asked: argparse.Namespace) -> None:
    """The same command once a worker, each with one thread, side by side; waits for all of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    commands = ([sys.executable, *sys.argv, "--worker", str(number)] for number in range(asked.workers))
    workers = [subprocess.Popen(command, env=environment) for command in commands]
    failed = [worker.returncode for worker in workers if worker.wait()]
    if failed:
        raise SystemExit(f"{len(failed)} of {asked.workers} workers failed")


def keep_best(asked: argparse.Namespace) -> None:
    """Copy the best trial's checkpoint to OUT/best and write OUT/result.json."""
    study = open_study(asked)
    best = study.best_trial
    (checkpoint,) = (asked.out / f"run-{best.number}").glob("checkpoint-*")
    shutil.copytree(checkpoint, asked.out / "best", dirs_exist_ok=True)
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name,
            "values": trial.params,
            "loss": trial.value,
            "steps": trial.last_step,
            "seconds": trial.duration.total_seconds() if trial.duration else None,
        }
        for trial in study.trials
    ]
    result = {"best": {"number": best.number, "loss": best.value, "values": best.params}, "trials": trials}
    (asked.out / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(arguments())
