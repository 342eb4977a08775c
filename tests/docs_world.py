"""Pages of documentation as tests read and run them: their blocks, what stands above a block, and a folder to run in.

A block of commands is fenced as sh, or indented with a command as its first word. HTML comments right above a block
say what the reader of the source has to know, and the test obeys:

    <!-- not run: REASON -->    one of REASONS; the block is listed instead
    <!-- exits: N -->           the commands end with this status
    <!-- file: NAME -->         the block is the content of that file (yaml, json, text)
    <!-- yours: NAME … -->      what the reader has: files of talk, and runs
    <!-- run: NAME -->          run by a test of its own (tests/serve/test_clients.py)

`maltu` and `python` are stand-ins on the PATH: this interpreter, with overrides that make training short, and with a
server that goes on in the background once it is ready.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
REASONS = frozenset({"network", "GPU", "Docker", "a server elsewhere", "long", "set-up"})
KINDS = frozenset({"not run", "exits", "file", "yours", "run"})
SHORT = ("train.max_steps=3", "evaluate.prompts=null", "track=[]")
ADDRESS = "127.0.0.1:8000"
BLOCK_S = 400
SERVERS = ".servers"
N_TALKS = 40  # in a file that the reader is said to have
VOICES = """
name: voices
base: {model: spoken-mini}
train: {epochs: 1}
experts:
  polite: {data: {train: [maltu:talk/polite.ko.jsonl]}}
  casual: {data: {train: [maltu:talk/casual.ko.jsonl]}}
