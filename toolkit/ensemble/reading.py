"""Whether every member can read what all of them are judged by: told before anybody is trained.

A text that fits one base and its template may be too long for another's, a prefix takes room from the texts, and a
member on a base of its own has its own words for the labels. Only tokenizers are opened here, never weights.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit.adapters import anatomy
from toolkit.bases.encoder import is_encoder, sketch_encoder
from toolkit.bases.load import LoadedTokenizer, load_tokenizer
from toolkit.bases.new import train_tokenizer
from toolkit.bundle import Run
from toolkit.corpus.gather import Corpus
from toolkit.corpus.render import IGNORED, Rendered, Renderer
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble.ground import Ground
from toolkit.errors import DataError, Problem, RecipeError
from toolkit.evaluate.classify import common_labels, label_ends, label_set
from toolkit.evaluate.encoder import encode
from toolkit.evaluate.talk import read_prompts
from toolkit.fit.classify import label_rows
from toolkit.fit.plan import max_length
from toolkit.fit.prepare import make_renderer, render_rows
from toolkit.loaded import WHOLE_MODEL, base_of, is_labeller, rendering_of
from toolkit.recipe.adapter import AdapterSection, PeftKind
from toolkit.recipe.combine import MAKES_MEMBERS
from toolkit.recipe.model import Base, NewBase, Recipe

Pieces = Sequence[Turn]


@dataclass(frozen=True)
class Reader:
    """A member that reads: what its base is called, how many tokens a prompt has there, how many fit.

    taken: of them, by a prefix. answer: tokens that the longest label needs, or one for an answer to begin.
    """

    base: str
    length_of: Callable[[Pieces], int]
    context: int
    taken: int
    answer: int

    @property
    def room(self) -> int:
        """Tokens that a prompt may have."""
        return self.context - self.taken - self.answer


def refuse_unread(ground: Ground) -> None:
    """Raise RecipeError with every member that cannot read, or label, what the members are judged by.

    Cost: what is held out is rendered once more for each member on a base of its own, and so is the talk of one that is
    to be trained there.
    """
    recipe, problems = ground.recipe, list[Problem]()
    labels = label_set(tuple(ground.corpus.train)) if recipe.task == "classify" else ()
    problems += _stacked(ground, labels)
    judged = _judged(ground)
    for name, one in ground.apart.items():
        at = f"experts.{name}"
        try:
            reader = _reader(one, ground.own.get(name), labels, recipe)
        except DataError as wrong:
            problems += [Problem(at, str(problem)) for problem in wrong.problems]
            continue
        if reader is not None:
            problems += _too_long(at, reader, [reader.length_of(turns) for turns in judged])
    if problems:
        raise RecipeError(recipe.name, problems)


# On the base that they share


def _stacked(ground: Ground, labels: Sequence[str]) -> Iterator[Problem]:
    """Members of one stack read the same rows; the one with the longest prefix has the least room."""
    if ground.recipe.task != "classify":
        return
    taken = {name: _taken(one.adapter) for name, one in ground.trained.items()}
    taken |= {name: _taken_in(run) for name, run in ground.found.items()}
    if ground.recipe.combine is not None and ground.recipe.combine.kind in MAKES_MEMBERS:
        taken = {"": _taken(ground.recipe.adapter)}
    if not taken:
        return
    worst = max(taken, key=lambda name: taken[name])
    answer = max(map(len, label_ends(ground.renderer, labels).values()))
    positions = getattr(anatomy.text_config(ground.base.model), "max_position_embeddings", None)
    context = ground.base.context if positions is None else int(positions)
    reader = Reader(ground.base.source, lambda turns: 0, context, taken[worst], answer)
    parts = ("valid", "test") if worst else ("train", "valid", "test")  # a bag and boosting ask about all their rows
    lengths = [_asked(row) for part in parts for row in getattr(ground.rows, part)]
    yield from _too_long(f"experts.{worst}" if worst else "adapter", reader, lengths)


def _asked(row: Rendered) -> int:
    """Tokens before the label of a row."""
    return next((place for place, label in enumerate(row.labels) if label != IGNORED), len(row.labels))


def _taken(adapter: AdapterSection) -> int:
    """Positions of the context that an adapter takes for itself."""
    told = adapter.options.get("num_virtual_tokens", 0) if isinstance(adapter, PeftKind) else None
    return int(getattr(adapter, "tokens", 0) if told is None else told)


def _taken_in(run: Run) -> int:
    """`_taken` of a run that exists."""
    try:
        told = json.loads((run.adapter() / "adapter_config.json").read_text(encoding="utf-8"))
        return int(told.get("num_virtual_tokens") or 0)
    except (OSError, ValueError, TypeError, AttributeError):
        return 0  # a whole model has none; what is damaged is told when it is opened


# On bases of their own


def _judged(ground: Ground) -> list[Pieces]:
    """What every member is asked: held-out texts to label or to write anew, or prompts that the shared base can
    answer."""
    recipe, corpus, kept = ground.recipe, ground.corpus, ground.rows.kept_talks
    if recipe.task != "chat":
        parts: dict[str, Sequence[Talk]] = {"valid": corpus.valid, "test": corpus.test}
        return [talks[at].turns[:-1] for part, talks in parts.items() for at in kept[part]]
    if not ground.apart or not recipe.evaluate.prompts:
        return []
    prompts = [prompt.turns for prompt in read_prompts(recipe.evaluate.prompts)]
    return [turns for turns in prompts if len(ground.renderer.prompt(turns)) < ground.base.context]


def _reader(one: Recipe | Run, own: Corpus | None, labels: Sequence[str], recipe: Recipe) -> Reader | None:
    """A member on a base of its own. Raises: DataError for talk of which it can learn too little, and for labels that
    it does not choose from, or cannot spell."""
    if isinstance(one, Recipe):
        assert own is not None  # gathered beside it
        return _reader_to_be(one, own, labels)
    facts = one.finished("base")
    if labels:
        common_labels({recipe.name: labels, str(one.path): tuple(facts.get("labels") or ())})
    elif is_labeller(facts):
        says = f"{one.path} labels texts; it cannot talk. It can vote under task: classify."
        raise DataError(recipe.name, [Problem("", says)])
    whole = one.path / WHOLE_MODEL
    base = Base(model=str(whole)) if whole.is_dir() else base_of(one, facts)
    if is_labeller(facts):
        return _encoder(base, labels)
    opened = replace(load_tokenizer(base), source=str(facts["base"]["model"]))
    renderer = Renderer(opened.tokenizer, rendering_of(one)[0])
    return _talking(opened, renderer, _taken_in(one), labels)


def _reader_to_be(one: Recipe, own: Corpus, labels: Sequence[str]) -> Reader:
    """As its run will read: what its own talk loses there is told here as well."""
    if labels:
        common_labels({"all": labels, "its own talk": label_set(tuple(own.train))})
    if isinstance(one.base, Base) and one.task == "classify" and is_encoder(one.base):
        sketch = sketch_encoder(one.base, labels)
        label_rows(one, own, sketch, max_length(one, sketch.context))
        return _encoder(one.base, labels)
    opened = _tokenizer_of(one, own)
    render_rows(one, make_renderer(one, opened), own)
    return _talking(opened, Renderer(opened.tokenizer, opened.template), _taken(one.adapter), labels)


def _tokenizer_of(one: Recipe, own: Corpus) -> LoadedTokenizer:
    """Of its base; one from scratch learns it from its own talk, the same way every time."""
    if isinstance(one.base, NewBase):
        new = one.base.new
        texts = (turn.content for talk in own.train for turn in talk.turns)
        made = train_tokenizer(texts, new.vocab, context=new.context)
        return LoadedTokenizer(made, str(made.chat_template), "ours", new.context, {}, "its own base", Path())
    assert isinstance(one.base, Base)  # several bases are chosen from before a run: refused when it is read
    return load_tokenizer(one.base)


def _talking(opened: LoadedTokenizer, renderer: Renderer, taken: int, labels: Sequence[str]) -> Reader:
    answer = max(map(len, label_ends(renderer, labels).values())) if labels else 1
    of_text = opened.config.get("text_config") or opened.config
    context = int(of_text.get("max_position_embeddings") or of_text.get("n_positions") or opened.context)
    return Reader(opened.source, lambda turns: len(renderer.prompt(turns)), context, taken, answer)


def _encoder(base: Base, labels: Sequence[str]) -> Reader:
    sketch = sketch_encoder(base, labels)

    def length_of(turns: Pieces) -> int:
        text = "\n".join(turn.content for turn in turns if turn.role == "user")
        return len(encode(sketch.tokenizer, [text])[0])

    return Reader(base.model, length_of, sketch.context, 0, 0)


def _too_long(at: str, reader: Reader, lengths: Sequence[int]) -> list[Problem]:
    n_long = sum(length > reader.room for length in lengths)
    if not n_long:
        return []
    for_label = f" and its longest label {reader.answer}" if reader.answer > 1 else ""
    for_prefix = f", {reader.taken} of which its prefix takes" if reader.taken else ""
    says = (
        f"{n_long} of {len(lengths)} texts that it is asked about are too long for {reader.base}: the longest has"
        f" {max(lengths):,} tokens with this member's template{for_label}, and it reads {reader.context:,}{for_prefix}."
        " Shorten the texts or data.format.template, leave the long ones out, or give it a base that reads more."
    )
    return [Problem(at, says)]
