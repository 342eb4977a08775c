"""From a recipe to everything a fit needs: talk, base, renderer, rows, and the plan. Nothing is trained or written
here.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from toolkit.bases.load import LoadedBase, LoadedTokenizer, load_base
from toolkit.bases.new import new_model, train_tokenizer, windows
from toolkit.corpus.gather import Corpus
from toolkit.corpus.render import IGNORED, Learn, Rendered, Renderer
from toolkit.disk import hash_text
from toolkit.errors import DataError, Problem
from toolkit.fit.plan import Place, Plan, Shape, is_new, max_length
from toolkit.loaded import pick_device
from toolkit.recipe.model import Base, NewBase, Recipe

PARTS = ("train", "valid", "test")


@dataclass(frozen=True)
class Rows:
    """The rendered conversations of each part, and what rendering dropped by reason (and cut, as `old_turns`).

    kept_talks: for each row of a part the place of its talk in the corpus; a base from scratch cuts long talks in rows.
    entry: for each row of train the place in data.train of the file that it came from.
    """

    train: list[Rendered]
    valid: list[Rendered]
    test: list[Rendered]
    dropped: dict[str, int]
    kept_talks: dict[str, list[int]]
    entry: list[int]

    def held_out(self) -> tuple[str, list[Rendered]]:
        """The part that says how good the result is: test, else valid; empty when neither was asked for."""
        return ("test", self.test) if self.test else ("valid", self.valid)


def open_base(recipe: Recipe, corpus: Corpus) -> LoadedBase:
    """The recipe's base on the device of this process; one from scratch is made, its tokenizer learned from
    `corpus`.
    """
    device = place_here().device
    if isinstance(recipe.base, Base):
        return load_base(recipe.base, device, weight_dtype(recipe, device))
    assert isinstance(recipe.base, NewBase)  # several bases are chosen from before a run: refused when it is read
    return _make_base(recipe, recipe.base, corpus, device)


def _make_base(recipe: Recipe, base: NewBase, corpus: Corpus, device: str) -> LoadedBase:
    texts = (turn.content for talk in corpus.train for turn in talk.turns)
    tokenizer = train_tokenizer(texts, base.new.vocab, context=base.new.context)
    model = new_model(base.new, tokenizer, recipe.train.seed)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers types `to` by its decorator
    described = f"new {base.new.model_dump_json()} {recipe.train.seed} {tokenizer.backend_tokenizer.to_str()}"
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        template=tokenizer.chat_template,
        template_from="ours",
        source="new",
        folder=Path(),
        hash=hash_text(described),
        context=base.new.context,
        device=torch.device(device),
        dtype=torch.float32,
    )


def weight_dtype(recipe: Recipe, device: str) -> torch.dtype:
    """How the base's weights are held: float32 where they learn or on a CPU, else what the precision asks for."""
    wants_bf16 = recipe.train.precision in ("auto", "bf16")
    is_cuda = device.startswith("cuda")
    if recipe.adapter.kind == "full" or not is_cuda:
        return torch.float32
    return torch.bfloat16 if wants_bf16 and torch.cuda.is_bf16_supported() else torch.float32


def place_here() -> Place:
    """The device of this process (torchrun gives each its own), how many there are, and free memory for each."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    device = str(pick_device("auto"))
    if device == "cuda":
        device = f"cuda:{rank}"
        free = torch.cuda.mem_get_info(device)[0]
        return Place(device, world, int(free), torch.cuda.is_bf16_supported())
    return Place(device, world, int(psutil.virtual_memory().available // world))


def meet() -> None:
    """Where several processes train together, each waits here for all of them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def said_by_main(plan: Plan) -> Plan:
    """The plan of process 0, in every process: each would make its own from the memory it sees free."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return plan
    told = [plan.facts()]
    torch.distributed.broadcast_object_list(told, src=0)
    return Plan(**told[0])


def shape_of(model: Any, context: int) -> Shape:
    """Sizes as planning wants them, of a model that may be on the meta device."""
    config: Any = model.config.get_text_config()
    n_parameters = sum(p.numel() for p in model.parameters())
    hidden, layers = getattr(config, "hidden_size", 0), getattr(config, "num_hidden_layers", 0)
    return Shape(n_parameters, int(hidden), int(layers), int(config.vocab_size), context)


def make_renderer(recipe: Recipe, base: LoadedBase | LoadedTokenizer) -> Renderer:
    """The renderer of this run. A base from scratch learns every token, the users' as well."""
    learn: Learn = "all" if is_new(recipe) else "assistant"
    length = max_length(recipe, base.context)
    if is_new(recipe):
        return Renderer(base.tokenizer, base.template, None, learn=learn)  # documents are cut into windows
    return Renderer(base.tokenizer, base.template, length, recipe.data.clean.too_long, learn)


