"""Held-out loss by hand, answers to fixed prompts, and what is written about them."""

import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mini_world import base, renderer, tokenizer
from toolkit.corpus.render import Rendered
from toolkit.corpus.talk import Talk, Turn
from toolkit.errors import DataError
from toolkit.evaluate.talk import (
    Prompt,
    Sample,
    answer_prompts,
    held_out_loss,
    measure,
    measure_by_language,
    read_prompts,
    samples_markdown,
)
from toolkit.generate import Sampling
from toolkit.shipped import shipped


def talk(*said: str) -> Talk:
    roles = ("user", "assistant") * len(said)
    return Talk(tuple(Turn(role, text) for role, text in zip(roles, said, strict=False)), "test:1")


TALKS = (
    talk("오늘 뭐 먹지?", "칼국수 어때? 날도 쌀쌀한데", "좋아", "그럼 지금 나가자ㅋㅋ"),
    talk("missed the bus again", "Classic. How long till the next one?"),
    talk("심심해", "나도. 산책 갈래?"),
)
LANGS = ("ko", "en", "ko")


def rendered(talks: Sequence[Talk] = TALKS) -> list[Rendered]:
    return list(renderer().training_all(talks))


def by_hand(row: Rendered) -> tuple[float, float, int, int]:
    with torch.no_grad():
        logs = base()(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
    places = [(i, label) for i, label in enumerate(row.labels) if label != -100]
    losses = [(-logs[i - 1, label].item(), row.is_end[i]) for i, label in places]
    content = [loss for loss, end in losses if not end]
    return sum(loss for loss, _ in losses), sum(content), len(losses), len(content)


def test_loss_is_the_sum_over_supervised_tokens_by_their_number() -> None:
    found = held_out_loss(base(), tokenizer(), rendered())
    wanted = [by_hand(row) for row in rendered()]
    assert found.n_tokens == sum(n for _, _, n, _ in wanted)
    assert found.loss == pytest.approx(sum(nll for nll, *_ in wanted) / found.n_tokens, rel=1e-5)
    assert found.content_loss == pytest.approx(
        sum(content for _, content, *_ in wanted) / sum(n for *_, n in wanted), rel=1e-5
    )


def test_bits_per_byte_divide_content_by_the_bytes_of_what_was_said() -> None:
    found = held_out_loss(base(), tokenizer(), rendered())
    n_bytes = sum(len(turn.content.encode()) for one in TALKS for turn in one.turns if turn.role == "assistant")
    content = sum(by_hand(row)[1] for row in rendered())
    assert sum(of.n_bytes for of in found.talks) == n_bytes
    assert found.bits_per_byte == pytest.approx(content / n_bytes / math.log(2), rel=1e-5)


def test_bytes_are_those_of_the_composed_text() -> None:
    loose = tuple(
        Talk(tuple(Turn(t.role, unicodedata.normalize("NFD", t.content)) for t in one.turns), "x") for one in TALKS
    )
    counted = [held_out_loss(base(), tokenizer(), rendered(talks)).talks for talks in (TALKS, loose)]
    assert [of.n_bytes for of in counted[0]] == [of.n_bytes for of in counted[1]]


def test_every_talk_keeps_its_own_sums_whatever_shares_its_batch() -> None:
    together = held_out_loss(base(), tokenizer(), rendered()).talks
    for row, of in zip(rendered(), together, strict=True):
        alone = held_out_loss(base(), tokenizer(), [row], batch_tokens=1).talks[0]
        assert (of.n_tokens, of.n_content, of.n_bytes) == (alone.n_tokens, alone.n_content, alone.n_bytes)
        assert (of.nll, of.content_nll) == pytest.approx((alone.nll, alone.content_nll), rel=1e-5)


def test_languages_are_parts_of_the_whole() -> None:
    found = held_out_loss(base(), tokenizer(), rendered(), LANGS)
    parts = found.by_language()
    assert {lang: len(part.talks) for lang, part in parts.items()} == {"en": 1, "ko": 2}
    assert sum(part.n_tokens for part in parts.values()) == found.n_tokens
    assert found.summary()["n_talks"] == 3


def test_running_text_is_measured_from_its_second_token_on() -> None:
    text = Talk((Turn("text", "오늘은 비가 온다."),), "x")
    found = held_out_loss(base(), tokenizer(), rendered([text]))
    assert found.talks[0].n_bytes == len("오늘은 비가 온다.".encode())


def test_rows_dropped_by_rendering_are_left_out_and_none_left_is_an_error() -> None:
    dropped = Rendered([], [], [], "too_long")
    assert len(held_out_loss(base(), tokenizer(), [dropped, *rendered()], [None, *LANGS]).talks) == 3
    with pytest.raises(DataError, match="none of 1 rows"):
        held_out_loss(base(), tokenizer(), [dropped])


def test_prompts_that_ship_can_be_read() -> None:
    if not shipped("probes.jsonl").is_file():
        pytest.skip("data/probes.jsonl is not there yet")
    prompts = read_prompts("maltu:probes.jsonl")
    assert len(prompts) > 10 and {prompt.lang for prompt in prompts} == {"ko", "en"}
    assert any(prompt.reference for prompt in prompts)


def test_prompts_come_as_messages_or_as_a_text(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"id": "one", "lang": "ko", "messages": [{"role": "user", "content": "안녕"}], "reference": "안녕!"},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hey"}]},
        {"prompt": "뭐 해?"},
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    first, second, third = read_prompts(str(path))
    assert first == Prompt("one", (Turn("user", "안녕"),), "ko", "안녕!")
    assert (second.turns, second.reference, second.lang) == ((Turn("user", "hi"),), "hey", None)
    assert (third.turns, third.lang) == ((Turn("user", "뭐 해?"),), "ko")


def test_prompts_that_cannot_be_read_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    bad = ['{"messages": "안녕"}', '{"question": "?"}', '{"messages": [{"role": "bot", "content": "x"}]}']
    path.write_text("\n".join([*bad, '{"messages": []}', '{"prompt": "안녕"}']), encoding="utf-8")
    with pytest.raises(DataError, match=r"4 problems(.|\n)*:1(.|\n)*:2(.|\n)*:3(.|\n)*:4(.|\n)*no turn to answer"):
        read_prompts(str(path))


def asked(*texts: str) -> list[Prompt]:
    return [Prompt(f"p{i}", (Turn("user", text),), "ko", None) for i, text in enumerate(texts)]


def test_prompts_are_answered_in_their_order_and_end_by_themselves() -> None:
    sampling = Sampling(temperature=0.7, max_tokens=60)
    prompts = asked("안녕", "오늘 뭐 먹지?", "심심해")
    samples = answer_prompts(base(), tokenizer(), renderer(), prompts, sampling)
    assert [sample.prompt for sample in samples] == prompts
    assert all(sample.answer and sample.n_tokens for sample in samples)
    assert samples[0] == answer_prompts(base(), tokenizer(), renderer(), prompts[:1], sampling)[0]
    assert not any("<|" in sample.answer for sample in samples)


def test_an_answer_that_does_not_end_is_known_as_cut() -> None:
    found = answer_prompts(
        base(), tokenizer(), renderer(), asked("오늘 뭐 먹지?"), Sampling(temperature=0.0, max_tokens=1)
    )
    assert (found[0].finish, found[0].n_tokens) == ("length", 1)


def sample(answer: str, finish: Any = "stop", reference: str | None = None, lang: str = "ko") -> Sample:
    return Sample(Prompt("p", (Turn("user", "안녕"),), lang, reference), answer, finish, 5)


def test_what_is_measured_is_what_the_answers_hold() -> None:
    samples = [
        sample("좋아. 가자!", reference="좋아. 가자!"),
        sample("네, 좋아요", "length"),
        sample("Sure.", lang="en"),
    ]
    found = measure(samples)
    assert (found.n, found.ended, found.mean_tokens, found.repetition) == (3, 2 / 3, 5.0, 0.0)
    assert found.chrf == pytest.approx(100.0)
    assert found.sentences == {"banmal": 2 / 3, "haeyo": 1 / 3, "hapsyo": 0.0}
    assert found.answers == {"banmal": 0.5, "haeyo": 0.5, "hapsyo": 0.0}
    assert found.summary()["sentences_banmal"] == 2 / 3
    assert {lang: of.n for lang, of in measure_by_language(samples).items()} == {"en": 1, "ko": 2}


def test_chrf_needs_references_and_takes_given_ones() -> None:
    assert measure([sample("안녕")]).chrf is None and "chrf" not in measure([sample("안녕")]).summary()
    assert measure([sample("안녕")], ["안녕"]).chrf == pytest.approx(100.0)


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(DataError, match="no answer"):
        measure([])


def test_samples_show_every_prompt_before_and_after() -> None:
    page = samples_markdown([sample("네.", reference="응!")], [sample("```\n응\n``` 그래", "length")])
    assert "user      안녕" in page and "before    네." in page and "person    응!" in page
    assert "````text" in page and "(cut after 5 tokens)" in page


def test_samples_of_other_prompts_are_refused() -> None:
    other = Sample(Prompt("q", (Turn("user", "hi"),)), "hey", "stop", 1)
    with pytest.raises(ValueError, match="answers p before and q after"):
        samples_markdown([sample("네")], [other])
