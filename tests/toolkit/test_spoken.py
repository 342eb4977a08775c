"""How spoken is a text, and a model: right sides in both languages, at every length, and nothing where nothing is."""

import functools
import json
import math
import shutil
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from toolkit.bases.spoken import (
    FACTS,
    REBUILD,
    WEIGHTS,
    load,
    manner,
    manner_by_language,
    score_texts,
    score_with_language,
    scorer,
    sentences,
    spoken_score,
)
from toolkit.bases.spoken_features import LANGUAGES, Language, language_of, names, plain, sides, signs
from toolkit.bases.spoken_train import fit_logistic, learn, read_material, write
from toolkit.corpus.render import Renderer
from toolkit.corpus.talk import Turn
from toolkit.errors import BaseError, DataError, InputError
from toolkit.evaluate.spoken import (
    Pair,
    bits_on_pairs,
    read_pairs,
    some_pairs,
    spoken_numbers,
    spoken_sentences,
)
from toolkit.evaluate.talk import Prompt, Sample
from toolkit.generate import Sampling
from toolkit.judge import Held, Judge, tracked_numbers
from toolkit.recipe.model import Evaluate
from toolkit.shipped import shipped

ROOT = Path(__file__).parents[2]
SPOKEN = {
    "ko": [
        "나 지금 완전 배고파",
        "그거 진짜 재밌더라ㅋㅋ 너도 꼭 봐",
        "혹시 내일 시간 되세요? 같이 밥 먹어요.",
        "아니 근데 왜 나한테 말 안 했어? 어제 하루 종일 기다렸잖아. 다음엔 꼭 먼저 전화해 줘.",
    ],
    "en": [
        "yeah i guess so",
        "I can't believe you didn't tell me about it!",
        "Do you wanna grab something to eat later?",
        "Oh, I totally forgot. I was gonna call you but my phone died, so I just went home. Sorry about that!",
    ],
}
WRITTEN = {
    "ko": [
        "참가 신청 마감",
        "정부는 내년도 예산안을 확정하였다.",
        "본 제품은 직사광선을 피하여 보관하여야 한다.",
        "최근 조사에 따르면 해당 지역의 인구는 지속적으로 감소하고 있으며, 이로 인한 학교의 통폐합이 "
        "증가하는 것으로 나타났다.",
    ],
    "en": [
        "rising costs of regional transport",
        "The committee approved the proposal by a narrow majority.",
        "The construction of the bridge was delayed owing to a shortage of materials.",
        "According to the report, the population of the region has declined steadily, resulting in the closure of "
        "several educational institutions.",
    ],
}
EVERY = [(lang, text) for lang in ("ko", "en") for text in (*SPOKEN[lang], *WRITTEN[lang])]


@pytest.mark.parametrize(("lang", "text"), [(lang, text) for lang in SPOKEN for text in SPOKEN[lang]])
def test_speech_is_called_spoken_short_and_long(lang: str, text: str) -> None:
    assert spoken_score(text, lang) > 0.5


@pytest.mark.parametrize(("lang", "text"), [(lang, text) for lang in WRITTEN for text in WRITTEN[lang]])
def test_writing_is_called_written_short_and_long(lang: str, text: str) -> None:
    assert spoken_score(text, lang) < 0.5


@pytest.mark.parametrize(("lang", "text"), EVERY)
def test_punctuation_and_case_count_for_nothing(lang: str, text: str) -> None:
    bare = "".join(sign if sign.isalnum() or sign in " '" else " " for sign in text)
    assert score_texts([bare.upper(), f"«{text}»!!", f"{bare}..."], lang) == [spoken_score(text, lang)] * 3


@pytest.mark.parametrize("text", SPOKEN["ko"])
def test_decomposed_hangul_scores_like_composed(text: str) -> None:
    assert spoken_score(unicodedata.normalize("NFD", text)) == spoken_score(text)


def test_the_language_is_guessed_from_the_script() -> None:
    assert language_of("ㅋㅋㅋ OK") == "ko"
    assert language_of("ok그래") == "ko"
    assert language_of("see you at 8") == "en"
    assert [language_of(text) for text in ("今日は雨だ", "Привет, ok", "12:30 😀", "")] == [None] * 4
    for lang, text in EVERY:
        assert spoken_score(text) == spoken_score(text, lang)


