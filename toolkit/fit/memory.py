"""The micro batch that memory really holds: tried on the longest rows before step 1, halved until it fits. And the
most memory that a process came to hold.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import psutil
import torch
from torch import nn

from toolkit.adapters.contract import seeded
from toolkit.errors import TrainingError
from toolkit.fit.batches import Row
from toolkit.fit.plan import Plan, largest_divisor
from toolkit.fit.rows import Collate


def find_micro_batch(model: nn.Module, rows: Sequence[Row], plan: Plan, pad_id: int, device: torch.device) -> Plan:
    """The plan with the largest micro batch, at most its own, whose forward and backward pass on the longest rows fits.

    On a CPU the plan stays as it is: there the estimate decides, since a process that asks for too much is killed
    instead of told. The random state and the gradients are left as they were. Raises TrainingError when not even one
    conversation fits. Cost: one step for each size tried.
    """
    if device.type == "cpu":
        return plan
    longest = sorted(rows, key=lambda row: -len(row[0]))
    share = plan.micro_batch * plan.accumulation
    while True:
        try:
            with seeded(0):
                _try(model, longest[: plan.micro_batch], plan, pad_id, device)
            return _agreed(plan, share, device)
        except torch.OutOfMemoryError as full:
            if plan.micro_batch == 1:
                raise TrainingError(
                    f"Out of memory with a single conversation of {len(longest[0][0]):,} tokens. Set a shorter"
                    " train.max_length, train.activation_checkpointing: true, base.quantize: nf4, or a smaller base."
                ) from full
            micro = largest_divisor(share, plan.micro_batch // 2)
            plan = replace(plan, micro_batch=micro, accumulation=share // micro)
        finally:
            model.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.empty_cache()


def _agreed(plan: Plan, share: int, device: torch.device) -> Plan:
    """Several processes take the smallest that one of them found, or their steps would not meet."""
    if not torch.distributed.is_initialized():
        return plan
    smallest = torch.tensor([plan.micro_batch], device=device)
    torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
    micro = int(smallest)
    return replace(plan, micro_batch=micro, accumulation=share // micro)


def _try(model: nn.Module, rows: Sequence[Row], plan: Plan, pad_id: int, device: torch.device) -> None:
    batch = Collate(pad_id, plan.packing)([{"input_ids": ids, "labels": labels} for ids, labels in rows])
    batch.pop("n_tokens")
    with torch.autocast(device.type, torch.bfloat16) if plan.precision == "bf16" else nullcontext():
        model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False).loss.backward()


def peak_mb(device: torch.device) -> float:
    """The most memory that this process has held so far, in MB: of the GPU where it is on one, else its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return _own_peak() / 2**20


def _own_peak() -> float:
    try:
        import resource
    except ImportError:  # Windows
        told: Callable[[], object] = psutil.Process().memory_info
        return float(getattr(told(), "peak_wset", 0))
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(highest if sys.platform == "darwin" else highest * 1024)
