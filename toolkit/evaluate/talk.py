"""What a model does on held-out talk and on fixed prompts: loss, bits per byte, answers and what can be counted in
them.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from toolkit.adapters.opened import Opened
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.row import Row, cut
from toolkit.corpus.rows import read_rows
from toolkit.corpus.talk import Role, Turn
from toolkit.errors import DataError, Problem
from toolkit.evaluate import metrics
from toolkit.evaluate.levels import LEVELS, Level
from toolkit.generate import Finish, Sampling, end_ids, generate
from toolkit.score import IGNORED, supervised_log_likelihoods

ROLES: tuple[Role, ...] = ("system", "user", "assistant")


@dataclass(frozen=True)
class TalkLoss:
    """The sums of one talk: negative log-likelihood in nats and number of tokens, over all supervised tokens and over
    content alone (the end of turn left out), and the UTF-8 bytes of that content in NFC.
    """

    nll: float
    n_tokens: int
    content_nll: float
    n_content: int
    n_bytes: int
    lang: str | None = None


@dataclass(frozen=True)
class HeldOut:
    """Held-out loss of a set of talks, by the sums of each, in the order given."""

    talks: tuple[TalkLoss, ...]

    @property
    def loss(self) -> float:
        """Nats per supervised token: the sum over all talks divided by the number of tokens."""
        return _mean(self.sums())

    @property
    def content_loss(self) -> float:
        """Nats per content token."""
        return _mean(self.content_sums())

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte of content: comparable between bases with different tokenizers."""
        return metrics.bits_per_byte(sum(of.content_nll for of in self.talks), sum(of.n_bytes for of in self.talks))

    @property
    def n_tokens(self) -> int:
        """Supervised tokens."""
        return sum(of.n_tokens for of in self.talks)

    def sums(self) -> list[tuple[float, int]]:
        """(nll, tokens) of every talk: what `metrics.bootstrap_interval` takes."""
        return [(of.nll, of.n_tokens) for of in self.talks]

    def content_sums(self) -> list[tuple[float, int]]:
        """(nll, tokens) of every talk over content alone."""
        return [(of.content_nll, of.n_content) for of in self.talks]

    def by_language(self) -> dict[str, "HeldOut"]:
        """The same for the talks of each language; talks without one are in none."""
        langs = sorted({of.lang for of in self.talks if of.lang is not None})
        return {lang: HeldOut(tuple(of for of in self.talks if of.lang == lang)) for lang in langs}

    def summary(self) -> dict[str, float]:
        """The numbers for a table or metrics.jsonl."""
        return {
            "loss": self.loss,
            "content_loss": self.content_loss,
            "bits_per_byte": self.bits_per_byte,
            "n_tokens": self.n_tokens,
            "n_talks": len(self.talks),
        }


def held_out_loss(
    model: nn.Module | Opened,
    tokenizer: Any,
    rows: Sequence[Rendered],
    langs: Sequence[str | None] | None = None,
    *,
    batch_tokens: int = 8192,
) -> HeldOut:
    """Loss of rendered talks; rows that rendering dropped are left out. `langs` names the language of each row.

    Only supervised positions go through the head; numbers do not depend on what shares a batch, up to rounding.
    Raises: DataError when no row has a supervised token; InputError for one that the base's context does not hold.
    """
    kept = [
        (row, lang)
        for row, lang in zip(rows, langs if langs is not None else [None] * len(rows), strict=True)
        if row.n_supervised
    ]
    if not kept:
        says = f"none of {len(rows)} rows has a supervised token. Give talks with answers that fit max_length."
        raise DataError("held-out talk", [Problem("", says)])
    found = supervised_log_likelihoods(
        model, [(row.input_ids, row.labels) for row, _ in kept], batch_tokens=batch_tokens
    )
    return HeldOut(
        tuple(talk_loss(row, values, tokenizer, lang) for (row, lang), values in zip(kept, found, strict=True))
    )


