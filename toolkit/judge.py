"""Measure a model before and after, by what the task is for; and the verb `evaluate RUN [--data FILES]`."""

import argparse
import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from toolkit import bundle, disk
from toolkit.adapters.opened import Opened
from toolkit.bases.load import LoadedBase
from toolkit.bases.spoken import FACTS
from toolkit.bundle import Run
from toolkit.card import compared, show_numbers
from toolkit.combine.speaker import open_speaker, speaks
from toolkit.corpus.gather import Corpus, gather
from toolkit.corpus.render import Rendered, Renderer
from toolkit.corpus.talk import Talk
from toolkit.ensemble.subjects import Combined, Table
from toolkit.errors import BaseError, DataError, Problem, RunError
from toolkit.evaluate.encoder import Labeller, readable
from toolkit.evaluate.spoken import PairBits, read_pairs, some_pairs, spoken_numbers
from toolkit.evaluate.subject import OneModel, Subject
from toolkit.evaluate.talk import (
    Prompt,
    Sample,
    measure,
    measure_by_language,
    read_prompts,
    samples_markdown,
)
from toolkit.fit.plan import is_new
from toolkit.fit.prepare import cut_row
from toolkit.generate import Sampling
from toolkit.loaded import LoadedRun, is_labeller, load_labeller, load_run
from toolkit.recipe.model import Data, Recipe
from toolkit.shipped import resolve, shipped
from toolkit.trackers.contract import OF_THE_END

ANSWER_TOKENS = 60  # answers longer than this count as not ended
N_TEXTS = 100  # held-out texts that text2text writes anew
N_PAIRS = 100  # of each language, for the metric spoken
CACHE_VERSION = 3
# Which numbers a metric of `evaluate.metrics` stands for, by how their names begin.
NUMBERS = {
    "loss": ("loss", "content loss"),
    "bits_per_byte": ("bits per byte",),
    "chrf": ("chrf",),
    "bleu": ("bleu",),
    "rouge": ("rouge",),
    "distinct_2": ("distinct 2",),
    "repetition": ("repetition",),
    "length": ("mean tokens",),
    "ends": ("ended",),
    "levels": ("sentences", "answers"),
    "spoken": ("spoken", "written"),
    "accuracy": ("accuracy", "confusion"),
    "macro_f1": ("macro f1",),
    "log_loss": ("log loss", "calibration error"),
}
OF_LABELS = ("accuracy", "macro_f1", "log_loss")
OF_TEXTS = ("chrf", "bleu", "rouge")


@dataclass(frozen=True)
class Held:
    """What a model is judged by: held-out talks with their rows, in the same order, and the words it chooses from."""

    talks: tuple[Talk, ...]
    rows: tuple[Rendered, ...]
    prompts: tuple[Prompt, ...]
    labels: tuple[str, ...]
    learned: tuple[Talk, ...]  # what baselines may learn from; empty: there are none
    metrics: tuple[str, ...] = tuple(NUMBERS)  # what of it is wanted


