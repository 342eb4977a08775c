"""Other people's clients: the blocks of docs/clients.md as they stand there, the example, and Open WebUI's calls.

MALTU_CLIENTS names a Python that has langchain-openai, litellm and llm, where this one has not (clients.txt beside this
file): they bring eighty packages along, some of which our own set excludes, and need nothing of ours. No client may
reach further than this machine.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.slow  # starts a server, and clients

ROOT = Path(__file__).parents[2]
PYTHON = os.environ.get("MALTU_CLIENTS", sys.executable)
BLOCK = re.compile(r"<!-- run: ([\w-]+) -->\n```(python|sh)\n(.*?)```", re.DOTALL)
NEEDS = {"langchain": "langchain_openai", "litellm": "litellm", "llm": "llm"}
CLOSED = '''"""Whatever Python starts with this on its path reaches no further than this machine."""

import os
import sys


def look(event, args):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    elif event in ("socket.connect", "socket.sendto") and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if name and name not in ("127.0.0.1", "::1", "localhost"):
        with open(os.environ["WENT_OUT"], "a") as file:
            file.write(f"{name}\\n")
        raise ConnectionRefusedError(f"{name} is not this machine")


sys.addaudithook(look)
'''


def blocks() -> dict[str, tuple[str, str]]:
    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    return {name: (language, code) for name, language, code in BLOCK.findall(text)}


class Clients:
    """Runs them, each with a home of its own and the network closed."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.folder, self.log = address, folder, folder / "went-out"
        (folder / "closed").mkdir()
        (folder / "closed" / "sitecustomize.py").write_text(CLOSED, encoding="utf-8")

    def run(self, words: list[str], said: str = "") -> str:
        """What a client prints."""
        own = {"PYTHONPATH": str(self.folder / "closed"), "WENT_OUT": str(self.log), "LLM_USER_PATH": str(self.folder)}
        own |= {"NO_PROXY": "*", "PYTHONWARNINGS": "ignore"}
        own |= {"PATH": f"{Path(PYTHON).parent}{os.pathsep}{os.environ['PATH']}"}
        kept = {name: value for name, value in os.environ.items() if not name.endswith("_API_KEY")}
        done = subprocess.run(
            words, input=said, capture_output=True, text=True, encoding="utf-8", timeout=120, env=kept | own
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def block(self, name: str) -> list[str]:
        """The lines that a block of the page prints, against the test's own server and runs."""
        language, code = blocks()[name]
        code = code.replace("http://127.0.0.1:8000", self.address).replace("casual_chat", "casual")
        return self.run([PYTHON if language == "python" else "sh", "-c", code]).splitlines()


@pytest.fixture
def clients(server: Any, tmp_path: Path) -> Iterator[Clients]:
    made = Clients(server.address, tmp_path)
    yield made
    assert not made.log.exists(), f"a client wanted to reach {made.log.read_text(encoding='utf-8')}"


def need(name: str) -> None:
    package = NEEDS[name]
    if subprocess.run([PYTHON, "-c", f"import importlib.util as u; assert u.find_spec({package!r})"]).returncode:
        assert "MALTU_CLIENTS" not in os.environ, f"{PYTHON} has no {package}"
        pytest.skip(f"{package} is not installed; `make clients` runs this")


def test_the_page_has_a_block_for_every_client() -> None:
    assert set(blocks()) == {"openai", "openai-async", "curl", *NEEDS}


@pytest.mark.parametrize(
    "reach",
    ["socket.create_connection(('192.0.2.1', 80), 5)", "socket.getaddrinfo('example.org', 443)"],
)
def test_a_client_that_reaches_further_than_this_machine_is_stopped_and_noticed(tmp_path: Path, reach: str) -> None:
    made = Clients("", tmp_path)
    code = f"import socket\ntry:\n    {reach}\nexcept ConnectionRefusedError as error:\n    print(error)"
    assert "is not this machine" in made.run([PYTHON, "-c", code]) and made.log.exists()


def test_openai_whole_streamed_and_several_with_log_probabilities(clients: Clients) -> None:
    lines = clients.block("openai")
    assert len(lines) >= 5 and re.search(r" [0-9a-f]{8}$", lines[0]) and lines[1].strip()
    assert [line.split()[0] for line in lines if re.match(r"[012] ", line)] == ["0", "1", "2"]


def test_openai_asynchronously(clients: Clients) -> None:
    assert len([line for line in clients.block("openai-async") if line.strip()]) == 2


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(clients: Clients) -> None:
    text = "\n".join(clients.block("curl"))
    assert '"object":"list"' in text and '"object":"chat.completion"' in text and "data: [DONE]" in text


@pytest.mark.parametrize("name", ["langchain", "litellm"])
def test_other_libraries(clients: Clients, name: str) -> None:
    need(name)
    assert len([line for line in clients.block(name) if line.strip()]) == 2


def test_the_llm_command(clients: Clients) -> None:
    need("llm")
    assert clients.block("llm")[0].strip()


def test_the_example_talks(clients: Clients) -> None:
    words = [sys.executable, str(ROOT / "examples" / "small_talk.py"), "casual", clients.address]
    assert clients.run(words, "오늘 뭐 먹지?\n\n비 온다\n").count("> ") == 4
    assert "does not exist" in clients.run([*words[:2], "nobody", clients.address], "안녕\n")


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