def talk_loss(row: Rendered, log_likelihoods: Sequence[float], tokenizer: Any, lang: str | None = None) -> TalkLoss:
    """The sums of one talk, from the log-likelihoods of its supervised tokens in order."""
    ends = [end for label, end in zip(row.labels, row.is_end, strict=True) if label != IGNORED]
    content = [value for value, end in zip(log_likelihoods, ends, strict=True) if not end]
    n_bytes = sum(len(metrics.nfc(_text(tokenizer, run)).encode()) for run in _content_runs(row))
    return TalkLoss(
        nll=-math.fsum(log_likelihoods),
        n_tokens=len(log_likelihoods),
        content_nll=-math.fsum(content),
        n_content=len(content),
        n_bytes=n_bytes,
        lang=lang,
    )


def _content_runs(row: Rendered) -> Iterable[list[int]]:
    """The ids of content that stand side by side: one answer's words, or the supervised part of a document."""
    run: list[int] = []
    for label, end in zip(row.labels, row.is_end, strict=True):
        if label != IGNORED and not end:
            run.append(label)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _mean(sums: Sequence[tuple[float, int]]) -> float:
    n_tokens = sum(n for _, n in sums)
    return math.fsum(nll for nll, _ in sums) / n_tokens if n_tokens else math.nan


@dataclass(frozen=True)
class Prompt:
    """Turns to answer, the last one not the assistant's, and what a person answered, where there is that."""

    name: str
    turns: tuple[Turn, ...]
    lang: str | None = None
    reference: str | None = None


@dataclass(frozen=True)
class Sample:
    """A prompt and the answer it got; `n_tokens` without the end token."""

    prompt: Prompt
    answer: str
    finish: Finish
    n_tokens: int


def read_prompts(name: str) -> list[Prompt]:
    """Prompts of a jsonl, json, csv or parquet file: `messages` with roles, or `prompt`; `reference`, `lang`, `id` if
    given.

    A last message by the assistant is the reference. Without `lang`, a prompt in Hangul is taken for ko.
    Raises: DataError with every row that cannot be read.
    """
    prompts: list[Prompt] = []
    problems: list[Problem] = []
    for row in read_rows(name):
        read = row if isinstance(row, Problem) else _prompt(row)
        problems.append(read) if isinstance(read, Problem) else prompts.append(read)
    if problems:
        raise DataError(name, problems)
    return prompts


def _prompt(row: Row) -> Prompt | Problem:
    value = row.value
    messages = value.get("messages", [{"role": "user", "content": value.get("prompt")}])
    if not isinstance(messages, list) or not all(_is_message(message) for message in messages):
        says = (
            "needs `messages`, a list of {role: system | user | assistant, content: text}, or `prompt`, a text. Found: "
        )
        return Problem(row.where, says + cut(repr(dict(value))))
    turns = [Turn(message["role"], metrics.nfc(message["content"])) for message in messages]
    given = value.get("reference")
    reference = metrics.nfc(given) if isinstance(given, str) and given.strip() else None
    if turns and turns[-1].role == "assistant":
        reference = turns.pop().content
    if not turns:
        return Problem(row.where, "has no turn to answer. Give it a user's turn.")
    lang = value.get("lang")
    guessed = "ko" if any("가" <= sign <= "힣" for sign in turns[-1].content) else None
    name = str(value.get("id", row.where))
    return Prompt(name, tuple(turns), lang if isinstance(lang, str) else guessed, reference)


def _is_message(message: object) -> bool:
    return (
        isinstance(message, dict)
        and message.get("role") in ROLES
        and isinstance(message.get("content"), str)
        and bool(message["content"].strip())
    )


