"""A search that is killed, joined, stopped, changed or out of space: nothing told is lost, and the same command ends
with every trial tried once.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import FrozenTrial

from tests.search_world import Postgres, running_postgres, why_no_postgres
from tests.searching_world import KEYS, RATES, contents, start, trials_of, write_base, write_search, write_talk
from toolkit import disk
from toolkit.fit import many
from toolkit.fit.member import Learner
from toolkit.search.ledger import is_lost, originals
from toolkit.train import main

STEPS = "train: {max_steps: 30, batch_size: 8, learning_rate: 0.01, evaluate_every: 1, early_stop_patience: null}"
MANY = "from toolkit.quiet import quiet\nwith quiet():\n    from toolkit.fit import many, watch\n"
SAVES = MANY + "many.CHECKPOINT_S = many.SAVE_SHARE = 0.0\n"
DIES = """
import os, signal
step, n_steps = many._Many._step, []
def then_die(self):
    if len(n_steps) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    n_steps.append(1)
    return step(self)
many._Many._step = then_die
"""
DIES_ALONE = """
import os, signal
watch.CHECKPOINT_S = watch.SAVE_SHARE = 0.0
end = watch.Watch.on_step_end
def then_die(self, args, state, control, **more):
    end(self, args, state, control, **more)
    if state.global_step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
watch.Watch.on_step_end = then_die
"""
HOLDS = (
    MANY
    + """
import time
from pathlib import Path
step, n_steps = many._Many._step, []
def held(self):
    while len(n_steps) >= 12 and Path("hold").exists() and not self.crew.wants_stop():
        time.sleep(0.05)
    n_steps.append(1)
    return step(self)