def render_rows(recipe: Recipe, renderer: Renderer, corpus: Corpus) -> Rows:
    """Render every part. Raises DataError when nothing is left to learn, or more was dropped than the recipe allows."""
    parts: dict[str, list[Rendered]] = {}
    kept: dict[str, list[int]] = {}
    dropped: dict[str, int] = {}
    for part in PARTS:
        rows = list(renderer.training_all(getattr(corpus, part)))
        for row in rows:
            if row.dropped:
                dropped[row.dropped] = dropped.get(row.dropped, 0) + 1
            elif row.n_left_out:
                dropped["old_turns"] = dropped.get("old_turns", 0) + 1
        whole = [(i, row) for i, row in enumerate(rows) if not row.dropped]
        if isinstance(recipe.base, NewBase) and part != "train":  # training talk becomes windows: training_rows
            length = max_length(recipe, recipe.base.new.context)
            whole = [(i, piece) for i, row in whole for piece in cut_row(row, length)]
        kept[part] = [i for i, _ in whole]
        parts[part] = [row for _, row in whole]
    lost = sum(n for reason, n in dropped.items() if reason != "old_turns")
    total = sum(map(len, parts.values())) + lost
    if not parts["train"] or lost > recipe.data.clean.max_dropped * total:
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(dropped.items())) or "no rows"
        says = (
            f"{lost} of {total} conversations have no row to learn from ({reasons}). A longer train.max_length keeps"
            " long ones; data.clean.max_dropped allows more."
        )
        raise DataError(recipe.name, [Problem("data", says)])
    entry = [int(corpus.entry[i]) for i in kept["train"]]
    return Rows(parts["train"], parts["valid"], parts["test"], dropped, kept, entry)


def cut_row(row: Rendered, length: int) -> Iterator[Rendered]:
    """A row in pieces of at most `length`; the first token of a piece has nothing before it and is not learned."""
    for at in range(0, len(row.input_ids), length):
        end = at + length
        if len(row.input_ids) > at + 1:
            yield Rendered(row.input_ids[at:end], [IGNORED, *row.labels[at + 1 : end]], row.is_end[at:end])


def training_rows(recipe: Recipe, base: LoadedBase, rows: Rows) -> Sequence[tuple[list[int], list[int]]]:
    """Token ids and labels, a conversation a row; for a base from scratch, windows of the whole context.

    An epoch is one pass over them: rows stand here as often as the weights of THIS recipe's files say.
    """
    seen = weigh(recipe, rows)
    if not is_new(recipe):
        return [(row.input_ids, row.labels) for row in seen]
    document = base.tokenizer.bos_token_id
    assert document is not None  # train_tokenizer sets it
    length = max_length(recipe, base.context)
    streams = windows((row.input_ids for row in seen), length, document)
    return [(ids, [IGNORED, *ids[1:]]) for ids in streams if len(ids) > 1]


def weigh(recipe: Recipe, rows: Rows) -> list[Rendered]:
    """The rows of one epoch, as often as the weights of their files say; see `epoch_of`."""
    return [rows.train[i] for i in epoch_of(recipe, rows.entry)]


def epoch_of(recipe: Recipe, entry: Sequence[int]) -> list[int]:
    """The numbers of the rows of one epoch; `entry`: for each row the place of its file in data.train.

    Those of a file with weight w stand there w times on average, in passes over all files.

    Weight 2.3 is two whole copies and a draw of 30 % of the file's rows; the draw follows from train.seed and the place
    of the file, and stays the same in every epoch. A file keeps one row at least. Weights of 1 change nothing.
    """
    entry_N = np.asarray(entry, dtype=np.int64)  # N rows
    copies_N = np.ones(len(entry_N), dtype=np.int64)
    for place, weight in enumerate(recipe.data.train_weights):
        own = np.flatnonzero(entry_N == place)
        whole = int(weight)
        n_drawn = round((weight - whole) * len(own)) or int(whole == 0 and len(own) > 0)
        copies_N[own] = whole
        copies_N[np.random.default_rng([recipe.train.seed, place]).permutation(own)[:n_drawn]] += 1
    passes = range(int(copies_N.max(initial=0)))
    return [i for number in passes for i in np.flatnonzero(copies_N > number).tolist()]
