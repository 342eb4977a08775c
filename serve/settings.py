"""What the server is told: flags, or the same as MALTU_* in the environment. Read before anything heavy loads."""

import argparse
import ipaddress
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.keys import Key, read_keys
from serve.rates import wrong_rate
from toolkit.errors import InputError, Problem

COMMAND = "python -m serve"
_YES, _NO = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")
NO_STORE = "none"
ROWS, VLLM = "rows", "vllm"
AUTO = "auto"
MODULES = "modules"
FORWARDS = (AUTO, MODULES, "lean")  # as serve/engines/forward.py calls them, which loads torch
LEAN_BASES = "Llama, Mistral, Qwen2 and Qwen3 on a CPU in float32"
OTLP, OTLP_TRACES = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
SDK_DISABLED = "OTEL_SDK_DISABLED"
VLLM_KEY = "VLLM_API_KEY"  # the variable that vLLM itself reads


@dataclass(frozen=True)
class Settings:
    """Everything that decides how the server runs.

    keys: the API keys, none when everybody who reaches it may ask; admin_keys: those of who may change what is served.
    rate: how often one owner may ask. answer_s: how long an answer may take. store: the URL of where feedback lies,
    None where it is off; keeps: whether conversations are stored too. vllm_url: the vLLM server that computes, None
    where this process does; vllm_key: its API key. forward: how this process computes (serve/engines/slots.py);
    is_int8: with the base's weights in eight bits. traces: where spans go (OpenTelemetry, OTLP over HTTP), None for
    nowhere.
    """

    runs: tuple[str, ...]
    folder: Path
    host: str
    port: int
    device: str
    slots: int
    queue: int
    max_tokens: int
    has_page: bool
    keys: tuple[Key, ...]
    admin_keys: tuple[Key, ...] = ()
    rate: str | None = None
    answer_s: int = 600
    store: str | None = None
    keeps: bool = False
    vllm_url: str | None = None
    vllm_key: str | None = None
    forward: str = AUTO
    is_int8: bool = False
    traces: str | None = None

    @property
    def is_open(self) -> bool:
        """Whether everybody who reaches the address may ask."""
        return not self.keys


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog=COMMAND,
        description="Serve runs on one base: an OpenAI-compatible API at /v1 and a chat page at /.",
        allow_abbrev=False,
        epilog="Every flag is also an environment variable: --max-tokens 512 is MALTU_MAX_TOKENS=512. "
        f"Beside serving: {COMMAND} key new, {COMMAND} feedback export, {COMMAND} feedback delete, {COMMAND} openapi.",
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
    add(
        "--answer-seconds",
        default=600,
        metavar="N",
        help="how long an answer may take, waiting included (default: 600)",
    )
    add(
        "--api-key-file",
        metavar="FILE",
        help=f"hashes of API keys ({COMMAND} key new); every call to /v1 needs one then",
    )
    add("--admin-key-file", metavar="FILE", help="hashes of admin keys; without, nothing behind /admin can be reached")
    add("--rate", metavar="N/PER", help="how often one key, or without keys one address, may ask, as in 60/minute")
    add(
        "--store",
        metavar="URL",
        help="where feedback lies: sqlite:///FILE, postgresql://…, or none (default: in --runs)",
    )
    add(
        "--keep-conversations", action="store_true", help="store what is asked and answered as well, not feedback alone"
    )
    add("--allow-open", action="store_true", help="listen beyond this machine without API keys")
    add(
        "--engine", default=ROWS, metavar="NAME", help="rows: this process computes (default); vllm: a vLLM server does"
    )
    add(
        "--forward",
        default=AUTO,
        metavar="NAME",
        help=f"modules: transformers' own; lean: by hand, for {LEAN_BASES}; "
        "auto: lean where it fits and agrees with the modules (default)",
    )
    add("--cpu-int8", action="store_true", help=f"answer with the base's weights in eight bits ({LEAN_BASES})")
    add("--vllm-url", metavar="URL", help=f"where that server is; its API key is read from {VLLM_KEY}")
    add(
        "--otel-endpoint",
        metavar="URL",
        help=f"send traces there, OTLP over HTTP, as in http://127.0.0.1:4318 (default: {OTLP}; without: none)",
    )
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
        "answer_s": _number(given.answer_seconds, "--answer-seconds", 1, 86_400, problems),
    }
    files = {"--api-key-file": given.api_key_file, "--admin-key-file": given.admin_key_file}
    keys, admin_keys = (read_keys(file, flag, problems) if file else () for flag, file in files.items())
    if given.rate is not None and (wrong := wrong_rate(given.rate)):
        problems.append(Problem("--rate", wrong))
    if given.store == NO_STORE and given.keep_conversations:
        problems.append(Problem("--keep-conversations", "there is no store to keep them in. Leave out --store none."))
    _check_engine(given, problems)
    traces = _traces(given.otel_endpoint, environment, problems)
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
        admin_keys=admin_keys,
        rate=given.rate,
        store=None if given.store == NO_STORE else given.store or _default_store(Path(given.runs)),
        keeps=given.keep_conversations,
        vllm_url=given.vllm_url,
        vllm_key=(environment.get(VLLM_KEY) or None) if given.vllm_url else None,
        forward=given.forward,
        is_int8=given.cpu_int8,
        traces=traces,
        **numbers,
    )