def test_where_there_is_nothing_to_judge_the_score_is_not_a_number() -> None:
    assert all(math.isnan(score) for score in score_texts(["", "  \n", "?!…", "😀", "今日は雨だ"]))
    assert math.isnan(spoken_score("…", "ko"))
    assert score_with_language(["今日は雨だ"])[0][0] is None


@pytest.mark.parametrize("lang", ["ja", "KO", "korean", ""])
def test_an_unknown_language_is_refused_with_those_that_are_known(lang: str) -> None:
    with pytest.raises(InputError, match="Name ko or en") as caught:
        spoken_score("안녕", lang)
    assert caught.value.exit_code == 2


def test_no_sign_weighs_for_the_other_side() -> None:
    for lang in LANGUAGES:
        weights = scorer(lang).weights
        assert len(weights) == len(names(lang)) == len(sides(lang))
        assert len(set(names(lang))) == len(names(lang))
        assert all(weight * side >= 0 for weight, side in zip(weights.tolist(), sides(lang), strict=True))
        assert np.count_nonzero(weights) > 10


def test_why_a_text_scored_adds_up_to_its_score() -> None:
    one = scorer("ko")
    parts = one.why("그거 진짜 재밌더라ㅋㅋ")
    logit = sum(part for _, part in parts) + one.bias
    assert spoken_score("그거 진짜 재밌더라ㅋㅋ", "ko") == pytest.approx(1 / (1 + math.exp(-logit)))
    assert parts[0][1] > 0 and abs(parts[0][1]) >= abs(parts[-1][1])


def test_signs_are_rates_so_that_saying_it_twice_hardly_matters() -> None:
    once, twice = (np.array(signs(plain(text), "en")) for text in ("I don't know yet", "I don't know yet " * 20))
    assert np.abs(once - twice).max() < 0.5


def test_sentences_are_cut_at_marks_and_lines_but_not_inside_numbers() -> None:
    assert sentences("그래? 3.5점이야… 알았어!ㅋㅋ\n끝") == ["그래", "3.5점이야", "알았어!ㅋㅋ", "끝"]
    assert sentences("?! 123") == []


def test_a_manner_counts_what_could_not_be_scored() -> None:
    found = manner([0.9, 0.4, math.nan, 0.5])
    assert (found.n, found.n_other) == (3, 1)
    assert (found.mean, found.share) == (pytest.approx(0.6), pytest.approx(2 / 3))
    assert manner([math.nan]).as_json() == {"n": 0, "n_other": 1, "mean": None, "share": None}


def test_a_language_that_nobody_speaks_stands_in_no_table() -> None:
    assert set(manner_by_language([("ko", 0.9), (None, math.nan)])) == {"all", "ko"}


def test_what_ships_is_small_and_says_what_it_reached() -> None:
    folder = shipped("spoken")
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_000_000
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    for lang in LANGUAGES:
        assert facts[lang]["measured"]["pairs"] > 0.95
        assert facts[lang]["measured"]["4 words"] > 0.85


@pytest.mark.parametrize("room", ["toolkit.bases.spoken", "toolkit.spoken"])
def test_scoring_loads_neither_torch_nor_scikit_learn(room: str) -> None:
    code = (
        f"import sys, {room}; from toolkit.bases.spoken import spoken_score; spoken_score('안녕'); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "numpy" in loaded and not loaded & {"torch", "transformers", "sklearn", "scipy", "datasets"}


@pytest.mark.parametrize("damage", ["absent", "half", "no json", "other numbers", "other version"])
def test_a_damaged_folder_is_named_with_the_command_that_rebuilds_it(damage: str, tmp_path: Path) -> None:
    folder = tmp_path / "spoken"
    shutil.copytree(shipped("spoken"), folder)
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    if damage == "absent":
        (folder / WEIGHTS).unlink()
    elif damage == "half":
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])
    elif damage == "no json":
        (folder / FACTS).write_text("[1]")
    elif damage == "other numbers":
        facts["en"]["numbers"].popitem()
        (folder / FACTS).write_text(json.dumps(facts))
    else:
        (folder / FACTS).write_text(json.dumps(facts | {"version": 99}))
    with pytest.raises(BaseError, match="Rebuild it") as caught:
        load(folder)
    assert REBUILD in str(caught.value) and str(folder) in str(caught.value)


