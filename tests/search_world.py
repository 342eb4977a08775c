"""What the tests of a search share: a recipe to search, a toy objective, a worker process, a clock, a PostgreSQL.

Run as a program it is one worker: `python search_world.py RECIPE FOLDER [pause_s] [hang_at]`.
"""

import contextlib
import glob
import json
import math
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit.errors import DiskError
from toolkit.fit.inputs import flat
from toolkit.recipe.model import Recipe
from toolkit.recipe.read import read_recipe
from toolkit.search.storage import Clock
from toolkit.search.study import Study
from toolkit.search.workers import Worker

ROOT = Path(__file__).parent.parent
SPACE = "{train.learning_rate: {low: 5.0e-5, high: 5.0e-3, log: true}, train.batch_size: [4, 8, 16]}"
GRID = "{train.warmup_ratio: {low: 0.0, high: 0.3, step: 0.1}, train.batch_size: [4, 8, 16]}"
KINDS = "{adapter: {lora: {rank: [4, 8]}, prefix: {tokens: {low: 4, high: 32}}, reft: {}}, train.batch_size: [4, 8]}"
RESOLVED = {"train.learning_rate": 0.003}
N_EVALUATIONS = 9


def write_recipe(folder: Path, name: str = "말투", space: str = SPACE, lines: str = "", **search: Any) -> Path:
    """A recipe file with a search; `lines` stand beside it, `search` are further keys of its section."""
    keys = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in search.items())
    file = folder / f"{name}.yaml"
    file.write_text(
        f"name: {name}\nbase: {{model: spoken-mini}}\ndata: {{train: ['maltu:probes.jsonl']}}\n"
        f"{lines}\nsearch:\n  space: {space}\n{keys}",
        encoding="utf-8",
    )
    return file


def make_recipe(folder: Path, *, space: str = SPACE, **search: Any) -> Recipe:
    """A recipe with a search, read."""
    folder.mkdir(exist_ok=True, parents=True)
    return read_recipe(write_recipe(folder, space=space, **search))


def identity_of(recipe: Recipe, data: str = "d1", base: str = "b1") -> dict[str, Any]:
    """What a run with this recipe would be begun with."""
    return {"recipe": flat(recipe.model_dump(mode="json")), "data": {"probes": data}, "base": base}


@dataclass
class Told:
    """A list of what a study said to its user."""

    lines: list[str] = field(default_factory=list)

    def __call__(self, line: str) -> None:
        self.lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Time:
    """A clock whose sleep passes at once; `at_sleep` may make something happen meanwhile."""

    def __init__(self) -> None:
        self.t = 1000.0
        self.slept: list[float] = []
        self.at_sleep: Any = lambda: None

    def clock(self) -> Clock:
        return Clock(lambda: self.t, lambda: self.t, self.sleep)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.t += seconds
        self.at_sleep()


def open_study(recipe: Recipe, folder: Path, **other: Any) -> Study:
    """The recipe's study in `folder`, opened by this process."""
    folder.mkdir(exist_ok=True, parents=True)
    given = {"worker": Worker.here(), "identity": identity_of(recipe), "resolved": RESOLVED, "say": Told(), **other}
    return Study.open(recipe, folder, **given)


def loss_of(params: dict[str, Any], step: int) -> float:
    """A toy objective: best at a learning rate of 1e-3 and large batches, and falling with every evaluation."""
    rate = abs(math.log10(params.get("train.learning_rate", 0.003)) + 3)
    return rate + 1 / params.get("train.batch_size", 8) + params.get("train.warmup_ratio", 0.0) + 1 / (step + 1)


def try_one(study: Study, asked: Any, n_evaluations: int = N_EVALUATIONS, pause_s: float = 0.0) -> str:
    """Try one trial to its end, as a worker does; returns how it ended."""
    loss = math.inf
    for step in range(1, n_evaluations + 1):
        loss = loss_of(asked.params, step)
        study.report(asked.number, step, loss)
        if study.should_prune(asked.number):
            study.prune(asked.number, {"steps": step, "steps_planned": n_evaluations})
            return "pruned"
        time.sleep(pause_s)
    study.finish(asked.number, loss, {"steps": n_evaluations, "steps_planned": n_evaluations})
    return "finished"


def work(study: Study, pause_s: float = 0.0) -> list[int]:
    """Work until the study is over; returns the numbers that were tried here."""
    tried: list[int] = []
    while not study.is_over():
        study.beat()
        asked = study.ask()
        if asked is None:
            time.sleep(0.2)
            continue
        tried.append(asked.number)
        try_one(study, asked, pause_s=pause_s)
    return tried


