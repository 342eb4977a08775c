"""What the parts of benchmarks/gpu.py run on: the card, a random Llama, adapters, and plain models that wear one.

The sections of a recipe need pydantic, which a borrowed GPU machine may lack: a SimpleNamespace asks for adapters.
"""

import copy
import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from machine import save, say
from torch import Tensor

Found = TypeVar("Found")
RANK = 16
HOLDERS = (dict, torch.nn.ModuleDict, torch.nn.ParameterDict)  # where a layer of PEFT keeps things by adapter
MARGIN = 3.0  # how many times its own rounding a result may lie from another: benchmarks/gpu_parts.py has the reason


@dataclass(frozen=True)
class Size:
    """How large everything is. Shapes of batches for training are (rows an adapter, tokens a row)."""

    llama: dict[str, int]
    row: int = 40  # tokens of the longest row that is compared
    prompt: int = 64
    decoded: int = 8
    rounds: int = 5
    shapes: tuple[tuple[int, int], ...] = ((4, 128), (1, 128), (8, 256))
    steps: int = 3  # optimizer steps of one contestant in one round
    talk: int = 60  # tokens of a middling conversation, and of the longest
    longest: int = 512
    batches: int = 4
    counts: tuple[int, ...] = (1, 2, 4, 8, 16)


