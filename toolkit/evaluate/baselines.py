"""What is to be beaten. A classifier: always the commonest label, and naive Bayes over character n-grams. What writes
text anew: the text as it is, and the answer that was given to the most similar text.

All learn from the same training texts, in less than a second for thousands of them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.naive_bayes import MultinomialNB

from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError, Problem
from toolkit.evaluate import metrics
from toolkit.evaluate.classify import Scores, gold_labels, scores_of
from toolkit.evaluate.talk import Prompt

MOST_LEARNED = 20_000  # talks that nearest neighbour knows: their n-grams have to fit into memory
_AT_ONCE = 64  # texts compared with all that was learned: 64 x 20,000 numbers are 10 MB


def baselines(learned: Sequence[Talk], talks: Sequence[Talk], labels: Sequence[str]) -> dict[str, float]:
    """`baseline_scores` as JSON, flat: "majority accuracy", "naive Bayes macro f1" and so on."""
    return {
        f"{name} {number.replace('_', ' ')}": value
        for name, scores in baseline_scores(learned, talks, labels).items()
        for number, value in scores.summary().items()
        if number != "n"
    }


def baseline_scores(learned: Sequence[Talk], talks: Sequence[Talk], labels: Sequence[str]) -> dict[str, Scores]:
    """Both baselines by name, fitted on the labelled talks `learned` and compared on `talks`.

    Raises: DataError for talks without a label, and where there is nothing to learn from or to compare with.
    """
    known, gold = gold_labels(learned), gold_labels(talks)
    return {
        "majority": scores_of(gold, majority(known, len(gold), labels), labels),
        "naive Bayes": scores_of(gold, naive_bayes(_texts(learned), known, _texts(talks), labels), labels),
    }


def majority(train_labels: Sequence[str], n: int, labels: Sequence[str]) -> list[dict[str, float]]:
    """For each of `n` texts the shares of the labels in training: the commonest wins, whatever the text."""
    counts = Counter(train_labels)
    return [{label: counts[label] / len(train_labels) for label in labels}] * n


def naive_bayes(
    train_texts: Sequence[str], train_labels: Sequence[str], texts: Sequence[str], labels: Sequence[str]
) -> list[dict[str, float]]:
    """Multinomial naive Bayes over the counts of 1 to 3 characters in a row, smoothed by one (Laplace).

    A label that training does not hold gets probability 0.
    """
    counter = CountVectorizer(analyzer="char", ngram_range=(1, 3))
    model = MultinomialNB().fit(counter.fit_transform(train_texts), list(train_labels))
    rows = model.predict_proba(counter.transform(texts))
    return [dict.fromkeys(labels, 0.0) | dict(zip(model.classes_.tolist(), row.tolist(), strict=True)) for row in rows]


def answer_baselines(learned: Sequence[Talk], prompts: Sequence[Prompt]) -> dict[str, float]:
    """Both baselines for answers, measured on those prompts that have a reference: "copy input chrf", "nearest
    neighbour bleu" and so on; empty where none has.

    Raises: DataError where there is nothing to learn from.
    """
    asked = [prompt for prompt in prompts if prompt.reference is not None]
    if not asked:
        return {}
    wanted = [prompt.reference or "" for prompt in asked]
    said = {
        "copy input": [prompt.turns[-1].content for prompt in asked],
        "nearest neighbour": nearest_answers(learned, [_text(prompt.turns) for prompt in asked]),
    }
    found: dict[str, float] = {}
    for name, answers in said.items():
        numbers = {"chrf": metrics.chrf(answers, wanted), "bleu": metrics.bleu(answers, wanted)}
        for number, value in (numbers | asdict(metrics.rouge(answers, wanted))).items():
            found[f"{name} {number.replace('_', ' ')}"] = value
    return found


def nearest_answers(learned: Sequence[Talk], texts: Sequence[str]) -> list[str]:
    """For each text the last answer of the talk whose user's words are most like it: cosine over 1 to 4 characters in
    a row, weighted by how rare they are (tf-idf); the first of several. Of more than MOST_LEARNED talks it knows as
    many, spread evenly.

    Raises: DataError where no talk ends in an answer.
    """
    known = [talk for talk in learned if talk.turns[-1].role == "assistant"]
    known = known[:: -(-len(known) // MOST_LEARNED) or 1]
    if not known:
        says = f"none of {len(learned)} talks ends in an answer, so there is no nearest one. Give talks with answers."
        raise DataError("baselines", [Problem("", says)])
    weigher = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    rows_NG = weigher.fit_transform(_texts(known))  # N talks, G n-grams
    found = []
    for start in range(0, len(texts), _AT_ONCE):
        likeness = weigher.transform(texts[start : start + _AT_ONCE]) @ rows_NG.T
        found += likeness.toarray().argmax(axis=1).tolist()
    return [known[place].turns[-1].content for place in found]


def _texts(talks: Sequence[Talk]) -> list[str]:
    return [_text(talk.turns) for talk in talks]


def _text(turns: Sequence[Turn]) -> str:
    return "\n".join(turn.content for turn in turns if turn.role == "user")
