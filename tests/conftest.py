"""What many tests share: an offline world of their own, and a handful of Korean and English dialogues."""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("WANDB_MODE", "offline")

# What .ci/run installs or lays beside the clone: with MALTU_CI set, a test that misses one of them is a failure.
INSTALLED_IN_CI = (
    "playwright",
    "Chromium",
    "../shared",
    "bitsandbytes is not installed",
    "PostgreSQL",
    "not there",
    "not here",
)
_missed: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Note the skips that may not happen where everything is installed."""
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
        if any(word in reason for word in INSTALLED_IN_CI):
            _missed.append(f"{report.nodeid}: {reason}")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With MALTU_CI set such a skip fails the session."""
    if os.environ.get("MALTU_CI") and _missed and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say which they were."""
    if os.environ.get("MALTU_CI"):
        for line in _missed:
            terminalreporter.write_line(f"skipped though .ci/run installs what it needs: {line}")


FIRST = ["오늘 뭐 먹지?", "비 온다", "시험 망했어", "주말에 뭐 해?", "what's for lunch", "i'm so tired", "rain again"]
SECOND = [
    "김치찌개 어때?",
    "우산 챙겨!",
    "괜찮아, 다음엔 잘 볼 거야",
    "나랑 영화 보자",
    "Tacos!",
    "Nap time.",
    "Grab a coat!",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is read from or written to the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def several_threads() -> Iterator[None]:
    """torch works on two threads meanwhile, whatever it was told."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def talk_file(tmp_path: Path) -> Path:
    """48 different short dialogues, half Korean, half English, as messages-jsonl."""
    rows = []
    for i in range(48):
        user, answer = FIRST[i % 7], SECOND[i % 7]
        turns = [
            f"{user} {i}",
            answer,
            f"정말? {i * 37 % 101}" if i % 2 else f"really? {i * 37 % 101}",
            f"{answer} {i * i}",
        ]
        messages = [{"role": "user" if k % 2 == 0 else "assistant", "content": t} for k, t in enumerate(turns)]
        rows.append(json.dumps({"messages": messages}, ensure_ascii=False))
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def recipe_file(tmp_path: Path, talk_file: Path) -> Path:
    """A recipe that trains a few steps on `talk_file` in seconds."""
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"""
name: tiny
base: {{model: spoken-mini}}
data: {{train: [{talk_file}], clean: {{near_duplicates: null}}}}
adapter: {{kind: lora, rank: 4, dropout: 0.1}}
train: {{max_steps: 12, batch_size: 8, learning_rate: 0.005, evaluate_every: 0.5, early_stop_patience: null}}
evaluate: {{prompts: null}}
track: []
""",
        encoding="utf-8",
    )
    return path
