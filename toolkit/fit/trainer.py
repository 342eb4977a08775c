"""TRL's SFTTrainer with three things of our own: the head's loss, checkpoints that are whole or absent, and a loss
that must be finite. The checkpoints are also those of a trainer of another loss (fit/classify.py).

The head: TRL's fused head also computes entropy and top-1 of every position, 25 to 34 % of a step on a small model
without Triton. Here only supervised positions are projected and only their loss is computed; where that would need a
large block of logits, TRL's tiled head is used as it is. Both give the same loss.
"""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional
from transformers import Trainer as BareTrainer
from transformers import TrainerState
from trl import SFTTrainer

from toolkit import bundle, disk
from toolkit.errors import TrainingError
from toolkit.fit.fitted import not_finite
from toolkit.fit.head import MAX_LOGITS, SupervisedHead

WEIGHTS_FILE = "trainable.safetensors"
WATCH_FILE = "watch.json"
KEPT_CHECKPOINTS = 2


class Resumable(BareTrainer):
    """A trainer whose checkpoints are whole or absent. `watch` is state of ours that travels with every checkpoint.

    `n_tokens`: all that were learned from, counted by whoever computes the loss; `n_tokens_before`: those of earlier
    processes.
    """

    model: Any
    state: Any

    def __init__(self, *, run: bundle.Run, keep: Sequence[int], **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # the loss divides by what the whole step holds
        self.watch: dict[str, Any] = {}
        self.run, self.keep = run, frozenset(keep)
        self.n_tokens = self.n_tokens_before = 0
        self.save_seconds = 0.0
        self._clock = time.monotonic()

    def finite(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss. Raises TrainingError when it is no number."""
        if not torch.isfinite(loss):
            raise TrainingError(not_finite(self.state.global_step + 1, float(loss.detach())))
        return loss

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write checkpoints/step-N beside its place, marker last, rename, and drop older ones. Every process takes
        part.
        """
        started = time.monotonic()
        weights = trainable(self.model)
        if not is_finite(weights):
            raise TrainingError(not_finite(self.state.global_step, float("nan")))
        folder = self.run.checkpoints / f"step-{self.state.global_step:08d}"
        if self.args.world_size > 1:
            self._save_shared(folder, weights)
        else:
            disk.write_folder(folder, functools.partial(self._fill, weights=weights), marker=True)
        if self.args.should_save:
            self._drop_old()
        self.save_seconds = time.monotonic() - started

    def _fill(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        save_file(weights, folder / WEIGHTS_FILE)
        self._save_optimizer_and_scheduler(str(folder))
        self._save_scaler(str(folder))
        self._save_rng_state(str(folder))
        seconds = self.watch.get("seconds", 0.0) + time.monotonic() - self._clock
        spent = {"n_tokens": self.n_tokens, "seconds": seconds}
        (folder / WATCH_FILE).write_text(json.dumps({**self.watch, **spent}), encoding="utf-8")
        self.state.save_to_json(str(folder / "trainer_state.json"))

    def _save_shared(self, folder: Path, weights: dict[str, torch.Tensor]) -> None:
        """Several processes: each one's generators first, then process 0 writes the rest and the marker."""
        beside = folder.with_name(f".{folder.name}.ranks")
        beside.mkdir(parents=True, exist_ok=True)
        self._save_rng_state(str(beside))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:

            def fill(target: Path) -> None:
                self._fill(target, weights)
                for file in beside.iterdir():
                    file.replace(target / file.name)

            disk.write_folder(folder, fill, marker=True)
            beside.rmdir()
        self.accelerator.wait_for_everyone()

    def _drop_old(self) -> None:
        whole = [p for p in sorted(self.run.checkpoints.glob("step-*")) if disk.is_whole(p)]
        kept = {f"step-{step:08d}" for step in self.keep}
        for folder in whole[:-KEPT_CHECKPOINTS]:
            if folder.name not in kept:
                disk.remove(folder)
        for folder in self.run.checkpoints.glob("best-*"):
            if folder.name not in {
                best_name(self.watch.get("best_step")),
                best_name(self.watch.get("saved_best_step")),
            }:
                disk.remove(folder)
        self.watch["saved_best_step"] = self.watch.get("best_step")

    def take_up(self, checkpoint: Path) -> None:
        """Stand where a checkpoint stood: its tensors, its watch, its step. Nothing is trained."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Put back the trained tensors, in place and bit for bit, and the watch."""
        folder = Path(resume_from_checkpoint)
        restore(model or self.model, read_weights(folder))
        self.watch.clear()
        self.watch.update(json.loads((folder / WATCH_FILE).read_text(encoding="utf-8")))
        self.n_tokens = self.n_tokens_before = int(self.watch.get("n_tokens", 0))


class Trainer(Resumable, SFTTrainer):  # type: ignore[misc]  # trl has no types
    """Trains on rows that are already tokens and labels."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._head = SupervisedHead(self.model.get_output_embeddings())
        for parameter in self.model.parameters():
            if parameter.requires_grad and getattr(self.model, "is_loaded_in_4bit", False):
                parameter.data = parameter.data.float()  # TRL casts them to bfloat16, too coarse for Adam's small steps

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Sum over supervised tokens divided by their number in the whole optimizer step. Raises TrainingError when
        not finite.
        """
        self.n_tokens += int(inputs.pop("n_tokens"))
        labels_BT = inputs["labels"][:, 1:]
        keep_BT = labels_BT != -100
        vocab = self.model.get_output_embeddings().weight.shape[0]
        if self.aux_loss_enabled or int(keep_BT.sum()) * vocab > MAX_LOGITS:
            loss: Any = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        else:
            rest = {name: value for name, value in inputs.items() if name != "labels"}
            kept_BT = functional.pad(keep_BT, (0, 1), value=False)
            with self._head.only(kept_BT):
                logits_NV = model(**rest, use_cache=False).logits
            total = keep_BT.sum() if num_items_in_batch is None else num_items_in_batch
            loss = functional.cross_entropy(logits_NV.float(), labels_BT[keep_BT], reduction="sum") / total
            if self.args.average_tokens_across_devices and num_items_in_batch is not None:
                loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return self.finite(loss)


def best_name(step: int | None) -> str:
    """The folder that keeps the best tensors so far."""
    return f"best-{step or 0:08d}"


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that training changes, by name, on the CPU; tied ones once."""
    return {n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint or of the best so far. Raises TrainingError when they cannot be read."""
    try:
        return load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as broken:
        raise TrainingError(f"{folder / WEIGHTS_FILE}: damaged ({broken}). Start again with --fresh.") from broken


def is_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether every number of every tensor is one."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def restore(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Copy tensors back into the parameters they came from. Raises TrainingError when the names differ."""
    targets: dict[str, nn.Parameter] = {n: p for n, p in model.named_parameters() if p.requires_grad}
    if targets.keys() != tensors.keys():
        raise TrainingError("The checkpoint holds other tensors than this adapter trains. Start again with --fresh.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])
