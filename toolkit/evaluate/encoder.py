"""What an encoder says of texts: a probability for every label, in one pass over each text."""

# R texts, L labels, T tokens.

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.corpus.render import Rendered
from toolkit.corpus.talk import Talk
from toolkit.errors import InputError, Problem
from toolkit.evaluate.spoken import Pair, PairBits
from toolkit.evaluate.talk import Prompt, Sample
from toolkit.generate import Sampling
from toolkit.loaded import LoadedLabeller


def text_of(talk: Talk) -> str:
    """What an encoder reads of a talk: the user's words. Its label, and a system turn, are not among them."""
    return "\n".join(turn.content for turn in talk.turns if turn.role == "user")


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of texts with the encoder's own marks around them, however long they are."""
    return [list(ids) for ids in tokenizer(list(texts), truncation=False, verbose=False)["input_ids"]] if texts else []


def label_logprobs(model: nn.Module, rows: Sequence[Sequence[int]], pad_id: int, *, batch_tokens: int = 8192) -> Tensor:
    """The log-probability of each label for each row of ids, [R, L] in float64; dropout is off while it lasts.

    Rows of like length share batches of at most `batch_tokens` tokens (padding included); numbers do not depend on
    what shares a batch, up to rounding. Raises: InputError for a row without ids.
    """
    empty = [number for number, ids in enumerate(rows) if not ids]
    if empty:
        raise InputError("texts", [Problem(f"row {empty[0]}", "has no tokens. Give it at least one.")])
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    trained = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in _batches([len(ids) for ids in rows], batch_tokens):
                ids_BT, mask_BT = padded([rows[number] for number in batch], pad_id)
                logits_BL = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
                logp_BL = logits_BL.double().log_softmax(-1).cpu()
                found.update(zip(batch, logp_BL, strict=True))
    finally:
        model.train(trained)
    n_labels = len(next(iter(found.values()))) if found else int(model.config.num_labels)  # type: ignore[union-attr,arg-type]
    return torch.stack([found[number] for number in range(len(rows))]) if found else torch.zeros(0, n_labels)


def encoder_label_logprobs(loaded: LoadedLabeller, texts: Sequence[str]) -> Tensor:
    """The log-probability of each of `loaded.labels` for each text, [R, L].

    Raises: InputError with every text that the encoder cannot read at once.
    """
    rows = encode(loaded.base.tokenizer, texts)
    problems = [
        Problem(f"text {number}", f"has {len(ids)} tokens; the encoder reads {loaded.base.context}. Shorten it.")
        for number, ids in enumerate(rows)
        if len(ids) > loaded.base.context
    ]
    if problems:
        raise InputError("texts", problems)
    return label_logprobs(loaded.model, rows, pad_of(loaded.base.tokenizer))


def readable(loaded: LoadedLabeller, talks: Sequence[Talk]) -> list[Talk]:
    """The talks whose text the encoder can read at once."""
    rows = encode(loaded.base.tokenizer, [text_of(talk) for talk in talks])
    return [talk for talk, ids in zip(talks, rows, strict=True) if len(ids) <= loaded.base.context]


def pad_of(tokenizer: Any) -> int:
    """The id that batches are filled up with; every encoder that was loaded has one."""
    return int(tokenizer.pad_token_id)


def padded(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows as one batch, filled up on the right, and its mask."""
    longest = max(map(len, rows))
    ids = [[*row, *[pad_id] * (longest - len(row))] for row in rows]
    mask = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[number] > batch_tokens:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass(frozen=True)
class Labeller:
    """An encoder as somebody to measure: it labels, and has no words. See evaluate.subject.Subject."""

    model: nn.Module
    tokenizer: Any
    labels: tuple[str, ...]

    def held_out(self, rows: Sequence[Rendered], langs: Sequence[str | None]) -> None:
        """See Subject. It has no tokens to lose on."""

    def answers(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Sample]:
        """See Subject. Raises: InputError, for it cannot."""
        raise InputError("prompts", [Problem("", "an encoder labels texts; it cannot answer. Use task: classify.")])

    def labelled(self, talks: Sequence[Talk], labels: Sequence[str]) -> list[dict[str, float]]:
        """See Subject. Raises: InputError for labels that are not its own."""
        unknown = [label for label in labels if label not in self.labels]
        if unknown:
            says = f"{', '.join(unknown)}: not among the labels that this encoder learned ({', '.join(self.labels)})."
            raise InputError("labels", [Problem("", says)])
        rows = encode(self.tokenizer, [text_of(talk) for talk in talks])
        logp_RL = label_logprobs(self.model, rows, pad_of(self.tokenizer))
        at = [self.labels.index(label) for label in labels]
        probs_RL = logp_RL[:, at].softmax(-1)
        return [dict(zip(labels, row, strict=True)) for row in probs_RL.tolist()]

    def bits(self, pairs: Sequence[Pair], *, as_answer: bool) -> dict[str, PairBits] | None:
        """See Subject. It has no words to spend bits on."""
        return None
