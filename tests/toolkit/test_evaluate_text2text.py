"""What is counted in texts written anew, and what they have to beat: by hand, against sacrebleu, in a judge."""

import itertools
import json
import random
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sacrebleu.metrics import BLEU

from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError
from toolkit.evaluate import baselines, metrics
from toolkit.evaluate.baselines import answer_baselines, nearest_answers
from toolkit.evaluate.talk import Prompt, Sample, measure
from toolkit.generate import Sampling
from toolkit.judge import Held, Judge, metrics_of
from toolkit.recipe.model import Recipe
from toolkit.train import main as train

ROOT = Path(__file__).parents[2]
ENGLISH = (["The cat sat on the mat, again.", "a dog"], ["The cat sat on a mat, again!", "the dogs bark"])
KOREAN = (["고양이가 매트 위에 앉았다", "비가 온다"], ["고양이는 매트에 앉았다", "비가 와요"])


def talk(asked: str, answer: str) -> Talk:
    return Talk((Turn("user", asked), Turn("assistant", answer)), f"test:{asked}", lang="ko")


def prompt(asked: str, reference: str | None) -> Prompt:
    return Prompt(asked, (Turn("user", asked),), "ko", reference)


class TestBleu:
    def test_english_is_sacrebleus_own(self) -> None:
        assert metrics.bleu(*ENGLISH) == pytest.approx(BLEU().corpus_score(ENGLISH[0], [ENGLISH[1]]).score)

    def test_korean_is_sacrebleus_over_characters(self) -> None:
        wanted = BLEU(tokenize="char").corpus_score(KOREAN[0], [KOREAN[1]]).score
        assert metrics.bleu(*KOREAN) == pytest.approx(wanted) and wanted > 20

    def test_a_corpus_may_hold_both(self) -> None:
        both = metrics.bleu([*ENGLISH[0], *KOREAN[0]], [*ENGLISH[1], *KOREAN[1]])
        assert min(metrics.bleu(*ENGLISH), metrics.bleu(*KOREAN)) < both < 100

    def test_decomposed_hangul_is_the_same_text(self) -> None:
        apart = [unicodedata.normalize("NFD", text) for text in KOREAN[0]]
        assert metrics.bleu(apart, KOREAN[1]) == metrics.bleu(*KOREAN)
        assert metrics.rouge(apart, KOREAN[1]) == metrics.rouge(*KOREAN)

    @pytest.mark.parametrize("of", [metrics.bleu, metrics.rouge])
    def test_every_answer_needs_a_reference(self, of: Any) -> None:
        for answers, references in (([], []), (["가"], [])):
            with pytest.raises(ValueError, match="one reference"):
                of(answers, references)

    def test_sacrebleu_is_not_loaded_before_it_is_asked(self) -> None:
        import subprocess

        code = "import sys, toolkit.evaluate.talk; print('sacrebleu' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.strip() == "False"


class TestRouge:
    def test_words_by_hand(self) -> None:
        """4 of 4 and 5 words in common, 2 of 3 and 4 pairs, in order 3: the f-measure of precision and recall."""
        found = metrics.rouge(["Police killed the gunman"], ["police the gunman killed today"])
        assert found.rouge_1 == pytest.approx(100 * 2 * 4 / 9)
        assert found.rouge_2 == pytest.approx(100 * 2 * 1 / 7)
        assert found.rouge_l == pytest.approx(100 * 2 * 3 / 9)

    def test_korean_counts_characters_without_spaces(self) -> None:
        found = metrics.rouge(["비가 온다."], ["비가와요"])
        assert found == metrics.Rouge(pytest.approx(50.0), pytest.approx(100 / 3), pytest.approx(50.0))

    def test_it_is_the_mean_over_answers(self) -> None:
        one, other = metrics.rouge(["가나"], ["가나"]), metrics.rouge(["가나"], ["다라"])
        assert (one.rouge_l, other.rouge_l) == (100.0, 0.0)
        assert metrics.rouge(["가나", "가나"], ["가나", "다라"]).rouge_l == 50.0

    def test_nothing_written_is_nothing_found(self) -> None:
        assert metrics.rouge([""], ["비가 온다"]) == metrics.rouge(["..."], ["!!"]) == metrics.Rouge(0.0, 0.0, 0.0)

    def test_the_longest_common_subsequence_is_that_of_the_table(self) -> None:
        draw = random.Random(3)
        for _ in range(50):
            a, b = ("".join(draw.choices("가나다라", k=draw.randrange(0, 90))) for _ in range(2))
            table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
            for i, j in itertools.product(range(len(a)), range(len(b))):
                table[i + 1][j + 1] = table[i][j] + 1 if a[i] == b[j] else max(table[i][j + 1], table[i + 1][j])
            assert metrics._longest_common(a, b) == table[-1][-1]


def test_measured_answers_hold_them_where_there_are_references() -> None:
    found = measure([Sample(prompt("비?", "비가 온다"), "비가 온다", "stop", 3)])
    assert (found.bleu, found.summary()["rouge_l"]) == (pytest.approx(100.0), pytest.approx(100.0))
    bare = measure([Sample(prompt("비?", None), "비가 온다", "stop", 3)]).summary()
    assert not {"chrf", "bleu", "rouge_1", "rouge_2", "rouge_l"} & set(bare)


