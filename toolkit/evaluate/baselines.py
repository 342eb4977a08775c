"""What a classifier has to beat: always the commonest label, and naive Bayes over character n-grams.

Both learn from the same training texts, in less than a second for thousands of them.
"""

from collections import Counter
from collections.abc import Sequence

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.naive_bayes import MultinomialNB

from toolkit.corpus.talk import Talk
from toolkit.evaluate.classify import Scores, gold_labels, scores_of


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


def _texts(talks: Sequence[Talk]) -> list[str]:
    return ["\n".join(turn.content for turn in talk.turns if turn.role == "user") for talk in talks]
