"""What tests of the server share: an engine that says what it is told, and run folders written by hand."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serve.engines.contract import Ask, Auto, Engine, Load, Mix, One, Reply, Served, Vote, Who
from serve.refusal import Refusal, stopping
from serve.store import Store
from toolkit.bundle import Run
from toolkit.disk import write_json
from toolkit.generate import Answer, Finish, TokenLogprob
from toolkit.shipped import shipped

BASE_FACTS = {"model": "spoken-mini", "revision": None, "quantize": "none", "trust_remote_code": False}
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64}


def served(name: str, combination: str | None = None, members: tuple[tuple[str, float], ...] = ()) -> Served:
    return Served(
        name=name,
        adapter=None if name == "base" or combination else name,
        base="spoken-mini",
        base_hash="b" * 64,
        weights_hash=("b" if name == "base" else "a") * 64,
        context=512,
        task="chat",
        defaults={"temperature": 0.5, "top_p": 0.8, "max_tokens": 20},
        created=1_700_000_000,
        combination=combination,
        members=members,
    )


class ScriptedReply(Reply):
    """Pieces as told, each a token; a piece that is an exception is raised. `pace` seconds before each."""

    def __init__(self, ask: Ask, who: Served, pieces: list[str | Exception], pace: float) -> None:
        self.n_prompt, self.served, self._pieces, self._pace = 7, who, pieces, pace
        self._n_logprobs = ask.n_logprobs
        self.n_given = 0
        self.was_cancelled = asyncio.Event()

    async def __aiter__(self) -> AsyncIterator[str]:
        for piece in self._pieces:
            await asyncio.sleep(self._pace)
            if isinstance(piece, Exception):
                raise piece
            if self.was_cancelled.is_set():
                return
            self.n_given += 1
            yield piece

    @property
    def answer(self) -> Answer:
        said = [piece for piece in self._pieces if isinstance(piece, str)]
        finish: Finish = "cancelled" if self.was_cancelled.is_set() and self.n_given < len(said) else "stop"
        return Answer(tuple(range(len(said))), "".join(said), finish, self.n_prompt)

    @property
    def logprobs(self) -> list[TokenLogprob]:
        if self._n_logprobs is None:
            return []
        said = [str(piece) for piece in self._pieces[: self.n_given]]
        top = [TokenLogprob(9, "음", "음".encode(), -2.0 - n) for n in range(self._n_logprobs)]
        return [TokenLogprob(n, piece, piece.encode(), -0.5, tuple(top)) for n, piece in enumerate(said)]

    def cancel(self) -> None:
        self.was_cancelled.set()


class ScriptedEngine(Engine):
    """Remembers what it was asked and answers from `pieces`, or raises `refusal`."""

    def __init__(self) -> None:
        self.asks: list[Ask] = []
        self.replies: list[ScriptedReply] = []
        self.pieces: list[str | Exception] = ["아무거나 ", "먹자", "."]
        self.refusal: Exception | None = None
        self.pace = 0.0
        self.is_open = True
        self.longest = 10**9  # characters of a prompt
        self.names = ["base", "casual", "polite"]

    def models(self) -> Mapping[str, Served]:
        return {name: served(name) for name in self.names}

    def served(self, who: Who) -> Served:
        if isinstance(who, One):
            return served(who.name)
        if isinstance(who, Mix):
            return served(str(who), "mix", who.weights)
        if isinstance(who, Vote):
            return served(str(who), "vote", tuple((name, 1.0) for name in who.names))
        return served("polite") if isinstance(who, Auto) else served("base")

    async def classify(
        self, who: Who, texts: Sequence[str], labels: Sequence[str] | None, key: str = ""
    ) -> tuple[Served, list[Mapping[str, float]]]:
        words = list(labels or ("좋음", "나쁨"))
        return self.served(who), [{word: 1 / len(words) for word in words} for _ in texts]

    async def change(self, add: Run | None, remove: str | None) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.names = [name for name in self.names if name != remove] + ([add.name] if add else [])

    async def submit(self, ask: Ask) -> Reply:
        if not self.is_open:
            raise stopping()
        if self.refusal is not None:
            raise self.refusal
        if sum(len(turn.content) for turn in ask.turns) > self.longest:
            raise Refusal(400, "too long", "context_length_exceeded", "messages")
        self.asks.append(ask)
        self.replies.append(ScriptedReply(ask, self.served(ask.who), self.pieces, self.pace))
        return self.replies[-1]

    def load(self) -> Load:
        return Load("ready" if self.is_open else "draining", 0, 0)

    def drain(self, limit_s: float) -> None:
        self.is_open = False

    def close(self) -> None:
        self.is_open = False


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def refusal() -> type[Refusal]:
    return Refusal


def write_facts(folder: Path, base_hash: str, **facts: Any) -> Path:
    """A run folder as far as run.json goes."""
    folder.mkdir(parents=True)
    base = BASE_FACTS | {"hash": base_hash}
    write_json(
        folder / "run.json",
        {"version": 1, "name": folder.name, "status": "finished", "task": "chat", "base": base} | facts,
    )
    return folder


@pytest.fixture
def facts_writer() -> Callable[..., Path]:
    return write_facts


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny runs on spoken-mini: `casual` leaves the base as it is, `polite` moves it far away."""
    if not (shipped("base/spoken-mini") / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there")
    folder = tmp_path_factory.mktemp("runs")
    _write_run(folder / "casual", scale=0.0)
    _write_run(folder / "polite", scale=0.5)
    return folder


def _write_run(folder: Path, scale: float) -> None:
    import torch

    from toolkit.adapters.kinds import kind_of
    from toolkit.bases.load import load_base
    from toolkit.recipe.model import Base, Lora

    base, options = load_base(Base(model="spoken-mini"), "cpu", torch.float32), Lora(rank=4)
    model = kind_of(options).attach(base.model, options, seed=0)
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=noise) * scale)
    write_facts(folder, base.hash)
    (folder / "adapters" / "main").mkdir(parents=True)
    kind_of(options).save(model, folder / "adapters" / "main", base="spoken-mini", base_hash=base.hash)
    (folder / "template.jinja").write_text(base.template, encoding="utf-8")
    write_json(folder / "generation.json", SAMPLING)


