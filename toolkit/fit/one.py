"""One adapter on one base, through TRL. Takes rendered rows and a plan; leaves the model with its best tensors in
place.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig

from toolkit import bundle
from toolkit.errors import TrainingError
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted, not_finite
from toolkit.fit.plan import Plan, count_steps, evaluation_steps, warmup_steps
from toolkit.fit.rows import Collate
from toolkit.fit.stops import StopOnSignal
from toolkit.fit.trainer import Resumable, Trainer, is_finite
from toolkit.fit.watch import Looks, Watch
from toolkit.recipe.model import Recipe
from toolkit.track import Track


@dataclass(frozen=True)
class Job:
    """What one fit needs: the attached model, rows of token ids and labels, and how to measure held-out loss."""

    recipe: Recipe
    plan: Plan
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[tuple[Sequence[int], Sequence[int]]]
    evaluate: Callable[[nn.Module], float] | None
    run: bundle.Run
    track: Track


def fit_one(job: Job, make_display: Callable[[int], Display]) -> Fitted:
    """Train, from the last whole checkpoint when there is one, and put the best tensors back into `job.model`.

    Raises TrainingError when the loss is not finite or memory does not suffice even for one conversation at a time.
    Cost: about 3 forward passes a row and epoch for a full fit, 2 for an adapter, and one pass over the held-out
    rows an evaluation.
    """
    return fit_through(job, make_display, _make_trainer)


def fit_through(
    job: Job, make_display: Callable[[int], Display], make_trainer: Callable[[Job, Watch, int], Resumable]
) -> Fitted:
    """`fit_one` with a trainer of the caller's making, which gets the job, who watches it, and the number of steps."""
    per_epoch, total = count_steps(len(job.rows), job.recipe)
    train = job.recipe.train
    looks = Looks(
        evaluation_steps(per_epoch, total, train.evaluate_every) if job.evaluate else (),
        train.early_stop_patience,
        job.evaluate,
    )
    started = time.monotonic()
    with make_display(total) as display:
        stops = StopOnSignal(display.say)
        watch = Watch(job.run, looks, job.track, display, stops)
        trainer = make_trainer(job, watch, total)
        trainer.remove_callback(PrinterCallback)
        _check_world(trainer)
        watch.trainer = trainer
        last = job.run.last_checkpoint()
        with stops:
            try:
                if last is not None:
                    trainer.take_up(last)
                if not watch.is_over(total):
                    trainer.train(resume_from_checkpoint=str(last) if last else None)
            except torch.OutOfMemoryError as full:
                raise TrainingError(_out_of_memory(job.plan, str(full))) from full
    is_asked = watch.is_stopping and trainer.state.global_step < total
    if not is_asked:
        watch.load_best(trainer.model)
        if not is_finite({n: p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}):
            raise TrainingError(not_finite(trainer.state.global_step, math.nan))  # the last step of all ran away
    steps = trainer.state.global_step
    stopped = "asked" if is_asked else "done" if steps >= total else "early"
    memory = trainer.watch
    seconds = memory.get("seconds", 0.0) + time.monotonic() - started
    return Fitted(
        stopped,
        steps,
        memory.get("best_step"),
        memory.get("best_loss"),
        seconds,
        trainer.n_tokens,
    )


def _make_trainer(job: Job, watch: Watch, total: int) -> Trainer:
    rows = Dataset.from_dict({"input_ids": [list(r[0]) for r in job.rows], "labels": [list(r[1]) for r in job.rows]})
    if getattr(job.model, "is_quantized", False) and not hasattr(job.model, "peft_config"):
        # transformers 5.23 knows PEFT's adapters alone and refuses to train ours on a quantised base without this mark
        job.model._hf_peft_config_loaded = True  # type: ignore[assignment]
    pad = job.tokenizer.pad_token_id if job.tokenizer.pad_token_id is not None else 0
    return Trainer(
        run=job.run,
        keep=job.recipe.train.keep,
        model=job.model,
        args=arguments_of(job, total),
        train_dataset=rows,
        processing_class=job.tokenizer,
        data_collator=Collate(pad, job.plan.packing),
        callbacks=[watch],
        optimizers=_optimizer(job),
    )


def _check_world(trainer: Resumable) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if trainer.args.world_size != world:
        raise TrainingError(
            f"{world} processes were started but {trainer.args.world_size} train together. Start them with torchrun"
            " (accelerate launch --cpu runs one process only)."
        )


def arguments_of(job: Job, total: int) -> SFTConfig:
    """The recipe and the plan in the words of transformers and TRL."""
    train, plan = job.recipe.train, job.plan
    is_cpu = next(job.model.parameters()).device.type == "cpu"
    return SFTConfig(
        output_dir=str(job.run.checkpoints),
        use_cpu=is_cpu,
        bf16=plan.precision == "bf16",
        activation_checkpointing=plan.activation_checkpointing,
        per_device_train_batch_size=plan.micro_batch,
        gradient_accumulation_steps=plan.accumulation,
        num_train_epochs=math.ceil(train.epochs),
        max_steps=total,
        learning_rate=plan.learning_rate,
        lr_scheduler_type=train.schedule,
        warmup_steps=warmup_steps(train, total),
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm or 0.0,
        optim="adamw_torch",
        seed=train.seed,
        data_seed=train.seed,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to="none",
        max_length=None,
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
        dataloader_pin_memory=not is_cpu,
        ddp_find_unused_parameters=False,
    )


def _optimizer(job: Job) -> tuple[Any, Any]:
    """Our own optimizer where the recipe asks for one that transformers does not have; (None, None) leaves it to
    transformers.
    """
    if job.recipe.train.optimizer != "muon":
        return None, None
    from toolkit.bases.new import build_muon

    return build_muon(job.model, job.plan.learning_rate, job.recipe.train.weight_decay), None


def _out_of_memory(plan: Plan, said: str) -> str:
    return (
        f"Out of memory with {plan.micro_batch} conversations at a time ({said.splitlines()[0][:120]}). Set"
        " train.micro_batch: 1, a shorter train.max_length, base.quantize: nf4, or a smaller base."
    )