# 488 M parameters in the shape of today's small models: grouped keys and values, a tied head.
REAL = Size(
    {"vocab_size": 49152, "hidden_size": 1280, "intermediate_size": 3584, "num_hidden_layers": 24,
     "num_attention_heads": 20, "num_key_value_heads": 4, "max_position_embeddings": 2048},
)  # fmt: skip
TINY = Size(
    {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
     "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512},
    row=14, prompt=8, decoded=2, rounds=1, shapes=((2, 12), (1, 8)), steps=1, talk=12, longest=40, batches=1,
)  # fmt: skip


class Card:
    """The device, and the calls that only CUDA has: elsewhere they do nothing, and memory is not known."""

    def __init__(self, device: str) -> None:
        found = torch.device(device)
        self.is_cuda = found.type == "cuda"
        self.device = torch.device("cuda", found.index or 0) if self.is_cuda else found

    def facts(self) -> dict[str, Any]:
        """The card's name, memory and software."""
        if not self.is_cuda:
            return {"card": "no card (cpu)"}
        found = torch.cuda.get_device_properties(self.device)
        return {
            "card": found.name,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "capability": f"{found.major}.{found.minor}",
            "cuda": torch.version.cuda,
            "has_bf16_units": torch.cuda.is_bf16_supported(including_emulation=False),
        }

    def clock(self) -> float:
        """Seconds, when everything asked of the card is done."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def clean(self) -> None:
        """Give back what nothing holds any more."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()

    def mark(self) -> int:
        """Bytes in use; the highest mark is counted from here."""
        if not self.is_cuda:
            return 0
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return torch.cuda.memory_allocated(self.device)

    def peak_mb(self, since: int = 0) -> float | None:
        """The highest mark since `mark`, above that many bytes; None where it is not known."""
        if not self.is_cuda:
            return None
        return round((torch.cuda.max_memory_allocated(self.device) - since) / 2**20, 1)

    def used_mb(self, since: int) -> float | None:
        """How much more is in use than then; None where it is not known."""
        return round((torch.cuda.memory_allocated(self.device) - since) / 2**20, 1) if self.is_cuda else None

    def half(self, *, enabled: bool = True) -> Any:
        """As training runs: matrix products in bf16 whatever the adapter's type."""
        return torch.autocast(self.device.type, torch.bfloat16) if enabled else nullcontext()


@dataclass
class Work:
    """One part at work: where it runs, how large, what it found (in its file after every `keep`), and time left."""

    card: Card
    size: Size
    file: Path
    until: float
    found: dict[str, Any] = field(default_factory=dict)

    def keep(self, key: str, value: Any) -> None:
        """Note something found; it outlives the process."""
        self.found[key] = value
        save(str(self.file), self.found)

    def has_time(self, what: str, seconds: float = 5.0) -> bool:
        """Whether that many seconds are left; where not, what is given up is noted."""
        if self.until - time.monotonic() >= seconds:
            return True
        self.keep("cut_short", [*self.found.get("cut_short", []), what])
        say(f"  no time left for {what}")
        return False

    def fits(self, what: str, act: Callable[[], Found]) -> Found | None:
        """What it gives; None, noted, where the card's memory does not suffice."""
        try:
            return act()
        except torch.OutOfMemoryError as error:
            text = str(error).splitlines()[0][:200]
        self.card.clean()  # outside of `except`, whose error holds every tensor of the frames it went through
        self.keep("out_of_memory", {**self.found.get("out_of_memory", {}), what: text})
        say(f"  out of memory: {what}")
        return None


def llama_config(size: Size) -> Any:
    """Config of the base."""
    from transformers import LlamaConfig

    return LlamaConfig(**size.llama, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2)


def make_base(size: Size, card: Card, dtype: torch.dtype) -> Any:
    """A random base, the same numbers every time on one kind of device; made in its own type, so that the angles of
    its positions stay in float32 as they do when a base is loaded."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with card.device:
        model = AutoModelForCausalLM.from_config(llama_config(size), dtype=dtype)
    return model.to(card.device).eval().requires_grad_(False)


def copy_of(base: Any, size: Size, card: Card, dtype: torch.dtype) -> Any:
    """A base of its own with the same numbers, in another type or the same."""
    made = make_base(size, card, dtype)
    made.load_state_dict(base.state_dict())
    return made


def asked(kind: str, **more: Any) -> SimpleNamespace:
    """What a recipe's adapter section says, without pydantic."""
    of_kind: dict[str, dict[str, Any]] = {
        "lora": {
            "rank": RANK, "alpha_number": 2.0 * more.get("rank", RANK), "dropout": 0.0, "targets": "all-linear",
            "rank_stabilised": False, "dora": False, "init": "default",
        },
        "prefix": {"tokens": 16, "projection": False, "init_text": None},
        "reft": {"rank": 4, "layers": "all", "dropout": 0.0},
        "embedding": {},
    }  # fmt: skip
    return SimpleNamespace(kind=kind, **{**of_kind[kind], **more})


def strong_adapter(base: Any, options: Any, seed: int, seen: Sequence[int]) -> Any:
    """An adapter far from its start, where it would be no change at all."""
    from toolkit.stack.adapter import Adapter, new_adapter

    made = new_adapter(base, options, seed=seed, token_ids=seen)
    noise = torch.Generator().manual_seed(100 + seed)
    tensors = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=noise) if tensor.is_floating_point() else tensor
        for name, tensor in made.tensors.items()
    }
    return Adapter(made.kind, tensors, made.config, made.is_raw)


def many_loras(base: Any, count: int, *, spread: float) -> list[Any]:
    """LoRA adapters of one shape, where the base lies, B drawn with this spread: 0 as training starts."""
    from toolkit.adapters import anatomy
    from toolkit.stack.adapter import Adapter, new_adapter

    first, device = new_adapter(base, asked("lora"), seed=0), anatomy.device_of(base)
    noise = torch.Generator(device).manual_seed(1)  # on the card: half a billion numbers for 64 of them

    def drawn(name: str, tensor: Tensor) -> Tensor:
        wide = spread if ".lora_B." in name else 0.02
        return wide * torch.randn(tensor.shape, generator=noise, device=device)

    return [
        Adapter(first.kind, {name: drawn(name, tensor) for name, tensor in first.tensors.items()}, first.config)
        for _ in range(count)
    ]


