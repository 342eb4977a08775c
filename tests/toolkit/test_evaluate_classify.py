"""Labels by log-likelihood, compared with gold labels and with what needs no language model."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.mini_world import base, base_folder, renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError
from toolkit.evaluate.baselines import baselines, majority, naive_bayes
from toolkit.evaluate.classify import (
    classify,
    classify_talks,
    confusion_markdown,
    label_set,
    likeliest,
    measure_labels,
    scores_of,
)
from toolkit.shipped import shipped

LABELS = ("친구", "상담원", "선생님 말투")


def labelled(text: str, label: str | None) -> Talk:
    return Talk((Turn("user", text), Turn("assistant", label or "?")), f"test:{text}", label)


TALKS = [
    labelled("오늘 뭐 먹지?", "친구"),
    labelled("환불해 주세요", "상담원"),
    labelled("분수가 뭐예요?", "선생님 말투"),
]


def mean_log_likelihood(text: str, label: str) -> float:
    ids = renderer().training(labelled(text, label)).input_ids
    n_prompt = len(renderer().prompt((Turn("user", text),)))
    with torch.no_grad():
        logs = base()(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = [logs[place - 1, ids[place]].item() for place in range(n_prompt, len(ids))]
    return sum(found) / len(found)


def test_probabilities_are_the_softmax_of_the_mean_log_likelihoods() -> None:
    texts = [talk.turns[:-1] for talk in TALKS]
    found = classify(base(), renderer(), texts, LABELS)
    for talk, of in zip(TALKS, found, strict=True):
        wanted = torch.tensor([mean_log_likelihood(talk.turns[0].content, label) for label in LABELS]).softmax(-1)
        assert list(of.values()) == pytest.approx(wanted.tolist(), rel=1e-3)
        assert sum(of.values()) == pytest.approx(1.0) and tuple(of) == LABELS


def test_labels_do_not_depend_on_what_shares_a_batch() -> None:
    texts = [talk.turns[:-1] for talk in TALKS]
    together, alone = (
        classify(base(), renderer(), texts, LABELS),
        classify(base(), renderer(), texts[:1], LABELS, batch_tokens=1),
    )
    assert list(together[0].values()) == pytest.approx(list(alone[0].values()), rel=1e-4)


@pytest.mark.slow
def test_a_model_that_learned_the_labels_gives_them() -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
    rows = [renderer().training(talk) for talk in TALKS]
    steps = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(12):
        for row in rows:
            model(torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.backward()
            steps.step()
            steps.zero_grad()
    after, before = (
        measure_labels(TALKS, classify_talks(m, renderer(), TALKS, LABELS), LABELS) for m in (model, base())
    )
    assert after["accuracy"]["all"] == after["macro f1"]["all"] == 1.0
    assert after["log loss"]["all"] < before["log loss"]["all"]


def test_the_label_set_is_that_of_the_talks() -> None:
    assert label_set([*TALKS, TALKS[0]]) == tuple(sorted(LABELS))


def test_talks_without_labels_or_with_one_alone_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 4 texts have no label"):
        label_set([*TALKS, labelled("안녕", None)])
    with pytest.raises(DataError, match="two or more"):
        label_set(TALKS[:1])
    with pytest.raises(DataError, match="1 of 1 texts"):
        measure_labels([labelled("안녕", None)], [dict.fromkeys(LABELS, 1 / 3)], LABELS)


def test_a_gold_label_that_was_not_learned_is_named() -> None:
    with pytest.raises(DataError, match="반말 요정: not among the labels learned"):
        scores_of(["반말 요정"], [{"친구": 1.0}], ["친구"])


def test_scores_hold_what_was_confused() -> None:
    probabilities = [{"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}, {"a": 0.2, "b": 0.8}]
    found = scores_of(["a", "b", "b"], probabilities, ["a", "b"])
    assert likeliest(probabilities) == ["a", "a", "b"]
    assert found.confusion == ((1, 0), (1, 1)) and found.accuracy == pytest.approx(2 / 3)
    assert set(found.summary()) == {"n", "accuracy", "macro_f1", "log_loss", "calibration_error"}


def test_labels_are_measured_over_all_talks_and_by_language() -> None:
    talks = [
        Talk(talk.turns, talk.source, talk.label, lang) for talk, lang in zip(TALKS, ("ko", "ko", "en"), strict=True)
    ]
    said = [{"친구": 0.8, "상담원": 0.1, "선생님 말투": 0.1}] * 3
    found = measure_labels(talks, said, LABELS)
    assert found["accuracy"] == {"all": pytest.approx(1 / 3), "en": 0.0, "ko": 0.5}
    assert found["confusion"] == {"labels": list(LABELS), "rows": [[1, 0, 0], [1, 0, 0], [1, 0, 0]]}
    assert json.loads(json.dumps(found)) == found


def test_majority_gives_every_text_the_commonest_label() -> None:
    assert majority(["a", "b", "b", "b"], 2, ["a", "b"]) == [{"a": 0.25, "b": 0.75}] * 2


def test_naive_bayes_learns_from_characters_and_gives_unseen_labels_nothing() -> None:
    said = naive_bayes(
        ["좋아요", "맞아요", "좋아", "맞아"],
        ["높임", "높임", "반말", "반말"],
        ["안 좋아요", "안 좋아"],
        ["높임", "반말", "없음"],
    )
    assert likeliest(said) == ["높임", "반말"] and said[0]["없음"] == 0.0
    assert sum(said[0].values()) == pytest.approx(1.0)


def test_the_confusion_is_a_table_with_the_gold_label_in_the_row() -> None:
    page = confusion_markdown({"labels": ["상담원", "a|b"], "rows": [[3, 1], [0, 2]]})
    assert page.splitlines()[0] == r"| gold, given | 상담원 | a\|b |"
    assert page.splitlines()[2:] == ["| 상담원 | 3 | 1 |", r"| a\|b | 0 | 2 |"]


def test_baselines_want_labels() -> None:
    with pytest.raises(DataError, match="1 of 1 texts have no label"):
        baselines([labelled("안녕", None)], TALKS, LABELS)


def test_naive_bayes_tells_the_voices_that_ship_better_than_chance() -> None:
    talks = []
    for voice in ("casual", "polite", "teacher", "listener"):
        path = shipped(f"talk/{voice}.ko.jsonl")
        if not path.is_file():
            pytest.skip(f"{path.name} is not there yet")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        talks += [labelled(row["messages"][0]["content"], voice) for row in rows]
    found = baselines(talks[::2], talks[1::2], label_set(talks))
    assert found["naive Bayes macro f1"] > 0.6 > 0.2 > found["majority macro f1"]
