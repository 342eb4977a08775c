"""What the serving benchmarks stand on: bases as folders, run folders written by hand, servers as processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from stack import SHAPES

from toolkit.bases.load import LoadedBase, load_base
from toolkit.disk import write_json
from toolkit.recipe.model import Base, Lora, Prefix, Reft
from toolkit.shipped import shipped
from toolkit.stack.adapter import Adapter, new_adapter, write_adapter

ROOT = Path(__file__).resolve().parents[1]
MARKERS = ("요", "데", "대", "무", "면", "저", "니", "서")
CONTEXT = 4096  # of the random bases
SURE = 15.0  # nats between a marker and the next likely token
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_tokens": 64}


def open_base(name: str, folder: Path) -> LoadedBase:
    """A base by name: the shipped one, or random numbers of a fixed shape, with the shipped tokenizer, in `folder`."""
    home = shipped("base/spoken-mini")
    if name == "spoken-mini":
        return load_base(Base(model=name), "cpu", torch.float32)
    place = folder / name
    if not (place / "config.json").is_file():
        from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(home, model_max_length=CONTEXT)
        ends: dict[str, Any] = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        config = LlamaConfig(**SHAPES[name], tie_word_embeddings=True, max_position_embeddings=CONTEXT, **ends)
        model = LlamaForCausalLM(config)
        with torch.no_grad():  # never chosen: what has no text, and what would end an answer
            model.get_input_embeddings().weight[len(tokenizer) :] = 0.0
            model.get_input_embeddings().weight[tokenizer.all_special_ids] = 0.0
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)
    return load_base(Base(model=str(place)), "cpu", torch.float32)


def write_run(folder: Path, base: LoadedBase, adapter: Adapter) -> None:
    """A finished run of one adapter."""
    facts = {"model": base.source, "folder": str(base.folder), "revision": None, "quantize": "none"}
    folder.mkdir(parents=True)
    (folder / "adapters" / "main").mkdir(parents=True)
    write_adapter(adapter, folder / "adapters" / "main", base.model, base=base.source, base_hash=base.hash)
    (folder / "template.jinja").write_text(base.template, encoding="utf-8")
    write_json(folder / "generation.json", SAMPLING)
    facts |= {"hash": base.hash, "trust_remote_code": False}
    write_json(
        folder / "run.json",
        {"version": 1, "name": folder.name, "status": "finished", "task": "chat", "base": facts},
    )


def noise_adapter(base: LoadedBase, kind: str, seed: int) -> Adapter:
    """A LoRA or a prefix with numbers of its own: what it says is unlike what any other says."""
    options = Lora(rank=16) if kind == "lora" else Prefix(tokens=8)
    first, noise = new_adapter(base.model, options, seed=seed), torch.Generator().manual_seed(seed)
    return replace(first, tensors={n: 0.05 * torch.randn(t.shape, generator=noise) for n, t in first.tensors.items()})


def marking_adapter(base: LoadedBase, marker: str) -> Adapter:
    """A LoReFT that says its marker and nothing else: the last layer's output is moved far toward that token."""
    model: Any = base.model
    (token,) = base.tokenizer(marker, add_special_tokens=False)["input_ids"]
    head, gain = model.get_output_embeddings().weight, model.model.norm.weight
    toward = (head[token] / gain).detach()
    toward /= toward.norm()
    sure = (head @ (gain * len(gain) ** 0.5 * toward)).detach().topk(2)
    if int(sure.indices[0]) != token or float(sure.values[0] - sure.values[1]) < SURE:
        raise SystemExit(f"{marker!r} is no marker on this base: another token is as likely")
    last = model.config.num_hidden_layers - 1
    first = new_adapter(model, Reft(rank=1, layers=(last,)), seed=0)
    own = {"rotation": toward[None], "weight": toward[None].clone(), "bias": torch.tensor([1e5])}
    return Adapter("reft", {f"layers.{last}.{name}": tensor for name, tensor in own.items()}, first.config)


@dataclass
class Process:
    """A server in a process of its own."""

    process: subprocess.Popen[bytes]
    address: str
    log: Path


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def running(words: Sequence[str], port: int, log: Path, ready: str, limit_s: float = 300.0) -> Iterator[Process]:
    """A command that serves on a port of this machine, from when `ready` (a path) answers 200 until the block ends."""
    address = f"http://127.0.0.1:{port}"
    with log.open("wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=os.environ | OFFLINE)
    try:
        until = time.monotonic() + limit_s
        while not _answers(address + ready):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{' '.join(words[:6])} … did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield Process(process, address, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


def maltu(runs: Path, names: Sequence[str], port: int, *more: str) -> list[str]:
    """The command of our own server."""
    words = [sys.executable, "-m", "serve", *names, "--runs", str(runs), "--port", str(port), "--no-ui"]
    return [*words, "--device", "cpu", *more]


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return int(answer.status) == 200
    except (urllib.error.URLError, OSError):
        return False