class Judge:
    """Measures models that share a tokenizer and a template on the same held-out talk and prompts."""

    def __init__(self, task: str, base: LoadedBase, renderer: Renderer, held: Held, sampling: Sampling) -> None:
        self.task, self.base, self.renderer, self.held, self.sampling = task, base, renderer, held, sampling

    def measure(self, who: nn.Module | Opened | Subject) -> dict[str, Any]:
        """The numbers that are wanted, as JSON: groups of {all, ko, en …}, and the answers themselves."""
        found = self._everything(self.subject(who) if isinstance(who, nn.Module | Opened) else who)
        return _wanted(found, self.held.metrics)

    def subject(self, model: nn.Module | Opened) -> Subject:
        """One model as somebody to measure."""
        return OneModel(model, self.base.tokenizer, self.renderer)

    def langs(self) -> list[str | None]:
        """The language of every held-out talk."""
        return [talk.lang or guess_language(talk) for talk in self.held.talks]

    def _everything(self, who: Subject) -> dict[str, Any]:
        found = self._losses(who)
        if self.task == "classify":
            return found | (label_numbers(who, self.held) if self.held.talks else {})
        prompts = self._prompts()
        samples = who.answers(prompts, self.sampling) if prompts else []
        if "spoken" in self.held.metrics:
            found |= self._spoken(who, samples)
        if not prompts:
            return found
        groups = {"all": measure(samples), **measure_by_language(samples)}
        for lang, measured in groups.items():
            for name, value in measured.summary().items():
                is_korean = name.startswith(("sentences_", "answers_"))
                if name != "n" and not (is_korean and lang != "ko"):
                    found.setdefault(name.replace("_", " "), {})[lang] = value
        found["samples"] = [_as_json(sample) for sample in samples]
        if self.task == "text2text" and self.held.learned:
            from toolkit.evaluate.baselines import answer_baselines  # here: scikit-learn is slow

            found["baselines"] = answer_baselines(self.held.learned, prompts)
        return found

    def measure_base(self) -> dict[str, Any]:
        """`measure` of the bare base; kept in the user's cache by hash of all that it depends on."""
        file = disk.cache_folder() / "judged" / f"{self._key()}.json"
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: measured again
            kept: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return kept
        found = self.measure(self.base.model)
        with contextlib.suppress(RunError):  # a cache that cannot be written costs time, never the run
            disk.make_folder(file.parent)
            disk.write_json(file, found)
        return found

    def samples_markdown(self, before: dict[str, Any], after: dict[str, Any]) -> str:
        """samples.md: answers before and after (no before for a base from scratch), or what was taken for what."""
        if "confusion" in after:
            return labels_markdown(self.held, after)
        prompts = self._prompts()
        new = _as_samples(prompts, after.get("samples", []))
        old = _as_samples(prompts, before.get("samples", [])) or [replace(sample, answer="") for sample in new]
        return samples_markdown(old, new)

    def _prompts(self) -> list[Prompt]:
        """What is answered: the recipe's prompts, or the held-out texts. One that fills the context is left out."""
        prompts = self.held.prompts if self.task == "chat" else _as_prompts(self.held.talks[:N_TEXTS])
        room = self.base.context - self.sampling.max_tokens
        return [prompt for prompt in prompts if len(self.renderer.prompt(prompt.turns)) <= room]

    def _losses(self, who: Subject) -> dict[str, Any]:
        measured = who.held_out(self.held.rows, self.langs()) if self.held.rows else None
        if measured is None:
            return {}
        groups = {"all": measured, **measured.by_language()}
        return {
            "loss": {lang: of.loss for lang, of in groups.items()},
            "content loss": {lang: of.content_loss for lang, of in groups.items()},
            "bits per byte": {lang: of.bits_per_byte for lang, of in groups.items()},
        }

    def _spoken(self, who: Subject, samples: Sequence[Sample]) -> dict[str, Any]:
        """How spoken the model is, in the languages of what it is judged by."""
        told = [prompt.lang for prompt in self.held.prompts]
        langs = {lang for lang in (*told, *self.langs()) if lang}
        pairs = some_pairs([pair for pair in read_pairs() if pair.lang in langs], N_PAIRS)
        as_answer = self.renderer.learn == "assistant"
        bits: dict[str, PairBits] = {}
        with contextlib.suppress(DataError):  # no place for them in the template: a number less, never a run lost
            bits = who.bits(pairs, as_answer=as_answer) or {}
        return spoken_numbers(samples, bits)

    def _key(self) -> str:
        base, held = self.base, self.held
        place = [str(base.device), str(base.dtype)]
        parts = [CACHE_VERSION, self.task, base.hash, place, self.renderer.template, str(self.sampling), held.labels]
        scored_by = [disk.hash_file(shipped("spoken") / FACTS)] if "spoken" in held.metrics else []
        digest = hashlib.sha256(json.dumps([*parts, held.metrics, *scored_by]).encode())
        for row in held.rows:
            digest.update(repr((row.input_ids, row.labels)).encode())
        for of in (held.prompts, held.talks, held.learned):  # with their languages and labels
            digest.update(repr([_content(one) for one in of]).encode())
        return digest.hexdigest()


def label_numbers(who: Subject, held: Held) -> dict[str, Any]:
    """The numbers of labels as JSON, the baselines beside them where there is talk that they may learn from."""
    from toolkit.evaluate.baselines import baselines  # here: scikit-learn is slow
    from toolkit.evaluate.classify import measure_labels

    said = who.labelled(held.talks, held.labels)
    measured: dict[str, Any] = measure_labels(held.talks, said, held.labels)
    return measured | ({"baselines": baselines(held.learned, held.talks, held.labels)} if held.learned else {})


def measured_labels(who: Subject, held: Held) -> dict[str, Any]:
    """`Judge.measure` for somebody who labels texts and cannot talk."""
    return _wanted(label_numbers(who, held), held.metrics)


