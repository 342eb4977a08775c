"""`chat`: turns from a pipe and from a terminal, commands, a context that fills up, an answer that is stopped."""

import argparse
import io
import os
import signal
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from toolkit import chat, loaded
from toolkit.bases.load import load_base
from toolkit.bundle import Run
from toolkit.combine import speaker
from toolkit.corpus.render import Renderer
from toolkit.corpus.talk import Turn
from toolkit.errors import InputError
from toolkit.generate import Sampling
from toolkit.loaded import LoadedRun
from toolkit.recipe.model import Base
from toolkit.shipped import shipped


@pytest.fixture(scope="module")
def casual() -> LoadedRun:
    """A run as it is opened, without an adapter: what is said does not matter here."""
    if not (shipped("base/spoken-mini") / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there")
    base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
    renderer = Renderer(base.tokenizer, base.template)
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 12}
    return LoadedRun(Run(Path("casual")), {}, base, base.model, renderer, sampling, frozenset(renderer.stop_ids), ())


@pytest.fixture
def piped(casual: LoadedRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `chat` over lines from a pipe: (exit code, answers, what was told, how runs were opened)."""

    def run(text: bytes, *options: str) -> tuple[int, list[str], str, list[bool]]:
        opened: list[bool] = []

        def load_run(path: Path, device: str, adapter: str, *, with_adapter: bool) -> LoadedRun:
            opened.append(with_adapter)
            return casual

        monkeypatch.setattr(loaded, "load_run", load_run)
        monkeypatch.setattr(speaker, "speaks", lambda path: False)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
        parser = argparse.ArgumentParser()
        chat.add_arguments(parser)
        code = chat.chat(parser.parse_args(["casual", *options]))
        said = capsys.readouterr()
        return code, said.out.splitlines(), said.err, opened

    return run


def conversation(casual: LoadedRun, **sampling: Any) -> chat.Conversation:
    return chat.Conversation(casual, Sampling(**{"temperature": 0.0, "max_tokens": 12} | sampling))


def test_a_pipe_gets_one_answer_a_line(piped: Any) -> None:
    code, answers, told, _ = piped("오늘 뭐 먹지?\n\n왜?\n".encode(), "--temperature", "0")
    assert code == 0 and len(answers) == 2 and all(answers)
    assert "casual on spoken-mini" in told


def test_a_seed_says_the_same_again(piped: Any) -> None:
    assert piped("안녕\n".encode(), "--seed", "3")[1] == piped("안녕\n".encode(), "--seed", "3")[1]


def test_quit_ends_and_leaves_the_rest_unread(piped: Any) -> None:
    assert piped("/quit\n안녕\n".encode())[1] == []


def test_an_unknown_command_is_told_and_answered_by_nobody(piped: Any) -> None:
    _, answers, told, _ = piped(b"/nope\n")
    assert answers == [] and "/nope" in told and "/clear" in told


def test_base_changes_who_answers_and_opens_it_once(piped: Any) -> None:
    _, answers, told, opened = piped("/base\n안녕\n/base\n/base\n".encode())
    assert len(answers) == 1 and opened == [True, False] and "the bare base spoken-mini" in told
    assert piped(b"", "--base")[3] == [False]


def test_a_byte_order_mark_and_broken_bytes_do_not_stop_the_talk(piped: Any) -> None:
    assert len(piped(b"\xef\xbb\xbf/quit\n")[1]) == 0
    assert len(piped(b"\xff\xfe hello\n")[1]) == 1


def test_options_out_of_range_are_refused(piped: Any) -> None:
    with pytest.raises(InputError, match="2 problems"):
        piped(b"", "--temperature", "-1", "--max-tokens", "0")


def test_what_is_said_becomes_turns_in_composed_letters(casual: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(casual)
    chat._exchange(talk, unicodedata.normalize("NFD", "오늘 뭐 먹지?"))
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] and talk.turns[0].content == "오늘 뭐 먹지?"
    assert capsys.readouterr().out == f"{talk.turns[1].content}\n"


def test_clear_forgets_the_turns_and_keeps_the_system_turn(casual: LoadedRun) -> None:
    talk = replace(conversation(casual), system="짧게 답해.")
    talk.turns.append(Turn("user", "안녕"))
    alone = talk.prompt()
    talk.turns[:0] = [Turn("user", "옛날"), Turn("assistant", "이야기")]
    talk.clear()
    talk.turns.append(Turn("user", "안녕"))
    assert talk.prompt() == alone


def test_the_oldest_turns_are_left_out_when_the_context_is_full_and_it_says_so_once(
    casual: LoadedRun, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = replace(conversation(casual), system="짧게 답해.")
    for i in range(12):
        chat._exchange(talk, f"{i}번째 이야기야. " + "어제 친구랑 밥을 먹었어. " * 8)
    ids = talk.prompt()
    assert len(ids) <= casual.base.context - 12 and "짧게 답해" in casual.base.tokenizer.decode(ids)
    assert talk.turns[0].role == "user" and not talk.turns[0].content.startswith("0번째")
    assert capsys.readouterr().err.count("left out") == 1


def test_a_turn_that_is_too_long_alone_is_taken_back(casual: LoadedRun, capsys: pytest.CaptureFixture[str]) -> None:
    talk = conversation(casual)
    chat._exchange(talk, "가나다라 " * 2000)
    assert talk.turns == [] and "Say less at once" in capsys.readouterr().err


def test_a_stopped_answer_keeps_what_was_said(casual: LoadedRun) -> None:
    talk = conversation(replace(casual, ends=frozenset()), max_tokens=50)
    talk.turns.append(Turn("user", "안녕"))
    heard: list[str] = []
    for piece in talk.answer(lambda: len(heard) >= 3):
        heard.append(piece)
    assert talk.turns[-1] == Turn("assistant", "".join(heard)) and 0 < len(heard) < 10


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(casual: LoadedRun) -> None:
    talk = conversation(casual)
    talk.turns.append(Turn("user", "안녕"))
    assert list(talk.answer(lambda: True)) == [] and talk.turns == []


def test_the_first_interrupt_stops_the_answer_and_the_second_the_program() -> None:
    before = signal.getsignal(signal.SIGINT)
    with chat.interrupts() as is_interrupted:
        assert not is_interrupted()
        os.kill(os.getpid(), signal.SIGINT)
        assert is_interrupted()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("안녀\x7f녕\r\x04", ["안녕"]),
        ("밥\x1b[D국\r\x04", ["국밥"]),
        ("지울 말\x03안녕\r\x04", ["안녕"]),
        ("\x04", []),
    ],
    ids=["backspace", "arrow", "ctrl-c", "ctrl-d"],
)
def test_korean_is_edited_letter_by_letter(keys: str, lines: list[str]) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keyboard, create_app_session(keyboard, DummyOutput()):
        keyboard.send_text(keys)
        assert list(chat._typed()) == lines
