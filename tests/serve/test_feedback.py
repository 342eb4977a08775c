"""Feedback over the API: given, seen, deleted, each by whom it belongs to; and what is kept of conversations."""

from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.feedback import Fact, Recent, Said
from serve.keys import key_of
from serve.store import Store, StoreError, Which

CHAT, URL = "/v1/chat/completions", "/v1/feedback"
LUNCH = [{"role": "user", "content": "오늘 뭐 먹지?"}]
THUMB: dict[str, Any] = {"kind": "thumb", "messages": LUNCH, "answer": {"content": "김치찌개."}, "value": "up"}
TALK, OTHER = "conversation-0001", "conversation-0002"
MINE, THEIRS = ({"authorization": f"Bearer {name}-key-of-many-characters"} for name in ("my", "their"))
KEYS = (key_of("my-key-of-many-characters", "me"), key_of("their-key-of-many-characters", "them"))


@pytest.fixture
def client(engine: Any, store: Store) -> Iterator[TestClient]:
    with TestClient(create_app(engine, Bounds(100), store=store), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def locked(engine: Any, store: Store) -> Iterator[TestClient]:
    app = create_app(engine, Bounds(100, KEYS, keeps=True), store=store)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_a_thumb_knows_what_the_server_knows_of_the_answer(client: TestClient, store: Store) -> None:
    said = client.post(CHAT, json={"model": "casual", "messages": LUNCH, "seed": 3, "temperature": 0.4}).json()
    answer = {"content": said["choices"][0]["message"]["content"], "response_id": said["id"]}
    told = client.post(URL, json=THUMB | {"answer": answer, "comment": "딱 좋아"})
    assert told.status_code == 201 and told.json()["known"] is True
    stored = next(store.each())
    known = stored.payload["answers"][0]
    assert (known["model"], known["weights_hash"], known["sampling"]["seed"]) == ("casual", "a" * 64, 3)
    assert known["sampling"]["temperature"] == 0.4 and stored.payload["comment"] == "딱 좋아"


def test_a_pair_knows_both_answers(client: TestClient, store: Store) -> None:
    asked = {"model": "vote:casual,polite", "messages": LUNCH, "n": 2}
    said = client.post(CHAT, json=asked).json()
    a, b = ({"content": "음", "response_id": said["id"], "choice": place} for place in (0, 1))
    told = client.post(URL, json={"kind": "pair", "messages": LUNCH, "a": a, "b": b, "winner": "b"}).json()
    assert told["known"] and told["kind"] == "pair"
    payload = next(store.each()).payload
    assert payload["winner"] == "b" and [one["choice"] for one in payload["answers"]] == [0, 1]
    assert payload["answers"][0]["routing"] == {"kind": "vote", "weights": {"casual": 1.0, "polite": 1.0}}


def test_what_the_server_has_forgotten_is_stored_as_told(client: TestClient, store: Store) -> None:
    answer = {"content": "응.", "response_id": f"chatcmpl-{'0' * 32}", "model": "casual"}
    correction = {"kind": "correction", "messages": LUNCH, "answer": answer, "corrected": "김치찌개 어때?"}
    assert client.post(URL, json=correction).json()["known"] is False
    known = next(store.each()).payload["answers"][0]
    assert known["model"] == "casual" and known["weights_hash"] is None and known["known"] is False


def test_another_keys_answer_is_not_known(locked: TestClient) -> None:
    said = locked.post(CHAT, json={"model": "casual", "messages": LUNCH}, headers=MINE).json()
    thumb = THUMB | {"answer": {"content": "x", "response_id": said["id"]}}
    assert locked.post(URL, json=thumb, headers=THEIRS).json()["known"] is False
    assert locked.post(URL, json=thumb, headers=MINE).json()["known"] is True


def test_everybody_sees_and_deletes_their_own(locked: TestClient, store: Store) -> None:
    mine = [locked.post(URL, json=THUMB, headers=MINE).json()["id"] for _ in range(3)]
    theirs = locked.post(URL, json=THUMB, headers=THEIRS).json()["id"]
    page = locked.get(URL, params={"limit": 2}, headers=MINE).json()
    assert [one["id"] for one in page["data"]] and page["has_more"]
    rest = locked.get(URL, params={"after": page["data"][-1]["id"]}, headers=MINE).json()
    assert {one["id"] for one in [*page["data"], *rest["data"]]} == set(mine) and not rest["has_more"]
    assert locked.delete(f"{URL}/{theirs}", headers=MINE).status_code == 404
    assert locked.delete(f"{URL}/{mine[0]}", headers=MINE).json()["feedback"] == 1
    assert locked.delete(URL, params={"all": True}, headers=MINE).json()["feedback"] == 2
    assert [record.id for record in store.each()] == [theirs]


def test_a_conversation_goes_with_all_that_was_kept_of_it(locked: TestClient, store: Store) -> None:
    for conversation in (TALK, OTHER):
        asked = {"model": "casual", "messages": LUNCH, "maltu": {"conversation": conversation}}
        locked.post(CHAT, json=asked, headers=MINE)
        locked.post(CHAT, json=asked | {"stream": True}, headers=MINE)
        locked.post(URL, json=THUMB | {"conversation": conversation}, headers=MINE)
    assert store.count(Which("me", TALK)) == (1, 2)
    assert locked.delete(URL, params={"conversation": TALK}, headers=THEIRS).json()["answers"] == 0
    gone = locked.delete(URL, params={"conversation": TALK}, headers=MINE).json()
    assert (gone["feedback"], gone["answers"]) == (1, 2)
    assert store.count(Which()) == (1, 2)


def test_conversations_are_not_kept_unless_told(client: TestClient, store: Store) -> None:
    asked = {"model": "casual", "messages": LUNCH, "maltu": {"conversation": TALK}}
    assert client.post(CHAT, json=asked).json()["maltu"]["unused"] == ["maltu.conversation"]
    assert store.count(Which()) == (0, 0)


def test_strangers_name_the_conversation(engine: Any, store: Store) -> None:
    with TestClient(create_app(engine, Bounds(100, is_shared=True), store=store)) as client:
        client.post(URL, json=THUMB | {"conversation": TALK})
        client.post(URL, json=THUMB)
        assert client.get(URL).status_code == 403
        assert client.delete(URL, params={"all": True}).status_code == 403
        assert len(client.get(URL, params={"conversation": TALK}).json()["data"]) == 1


def test_without_a_store_feedback_is_off(engine: Any) -> None:
    with TestClient(create_app(engine, Bounds(100))) as client:
        for response in (client.post(URL, json=THUMB), client.get(URL), client.delete(URL, params={"all": True})):
            assert (response.status_code, response.json()["error"]["code"]) == (404, "feedback_off")


def test_a_store_that_fails_acknowledges_nothing(engine: Any, store: Store, monkeypatch: Any) -> None:
    def fail(*_: Any) -> None:
        raise StoreError("postgresql://secret@host: disk full")

    for name in ("add", "keep"):
        monkeypatch.setattr(store, name, fail)
    with TestClient(create_app(engine, Bounds(100, keeps=True), store=store)) as client:
        asked = {"model": "casual", "messages": LUNCH}
        for response in (client.post(URL, json=THUMB), client.post(CHAT, json=asked)):
            assert response.status_code == 503 and response.headers["retry-after"]
            assert response.json()["error"]["code"] == "store_unavailable" and "secret" not in response.text
        streamed = client.post(CHAT, json=asked | {"stream": True}).text
        assert "store_unavailable" in streamed and "[DONE]" not in streamed


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"messages": []}, "messages"),
        ({"value": "sideways"}, "value"),
        ({"answer": {"content": "x", "response_id": "../etc"}}, "answer.response_id"),
        ({"answer": {"content": "x", "choice": 16}}, "answer.choice"),
        ({"conversation": "short"}, "conversation"),
        ({"winner": "a"}, "winner"),
    ],
)
def test_feedback_that_does_not_read_is_named(client: TestClient, wrong: dict[str, Any], param: str) -> None:
    response = client.post(URL, json=THUMB | wrong)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_the_oldest_answers_are_forgotten() -> None:
    recent = Recent(n_most=2)
    ids = [f"chatcmpl-{n:032x}" for n in range(3)]
    recent.add([Fact(id, 0, "", "casual", "hash", None, {}) for id in ids])
    found = [recent.find(Said.model_validate({"content": "", "response_id": id}), "") for id in ids]
    assert [fact and fact.response_id for fact in found] == [None, *ids[1:]]
