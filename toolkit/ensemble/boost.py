"""Boosting: rounds of small adapters in turn, each on rows weighted by what those before it got wrong; they vote.

Labels: SAMME (Zhu, Zou, Rosset, Hastie 2009). A round whose weighted error is e gets the weight
log((1 - e) / e) + log(L - 1), and every row that it got wrong grows by the exponential of that. One deviation: the
paper's vote counts heads, so that of two rounds the heavier one always wins; here the probabilities of the rounds are
averaged by the same weights, and whether a round helps is seen in the log-loss of that vote.

Text: there is no right or wrong, but a likelihood, so boosting of density estimates (Rosset and Segal 2002): the model
is a mixture over tokens, F = (1 - a) F + a h. Its likelihood grows fastest by a new member h that is trained on rows
weighted by 1 / F(row); a row here is a conversation, whose likelihood is that of an average token, so a row's weight is
its perplexity under the rounds so far (at most four times the mean one: beyond, it is garbled rows that are learned).
The step a is the one that makes the held-out loss least.

A fit takes rows, not weights, so each round learns rows drawn in proportion (systematic resampling, Kitagawa 1996: with
equal weights every row stands there exactly as often as in an epoch, so round 1 is plain training).
Every round is kept as it is done; a run that goes on begins with the first that is not.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.optimize import minimize_scalar  # type: ignore[import-untyped]
from torch import Tensor

from toolkit import disk
from toolkit.bundle import Run
from toolkit.combine.vote import Vote, vote_labels
from toolkit.ensemble.bag import SEEDS, conversations, words_of
from toolkit.ensemble.experts import Task, read_fitted
from toolkit.ensemble.subjects import Table
from toolkit.ensemble.weights import label_logp
from toolkit.errors import DataError, Problem
from toolkit.evaluate.classify import gold_labels, label_places
from toolkit.fit.fitted import Fitted

# C conversations, R rows, L labels, N tokens.

Numbers = NDArray[np.float64]
Measured = dict[str, Tensor]  # what a round says of both tables
HELPS = 1e-3  # of the held-out loss: what a round has to take off to count as a help
HARDEST = 4.0  # times the mean perplexity


@dataclass(frozen=True)
class Rounds:
    """How many at most, how many in a row may fail to help, and the seed of the draws."""

    most: int
    patience: int
    seed: int


@dataclass(frozen=True)
class Boosted:
    """The rounds that stay, in their order, with weights that sum to 1. how: of their vote, over tokens too.

    history: of every round its weight when it came, its weighted error (labels), and the held-out loss with it.
    fitted: how the training of those that stay went. stopped: why there are no more.
    """

    weights: Mapping[str, float]
    how: Vote
    history: tuple[Mapping[str, Any], ...]
    fitted: Mapping[str, Fitted]
    stopped: str

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {"weights": dict(self.weights), "rounds": [dict(one) for one in self.history], "stopped": self.stopped}


@dataclass(frozen=True)
class Standing:
    """Where boosting stands after some rounds.

    row_weights_C: of what the next one learns, sums to 1. votes: of the rounds, in order; one that is no better than
    guessing has none. loss: held out, of their vote, None without one. facts: of the last round. is_over: nothing is
    left to learn.
    """

    row_weights_C: Numbers
    votes: tuple[float, ...] = ()
    loss: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    is_over: bool = False


def boost(
    task: Task,
    learned: Table,
    watched: Table,
    fit: Callable[[Task], Mapping[str, Fitted] | None],
    run: Run,
    rounds: Rounds,
    say: Callable[[str], None],
) -> Boosted | None:
    """Train round after round until none helps; None: asked to stop, and the same call goes on.

    task: the first round; its name is not used. learned: of the training talk, watched: of what is held out, both over
    the stack that the rounds are put into, which in the end holds those that stay. fit: trains one task into the run
    (`fit_members`). Rounds that did not help leave no adapter.
    Raises: DataError without held-out talk, or with a label there that nobody learns; what `fit` raises. Cost: of each
    round its training, and a pass over both tables.
    """
    if not len(watched.rows):
        says = "whether a round helps is seen on held-out talk, and there is none. Set data.valid above 0."
        raise DataError("boost", [Problem("data.valid", says)])
    if watched.labels:
        label_places(gold_labels(watched.talks), watched.labels)  # told before anything is trained
    course = Course(task, learned, watched, run, rounds.seed)
    measured: list[Measured] = []
    history: list[Mapping[str, Any]] = []
    standing, n_best, best, stopped = course.standing([]), 0, math.inf, "all rounds are done"
    for number in range(1, rounds.most + 1):
        said = course.kept(number)
        if said is None:
            if fit(course.task(number, standing.row_weights_C)) is None:
                return None
            said = course.measure(number)
        measured.append(said)
        standing = course.standing(measured)
        history.append({"round": number, **standing.facts, "held-out loss": standing.loss})
        loss = math.inf if standing.loss is None else standing.loss
        helps = len(standing.votes) == number and loss < (best if number == 1 else best * (1 - HELPS))
        shown = "no better than guessing" if standing.loss is None else f"held-out loss {loss:.4f}"
        say(f"round {number}/{rounds.most}  {shown}{'' if helps else '  no help'}")
        if helps:
            n_best, best = number, loss
        over = _over(standing, number, n_best, rounds.patience)
        if over:
            stopped = over
            break
    votes = course.standing(measured[:n_best]).votes if n_best else (1.0,)  # one has to answer
    names = course.end(len(votes), len(measured))
    weights = {name: vote / math.fsum(votes) for name, vote in zip(names, votes, strict=True)}
    fitted = {name: found for name in names if (found := read_fitted(run, name)) is not None}
    return Boosted(weights, "soft", tuple(history), fitted, stopped)


def _over(standing: Standing, number: int, n_best: int, patience: int) -> str:
    """Why no further round follows; "" where one does."""
    if len(standing.votes) < number:
        return "no better than guessing"
    if number - n_best >= patience:
        return f"{patience} round{'s' * (patience > 1)} in a row did not help"
    return "every row is right" if standing.is_over else ""


def resampled(weights_C: Numbers, n: int, seed: int) -> list[int]:
    """How often each stands in a draw of n: its share of n, rounded up or down (systematic resampling, in an order that
    is drawn too, so that nobody's luck hangs on a neighbour's).
    """
    noise = np.random.default_rng(seed)
    order, start = noise.permutation(len(weights_C)), noise.random() * (1 - 1e-6)
    reached = np.cumsum(weights_C[order]) * (n / weights_C.sum())
    reached[-1] = n
    marks = np.floor(np.concatenate([[0.0], reached]) + start + 1e-9)
    counts = np.empty(len(weights_C), dtype=int)
    counts[order] = np.diff(marks).astype(int)
    found: list[int] = counts.tolist()
    return found


def samme(logp_R: Sequence[Tensor], gold_C: Tensor, start_C: Numbers) -> tuple[Numbers, list[float], list[float]]:
    """The weights of rows after these rounds, the weights of the rounds, and their weighted errors (SAMME, 2009).

    logp: what each round says of every conversation's labels, [C, L]. A round that does no better than guessing ends
    it: it and those after it have no weight. No error counts as half of the lightest conversation.
    """
    weights_C = start_C / start_C.sum()
    votes: list[float] = []
    errors: list[float] = []
    n_labels = int(logp_R[0].shape[1]) if logp_R else 2
    for logp_CL in logp_R:
        wrong_C = (logp_CL.argmax(1) != gold_C).double().numpy()
        error = float(weights_C @ wrong_C) or 0.5 * float(weights_C.min())
        errors.append(error)
        if error >= 1 - 1 / n_labels:
            break
        votes.append(math.log((1 - error) / error) + math.log(n_labels - 1))
        weights_C = weights_C * np.exp(votes[-1] * wrong_C)
        weights_C = weights_C / weights_C.sum()
    return weights_C, votes, errors


def stepwise(p_RN: Sequence[Numbers]) -> list[float]:
    """The weights, which sum to 1, of rounds that join a mixture one by one, each with the step that lowers the loss
    most; p: what each gives every held-out token.
    """
    weights: list[float] = []
    mixed: Numbers | None = None
    for p_N in p_RN:
        if mixed is None:
            mixed, weights = p_N, [1.0]
            continue
        before = mixed

        def loss(step: float, before: Numbers = before, p_N: Numbers = p_N) -> float:
            return float(-np.log(np.maximum((1 - step) * before + step * p_N, 1e-300)).mean())

        step = float(minimize_scalar(loss, bounds=(0.0, 1.0), method="bounded", options={"xatol": 1e-6}).x)
        mixed = (1 - step) * before + step * p_N
        weights = [weight * (1 - step) for weight in weights] + [step]
    return weights


class Course:
    """The rounds of one run: what each learns, what it says of both tables, and where that is kept."""

    def __init__(self, task: Task, learned: Table, watched: Table, run: Run, seed: int) -> None:
        self.first, self.learned, self.watched, self.run, self.seed = task, learned, watched, run, seed
        self.copies = conversations(task.rows)
        places = {words_of((row.input_ids, row.labels)): at for at, row in enumerate(learned.rows)}
        self.places = [places[words_of(task.rows[of[0]])] for of in self.copies]  # of each conversation in the table
        self.start_C = np.array([len(of) for of in self.copies], dtype=float)

    @staticmethod
    def name(number: int) -> str:
        """Of a round's adapter."""
        return f"round-{number}"

    def task(self, number: int, weights_C: Numbers) -> Task:
        """What a round learns: the rows of its draw, under a seed of its own."""
        first = self.first
        train = first.recipe.train.model_copy(update={"seed": (first.recipe.train.seed + number - 1) % SEEDS})
        counts = resampled(weights_C, len(first.rows), self.seed + number)
        drawn = sorted(of[turn % len(of)] for of, n in zip(self.copies, counts, strict=True) for turn in range(n))
        recipe = first.recipe.model_copy(update={"train": train})
        return Task(self.name(number), recipe, [first.rows[row] for row in drawn], first.valid, first.token_ids)

    def standing(self, measured: Sequence[Measured]) -> Standing:
        """What these rounds, all there were so far, come to."""
        if not measured:
            return Standing(self.start_C / self.start_C.sum())
        return self._of_labels(measured) if self.learned.labels else self._of_text(measured)

    def _of_labels(self, measured: Sequence[Measured]) -> Standing:
        gold_R, held_R = (
            torch.tensor(label_places(gold_labels(table.talks), self.learned.labels))
            for table in (self.learned, self.watched)
        )
        said = [one["learned"][self.places] for one in measured]
        weights_C, votes, errors = samme(said, gold_R[self.places], self.start_C)
        facts = {"error": errors[-1], "weight": votes[-1] if len(votes) == len(measured) else 0.0}
        if not votes:
            return Standing(weights_C, facts=facts)
        voted = vote_labels(torch.stack([one["watched"] for one in measured[: len(votes)]]), "soft", votes)
        loss = float(-voted.probs_RL.gather(1, held_R[:, None]).clamp(min=1e-15).log().mean())
        is_over = bool((said[-1].argmax(1) == gold_R[self.places]).all())
        return Standing(weights_C, tuple(votes), loss, facts, is_over)

    def _of_text(self, measured: Sequence[Measured]) -> Standing:
        votes = stepwise([one["watched"].exp().numpy() for one in measured])
        loss, learned = (
            -sum(vote * one[part].exp() for vote, one in zip(votes, measured, strict=True)).clamp(min=1e-300).log()  # type: ignore[union-attr]
            for part in ("watched", "learned")
        )
        lengths = measured[0]["lengths"].tolist()
        means = torch.stack([of.mean() if len(of) else of.new_zeros(()) for of in torch.split(learned, lengths)])
        perplexity_C = means[self.places].clamp(max=50.0).exp().numpy()
        weights_C = self.start_C * np.minimum(perplexity_C, HARDEST * perplexity_C.mean())
        return Standing(weights_C / weights_C.sum(), tuple(votes), float(loss.mean()), {"weight": votes[-1]})

    # What a round says, kept

    def measure(self, number: int) -> Measured:
        """Ask a round that was trained about both tables, and write down what it says."""
        name = self.name(number)
        if name not in self.learned.stack.slots:
            self.learned.stack.add(name, self.run.adapter(name))
        said: Measured = {}
        for part, table in (("learned", self.learned), ("watched", self.watched)):
            if table.labels:
                said[part] = label_logp(table.labelled(name), table.labels)
            else:
                values = table.values(name)
                said[part] = torch.tensor([value for row in values for value in row], dtype=torch.float64)
                if part == "learned":
                    said["lengths"] = torch.tensor([len(row) for row in values])
        disk.make_folder(self._file(number).parent)
        disk.write_file(self._file(number), lambda file: save_file(said, file))
        return said

    def kept(self, number: int) -> Measured | None:
        """What a round said in an earlier call; None where it was not asked, or that cannot be read."""
        try:
            return load_file(self._file(number))
        except (OSError, SafetensorError):
            return None

    def end(self, n_kept: int, n_rounds: int) -> list[str]:
        """Only the first ones stay, in the run and in the stack; their names."""
        names = [self.name(number) for number in range(1, n_rounds + 1)]
        for name in names[n_kept:]:
            if name in self.learned.stack.slots:
                self.learned.stack.remove(name)
            disk.remove(self.run.adapter(name))
        for name in names[:n_kept]:
            if name not in self.learned.stack.slots:
                self.learned.stack.add(name, self.run.adapter(name))
        return names[:n_kept]

    def _file(self, number: int) -> Path:
        return self.run.checkpoints / "boost" / f"{self.name(number)}.safetensors"
