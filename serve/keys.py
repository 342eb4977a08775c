"""API keys: made here, kept as hashes in a file, compared in constant time.

A line of the file is `NAME sha256:HASH [RATE]`; empty lines and those that begin with # say nothing. The name is what
logs, metrics, rate limits and stored feedback know a key by, and stays when a key is replaced (two lines with one name
are two keys of one owner). Keys are 256 random bits, so one pass of SHA-256 is all the hiding they need.
"""

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from serve.rates import wrong_rate
from toolkit.errors import DiskError, InputError, Problem

PREFIX = "maltu-"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LINE = re.compile(r"(?P<name>\S+)\s+sha256:(?P<digest>[0-9a-f]{64})(?:\s+(?P<rate>\S.*))?")


@dataclass(frozen=True)
class Key:
    """What is known of a key: whose it is, its SHA-256, and its own rate limit (None: the server's)."""

    name: str
    digest: str
    rate: str | None = None


class Keys:
    """The keys of one kind, API or admin."""

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = tuple(keys)

    @property
    def are_there(self) -> bool:
        """Whether there is any; without, nobody is asked for one."""
        return bool(self._keys)

    def owner(self, authorization: str) -> Key | None:
        """The key that an Authorization header carries, None where it carries none of them."""
        scheme, _, secret = authorization.partition(" ")
        given = digest(secret.strip())
        same = [hmac.compare_digest(given, key.digest) for key in self._keys]  # all of them, always
        if scheme.lower() != "bearer":
            return None
        return next((key for key, is_it in zip(self._keys, same, strict=True) if is_it), None)


def digest(secret: str) -> str:
    """What stands in the file for a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def key_of(secret: str, name: str = "key", rate: str | None = None) -> Key:
    """A key that is known in full."""
    return Key(name, digest(secret), rate)


def new_key(name: str, file: Path) -> str:
    """Make a key, append its hash to the file (made if need be, for its owner's eyes), and return the key: it is not
    kept anywhere. Raises InputError for a name that is none, DiskError where the file cannot be written.
    """
    if not NAME.fullmatch(name):
        says = f"{name!r} is no name of a key. Use letters, digits, and . _ - inside; at most 63."
        raise InputError("key new", [Problem("NAME", says)])
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        with os.fdopen(os.open(file, os.O_CREAT | os.O_RDWR, 0o600), "r+b") as opened:
            before = opened.read()
            start = b"\n" if before and not before.endswith(b"\n") else b""
            opened.write(start + f"{name} sha256:{digest(secret)}\n".encode())
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as denied:
        raise DiskError(f"{file}: cannot be written ({denied.strerror}). Check its folder and permissions.") from None
    return secret


def read_keys(file: str, flag: str, problems: list[Problem]) -> tuple[Key, ...]:
    """The keys of a file; what is wrong with it is added to `problems`."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem(flag, f"{file} cannot be read ({error})."))
        return ()
    said = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    if not said:
        says = f"{file} holds no key. Make one: python -m serve key new --name app --file {file}"
        problems.append(Problem(flag, says))
    keys = []
    for number, line in said.items():
        found = _LINE.fullmatch(line)
        if found is None or not NAME.fullmatch(found["name"]):
            says = (
                f"{file}, line {number}: is not `NAME sha256:HASH [RATE]`. Keys are kept as hashes, never as they are; "
                f"make one: python -m serve key new --name app --file {file}"
            )
            problems.append(Problem(flag, says))
            continue
        if found["rate"] and (wrong := wrong_rate(found["rate"])):
            problems.append(Problem(flag, f"{file}, line {number}: {wrong}"))
        keys.append(Key(found["name"], found["digest"], found["rate"]))
    return tuple(keys)
