"""Thumbs, corrections and the feedback tab in a real browser: a visitor sees, takes along and deletes their own."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.keys import key_of
from serve.store import Store, Which
from tests.page_world import (
    PHONE,
    answered,
    button,
    open_browser,
    reload,
    say,
    serving,
    status,
    tab,
    until,
    visiting,
)

pytestmark = pytest.mark.slow  # gradio and a browser have to start
KEYS = {"mine": "a-key-of-sixteen-characters", "other": "another-key-of-sixteen"}
EVERYTHING = Which(None, None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


@pytest.fixture
def address(engine: Any, store: Store) -> Iterator[str]:
    with serving(engine, store=store, is_shared=True) as address:
        yield address


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    with visiting(browser) as visit:
        yield visit


def judged(visit: Any, address: str, text: str = "오늘 뭐 먹지?", size: Any = PHONE) -> Any:
    """A page with one answer, and a thumb up for it."""
    page = visit(address, size)
    say(page, text)
    answered(page)
    button(page, "좋은 답").click()
    until(page, lambda: "저장했어요" in status(page))
    return page


def cards(page: Any) -> list[str]:
    return [card.inner_text() for card in page.query_selector_all("#stored .card")]


def test_a_thumb_is_stored_with_what_the_server_knows(address: str, visit: Any, store: Store) -> None:
    page = judged(visit, address)
    assert button(page, "좋은 답").get_attribute("aria-pressed") == "true"
    (record,) = store.feedback(EVERYTHING, 10)
    (answer,) = record.payload["answers"]
    assert (record.kind, record.payload["value"], answer["content"]) == ("thumb", "up", "아무거나 먹자.")
    assert (answer["model"], answer["known"], answer["weights_hash"]) == ("casual", True, "a" * 64)


def test_a_second_thumb_takes_the_firsts_place(address: str, visit: Any, store: Store) -> None:
    page = judged(visit, address)
    button(page, "아쉬운 답").click()
    until(page, lambda: button(page, "아쉬운 답").get_attribute("aria-pressed") == "true")
    assert [record.payload["value"] for record in store.feedback(EVERYTHING, 10)] == ["down"]
    assert button(page, "좋은 답").get_attribute("aria-pressed") == "false"


def test_each_answer_of_a_talk_can_be_corrected(address: str, visit: Any, store: Store) -> None:
    page = visit(address, locale="en-US")
    for n_answers, text in enumerate(["하나", "둘"], 1):
        say(page, text)
        answered(page, n_answers)
    button(page, "Correct").first.click()
    page.get_by_label("What should have been said").fill("하나라니요? <i>")
    button(page, "Save").click()
    until(page, lambda: page.query_selector("#talk .corrected") is not None)
    (record,) = store.feedback(EVERYTHING, 10)
    assert record.payload["corrected"] == "하나라니요? <i>"
    assert record.payload["messages"] == [{"role": "user", "content": "하나"}]


def test_the_tab_shows_what_was_stored_and_takes_it_along(address: str, visit: Any, engine: Any) -> None:
    engine.pieces = ["<img src=x onerror=alert(1)> =1+1"]
    page = judged(visit, address)
    tab(page, "의견")
    until(page, lambda: len(cards(page)) == 1)
    for part in ("평가", "좋은 답", "오늘 뭐 먹지?", "casual", "<img src=x"):
        assert part in cards(page)[0]
    with page.expect_download() as saving:
        button(page, "내보내기").click()
    assert saving.value.suggested_filename == "maltu-feedback.jsonl"
    (line,) = Path(saving.value.path()).read_text(encoding="utf-8").splitlines()
    assert (json.loads(line)["kind"], json.loads(line)["value"]) == ("thumb", "up")


def test_one_piece_is_deleted_and_then_all(address: str, visit: Any, store: Store) -> None:
    page = judged(visit, address)
    button(page, "바로잡기").click()
    page.locator("#talk textarea").fill("국수")
    button(page, "저장").click()
    until(page, lambda: len(store.feedback(EVERYTHING, 10)) == 2)
    tab(page, "의견")
    until(page, lambda: len(cards(page)) == 2)
    page.locator("#stored .card").first.get_by_role("button", name="지우기").click()
    until(page, lambda: len(cards(page)) == 1)
    assert [record.kind for record in store.feedback(EVERYTHING, 10)] == ["thumb"]
    button(page, "모두 지우기").click()
    page.wait_for_timeout(300)
    assert len(store.feedback(EVERYTHING, 10)) == 1  # it asks first
    button(page, "정말 모두 지울까요?").click()
    until(page, lambda: "아직 저장된 의견이 없어요" in page.inner_text("#stored"))
    assert store.feedback(EVERYTHING, 10) == [] and "지웠어요" in status(page, "#feedback-status")


def test_without_keys_a_visitor_has_what_came_from_their_own_tab(address: str, visit: Any, store: Store) -> None:
    judged(visit, address, "남의 말")
    page = judged(visit, address, "내 말")
    tab(page, "의견")
    until(page, lambda: len(cards(page)) == 1)
    assert "내 말" in cards(page)[0]
    reload(page)
    tab(page, "의견")
    until(page, lambda: len(cards(page)) == 1)
    button(page, "모두 지우기").click()
    button(page, "정말 모두 지울까요?").click()
    until(page, lambda: cards(page) == [])
    assert [record.payload["messages"][0]["content"] for record in store.feedback(EVERYTHING, 10)] == ["남의 말"]


def test_with_keys_a_visitor_has_what_came_with_theirs(engine: Any, visit: Any, store: Store) -> None:
    keys = tuple(key_of(secret, name) for name, secret in KEYS.items())
    with serving(engine, keys, store) as address:
        pages = {}
        for name, secret in KEYS.items():
            page = pages[name] = visit(address, waits=False)
            page.fill("#key input", secret)
            page.press("#key input", "Enter")
            page.wait_for_function("document.querySelector('#model input').value !== ''")
            say(page, f"{name}의 말")
            answered(page)
            button(page, "좋은 답").click()
            until(page, lambda page=page: "저장했어요" in status(page))
        tab(pages["mine"], "의견")
        until(pages["mine"], lambda: len(cards(pages["mine"])) == 1)
        assert "mine의 말" in cards(pages["mine"])[0]
        button(pages["mine"], "모두 지우기").click()
        button(pages["mine"], "정말 모두 지울까요?").click()
        until(pages["mine"], lambda: cards(pages["mine"]) == [])
        assert [record.owner for record in store.feedback(EVERYTHING, 10)] == ["other"]


def test_a_server_without_a_store_says_so_and_offers_no_thumbs(engine: Any, browser: Any) -> None:
    with serving(engine) as address:
        page = browser.new_context(locale="ko-KR").new_page()
        page.goto(address)
        page.wait_for_function("document.querySelector('#model input')?.value")
        say(page, "안녕")
        answered(page)
        assert button(page, "좋은 답").count() == 0 and button(page, "고치기").count() == 1
        tab(page, "의견")
        until(page, lambda: "의견을 받지 않아요" in page.inner_text("#stored"))
        page.context.close()
