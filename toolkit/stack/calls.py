"""What a stack's callers pass, checked, and what the base is called with: prefixes in its cache, mask and positions.

Everything that would be silently wrong (KNOWN: packing beside a mask or a cache, padding that pushes a prefix out of a
sliding window) is refused here.
"""

# B rows, T new tokens, S tokens so far, X columns of the cache and of the new tokens, prefixes included.

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.adapters import anatomy
from toolkit.errors import AdapterError
from toolkit.stack.grouped import Plan
from toolkit.stack.prefix import PrefixShelf, widened_mask


def checked_owners(owner: Tensor | Sequence[int], n_rows: int | None, slots: Mapping[str, int]) -> tuple[int, ...]:
    """Owners as numbers. Raises: AdapterError unless each is -1 or a slot, one for each row."""
    if isinstance(owner, Tensor):
        if owner.dim() != 1 or owner.is_floating_point() or owner.dtype == torch.bool:
            raise AdapterError(f"owner: one whole number per row is needed, not {owner.dtype} {tuple(owner.shape)}.")
        owners = tuple(owner.tolist())
    else:
        owners = tuple(int(one) for one in owner)
    if n_rows is not None and len(owners) != n_rows:
        raise AdapterError(f"owner: {len(owners)} owners for {n_rows} rows. Give one for each; -1 is the base.")
    unknown = sorted({one for one in owners if one != -1} - set(slots.values()))
    if unknown or not owners:
        there = ", ".join(f"{slot} {name}" for name, slot in sorted(slots.items(), key=lambda item: item[1]))
        raise AdapterError(
            f"owner: {unknown[0] if unknown else 'an empty batch'} is no adapter of this stack. It holds "
            f"{there or 'none'}; -1 is the base. Use Stack.owners to name them."
        )
    return owners


def prepared(
    prefixes: PrefixShelf, plan: Plan | None, input_ids: Tensor, given: Mapping[str, Any], *, takes_positions: bool
) -> dict[str, Any]:
    """The keyword arguments of the base for these rows."""
    call = dict(given)
    if call.pop("labels", None) is not None:
        raise AdapterError("labels: a loss belongs to one adapter. Take the logits and sum over each one's rows.")
    mask, positions, cache = (call.pop(key, None) for key in ("attention_mask", "position_ids", "past_key_values"))
    n_cached = 0 if cache is None else int(cache.get_seq_length())
    widths = prefixes.widths(plan, len(input_ids))
    widest = max(widths)
    call["use_cache"] = call.get("use_cache") or cache is not None or widest > 0
    if mask is not None and mask.dim() == 4:
        if widest and not n_cached:
            raise AdapterError(
                "attention_mask: a mask of four dimensions needs a cache that already holds the prefixes. Start from "
                "Stack.start, or write Stack.keys_and_values into your own."
            )
        return _given(call, input_ids, mask, positions, cache)
    _check_mask(mask, input_ids, n_cached, widest)
    _refuse_packed(mask, positions, input_ids, widest=widest, has_cache=bool(call["use_cache"]))
    if positions is None and takes_positions and mask is not None:
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :].long()
    if plan is None or not widest:
        return _given(call, input_ids, mask, positions, cache)
    n_own = input_ids.shape[1] + max(n_cached - widest, 0)
    if mask is None:
        mask = torch.ones(len(input_ids), n_own, dtype=torch.long, device=input_ids.device)
    if positions is None and takes_positions:
        positions = (mask.cumsum(-1) - 1)[:, -input_ids.shape[1] :].long()
    _refuse_pushed_out(prefixes.model, mask, widths, widest)
    if positions is not None:
        positions = positions + prefixes.width_B(plan, positions.device).unsqueeze(1)
    if not n_cached:
        cache = prefixes.new_cache() if cache is None else cache
        prefixes.fill(cache, plan, widest)
    return _given(call, input_ids, widened_mask(mask, prefixes.width_B(plan, mask.device), widest), positions, cache)


def _given(call: dict[str, Any], input_ids: Tensor, mask: Any, positions: Any, cache: Any) -> dict[str, Any]:
    named = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
    return {**call, "input_ids": input_ids, **{key: value for key, value in named.items() if value is not None}}


def _check_mask(mask: Tensor | None, input_ids: Tensor, n_cached: int, widest: int) -> None:
    if input_ids.dim() != 2:
        raise AdapterError(f"input_ids are {tuple(input_ids.shape)}; rows by tokens are needed.")
    if n_cached and n_cached < widest:
        raise AdapterError(
            f"past_key_values: {n_cached} columns cannot hold prefixes of {widest}. Pass the cache that this stack "
            "filled for the same owners."
        )
    wanted = (len(input_ids), input_ids.shape[1] + max(n_cached - widest, 0))
    if mask is not None and tuple(mask.shape) != wanted:
        raise AdapterError(
            f"attention_mask is {tuple(mask.shape)} where {wanted} is needed: one number per row for every token so "
            "far, cached ones included, prefixes not (the cache has to be this stack's, for the same owners)."
        )


def _refuse_packed(
    mask: Tensor | None, positions: Tensor | None, input_ids: Tensor, *, widest: int, has_cache: bool
) -> None:
    """Packed rows see only their own text where the base finds out by itself: without mask, cache and prefix."""
    if positions is None or input_ids.shape[1] == 1 or (mask is None and not has_cache):
        return
    positions_BT = positions.expand(input_ids.shape)
    restarts = positions_BT[:, 1:] <= positions_BT[:, :-1]
    if mask is not None:
        real_BT = mask[:, -input_ids.shape[1] :].bool()
        restarts = restarts & real_BT[:, 1:] & real_BT[:, :-1]
    if bool(restarts.any()):
        beside = "beside a row with a prefix" if widest else "with an attention mask or a cache"
        raise AdapterError(
            f"position_ids start again inside a row (packing), which is wrong {beside}: one text would see another. "
            "Pass packed rows in a batch without prefixes, mask and cache, or set train.packing to false."
        )


def _refuse_pushed_out(model: Any, mask: Tensor, widths: Sequence[int], widest: int) -> None:
    window = anatomy.sliding_window(model)
    if not window or mask.shape[1] + widest <= window:
        return
    with_prefix = [row for row, width in enumerate(widths) if width]
    if not bool(mask[with_prefix, 0].all()):
        raise AdapterError(
            f"On a base with a sliding window of {window}, rows with a prefix cannot be padded on the left to "
            f"{mask.shape[1] + widest}: padding would push the prefix out of the window. Send rows of one length, or "
            "pad on the right."
        )
