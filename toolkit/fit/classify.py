"""An encoder with a head for labels learns from labelled texts: the baseline of task: classify, through transformers'
Trainer.

What it has in common with a fit of one adapter (checkpoints, evaluation, patience, display, stopping) is fit/one's.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch.nn import functional

from toolkit.adapters.lora import attach_labelling
from toolkit.bases.encoder import LoadedEncoder
from toolkit.corpus.gather import Corpus
from toolkit.errors import DataError, Problem, RecipeError
from toolkit.evaluate.encoder import encode, label_logprobs, pad_of, padded, text_of
from toolkit.fit.display import Display
from toolkit.fit.fitted import Fitted
from toolkit.fit.one import Job, arguments_of, fit_through
from toolkit.fit.plan import Place, Plan, make_plan
from toolkit.fit.prepare import PARTS, epoch_of, shape_of
from toolkit.fit.trainer import Resumable
from toolkit.fit.watch import Watch
from toolkit.recipe.model import Lora, Recipe

# B texts, T tokens, L labels.

# `learning_rate: auto` of an encoder of up to 30 M parameters, up to 200 M, above: the two larger as in the paper of
# LoRA (arXiv 2106.09685, table 9: RoBERTa base and large).
LEARNING_RATES = (2e-3, 5e-4, 3e-4)


@dataclass(frozen=True)
class LabelRows:
    """The texts of each part as (ids, [number of the label]), and how many rendering dropped by reason.

    kept_talks: for each row of a part the place of its talk in the corpus. entry: for each row of train the place in
    data.train of the file that it came from. n_unknown: tokens that the tokenizer has no word for, of n_tokens.
    """

    train: list[tuple[list[int], list[int]]]
    valid: list[tuple[list[int], list[int]]]
    test: list[tuple[list[int], list[int]]]
    dropped: dict[str, int]
    kept_talks: dict[str, list[int]]
    entry: list[int]
    n_unknown: int
    n_tokens: int

    def held_out(self) -> str:
        """The part that says how good the result is: test, else valid."""
        return "test" if self.test else "valid"


def refuse_misfits(recipe: Recipe) -> None:
    """Raise RecipeError with everything in a recipe that an encoder has no use for."""
    problems = []
    if not isinstance(recipe.adapter, Lora):
        says = (
            f"an encoder learns through lora in this version, not {recipe.adapter.kind}. Write adapter: {{kind: lora}}"
        )
        problems.append(Problem("adapter.kind", says))
    if recipe.data.system is not None:
        problems.append(Problem("data.system", "an encoder reads the text alone. Remove it"))
    if recipe.train.packing is True:
        problems.append(Problem("train.packing", "an encoder sees a whole row at once. Write packing: false, or auto"))
    for key in ("search", "experts", "combine"):
        if getattr(recipe, key, None) is not None:
            says = "an encoder is trained by itself: no stack holds it. Remove it, and let the finished run vote"
            problems.append(Problem(key, says))
    if problems:
        raise RecipeError(recipe.name, problems)


def label_rows(recipe: Recipe, corpus: Corpus, base: LoadedEncoder, max_length: int) -> LabelRows:
    """Encode every part. Texts of more than `max_length` tokens are dropped, never cut.

    Raises: DataError for a held-out label that is not learned, and when nothing is left to learn from, or more was
    dropped than the recipe allows.
    """
    parts: dict[str, list[tuple[list[int], list[int]]]] = {}
    kept: dict[str, list[int]] = {}
    n_long = n_unknown = n_tokens = 0
    unknown = base.tokenizer.unk_token_id
    for part in PARTS:
        talks = list(getattr(corpus, part))
        strange = sorted({str(talk.label) for talk in talks} - set(base.labels))
        if strange:
            says = f"{', '.join(strange)}: held out, and in no text to learn from. Put rows with them in data.train."
            raise DataError("labels", [Problem("", says)])
        rows = encode(base.tokenizer, [text_of(talk) for talk in talks])
        kept[part] = [place for place, ids in enumerate(rows) if len(ids) <= max_length]
        n_long += len(rows) - len(kept[part])
        parts[part] = [(rows[place], [base.labels.index(str(talks[place].label))]) for place in kept[part]]
        n_tokens += sum(map(len, rows))
        n_unknown += sum(ids.count(unknown) for ids in rows) if unknown is not None else 0
    total = sum(map(len, parts.values())) + n_long
    if not parts["train"] or n_long > recipe.data.clean.max_dropped * total:
        says = (
            f"{n_long} of {total} texts have more than {max_length} tokens. A longer train.max_length keeps them, up to"
            f" {base.context}; data.clean.max_dropped allows more."
        )
        raise DataError(recipe.name, [Problem("data", says)])
    entry = [int(corpus.entry[place]) for place in kept["train"]]
    dropped = {"too_long": n_long} if n_long else {}
    return LabelRows(
        parts["train"], parts["valid"], parts["test"], dropped, kept, entry, n_unknown=n_unknown, n_tokens=n_tokens
    )


def label_plan(recipe: Recipe, base: LoadedEncoder, rows: LabelRows, place: Place) -> Plan:
    """The plan of a fit. Raises: RecipeError as make_plan does."""
    shape = shape_of(base.model, base.context)
    plan = make_plan(recipe, shape, place, max(len(ids) for ids, _ in rows.train))
    small, middle, large = LEARNING_RATES
    if recipe.train.learning_rate == "auto":
        rate = small if shape.parameters <= 30e6 else middle if shape.parameters <= 200e6 else large
        plan = replace(plan, learning_rate=rate)
    return replace(plan, packing=False)


def epoch_rows(recipe: Recipe, rows: LabelRows) -> list[tuple[list[int], list[int]]]:
    """The rows of one epoch, as often as the weights of the recipe's files say."""
    return [rows.train[place] for place in epoch_of(recipe, rows.entry)]