def labels_markdown(held: Held, after: dict[str, Any]) -> str:
    """samples.md of labels: what was taken for what. Empty where that was not asked for."""
    if "confusion" not in after:
        return ""
    from toolkit.evaluate.classify import confusion_markdown

    return f"# {len(held.talks)} held-out texts, labelled\n\n{confusion_markdown(after['confusion'])}"


def tracked_numbers(measured: dict[str, Any]) -> dict[str, float]:
    """Flat numbers for a tracker."""
    rows = compared({"after": measured})
    return {f"{OF_THE_END}{row.metric} {row.lang}".strip().replace(" ", "_"): row.after or 0.0 for row in rows}


def _wanted(found: dict[str, Any], metrics: Sequence[str]) -> dict[str, Any]:
    begins = tuple(begin for metric in metrics for begin in NUMBERS[metric])
    return {name: of for name, of in found.items() if name.startswith((*begins, "samples", "baselines"))}


def guess_language(talk: Talk) -> str | None:
    """ko where a tenth of the letters are Hangul, en where letters are ASCII, else None."""
    letters = [sign for turn in talk.turns for sign in turn.content if sign.isalpha()]
    hangul = sum("가" <= sign <= "힣" for sign in letters)
    if letters and hangul * 10 >= len(letters):
        return "ko"
    return "en" if letters and sum(sign.isascii() for sign in letters) * 10 >= 9 * len(letters) else None


def sampling_of(recipe: Recipe) -> Sampling:
    """How prompts are answered when judged: as the run is served, but no longer than ANSWER_TOKENS, and seeded."""
    serve = recipe.serve
    return Sampling(serve.temperature, serve.top_p, max_tokens=ANSWER_TOKENS, seed=recipe.train.seed)


def prompts_of(recipe: Recipe) -> tuple[Prompt, ...]:
    """The recipe's prompts; only a chat has any."""
    if recipe.task != "chat" or not recipe.evaluate.prompts:
        return ()
    return tuple(read_prompts(recipe.evaluate.prompts))


def metrics_of(recipe: Recipe) -> tuple[str, ...]:
    """The recipe's metrics; a classifier is always told its labels' scores, what writes text anew how close it came."""
    asked = recipe.evaluate.metrics
    if recipe.task == "text2text":
        return tuple(dict.fromkeys((*asked, *OF_TEXTS)))
    return (*asked, *(() if recipe.task != "classify" or set(asked) & set(OF_LABELS) else OF_LABELS))


def _as_prompts(talks: Sequence[Talk]) -> tuple[Prompt, ...]:
    return tuple(
        Prompt(talk.source, talk.turns[:-1], talk.lang or guess_language(talk), talk.turns[-1].content)
        for talk in talks
        if talk.turns[-1].role == "assistant" and len(talk.turns) > 1
    )


def _content(one: Talk | Prompt) -> tuple[Any, ...]:
    """What of a talk or a prompt its measurement depends on, not the file it came from."""
    turns = [(turn.role, turn.content) for turn in one.turns]
    return (turns, one.lang, one.label) if isinstance(one, Talk) else (turns, one.lang, one.name, one.reference)


def _as_json(sample: Sample) -> dict[str, Any]:
    return {
        "name": sample.prompt.name,
        "lang": sample.prompt.lang,
        "prompt": sample.prompt.turns[-1].content,
        "answer": sample.answer,
        "finish": sample.finish,
        "n_tokens": sample.n_tokens,
    }


def _as_samples(prompts: Sequence[Prompt], found: Sequence[dict[str, Any]]) -> list[Sample]:
    by_name = {prompt.name: prompt for prompt in prompts}
    return [Sample(by_name[s["name"]], s["answer"], s["finish"], s["n_tokens"]) for s in found if s["name"] in by_name]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """evaluate RUN [--data FILES] [--device D]."""
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="measure on these files instead of the held-out talk")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")