def answer_prompts(
    model: nn.Module | Opened, tokenizer: Any, renderer: Renderer, prompts: Sequence[Prompt], sampling: Sampling
) -> list[Sample]:
    """The model's answer to every prompt, in order: rendered as serving renders it, batched, seeded row by row."""
    ids = [renderer.prompt(prompt.turns) for prompt in prompts]
    answers = generate(model, tokenizer, ids, sampling, ends=end_ids(model, tokenizer) | set(renderer.stop_ids))
    return [
        Sample(prompt, answer.text.strip(), answer.finish, len(answer.ids))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


@dataclass(frozen=True)
class Measured:
    """What can be counted in answers. chrf, bleu and rouge are None without references.

    repetition: share of 4-grams that the same answer has said before. ended: share that ended by itself. sentences: of
    the Korean sentences whose speech level can be told, the share of each; answers: of the answers with such a
    sentence, the share that holds one level throughout.
    """

    n: int
    chrf: float | None
    bleu: float | None
    rouge: metrics.Rouge | None
    distinct_2: float
    repetition: float
    mean_tokens: float
    ended: float
    sentences: dict[Level, float]
    answers: dict[Level, float]

    def summary(self) -> dict[str, float]:
        """The numbers for a table or metrics.jsonl, flat."""
        flat: dict[str, float] = {"n": self.n}
        if self.chrf is not None and self.bleu is not None and self.rouge is not None:
            flat |= {"chrf": self.chrf, "bleu": self.bleu, **asdict(self.rouge)}
        flat |= {"distinct_2": self.distinct_2, "repetition": self.repetition, "mean_tokens": self.mean_tokens}
        flat["ended"] = self.ended
        for level in LEVELS:
            flat |= {f"sentences_{level}": self.sentences[level], f"answers_{level}": self.answers[level]}
        return flat


def measure(samples: Sequence[Sample], references: Sequence[str | None] | None = None) -> Measured:
    """Count in the answers; `references` instead of those of the prompts. Raises: DataError without samples."""
    if not samples:
        raise DataError("samples", [Problem("", "there is no answer to measure. Give at least one prompt.")])
    texts = [sample.answer for sample in samples]
    wanted = references if references is not None else [sample.prompt.reference for sample in samples]
    pairs = [(text, reference) for text, reference in zip(texts, wanted, strict=True) if reference is not None]
    of_pairs = ([text for text, _ in pairs], [reference for _, reference in pairs])
    return Measured(
        n=len(samples),
        chrf=metrics.chrf(*of_pairs) if pairs else None,
        bleu=metrics.bleu(*of_pairs) if pairs else None,
        rouge=metrics.rouge(*of_pairs) if pairs else None,
        distinct_2=metrics.distinct_n(texts, 2),
        repetition=metrics.repetition_4gram(texts),
        mean_tokens=sum(sample.n_tokens for sample in samples) / len(samples),
        ended=sum(sample.finish == "stop" for sample in samples) / len(samples),
        sentences=metrics.share_by_level(texts),
        answers=metrics.answers_by_level(texts),
    )


def measure_by_language(samples: Sequence[Sample]) -> dict[str, Measured]:
    """`measure` for the prompts of each language; prompts without one are in none."""
    langs = sorted({sample.prompt.lang for sample in samples if sample.prompt.lang is not None})
    return {lang: measure([sample for sample in samples if sample.prompt.lang == lang]) for lang in langs}


def samples_markdown(before: Sequence[Sample], after: Sequence[Sample]) -> str:
    """samples.md: every prompt with its answer before and after, none picked. What a model wrote stays plain text."""
    parts = ["# The same prompts, before and after\n\nEvery prompt is shown, none picked.\n"]
    for number, (one, other) in enumerate(zip(before, after, strict=True), start=1):
        if one.prompt.turns != other.prompt.turns:
            raise ValueError(f"sample {number} answers {one.prompt.name} before and {other.prompt.name} after")
        said: list[tuple[str, str]] = [(turn.role, turn.content) for turn in one.prompt.turns]
        said += [("before", _shown(one)), ("after", _shown(other))]
        said += [("person", one.prompt.reference)] if one.prompt.reference is not None else []
        body = "\n".join(f"{who:<10}{text.replace(chr(10), chr(10) + ' ' * 10)}" for who, text in said)
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", body)), default=0))
        parts.append(f"## {number}. {cut(one.prompt.name)}\n\n{fence}text\n{body}\n{fence}\n")
    return "\n".join(parts)


def _shown(sample: Sample) -> str:
    return (sample.answer or "(nothing)") + (
        "" if sample.finish == "stop" else f" … (cut after {sample.n_tokens} tokens)"
    )
