"""docs/reference/metrics.md, written from here: every number that a run measures, what it is and where it comes from.

python -m toolkit.evaluate.reference > docs/reference/metrics.md
"""

import sys
from dataclasses import dataclass

from toolkit.recipe.fields import table


@dataclass(frozen=True)
class Measure:
    """What one word of `evaluate.metrics` stands for.

    metric: the word. numbers: the names under which tables, run.json and (as test/NAME, with _ for spaces)
    metrics.jsonl show it. task: chat, classify, text2text, or any. better: lower, higher, or what else to look for.
    """

    metric: str
    numbers: tuple[str, ...]
    task: str
    better: str
    formula: str
    says: str
    source: str


MEASURES = (
    Measure(
        "loss",
        ("loss", "content loss"),
        "any",
        "lower",
        "-sum log p(token | what stands before it) / number of tokens, in nats",
        "Over the supervised tokens of the held-out talk: what the assistant says, its end of turn included; "
        "`content loss` leaves the end of turn out. Comparable between runs on one base only.",
        "cross-entropy; nothing is smoothed",
    ),
    Measure(
        "bits_per_byte",
        ("bits per byte",),
        "any",
        "lower",
        "-sum log p(content token) / UTF-8 bytes of the NFC content / ln 2",
        "The same over the bytes that were said, so that bases with other tokenizers can be compared.",
        "Gao et al., The Pile, arXiv 2101.00027",
    ),
    Measure(
        "chrf",
        ("chrf",),
        "chat, text2text",
        "higher (0 to 100)",
        "5 P R / (4 P + R), P and R averaged over character n-grams of 1 to 6",
        "How near answers are to the reference answers, where prompts have some.",
        "Popović, chrF, WMT 2015; computed by sacrebleu",
    ),
    Measure(
        "bleu",
        ("bleu",),
        "chat, text2text",
        "higher (0 to 100)",
        "brevity penalty · geometric mean of the precisions of 1- to 4-grams, exponentially smoothed",
        "Over sacrebleu's 13a tokens; over single characters where the reference holds Hangul.",
        "Papineni et al., BLEU, ACL 2002; computed by sacrebleu",
    ),
    Measure(
        "rouge",
        ("rouge 1", "rouge 2", "rouge l"),
        "chat, text2text",
        "higher (0 to 100)",
        "200 · common / (units said + units wanted), the mean over answers",
        "Common units, pairs of units, and the longest common subsequence; units as for bleu, in lower case.",
        "Lin, ROUGE, 2004",
    ),
    Measure(
        "distinct_2",
        ("distinct 2",),
        "chat, text2text",
        "higher: more varied",
        "different pairs of units / all pairs of units, over all answers together",
        "A unit is a word or a punctuation mark. It falls as there are more answers: compare equal prompts only.",
        "Li et al., A Diversity-Promoting Objective Function, arXiv 1510.03055",
    ),
    Measure(
        "repetition",
        ("repetition",),
        "chat, text2text",
        "lower (0 to 1)",
        "1 - different 4-grams of an answer / its 4-grams, over all answers together",
        "0 says nothing twice, near 1 runs in a circle.",
        "rep-4 of Welleck et al., Neural Text Generation with Unlikelihood Training, arXiv 1908.04319",
    ),
    Measure(
        "length",
        ("mean tokens",),
        "chat, text2text",
        "near what the talk has",
        "tokens of all answers / answers",
        "Answers are cut at 60 tokens while measuring.",
        "a count",
    ),
    Measure(
        "ends",
        ("ended",),
        "chat, text2text",
        "higher (0 to 1)",
        "answers that end by themselves / answers",
        "The rest was cut at 60 tokens.",
        "a count",
    ),
    Measure(
        "levels",
        tuple(f"{of} {level}" for of in ("sentences", "answers") for level in ("banmal", "haeyo", "hapsyo")),
        "chat, text2text; Korean",
        "as the voice wants it",
        "sentences (answers) of that level / those whose level can be told",
        "반말, 해요체, 합쇼체 by a table of endings. An answer has a level if all its sentences that have one agree; "
        "what the three lack to 1 mixes levels.",
        "toolkit/evaluate/levels.py; its rules are there to be read",
    ),
    Measure(
        "spoken",
        ("spoken sentences", "spoken bits per byte", "written bits per byte"),
        "chat, text2text; Korean, English",
        "sentences: higher; spoken bits below written bits",
        "sentences scored above one half / sentences; bits per byte on either side of the shipped pairs",
        "Whether answers are said as people speak, and whether spoken text comes easier to the model than written text "
        "that says the same.",
        "toolkit/bases/spoken.py; how good it is: docs/claims.md",
    ),
    Measure(
        "accuracy",
        ("accuracy",),
        "classify",
        "higher (0 to 1)",
        "right labels / labels",
        "A confusion matrix comes with it.",
        "a count",
    ),
    Measure(
        "macro_f1",
        ("macro f1",),
        "classify",
        "higher (0 to 1)",
        "mean over labels of 2 right / (said + gold)",
        "Every label counts alike, however rare; one that is neither said nor gold is left out.",
        "van Rijsbergen, Information Retrieval, 1979",
    ),
    Measure(
        "log_loss",
        ("log loss", "calibration error"),
        "classify",
        "lower",
        "-mean log p(gold label); sum over 10 bins of share · |accuracy - mean confidence|",
        "How sure it is where it is right, and whether 80 % sure is right in 80 %.",
        "Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599",
    ),
)
# Names that stand in metrics.jsonl while a run learns.
WHILE_LEARNING = (
    ("loss", "of the optimizer step: nats per supervised token"),
    ("grad_norm", "length of the gradient before it is shortened to train.max_grad_norm"),
    ("learning_rate", "of the step"),
    ("valid_loss", "nats per supervised token of the `valid` part, every train.evaluate_every epochs"),
)
_HEAD = """# Metrics

Written by `python -m toolkit.evaluate.reference > docs/reference/metrics.md`; a test keeps it true. A recipe asks for
them by the word in the first column (`evaluate: {metrics: [loss, chrf]}`); tables, `run.json` and reports show them by
the names in the second, by language (ko, en) where there are several, before and after. In `metrics.jsonl` a name is
written `test/NAME` or `test/NAME_LANG`, with `_` for spaces. What a running server tells Prometheus is in
[api.md](api.md#prometheus)."""
_LEARNING = """## While a run learns

In `metrics.jsonl`, a line a step, with `step` and `time` (seconds since 1970):"""
_BASELINES = """## Baselines

A classifier is told beside `majority` (always the commonest label) and `naive Bayes` (over counts of 1 to 3 characters
in a row); text2text beside `copy input` (the text as it is) and `nearest neighbour` (the answer to the most similar
text that was learned). They stand in front: `majority accuracy`, `nearest neighbour chrf`."""


def document() -> str:
    """The page."""
    rows = [
        (f"`{one.metric}`", ", ".join(f"`{name}`" for name in one.numbers), one.task, one.better) for one in MEASURES
    ]
    parts = [_HEAD, table(("metric", "numbers", "task", "better"), rows)]
    for one in MEASURES:
        parts.append(f"### {one.metric}\n\n{one.says}\n\n    {one.formula}\n\nSource: {one.source}.")
    learning = [(f"`{name}`", says) for name, says in WHILE_LEARNING]
    parts += [_LEARNING, table(("name", "what it is"), learning), _BASELINES]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page to standard output."""
    sys.stdout.write(document())


if __name__ == "__main__":
    main()