combine: {kind: route, router: centroid}
"""
_FENCE = re.compile(r"^(```+)(\w*)\s*$")
_MARK = re.compile(r"^<!-- ([a-z ]+): (.+?) -->$")
_COMMAND = re.compile(
    r"([A-Z_]+=\S+ )*(maltu|python3?|make|pip|curl|docker|sudo|cd|git|vllm|wandb|optuna-dashboard|\.venv/bin/\w+)( |$)"
)


@dataclass(frozen=True)
class Block:
    """A block of a page: where its first line stands, its language (`sh` for commands), and the comments above it."""

    page: str
    line: int
    language: str
    code: str
    marks: tuple[tuple[str, str], ...] = ()

    def mark(self, kind: str) -> str | None:
        return dict(self.marks).get(kind)

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def pages() -> list[Path]:
    """The READMEs and every page below docs/."""
    return [ROOT / "README.md", ROOT / "README.ko.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(text: str, page: str) -> list[Block]:
    """Every block of a page, fenced or indented, in order."""
    found: list[Block] = []
    lines, at = text.split("\n"), 0
    while at < len(lines):
        fence = _FENCE.match(lines[at])
        if fence:
            end = next(i for i in range(at + 1, len(lines)) if lines[i] == fence[1])
            code = "\n".join(lines[at + 1 : end]) + "\n"
            found.append(Block(page, at + 2, fence[2], code, _marks_above(lines, at)))
            at = end + 1
        elif lines[at].startswith("    ") and (at == 0 or not lines[at - 1].strip()):
            end = at
            while end < len(lines) and (lines[end].startswith("    ") or not lines[end].strip()):
                end += 1
            code = "\n".join(line[4:] for line in lines[at:end]).rstrip() + "\n"
            language = "sh" if _COMMAND.match(code) else ""
            found.append(Block(page, at + 1, language, code, _marks_above(lines, at)))
            at = end
        else:
            at += 1
    return found


def _marks_above(lines: Sequence[str], at: int) -> tuple[tuple[str, str], ...]:
    marks: list[tuple[str, str]] = []
    above = at - 1
    if above >= 0 and not lines[above].strip():
        above -= 1  # an indented block has an empty line before it
    while above >= 0 and (mark := _MARK.match(lines[above])):
        marks.append((mark[1], mark[2]))
        above -= 1
    return tuple(reversed(marks))


def all_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page.read_text(encoding="utf-8"), name_of(page))]


def is_run(block: Block) -> bool:
    """Whether running the page runs this block (a python block only where it asks the page's server)."""
    if block.mark("not run") or block.mark("run") or block.mark("file"):
        return False
    return block.language == "sh" or (block.language == "python" and ADDRESS in block.code)


@dataclass
class Place:
    """A folder where the blocks of one page are run in order.

    given: where runs that readers are said to have lie once they are made, for all pages. said: what blocks printed.
    """

    folder: Path
    given: Path
    is_short: bool = True
    said: list[tuple[Block, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.port = _free_port()
        for name in ("recipes", "examples"):
            shutil.copytree(ROOT / name, self.folder / name)
        tools = self.folder / ".bin"
        tools.mkdir()
        for name in ("maltu", "python"):
            tool = tools / name
            tool.write_text(
                f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
                f"from tests.docs_world import stand_in\nsys.exit(stand_in({name!r}, sys.argv[1:]))\n",
                encoding="utf-8",
            )
            tool.chmod(0o755)

    def __enter__(self) -> "Place":
        return self

    def __exit__(self, *_: object) -> None:
        stop_servers(self.folder)

    def run(self, block: Block) -> None:
        """Run one block, or write the file that it is. Raises AssertionError with what it printed."""
        for name in (block.mark("yours") or "").split():
            self._give(name)
        name = block.mark("file")
        if name:
            (self.folder / name).write_text(block.code, encoding="utf-8")
        if not is_run(block):
            return
        code = block.code.replace(ADDRESS, f"127.0.0.1:{self.port}")
        words = ["bash", "-euo", "pipefail", "-c", code] if block.language == "sh" else [sys.executable, "-c", code]
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            timeout=BLOCK_S,
        )
        self.said.append((block, done.stdout))
        wanted = int(block.mark("exits") or 0)
        assert done.returncode == wanted, f"{block} ended with {done.returncode}, not {wanted}:\n{code}\n{done.stdout}"

    def _environment(self) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if name != "WANDB_MODE"}  # it would be told about
        return own | {
            "PATH": f"{self.folder / '.bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "NO_PROXY": "*",
            "COLUMNS": "120",
            "MALTU_DOCS": json.dumps({"port": self.port, "is_short": self.is_short}),
        }

    def _give(self, name: str) -> None:
        """Lay down what the reader is said to have: a file of talk, or a run."""
        path = self.folder / name
        if path.exists():
            return
        if name.startswith("runs/"):
            if not (self.given / path.name).exists():
                self._train(path.name)
            shutil.copytree(self.given / path.name, path)
            return
        talk = (ROOT / "data" / "talk" / "casual.ko.jsonl").read_text(encoding="utf-8").splitlines()
        path.write_text("\n".join(talk[:N_TALKS]) + "\n", encoding="utf-8")

    def _train(self, name: str) -> None:
        recipe = self.folder / "recipes" / f"{name}.yaml"
        if name == "voices":
            recipe.write_text(VOICES, encoding="utf-8")
        done = subprocess.run(
            [str(self.folder / ".bin" / "maltu"), "train", str(recipe), "--runs", str(self.given)],
            cwd=self.folder,
            env=self._environment(),
            capture_output=True,
            text=True,
            encoding="utf-8",
        )
        assert done.returncode == 0, done.stdout + done.stderr


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def stand_in(name: str, words: list[str]) -> int:
    """What `maltu` and `python` do in a block."""
    told = json.loads(os.environ["MALTU_DOCS"])
    verb = list(words)
    if name == "python":
        modules = {"toolkit": [], "toolkit.train": ["train"], "serve": ["serve"]}
        if len(words) < 2 or words[0] != "-m" or words[1] not in modules:
            os.execv(sys.executable, [sys.executable, *words])
        verb = [*modules[words[1]], *words[2:]]
    if verb[:1] == ["serve"] and verb[1:2] and verb[1] not in ("key", "feedback", "openapi", "--help"):
        return start_server(verb[1:], told["port"])
    more = list(shorter(verb)) if told["is_short"] else []
    os.execv(sys.executable, [sys.executable, "-m", "toolkit", *verb, *more])


def shorter(words: Sequence[str]) -> Iterator[str]:
    """Overrides that make what is trained cheap; they change neither what is asked nor what is printed about it."""
    if words[0] != "train":
        return
    from toolkit.shipped import resolve

    named = next((word for word in words[1:] if word.endswith(".yaml")), "")
    try:
        recipe = yaml.safe_load(Path(resolve(named)).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return
    said = " ".join(words)
    yield from SHORT
    if "search" in recipe or "search." in said:
        yield from ("search.trials=2", "search.workers=1")
    combine = recipe.get("combine") or {}
    if combine.get("kind") == "merge" and combine.get("weights") == "search":
        yield "combine.trials=2"
    if combine.get("kind") == "bag":
        yield "combine.members=2"
    if combine.get("kind") == "boost":
        yield "combine.rounds=2"


def start_server(words: Sequence[str], port: int) -> int:
    """Start a server in the background and wait until it is ready; one that runs already is stopped first."""
    stop_servers(Path.cwd())
    log = Path("serve.log")
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve", *words, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    Path(SERVERS).write_text(str(process.pid), encoding="utf-8")
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2):
                sys.stdout.write(log.read_text(encoding="utf-8").replace(str(port), "8000"))
                return 0
        except OSError:
            time.sleep(0.2)
    sys.stdout.write(log.read_text(encoding="utf-8"))
    return process.poll() or 1


def stop_servers(folder: Path) -> None:
    """Stop the server that a page has started."""
    noted = folder / SERVERS
    if not noted.is_file():
        return
    pid = int(noted.read_text(encoding="utf-8"))
    noted.unlink()
    until = time.monotonic() + 15
    _signal(pid, signal.SIGTERM)
    while _is_alive(pid) and time.monotonic() < until:
        time.sleep(0.1)
    _signal(pid, signal.SIGKILL)


def _signal(pid: int, which: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, which)


def _is_alive(pid: int) -> bool:
    """Whether a process that is no child of ours still runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
