"""`chat RUN`: talk to a run in the terminal, word by word; also with lines from a pipe.

/clear starts anew, /base changes between the run and its bare base, /quit or Ctrl-D ends; Ctrl-C stops an answer and
keeps what was said.
"""

import argparse
import secrets
import signal
import sys
import unicodedata
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from toolkit.corpus.talk import Turn
from toolkit.errors import InputError, Problem

if TYPE_CHECKING:
    from toolkit.combine.route import Choice
    from toolkit.combine.speaker import Speaker
    from toolkit.generate import Answer, Sampling
    from toolkit.loaded import LoadedRun

COMMANDS = {
    "/clear": "start anew",
    "/base": "change between the run and its bare base",
    "/quit": "end (or Ctrl-D); Ctrl-C stops an answer",
}
ROOM_SHARE = 4  # at least one part in this many of the context stays free for the answer


@dataclass
class Conversation:
    """The turns so far, and who answers them. `has_forgotten`: whether old turns were left out since the start.

    speaker: of a run whose adapters answer together; choice: whom its router sent the talk to.
    """

    loaded: "LoadedRun"
    sampling: "Sampling"
    system: str | None = None
    speaker: "Speaker | None" = None
    choice: "Choice | None" = None
    turns: list[Turn] = field(default_factory=list)
    has_forgotten: bool = False

    def clear(self) -> None:
        """Forget everything but the system turn."""
        self.turns, self.has_forgotten, self.choice = [], False, None

    def prompt(self) -> list[int]:
        """The ids that ask for the next answer; drops the oldest turns until an answer has room.

        Raises: InputError when the last turn alone is too long, and takes it back.
        """
        from toolkit.adapters.opened import open_model

        n_prefix = open_model(self.loaded.model).n_prefix if self.speaker is None else self.speaker.n_prefix
        context = self.loaded.base.context - n_prefix
        room = context - min(self.sampling.max_tokens, context // ROOM_SHARE)
        first = [Turn("system", self.system)] if self.system else []
        while True:
            ids = self.loaded.renderer.prompt([*first, *self.turns])
            if len(ids) <= room:
                return ids
            start = next((i for i, turn in enumerate(self.turns) if i and turn.role == "user"), None)
            if start is None:
                self.turns.pop()
                says = f"it has {len(ids)} tokens, and the base holds {context}, the answer included. Say less at once."
                raise InputError("this turn", [Problem("", says)])
            self.turns, self.has_forgotten = self.turns[start:], True

    def answer(self, is_cancelled: Callable[[], bool]) -> Generator[str, None, "Answer"]:
        """Pieces of the next answer, which becomes the last turn. Nothing said takes the user's turn back."""
        from toolkit.generate import stream

        sampling = replace(self.sampling, seed=self.sampling.seed + len(self.turns))
        prompt, tokenizer = self.prompt(), self.loaded.base.tokenizer
        if self.speaker is None:
            answer = yield from stream(self.loaded.model, tokenizer, prompt, sampling, is_cancelled, self.loaded.ends)
        elif self.speaker.is_whole:  # nothing can be shown before all have answered
            first = [Turn("system", self.system)] if self.system else []
            try:
                answer = self.speaker.answer([[*first, *self.turns]], sampling)[0]
            except InputError:  # a member with less room than the base
                self.turns.pop()
                raise
            yield answer.text
        else:
            if self.speaker.spec.kind == "route":
                self.choice = self.speaker.pick([self.turns], [self.choice])[0]
            with self.speaker.opened(self.choice) as model:
                answer = yield from stream(model, tokenizer, prompt, sampling, is_cancelled, self.loaded.ends)
        if answer.text.strip():
            self.turns.append(Turn("assistant", answer.text))
        else:
            self.turns.pop()
        return answer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `chat`."""
    parser.add_argument("run", type=Path, help="a finished run folder")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 …")
    parser.add_argument("--adapter", metavar="NAME", help="one expert of a run that has several")
    parser.add_argument("--system", metavar="TEXT", help="a system turn in front of the talk")
    parser.add_argument("--temperature", type=float, help="0 always takes the likeliest word (default: the run's own)")
    parser.add_argument(
        "--top-p", type=float, help="share of the likeliest words to choose from (default: the run's own)"
    )
    parser.add_argument("--max-tokens", type=int, help="the longest answer (default: the run's own)")
    parser.add_argument("--seed", type=int, help="the same seed and turns give the same answers (default: a new one)")
    parser.add_argument("--base", action="store_true", help="begin with the bare base")


def chat(arguments: argparse.Namespace) -> int:
    """Answer lines until there are none. Raises MaltuError for a run that cannot be opened."""
    is_base = arguments.base
    opened = {is_base: _open(arguments, is_base)}
    loaded, speaker = opened[is_base]
    talk = Conversation(loaded, _sampling(arguments, loaded), arguments.system, speaker)
    _tell(f"{_named(talk.loaded, is_base)}. {'; '.join(f'{word}: {says}' for word, says in COMMANDS.items())}.")
    try:
        for line in lines_of():
            if line == "/quit":
                break
            if line == "/clear":
                talk.clear()
            elif line == "/base":
                is_base = not is_base
                if is_base not in opened:
                    opened[is_base] = _open(arguments, is_base)
                talk.loaded, talk.speaker = opened[is_base]
                talk.choice = None
                _tell(f"From now on: {_named(talk.loaded, is_base)}.")
            elif line.startswith("/"):
                _tell(f"{line.split()[0]}: no command. There are {', '.join(COMMANDS)}.")
            elif line:
                _exchange(talk, line)
    except BrokenPipeError:  # whoever read the answers has enough
        sys.stderr.close()
    return 0


def _open(arguments: argparse.Namespace, is_base: bool) -> "tuple[LoadedRun, Speaker | None]":
    """The run, or its bare base; with the speaker of a run whose adapters answer together."""
    from toolkit.combine.speaker import open_speaker, speaks
    from toolkit.loaded import load_run

    if not is_base and arguments.adapter is None and speaks(arguments.run):
        speaker, loaded = open_speaker(arguments.run, arguments.device)
        return loaded, speaker
    named = arguments.adapter or "main"
    return load_run(arguments.run, arguments.device, named, with_adapter=not is_base), None


def _exchange(talk: Conversation, line: str) -> None:
    """One line of the user and the answer to it, written as it comes."""
    knew, before = talk.has_forgotten, talk.choice
    talk.turns.append(Turn("user", unicodedata.normalize("NFC", line)))
    try:
        with interrupts() as is_interrupted:
            for piece in talk.answer(is_interrupted):
                sys.stdout.write(piece)
                sys.stdout.flush()
    except InputError as error:
        _tell(str(error))
        return
    sys.stdout.write("\n")
    sys.stdout.flush()
    if talk.choice is not None and (before is None or talk.choice.expert != before.expert):
        _tell(f"({talk.choice.expert or 'the bare base'} answers)")
    if talk.has_forgotten and not knew:
        _tell("The talk has grown too long for this base: its oldest turns are left out from now on.")


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only makes the function given return True; the second one raises KeyboardInterrupt."""
    n_pressed = 0

    def press(sig: int, frame: FrameType | None) -> None:
        nonlocal n_pressed
        n_pressed += 1
        if n_pressed > 1:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, press)
    try:
        yield lambda: n_pressed > 0
    finally:
        signal.signal(signal.SIGINT, before)