def start_worker(recipe_file: Path, folder: Path, *options: object) -> subprocess.Popen[str]:
    """A worker process on a study; it prints a JSON line for each trial that it asked for."""
    folder.mkdir(exist_ok=True, parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, str(recipe_file), str(folder), *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def tried_by(worker: subprocess.Popen[str], timeout_s: float = 240) -> list[dict[str, Any]]:
    """What a worker process asked for, once it has ended well and without a word on stderr."""
    out, err = worker.communicate(timeout=timeout_s)
    assert worker.returncode == 0, err
    assert err == ""
    return [json.loads(line) for line in out.splitlines()]


def wait_for_line(worker: subprocess.Popen[str], word: str) -> list[dict[str, Any]]:
    """Lines of a worker process until one holds `word`."""
    lines: list[dict[str, Any]] = []
    assert worker.stdout is not None
    for line in worker.stdout:
        lines.append(json.loads(line))
        if word in line:
            return lines
    assert worker.stderr is not None
    raise AssertionError(worker.stderr.read())


class Postgres:
    """Debian's PostgreSQL in a folder of its own, run by user postgres where this is root."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self.folder, self.binaries = folder, binaries
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def call(self, program: str, *arguments: str, check: bool = True) -> None:
        """Run one of its programs."""
        as_user: dict[str, Any] = {}
        if os.getuid() == 0:
            account = pwd.getpwnam("postgres")
            as_user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
        done = subprocess.run(
            [str(self.binaries / program), *arguments],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,  # a pipe would be held open by the server
            stderr=subprocess.DEVNULL,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            check=False,
            **as_user,
        )
        assert not check or done.returncode == 0, f"{program} {arguments}: {(self.folder / 'log').read_text()}"

    def start(self) -> None:
        """Start the server and wait until it answers."""
        options = f"-c listen_addresses=127.0.0.1 -p {self.port} -k {self.folder} -F -c max_connections=40"
        self.call(
            "pg_ctl", "-D", str(self.folder / "data"), "-l", str(self.folder / "log"), "-w", "-o", options, "start"
        )

    def stop(self) -> None:
        """Stop the server at once; connections break."""
        self.call("pg_ctl", "-D", str(self.folder / "data"), "-m", "fast", "-w", "stop", check=False)

    def url(self, database: str, scheme: str = "postgresql", password: str = "geheim%21") -> str:
        """The address of a database that is made if need be. The server lets everybody in, whatever the password."""
        import psycopg

        with psycopg.connect(f"postgresql://postgres@127.0.0.1:{self.port}/postgres", autocommit=True) as server:
            if not server.execute("SELECT 1 FROM pg_database WHERE datname = %s", (database,)).fetchone():
                server.execute(f'CREATE DATABASE "{database}"')  # type: ignore[arg-type]
        return f"{scheme}://postgres:{password}@127.0.0.1:{self.port}/{database}"


def why_no_postgres() -> str | None:
    """Why no server can be started here; None when one can."""
    if not glob.glob("/usr/lib/postgresql/*/bin/initdb"):
        return "PostgreSQL's server is not there"
    try:
        pwd.getpwnam("postgres")
    except KeyError:
        return "there is no user postgres to run PostgreSQL's server"
    return None


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    """A server for the time of a test module."""
    binaries = Path(sorted(glob.glob("/usr/lib/postgresql/*/bin"))[-1])
    folder = Path(tempfile.mkdtemp(prefix="maltu-postgres-"))  # not under pytest's own folder, which is root's alone
    if os.getuid() == 0:
        shutil.chown(folder, "postgres", "postgres")
    server = Postgres(folder, binaries)
    try:
        server.call("initdb", "-D", str(folder / "data"), "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync")
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def main(recipe_file: str, folder: str, pause: str = "0", hang_at: str = "-1") -> None:
    """One worker: tries trials until the study is over, or hangs after the second report of its `hang_at`-th trial."""
    recipe = read_recipe(Path(recipe_file))
    study = open_study(recipe, Path(folder), say=lambda line: print(json.dumps({"says": line}), flush=True))
    n_asked = 0
    while not study.is_over():
        study.beat()
        asked = study.ask()
        if asked is None:
            time.sleep(0.2)
            continue
        told = {"number": asked.number, "params": asked.params, "again_of": asked.again_of}
        print(json.dumps(told), flush=True)
        if n_asked == int(hang_at):
            for step in (1, 2):
                study.report(asked.number, step, loss_of(asked.params, step))
            print(json.dumps({"hangs": asked.number}), flush=True)
            time.sleep(600)
        n_asked += 1
        with contextlib.suppress(DiskError):
            try_one(study, asked, n_evaluations=4, pause_s=float(pause))
    study.leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
