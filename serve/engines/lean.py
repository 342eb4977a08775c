"""A forward pass written by hand for Llama's family (Llama, Mistral, Qwen2, Qwen3) on a CPU in float32.

What Hugging Face's modules compute, with fewer and larger steps: q, k and v are one multiplication and so are gate and
up, their weights side by side in memory; keys and values are written in one piece; a prompt's last layer goes on with
the one token of each row that is asked about. Adapters come from the stack, as they do for modules.

In eight bits (`int8`) a rounding that falls the other way is a thousand times what it is in float32, so an answer would
hang on the order of a sum: on how long its neighbours are, on where its prompt was cut. Sums that depend on either, in
attention and adapters, are made in float64 there, and everything else is the same for a row in any company.
"""

# R rows of a forward pass, T new tokens (padded on the right), H hidden, Q/K heads of queries/keys, D width of a head,
# S columns that are seen, V vocabulary, P positions, O features out, X = R·K, N queries that share a key.

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from serve.cache import Frame, SlotCache
from serve.engines.forward import Masks
from serve.engines.fusing import Joined, can_pack, joined, refuse_other
from serve.engines.int8 import needs_7_bits
from serve.engines.threads import Team, Wakes, for_rows
from toolkit.adapters import anatomy
from toolkit.combine.gate import Reader
from toolkit.stack.stack import Stack