def with_adapter(recipe: Recipe, base: LoadedEncoder) -> nn.Module:
    """The encoder with a new adapter; it and the head learn. Raises: AdapterError where they do not fit."""
    assert isinstance(recipe.adapter, Lora)  # refuse_misfits
    return attach_labelling(base.model, recipe.adapter, seed=recipe.train.seed, head=base.head)


def held_out_log_loss(model: nn.Module, rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> float:
    """The mean of -ln p(gold label)."""
    logp_RL = label_logprobs(model, [ids for ids, _ in rows], pad_id)
    gold_R1 = torch.tensor([label for _, label in rows])
    return -float(logp_RL.gather(1, gold_R1).mean())


def fit_labels(job: Job, make_display: Callable[[int], Display]) -> Fitted:
    """`fit_one` for an encoder: rows are (ids, [number of the label]), the loss is that of labels, a row each."""
    return fit_through(job, make_display, _make_trainer)


@dataclass(frozen=True)
class CollateTexts:
    """Makes a micro batch: input_ids and attention_mask [B, T], filled up on the right; labels [B]."""

    pad_id: int

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows of {"input_ids", "labels"}; `n_tokens` counts the tokens that are not padding."""
        ids_BT, mask_BT = padded([row["input_ids"] for row in rows], self.pad_id)
        labels_B = torch.tensor([row["labels"][0] for row in rows])
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_B, "n_tokens": mask_BT.sum()}


class LabelTrainer(Resumable):
    """Trains an encoder on texts and the numbers of their labels."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The sum over texts of -ln p(label), divided by the number of texts in the whole optimizer step.

        Raises TrainingError when not finite.
        """
        self.n_tokens += int(inputs.pop("n_tokens"))
        labels_B = inputs["labels"]
        logits_BL = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        total = len(labels_B) if num_items_in_batch is None else num_items_in_batch
        loss = functional.cross_entropy(logits_BL.float(), labels_B, reduction="sum") / total
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # DDP averages gradients over processes
        return self.finite(loss)


def _make_trainer(job: Job, watch: Watch, total: int) -> Resumable:
    rows = Dataset.from_dict({"input_ids": [list(r[0]) for r in job.rows], "labels": [list(r[1]) for r in job.rows]})
    return LabelTrainer(
        run=job.run,
        keep=job.recipe.train.keep,
        model=job.model,
        args=arguments_of(job, total),
        train_dataset=rows,
        processing_class=job.tokenizer,
        data_collator=CollateTexts(pad_of(job.tokenizer)),
        callbacks=[watch],
    )
