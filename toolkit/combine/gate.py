"""A gate: a small network that gives each token weights over frozen experts, summed inside the layers in one pass.

    gate = Gate.load(folder)
    with gated(stack, gate) as opened:
        generate(opened, tokenizer, prompts, sampling)

It reads the residual stream that enters a decoder layer (per: layer, one network a layer) or, once for all, the output
of layer 0 (per: model: the stream that enters layer 1, from which layers 1 and up take their weights). What runs before
anything was read (layer 0 of per: model, adapted parts outside the decoder's layers) has one set of weights for every
token, `prior`, learnt too, which keeps all experts whatever `top_k`. A token's weights follow from the stream at that
token alone, so a key/value cache, chunks, padding and neighbours change nothing. Where X-LoRA (arXiv 2402.07148) runs
the base twice, without a cache, this runs it once. All experts are computed: `top_k` saves no work.
"""

# B rows, T tokens, K experts, H hidden, D width of the gate's network, L decoder layers.

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from toolkit import disk
from toolkit.adapters import anatomy
from toolkit.combine.methods import Method, method_named
from toolkit.combine.rows import Apart, answering
from toolkit.errors import AdapterError, InputError, Problem, RunError
from toolkit.stack.stack import BASE, Gates, Stack

Per = Literal["layer", "model"]
How = Literal["learned", "arrow"]
CONFIG, TENSORS = "gate.json", "gate.safetensors"
VERSION = 1
PRIOR = "prior"
PARTS = {"learned": ("down.weight", "down.bias", "up.weight", "up.bias"), "arrow": ("prototypes",)}
EPSILON = 1e-6
AGAIN = "Copy the folder again, or train the gate anew."