MOST_PACKED_MB = 4096  # of weights, and half of what is free; packed, they lie in memory a second time
BLOCK = 512  # positions whose rotation is worked out at once
WIDE_MB = 8  # of keys and values, for which a layer's attention wakes all threads
GRAIN = 32768  # numbers; torch cuts a larger tensor between threads, and the ends of a part come out otherwise


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `turn_norms`: what queries and keys are scaled with before they are turned, [Q + K, D]."""

    number: int
    kind: str
    before_attention: Tensor
    qkv: Joined
    turn_norms: Tensor | None
    o: Joined
    before_mlp: Tensor
    gate_up: Joined
    down: Joined


@dataclass(frozen=True)
class Turn:
    """What all layers of one pass share: the rotation of each token, masks by type of layer (once for each query that
    shares a key; `last_masks`: of the last tokens of the rows, [X, N, S]), those tokens (None where there are no
    others), the rows that are asked about, and what a gate reads with.
    """

    cos_RT1D: Tensor
    sin_RT1D: Tensor
    masks: Mapping[str, Tensor]
    last_masks: Mapping[str, Tensor]
    last_R: Tensor | None
    asked: Sequence[int]
    reader: Reader | None


class LeanForward:
    """See Forward and the head of this file. The base's parameters become parts of the joined ones; their values stay.

    int8: with weights in eight bits; then the cache and the stack's adapters are in float64.
    Raises: BaseError for a base that is not, part by part, what the family's code in transformers makes, and for int8
    where this torch lacks it.
    """

    def __init__(self, stack: Stack, cache: SlotCache, *, int8: bool = False) -> None:
        refuse_other(stack.base)
        base: Any = stack.base
        config, names = base.config, {id(module): name for name, module in base.named_modules()}
        self._stack, self._cache, self._is_int8 = stack, cache, int8
        self._n_queries, self._n_keys = config.num_attention_heads, config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._epsilon = float(config.rms_norm_eps)
        self._embedding = base.model.embed_tokens.weight
        self._norm, self._rotary = base.model.norm.weight, base.model.rotary_emb
        self._turns_P = self._embedding.new_zeros(0, 2 * self._width)
        self._kinds = kinds = getattr(config, "layer_types", None) or [""] * config.num_hidden_layers
        has_7_bits = int8 and needs_7_bits()
        packs = can_pack() and _n_bytes(base) <= min(MOST_PACKED_MB * 2**20, psutil.virtual_memory().available // 2)

        def join(*linears: nn.Linear) -> Joined:
            made = joined(linears, [names[id(linear)] for linear in linears])
            if int8:
                return made.round(has_7_bits=has_7_bits)
            return made.pack() if packs else made

        self._layers = [
            self._layer_of(layer, number, kind, join)
            for number, (layer, kind) in enumerate(zip(anatomy.decoder_layers(base), kinds, strict=True))
        ]
        self._head = join(base.lm_head)
        self.team = Team()
        self.tried: dict[int, Wakes] = {}  # what wakes all threads in a step of so many rows
        self._wakes = Wakes.EVERYTHING

    def __call__(
        self, ids_RT: Tensor, frame: Frame, masks: Masks, asked: Sequence[int], reader: Reader | None
    ) -> Tensor:
        """See Forward."""
        self._wakes = for_rows(self.tried, len(ids_RT)) if ids_RT.shape[1] == 1 else Wakes.EVERYTHING
        with self.team.all() if self._wakes is Wakes.EVERYTHING else nullcontext():
            return self._run(ids_RT, frame, masks, asked, reader)

    def _run(self, ids_RT: Tensor, frame: Frame, masks: Masks, asked: Sequence[int], reader: Reader | None) -> Tensor:
        turn = self._turn(frame, masks, asked, reader)
        if reader is not None:
            reader.begin(ids_RT)
        hidden_RTH = self._stack.embedded(ids_RT, functional.embedding(ids_RT, self._embedding))
        for layer in self._layers:
            hidden_RTH = self._through(layer, hidden_RTH, turn)
        if not asked:
            return hidden_RTH.new_empty(0, sum(self._head.widths))
        if hidden_RTH.shape[1] > 1:
            hidden_RTH = _last(hidden_RTH, turn.last_R)
        if len(asked) < len(hidden_RTH):
            hidden_RTH = hidden_RTH[list(asked)]
        return self._product(self._head, self._normed(hidden_RTH, self._norm))[:, 0]

    def _layer_of(self, module: Any, number: int, kind: str, join: Callable[..., Joined]) -> Layer:
        attention, mlp = module.self_attn, module.mlp
        turn_norms = None
        if hasattr(attention, "q_norm"):
            counts = ((attention.q_norm, self._n_queries), (attention.k_norm, self._n_keys))
            turn_norms = torch.cat([norm.weight.detach().expand(count, -1) for norm, count in counts])
        return Layer(
            number=number,
            kind=kind,
            before_attention=module.input_layernorm.weight,
            qkv=join(attention.q_proj, attention.k_proj, attention.v_proj),
            turn_norms=turn_norms,
            o=join(attention.o_proj),
            before_mlp=module.post_attention_layernorm.weight,
            gate_up=join(mlp.gate_proj, mlp.up_proj),
            down=join(mlp.down_proj),
        )

    def _turn(self, frame: Frame, masks: Masks, asked: Sequence[int], reader: Reader | None) -> Turn:
        if frame.n_seen > len(self._turns_P):
            self._turns_P = self._rotation(-(-frame.n_seen // BLOCK) * BLOCK)
        cos_RT1D, sin_RT1D = self._turns_P[frame.positions_RT].unsqueeze(2).chunk(2, dim=-1)
        by_kind = dict.fromkeys(self._kinds, masks) if isinstance(masks, Tensor) else masks
        shared, last_R = self._n_queries // self._n_keys, None
        if frame.positions_RT.shape[1] > 1:
            last_R = torch.tensor(frame.counts, device=frame.positions_RT.device) - 1
        lasts = {kind: _last(mask.transpose(1, 2), last_R) for kind, mask in by_kind.items()}
        lasts = {kind: mask.expand(-1, self._n_keys, shared, -1).flatten(0, 1) for kind, mask in lasts.items()}
        if last_R is None:
            return Turn(cos_RT1D, sin_RT1D, by_kind, lasts, None, asked, reader)
        wide = {kind: mask.repeat(1, 1, shared, 1) for kind, mask in by_kind.items()} if shared > 1 else by_kind
        return Turn(cos_RT1D, sin_RT1D, wide, lasts, last_R, asked, reader)

    def _through(self, layer: Layer, hidden_RTH: Tensor, turn: Turn) -> Tensor:
        """One decoder layer. In the last one only the rows' last tokens go through its second half, and nothing does
        where no row is asked about.
        """
        self._tell(turn.reader, layer.number, (), hidden_RTH)
        is_last = layer is self._layers[-1]
        is_asked_only = is_last and turn.reader is None and turn.last_R is not None
        x_RTH = self._normed(hidden_RTH, layer.before_attention)
        qkv_RTO = self._multiplied(layer.qkv, x_RTH, layer.number, turn.reader)
        queries_RTQD, keys_RKSD, values_RKSD = self._kept(layer, qkv_RTO, turn)
        if is_last and not turn.asked:
            return hidden_RTH
        if is_asked_only:
            hidden_RTH, queries_RTQD = _last(hidden_RTH, turn.last_R), _last(queries_RTQD, turn.last_R)
        mixed_RTO = self._attended(layer, queries_RTQD, keys_RKSD, values_RKSD, turn)
        hidden_RTH = self._added(layer.o, mixed_RTO.to(hidden_RTH.dtype), hidden_RTH, layer.number, turn.reader)
        x_RTH = self._normed(hidden_RTH, layer.before_mlp)
        gate_RTO, up_RTO = self._multiplied(layer.gate_up, x_RTH, layer.number, turn.reader).chunk(2, dim=-1)
        hidden_RTH = self._added(
            layer.down, self._activated(gate_RTO).mul_(up_RTO), hidden_RTH, layer.number, turn.reader
        )
        return self._stack.edited(layer.number, hidden_RTH)

    def _kept(self, layer: Layer, qkv_RTO: Tensor, turn: Turn) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, turned, and all keys and values that are seen: those of these tokens are in the cache now."""
        n_rows, n_tokens, _ = qkv_RTO.shape
        heads = qkv_RTO.view(n_rows, n_tokens, self._n_queries + 2 * self._n_keys, self._width)
        turned = heads[:, :, : self._n_queries + self._n_keys]
        if layer.turn_norms is not None:
            turned.copy_(functional.rms_norm(turned, [self._width], None, self._epsilon).mul_(layer.turn_norms))
        low, high = turned.chunk(2, dim=-1)
        swapped = torch.cat((high, low), dim=-1)
        if self._is_int8:  # a product is rounded before it is added, wherever in memory it lies
            turned.mul_(turn.cos_RT1D).add_(swapped.mul_(turn.sin_RT1D))
        else:
            turned.mul_(turn.cos_RT1D).addcmul_(swapped, turn.sin_RT1D)
        new_RTKD, values_RTKD = heads[:, :, self._n_queries :].chunk(2, dim=2)
        kept = self._cache.write(layer.number, new_RTKD.transpose(1, 2), values_RTKD.transpose(1, 2))
        return turned[:, :, : self._n_queries], *kept

    def _attended(
        self, layer: Layer, queries_RTQD: Tensor, keys_RKSD: Tensor, values_RKSD: Tensor, turn: Turn
    ) -> Tensor:
        """What each query finds, all heads beside each other, [R, T, Q·D], in the type of the keys."""
        n_rows, n_tokens = queries_RTQD.shape[:2]
        shared = self._n_queries // self._n_keys
        queries_RTQD = queries_RTQD.to(keys_RKSD.dtype)
        if n_tokens == 1:  # sdpa takes five times as long for 32 rows (docs/log.md)
            queries = queries_RTQD.reshape(-1, shared, self._width)
            mask_XNS, scale = turn.last_masks[layer.kind], self._width**-0.5
            is_wide = keys_RKSD.nbytes + values_RKSD.nbytes > WIDE_MB * 2**20
            with self.team.all() if is_wide else nullcontext():
                scores_XNS = torch.baddbmm(mask_XNS, queries, keys_RKSD.flatten(0, 1).mT, alpha=scale)
                return torch.bmm(scores_XNS.softmax(-1), values_RKSD.flatten(0, 1)).view(n_rows, 1, -1)
        split = queries_RTQD.view(n_rows, n_tokens, self._n_keys, shared, self._width)
        queries = split.permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = turn.masks[layer.kind]
        mixed = functional.scaled_dot_product_attention(queries, keys_RKSD, values_RKSD, attn_mask=mask)
        apart = mixed.reshape(n_rows, self._n_keys, shared, n_tokens, self._width)
        return apart.permute(0, 3, 1, 2, 4).flatten(2)

    def _activated(self, gate_RTO: Tensor) -> Tensor:
        """silu of it; in eight bits piece by piece, so that where a thread's part ends changes nothing."""
        n_rows = max(1, GRAIN // gate_RTO.shape[-1])
        flat_NO = gate_RTO.flatten(0, 1)
        if not self._is_int8 or len(flat_NO) <= n_rows:
            return functional.silu(gate_RTO)
        made_NO = torch.cat([functional.silu(part) for part in torch.split(flat_NO, n_rows)])
        return made_NO.view(gate_RTO.shape)

    def _multiplied(self, joined: Joined, x: Tensor, number: int, reader: Reader | None) -> Tensor:
        """What layers that read the same x give, beside each other, with their adapters."""
        self._tell(reader, number, joined.names, x)
        return self._adapted(joined, x, self._product(joined, x))

    def _added(self, joined: Joined, x: Tensor, hidden: Tensor, number: int, reader: Reader | None) -> Tensor:
        """The stream with what a layer adds to it; the stream itself may change."""
        self._tell(reader, number, joined.names, x)
        return self._adapted(joined, x, hidden.add_(self._product(joined, x)))

    def _product(self, joined: Joined, x: Tensor) -> Tensor:
        """joined(x), on all threads where that is worth it."""
        if self._wakes is Wakes.PRODUCTS or (self._wakes is Wakes.HEAD and joined is self._head):
            with self.team.all():
                return joined(x)
        return joined(x)

    def _adapted(self, joined: Joined, x: Tensor, y: Tensor) -> Tensor:
        """y with what adapters add to it for x; it changes."""
        if not self._is_int8:
            self._stack.update_parts(joined.names, x, y, joined.widths)
        elif self._stack.loras.now is not None:
            exact = y.double()
            self._stack.update_parts(joined.names, x.double(), exact, joined.widths)
            y.copy_(exact)
        return y

    def _tell(self, reader: Reader | None, number: int, names: tuple[str, ...], x: Tensor) -> None:
        """Let a gate's network of this layer read what it reads: what enters the layer, or one of the linear layers."""
        if reader is None or number not in reader.gate.networks:
            return
        place = reader.gate.reads.get(number)
        if place in names or (place is None and not names):
            reader.read(number, x)

    def _normed(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, [hidden.shape[-1]], weight, self._epsilon)

    def _rotation(self, n_positions: int) -> Tensor:
        """Cosine and sine of positions by the base's own code, [P, 2 D]; the sine that meets the other half's negative
        has its sign.
        """
        positions = torch.arange(n_positions, device=self._embedding.device).unsqueeze(0)
        cos_1PD, sin_1PD = self._rotary(self._embedding, positions)
        low, high = sin_1PD.chunk(2, dim=-1)
        return torch.cat((cos_1PD, -low, high), dim=-1)[0]


def _n_bytes(base: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in base.parameters())


def _last(values_RTX: Tensor, last_R: Tensor | None) -> Tensor:
    """The last token of each row, [R, 1, …]."""
    if last_R is None:
        return values_RTX
    return values_RTX[torch.arange(len(last_R), device=last_R.device), last_R].unsqueeze(1)
