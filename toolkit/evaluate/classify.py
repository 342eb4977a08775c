"""Which label a model gives a text: the one whose words it finds likeliest as the answer, token by token."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.adapters.opened import Opened
from toolkit.corpus.render import IGNORED, Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, Problem
from toolkit.evaluate import metrics
from toolkit.evaluate.encoder import encoder_label_logprobs, text_of
from toolkit.loaded import LoadedLabeller, LoadedRun
from toolkit.score import score


@dataclass(frozen=True)
class Scores:
    """How good labels are, and how well their probabilities say so. `confusion` has a row for each gold label."""

    n: int
    labels: tuple[str, ...]
    accuracy: float
    macro_f1: float
    log_loss: float
    calibration_error: float
    confusion: tuple[tuple[int, ...], ...]

    def summary(self) -> dict[str, float]:
        """The numbers for a table or metrics.jsonl."""
        return {
            "n": self.n,
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "log_loss": self.log_loss,
            "calibration_error": self.calibration_error,
        }


def label_set(talks: Sequence[Talk]) -> tuple[str, ...]:
    """The labels of labelled talks, each once, in the order of the alphabet.

    Raises: DataError for talks without a label, or with one label alone, between which there is nothing to choose.
    """
    found = set(gold_labels(talks))
    if len(found) < 2:
        says = f"{', '.join(found)} is the only label: a classifier chooses between two or more."
        raise DataError("labels", [Problem("", says)])
    return tuple(sorted(found))


def classify(
    model: nn.Module | Opened,
    renderer: Renderer,
    texts: Sequence[Sequence[Turn]],
    labels: Sequence[str],
    *,
    batch_tokens: int = 8192,
) -> list[dict[str, float]]:
    """For every text (turns to answer) the probability of every label, which sum to 1.

    A label's score is the mean log-likelihood of its tokens as the answer, the end of turn among them, so that a long
    label is not punished and 좋음 is told from 좋음 아님; probabilities are the softmax of the scores. Cost: each text
    is computed once, each label after it. Raises: DataError for a label that the base cannot spell, or that it spells
    like another.
    """
    means = _mean_log_likelihoods(model, renderer, texts, labels, batch_tokens)
    return [_softmax(labels, of) for of in means]


def _mean_log_likelihoods(
    model: nn.Module | Opened,
    renderer: Renderer,
    texts: Sequence[Sequence[Turn]],
    labels: Sequence[str],
    batch_tokens: int,
) -> list[list[float]]:
    """For every text the mean log-likelihood of the tokens of each label."""
    ends = label_ends(renderer, labels)
    prompts = [renderer.prompt(turns) for turns in texts]
    found = score(model, [(prompt, ends[label]) for prompt in prompts for label in labels], batch_tokens=batch_tokens)
    means = [sum(values) / len(values) for values in found]
    n = len(labels)
    return [means[place * n : place * n + n] for place in range(len(texts))]


# R texts, L labels.


def common_labels(labels_of: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The labels that several runs choose from, in the order of the first; `labels_of`: by the run's name.

    Raises: DataError naming what each lacks, where they do not choose from the same words.
    """
    sets = {name: set(labels) for name, labels in labels_of.items()}
    every = set[str]().union(*sets.values())
    lacks = {name: sorted(every - own) for name, own in sets.items() if own != every}
    if lacks or not every:
        problems = [Problem(name, f"does not know {', '.join(missing)}.") for name, missing in lacks.items()]
        says = "only runs that choose from the same labels can vote. Train them on the same labels (data.format.names)."
        raise DataError("labels", [*problems, Problem("", says)])
    return tuple(next(iter(labels_of.values())))


def label_log_likelihoods(loaded: LoadedRun | LoadedLabeller, talks: Sequence[Talk], labels: Sequence[str]) -> Tensor:
    """What a run finds of each label for each labelled talk, [R, L] in float64, labels in the order given.

    A run that talks: the mean log-likelihood of the label's tokens as the answer, as `classify` has it. An encoder: its
    log-probabilities. `combine.vote.vote_labels` takes either, and both at once.
    Raises: DataError for labels that are not the run's own, and as `classify` does; InputError for a text that is too
    long for it.
    """
    common_labels({"asked for": labels, loaded.run.name: loaded.labels})
    if isinstance(loaded, LoadedLabeller):
        at = [loaded.labels.index(label) for label in labels]
        return encoder_label_logprobs(loaded, [text_of(talk) for talk in talks])[:, at]
    texts = [talk.turns[:-1] for talk in talks]
    means = _mean_log_likelihoods(loaded.model, loaded.renderer, texts, labels, 8192)
    return torch.tensor(means, dtype=torch.float64).view(len(talks), len(labels))


def likeliest(probabilities: Sequence[Mapping[str, float]]) -> list[str]:
    """The label with the highest probability of each; the first of several."""
    return [max(of, key=of.__getitem__) for of in probabilities]