@dataclass(frozen=True, eq=False)
class Gate:
    """See the head of this file; gate_start.py and `Gate.load` make one.

    experts: names in the stack, lora and reft. hashes: of the experts it was made for; another adapter of the same name
    is refused. reads: for arrow, the linear layer of each decoder layer whose input it looks at. tensors: of each
    network by layer, `layers.N.…`, and `prior` [K].
    """

    experts: tuple[str, ...]
    per: Per
    how: How
    n_layers: int
    n_features: int
    tensors: Mapping[str, Tensor]
    top_k: int | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)
    reads: Mapping[int, str] = field(default_factory=dict)

    @property
    def method(self) -> Method:
        """How it works, in words."""
        return method_named("gate", self.how)

    @property
    def networks(self) -> tuple[int, ...]:
        """The layers at which something is read."""
        return tuple(sorted({int(name.split(".")[1]) for name in self.tensors if name != PRIOR}))

    def network_of(self, layer: int | None) -> int | None:
        """The network that gives a layer its weights; None: the prior does."""
        if layer is None:
            return None
        found = layer if self.per == "layer" else min(layer, 1)
        return found if found in self.networks else None

    def probabilities(self, network: int | None, x_BTH: Tensor) -> Tensor:
        """What the softmax over the experts gives for what was read, [B, T, K] in float32 or, where its
        tensors are in it, float64; None: the prior.
        """
        with torch.autocast(x_BTH.device.type, enabled=False):
            prior_K = self.tensors[PRIOR]
            if network is None:
                return prior_K.softmax(-1).expand(*x_BTH.shape[:2], -1)
            x_BTH = x_BTH.to(prior_K.device, torch.promote_types(prior_K.dtype, torch.float32))
            parts = [self.tensors[f"layers.{network}.{part}"] for part in PARTS[self.how]]
            if self.how == "arrow":
                return (x_BTH @ parts[0].mT).abs().softmax(-1)
            x_BTH = x_BTH * torch.rsqrt(x_BTH.square().mean(-1, keepdim=True) + EPSILON)
            read_BTD = nn.functional.gelu(nn.functional.linear(x_BTH, parts[0], parts[1]))
            return nn.functional.linear(read_BTD, parts[2], parts[3]).softmax(-1)

    def kept(self, probabilities_BTK: Tensor) -> Tensor:
        """The weights: the probabilities, or the `top_k` largest of each token, made to sum to 1 again."""
        if self.top_k is None or self.top_k >= len(self.experts):
            return probabilities_BTK
        places = probabilities_BTK.topk(self.top_k).indices
        largest_BTK = probabilities_BTK * torch.zeros_like(probabilities_BTK).scatter(-1, places, 1.0)
        return largest_BTK / largest_BTK.sum(-1, keepdim=True)

    def check(self, stack: Stack) -> None:
        """Raise AdapterError, naming what does not fit, unless the stack holds these experts on a base of this shape.

        An expert of a kind that has no weights per token (prefix, embedding) is refused by name.
        """
        found = (len(anatomy.decoder_layers(stack.base)), anatomy.hidden_size(stack.base))
        if found != (self.n_layers, self.n_features):
            raise AdapterError(
                f"gate: made for a base of {self.n_layers} layers of {self.n_features}, and this one has {found[0]} of "
                f"{found[1]}. Load the base it was trained on."
            )
        refuse_unfit(stack, self.experts)
        others = [name for name, known in self.hashes.items() if stack.hash(name) != known]
        if others:
            raise AdapterError(
                f"gate: {', '.join(others)} is not the adapter that the gate was made for (its weights differ). Train "
                "the gate anew, or load the adapter of its own run."
            )

    def reader(self, stack: Stack) -> "Reader":
        """What reads a base at work, inside `with`; see Reader. Raises: what `check` does."""
        self.check(stack)
        return Reader(self.at(anatomy.device_of(stack.base), stack.dtype), stack.base)

    @contextmanager
    def gates(self, stack: Stack) -> Iterator[Gates]:
        """What a forward pass of the stack takes as `gates`, for rows of the base; good for any number of passes while
        it lasts.

        Raises: what `check` does.
        """
        with self.reader(stack) as reader:
            yield reader.gates

    def at(self, device: torch.device, dtype: torch.dtype = torch.float32) -> "Gate":
        """The same gate on a device, in this type, float32 at least; tensors that are there already are shared."""
        wide = torch.promote_types(dtype, torch.float32)
        tensors = {name: tensor.to(device, wide) for name, tensor in self.tensors.items()}
        return Gate(**{**vars(self), "tensors": tensors})

    # Folders

    def save(self, folder: Path) -> None:
        """Write gate.json and gate.safetensors into a folder, whole or not at all."""
        held = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        said = {key: value for key, value in vars(self).items() if key != "tensors"}
        said |= {"version": VERSION, "reads": {str(layer): name for layer, name in self.reads.items()}}

        def fill(target: Path) -> None:
            save_file(held, target / TENSORS, metadata={"format": "pt"})
            disk.write_json(target / CONFIG, said)

        disk.write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path) -> "Gate":
        """The gate in a folder, as it was saved. Raises: RunError that says what is missing or damaged."""
        try:
            said = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
            tensors = load_file(folder / TENSORS)
        except FileNotFoundError as absent:
            lacks = Path(absent.filename or TENSORS).name
            raise RunError(f"{folder}: holds no gate ({lacks} is missing). {AGAIN}") from absent
        except (OSError, ValueError, SafetensorError) as broken:
            raise RunError(f"{folder}: damaged ({broken}). {AGAIN}") from broken
        gate = _from_json(folder, said, tensors)
        problems = _misfits(gate)
        if problems:
            raise RunError(f"{folder}: {'; '.join(problems[:4])}. {AGAIN}")
        return gate