@dataclass
class Server:
    """A server in a process of its own, on a free port of this machine."""

    process: subprocess.Popen[str]
    address: str
    log: Path
    said: str


def start_server(*arguments: str, log: Path) -> Server:
    """Start `python -m serve` and wait until it is ready."""
    command = [sys.executable, "-m", "serve", *arguments, "--port", "0"]
    root = Path(__file__).parents[2]
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=root,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    said, deadline = "", time.monotonic() + 180
    assert process.stdout is not None
    while "Ctrl-C" not in said:
        line = process.stdout.readline()
        said += line
        assert line and time.monotonic() < deadline, f"{said}\n{log.read_text(encoding='utf-8')}"
    address = next(word.removesuffix("/v1") for word in said.split() if word.endswith("/v1"))
    return Server(process, address, log, said)


def stop_server(server: Server) -> int:
    """SIGTERM; the exit code."""
    server.process.terminate()
    try:
        return server.process.wait(timeout=30)
    finally:
        server.process.kill()
        assert server.process.stdout is not None
        server.process.stdout.close()


@pytest.fixture
def start() -> Iterator[Callable[..., Server]]:
    """Starts servers of a test's own; what still runs afterwards is stopped."""
    started: list[Server] = []

    def run(*arguments: str, log: Path) -> Server:
        started.append(start_server(*arguments, log=log))
        return started[-1]

    yield run
    for server in started:
        stop_server(server)


@pytest.fixture(scope="session")
def server(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with the page, for every test that only asks."""
    log = tmp_path_factory.mktemp("server") / "log.txt"
    running = start_server("casual", "polite", "--runs", str(runs), "--queue", "4", "--slots", "2", log=log)
    yield running
    code = stop_server(running)
    assert code == 0, log.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def bare() -> SimpleNamespace:
    """spoken-mini without any adapter, as an engine is given it under three names; quick to load.

    models: rows of one stack. alone: models of their own, as for runs that no stack can hold.
    """
    import torch

    from serve.engines.models import Model
    from toolkit.bases.load import load_base
    from toolkit.bundle import Run
    from toolkit.corpus.render import Renderer
    from toolkit.loaded import LoadedRun
    from toolkit.recipe.model import Base
    from toolkit.stack.stack import Stack

    if not (shipped("base/spoken-mini") / "config.json").is_file():
        pytest.skip("data/base/spoken-mini is not there")
    base = load_base(Base(model="spoken-mini"), "cpu", torch.float32)
    stack = Stack(base.model, base_hash=base.hash)
    renderer = Renderer(base.tokenizer, base.template)
    ends = frozenset(renderer.stop_ids)
    loaded = LoadedRun(Run(Path("casual")), {}, base, base.model, renderer, SAMPLING, ends, ())
    names = ("base", "casual", "polite")
    return SimpleNamespace(
        loaded=loaded,
        models={name: Model(served(name), loaded, stack) for name in names},
        alone={name: Model(served(name), loaded) for name in names},
    )


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    yield store
    store.close()
