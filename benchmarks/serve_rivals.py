"""Who takes part in benchmarks/serve.py: each a process that is stopped (SIGSTOP) while another one is measured."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_world import ROOT, Process, free_port, maltu, open_base, running, write_run
from stack import RANK, random_adapters, with_peft

from toolkit.bases.load import LoadedBase

N_ADAPTERS = 8


@dataclass
class World:
    """One base, with its runs. ends: ids that would end an answer; nobody may say them, so that all write alike."""

    name: str
    base: LoadedBase
    folder: Path
    names: list[str]
    ends: list[int] = field(default_factory=list)

    @property
    def endless(self) -> Path:
        """The base's folder, less the tokens that end an answer: for servers that cannot be told otherwise."""
        place = self.folder / "endless"
        if not place.is_dir():
            shutil.copytree(self.base.folder, place)
            for name in ("config.json", "generation_config.json"):
                if (place / name).is_file():
                    told = json.loads((place / name).read_text(encoding="utf-8")) | {"eos_token_id": None}
                    (place / name).write_text(json.dumps(told), encoding="utf-8")
        return place


def make_world(name: str, folder: Path) -> World:
    """A base and N_ADAPTERS runs on it: LoRA of rank RANK on all linear layers, with random numbers."""
    base = open_base(name, folder)
    world = World(name, base, folder / f"{name}-world", [f"a{number}" for number in range(N_ADAPTERS)])
    special = base.tokenizer.all_special_ids
    world.ends = sorted({*special, *base.tokenizer(base.tokenizer.eos_token or "")["input_ids"]})
    for run, adapter in zip(world.names, random_adapters(base.model, N_ADAPTERS), strict=True):
        write_run(world.folder / "runs" / run, base, adapter)
    return world


def prompts(world: World, count: int, n_tokens: int, seed: int) -> list[str]:
    """Different texts of so many tokens each."""
    tokenizer, dice, made = world.base.tokenizer, random.Random(seed), []
    n_words = min(len(tokenizer), 8000)
    while len(made) < count:
        text, n_more = "", 0
        while n_more < 10 * n_tokens:
            n_more += 1
            longer = text + tokenizer.decode([dice.randrange(300, n_words)], clean_up_tokenization_spaces=False)
            n_now = len(tokenizer(longer, add_special_tokens=False)["input_ids"])
            if n_now <= n_tokens and "\ufffd" not in longer:
                text = longer
            if n_now == n_tokens and text == longer:
                made.append(text)
                break
    return made


class Rival:
    """A contestant: `body` is what is sent for a prompt to the n-th of several adapters."""

    path = "/v1/completions"

    def __init__(self, world: World, process: Process, model: str | None = None) -> None:
        self.world, self.process, self._model = world, process, model
        self.port = int(process.address.rsplit(":", 1)[1])

    def body(self, prompt: str, number: int, n_tokens: int) -> dict[str, Any]:
        """What is asked."""
        model = self._model or self.world.names[number % N_ADAPTERS]
        silent = {str(token): -100 for token in self.world.ends}
        return asked(model, prompt, n_tokens) | {"logit_bias": silent}

    def pause(self) -> None:
        """Take no part in what is measured."""
        self.process.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """Take part again."""
        self.process.process.send_signal(signal.SIGCONT)


class Transformers(Rival):
    """`transformers serve --continuous-batching`, which knows no logit_bias and no stop."""

    def body(self, prompt: str, number: int, n_tokens: int) -> dict[str, Any]:
        """See Rival."""
        return asked(str(self.world.endless), prompt, n_tokens)


class LlamaCpp(Rival):
    """llama.cpp's server. A request that names no adapter gets all of them, so each names its own."""

    has_adapters = False

    def body(self, prompt: str, number: int, n_tokens: int) -> dict[str, Any]:
        """See Rival."""
        own = [{"id": one, "scale": float(one == number % N_ADAPTERS)} for one in range(N_ADAPTERS)]
        more: dict[str, Any] = {"ignore_eos": True, "cache_prompt": False}
        return asked("any", prompt, n_tokens) | more | ({"lora": own} if self.has_adapters else {})


