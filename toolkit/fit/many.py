"""Many adapters learn at once, on one base: members of a crew enter a stack, step side by side, and leave.

    ended = fit_many(stack, crew, Setup(side_by_side=8, limits=Limits(1024, 8192), pad_id=0), folder)

The crew says who comes next, hears of every evaluation and may end any member, and takes what each has learned. A
place that becomes free is filled at once. Each member keeps its own rows, batch size, learning rate and schedule,
clipping, patience and evaluations (member.py), and ends with the numbers it would have alone, up to the rounding of
sums whose order a neighbour's rows may change. The base is in evaluation mode: a dropout of its own (GPT-2) is off.

What memory does not hold is done in smaller batches, then with half the members at a time; the others wait and go on.
Cost: about two forward passes a row and epoch, and one for each evaluation.
"""

import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from toolkit import disk
from toolkit.adapters import anatomy
from toolkit.fit.batches import Limits, MicroBatch, Share, micro_batches, n_supervised
from toolkit.fit.fitted import Fitted, not_finite
from toolkit.fit.head import SupervisedHead
from toolkit.fit.member import Learner, Member
from toolkit.stack.adapter import Adapter
from toolkit.stack.gradients import clip_gradients
from toolkit.stack.stack import Stack

CHECKPOINT_S = 20.0  # at most this much work, and the time of one save, is repeated after a kill
SAVE_SHARE = 10.0  # a save may cost a tenth of the time: slow saves come less often
ASK_S = 1.0  # how long a crew that had nobody is left in peace, while others learn


@dataclass(frozen=True)
class Setup:
    """How many learn at once, what a batch may hold, and the precision of the forward pass (fp32 or bf16)."""

    side_by_side: int
    limits: Limits
    pad_id: int
    precision: str = "fp32"


@dataclass(frozen=True)
class Look:
    """A held-out loss: the member's name, the how-manieth evaluation of it (from 1), its step and its loss."""

    name: str
    number: int
    step: int
    loss: float


class Crew(Protocol):
    """Who learns. `fit_many` calls it between steps, never inside one."""

    def next(self) -> Member | None:
        """The next one to learn; None: nobody, until somebody has left."""

    def looked(self, looks: Sequence[Look]) -> Collection[str]:
        """Evaluations of one step are done; the names of those that shall leave now (pruned)."""

    def left(self, name: str, fitted: Fitted, adapter: Adapter) -> None:
        """One has left (done, early or pruned) with its best tensors."""

    def failed(self, name: str, fitted: Fitted, reason: str) -> None:
        """One could not go on: its numbers ran away, or memory does not hold it alone."""

    def alive(self) -> None:
        """Between two forward passes: time for a sign of life. Cheap."""

    def stepped(self, learners: Sequence[Learner], losses: Mapping[str, float]) -> bool:
        """A step of all is done: who is still here, and the training loss of each that took it; whether to save and
        stop."""


def fit_many(stack: Stack, crew: Crew, setup: Setup, place: Path) -> bool:
    """Let the crew learn until it names nobody and the stack is empty; False: it was asked to stop, and all is saved.

    `place`: where checkpoints of the whole stack go; a member's `continues` (see `find_saved`) makes it go on from one.
    Raises: DiskError where a checkpoint cannot be written, and whatever the crew raises.
    """
    return _Many(stack, crew, setup, place).run()


def find_saved(place: Path, name: str) -> Path | None:
    """The folder of a member in the last whole checkpoint under `place`, if it is there."""
    whole = [path for path in sorted(place.glob("stack-*")) if disk.is_whole(path)]
    return whole[-1] / name if whole and (whole[-1] / name).is_dir() else None


