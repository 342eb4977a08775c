"""What the server is told: flags, or the same as MALTU_* in the environment. Read before anything heavy loads."""

import argparse
import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import InputError, Problem

COMMAND = "python -m serve"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
MIN_KEY_LENGTH = 16


@dataclass(frozen=True)
class Settings:
    """Everything that decides how the server runs. keys: the API keys, none when everybody who reaches it may ask."""

    runs: tuple[str, ...]
    folder: Path
    host: str
    port: int
    device: str
    slots: int
    queue: int
    max_tokens: int
    has_page: bool
    keys: tuple[str, ...]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog=COMMAND,
        description="Serve runs on one base: an OpenAI-compatible API at /v1 and a chat page at /.",
        allow_abbrev=False,
        epilog="Every flag is also an environment variable: --max-tokens 512 is MALTU_MAX_TOKENS=512.",
    )
    add = command.add_argument
    add("run", nargs="+", metavar="RUN", help="a run folder, or the name of one in --runs")
    add("--runs", default="runs", metavar="FOLDER", help="where runs are looked up by name (default: runs)")
    add("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1, this machine alone)")
    add("--port", default=8000, help="the port (default: 8000; 0 takes a free one)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, … (default: auto)")
    add("--slots", default=32, metavar="N", help="answers that are written side by side (default: 32)")
    add("--queue", default=64, metavar="N", help="requests that may wait for a slot; the next gets 429 (default: 64)")
    add("--max-tokens", default=4096, metavar="N", help="the longest answer a request may ask for (default: 4096)")
    add("--no-ui", action="store_true", help="no chat page, the API alone")
    add("--api-key-file", metavar="FILE", help="API keys, one a line; then every call to /v1 needs one")
    add("--allow-open", action="store_true", help="listen beyond this machine without API keys")
    return command


def read_settings(argv: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Flags first, then the environment, then defaults. Raises InputError with every problem."""
    command = parser()
    problems: list[Problem] = []
    command.set_defaults(**_from_environment(command, environment, problems))
    given = command.parse_args(list(argv))
    numbers = {
        "port": _number(given.port, "--port", 0, 65535, problems),
        "slots": _number(given.slots, "--slots", 1, 1024, problems),
        "queue": _number(given.queue, "--queue", 0, 100_000, problems),
        "max_tokens": _number(given.max_tokens, "--max-tokens", 1, 10_000_000, problems),
    }
    keys = _read_keys(given.api_key_file, problems) if given.api_key_file else ()
    if not is_loopback(given.host) and not given.api_key_file and not given.allow_open:
        says = (
            f"{given.host} can be reached from other machines, and there is no API key. Give --api-key-file FILE, or "
            "--allow-open if everybody there may use it."
        )
        problems.append(Problem("--host", says))
    if problems:
        raise InputError(COMMAND, problems)
    return Settings(
        runs=tuple(given.run),
        folder=Path(given.runs),
        host=given.host,
        device=given.device,
        has_page=not given.no_ui,
        keys=keys,
        **numbers,
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches the address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _from_environment(
    command: argparse.ArgumentParser, environment: Mapping[str, str], problems: list[Problem]
) -> dict[str, Any]:
    """What MALTU_* says, by the name of the flag's value."""
    found: dict[str, Any] = {}
    for name, default in vars(command.parse_args(["RUN"])).items():
        variable = f"MALTU_{name.upper()}"
        value = environment.get(variable)
        if value is None or name == "run":
            continue
        if not isinstance(default, bool):
            found[name] = value
        elif value.lower() in (*_YES, *_NO):
            found[name] = value.lower() in _YES
        else:
            problems.append(Problem(variable, f"{value!r} is neither {_YES[0]} nor {_NO[0]}."))
    return found


def _number(value: object, flag: str, low: int, high: int, problems: list[Problem]) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        problems.append(Problem(flag, f"{value!r} is no whole number from {low} to {high}."))
    return number


def _read_keys(file: str, problems: list[Problem]) -> tuple[str, ...]:
    """The keys of a file: one a line; empty lines and those that start with # say nothing."""
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        problems.append(Problem("--api-key-file", f"{file} cannot be read ({error})."))
        return ()
    keys = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    if not keys:
        says = f"{file} holds no key. Write one a line, {MIN_KEY_LENGTH} characters or more."
        problems.append(Problem("--api-key-file", says))
    short = ", ".join(str(number) for number, key in keys.items() if len(key) < MIN_KEY_LENGTH)
    if short:
        says = f"{file}, line {short}: a key has {MIN_KEY_LENGTH} characters or more, so that nobody guesses it."
        problems.append(Problem("--api-key-file", says))
    return tuple(keys.values())
