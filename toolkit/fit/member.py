"""One adapter that learns among others: what it is given, and where it stands.

Its order of rows, learning rates, clipping and evaluations are those of fit/one with the same recipe; everything
random follows from its own seed and step, so that neighbours change nothing and a stopped learner goes on exactly.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import get_scheduler

from toolkit.errors import TrainingError
from toolkit.fit.batches import Row, Share
from toolkit.fit.fitted import Fitted
from toolkit.fit.plan import Plan, count_steps, evaluation_steps, warmup_steps
from toolkit.recipe.model import Recipe
from toolkit.stack.adapter import Adapter
from toolkit.stack.stack import Stack

TENSORS_FILE, STATE_FILE = "learner.safetensors", "learner.json"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Member:
    """What one adapter is given. `recipe`: its own, of which `train` counts; `valid`: rows it is measured on, empty:
    never; `adapter`: where it starts; `continues`: the folder of a saved learner to go on from.
    """

    name: str
    recipe: Recipe
    plan: Plan
    rows: Sequence[Row]
    valid: Sequence[Row]
    adapter: Adapter
    continues: Path | None = None


@dataclass
class Progress:
    """How far a learner is: what a checkpoint keeps of it beside tensors."""

    step: int = 0
    n_tokens: int = 0
    seconds: float = 0.0
    best_step: int | None = None
    best_loss: float | None = None
    bad: int = 0  # evaluations since the best
    losses: list[float] = field(default_factory=list)  # held out, by evaluation


class Learner:
    """A member in a stack. It is put there here, and `leave` takes it out."""

    def __init__(self, member: Member, stack: Stack) -> None:
        self.member, self.stack, self.name = member, stack, member.name
        train = member.recipe.train
        self.per_epoch, self.total = count_steps(len(member.rows), member.recipe)
        every = evaluation_steps(self.per_epoch, self.total, train.evaluate_every)
        self.look_steps = every if member.valid else ()
        self.progress = Progress()
        self._order: tuple[int, list[int]] = (-1, [])
        try:
            stack.add(self.name, member.adapter, learns=True)
            self.slot = stack.slots[self.name]
            self.leaves = stack.learning(self.name)
            self.optimizer, self._rate = _optimizer(member, self.leaves, self.total)
            # Everything that a step or an evaluation writes into is made here, so that neither can stop half way.
            self._best = {name: torch.empty_like(leaf) for name, leaf in self.leaves.items() if member.valid}
            if member.continues is not None:
                self._take_up(member.continues)
        except BaseException:
            if self.name in stack.slots:
                stack.remove(self.name)
            raise

    # One step

    def share(self) -> Share:
        """The rows of the next optimizer step: of each epoch a new order, as fit/one draws it."""
        step, train, rows = self.progress.step, self.member.recipe.train, self.member.rows
        epoch, at = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            noise = torch.Generator().manual_seed(train.seed + epoch)
            self._order = (epoch, torch.randperm(len(rows), generator=noise).tolist())
        chosen = self._order[1][at * train.batch_size : (at + 1) * train.batch_size]
        has_dropout = getattr(self.member.recipe.adapter, "dropout", 0.0) > 0
        draws = [_draw(train.seed, step, i) for i in chosen] if has_dropout else None
        return Share(self.slot, [rows[i] for i in chosen], self.member.plan.packing, draws)

    def valid_share(self) -> Share:
        """The rows it is measured on."""
        return Share(self.slot, self.member.valid, self.member.plan.packing)

    def step(self) -> None:
        """Change the adapter by the gradient of its share, which lies in its leaves, already clipped."""
        n_tokens = sum(len(ids) for ids, _ in self.share().rows)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.progress.step)
        self.optimizer.step()
        self.progress.step += 1
        self.progress.n_tokens += n_tokens

    # Looking

    @property
    def is_due(self) -> bool:
        """Whether an evaluation that belongs after this step, or an earlier one, is still to be done."""
        return len(self.progress.losses) < sum(step <= self.progress.step for step in self.look_steps)

    def looked(self, loss: float) -> None:
        """An evaluation is done: the best tensors are kept."""
        progress = self.progress
        progress.losses.append(loss)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.bad = loss, progress.step, 0
            for name, leaf in self.leaves.items():
                self._best[name].copy_(leaf.detach())
        else:
            progress.bad += 1

    @property
    def is_out_of_patience(self) -> bool:
        """Whether it has hoped long enough."""
        patience = self.member.recipe.train.early_stop_patience
        return patience is not None and self.progress.bad >= patience

    @property
    def is_done(self) -> bool:
        """Whether no step is left to take."""
        return not self.is_due and (self.progress.step >= self.total or self.is_out_of_patience)

    def end_here(self) -> None:
        """Take no further step: what is left is the evaluation that belongs after the last one."""
        self.total = self.progress.step
        if self.member.valid:
            self.look_steps = (*(step for step in self.look_steps if step < self.total), self.total)

    def fitted(self, stopped: str) -> Fitted:
        """How it stands."""
        own = self.progress
        return Fitted(stopped, own.step, own.best_step, own.best_loss, own.seconds, own.n_tokens)

    def leave(self) -> Adapter:
        """Take it out of the stack; its best tensors as an adapter, the last ones where it was never measured."""
        with torch.no_grad():
            for name, tensor in self._best.items() if self.progress.best_step is not None else ():
                self.leaves[name].copy_(tensor)
        adapter = self.stack.adapter(self.name)
        self.stack.remove(self.name)
        return adapter

    # Stopping and going on

    def save(self, folder: Path) -> None:
        """Everything needed to go on exactly: leaves, moments, best tensors (safetensors), progress (JSON)."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"leaf.{name}": leaf for name, leaf in self.leaves.items()}
        if self.progress.best_step is not None:
            tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, leaf in self.leaves.items():
            tensors |= {f"{moment}.{name}": self.optimizer.state[leaf][moment] for moment in MOMENTS}
        held = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        save_file(held, folder / TENSORS_FILE)
        (folder / STATE_FILE).write_text(json.dumps(vars(self.progress)), encoding="utf-8")

    def _take_up(self, folder: Path) -> None:
        try:
            tensors = load_file(folder / TENSORS_FILE)
            state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
            progress = Progress(**state)
            self._restore(tensors, progress)
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as broken:
            raise TrainingError(f"{folder}: damaged ({broken}). Start again with --fresh.") from broken
        self.progress = progress

    def _restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(tensors[f"leaf.{name}"])
                state = self.optimizer.state[leaf]
                state["step"].fill_(float(progress.step))
                for moment in MOMENTS:
                    state[moment].copy_(tensors[f"{moment}.{name}"])
                if progress.best_step is not None:
                    self._best[name].copy_(tensors[f"best.{name}"])