def test_a_weight_is_held_on_its_side_and_the_rest_is_at_its_best() -> None:
    draw = np.random.default_rng(0)
    x_NF = draw.normal(size=(400, 4))
    y_N = (x_NF @ [2.0, -1.0, -1.5, 0.5] + draw.normal(size=400) > 0).astype(float)
    weights_N, side = draw.uniform(0.5, 1.5, 400), [1, 1, 0, -1]
    w_F = fit_logistic(x_NF, y_N, weights_N, side, ridge=2.0)
    chance_N = 1 / (1 + np.exp(-(x_NF @ w_F[:-1] + w_F[-1])))
    slope_F = x_NF.T @ (weights_N * (chance_N - y_N)) + 2.0 * w_F[:-1]
    assert w_F[1] == 0.0 and w_F[3] == 0.0  # both would go to the other side
    assert slope_F[1] > 0 and slope_F[3] < 0
    assert np.abs(slope_F[[0, 2]]).max() < 1e-4


def test_a_weight_that_would_turn_over_on_the_way_stops_at_nothing() -> None:
    draw = np.random.default_rng(1)
    one_N = draw.normal(size=400)
    other_N = one_N + 0.3 * draw.normal(size=400)  # goes with y by itself, against it beside the first
    y_N = (3 * one_N - 2 * other_N + 0.5 * draw.normal(size=400) > 0).astype(float)
    w_F = fit_logistic(np.stack([one_N, other_N], axis=1), y_N, np.ones(400), [1, 1], ridge=1.0)
    assert w_F[0] > 1 and w_F[1] == 0.0


def small_material(lang: Language) -> Any:
    material = read_material(lang)
    return replace(material, pairs=material.pairs[:60], dialogues=material.dialogues[:40])


def test_the_same_data_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write([learn(small_material(lang), 3) for lang in LANGUAGES], tmp_path / name, 3)
    for file in (FACTS, WEIGHTS):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_was_written_scores_like_what_was_learned(tmp_path: Path) -> None:
    learned = {lang: learn(small_material(lang)) for lang in LANGUAGES}
    write(list(learned.values()), tmp_path, 0)
    opened = load(tmp_path)
    for lang, text in EVERY:
        one: Language = "ko" if lang == "ko" else "en"
        chances = np.array([scorer.score(text) for scorer in (opened[one], learned[one].scorer)])
        logits = np.log(chances / (1 - chances))
        assert logits[0] == pytest.approx(logits[1], abs=0.03)


@pytest.mark.slow
def test_what_ships_is_what_the_command_rebuilds(tmp_path: Path) -> None:
    write([learn(read_material(lang)) for lang in LANGUAGES], tmp_path, 0)
    for lang, rebuilt in load(tmp_path).items():
        own = scorer(lang)
        assert np.allclose(rebuilt.weights, own.weights, atol=2e-3)  # another machine may round otherwise
        assert rebuilt.tables == own.tables


def test_without_spoken_data_nothing_is_learned_and_the_file_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.bases.spoken_train.shipped", lambda name: tmp_path / name)
    with pytest.raises(DataError, match=r"register\.ko\.jsonl") as caught:
        read_material("ko")
    assert caught.value.exit_code == 2
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "register.ko.jsonl").write_text("")
    with pytest.raises(DataError, match="holds no rows"):
        read_material("ko")


# A model


@functools.cache
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(shipped("base/spoken-mini"), dtype=torch.float32).eval()


@functools.cache
def renderer() -> Renderer:
    tokenizer = AutoTokenizer.from_pretrained(shipped("base/spoken-mini"))
    return Renderer(tokenizer, tokenizer.chat_template, max_length=128)


def bits(pairs: list[Pair], **how: Any) -> Any:
    return bits_on_pairs(base(), renderer()._tokenizer, renderer(), pairs, **how)


@pytest.mark.parametrize("as_answer", [True, False])
def test_the_shipped_base_expects_speech_in_both_languages(as_answer: bool) -> None:
    found = bits(some_pairs(read_pairs(), 20), as_answer=as_answer)
    assert {lang: of.n for lang, of in found.items()} == {"all": 40, "ko": 20, "en": 20}
    assert all(of.margin > 0 for of in found.values())


