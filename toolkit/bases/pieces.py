"""Text to token ids, piece by piece: no token ever spans two pieces, and no typed text becomes a control token.

A prompt ends where a piece of the whole talk ends, so equal pieces in front give equal ids in front: this is what
keeps serving and training on the same tokens. What somebody typed stands between the marks PLAIN … PLAIN_END where it
would read as a control token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from toolkit.bases.templates import PLAIN, PLAIN_END, control_pattern, unmarked
from toolkit.errors import BaseError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TYPED = re.compile(f"{PLAIN}([^{PLAIN_END}]*){PLAIN_END}")
_PROBES = ("a", "Hi there", "가", "안녕, 뭐 해?")


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """The id of each token of the vocabulary; the unknown token's where there is none."""
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    return [ids] if isinstance(ids, int) else ids


class PieceEncoder:
    """Encodes documents that are given as pieces.

    control: tokens that only a template may write. A tokenizer that puts a space in front of whatever it is given
    (SentencePiece does) is handed each piece after a token like the one that really precedes it, so that ids are
    those of the whole text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, control: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._backend: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._control = control_pattern(control)
        self._control_ids = frozenset(ids_of(tokenizer, control)) - {tokenizer.unk_token_id}
        self._anchor = next(iter(control), "")
        self._is_anchored = not self._starts_alike()

    def encode(self, documents: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """For each document, for each piece, its ids. Raises BaseError where plain text becomes a control token."""
        atoms, owners = [], []
        for i, document in enumerate(documents):
            before = ""
            for j, piece in enumerate(document):
                for atom, is_typed in self._atoms(piece):
                    atoms.append((before, atom, is_typed))
                    owners.append((i, j))
                    before = atom
        out: list[list[list[int]]] = [[[] for _ in document] for document in documents]
        for (i, j), (_, atom, is_typed), ids in zip(owners, atoms, self._encode_atoms(atoms), strict=True):
            self._check_control(atom, is_typed, ids)
            out[i][j].extend(ids)
        return out

    def _atoms(self, piece: str) -> Iterator[tuple[str, bool]]:
        """The parts of a piece that are encoded one by one: template and ordinary text, and typed control tokens in two
        halves.
        """
        if PLAIN not in piece:
            text = unmarked(piece)
            if text:
                yield text, False
            return
        for i, part in enumerate(_TYPED.split(piece)):
            text = unmarked(part)
            if i % 2 == 0 and text:
                yield text, False
            elif text:
                yield from ((half, True) for half in self._halves(text))

    def _halves(self, token: str) -> Iterator[str]:
        """A control token as text that cannot be read as one. A token of one character cannot be written: it is left
        out.
        """
        if len(token) < 2:
            return
        yield token[0]
        rest = token[1:]
        if self._control.search(rest):
            yield from rest
        else:
            yield rest

    def _encode_atoms(self, atoms: Sequence[tuple[str, str, bool]]) -> list[list[int]]:
        if not self._is_anchored:
            return self._plain_ids([atom for _, atom, _ in atoms])
        anchors = [self._anchor_after(before) for before, _, _ in atoms]
        together = self._plain_ids([anchor + atom for anchor, (_, atom, _) in zip(anchors, atoms, strict=True)])
        kinds = sorted(set(anchors))
        alone = dict(zip(kinds, self._plain_ids(kinds), strict=True))
        ids = []
        for anchor, (_, atom, _), whole in zip(anchors, atoms, together, strict=True):
            n = len(alone[anchor])
            ids.append(whole[n:] if whole[:n] == alone[anchor] else self._plain_ids([atom])[0])
        return ids

    def _anchor_after(self, before: str) -> str:
        """What to put in front of a piece so that it is encoded as it would be after `before`."""
        if not before:
            return ""
        found = [match for match in self._control.finditer(before) if match.end() == len(before)]
        return found[0][0] if found else "\n"

    def _plain_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, nothing added in front or behind."""
        if self._backend is None:
            return [list(self._tokenizer.encode(text, add_special_tokens=False)) for text in texts]
        if self._backend.truncation is not None:  # whoever padded or truncated last left the tokenizer that way
            self._backend.no_truncation()
        if self._backend.padding is not None:
            self._backend.no_padding()
        if self._backend.encode_special_tokens:
            self._backend.encode_special_tokens = False
        return [encoded.ids for encoded in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def _starts_alike(self) -> bool:
        """Whether a piece has the same ids alone, after a control token and after a line break."""
        for anchor in ("\n", self._anchor):
            alone = self._plain_ids([anchor])[0]
            for probe, ids in zip(_PROBES, self._plain_ids(_PROBES), strict=True):
                if self._plain_ids([anchor + probe])[0] != alone + ids:
                    return False
        return True

    def _check_control(self, atom: str, is_typed: bool, ids: Sequence[int]) -> None:
        n_found = sum(map(self._control_ids.__contains__, ids))
        if n_found and (is_typed or n_found > len(self._control.findall(atom))):
            raise BaseError(
                f"the tokenizer turns the plain text {atom[:80]!r} into a special token, so text could pose as a turn. "
                "Remove that text from the data, or use another base."
            )
