"""Other people's clients: the blocks of docs/clients.md as they stand there, the example, and Open WebUI's calls.

MALTU_CLIENTS names a Python that has langchain-openai, litellm and llm, where this one has not: they bring hundreds of
packages along, and need nothing of ours.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow  # starts a server, and clients

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MALTU_CLIENTS", sys.executable)
BLOCK = re.compile(r"<!-- run: ([\w-]+) -->\n```(python|sh)\n(.*?)```", re.DOTALL)
NEEDS = {"langchain": "langchain_openai", "litellm": "litellm", "llm": "llm"}


def blocks() -> dict[str, tuple[str, str]]:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    return {name: (language, code) for name, language, code in BLOCK.findall(text)}


def run(words: list[str], said: str = "", **more: str) -> str:
    """What a client prints."""
    known = {
        "OPENAI_API_KEY": "none",
        "NO_PROXY": "*",
        "PYTHONWARNINGS": "ignore",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    environment = os.environ | known | more
    done = subprocess.run(
        words, input=said, capture_output=True, text=True, encoding="utf-8", timeout=120, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def block(name: str, address: str, **more: str) -> list[str]:
    """The lines that a block of the page prints, against the test's own server and runs."""
    language, code = blocks()[name]
    code = code.replace("http://127.0.0.1:8000", address).replace("casual_chat", "casual")
    return run([PYTHON if language == "python" else "sh", "-c", code], **more).splitlines()


def need(name: str) -> None:
    package = NEEDS[name]
    if subprocess.run([PYTHON, "-c", f"import {package}"], capture_output=True).returncode:
        pytest.skip(f"{package} is not installed; MALTU_CLIENTS may name a Python that has it")


def test_the_page_has_a_block_for_every_client() -> None:
    assert set(blocks()) == {"openai", "openai-async", "curl", *NEEDS}


def test_openai_whole_streamed_and_several_with_log_probabilities(server: Any) -> None:
    lines = block("openai", server.address)
    assert len(lines) >= 5 and re.search(r" [0-9a-f]{8}$", lines[0]) and lines[1].strip()
    assert [line.split()[0] for line in lines if re.match(r"[012] ", line)] == ["0", "1", "2"]


def test_openai_asynchronously(server: Any) -> None:
    assert len([line for line in block("openai-async", server.address) if line.strip()]) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(server: Any) -> None:
    text = "\n".join(block("curl", server.address))
    assert '"object":"list"' in text and '"object":"chat.completion"' in text and "data: [DONE]" in text


@pytest.mark.parametrize("name", ["langchain", "litellm"])
def test_other_libraries(server: Any, name: str) -> None:
    need(name)
    assert len([line for line in block(name, server.address) if line.strip()]) == 2


def test_the_llm_command(server: Any, tmp_path: Path) -> None:
    need("llm")
    path = f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"
    assert block("llm", server.address, LLM_USER_PATH=str(tmp_path), PATH=path)[0].strip()


def test_the_example_talks(server: Any) -> None:
    words = [sys.executable, str(ROOT / "examples" / "small_talk.py"), "casual", server.address]
    assert run(words, "오늘 뭐 먹지?\n\n비 온다\n").count("> ") == 4
    assert "does not exist" in run([*words[:2], "nobody", server.address], "안녕\n")


def test_the_example_is_thirty_lines() -> None:
    assert (ROOT / "examples" / "small_talk.py").read_text(encoding="utf-8").count("\n") == 30


class TestOpenWebUI:
    """Its calls, with the fields and headers that its server sends on."""

    @pytest.fixture
    def webui(self, server: Any) -> Any:
        headers = {"Authorization": "Bearer none", "Content-Type": "application/json", "X-OpenWebUI-User-Id": "1"}
        with httpx.Client(base_url=f"{server.address}/v1", headers=headers, timeout=60) as client:
            yield client

    def test_it_finds_the_models(self, webui: Any) -> None:
        found = webui.get("/models").json()["data"]
        assert [model["id"] for model in found] == ["base", "casual", "polite"]
        assert all(model["object"] == "model" and model["owned_by"] for model in found)

    def test_a_chat_streams_and_tells_its_usage(self, webui: Any) -> None:
        talk = [
            {"role": "system", "content": "짧게 말해"},
            {"role": "user", "content": "오늘 뭐 먹지?"},
            {"role": "assistant", "content": "김치찌개 어때?"},
            {"role": "user", "content": [{"type": "text", "text": "좋아!"}]},
        ]
        asked = {"model": "casual", "messages": talk, "stream": True, "stream_options": {"include_usage": True}}
        asked |= {"temperature": 0.8, "top_p": 0.9, "frequency_penalty": 0, "seed": 3, "stop": ["\n\n"]}
        with webui.stream("POST", "/chat/completions", json=asked | {"max_tokens": 16}) as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert events[-1] == "[DONE]" and json.loads(events[-2])["usage"]["completion_tokens"] > 0

    @pytest.mark.parametrize("task", ["title_generation", "tags_generation", "follow_up_generation"])
    def test_a_task_is_answered_at_once(self, webui: Any, task: str) -> None:
        content = '### Task:\nJSON format: { "title": "…" }\n<chat_history>\nUSER: 오늘 뭐 먹지?\n</chat_history>'
        metadata = {"task": task, "chat_id": "c", "task_body": {"model": "casual", "messages": [], "id": None}}
        asked = {"model": "casual", "messages": [{"role": "user", "content": content}], "stream": False}
        limit = {"max_completion_tokens": 12} if task == "title_generation" else {}
        said = webui.post("/chat/completions", json=asked | limit | {"metadata": metadata}).json()
        assert said["object"] == "chat.completion" and isinstance(said["choices"][0]["message"]["content"], str)
        assert said["maltu"]["unused"] == ["metadata"]

    def test_a_task_that_is_too_long_says_so(self, webui: Any) -> None:
        asked = {"model": "casual", "messages": [{"role": "user", "content": "### Task: " * 400}], "stream": False}
        refused = webui.post("/chat/completions", json=asked)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")