def label_places(gold: Sequence[str], labels: Sequence[str]) -> list[int]:
    """Where each gold label stands in `labels`. Raises: DataError for those that were not to choose from."""
    unknown = sorted(set(gold) - set(labels))
    if unknown:
        known = ", ".join(labels)
        says = f"{', '.join(unknown)}: not among the labels learned ({known}). Put rows with them in data.train."
        raise DataError("labels", [Problem("", says)])
    place = {label: at for at, label in enumerate(labels)}
    return [place[label] for label in gold]


def scores_of(gold: Sequence[str], probabilities: Sequence[Mapping[str, float]], labels: Sequence[str]) -> Scores:
    """Compare probabilities with gold labels. Raises: DataError for gold labels that were not to choose from."""
    label_places(gold, labels)
    said = likeliest(probabilities)
    return Scores(
        n=len(gold),
        labels=tuple(labels),
        accuracy=metrics.accuracy(gold, said),
        macro_f1=metrics.macro_f1(gold, said, labels),
        log_loss=metrics.log_loss(gold, probabilities),
        calibration_error=metrics.expected_calibration_error(gold, probabilities),
        confusion=tuple(map(tuple, metrics.confusion(gold, said, labels))),
    )


def classify_talks(
    model: nn.Module | Opened,
    renderer: Renderer,
    talks: Sequence[Talk],
    labels: Sequence[str],
    *,
    batch_tokens: int = 8192,
) -> list[dict[str, float]]:
    """`classify` for labelled talks, whose last turn is the label's word and is not shown to the model."""
    return classify(model, renderer, [talk.turns[:-1] for talk in talks], labels, batch_tokens=batch_tokens)


def measure_labels(
    talks: Sequence[Talk], said: Sequence[Mapping[str, float]], labels: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What `classify_talks` said against the labels of the talks, as JSON: each number over all talks and by language.

    Raises: DataError for talks without a label, or with one that is not in `labels`.
    """
    groups = {"all": list(zip(talks, said, strict=True))}
    for lang in sorted({talk.lang for talk in talks if talk.lang is not None}):
        groups[lang] = [(talk, of) for talk, of in groups["all"] if talk.lang == lang]
    found: dict[str, dict[str, Any]] = {}
    for group, pairs in groups.items():
        scores = scores_of(gold_labels([talk for talk, _ in pairs]), [of for _, of in pairs], labels)
        for name, value in scores.summary().items():
            if name != "n":
                found.setdefault(name.replace("_", " "), {})[group] = value
        if group == "all":
            confusion = {"labels": list(scores.labels), "rows": [list(row) for row in scores.confusion]}
    return found | {"confusion": confusion}


def gold_labels(talks: Sequence[Talk]) -> list[str]:
    """The label of every talk. Raises: DataError where one is missing, or where there is no talk."""
    found = [talk.label for talk in talks if talk.label is not None]
    if not found or len(found) < len(talks):
        says = f"{len(talks) - len(found)} of {len(talks)} texts have no label. Use data.format kind labels."
        raise DataError("labels", [Problem("", says)])
    return found


def confusion_markdown(confusion: Mapping[str, Any]) -> str:
    """What `measure_labels` calls confusion as a Markdown table: gold label in the row, given label in the column."""
    cells = [label.replace("|", r"\|").replace("\n", " ") for label in confusion["labels"]]
    lines = ["| gold, given | " + " | ".join(cells) + " |", "|---" * (len(cells) + 1) + "|"]
    for label, row in zip(cells, confusion["rows"], strict=True):
        lines.append(f"| {label} | " + " | ".join(map(str, row)) + " |")
    return "\n".join(lines) + "\n"


def label_ends(renderer: Renderer, labels: Sequence[str]) -> dict[str, list[int]]:
    """The ids of each label as an answer, its end among them.

    Raises: DataError with every label that is spelled like another one, or not at all.
    """
    ends = {label: _label_ids(renderer, label) for label in labels}
    first: dict[tuple[int, ...], str] = {}
    problems = []
    for label, ids in ends.items():
        same = first.setdefault(tuple(ids), label)
        if same != label:
            problems.append(Problem(f"label {label!r}", f"this base spells it like {same!r}. Rename one of them."))
    if problems:
        raise DataError("labels", problems)
    return ends


def _label_ids(renderer: Renderer, label: str) -> list[int]:
    """The label's word as an answer with the end of turn: the same ids after every text, since pieces are encoded
    apart.
    """
    asked = (Turn("user", "?"),)
    row = renderer.training(Talk((*asked, Turn("assistant", label)), f"label {label!r}"))
    n_prompt = len(renderer.prompt(asked))
    if row.dropped is not None or row.labels[n_prompt:].count(IGNORED):
        raise DataError(
            f"label {label!r}", [Problem("", f"cannot be an answer of this base ({row.dropped}). Rename it.")]
        )
    ids = row.input_ids[n_prompt:]
    if any(one == renderer.unknown_id and not end for one, end in zip(ids, row.is_end[n_prompt:], strict=True)):
        says = "has signs that this base's tokenizer does not know. Write other words in data.format.names."
        raise DataError(f"label {label!r}", [Problem("", says)])
    return ids


def _softmax(labels: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    return {label: weight / sum(weights) for label, weight in zip(labels, weights, strict=True)}
