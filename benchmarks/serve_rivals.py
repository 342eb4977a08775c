"""Who takes part in benchmarks/serve.py: each a process that is stopped (SIGSTOP) while another one is measured."""

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_world import ROOT, Process, free_port, maltu, open_base, running, write_run
from stack import RANK, random_adapters, with_peft

from toolkit.bases.load import LoadedBase

N_ADAPTERS = 8
LATE = "late"  # a run that lies in the folder and is not loaded when the server starts
OURS = {"base": "auto", "adapters": "auto", "modules": "modules", "modules-adapters": "modules"}  # by --forward
LLAMA = ("llama", "llama-adapters")
CONTESTANTS = (*OURS, "transformers", "peft-names", *LLAMA)


@dataclass
class World:
    """One base, with its runs. ends: ids that would end an answer; nobody may say them, so that all write alike.

    admin: what opens the admin routes of our servers, as headers.
    """

    name: str
    base: LoadedBase
    folder: Path
    names: list[str]
    ends: list[int] = field(default_factory=list)
    admin: dict[str, str] = field(default_factory=dict)

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
    """A base and N_ADAPTERS runs on it, and LATE: LoRA of rank RANK on all linear layers, with random numbers."""
    base = open_base(name, folder)
    world = World(name, base, folder / f"{name}-world", [f"a{number}" for number in range(N_ADAPTERS)])
    special = base.tokenizer.all_special_ids
    world.ends = sorted({*special, *base.tokenizer(base.tokenizer.eos_token or "")["input_ids"]})
    runs = [*world.names, LATE]
    for run, adapter in zip(runs, random_adapters(base.model, len(runs)), strict=True):
        write_run(world.folder / "runs" / run, base, adapter)
    words = [sys.executable, "-m", "serve", "key", "new", "--name", "bench", "--file", str(world.folder / "admin")]
    key = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    world.admin = {"Authorization": f"Bearer {key}"}
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
    """A contestant: `body` is what is sent for a prompt to the n-th of several adapters. n_opening: tokens that the
    server itself puts before a text.
    """

    path = "/v1/completions"

    @property
    def n_opening(self) -> int:
        """Ours begins a text as the base's texts began."""
        return int(self.world.base.tokenizer.bos_token_id is not None)

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

    n_opening = 0

    def body(self, prompt: str, number: int, n_tokens: int) -> dict[str, Any]:
        """See Rival."""
        return asked(str(self.world.endless), prompt, n_tokens)


class LlamaCpp(Rival):
    """llama.cpp's server. A request that names no adapter gets all of them, so each names its own."""

    has_adapters = False
    n_opening = 0

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
def rivals(world: World, who: Collection[str], llama: Sequence[str] = ()) -> Iterator[dict[str, Rival]]:
    """The servers of those who take part, started, in the order of CONTESTANTS. llama: the binary of llama.cpp's server
    and a folder with NAME.gguf and NAME-a0.gguf …
    """
    with contextlib.ExitStack() as stack:
        made: dict[str, Rival] = {}

        def start(name: str, words: list[str], port: int, ready: str) -> Process:
            return stack.enter_context(running(words, port, world.folder / f"{name}.log", ready))

        more = ("--slots", "32", "--queue", "512", "--store", "none", "--admin-key-file", str(world.folder / "admin"))
        for forward in dict.fromkeys(OURS[name] for name in OURS if name in who):
            port = free_port()
            words = maltu(world.folder / "runs", world.names, port, *more, "--forward", forward)
            own = start(f"ours-{forward}", words, port, "/readyz")
            for name in (name for name in OURS if name in who and OURS[name] == forward):
                made[name] = Rival(world, own, None if name.endswith("adapters") else "base")
        if "transformers" in who:
            port = free_port()
            words = [str(Path(sys.executable).with_name("transformers")), "serve", str(world.endless)]
            words += ["--continuous-batching", "--device", "cpu", "--dtype", "float32", "--port", str(port)]
            made["transformers"] = Transformers(world, start("transformers", words, port, "/health"))
        for name in (name for name in LLAMA if name in who):
            port, (binary, folder) = free_port(), llama
            words = [binary, "-m", str(Path(folder) / f"{world.name}.gguf"), "-np", "32", "-c", "8192", "-t", "2"]
            if name == "llama-adapters":
                loras = [str(Path(folder) / f"{world.name}-{run}.gguf") for run in world.names]
                words += [word for path in loras for word in ("--lora", path)]
            kind = LlamaCppAdapters if name == "llama-adapters" else LlamaCpp
            made[name] = kind(world, start(name, [*words, "--port", str(port)], port, "/health"))
        yield made


@contextlib.contextmanager
def peft_names(world: World, who: Collection[str]) -> Iterator[subprocess.Popen[str] | None]:
    """PEFT's adapter_names in a plain loop, in a process that takes jobs line by line; see `serve_peft`."""
    if "peft-names" not in who:
        yield None
        return
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