def lines_of() -> Iterator[str]:
    """What the user says, stripped, until there is no more: edited in a terminal, plain lines from a pipe."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        yield from _typed()
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace")
    for line in sys.stdin:
        yield line.strip()


def _typed() -> Iterator[str]:
    """Lines from a terminal; prompt_toolkit knows that a Korean letter is two columns wide and goes as one."""
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    while True:
        try:
            yield session.prompt("> ").strip()
        except KeyboardInterrupt:  # no answer is being written: it clears the line
            continue
        except EOFError:
            return


def _sampling(arguments: argparse.Namespace, loaded: "LoadedRun") -> "Sampling":
    """The run's own sampling, less what the arguments say. Raises InputError for what is out of range."""
    from toolkit.generate import Sampling

    known = Sampling.__dataclass_fields__.keys() - {"stop", "seed"}
    own = {name: value for name, value in loaded.sampling.items() if name in known}
    said = {name: getattr(arguments, name) for name in ("temperature", "top_p", "max_tokens")}
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    return Sampling(**own | {name: value for name, value in said.items() if value is not None}, seed=seed)


def _named(loaded: "LoadedRun", is_base: bool) -> str:
    return f"the bare base {loaded.base.source}" if is_base else f"{loaded.run.name} on {loaded.base.source}"


def _tell(text: str) -> None:
    """Something that is no answer: on stderr, so that a pipe carries answers alone."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
