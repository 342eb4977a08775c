"""Flags, their MALTU_* twins, and what is refused before anything loads."""

from pathlib import Path

import pytest

from serve.engines import forward
from serve.keys import key_of
from serve.settings import FORWARDS, is_loopback, read_settings
from toolkit.errors import InputError

KEY = "key-of-sixteen-characters"


def test_defaults_listen_on_this_machine_alone() -> None:
    settings = read_settings(["casual"], {})
    assert (settings.host, settings.port, settings.device, settings.has_page) == ("127.0.0.1", 8000, "auto", True)
    assert settings.runs == ("casual",) and settings.folder == Path("runs") and settings.keys == ()


def test_the_environment_says_what_flags_say() -> None:
    environment = {"MALTU_PORT": "9000", "MALTU_NO_UI": "1", "MALTU_MAX_TOKENS": "12", "MALTU_RUNS": "elsewhere"}
    settings = read_settings(["casual"], environment)
    assert (settings.port, settings.has_page, settings.max_tokens, settings.folder) == (
        9000,
        False,
        12,
        Path("elsewhere"),
    )


def test_a_flag_wins_over_the_environment() -> None:
    assert read_settings(["casual", "--port", "9001"], {"MALTU_PORT": "9000"}).port == 9001


def test_all_problems_come_at_once() -> None:
    with pytest.raises(InputError) as raised:
        wrong = ["--port", "x", "--queue", "-1", "--host", "0.0.0.0", "--rate", "0/minute"]
        read_settings(["casual", *wrong], {"MALTU_NO_UI": "maybe"})
    found = {problem.where for problem in raised.value.problems}
    assert found == {"--port", "--queue", "--host", "--rate", "MALTU_NO_UI"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.0.2", "example.org", ""])
def test_other_machines_are_kept_out_unless_told(host: str) -> None:
    with pytest.raises(InputError, match="--api-key-file"):
        read_settings(["casual", "--host", host], {})
    assert read_settings(["casual", "--host", host, "--allow-open"], {}).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host) and read_settings(["casual", "--host", host], {}).keys == ()


def test_keys_are_read_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    one, two = key_of(KEY, "app"), key_of(f"{KEY}-2", "other", "60/minute")
    lines = f"# 우리 앱\napp sha256:{one.digest}\n\n  other sha256:{two.digest} 60/minute  \n"
    file.write_text(lines, encoding="utf-8")
    settings = read_settings(["casual", "--host", "0.0.0.0", "--api-key-file", str(file)], {})
    assert settings.keys == (one, two)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# nothing\n", "no key"),
        (f"# keys\n{KEY}\n", "line 2"),
        (f"app {KEY}\n", "as hashes"),
        (f"app sha256:{'0' * 63}\n", "line 1"),
        (f"a/b sha256:{'0' * 64}\n", "line 1"),
        (f"app sha256:{'0' * 64} often\n", "'often' is no rate"),
    ],
)
def test_a_key_file_that_protects_nothing_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=says):
        read_settings(["casual", "--api-key-file", str(file)], {})


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_settings(["casual", "--api-key-file", str(tmp_path / "none"), "--host", "0.0.0.0"], {})


def test_feedback_lies_beside_the_runs_unless_told() -> None:
    assert read_settings(["casual", "--runs", "mine"], {}).store == "sqlite:///mine/.store/feedback.db"
    assert read_settings(["casual"], {"MALTU_STORE": "postgresql://h/d"}).store == "postgresql://h/d"
    assert read_settings(["casual", "--store", "none"], {}).store is None


def test_conversations_are_kept_only_when_told_and_only_in_a_store() -> None:
    assert not read_settings(["casual"], {}).keeps and read_settings(["casual", "--keep-conversations"], {}).keeps
    with pytest.raises(InputError, match="no store"):
        read_settings(["casual", "--keep-conversations", "--store", "none"], {})


def test_a_vllm_server_computes_where_told_and_its_key_is_its_own_variable() -> None:
    words = ["casual", "--engine", "vllm", "--vllm-url", "http://gpu:8001/"]
    settings = read_settings(words, {"VLLM_API_KEY": "s3cret"})
    assert (settings.vllm_url, settings.vllm_key) == ("http://gpu:8001/", "s3cret")
    assert read_settings(["casual"], {"VLLM_API_KEY": "s3cret"}).vllm_key is None


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (["--engine", "vllm"], "--engine"),
        (["--engine", "sglang"], "--engine"),
        (["--vllm-url", "http://gpu:8001"], "--vllm-url"),
        (["--engine", "vllm", "--vllm-url", "gpu:8001"], "--vllm-url"),
        (["--engine", "vllm", "--vllm-url", "http://me:pw@gpu:8001"], "--vllm-url"),
        (["--engine", "vllm", "--vllm-url", "http://gpu:8001/v1"], "--vllm-url"),
        (["--engine", "vllm", "--vllm-url", "http://gpu:8001", "--device", "cuda"], "--device"),
        (["--engine", "vllm", "--vllm-url", "http://gpu:8001", "--forward", "lean"], "--forward"),
        (["--forward", "fast"], "--forward"),
        (["--cpu-int8", "--forward", "modules"], "--cpu-int8"),
        (["--cpu-int8", "--device", "cuda:1"], "--cpu-int8"),
        (["--cpu-int8", "--engine", "vllm", "--vllm-url", "http://gpu:8001"], "--cpu-int8"),
    ],
)
def test_engines_that_cannot_be_are_refused(words: list[str], where: str) -> None:
    with pytest.raises(InputError) as raised:
        read_settings(["casual", *words], {})
    assert [problem.where for problem in raised.value.problems] == [where]


def test_how_this_process_computes_is_a_setting_whose_names_are_those_of_the_engine() -> None:
    assert read_settings(["casual"], {}).forward == "auto"
    assert read_settings(["casual"], {"MALTU_FORWARD": "modules"}).forward == "modules"
    assert forward.FORWARDS == FORWARDS
    assert not read_settings(["casual"], {}).is_int8 and read_settings(["casual"], {"MALTU_CPU_INT8": "1"}).is_int8
