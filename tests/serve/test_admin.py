"""Runs come and go behind the admin key, by their names alone."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.keys import key_of
from serve.refusal import Refusal
from serve.store import Record, Store, Which

ADMIN = {"authorization": "Bearer admin-key-of-many-characters"}


@pytest.fixture
def folder(tmp_path: Path, facts_writer: Callable[..., Path]) -> Path:
    """A runs folder with `gentle`, which is finished, and `raw`, which is not."""
    facts_writer(tmp_path / "runs" / "gentle", "b" * 64)
    facts_writer(tmp_path / "runs" / "raw", "b" * 64, status="training")
    facts_writer(tmp_path / "outside", "b" * 64)
    return tmp_path / "runs"


@pytest.fixture
def client(engine: Any, folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    bounds = Bounds(100, admin_keys=(key_of("admin-key-of-many-characters", "root"),), folder=folder)
    with TestClient(create_app(engine, bounds, store=store), raise_server_exceptions=False) as client:
        client.headers.update(ADMIN)
        yield client
    store.close()


def test_a_run_is_loaded_answered_reloaded_and_unloaded(client: TestClient, engine: Any) -> None:
    told = client.post("/admin/load", json={"run": "gentle"}).json()
    assert told["models"] == ["base", "casual", "polite", "gentle"] and told["weights_hash"] == "a" * 64
    assert client.get("/v1/models/gentle").status_code == 200
    assert client.post("/admin/reload", json={"run": "gentle"}).status_code == 200
    assert client.post("/admin/unload", json={"run": "gentle"}).json()["models"] == ["base", "casual", "polite"]
    assert client.get("/v1/models/gentle").status_code == 404
    counted = client.get("/metrics").text
    assert 'maltu_changes_total{action="load",outcome="ok"} 1.0' in counted


@pytest.mark.parametrize(
    ("action", "run", "status", "code"),
    [
        ("load", "nobody", 404, "run_not_found"),
        ("load", "raw", 400, "run_unfit"),
        ("load", "casual", 404, "run_not_found"),
        ("unload", "nobody", 404, "model_not_found"),
        ("reload", "gentle", 404, "model_not_found"),
        ("load", "../outside", 400, "invalid_value"),
        ("load", "..", 400, "invalid_value"),
        ("load", ".", 400, "invalid_value"),
        ("load", ".store", 400, "invalid_value"),
        ("load", "/etc", 400, "invalid_value"),
        ("load", "a\\b", 400, "invalid_value"),
        ("load", "gentle\u0000", 400, "invalid_value"),
        ("load", "base", 400, "invalid_value"),
        ("load", "", 400, "invalid_value"),
        ("load", "x" * 201, 400, "invalid_value"),
    ],
)
def test_a_run_that_cannot_be_is_refused(client: TestClient, action: str, run: str, status: int, code: str) -> None:
    response = client.post(f"/admin/{action}", json={"run": run})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_what_the_engine_refuses_is_told_and_counted(client: TestClient, engine: Any) -> None:
    engine.refusal = Refusal(400, "stands on another base", "run_unfit", "run")
    response = client.post("/admin/load", json={"run": "gentle"})
    assert response.status_code == 400 and "another base" in response.json()["error"]["message"]
    assert 'maltu_changes_total{action="load",outcome="refused"} 1.0' in client.get("/metrics").text
    assert "gentle" not in engine.names


def test_a_run_that_is_there_is_not_loaded_twice(client: TestClient) -> None:
    client.post("/admin/load", json={"run": "gentle"})
    assert client.post("/admin/load", json={"run": "gentle"}).status_code == 409


def test_the_admin_deletes_what_an_owner_left(client: TestClient, tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    for owner in ("app", "other"):
        store.add(Record("thumb", owner, {}, "conversation-0001"))
    assert client.delete("/admin/feedback").status_code == 400
    assert client.delete("/admin/feedback", params={"key": "app"}).json()["feedback"] == 1
    assert client.delete("/admin/feedback", params={"conversation": "conversation-0001"}).json()["feedback"] == 1
    assert store.count(Which()) == (0, 0)
    store.close()


def test_without_an_admin_key_there_is_no_admin(engine: Any) -> None:
    with TestClient(create_app(engine, Bounds(100))) as client:
        assert client.post("/admin/load", json={"run": "gentle"}).status_code == 404