class TestBaselines:
    LEARNED = (
        talk("오늘 비가 온다", "오늘 비 와"),
        talk("점심을 먹었다", "점심 먹었어"),
        talk("공부를 한다", "공부해"),
    )

    def test_the_nearest_neighbour_answers_as_the_most_similar_text_was(self) -> None:
        asked = ["내일은 비가 온다고 한다", "점심을 아직 못 먹었다"]
        assert nearest_answers(self.LEARNED, asked) == ["오늘 비 와", "점심 먹었어"]

    def test_it_compares_a_few_at_a_time_and_knows_no_more_than_fit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = [one.turns[0].content for one in self.LEARNED] * 3
        wanted = nearest_answers(self.LEARNED, asked)
        monkeypatch.setattr(baselines, "_AT_ONCE", 2)
        assert nearest_answers(self.LEARNED, asked) == wanted and len(set(wanted)) == 3
        monkeypatch.setattr(baselines, "MOST_LEARNED", 2)
        assert set(nearest_answers(self.LEARNED, asked)) == {"오늘 비 와", "공부해"}

    def test_both_are_measured_as_answers_are(self) -> None:
        asked = [prompt("오늘 비가 온다", "오늘 비 와"), prompt("점심을 먹었다", "점심 먹었어"), prompt("몰라?", None)]
        found = answer_baselines(self.LEARNED, asked)
        assert found["nearest neighbour chrf"] == pytest.approx(100.0) == found["nearest neighbour bleu"]
        copied = [one.turns[0].content for one in asked[:2]]
        assert found["copy input rouge l"] == metrics.rouge(copied, ["오늘 비 와", "점심 먹었어"]).rouge_l < 100
        assert len(found) == 2 * 5

    def test_without_references_there_is_nothing_to_compare(self) -> None:
        assert answer_baselines(self.LEARNED, [prompt("몰라?", None)]) == {}

    def test_without_answers_there_is_no_nearest_one(self) -> None:
        with pytest.raises(DataError, match="none of 1 talks ends in an answer"):
            nearest_answers([Talk((Turn("user", "안녕"),), "test:1")], ["안녕"])


class Parrot:
    """A subject that says back what it is asked."""

    def held_out(self, rows: Any, langs: Any) -> None:
        return None

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        return [Sample(prompt, prompt.turns[-1].content, "stop", 3) for prompt in prompts]


def judged(learned: tuple[Talk, ...], wanted: tuple[str, ...]) -> dict[str, Any]:
    base: Any = SimpleNamespace(context=100)
    renderer: Any = SimpleNamespace(prompt=lambda turns: [1, 2, 3])
    held = Held((talk("오늘 비가 온다", "오늘 비 와"), talk("밥을 먹었다", "밥 먹었어")), (), (), (), learned, wanted)
    subject: Any = Parrot()
    return Judge("text2text", base, renderer, held, Sampling(max_tokens=10)).measure(subject)


def test_a_judge_measures_held_out_texts_and_the_baselines_beside_them() -> None:
    found = judged(TestBaselines.LEARNED, ("chrf", "bleu", "rouge"))
    assert {"chrf", "bleu", "rouge 1", "rouge 2", "rouge l", "samples", "baselines"} == set(found)
    assert found["rouge l"]["ko"] == found["rouge l"]["all"] == found["baselines"]["copy input rouge l"]
    assert found["bleu"]["all"] == found["baselines"]["copy input bleu"] < 100
    assert json.loads(json.dumps(found)) == found


def test_without_talk_to_learn_from_there_are_no_baselines_and_no_metric_that_was_not_asked() -> None:
    assert set(judged((), ("rouge",))) == {"rouge 1", "rouge 2", "rouge l", "samples"}


def test_what_writes_text_anew_is_told_how_close_it_came_whatever_is_asked() -> None:
    recipe = Recipe.model_validate(
        {
            "name": "요약",
            "task": "text2text",
            "base": {"model": "spoken-mini"},
            "data": {"train": ["a.jsonl"], "format": {"kind": "columns", "user": "a", "assistant": "b"}},
            "evaluate": {"metrics": ["loss", "chrf"]},
        }
    )
    assert metrics_of(recipe) == ("loss", "chrf", "bleu", "rouge")
    assert metrics_of(recipe.model_copy(update={"task": "chat"})) == ("loss", "chrf")


@pytest.mark.slow
def test_a_run_writes_its_numbers_and_the_baselines_into_run_card_and_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    things = ["비", "눈", "밥", "책", "산", "강", "꽃", "별"]
    rows = [
        {"원문": f"{things[i % 8]} {i * 37 % 101}번은 아주 좋습니다", "다시": f"{things[i % 8]} {i * 37 % 101}번 좋아"}
        for i in range(40)
    ]
    file = tmp_path / "다시.jsonl"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "name: again\ntask: text2text\nbase: {model: spoken-mini}\ntrack: []\n"
        f"data: {{train: ['{file}'], format: {{kind: columns, user: 원문, assistant: 다시}},"
        " clean: {near_duplicates: null}}\n"
        "adapter: {kind: lora, rank: 4}\ntrain: {max_steps: 2, batch_size: 2}\n",
        encoding="utf-8",
    )
    assert train([str(recipe), "--runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    results = json.loads((tmp_path / "again" / "run.json").read_text(encoding="utf-8"))["results"]
    assert results["after"]["baselines"]["nearest neighbour chrf"] > 0
    card = (tmp_path / "again" / "README.md").read_text(encoding="utf-8")
    for number in ("bleu", "rouge l", "copy input rouge l", "nearest neighbour bleu"):
        assert number in out and number in card