def is_sound(folder: Path) -> bool:
    """Whether a saved learner can be read; its numbers are looked at when it goes on."""
    try:
        Progress(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8")))
        with safe_open(folder / TENSORS_FILE, framework="pt") as opened:
            return len(list(opened.keys())) > 0
    except (OSError, ValueError, TypeError, SafetensorError):
        return False


def saved_step(folder: Path) -> int:
    """How many steps a sound saved learner has taken."""
    return Progress(**json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))).step


def _optimizer(
    member: Member, leaves: Mapping[str, Tensor], total: int
) -> tuple[torch.optim.Optimizer, Callable[[int], float]]:
    """AdamW as transformers sets it up (no decay on biases and norms), and the learning rate of a step."""
    train, rate = member.recipe.train, member.plan.learning_rate
    plain = [leaf for name, leaf in leaves.items() if "bias" in name or "norm" in name]
    decayed = [leaf for name, leaf in leaves.items() if not ("bias" in name or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    is_fused = all(_is_dense(leaf) for leaf in leaves.values())
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, fused=is_fused)
    for leaf in leaves.values():
        # Moments laid out as the leaf is: the fused optimizer walks through memory, not through indices.
        moments = {moment: torch.zeros_like(leaf, requires_grad=False) for moment in MOMENTS}
        optimizer.state[leaf] = {"step": torch.zeros((), device=leaf.device if is_fused else None), **moments}
    guide = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the schedule alone is wanted, of a rate that we set ourselves
    schedule: Any = get_scheduler(train.schedule, guide, warmup_steps(train, total), total)
    shape: Callable[[int], float] = schedule.lr_lambdas[0]
    return optimizer, lambda step: rate * shape(step)


def _is_dense(leaf: Tensor) -> bool:
    """Whether its numbers lie side by side: on others torch 2.13's fused AdamW changes what lies between, silently."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride(), strict=True))
    return reach == leaf.numel()


def _draw(seed: int, step: int, row: int) -> int:
    """A 63-bit number that tells this row of this step of this adapter from every other."""
    digest = hashlib.blake2b(f"{seed} {step} {row}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