class LlamaCppAdapters(LlamaCpp):
    """The same with adapters."""

    has_adapters = True


def asked(model: str, prompt: str, n_tokens: int) -> dict[str, Any]:
    """What every server understands."""
    more = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
    return {"model": model, "prompt": prompt, "max_tokens": n_tokens, **more}


@contextlib.contextmanager
def rivals(world: World, llama: Sequence[str] = (), *, with_modules: bool = False) -> Iterator[dict[str, Rival]]:
    """All servers on one base, started. llama: the binary of llama.cpp's server and a folder with NAME.gguf and
    NAME-a0.gguf …, or nothing. with_modules: ours once more, with --forward modules.
    """
    with contextlib.ExitStack() as stack:

        def start(name: str, words: list[str], port: int, ready: str) -> Process:
            return stack.enter_context(running(words, port, world.folder / f"{name}.log", ready))

        made: dict[str, Rival] = {}
        more = ("--slots", "32", "--queue", "512", "--store", "none")
        for forward in ("auto", "modules") if with_modules else ("auto",):
            port = free_port()
            words = maltu(world.folder / "runs", world.names, port, *more, "--forward", forward)
            own = start(f"ours-{forward}", words, port, "/readyz")
            base, adapters = ("base", "adapters") if forward == "auto" else ("modules", "modules-adapters")
            made |= {base: Rival(world, own, "base"), adapters: Rival(world, own)}
        port = free_port()
        words = [str(Path(sys.executable).with_name("transformers")), "serve", str(world.endless)]
        words += ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
        made["transformers"] = Transformers(world, start("transformers", words, port, "/health"))
        if llama:
            binary, gguf = llama[0], Path(llama[1])
            whole = [binary, "-m", str(gguf / f"{world.name}.gguf"), "-np", "32", "-c", "8192", "-t", "2"]
            loras = [word for name in world.names for word in ("--lora", str(gguf / f"{world.name}-{name}.gguf"))]
            for name, kind, also in (("llama", LlamaCpp, []), ("llama-adapters", LlamaCppAdapters, loras)):
                port = free_port()
                made[name] = kind(world, start(name, [*whole, *also, "--port", str(port)], port, "/health"))
        yield made


@contextlib.contextmanager
def peft_names(world: World) -> Iterator[subprocess.Popen[str]]:
    """PEFT's adapter_names in a plain loop, in a process that takes jobs line by line; see `serve_peft`."""
    words = [sys.executable, str(Path(__file__)), world.name, str(world.folder.parent)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(words, cwd=ROOT, **pipes)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(30)


def serve_peft(name: str, folder: Path) -> None:
    """For every line (prompts' ids, new tokens) the seconds until the first token and until the end."""
    import time

    import torch

    base = open_base(name, folder)
    model = with_peft(base.model, random_adapters(base.model, N_ADAPTERS))
    for line in sys.stdin:
        job = json.loads(line)
        ids, names = torch.tensor(job["ids"]), [f"a{row % N_ADAPTERS}" for row in range(len(job["ids"]))]
        since, cache, fed, first = time.perf_counter(), None, ids, 0.0
        with torch.no_grad():
            for _ in range(job["n_tokens"]):
                out = model(input_ids=fed, past_key_values=cache, use_cache=True, adapter_names=names, logits_to_keep=1)
                cache, fed = out.past_key_values, out.logits[:, -1:].argmax(-1)
                first = first or time.perf_counter() - since
        sys.stdout.write(json.dumps({"first_s": first, "took_s": time.perf_counter() - since}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    assert RANK == 16
    serve_peft(sys.argv[1], Path(sys.argv[2]))