def evaluate(arguments: argparse.Namespace) -> int:
    """Show what training measured; with --data measure base and run on those files."""
    console = Console()
    run: Run = bundle.open_run(arguments.run)
    if not arguments.data:
        show_numbers(run.finished("results")["results"], run.name, console)
        return 0
    run.finished("base", "plan")
    recipe = _recipe_here(run, console)
    data = Data(
        train=tuple(arguments.data),
        valid=0,
        test=0,
        format=recipe.data.format,
        system=recipe.data.system,
        clean=recipe.data.clean,
    )
    corpus = gather(data, recipe.train.seed, None)
    if is_labeller(run.facts()):
        labeller = load_labeller(arguments.run, arguments.device)
        who = Labeller(labeller.model, labeller.base.tokenizer, labeller.labels)
        talks = readable(labeller, list(corpus.train))
        held = Held(tuple(talks), (), (), labeller.labels, (), metrics_of(recipe))
        too_long = [Rendered([], [], [], "too_long")] * (len(corpus.train) - len(talks))
        console.print(_left_out(corpus, too_long), highlight=False, soft_wrap=True)
        show_numbers({"before": {}, "after": measured_labels(who, held)}, run.name, console)
        return 0
    if speaks(arguments.run):
        speaker, loaded = open_speaker(arguments.run, arguments.device)
        judge, model = _judge_of(recipe, corpus, loaded, console)
        held = judge.held
        table = Table(loaded.base, judge.renderer, speaker.stack, held.talks, held.rows, held.labels, speaker.apart)
        found = {"before": judge.measure(model), "after": judge.measure(Combined(table, speaker))}
        show_numbers(found, run.name, console)
        return 0
    judge, model = _judge_of(recipe, corpus, load_run(arguments.run, arguments.device), console)
    after = judge.measure(model)
    del judge, model  # the base is loaded anew: memory holds one of them
    before: dict[str, Any] = {}
    try:
        loaded = load_run(arguments.run, arguments.device, with_adapter=False)
    except (BaseError, RunError) as absent:  # every parameter was trained: the run stands without it
        console.print(f"{absent} Only the run's own numbers are shown.", highlight=False, markup=False, soft_wrap=True)
    else:
        judge, model = _judge_of(recipe, corpus, loaded, None)
        before = judge.measure(model)
    show_numbers({"before": before, "after": after}, run.name, console)
    return 0


def _recipe_here(run: Run, console: Console) -> Recipe:
    """The run's recipe; without its prompts where they are not here."""
    from toolkit.recipe.read import read_recipe

    recipe = read_recipe(run.recipe_file, to_run=False)
    named = recipe.evaluate.prompts
    if not named or resolve(named).exists():
        return recipe
    # the run has moved, the user's own prompts have not
    console.print(f"{named}: not here, so no prompts are answered.", highlight=False, markup=False, soft_wrap=True)
    return recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"prompts": None})})


def _judge_of(recipe: Recipe, corpus: Corpus, loaded: LoadedRun, console: Console | None) -> tuple[Judge, nn.Module]:
    """The run's judge of all of `corpus`, rendered as it was for training; says in one line what was left out."""
    max_length = int(loaded.facts["plan"]["max_length"])
    template, tokenizer = loaded.renderer.template, loaded.base.tokenizer
    if is_new(recipe):
        renderer = Renderer(tokenizer, template, None, learn="all")
    else:
        renderer = Renderer(tokenizer, template, max_length, recipe.data.clean.too_long)
    talks = list(corpus.train)
    rows = list(renderer.training_all(talks))
    whole = [(talk, row) for talk, row in zip(talks, rows, strict=True) if not row.dropped]
    if is_new(recipe):
        whole = [(talk, piece) for talk, row in whole for piece in cut_row(row, max_length)]
    if console:
        console.print(_left_out(corpus, rows), highlight=False, soft_wrap=True)
    if not whole:
        says = f"no conversation is left to measure on ({_left_out(corpus, rows)})"
        raise DataError("--data", [Problem("", says)])
    held = Held(
        tuple(talk for talk, _ in whole),
        tuple(row for _, row in whole),
        prompts_of(recipe),
        loaded.labels,
        (),  # baselines would learn from what they are measured on
        metrics_of(recipe),
    )
    return Judge(recipe.task, loaded.base, renderer, held, sampling_of(recipe)), loaded.model


def _left_out(corpus: Corpus, rows: Sequence[Rendered]) -> str:
    """How many conversations are measured, and how many were dropped, or cut, for what reason."""
    dropped = dict(corpus.report.dropped)
    for row in rows:
        if row.dropped:
            dropped[row.dropped] = dropped.get(row.dropped, 0) + 1
    measured = corpus.report.loaded - sum(dropped.values())
    said = ", ".join(f"{reason} {n:,}" for reason, n in sorted(dropped.items())) or "none"
    n_cut = sum(row.n_left_out > 0 for row in rows)
    cut = f"; {n_cut:,} lost their oldest turns" if n_cut else ""
    return f"Measured on {measured:,} of {corpus.report.loaded:,} conversations; dropped: {said}{cut}."