def _traces(endpoint: str | None, environment: Mapping[str, str], problems: list[Problem]) -> str | None:
    """Where spans go: the flag, else what OpenTelemetry's own variables say."""
    is_off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    said = {"--otel-endpoint": endpoint}
    said |= {} if is_off else {name: environment.get(name) for name in (OTLP_TRACES, OTLP)}
    where = next((name for name, value in said.items() if value), None)
    if where is None:
        return None
    url = said[where] or ""
    if not re.fullmatch(r"https?://[^?#\s@]+", url):
        problems.append(Problem(where, f"{url[:200]!r} is no address of a collector, as http://127.0.0.1:4318 is."))
    for variable in PROTOCOLS:
        protocol = environment.get(variable) or "http/protobuf"
        if protocol != "http/protobuf":
            problems.append(Problem(variable, f"{protocol!r}: traces go out as http/protobuf alone. Leave it out."))
    if environment.get(SDK_DISABLED, "").lower() == "true":
        problems.append(Problem(SDK_DISABLED, "is true, so no trace would go out. Leave it out, or name no collector."))
    return url if where == OTLP_TRACES else f"{url.rstrip('/')}/v1/traces"


def _check_engine(given: argparse.Namespace, problems: list[Problem]) -> None:
    if given.engine not in (ROWS, VLLM):
        problems.append(Problem("--engine", f"{given.engine!r} is none. Take {ROWS} or {VLLM}."))
    elif given.engine == VLLM and not given.vllm_url:
        problems.append(Problem("--engine", f"{VLLM} needs --vllm-url, as in --vllm-url http://127.0.0.1:8001."))
    elif given.engine == ROWS and given.vllm_url:
        problems.append(Problem("--vllm-url", f"goes with --engine {VLLM}."))
    elif given.engine == VLLM and not re.fullmatch(r"https?://[^/?#\s@]+/?", given.vllm_url):
        says = f"{given.vllm_url!r} is no address of a server, as http://127.0.0.1:8001 is."
        problems.append(Problem("--vllm-url", says))
    elif given.engine == VLLM and given.device != "auto":
        problems.append(Problem("--device", "is the vLLM server's to choose. Leave it out."))
    if given.forward not in FORWARDS:
        problems.append(Problem("--forward", f"{given.forward!r} is none. Take {', '.join(FORWARDS)}."))
    elif given.engine == VLLM and given.forward != AUTO:
        problems.append(Problem("--forward", "is the vLLM server's to choose. Leave it out."))
    if given.cpu_int8:
        _check_int8(given, problems)


def _check_int8(given: argparse.Namespace, problems: list[Problem]) -> None:
    """What can be told before a base is loaded; the rest is in serve/engines/fusing.py."""
    if given.engine == VLLM:
        problems.append(Problem("--cpu-int8", "is computed by this process, not by a vLLM server. Leave it out."))
    elif given.device not in (AUTO, "cpu"):
        problems.append(Problem("--cpu-int8", f"runs on a CPU, not on {given.device}. Leave one of them out."))
    if given.forward == MODULES:
        problems.append(Problem("--cpu-int8", "is computed by the lean forward pass. Leave out --forward modules."))


def _default_store(runs: Path) -> str:
    """Beside the runs, in a folder of its own."""
    return f"sqlite:///{(runs / '.store' / 'feedback.db').as_posix()}"


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
