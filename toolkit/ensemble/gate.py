"""A gate learns: the language-model loss over talk of all the experts, with base and experts frozen.

    made = train_gate(stack, ["polite", "casual"], rows, valid, recipe.combine, GateSetup(limits, pad_id, place))
    if made is None: ...                 # asked to stop; the same call goes on, and ends with the same bits
    gate, report = made

The base is in evaluation mode; a gradient reaches the gate alone. The loss of a step is the sum over its supervised
tokens divided by their number, and a small term that grows as the experts are used unevenly (`balance`). Cost: about
two forward passes a row and epoch, and one over the held-out rows for each evaluation.
"""

# B rows, T tokens, N supervised tokens, K experts.

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import get_scheduler

from toolkit import disk
from toolkit.adapters import anatomy
from toolkit.combine.gate import Gate, Reader
from toolkit.combine.gate_start import arrow_gate, constant_gate, new_gate
from toolkit.errors import AdapterError, InputError, Problem, TrainingError
from toolkit.fit.batches import Limits, MicroBatch, Row, Share, micro_batches, n_supervised
from toolkit.fit.fitted import not_finite
from toolkit.fit.head import SupervisedHead
from toolkit.fit.many import CHECKPOINT_S, SAVE_SHARE
from toolkit.fit.member import MOMENTS, Progress
from toolkit.fit.plan import SHORT, evaluation_steps
from toolkit.recipe.combine import Gate as Options
from toolkit.stack.stack import BASE, Stack

T = TypeVar("T")
TENSORS_FILE, STATE_FILE = "gate.safetensors", "state.json"
CLIP = 1.0  # the longest gradient of a step
WARMUP = 0.05  # of the steps


@dataclass(frozen=True)
class GateSetup:
    """Beside what the recipe says of the gate: what a batch may hold, where checkpoints go, and how it is trained.

    batch_size: conversations a step. packing: several of them in a row of a batch. every: epochs between evaluations.
    patience: evaluations in a row that bring nothing, None: all epochs. precision: of the forward pass, fp32 or bf16.
    say: is told of every evaluation. begun: of the step that it goes on from, -1: from the start. log: of the `loss` of
    every step, and the `valid_loss` of every evaluation.
    """

    limits: Limits
    pad_id: int
    place: Path
    seed: int = 0
    batch_size: int = 8
    packing: bool = True
    every: float = 0.25
    patience: int | None = 3
    precision: str = "fp32"
    say: Callable[[str], None] = field(default=lambda line: None)
    begun: Callable[[int], None] = field(default=lambda step: None)
    log: Callable[[str, int, float], None] = field(default=lambda name, step, value: None)


@dataclass(frozen=True)
class _Measured:
    """A held-out loss in nats a supervised token, and what each expert weighs there, by network."""

    loss: float
    load: dict[int, list[float]]
    top: float


def train_gate(
    stack: Stack,
    names: Sequence[str],
    rows: Sequence[Row],
    valid: Sequence[Row],
    options: Options,
    setup: GateSetup,
    wants_stop: Callable[[], bool] = lambda: False,
) -> tuple[Gate, dict[str, Any]] | None:
    """A gate over experts of a stack, and what is to be said of it; None: it was asked to stop, and all is saved.

    rows: mixed talk of all experts. valid: held out, of all experts too; empty: nothing is measured, all epochs are
    learnt. With `how: arrow` nothing is learnt, and the report is the same. The report is JSON: `loss` (held out, of
    equal weights and of the gate), `load` (the mean weight of each expert over held-out supervised tokens),
    `load_by_layer`, `evenness` (1: all alike), `top` (the mean of a token's largest weight), `losses`, `steps`,
    `best_step`, `stopped` (done | early), `seconds`, `n_tokens`.
    Raises: AdapterError for experts that have no weights per token, still learn, or are not there; InputError for fewer
    than two, or rows without a supervised token; TrainingError for a loss that is no number, memory that does not hold
    one row, or a checkpoint that is damaged or of something else; DiskError.
    """
    problems = [Problem("experts", f"{len(names)} of them leave nothing to weigh. Name two.")] if len(names) < 2 else []
    if options.how == "learned" and not n_supervised(rows):
        problems.append(Problem("rows", "no token of them is learned from. Give talk with answers."))
    if problems:
        raise InputError("gate", problems)
    learning = [name for name in names if name in stack.slots and stack.learning(name)]
    if learning:
        raise AdapterError(f"gate: {', '.join(learning)} still learns. Add experts to the stack to answer.")
    if options.how == "arrow":
        gate = arrow_gate(stack, names, per=options.per, top_k=options.top_k)
        return gate, _report(stack, gate, valid, setup)
    start = new_gate(stack, names, per=options.per, hidden=options.hidden, top_k=options.top_k, seed=setup.seed)
    with _Training(stack, start, options, setup) as training:
        if not training.run(rows, valid, wants_stop):
            return None
        gate, progress = training.best(), training.progress
        stopped = "done" if progress.step >= training.total else "early"
    facts = {
        "stopped": stopped,
        "steps": progress.step,
        "best_step": progress.best_step,
        "losses": progress.losses,
        "seconds": round(progress.seconds, 3),
        "n_tokens": progress.n_tokens,
    }
    return gate, _report(stack, gate, valid, setup) | facts