class Reader:
    """Reads a base at work, inside `with`, and gives the weights of its layers; outside nothing hangs on the base.

    found: the weights of the last pass by network, [B, T, K]; probabilities: what they were before `top_k`.
    """

    def __init__(self, gate: Gate, base: nn.Module) -> None:
        self.gate = gate
        self.gates = Gates(gate.experts, self.weights)
        self.found: dict[int, Tensor] = {}
        self.probabilities: dict[int, Tensor] = {}
        self._tokens: Tensor | None = None
        self._first = anatomy.input_embeddings(base)
        layers = anatomy.decoder_layers(base)
        self._watched = {
            number: base.get_submodule(gate.reads[number]) if gate.reads else layers[number] for number in gate.networks
        }
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> "Reader":
        """From here on the base is read."""
        self._handles = [self._first.register_forward_pre_hook(lambda _, inputs: self.begin(inputs[0]))]
        for number, module in self._watched.items():
            self._handles.append(module.register_forward_pre_hook(self._read_of(number), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        """The base is as it was."""
        while self._handles:
            self._handles.pop().remove()

    def weights(self, layer: int | None) -> Tensor:
        """The weights of a decoder layer in the pass that is going on, or in the last one, [B, T, K]."""
        network = self.gate.network_of(layer)
        if network is None and self._tokens is not None:
            return self.gate.probabilities(None, self._tokens)
        if network is None or network not in self.found:
            raise AdapterError(
                f"gate: layer {layer} asks for weights before anything was read. Run the base on token ids, inside the "
                "gate's `with`, layer after layer."
            )
        return self.found[network]

    def begin(self, ids_BT: Tensor) -> None:
        """A pass over these tokens begins. Forward passes written by hand, which call no module, say so, and `read`."""
        self._tokens = ids_BT.unsqueeze(-1)
        self.found.clear()
        self.probabilities.clear()

    def read(self, number: int, x_BTH: Tensor) -> None:
        """What network `number` reads: what enters its decoder layer, or the linear layer that `gate.reads` names."""
        self.probabilities[number] = self.gate.probabilities(number, x_BTH)
        self.found[number] = self.gate.kept(self.probabilities[number])

    def _read_of(self, number: int) -> Callable[..., None]:
        def read(_module: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            self.read(number, inputs[0] if inputs else named["hidden_states"])

        return read


@dataclass(frozen=True)
class Gated(Apart):
    """Experts of a stack and their gate opened as one model: one row of the base for each row, one pass, one cache.

    owners: (-1,). Raises: what `Gate.check` does.
    """

    gate: Gate

    def __post_init__(self) -> None:
        """The gate is made ready for the stack."""
        self.__dict__["reader"] = self.gate.reader(self.stack)

    @property
    def reader(self) -> Reader:
        """What weighs the tokens of a pass."""
        found: Reader = self.__dict__["reader"]
        return found

    def logits(self, ids_BT: Tensor, mask_BS: Tensor, cache: Any, keep_BT: Tensor | None = None) -> Tensor:
        """See Opened."""
        with self.reader:
            return super().logits(ids_BT, mask_BS, cache, keep_BT)

    def gates(self) -> Gates:
        """See Apart."""
        return self.reader.gates


@contextmanager
def gated(stack: Stack, gate: Gate) -> Iterator[Gated]:
    """Open a gate over a stack, for `generate`, `stream` and `score`; dropout is off while it lasts.

    Raises: AdapterError where the gate does not fit the stack.
    """
    with answering(stack, [None], Gated, gate=gate) as opened:
        yield opened


@dataclass(frozen=True)
class Trace:
    """The weights of each token of a text, as plain numbers: `weights[token][layer][expert]`, `mean[token][expert]`."""

    experts: tuple[str, ...]
    tokens: tuple[int, ...]
    weights: tuple[tuple[tuple[float, ...], ...], ...]
    mean: tuple[tuple[float, ...], ...]


def trace(stack: Stack, gate: Gate, ids: Sequence[int]) -> Trace:
    """How a gate weighs every token of a text, by layer and averaged over the layers. Cost: one forward pass.

    Raises: AdapterError where the gate does not fit the stack; InputError for no tokens.
    """
    if not ids:
        raise InputError("text", [Problem("", "has no tokens. Give it at least one.")])
    with gated(stack, gate) as opened:
        row_BT = torch.tensor([list(ids)], device=opened.device)
        opened.logits(row_BT, torch.ones_like(row_BT), None)
        layers = [opened.reader.weights(layer)[0].cpu() for layer in range(gate.n_layers)]
    weights_TLK = torch.stack(layers, 1)
    return Trace(
        experts=gate.experts,
        tokens=tuple(ids),
        weights=tuple(tuple(tuple(layer) for layer in token) for token in weights_TLK.tolist()),
        mean=tuple(tuple(token) for token in weights_TLK.mean(1).tolist()),
    )


def networks_for(per: Per, n_layers: int) -> tuple[int, ...]:
    """The layers at which a gate reads the stream. Raises: AdapterError for one layer under per: model."""
    if per == "layer":
        return tuple(range(n_layers))
    if n_layers < 2:
        raise AdapterError("gate: per: model reads what layer 0 gives, and this base has no other. Use per: layer.")
    return (1,)


def refuse_unfit(stack: Stack, experts: Sequence[str]) -> None:
    """Raise AdapterError for experts that the stack lacks, that stand twice, or that have no weights per token."""
    weights_BTK = torch.zeros(1, 1, len(experts))
    with stack.routed([BASE], gates=Gates(tuple(experts), weights_BTK), n_tokens=1):
        pass


def hashes_of(stack: Stack, experts: Sequence[str]) -> dict[str, str]:
    """By name, what tells these adapters from others."""
    return {name: stack.hash(name) for name in experts}


def _from_json(folder: Path, said: Any, tensors: Mapping[str, Tensor]) -> Gate:
    """Raises: RunError for what is no gate of this version."""
    try:
        if said["version"] != VERSION:
            raise RunError(f"{folder}: a gate of version {said['version']}, and this Maltu reads {VERSION}. Update it.")
        if said["per"] not in get_args(Per) or said["how"] not in get_args(How):
            raise ValueError(f"per {said['per']}, how {said['how']}")
        experts = tuple(said["experts"])
        if not experts or not all(isinstance(name, str) for name in experts) or len(set(experts)) != len(experts):
            raise ValueError(f"experts {said['experts']}")
        top_k = said["top_k"]
        if top_k is not None and not 1 <= int(top_k) <= len(experts):
            raise ValueError(f"top_k {top_k}")
        sizes = (int(said["n_layers"]), int(said["n_features"]))
        reads = {int(layer): str(name) for layer, name in said["reads"].items()}
        return Gate(experts, said["per"], said["how"], *sizes, dict(tensors), top_k, dict(said["hashes"]), reads)
    except (KeyError, TypeError, ValueError, AttributeError) as odd:
        raise RunError(f"{folder / CONFIG}: damaged ({type(odd).__name__}: {odd}). {AGAIN}") from odd


def _misfits(gate: Gate) -> list[str]:
    """What of the tensors is missing, too much, of another shape, or no numbers."""
    n_experts, wide = len(gate.experts), gate.n_features
    learned = networks_for(gate.per, gate.n_layers)
    wanted: dict[str, tuple[int | None, ...]] = {PRIOR: (n_experts,)}
    for number in sorted(gate.reads) if gate.how == "arrow" else learned:
        width = next(iter(gate.tensors.get(f"layers.{number}.down.bias", torch.zeros(0)).shape), 0)
        shapes: tuple[tuple[int | None, ...], ...] = ((width, wide), (width,), (n_experts, width), (n_experts,))
        if gate.how == "arrow":
            shapes = ((n_experts, None),)
        wanted |= {f"layers.{number}.{part}": shape for part, shape in zip(PARTS[gate.how], shapes, strict=True)}
    problems = [f"{name} is missing" for name in wanted if name not in gate.tensors]
    for name, tensor in gate.tensors.items():
        shape = wanted.get(name)
        if shape is None:
            problems.append(f"{name} has no place in it")
        elif tensor.dim() != len(shape) or any(b not in (None, a) for a, b in zip(tensor.shape, shape, strict=True)):
            problems.append(f"{name} is {tuple(tensor.shape)} where {shape} fits")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds values that are no finite numbers")
    return problems
