"""Hugging Face datasets by name: `hub:NAME[:config][:split]`, through datasets.load_dataset.

NAME is a dataset's id on the hub, or a local folder that load_dataset understands. Nothing is fetched unless a recipe
names it; what was fetched once is read from datasets' own cache afterwards, offline too.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from toolkit.corpus.row import Row, cut
from toolkit.errors import Problem

HUB = "hub:"
_SPLIT = re.compile(r"(train|test|valid|validation|dev|eval|all)\b.*", re.ASCII)
_COLON = re.compile(r":(?![^\[]*\])")  # train[:100] holds a colon of its own


@dataclass(frozen=True)
class HubName:
    """What a `hub:` name asks for."""

    name: str
    config: str | None
    split: str


def parse_hub(text: str) -> HubName:
    """Read `hub:NAME[:config][:split]`; a single extra part is a split where it starts like one, else a config.

    Splits start with train, test, valid, dev, eval or all; `hub:NAME::mine` names another. Without one: train.
    Raises: ValueError where there is no name or there are too many parts.
    """
    name, *rest = _COLON.split(text.removeprefix(HUB))
    if not name or len(rest) > 2:
        raise ValueError("write it as hub:NAME, hub:NAME:split or hub:NAME:config:split")
    if len(rest) == 1:
        rest = ["", rest[0]] if _SPLIT.fullmatch(rest[0]) else [rest[0], ""]
    config, split = rest if rest else ("", "")
    return HubName(name, config or None, split or "train")


def hub_rows(text: str) -> Iterator[Row | Problem]:
    """The rows of a dataset; one Problem where it cannot be had, which says whether the network or the name is why."""
    try:
        wanted = parse_hub(text)
    except ValueError as error:
        yield Problem(text, str(error))
        return
    import datasets  # takes a second: only where a dataset is named

    number = 0
    try:
        rows = datasets.load_dataset(wanted.name, wanted.config, split=wanted.split)
        for number, value in enumerate(rows, 1):
            yield Row(f"{text}:{number}", value)
    except Exception as error:  # datasets raises what its loaders, fsspec and the network stack raise
        yield Problem(text, _why(error))
        return
    if not number:
        yield Problem(text, f"the split {wanted.split} is empty; name another split")


def _why(error: Exception) -> str:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if any(isinstance(one, ConnectionError) or "Offline" in type(one).__name__ for one in chain):
        return (
            "the Hugging Face hub cannot be reached (no network, or HF_HUB_OFFLINE is set) and the dataset is not in "
            "the cache. Load it once with a network, or save it as .jsonl or .parquet and name that file"
        )
    return f"datasets.load_dataset could not load it: {type(error).__name__}: {cut(str(error), 300)}"