def test_the_same_text_on_both_sides_leaves_no_margin() -> None:
    found = bits([Pair("ko", "오늘 뭐 먹지?", "오늘 뭐 먹지?")])
    assert found["ko"].margin == 0.0 and found["all"].spoken > 0


def test_a_pair_that_does_not_fit_is_left_out_on_both_sides_and_none_left_is_an_error() -> None:
    fits, too_long = Pair("ko", "비 온다", "비가 온다."), Pair("ko", "비 온다 " * 200, "비가 온다.")
    other_side = Pair("ko", too_long.written, too_long.spoken)
    assert bits([too_long, fits, other_side])["all"] == bits([fits])["all"]
    with pytest.raises(DataError, match="none of 1 pairs"):
        bits([too_long])


def test_pairs_are_read_with_every_bad_row_named(tmp_path: Path) -> None:
    file = tmp_path / "짝.jsonl"
    rows = [{"spoken": "비 와", "written": "비가 온다."}, {"spoken": "비 와"}, {"spoken": " ", "written": "온다"}]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    with pytest.raises(DataError) as caught:
        read_pairs([str(file)])
    assert [problem.where.rsplit(":", 1)[1] for problem in caught.value.problems] == ["2", "3"]
    file.write_text(json.dumps(rows[0], ensure_ascii=False))
    assert read_pairs([str(file)]) == [Pair("ko", "비 와", "비가 온다.")]


def test_some_pairs_are_spread_over_all_of_them() -> None:
    pairs = [Pair("ko", str(number), "x") for number in range(10)] + [Pair("en", "a", "b")]
    assert [pair.spoken for pair in some_pairs(pairs, 5)] == ["0", "2", "4", "6", "8", "a"]


def answered(lang: str, answer: str) -> Sample:
    return Sample(Prompt("1", (Turn("user", "?"),), lang), answer, "stop", 3)


def test_an_answer_that_slides_into_writing_is_seen() -> None:
    samples = [
        answered("ko", "나 지금 완전 배고파. 정부는 내년도 예산안을 확정하였다."),
        answered("en", "I can't believe you didn't tell me!"),
    ]
    found = spoken_sentences(samples)
    assert (found["ko"].n, found["ko"].share, found["en"].share) == (2, 0.5, 1.0)
    assert found["all"].share == pytest.approx(2 / 3)


def test_numbers_that_were_not_measured_are_left_out() -> None:
    assert spoken_numbers([], {}) == {}
    only = spoken_numbers([answered("ko", "나 배고파"), answered("en", "…")], {})
    assert only == {"spoken sentences": {"all": 1.0, "ko": 1.0}}
    sides_of = {"ko": SimpleNamespace(spoken=2.0, written=2.5)}
    found = spoken_numbers([], sides_of)  # type: ignore[arg-type]
    assert found == {"spoken bits per byte": {"ko": 2.0}, "written bits per byte": {"ko": 2.5}}


@pytest.mark.parametrize("lang", ["ko", "en"])
def test_the_metric_spoken_measures_answers_and_pairs_in_the_languages_at_hand(
    lang: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolkit.judge.N_PAIRS", 5)
    own = SimpleNamespace(model=base(), tokenizer=renderer()._tokenizer, context=256)
    prompts = tuple(Prompt(str(number), (Turn("user", "안녕 hi"),), lang) for number in range(3))
    held = Held((), (), prompts, (), (), ("spoken",))
    judge = Judge("chat", own, renderer(), held, Sampling(max_tokens=12, seed=0))  # type: ignore[arg-type]
    found = judge.measure(base())
    assert set(found) == {"spoken sentences", "spoken bits per byte", "written bits per byte", "samples"}
    assert set(found["spoken bits per byte"]) == {"all", lang}
    assert 0.0 <= found["spoken sentences"][lang] <= 1.0
    assert f"test/spoken_sentences_{lang}" in tracked_numbers(found)


def test_a_recipe_may_ask_for_it() -> None:
    assert Evaluate(metrics=("spoken",)).metrics == ("spoken",)