def wear(base: Any, adapter: Any, options: Any, seen: Sequence[int] = ()) -> Any:
    """The base with this adapter alone, ready to learn: plain PEFT for lora and prefix, the kind's own for the rest."""
    import peft

    from toolkit.adapters.kinds import kind_of

    model: Any = kind_of(options).attach(base, options, seed=0, token_ids=seen or None)
    with torch.no_grad():
        if adapter.kind in ("lora", "prefix"):
            peft.set_peft_model_state_dict(model, {name: tensor.clone() for name, tensor in adapter.tensors.items()})
        elif adapter.kind == "embedding":
            model.maltu_embedding.delta_NH.copy_(adapter.tensors["delta"])
        else:
            for name, parameter in _edits(model).items():
                parameter.copy_(adapter.tensors[name])
    return model.eval()


def gradients(model: Any, kind: str) -> dict[str, Tensor]:
    """What `wear` made has learned to want, by the names that a stack's leaves have."""
    if kind == "reft":
        return {name: parameter.grad for name, parameter in _edits(model).items()}
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    if kind == "lora":
        return {name.replace(".default.", "."): grad for name, grad in own.items()}
    (only,) = own.values()
    return {"prompt_embeddings" if kind == "prefix" else "delta": only}


def _edits(model: Any) -> dict[str, Any]:
    return {
        f"layers.{index}.{called}": getattr(edit, part)
        for index, edit in model.maltu_reft.each()
        for called, part in (("rotation", "raw"), ("weight", "weight"), ("bias", "bias"))
    }


def with_peft(base: Any, adapters: Sequence[Any], dtype: torch.dtype) -> Any:
    """PEFT's model with all of these LoRA adapters, a0 and on, to answer, in the type given.

    PEFT's add_adapter walks over every module for every adapter, minutes for 64 on 24 layers: here each of its layers
    is given what it keeps for a0 once more under the other names, with the other's tensors. `Contest.check` proves it.
    """
    import peft
    from peft.tuners.lora import LoraLayer

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=adapters[0].config["target_modules"]
    )
    model = peft.get_peft_model(base, config, adapter_name="a0", autocast_adapter_dtype=False)
    for module, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        kept = [one for one in (*vars(layer).values(), *layer.children()) if isinstance(one, HOLDERS) and "a0" in one]
        for index, adapter in enumerate(adapters):
            for holder in kept if index else ():
                holder[f"a{index}"] = copy.deepcopy(holder["a0"])
            for part in ("lora_A", "lora_B"):
                tensor = adapter.tensors[f"base_model.model.{module}.{part}.weight"]
                weight = getattr(layer, part)[f"a{index}"].weight
                weight.data = tensor.to(weight.device, dtype)
    model.peft_config.update({f"a{index}": copy.copy(config) for index in range(1, len(adapters))})
    return model.eval().requires_grad_(False)


def adamw(leaves: Mapping[str, Tensor] | Sequence[Tensor], card: Card) -> torch.optim.AdamW:
    """The optimizer of every contestant: one kernel for all leaves where there is a card."""
    leaves = list(leaves.values()) if isinstance(leaves, Mapping) else list(leaves)
    return torch.optim.AdamW(leaves, 1e-3, weight_decay=0.0, fused=card.is_cuda)


def loss_by_row(logits_BTV: Tensor, labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss of each row in float32, and how many tokens it is over; labels stand where their tokens do."""
    next_BT = torch.cat([labels_BT[:, 1:], torch.full_like(labels_BT[:, :1], -100)], 1)
    every = torch.nn.functional.cross_entropy(logits_BTV.flatten(0, 1).float(), next_BT.flatten(), reduction="none")
    return every.view(next_BT.shape).sum(1), (next_BT != -100).sum(1)


def off(left: Tensor, right: Tensor) -> float:
    """The length of the difference as a share of the right one's; infinite where it is no number."""
    share = float((left.double() - right.double()).norm() / right.double().norm().clamp(min=1e-30))
    return share if math.isfinite(share) else math.inf