class _Many:
    def __init__(self, stack: Stack, crew: Crew, setup: Setup, place: Path) -> None:
        self.stack, self.crew, self.place = stack, crew, place
        self.most, self.limits, self.setup = setup.side_by_side, setup.limits, setup
        self.device = anatomy.device_of(stack.base)
        self.learners: list[Learner] = []
        self.waiting: list[Member] = []  # those that memory did not hold, saved
        self._n_saves = max((int(path.name.removeprefix("stack-")) for path in place.glob("stack-*")), default=0)
        self._saved_at, self._save_s = time.monotonic(), 0.0
        self._ask_at = 0.0

    def run(self) -> bool:
        self.stack.base.eval()
        self.head = SupervisedHead(self.stack.base.get_output_embeddings())  # type: ignore[operator]
        try:
            while True:
                n_new = self._fill()
                self._look()  # one that waited for memory may owe one
                self._let_go()
                if not self.learners:
                    if n_new:
                        continue
                    return True
                losses = self._step()
                self._look()
                self._let_go()
                if self.crew.stepped(self.learners, losses):
                    self._save()
                    return False
                if time.monotonic() - self._saved_at >= max(CHECKPOINT_S, SAVE_SHARE * self._save_s):
                    self._save()
        finally:
            self.head.remove()

    # Who learns

    def _fill(self) -> int:
        """Let in as many as there is room for; how many came."""
        n_new = 0
        while len(self.learners) < self.most:
            member = self.waiting.pop(0) if self.waiting else self._asked()
            if member is None:
                break
            n_new += 1
            try:
                self.learners.append(Learner(member, self.stack))
            except torch.OutOfMemoryError:
                if not self.learners:
                    fitted = Fitted("failed", 0, None, None, 0.0, 0)
                    self.crew.failed(member.name, fitted, "Out of memory with this adapter alone. Take a smaller one.")
                    continue
                self.waiting.insert(0, member)
                self.most = len(self.learners)
        return n_new

    def _asked(self) -> Member | None:
        """The crew's next one; a crew that had nobody is not asked again at every step."""
        if self.learners and time.monotonic() < self._ask_at:
            return None
        member = self.crew.next()
        self._ask_at = 0.0 if member is not None else time.monotonic() + ASK_S
        return member

    def _let_go(self) -> None:
        for learner in [one for one in self.learners if one.is_done]:
            self._leave(learner, "done" if learner.progress.step >= learner.total else "early")

    def _leave(self, learner: Learner, stopped: str) -> None:
        self.learners.remove(learner)
        self._ask_at = 0.0
        adapter = learner.leave()
        if all(bool(torch.isfinite(tensor).all()) for tensor in adapter.tensors.values()):
            self.crew.left(learner.name, learner.fitted(stopped), adapter)
        else:
            reason = not_finite(learner.progress.step, math.nan)
            self.crew.failed(learner.name, learner.fitted("failed"), reason)

    def _fail(self, learner: Learner, reason: str) -> None:
        self.learners.remove(learner)
        self._ask_at = 0.0
        self.stack.remove(learner.name)
        self.crew.failed(learner.name, learner.fitted("failed"), reason)

    # One step of all

    def _step(self) -> dict[str, float]:
        """Every learner takes one optimizer step; the training loss of each that did."""
        started = time.monotonic()
        learners, losses = self._measured(self.learners, Learner.share, learns=True)
        for learner, loss in zip(learners, losses, strict=True):
            if not math.isfinite(loss):
                self._fail(learner, not_finite(learner.progress.step + 1, loss))
        kept = [(one, loss) for one, loss in zip(learners, losses, strict=True) if one in self.learners]
        limits = {learner.name: learner.member.recipe.train.max_grad_norm or math.inf for learner, _ in kept}
        if limits:
            clip_gradients(self.stack, limits)
        before = {learner.name: learner.progress.n_tokens for learner, _ in kept}
        for learner, _ in kept:
            learner.step()
        self.stack.zero_grad([learner.name for learner in self.learners])
        taken = {learner.name: learner.progress.n_tokens - before[learner.name] for learner, _ in kept}
        seconds, total = time.monotonic() - started, max(1, sum(taken.values()))
        for learner, _ in kept:
            learner.progress.seconds += seconds * taken[learner.name] / total
        return {learner.name: loss for learner, loss in kept}

    def _measured(
        self, learners: Sequence[Learner], share: Callable[[Learner], Share], *, learns: bool
    ) -> tuple[list[Learner], list[float]]:
        """The loss of each one's share, in batches that memory holds; of those that are still here in the end."""
        wanted = list(learners)
        while wanted:
            shares = [share(learner) for learner in wanted]
            try:
                return wanted, self._losses(shares, learns=learns)
            except torch.OutOfMemoryError as full:
                said = str(full).splitlines()[0][:120] if str(full) else "no more said"
            if learns:
                self.stack.zero_grad([learner.name for learner in wanted])
            self._make_room(shares, said)  # outside the except clause: there the failed pass is still held
            wanted = [learner for learner in wanted if learner in self.learners]
        return [], []

    def _losses(self, shares: Sequence[Share], *, learns: bool) -> list[float]:
        """Nats per supervised token of each share; where it learns, their gradients are added up."""
        counts = torch.tensor([n_supervised(share.rows) for share in shares], device=self.device).clamp(min=1)
        sums = torch.zeros(len(shares), device=self.device, dtype=torch.float64)
        for batch in micro_batches(shares, self.limits, self.setup.pad_id, self.device):
            with torch.set_grad_enabled(learns):
                nll_N = self._nll(batch)
                if learns and nll_N.numel():
                    (nll_N / counts[batch.share_N]).sum().backward()  # type: ignore[no-untyped-call]
            sums.index_add_(0, batch.share_N, nll_N.detach().double())
            self.crew.alive()
        return [float(loss) for loss in sums / counts]

    def _nll(self, batch: MicroBatch) -> Tensor:
        """Negative log-likelihood of every supervised token, [N]."""
        is_half = self.setup.precision == "bf16"
        with (
            torch.autocast(self.device.type, torch.bfloat16) if is_half else nullcontext(),
            self.head.only(batch.keep_BT),
        ):
            called = {**batch.extra, "use_cache": False} if "position_ids" in batch.extra else batch.extra
            logits_NV = self.stack(batch.input_ids_BT, batch.owners, draws=batch.draws_B, **called).logits
        return functional.cross_entropy(logits_NV.float(), batch.targets_N, reduction="none")

    # Looking

    def _look(self) -> None:
        due = [learner for learner in self.learners if learner.is_due]
        if not due:
            return
        started = time.monotonic()
        measured, losses = self._measured(due, Learner.valid_share, learns=False)
        looks = []
        for learner, loss in zip(measured, losses, strict=True):
            if not math.isfinite(loss):
                self._fail(learner, not_finite(learner.progress.step, loss))
                continue
            learner.looked(loss)
            learner.progress.seconds += (time.monotonic() - started) / len(measured)
            looks.append(Look(learner.name, len(learner.progress.losses), learner.progress.step, loss))
        ended = set(self.crew.looked(looks)) if looks else set()
        for learner in [one for one in self.learners if one.name in ended and not one.is_done]:
            self._leave(learner, "pruned")  # one that is done anyway has cost what it costs

    # Memory

    def _make_room(self, shares: Sequence[Share], said: str) -> None:
        """Half the batch, down to one row; then half the members; then the last one fails."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        longest = max(len(ids) for share in shares for ids, _ in share.rows)
        if self.limits.n_tokens > longest:
            self.limits = replace(
                self.limits,
                n_tokens=max(longest, self.limits.n_tokens // 2),
                n_supervised=max(1, self.limits.n_supervised // 2),
            )
            return
        if len(self.learners) > 1:
            self._set_aside(self.learners[len(self.learners) // 2 :])
            return
        self._fail(
            self.learners[0],
            f"Out of memory with a single conversation of {longest:,} tokens ({said}). Set a shorter train.max_length,"
            " base.quantize: nf4, or a smaller base.",
        )

    def _set_aside(self, learners: Sequence[Learner]) -> None:
        """These wait until a place is free; from now on fewer learn at once."""
        for learner in list(learners):
            folder = self.place / f"waiting-{learner.name}"
            disk.make_folder(self.place)
            disk.write_folder(folder, learner.save)
            self.waiting.append(replace(learner.member, continues=folder))
            self.learners.remove(learner)
            self.stack.remove(learner.name)
        self.most = max(1, len(self.learners))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # Checkpoints

    def _save(self) -> None:
        """Write the whole stack beside its place, marker last, rename, and drop what was there before."""
        started = time.monotonic()
        self._n_saves += 1
        folder = self.place / f"stack-{self._n_saves:08d}"

        def fill(target: Path) -> None:
            for learner in self.learners:
                learner.save(target / learner.name)
            for member in self.waiting:
                if member.continues is not None:  # one that never began begins anew
                    shutil.copytree(member.continues, target / member.name)

        disk.write_folder(folder, fill, marker=True)
        for older in self.place.glob("stack-*"):
            if older != folder:
                disk.remove(older)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - started
