"""The Dockerfile and the systemd unit, as far as they can be judged without building or starting anything."""

import configparser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serve.settings import parser

ROOT = Path(__file__).parents[2]
DOCKERFILE, UNIT = ROOT / "deploy" / "Dockerfile", ROOT / "deploy" / "maltu.service"
INSTRUCTIONS = {
    "FROM", "RUN", "WORKDIR", "COPY", "USER", "ENV", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT",
}  # fmt: skip


def instructions() -> list[tuple[str, str]]:
    lines = [line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.split(None, 1) for line in whole.splitlines() if line.strip()]
    return [(word, rest) for word, rest in pairs]


def unit() -> configparser.ConfigParser:
    read = configparser.ConfigParser(strict=False, interpolation=None)
    read.optionxform = str  # type: ignore[assignment, method-assign]
    read.read_string(UNIT.read_text(encoding="utf-8"))
    return read


def flags() -> set[str]:
    return {f"MALTU_{name.upper()}" for name in vars(parser().parse_args(["RUN"]))}


def test_the_image_is_made_of_what_is_there() -> None:
    given = instructions()
    assert {word for word, _ in given} <= INSTRUCTIONS and given[0][0] == "FROM"
    copied = [path for word, rest in given if word == "COPY" for path in rest.split()[:-1]]
    assert len(copied) > 5 and all((ROOT / path).exists() for path in copied)
    ignored = (ROOT / "deploy" / "Dockerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    assert ignored[0] == "*" and {line[1:] for line in ignored if line.startswith("!")} == set(copied)


def test_the_image_names_its_base_and_does_not_run_as_root() -> None:
    given = instructions()
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", given[0][1])
    assert [rest for word, rest in given if word == "USER"] == ["maltu"]
    assert given.index(("USER", "maltu")) > max(place for place, (word, _) in enumerate(given) if word == "RUN")


def test_the_image_starts_the_server_with_settings_that_there_are() -> None:
    given = dict(instructions())
    assert json.loads(given["ENTRYPOINT"]) == ["python", "-m", "serve"] and given["STOPSIGNAL"] == "SIGTERM"
    assert given["EXPOSE"] == str(parser().get_default("port"))
    assert set(re.findall(r"MALTU_\w+", given["ENV"])) <= flags()


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_finds_nothing() -> None:
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_unit_starts_the_server_with_settings_that_there_are() -> None:
    service = unit()["Service"]
    assert service["ExecStart"].split()[1:3] == ["-m", "serve"] and service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 10  # what runs has 10 s to finish
    assert set(re.findall(r"MALTU_\w+", UNIT.read_text(encoding="utf-8"))) <= flags()
    assert service["NoNewPrivileges"] == service["DynamicUser"] == "yes"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    copy = tmp_path / "maltu.service"
    text = UNIT.read_text(encoding="utf-8").replace("/opt/maltu/.venv/bin/python", "/usr/bin/env")
    copy.write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    words = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", copy]
    assert subprocess.run(words, capture_output=True).returncode == 0
