"""Who answers? A router reads the last turns of the user and says how likely each expert fits, and how likely none
does; `choose` makes a decision of that, which holds until another expert wins the conversation by a margin.

A router was trained by toolkit/ensemble/router.py on the experts' own talk. It lies in a folder as safetensors and JSON
and needs torch and numpy alone.
"""

# C conversations, E experts, S kinds of text that is no expert's, M = E + S, F numbers of the dense kind (hidden states
# or an embedding), G buckets, of them L of pieces of words, A manners.

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from toolkit import disk
from toolkit.adapters import anatomy
from toolkit.combine.route_encoder import Encoder, open_encoder
from toolkit.combine.route_features import (
    FARTHEST,
    N_ALL,
    N_BUCKETS,
    Pieces,
    hidden,
    last_user_turns,
    pieces,
)
from toolkit.combine.route_style import N_MANNERS, N_SIGNS, manners
from toolkit.corpus.talk import Turn
from toolkit.errors import InputError, Problem, RunError

Kind = Literal["centroid", "classifier", "embedding"]
KINDS: tuple[Kind, ...] = ("centroid", "classifier", "embedding")
VERSION = 2
PLAIN = 1  # an older version: knew no signs, and one calibration for all texts
WEIGHTS, FACTS = "router.safetensors", "router.json"
BASE = "base"  # what the bare base is called among weights, and as a default
FAMILIAR = 3  # numbers that say how familiar a text is
STRANGE = 2  # kinds of text that is no expert's: written, and whatever the base says unasked
_REMEDY = "Train it again, or copy the whole run folder"


