"""An answer in the making: what is told about its tokens, and rows of a step that do not touch each other."""

import functools
import math
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from toolkit.sampling import Sampling
from toolkit.shipped import shipped
from toolkit.writing import Writing, next_tokens, spelled


@functools.cache
def tokenizer() -> Any:
    folder = shipped("base/spoken-mini")
    if not (folder / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there yet")
    return AutoTokenizer.from_pretrained(folder)


def pieces_of_sentences() -> Any:
    """A tokenizer as SentencePiece ones are: a sign for a space, a token for each byte."""
    vocabulary = {"<unk>": 0, "▁": 1, "▁안녕": 2, "안녕": 3, "a": 4} | {
        f"<0x{byte:02X}>": 5 + byte for byte in range(256)
    }
    made = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def written(tokens: list[int], n_logprobs: int | None = 2, **options: Any) -> Writing:
    """A writing to which these tokens were the likeliest, one after the other."""
    sampling = Sampling(temperature=0.0, max_tokens=50, **options)
    writing = Writing(tokenizer(), [7, 8], sampling, 50, frozenset({4}), n_logprobs=n_logprobs)
    for token in tokens:
        logits_1V = torch.zeros(1, len(tokenizer()))
        logits_1V[0, token] = 3.0
        chosen = next_tokens(logits_1V, [writing])[0]
        assert chosen == token
        writing.take(chosen)
    return writing


def test_the_bytes_of_tokens_join_to_the_text_whatever_they_cut() -> None:
    text = "뷁 아 ㅋㅋ 👍🏽 cafe\u0301 漢字 naïve  두칸"
    ids = tokenizer()(text, add_special_tokens=False)["input_ids"]
    assert b"".join(spelled(tokenizer(), one)[1] for one in ids).decode() == tokenizer().decode(ids)
    told = written(ids).logprobs
    assert [one.id for one in told] == ids and b"".join(one.bytes for one in told).decode() == tokenizer().decode(ids)
    assert any("\ufffd" in one.token for one in told) and any(
        one.token == one.bytes.decode(errors="ignore") for one in told
    )


def test_a_space_that_a_decoder_strips_in_front_is_told() -> None:
    reads = pieces_of_sentences()
    assert spelled(reads, 2) == (" 안녕", " 안녕".encode()) and spelled(reads, 3) == ("안녕", "안녕".encode())
    assert spelled(reads, 5 + 0xEC) == ("\ufffd", b"\xec")


def test_a_special_token_has_its_name() -> None:
    end = tokenizer().convert_ids_to_tokens(4)
    assert spelled(tokenizer(), 4) == (end, end.encode())


def test_log_probabilities_are_those_before_any_penalty() -> None:
    free, bent = written([50, 50]), written([50, 50], frequency_penalty=0.5, repetition_penalty=1.1)
    assert free.logprobs == bent.logprobs and len(free.logprobs[0].top) == 2
    assert free.logprobs[0].logprob == pytest.approx(3.0 - math.log(math.e**3 + len(tokenizer()) - 1), rel=1e-5)


def test_the_end_token_is_not_told_of_and_nothing_is_where_nothing_was_asked() -> None:
    assert [one.id for one in written([50, 4]).answer().logprobs] == [50]
    assert written([50, 51], None).answer().logprobs == ()


def test_penalties_count_what_was_written() -> None:
    assert written([50, 51, 50]).counts == {50: 2, 51: 1} and written([]).read == {7, 8}


def test_a_row_that_is_no_number_gets_no_token_and_touches_nobody() -> None:
    logits_3V = torch.randn(3, len(tokenizer()), generator=torch.Generator().manual_seed(0))
    rows = [Writing(tokenizer(), [7], Sampling(seed=seed), 9, frozenset()) for seed in range(3)]
    wanted = next_tokens(logits_3V, rows)
    logits_3V[1, 5] = math.nan
    assert next_tokens(logits_3V, rows) == [wanted[0], None, wanted[2]]
    assert next_tokens(torch.full((1, 9), math.nan), rows[:1]) == [None]
