"""What came out of one candidate, as it is kept in a file and read again."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolkit import disk


@dataclass(frozen=True)
class Result:
    """One candidate after its short training. Where something was not measured it is None.

    measure: what it is ranked by (lower is better). talks: for each held-out conversation, by its number in the split,
    [sum after, sum before, count]; the measure is a sum over a count: bits over UTF-8 bytes, or nats over texts.
    n_unknown: ids of held-out text that its tokenizer has no token for; over 0 the measure says too little.
    rates: every learning rate that was tried, with steps, best held-out loss in nats a token, or why it failed.
    seconds: of learning, all rates together, by the clock; minutes: what was allowed. steps_asked: of the recipe.
    spoken: margin of written over spoken text in bits per byte, before and after. memory_mb: the highest it came to.
    wall_s: of everything, loading and measuring too.
    """

    key: str
    model: str
    base_hash: str
    device: str
    minutes: float
    measure: str
    talks: dict[str, tuple[float, float, float]]
    n_unknown: int
    rates: tuple[dict[str, Any], ...]
    learning_rate: float
    seconds: float
    steps: int
    steps_asked: int
    n_tokens: int
    parameters: int
    context: int
    template_from: str
    memory_mb: float
    wall_s: float
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    spoken: dict[str, float] = field(default_factory=dict)
    first_token_ms: float | None = None
    tokens_per_s: float | None = None
    bytes_per_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def learned_per_s(self) -> float:
        """Tokens learned from a second, all rates together."""
        return self.n_tokens / self.seconds if self.seconds else 0.0

    def write(self, file: Path) -> None:
        """Keep it. Raises DiskError."""
        disk.make_folder(file.parent)
        disk.write_json(file, asdict(self))


def read_result(file: Path, key: str) -> Result | None:
    """What is kept, if it was measured on the same talk, base and settings; None otherwise, or where it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        told: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        talks = {name: (float(of[0]), float(of[1]), float(of[2])) for name, of in told["talks"].items()}
        made = Result(**{**told, "talks": talks, "rates": tuple(told["rates"]), "notes": tuple(told["notes"])})
        return made if made.key == key else None
    return None