class _Pass:
    """Forward passes of a stack under a gate, inside `with`: losses, and how the gate weighs what is supervised."""

    def __init__(self, stack: Stack, gate: Gate, setup: GateSetup) -> None:
        self.stack, self.setup, self.limits = stack, setup, setup.limits
        self.device = anatomy.device_of(stack.base)
        self.gate = gate.at(self.device)
        self.reader: Reader = self.gate.reader(stack)

    def __enter__(self) -> Self:
        """The base is read, in evaluation mode, and its head sees supervised positions alone."""
        self._trained = self.stack.base.training
        self.stack.base.eval()
        self.head = SupervisedHead(self.stack.base.get_output_embeddings())  # type: ignore[operator]
        self.reader.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        """The base is as it was."""
        self.reader.__exit__()
        self.head.remove()
        self.stack.base.train(self._trained)

    def measured(self, rows: Sequence[Row]) -> _Measured:
        """The loss over rows, and what each expert weighs at their supervised tokens."""
        return self.within_memory(rows, lambda: self._measured(rows))

    def _measured(self, rows: Sequence[Row]) -> _Measured:
        count, loss, top = n_supervised(rows), 0.0, 0.0
        load = {network: torch.zeros(len(self.gate.experts), dtype=torch.float64) for network in self.gate.networks}
        for batch in self.batches(rows):
            with torch.no_grad():
                loss += float(self.nll(batch).double().sum())
            for network, weights_BTK in self.reader.found.items():
                weights_NK = weights_BTK[batch.keep_BT].double()
                load[network] += weights_NK.sum(0).cpu()
                top += float(weights_NK.amax(-1).sum()) / len(self.gate.networks)
        return _Measured(loss / count, {key: (sums / count).tolist() for key, sums in load.items()}, top / count)

    def batches(self, rows: Sequence[Row]) -> Iterator[MicroBatch]:
        """Rows as forward passes, several conversations packed in a row."""
        return micro_batches([Share(BASE, rows, self.setup.packing)], self.limits, self.setup.pad_id, self.device)

    def nll(self, batch: MicroBatch) -> Tensor:
        """Negative log-likelihood of every supervised token, [N]."""
        is_half = self.setup.precision == "bf16"
        given: dict[str, Any] = {**batch.extra, "use_cache": False, "gates": self.reader.gates}
        with (
            torch.autocast(self.device.type, torch.bfloat16) if is_half else nullcontext(),
            self.head.only(batch.keep_BT),
        ):
            logits_NV = self.stack(batch.input_ids_BT, batch.owners, **given).logits
        return functional.cross_entropy(logits_NV.float(), batch.targets_N, reduction="none")

    def within_memory(self, rows: Sequence[Row], attempt: Callable[[], T]) -> T:
        """What `attempt` gives, in batches that memory holds. Raises: TrainingError where it does not hold one row."""
        while True:
            try:
                return attempt()
            except torch.OutOfMemoryError as full:
                said = str(full).splitlines()[0][:120] if str(full) else "no more said"
            if self.device.type == "cuda":  # outside the except clause: there the failed pass is still held
                torch.cuda.empty_cache()
            longest = max(len(ids) for ids, _ in rows)
            if self.limits.n_tokens <= longest:
                raise TrainingError(
                    f"gate: out of memory with a single conversation of {longest:,} tokens ({said}). Set a shorter "
                    "train.max_length, base.quantize: nf4, or a smaller base."
                )
            halved = (max(longest, self.limits.n_tokens // 2), max(1, self.limits.n_supervised // 2))
            self.limits = Limits(*halved)


class _Training(_Pass):
    """A gate in training, and where it stands."""

    def __init__(self, stack: Stack, gate: Gate, options: Options, setup: GateSetup) -> None:
        super().__init__(stack, gate, setup)
        self.options, self.progress = options, Progress()
        self.leaves = {name: tensor.requires_grad_(True) for name, tensor in self.gate.tensors.items()}
        self.optimizer = torch.optim.AdamW(self.leaves.values(), lr=options.learning_rate, weight_decay=0.0)
        for leaf in self.leaves.values():  # made here, so that a checkpoint always has the same tensors
            moments = {moment: torch.zeros_like(leaf, requires_grad=False) for moment in MOMENTS}
            self.optimizer.state[leaf] = {"step": torch.zeros(()), **moments}
        self._best = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        self._saved_at, self._save_s = time.monotonic(), 0.0

    def run(self, rows: Sequence[Row], valid: Sequence[Row], wants_stop: Callable[[], bool]) -> bool:
        """Learn until the epochs are over or patience is; False: asked to stop, and all is saved."""
        n_valid = n_supervised(valid)
        per_epoch = math.ceil(len(rows) / self.setup.batch_size)
        self.total = math.ceil(per_epoch * self.options.epochs)
        looks = (0, *evaluation_steps(per_epoch, self.total, self.setup.every)) if n_valid else ()
        rate = _rate_of(self.options.learning_rate, self.total)
        made_for = self._identity(len(rows), n_valid)
        self.setup.begun(self.progress.step if self._take_up(made_for) else -1)
        while True:
            if len(self.progress.losses) < sum(step <= self.progress.step for step in looks):
                self._look(valid)
            if self.progress.step >= self.total or self._is_out_of_patience:
                return True
            if wants_stop():
                self._save(made_for)
                return False
            if time.monotonic() - self._saved_at >= max(CHECKPOINT_S, SAVE_SHARE * self._save_s):
                self._save(made_for)
            epoch, at = divmod(self.progress.step, per_epoch)
            noise = torch.Generator().manual_seed(self.setup.seed + epoch)
            order = torch.randperm(len(rows), generator=noise).tolist()
            size = self.setup.batch_size
            self._step([rows[i] for i in order[at * size : (at + 1) * size]], rate(self.progress.step))

    def best(self) -> Gate:
        """The gate of the least held-out loss; the last one where nothing was measured."""
        found = self.leaves if self.progress.best_step is None else self._best
        tensors = {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}
        return replace(self.gate, tensors=tensors)

    # One step, one look

    def _step(self, rows: Sequence[Row], rate: float) -> None:
        started, step = time.monotonic(), self.progress.step + 1
        loss = self.within_memory(rows, lambda: self._learn(rows))
        norm = torch.nn.utils.clip_grad_norm_(self.leaves.values(), CLIP)
        if not math.isfinite(loss) or not bool(norm.isfinite()):
            raise TrainingError(f"gate: {not_finite(step, loss)}")
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.progress.step = step
        self.progress.n_tokens += sum(len(ids) for ids, _ in rows)
        self.progress.seconds += time.monotonic() - started
        self.setup.log("loss", step, loss)

    def _learn(self, rows: Sequence[Row]) -> float:
        """The loss of a step; its gradient lies in the leaves."""
        self.optimizer.zero_grad(set_to_none=True)
        count, total = max(1, n_supervised(rows)), 0.0
        for batch in self.batches(rows):
            nll_N = self.nll(batch)
            if nll_N.numel():
                uneven = self._unevenness(batch.keep_BT) * len(nll_N)
                ((nll_N.sum() + self.options.balance * uneven) / count).backward()  # type: ignore[no-untyped-call]
                total += float(nll_N.detach().double().sum())
        return total / count

    def _unevenness(self, keep_BT: Tensor) -> Tensor:
        """0 where every expert has the same share of the tokens, K - 1 where one has them all; mean over networks.

        Source: Switch Transformer, arXiv 2101.03961, equation 4: K times the sum over experts of the share that each
        has (no gradient) and its mean probability.
        """
        found = []
        for network, weights_BTK in self.reader.found.items():
            share_K = weights_BTK[keep_BT].mean(0).detach()
            mean_K = self.reader.probabilities[network][keep_BT].mean(0)
            found.append(len(share_K) * (share_K * mean_K).sum() - 1)
        return torch.stack(found).mean()

    def _look(self, valid: Sequence[Row]) -> None:
        started, progress = time.monotonic(), self.progress
        loss = self.measured(valid).loss
        if not math.isfinite(loss):
            raise TrainingError(f"gate: {not_finite(progress.step, loss)}")
        progress.losses.append(loss)
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.bad = loss, progress.step, 0
            self._best = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        else:
            progress.bad += 1
        progress.seconds += time.monotonic() - started
        self.setup.log("valid_loss", progress.step, loss)
        self.setup.say(f"gate: step {progress.step} of {self.total}, held-out loss {loss:.4f}")

    @property
    def _is_out_of_patience(self) -> bool:
        return self.setup.patience is not None and self.progress.bad >= self.setup.patience

    # Checkpoints

    def _identity(self, n_rows: int, n_valid: int) -> dict[str, Any]:
        """What a checkpoint was made with: one of something else is refused."""
        own = {key: getattr(self.setup, key) for key in ("seed", "batch_size", "every", "patience", "precision")}
        options = self.options.model_dump(mode="json")
        hashes = [self.gate.hashes[name] for name in self.gate.experts]
        return {"experts": list(self.gate.experts), "hashes": hashes, "rows": [n_rows, n_valid], **options, **own}

    def _save(self, made_for: dict[str, Any]) -> None:
        started = time.monotonic()
        tensors = {f"leaf.{name}": leaf.detach() for name, leaf in self.leaves.items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self._best.items()}
        for name, leaf in self.leaves.items():
            tensors |= {f"{key}.{name}": value for key, value in self.optimizer.state[leaf].items()}
        held = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
        state = {"made_for": made_for, "progress": vars(self.progress)}

        def fill(target: Path) -> None:
            save_file(held, target / TENSORS_FILE)
            (target / STATE_FILE).write_text(json.dumps(state), encoding="utf-8")

        disk.make_folder(self.setup.place)
        folder = self.setup.place / f"gate-{self.progress.step:08d}"
        disk.write_folder(folder, fill, marker=True)
        for older in self.setup.place.glob("gate-*"):
            if older != folder:
                disk.remove(older)
        self._saved_at = time.monotonic()
        self._save_s = self._saved_at - started

    def _take_up(self, made_for: dict[str, Any]) -> bool:
        """Go on from the last whole checkpoint; whether there is one."""
        whole = [path for path in sorted(self.setup.place.glob("gate-*")) if disk.is_whole(path)]
        if not whole:
            return False
        try:
            state = json.loads((whole[-1] / STATE_FILE).read_text(encoding="utf-8"))
            others = [key for key, value in made_for.items() if state["made_for"].get(key) != value]
            if not others:
                self._restore(load_file(whole[-1] / TENSORS_FILE), Progress(**state["progress"]))
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as broken:
            raise TrainingError(f"{whole[-1]}: damaged ({broken}). Start again with --fresh.") from broken
        if others:
            raise TrainingError(
                f"{whole[-1]}: was saved by another training (other {', '.join(others)}). Start again with --fresh."
            )
        return True

    def _restore(self, tensors: Mapping[str, Tensor], progress: Progress) -> None:
        with torch.no_grad():
            for name, leaf in self.leaves.items():
                leaf.copy_(tensors[f"leaf.{name}"])
                self._best[name].copy_(tensors[f"best.{name}"])
                for key, value in self.optimizer.state[leaf].items():
                    value.copy_(tensors[f"{key}.{name}"])
        self.progress = progress


def _rate_of(rate: float, total: int) -> Callable[[int], float]:
    """The learning rate of a step: it rises for a twentieth of the steps of all but short trainings, then a cosine."""
    guide = torch.optim.SGD([torch.zeros(1)], lr=1.0)  # the schedule alone is wanted
    warm = math.ceil(WARMUP * total) if total >= SHORT else 0
    schedule: Any = get_scheduler("cosine", guide, warm, total)
    shape: Callable[[int], float] = schedule.lr_lambdas[0]
    return lambda step: rate * shape(step)


def _report(stack: Stack, gate: Gate, valid: Sequence[Row], setup: GateSetup) -> dict[str, Any]:
    """See train_gate."""
    if not n_supervised(valid):
        return {"loss": None}
    with _Pass(stack, constant_gate(stack, dict.fromkeys(gate.experts, 1.0), per=gate.per), setup) as equal:
        before = equal.measured(valid).loss
    with _Pass(stack, gate, setup) as passing:
        found = passing.measured(valid)
    mean_K = torch.tensor(list(found.load.values()), dtype=torch.float64).mean(0)
    entropy = float(-(mean_K * mean_K.clamp(min=1e-12).log()).sum())

    def by_name(values: Sequence[float]) -> dict[str, float]:
        return dict(zip(gate.experts, values, strict=True))

    return {
        "loss": {"equal": before, "gate": found.loss},
        "load": by_name(mean_K.tolist()),
        "load_by_layer": {str(network): by_name(values) for network, values in found.load.items()},
        "evenness": entropy / math.log(len(mean_K)),
        "top": found.top,
    }