@dataclass(frozen=True, eq=False)
class Router:
    """Chances of experts from a text's pieces and from numbers about it; see the head of this file.

    base_hash: of the base whose hidden states it was trained on, "" where it reads none. width: F. encoder: where the
    encoder of kind embedding lies, as the user named it, and the hash of its files.
    tensors: `rarity` [G], `known` [L] (how many talks of the experts hold a piece), `pieces` [G, M], `mean` and
    `scale` [F], `numbers` [F, M], `familiar` [3, M], `bias` [M], `calibration` [A, 3]. The M columns are a score for
    each expert, then one for each kind of text that is no expert's, against all experts together.
    """

    kind: Kind
    experts: tuple[str, ...]
    width: int
    base_hash: str
    tensors: Mapping[str, Tensor]
    encoder: tuple[str, str] | None = None
    encode: Encoder | None = None

    def probabilities(self, model: nn.Module, tokenizer: Any, conversations: Sequence[Sequence[Turn]]) -> Tensor:
        """For each conversation the chance of every expert, in the order of `experts`, and last that it fits nobody,
        [C, E+1] on the CPU; rows sum to 1. What answers said is not read.

        model: the bare base, of which the embedding and a quarter of the layers run over at most 64 tokens. A
        conversation in which the user has not said a word fits nobody.
        Raises: RunError for a base of another shape than the one it was trained on.
        """
        texts = [last_user_turns(conversation) for conversation in conversations]
        if not texts:
            return torch.zeros(0, len(self.experts) + 1)
        return self.of_texts(texts, self.numbers(model, tokenizer, texts))

    def of_texts(self, texts: Sequence[str], numbers_CF: Tensor) -> Tensor:
        """`probabilities` of texts whose dense numbers are known."""
        scores = self.scores(pieces(texts), numbers_CF)
        chances = chances_of(scores, self.tensors["calibration"][manners(texts)])
        if not all(texts):
            silent = torch.tensor([not text for text in texts])
            chances[silent] = 0.0
            chances[silent, -1] = 1.0
        return chances

    def numbers(self, model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
        """The dense numbers of texts, [C, F], as they come."""
        if self.encode is not None:
            return self.encode(texts)
        if self.width != 2 * anatomy.hidden_size(model):
            says = f"was trained on a base whose hidden states are {self.width // 2} wide, this one's are"
            raise RunError(f"the router {says} {anatomy.hidden_size(model)}. Train the router again on this base.")
        return hidden(model, tokenizer, texts)

    def scores(self, found: Pieces, numbers_CF: Tensor) -> Tensor:
        """What the chances are made of, [C, M]."""
        tensors = self.tensors
        scores = embedding_bag(
            torch.from_numpy(found.buckets),
            tensors["pieces"],
            torch.from_numpy(found.starts),
            mode="sum",
            per_sample_weights=found.weighed(tensors["rarity"]),
        )
        scores = scores + standard(numbers_CF, tensors["mean"], tensors["scale"]) @ tensors["numbers"]
        return scores + found.familiarity(tensors["known"]) @ tensors["familiar"] + tensors["bias"]

    def save(self, folder: Path) -> None:
        """Write the router into a folder of its own, whole or not at all. Raises: DiskError."""
        facts = {
            "version": VERSION,
            "kind": self.kind,
            "experts": list(self.experts),
            "width": self.width,
            "buckets": N_BUCKETS,
            "base": self.base_hash,
            "encoder": None if self.encoder is None else {"name": self.encoder[0], "hash": self.encoder[1]},
        }

        def fill(place: Path) -> None:
            save_file({name: tensor.contiguous() for name, tensor in self.tensors.items()}, place / WEIGHTS)
            disk.write_json(place / FACTS, facts)

        disk.write_folder(folder, fill)

    @classmethod
    def load(cls, folder: Path, base_hash: str | None = None) -> "Router":
        """Read a router. base_hash: of the base it is to read, None where that is known to be the one.

        Raises: RunError where the folder is missing, damaged, of another version, or made for another base; BaseError
        where the encoder of kind embedding cannot be opened.
        """
        facts = _read_facts(folder)
        experts = tuple(facts["experts"])
        tensors = _read_tensors(folder, len(experts), facts["width"], facts["version"])
        named = facts["encoder"]
        if base_hash is not None and named is None and facts["base"] != base_hash:
            raise RunError(
                f"{folder}: this router was trained on another base (its files differ), and reads its hidden states. "
                "Bring that base back, or train the router again."
            )
        encoder, encode = None, None
        if named is not None:
            encoder = (str(named["name"]), str(named["hash"]))
            encode, found = open_encoder(encoder[0])
            if found != encoder[1]:
                raise RunError(
                    f"{folder}: {encoder[0]} is not the encoder that this router was trained with (its files differ). "
                    "Bring that one back, or train the router again."
                )
        return cls(facts["kind"], experts, facts["width"], facts["base"], MappingProxyType(tensors), encoder, encode)


def standard(numbers_CF: Tensor, mean_F: Tensor, scale_F: Tensor) -> Tensor:
    """Numbers on one scale, none farther than FARTHEST deviations from the middle, a row of length about 1."""
    far = FARTHEST / max(1, len(mean_F)) ** 0.5
    return ((numbers_CF - mean_F) * scale_F).clamp(-far, far)


def chances_of(scores_CM: Tensor, calibration_C3: Tensor) -> Tensor:
    """Chances from scores, [C, E+1]: whether the text is an expert's at all, and whose.

    calibration_C3: for each text (or for all, [3]) what scores of experts are divided by (temperature), then the slope
    and the shift of the score of being nobody's, which is the logarithm of the summed exponentials of its kinds.
    """
    temperature_C1, slope_C1, shift_C1 = calibration_C3.reshape(-1, 3, 1).unbind(1)
    experts_CE, strange_CS = scores_CM[:, :-STRANGE], scores_CM[:, -STRANGE:]
    nobody_C1 = torch.sigmoid(slope_C1 * torch.logsumexp(strange_CS, dim=1, keepdim=True) + shift_C1)
    return torch.cat([torch.softmax(experts_CE / temperature_C1, dim=1) * (1.0 - nobody_C1), nobody_C1], dim=1)


def _read_facts(folder: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        version = facts["version"]
    except FileNotFoundError:
        raise RunError(f"{folder}: there is no router ({FACTS} is missing). {_REMEDY}.") from None
    except (OSError, ValueError, KeyError, TypeError) as broken:
        raise RunError(f"{folder / FACTS}: damaged ({type(broken).__name__}: {broken}). {_REMEDY}.") from None
    if version not in (PLAIN, VERSION):
        says = f"a router of version {version}; this Maltu reads {PLAIN} and {VERSION}. Train it again."
        raise RunError(f"{folder}: {says}")
    experts, width, named = (facts.get(key) for key in ("experts", "width", "encoder"))
    is_right = (
        facts.get("kind") in KINDS
        and isinstance(experts, list)
        and len(experts) >= 2
        and all(isinstance(name, str) for name in experts)
        and isinstance(width, int)
        and facts.get("buckets") == N_BUCKETS
        and isinstance(facts.get("base"), str)
        and (named is None or (isinstance(named, dict) and {"name", "hash"} <= set(named)))
        and (named is not None) == (facts.get("kind") == "embedding")
    )
    if not is_right:
        raise RunError(f"{folder / FACTS}: damaged (its entries do not say what a router is). {_REMEDY}.")
    return facts


def _read_tensors(folder: Path, n_experts: int, width: int, version: int) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as broken:
        raise RunError(f"{path}: cannot be read ({type(broken).__name__}: {broken}). {_REMEDY}.") from None
    wanted = shapes(n_experts, width)
    if version == PLAIN:
        columns = n_experts + STRANGE
        wanted |= {"rarity": (N_BUCKETS,), "pieces": (N_BUCKETS, columns), "calibration": (3,)}
    for name, shape in wanted.items():
        found = tensors.get(name)
        if found is None or tuple(found.shape) != shape or found.dtype != torch.float32:
            told = "is missing" if found is None else f"is {found.dtype} {list(found.shape)}"
            raise RunError(f"{path}: {name} {told}; a router of {n_experts} experts has {list(shape)}. {_REMEDY}.")
        if not torch.isfinite(found).all():
            raise RunError(f"{path}: {name} holds numbers that are not finite. {_REMEDY}.")
    read = {name: tensors[name] for name in wanted}
    return _with_signs(read) if version == PLAIN else read


def _with_signs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of version PLAIN in today's shapes, for the same chances: a sign weighs nothing."""
    rarity, weights = tensors["rarity"], tensors["pieces"]
    return tensors | {
        "rarity": torch.cat([rarity, torch.zeros(N_SIGNS)]),
        "pieces": torch.cat([weights, torch.zeros(N_SIGNS, weights.shape[1])]),
        "calibration": tensors["calibration"].repeat(N_MANNERS, 1),
    }


def shapes(n_experts: int, width: int) -> dict[str, tuple[int, ...]]:
    """The tensors of a router and their shapes."""
    columns = n_experts + STRANGE
    return {
        "rarity": (N_ALL,),
        "known": (N_BUCKETS,),
        "pieces": (N_ALL, columns),
        "mean": (width,),
        "scale": (width,),
        "numbers": (width, columns),
        "familiar": (FAMILIAR, columns),
        "bias": (columns,),
        "calibration": (N_MANNERS, 3),
    }


@dataclass(frozen=True)
class Choice:
    """Who answers a conversation.

    expert: whose turn it is, None for the bare base. weights: of the experts that answer together, the likeliest first,
    sum 1; the base is called `base`. other: the chance that the conversation fits nobody. fits: False where nobody
    fitted and the default answers.
    """

    expert: str | None
    weights: Mapping[str, float]
    other: float
    probabilities: Mapping[str, float]
    fits: bool = True


def choose(
    row: Sequence[float] | Tensor,
    experts: Sequence[str],
    *,
    before: Choice | None = None,
    top_k: int = 1,
    default: str = BASE,
    margin: float = 0.1,
) -> Choice:
    """Decide by a row of `Router.probabilities`: the likeliest, be it an expert or nobody.

    A conversation that was somebody's (or nobody's) before stays so until another's chance is larger by more than
    `margin`. Where nobody fits, `default` answers alone: an expert, or `base`. top_k: how many experts answer together,
    weighted by their chances; all of them where there are fewer.
    Raises: InputError for a default that is neither an expert nor `base`, a top_k below 1, or a row of another length.
    """
    chances = [float(value) for value in row]
    _check(chances, experts, top_k, default)
    by_name = dict(zip(experts, chances, strict=False))
    other = chances[-1]
    contest: dict[str | None, float] = {None: other}  # None: nobody
    contest.update(by_name)
    winner = max(contest, key=contest.__getitem__)
    held = winner if before is None else (before.expert if before.fits else None)
    if held in contest and contest[winner] - contest[held] <= margin:
        winner = held
    if winner is None:
        answers = None if default == BASE else default
        return Choice(answers, {default: 1.0}, other, by_name, fits=False)
    ranked = sorted(by_name, key=lambda name: (name != winner, -by_name[name]))[:top_k]
    total = sum(by_name[name] for name in ranked)
    weights = {name: by_name[name] / total for name in ranked} if total > 0 else {winner: 1.0}
    return Choice(winner, weights, other, by_name)


def _check(chances: Sequence[float], experts: Sequence[str], top_k: int, default: str) -> None:
    problems = []
    if len(chances) != len(experts) + 1:
        says = f"{len(chances)} chances for {len(experts)} experts. Give one for each, and one that nobody fits."
        problems.append(Problem("row", says))
    if default != BASE and default not in experts:
        problems.append(Problem("default", f"{default!r} is no expert. There are: {', '.join(experts)}, and {BASE}."))
    if top_k < 1:
        problems.append(Problem("top_k", f"{top_k} experts cannot answer. Give 1 or more."))
    if problems:
        raise InputError("route", problems)