many._Many._step = held
"""
)  # in step 13, after two evaluations, it waits until the file is gone
Said = tuple[int, str, str]


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base, made once."""
    return write_base(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def here(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe that searches, its talk and its base."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(kept, tmp_path / "base")
    write_talk(tmp_path / "talk.jsonl")
    write_search(tmp_path)
    return tmp_path


@pytest.fixture
def command(here: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """The command in this process: how it ended and what it printed."""

    def call(*arguments: str) -> Said:
        capfd.readouterr()
        code = main(["search.yaml", *arguments])
        return (code, *capfd.readouterr())

    return call


@pytest.fixture
def begin(here: Path) -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """Start the command as a process, with Python that runs before it."""
    started: list[subprocess.Popen[str]] = []

    def call(*arguments: str, driver: str = "") -> "subprocess.Popen[str]":
        (here / "hold").touch()
        started.append(start(here, *arguments, driver=driver))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def run(here: Path) -> Path:
    """Where the search lies, or will lie."""
    return here / "runs" / "말투"


@pytest.fixture
def taken_up(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Of every learner that goes on in this process from a checkpoint: its name, and the step it had come to."""
    found: list[tuple[str, int]] = []
    take_up = Learner._take_up

    def noting(self: Learner, folder: Path) -> None:
        take_up(self, folder)
        found.append((self.name, self.progress.step))

    monkeypatch.setattr(Learner, "_take_up", noting)
    return found


def ended(process: "subprocess.Popen[str]", timeout_s: float = 240) -> Said:
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, out, err


def wait_for(what: Callable[[], Any], process: "subprocess.Popen[str]", timeout_s: float = 120) -> Any:
    """What `what` returns once that is true; the process must live until then."""
    deadline = time.monotonic() + timeout_s
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    return found


def running(run: Path) -> list[FrozenTrial]:
    if not (run / "search" / "journal.log").exists():
        return []
    try:
        return [trial for trial in trials_of(run) if trial.state.name == "RUNNING"]
    except KeyError:  # the study is not in it yet
        return []


def pids(run: Path) -> dict[int, int]:
    """Of every worker that ever wrote into the journal its index and its process."""
    found: dict[int, int] = {}
    log = run / "search" / "journal.log"
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        for name, facts in json.loads(line).get("user_attr", {}).items():
            if name.startswith("worker:"):
                found[facts["index"]] = facts["pid"]
    return found


def of_worker(run: Path, index: int) -> list[FrozenTrial]:
    """Trials that run in the worker of that index now and have been measured."""
    pid = pids(run).get(index)
    return [t for t in running(run) if f"-{pid}-" in t.user_attrs["worker"] and t.intermediate_values]


def assert_budget_is_exact(run: Path, n_trials: int, url: str | None = None) -> list[FrozenTrial]:
    """Every trial of the budget was trained to its end once, however often it was begun; returns those."""
    trials = trials_of(run, url)
    real = [trial for trial in trials if trial.user_attrs.get("reason") != "twice"]
    assert len(originals(real)) == n_trials
    done = [trial for trial in real if trial.state.name == "COMPLETE"]
    assert len(done) == n_trials and not [trial for trial in trials if trial.state.name == "RUNNING"]
    lost = {trial.number for trial in real if is_lost(trial)}
    assert sorted(trial.user_attrs["again_of"] for trial in real if "again_of" in trial.user_attrs) == sorted(lost)
    assert len({tuple(sorted(trial.params.items())) for trial in done}) == n_trials
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    best = min(done, key=lambda trial: (trial.value or 0.0, trial.number))
    assert facts["status"] == "finished" and facts["fit"]["best_loss"] == best.value
    assert facts["search"]["best"]["number"] == best.number
    assert not [path for path in run.rglob("*") if path.name.endswith((".writing", ".replaced"))]
    assert not (run / "checkpoints").exists()
    return done


# Killed


@pytest.mark.slow
def test_a_killed_search_goes_on_from_the_steps_that_were_saved(
    here: Path,
    run: Path,
    command: Callable[..., Said],
    begin: Callable[..., "subprocess.Popen[str]"],
    taken_up: list[tuple[str, int]],
) -> None:
    assert command("search.trials=2", "--runs", "whole", "--quiet")[0] == 0
    undisturbed = {tuple(t.params.items()): t.intermediate_values for t in trials_of(here / "whole" / "말투")}
    process = begin("search.side_by_side=2", driver=SAVES + DIES.format(at=4))
    assert ended(process)[0] == -signal.SIGKILL
    assert len(running(run)) == 2
    code, out, err = command()
    assert (code, err) == (0, "")
    assert taken_up == [("trial-2", 4), ("trial-3", 4)]
    assert "Trial 0 was lost with its process" in out and "Trial 1 was lost with its process" in out
    done = assert_budget_is_exact(run, 3)
    again = [trial for trial in done if "again_of" in trial.user_attrs]
    assert len(again) == 2 and all(trial.user_attrs["steps"] == 6 for trial in again)
    assert {tuple(t.params.items()): t.intermediate_values for t in again} == undisturbed


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(
    run: Path, command: Callable[..., Said], begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    for at in (1, 3, 2):
        assert ended(begin("search.side_by_side=2", driver=SAVES + DIES.format(at=at)))[0] == -signal.SIGKILL
    assert command()[0] == 0
    assert_budget_is_exact(run, 3)


@pytest.mark.slow
def test_a_killed_trial_of_a_kind_that_no_stack_holds_goes_on(
    here: Path, run: Path, command: Callable[..., Said], begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_search(here, "{adapter: {ia3: {train.learning_rate: {low: 0.005, high: 0.02}}}}", trials=1)
    assert command("--runs", "whole", "--quiet")[0] == 0
    (whole,) = trials_of(here / "whole" / "말투")
    assert ended(begin(driver=MANY + DIES_ALONE))[0] == -signal.SIGKILL  # after a look that no checkpoint knows of
    assert set(trials_of(run)[0].intermediate_values) == {1, 2}
    code, out, err = command()
    assert (code, err) == (0, ""), out
    (again,) = assert_budget_is_exact(run, 1)
    assert again.intermediate_values == whole.intermediate_values and again.params == whole.params
    assert (again.value, again.user_attrs["n_tokens"]) == (whole.value, whole.user_attrs["n_tokens"])


@pytest.mark.slow
def test_a_helper_that_is_killed_is_noticed_and_its_trials_are_asked_again(
    here: Path, run: Path, begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_search(here, train=STEPS, workers=2, side_by_side=1, trials=4)
    leader = begin(driver=HOLDS)
    (trial,) = wait_for(lambda: of_worker(run, 1), leader)
    os.kill(pids(run)[1], signal.SIGKILL)
    (here / "hold").unlink()
    code, out, err = ended(leader)
    assert (code, err) == (0, ""), out
    assert f"Trial {trial.number} was lost with its process" in out and "A worker ended with code -9" in out
    assert_budget_is_exact(run, 4)


@pytest.mark.slow
def test_helpers_of_a_killed_leader_end_by_themselves_and_the_same_command_goes_on(
    here: Path, run: Path, begin: Callable[..., "subprocess.Popen[str]"], taken_up: list[tuple[str, int]],
    command: Callable[..., Said],
) -> None:  # fmt: skip
    write_search(here, train=STEPS, workers=2, side_by_side=1, trials=4)
    leader = begin(driver=HOLDS)
    wait_for(lambda: of_worker(run, 0) and of_worker(run, 1), leader)
    helper = pids(run)[1]
    leader.kill()
    leader.communicate()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{helper}").exists() and _state(helper) not in ("Z", "X"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    code, out, _ = command("search.workers=1")
    assert code == 0, out
    assert_budget_is_exact(run, 4)
    assert taken_up and all(step > 0 for _, step in taken_up)  # the helper saved before it went


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return "X"


# Joined


@pytest.mark.slow
def test_a_second_command_joins_and_the_result_is_written_once(
    here: Path, run: Path, begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_search(here, train=STEPS, side_by_side=1, trials=6)
    first = begin(driver=HOLDS)
    wait_for(lambda: running(run), first)
    second = begin(driver=HOLDS)
    wait_for(lambda: len({t.user_attrs["worker"] for t in running(run)}) == 2, second)
    (here / "hold").unlink()
    said = [ended(process) for process in (first, second)]
    assert [(code, err) for code, _, err in said] == [(0, ""), (0, "")], said
    assert "this process joins it as one more worker" in said[1][1]
    assert [out.count("## Search") for _, out, _ in said] == [1, 0]
    done = assert_budget_is_exact(run, 6)
    assert len({trial.user_attrs["worker"] for trial in done}) == 2


@pytest.mark.slow
def test_who_joined_writes_the_result_when_the_leader_is_killed(
    here: Path, run: Path, begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    write_search(here, train=STEPS, side_by_side=1, trials=4)
    first = begin(driver=HOLDS)
    wait_for(lambda: running(run), first)
    second = begin(driver=HOLDS)
    wait_for(lambda: len({t.user_attrs["worker"] for t in running(run)}) == 2, second)
    first.kill()
    (here / "hold").unlink()
    code, out, err = ended(second)
    assert (code, err) == (0, ""), out
    assert out.count("## Search") == 1
    assert_budget_is_exact(run, 4)


@pytest.mark.slow
def test_another_recipe_of_the_same_name_does_not_join(
    here: Path, run: Path, begin: Callable[..., "subprocess.Popen[str]"], command: Callable[..., Said]
) -> None:
    write_search(here, train=STEPS, trials=2)
    first = begin(driver=HOLDS)
    wait_for(lambda: running(run), first)
    code, _, err = command("train.batch_size=4")
    assert code == 2 and "train.batch_size: 8 became 4" in err and "name=말투-2" in err
    code, _, err = command("--fresh")
    assert code == 2 and f"pid {first.pid}" in err
    (here / "hold").unlink()
    assert ended(first)[0] == 0
    assert_budget_is_exact(run, 2)


# Stopped


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_saves_and_the_same_command_goes_on(
    here: Path,
    run: Path,
    begin: Callable[..., "subprocess.Popen[str]"],
    command: Callable[..., Said],
    taken_up: list[tuple[str, int]],
    workers: int,
) -> None:
    write_search(here, train=STEPS, workers=workers, side_by_side=2 // workers, trials=3)
    process = begin(driver=HOLDS)
    wait_for(lambda: all(of_worker(run, index) for index in range(workers)), process)
    process.send_signal(signal.SIGINT)
    code, out, err = ended(process, 60)
    assert (code, err) == (130, ""), out
    assert "Stopped. The same command goes on where it stopped." in out
    assert not (run / "adapters").exists()
    code, out, err = command("search.workers=1")
    assert (code, err) == (0, ""), out
    assert_budget_is_exact(run, 3)
    assert len(taken_up) == 2 and all(5 <= step <= 13 for _, step in taken_up)
    assert out.count("was under way when its process stopped") == 2


# Changed


def test_a_changed_recipe_is_refused_with_what_changed(here: Path, run: Path, command: Callable[..., Said]) -> None:
    assert command("search.trials=1", "--quiet")[0] == 0
    before = contents(run)
    code, _, err = command("search.trials=1", "train.seed=7", "search.sampler=random")
    assert code == 2 and "Traceback" not in err
    for part in ("runs/말투", "train.seed: 0 became 7", "search.sampler: tpe became random", "name=말투-2", "--fresh"):
        assert part in err
    with (here / "talk.jsonl").open("a", encoding="utf-8") as file:
        file.write((here / "talk.jsonl").read_text(encoding="utf-8").splitlines()[0].replace("Tacos", "Pizza") + "\n")
    code, _, err = command("search.trials=1")
    assert code == 2 and "talk.jsonl: the file changed" in err
    assert contents(run) == before


def test_a_run_that_was_no_search_is_not_taken_for_one(here: Path, run: Path, command: Callable[..., Said]) -> None:
    assert command("search.trials=1", "--quiet")[0] == 0
    code, _, err = command("search=null")
    assert code == 2 and "search.trials: 1 became None" in err


@pytest.mark.slow
def test_a_base_that_vanishes_is_named_and_the_search_goes_on_once_it_is_back(
    here: Path, run: Path, command: Callable[..., Said], begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    assert ended(begin(driver=SAVES + DIES.format(at=2)))[0] == -signal.SIGKILL
    (here / "base").rename(here / "gone")
    before = contents(run)
    code, _, err = command()
    assert code == 2 and "./base" in err and "Traceback" not in err
    assert contents(run) == before
    (here / "gone").rename(here / "base")
    assert command()[0] == 0
    assert_budget_is_exact(run, 3)


def test_talk_that_cannot_be_read_leaves_no_search_behind(here: Path, run: Path, command: Callable[..., Said]) -> None:
    (here / "talk.jsonl").write_text("{", encoding="utf-8")
    code, _, err = command("search.workers=2")
    assert code == 2 and "talk.jsonl:1" in err
    assert not (run / "search").exists() and not (run / "run.json").exists()


def test_torchrun_is_refused(run: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = command()
    assert code == 2 and "torchrun" in err and "same command" in err
    assert not run.exists()


# Nothing that is any good


@pytest.mark.parametrize("space", ["{train.max_length: [4, 5]}", "{train.learning_rate: [0.01, 0.02]}"])
def test_a_search_without_a_single_result_says_so(
    here: Path, run: Path, command: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, space: str
) -> None:
    write_search(here, space, sampler="grid", trials=2)
    with monkeypatch.context() as patch:
        if "rate" in space:  # numbers that run away
            measure = many._Many._losses
            patch.setattr(many._Many, "_losses", lambda *a, **k: [loss * float("inf") for loss in measure(*a, **k)])
        code, out, err = command()
    assert code == 2 and "no trial was trained to its end" in err and "trials.csv" in err, out
    table = (run / "search" / "trials.csv").read_text(encoding="utf-8")
    assert table.count(",fail,") == 2 and ("no row to learn from" in table or "the loss is inf" in table)
    assert not (run / "search" / "best.yaml").exists() and not (run / "adapters").exists()
    assert command()[0] == 2 and len(trials_of(run)) == 2
    write_search(here)
    assert command("--fresh")[0] == 0
    assert_budget_is_exact(run, 3)


# No room


FULL_JOURNAL = """
import errno, os
from toolkit.search import journal
append, n_lines = journal._append, []
def appending(path, data):
    n_lines.append(1)
    if len(n_lines) > 25:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    append(path, data)
journal._append = appending
"""
NAMES = {"checkpoint": "stack-00000008", "adapter": "1", "results": "trials.csv", "result": "main"}


@pytest.fixture
def small_steps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One trial after another, the second better than the first; a checkpoint at every step."""
    monkeypatch.setattr(many, "CHECKPOINT_S", 0.0)
    monkeypatch.setattr(many, "SAVE_SHARE", 0.0)
    write_search(here, RATES.replace("1.0e-1", "2.0e-2"), KEYS.replace("0.01", "0.001"), side_by_side=1)


def assert_told_and_goes_on(run: Path, said: Said, command: Callable[..., Said]) -> None:
    code, _, err = said
    assert code == 1, err
    assert "No space left on device" in err and "Check free space" in err and "Traceback" not in err
    before = {t.number: t.intermediate_values for t in trials_of(run)}
    assert before[0] and not (run / "adapters" / "main").exists()
    assert not [t for t in trials_of(run) if t.state.name == "FAIL"]
    assert command()[0] == 0
    done = assert_budget_is_exact(run, 3)
    after = {t.number: t.intermediate_values for t in trials_of(run)}
    assert all(after[number] | values == after[number] for number, values in before.items())
    assert done[0].number == 0


@pytest.mark.parametrize("where", NAMES)
def test_a_full_disk_is_told_and_nothing_that_was_told_is_lost(
    run: Path, command: Callable[..., Said], small_steps: None, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    sync = disk._sync

    def syncing(path: Path) -> None:
        if f".{NAMES[where]}." in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(disk, "_sync", syncing)
        said = command()
    assert_told_and_goes_on(run, said, command)


@pytest.mark.slow
def test_a_journal_that_cannot_grow_is_told_and_nothing_that_was_told_is_lost(
    run: Path, command: Callable[..., Said], small_steps: None, begin: Callable[..., "subprocess.Popen[str]"]
) -> None:
    assert_told_and_goes_on(run, ended(begin(driver=SAVES + FULL_JOURNAL)), command)


# Storages


def test_a_study_in_an_sqlite_file(here: Path, run: Path, command: Callable[..., Said]) -> None:
    url = f"sqlite:///{here}/study.db"
    write_search(here, storage=url)
    assert command()[0] == 0
    assert_budget_is_exact(run, 3, url)
    assert not (run / "search" / "journal.log").exists()
    assert command("search.trials=4")[0] == 0
    assert_budget_is_exact(run, 4, url)
    before = contents(here / "runs")
    code, _, err = command("search.trials=4", "--fresh")
    assert code == 2 and "--fresh moves the run folder, but the study lies in sqlite:///" in err
    assert contents(here / "runs") == before


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A server that lets everybody in."""
    with running_postgres() as server:
        yield server


@pytest.mark.slow
@pytest.mark.skipif(why_no_postgres() is not None, reason=str(why_no_postgres()))
def test_a_password_is_nowhere_in_the_run_folder(
    here: Path, run: Path, command: Callable[..., Said], postgres: Postgres
) -> None:
    url = postgres.url("searching", password="geheim!")
    said = command(f"search.storage={url}?password=verborgen")
    assert said[0] == 0, said
    assert_budget_is_exact(run, 3, postgres.url("searching", scheme="postgresql+psycopg"))
    said = (*said, *command(f"search.storage={url}?password=verborgen", "search.trials=4"))
    kept = b"".join(contents(here / "runs").values()) + b"".join(contents(here / "cache").values())
    for secret in ("geheim", "verborgen"):
        assert secret.encode() not in kept and secret not in str(said)
    assert b"127.0.0.1" in kept
    facts = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert "search.storage=postgresql://postgres:***@127.0.0.1" in facts["command"]
