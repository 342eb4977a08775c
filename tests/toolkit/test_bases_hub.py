"""Bases come from the hub: fetched once, only what is needed, from the cache without network, and refusals are told."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch

from toolkit.bases import catalog
from toolkit.bases.load import load_base, load_tokenizer
from toolkit.errors import BaseError
from toolkit.recipe.model import Base
from toolkit.shipped import shipped

SPOKEN_MINI = shipped("base/spoken-mini")
load_on_cpu = partial(load_base, device="cpu", dtype=torch.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped base, to be damaged."""
    return Path(shutil.copytree(SPOKEN_MINI, tmp_path / "base"))


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a hub that nobody listens for; returns the cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    _point_to(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "cache"


def _point_to(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_hub_id_without_network_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(BaseError, match=r"owner/name \(revision v2\): not on this machine.*folder"):
        load_on_cpu(Base(model="owner/name", revision="v2"))


def test_offline_nothing_is_asked_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the network was asked"))
    with pytest.raises(BaseError, match="HF_HUB_OFFLINE is set"):
        load_on_cpu(Base(model="owner/name"))


def _cache(hub: Path) -> None:
    repository = hub / "models--owner--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(SPOKEN_MINI, repository / "snapshots" / ("0" * 40))


@pytest.mark.parametrize("offline", [True, False])
def test_a_cached_base_loads_without_network(hub: Path, monkeypatch: pytest.MonkeyPatch, offline: bool) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    _cache(hub)
    base = load_on_cpu(Base(model="owner/name"))
    assert (base.source, base.hash) == ("owner/name", load_on_cpu(Base(model="spoken-mini")).hash)


class _Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as fetching a model takes; keeps the names of the files it handed out."""

    folder: Path
    sent: list[str]
    status, refusal = 200, ""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        if "/api/models/owner/name" in self.path:
            files = sorted(path.name for path in self.folder.iterdir())
            tree = [{"type": "file", "path": name, "size": 1, "oid": "1" * 40} for name in files]
            info = {"id": "owner/name", "sha": "a" * 40, "siblings": [{"rfilename": name} for name in files]}
            self._send(json.dumps(tree if "/tree/" in self.path else info).encode(), {}, with_body)
            return
        name = self.path.split("?")[0].rsplit("/", 1)[1]
        body = (self.folder / name).read_bytes()
        if with_body:
            self.sent.append(name)
        self._send(body, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": "a" * 40}, with_body)

    def _send(self, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(self.status)
        if self.refusal:
            headers = {"X-Error-Code": self.refusal}
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[_Hub]]:
    """A hub on this machine that holds `folder` as owner/name."""
    handler = type("Handler", (_Hub,), {"folder": folder, "sent": []})
    listener = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=listener.serve_forever, args=(0.01,))
    thread.start()
    _point_to(monkeypatch, f"http://127.0.0.1:{listener.server_port}")
    yield handler
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_a_base_is_fetched_from_the_hub_once_and_only_what_is_needed(
    folder: Path, server: type[_Hub], capfd: pytest.CaptureFixture[str]
) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"x")
    (folder / "own.py").write_text("raise SystemExit")
    (folder / "consolidated.safetensors").write_bytes(b"x")
    load_tokenizer(Base(model="owner/name"))
    assert "model.safetensors" not in server.sent
    base = load_on_cpu(Base(model="owner/name"))
    assert base.hash == load_on_cpu(Base(model="spoken-mini")).hash
    load_on_cpu(Base(model="owner/name"))
    described = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(server.sent) == sorted([*described, "model.safetensors"])
    assert capfd.readouterr() == ("", "")


def test_a_name_of_the_catalogue_is_fetched_by_its_hub_id(server: type[_Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    known = next(base for base in catalog.BASES if base.hub_id)
    asked: list[str] = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "model_info", lambda self, repo_id, **_: asked.append(repo_id) or pytest.fail("")
    )
    with pytest.raises((BaseError, pytest.fail.Exception)):
        load_tokenizer(Base(model=known.name))
    assert asked == [known.hub_id]


def test_pickled_weights_on_the_hub_are_refused_before_they_are_fetched(folder: Path, server: type[_Hub]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseError, match="no weights in safetensors form"):
        load_on_cpu(Base(model="owner/name"))
    assert server.sent == []


@pytest.mark.parametrize(
    ("status", "refusal", "says"),
    [
        (404, "RepoNotFound", "no such model"),
        (404, "RevisionNotFound", r"no revision 'v2' .*base\.revision"),
        (403, "GatedRepo", "accept a licence"),
        (500, "", "the hub did not answer"),
    ],
)
def test_what_the_hub_refuses_is_said(server: type[_Hub], status: int, refusal: str, says: str) -> None:
    server.status, server.refusal = status, refusal
    with pytest.raises(BaseError, match=says):
        load_tokenizer(Base(model="owner/name", revision="v2"))
