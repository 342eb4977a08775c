"""What a batch of rows of many adapters costs, against the base alone, one PEFT adapter, and PEFT's adapter_names.

python benchmarks/stack.py [--rounds 7] [--bases random-10m spoken-mini] [--rows 8 32 64]     (about 20 minutes whole on
2 cores; add random-135m to --bases for another hour). Goes on where an earlier call stopped.

Every base in float32, LoRA of rank 16 on all linear layers, owners drawn evenly in a shuffled order: 1 to 8 distinct
at 8 rows, 1 to 32 at 32, 64 at 64. Prefill is 64 tokens a row; decode is one token a row after them, the mean of STEPS
steps. Goals, of the base's own speed: 8 distinct at 32 rows keep 0.75, 32 and 64 distinct keep 0.6.
Contestants, interleaved in every round, ratios taken within it:
  base        the base alone
  peft-one    PEFT with one adapter for all rows
  peft-names  PEFT's adapter_names, one name a row
  stack       toolkit.stack, one owner a row
"""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from machine import load, save, say, spread, surroundings

RANK, PROMPT, STEPS = 16, 64, 12
DISTINCT = {8: (1, 2, 4, 8), 32: (1, 2, 4, 8, 16, 32), 64: (64,)}
SHAPES: dict[str, dict[str, int]] = {
    "random-10m": {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 9,
                   "num_attention_heads": 4, "num_key_value_heads": 4},
    "random-135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                    "num_attention_heads": 9, "num_key_value_heads": 3},
}  # fmt: skip
Call = Callable[[torch.Tensor, Any], Any]


def make_base(name: str) -> Any:
    """A base by name, the same numbers every time."""
    if name == "spoken-mini":
        from toolkit.bases.load import load_base
        from toolkit.recipe.model import Base

        return load_base(Base(model=name), "cpu", torch.float32).model.eval()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[name], tie_word_embeddings=True)).eval()


def random_adapters(base: Any, count: int) -> list[Any]:
    """Adapters of one shape with numbers of their own."""
    from toolkit.recipe.model import Lora
    from toolkit.stack.adapter import Adapter, new_adapter

    first = new_adapter(base, Lora(rank=RANK), seed=0)
    noise = torch.Generator().manual_seed(1)
    return [
        Adapter(
            first.kind,
            {name: 0.02 * torch.randn(tensor.shape, generator=noise) for name, tensor in first.tensors.items()},
            first.config,
        )
        for _ in range(count)
    ]


def with_peft(base: Any, adapters: list[Any]) -> Any:
    """PEFT's model with all of them."""
    import peft

    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules=adapters[0].config["target_modules"]
    )
    model = peft.get_peft_model(base, config, adapter_name="a0")
    for index, adapter in enumerate(adapters):
        if index:
            model.add_adapter(f"a{index}", config)
        peft.set_peft_model_state_dict(model, dict(adapter.tensors), adapter_name=f"a{index}")
    return model.eval()


class Contest:
    """All contestants on one base, ready to run."""

    def __init__(self, name: str, count: int) -> None:
        from toolkit.stack.stack import Stack

        self.base = make_base(name)
        adapters = random_adapters(self.base, count)
        self.peft = with_peft(make_base(name), adapters)
        self.stack = Stack(make_base(name))
        for index, adapter in enumerate(adapters):
            self.stack.add(f"a{index}", adapter)

    def calls(self, n_rows: int, distinct: int) -> dict[str, Call]:
        """One forward pass of each contestant, from token ids and a cache."""
        owners = [row % distinct for row in range(n_rows)]
        random.Random(n_rows * 100 + distinct).shuffle(owners)
        names = [f"a{owner}" for owner in owners]
        more = {"use_cache": True, "logits_to_keep": 1}
        return {
            "base": lambda ids, cache: self.base(input_ids=ids, past_key_values=cache, **more),
            "peft-one": lambda ids, cache: self.peft(input_ids=ids, past_key_values=cache, **more),
            "peft-names": lambda ids, cache: self.peft(
                input_ids=ids, past_key_values=cache, adapter_names=names, **more
            ),
            "stack": lambda ids, cache: self.stack(ids, owners, past_key_values=cache, **more),
        }


@torch.no_grad()
def timed(call: Call, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of one prefill and of one decode step."""
    started = time.perf_counter()
    cache = call(ids, None).past_key_values
    filled = time.perf_counter()
    for _ in range(STEPS):
        call(ids[:, :1], cache)
    return {"prefill": filled - started, "decode": (time.perf_counter() - filled) / STEPS}


@torch.no_grad()
def check(calls: dict[str, Call], ids: torch.Tensor) -> float:
    """How far the stack's logits lie from PEFT's adapter_names: what is timed has to be right."""
    off = (calls["stack"](ids, None).logits - calls["peft-names"](ids, None).logits).abs().max().item()
    if not off < 1e-3:
        raise SystemExit(f"the stack and PEFT disagree by {off}")
    return float(off)


def run(results: dict[str, Any], name: str, rows: list[int], rounds: int) -> None:
    """All cases of one base; results are written after every round."""
    contest: Contest | None = None
    for n_rows in rows:
        for distinct in DISTINCT[n_rows]:
            case = results["cases"].setdefault(f"{name} rows={n_rows} distinct={distinct}", {"rounds": []})
            if len(case["rounds"]) >= rounds:
                continue
            contest = contest or Contest(name, max(max(DISTINCT[n]) for n in rows))
            calls = contest.calls(n_rows, distinct)
            vocabulary = contest.base.config.vocab_size
            ids = torch.randint(5, vocabulary, (n_rows, PROMPT), generator=torch.Generator().manual_seed(2))
            case["off_peft"] = check(calls, ids[:, :8])
            while len(case["rounds"]) < rounds:
                case["rounds"].append({who: timed(call, ids) for who, call in calls.items()})
                save(__file__, results)


def report(results: dict[str, Any]) -> None:
    """Milliseconds of the base, and each contestant's share of its speed."""
    for key, case in sorted(results["cases"].items()):
        for what in ("prefill", "decode"):
            base_ms = [1000 * one["base"][what] for one in case["rounds"]]
            say(f"{key} {what:<7} base {spread(base_ms)} ms, off PEFT by {case['off_peft']:.1g}")
            shares = {
                who: [one["base"][what] / one[who][what] for one in case["rounds"]]
                for who in ("peft-one", "peft-names", "stack")
            }
            case.setdefault("share_of_base", {})[what] = {who: statistics.median(own) for who, own in shares.items()}
            for who, own in shares.items():
                say(f"    {who:<10} keeps {spread(own)} of the base's speed")


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bases", nargs="+", default=["random-10m", "spoken-mini"], choices=[*SHAPES, "spoken-mini"])
    parser.add_argument("--rows", nargs="+", type=int, default=list(DISTINCT), choices=list(DISTINCT))
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    results = load(__file__) or {"cases": {}}
    results["surroundings"] = surroundings(("torch", "transformers", "peft"))
    results["torch_threads"] = torch.get_num_threads()
    say(str(results["surroundings"]))
    for name in asked.bases:
        run(results, name, asked.rows, asked.rounds)
    report(results)
    save(__file__, results)


if __name__ == "__main__":
    main()
