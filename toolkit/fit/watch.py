"""What looks at a run while it trains: held-out loss, patience, the best so far, checkpoints by the clock, a wish to
stop.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from toolkit import bundle, disk
from toolkit.errors import TrainingError
from toolkit.fit.display import Display
from toolkit.fit.fitted import not_finite
from toolkit.fit.stops import StopOnSignal
from toolkit.fit.trainer import WEIGHTS_FILE, Resumable, best_name, read_weights, restore, trainable
from toolkit.track import Track

CHECKPOINT_S = 20.0  # at most this much work, and the time of one save, is repeated after a kill
SAVE_SHARE = 10.0  # a save may cost a tenth of the time: slow saves come less often


@dataclass(frozen=True)
class Looks:
    """When to look and how long to hope: steps that are followed by an evaluation, and evaluations without a better
    one.
    """

    steps: tuple[int, ...]
    patience: int | None
    evaluate: Callable[[nn.Module], float] | None


class Watch(TrainerCallback):
    """Calls the evaluation, keeps the best, saves by the clock. All it remembers is in `trainer.watch`, which
    checkpoints carry.
    """

    def __init__(self, run: bundle.Run, looks: Looks, track: Track, display: Display, stops: StopOnSignal) -> None:
        self.run, self.looks, self.track, self.display, self.stops = run, looks, track, display, stops
        self.trainer: Resumable | None = None
        self.is_stopping = False  # agreed on by all processes
        self._saved_at = time.monotonic()

    @property
    def memory(self) -> dict[str, Any]:
        """What travels with checkpoints: best_step, best_loss, bad (evaluations since the best)."""
        assert self.trainer is not None
        return self.trainer.watch

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock of checkpoints starts."""
        self._saved_at = time.monotonic()

    def is_over(self, total: int) -> bool:
        """Whether no step is left to take: transformers would take one more after a checkpoint of the last one."""
        assert self.trainer is not None
        return self.trainer.state.global_step >= total or self._is_out_of_patience()

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Numbers of a step go to the track and the display."""
        if logs and "loss" in logs:
            assert self.trainer is not None
            values = {name: float(logs[name]) for name in ("loss", "grad_norm", "learning_rate") if name in logs}
            if state.is_world_process_zero:
                self.track.log(state.global_step, **values)
            self.display.step(state.global_step, values["loss"], self.trainer.n_tokens - self.trainer.n_tokens_before)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Evaluate where it is due, then decide on saving and stopping."""
        assert self.trainer is not None
        if self.looks.evaluate is not None and state.global_step in self.looks.steps:
            self._look(state)
            if self._is_out_of_patience():
                control.should_training_stop = True
        control.should_log = True
        since = time.monotonic() - self._saved_at
        is_due = since >= max(CHECKPOINT_S, SAVE_SHARE * self.trainer.save_seconds)
        is_due, self.is_stopping = _agree(self.trainer, is_due, self.stops.is_asked)
        if is_due or self.is_stopping or state.global_step in self.trainer.keep:
            control.should_save = True
        if self.is_stopping:
            control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The clock starts anew."""
        self._saved_at = time.monotonic()

    def _look(self, state: TrainerState) -> None:
        assert self.trainer is not None and self.looks.evaluate is not None
        model = self.trainer.model
        was_training = model.training
        model.eval()
        loss = self.looks.evaluate(model)
        model.train(was_training)
        if not math.isfinite(loss):
            raise TrainingError(not_finite(state.global_step, loss))
        memory = self.memory
        if loss < memory.get("best_loss", float("inf")):
            memory.update(best_loss=loss, best_step=state.global_step, bad=0)
            if state.is_world_process_zero:
                tensors = trainable(model)
                folder = self.run.checkpoints / best_name(state.global_step)
                disk.write_folder(folder, lambda target: save_file(tensors, target / WEIGHTS_FILE), marker=True)
        else:
            memory["bad"] = memory.get("bad", 0) + 1
        if state.is_world_process_zero:
            self.track.log(state.global_step, valid_loss=loss)
        self.display.valid(state.global_step, loss, memory["best_loss"])

    def _is_out_of_patience(self) -> bool:
        return self.looks.patience is not None and self.memory.get("bad", 0) >= self.looks.patience

    def load_best(self, model: nn.Module) -> None:
        """Put the best tensors back into the model; without an evaluation the last ones stay."""
        if self.memory.get("best_step") is not None:
            if self.trainer is not None:
                self.trainer.accelerator.wait_for_everyone()  # process 0 may still be writing it
            restore(model, read_weights(self.run.checkpoints / best_name(self.memory["best_step"])))


def _agree(trainer: Resumable, *wishes: bool) -> list[bool]:
    """What any process wishes, all do: otherwise one would wait for the others for ever."""
    if trainer.args.world_size == 1:
        return list(wishes)
    told = trainer.accelerator.gather(torch.tensor([wishes], device=trainer.args.device))
    return [bool(wish) for wish in told.any(dim=0)]
