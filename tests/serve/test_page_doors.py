"""Who gets in by the page: keys are the visitor's own, and Gradio's other routes stay shut."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.keys import key_of
from tests.page_world import DESK, PHONE, answered, open_browser, say, serving, status, told, until

pytestmark = pytest.mark.slow  # gradio and a browser have to start
KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


@pytest.fixture
def address(engine: Any) -> Iterator[str]:
    with serving(engine) as address:
        yield address


@pytest.fixture
def locked(engine: Any) -> Iterator[str]:
    with serving(engine, (key_of(KEY),)) as address:
        yield address


def arrive(browser: Any, address: str, size: dict[str, int] = DESK) -> Any:
    page = browser.new_context(viewport=size, locale="ko-KR").new_page()
    page.goto(address)
    page.wait_for_selector("#talk .empty")
    return page


def bring(page: Any, key: str) -> None:
    page.get_by_label("API 키").fill(key)
    page.get_by_label("API 키").press("Enter")


def test_a_locked_server_asks_the_visitor_for_a_key_and_sends_it_along(locked: str, engine: Any, browser: Any) -> None:
    page = arrive(browser, locked, PHONE)
    until(page, lambda: "API 키가 있어야" in status(page))
    say(page, "열려라")
    until(page, lambda: told(page, "user") == ["열려라"] and "API 키가 있어야" in status(page))
    assert engine.asks == []  # the server lends no key of its own
    bring(page, KEY)
    page.wait_for_function("document.querySelector('#model input').value !== ''")
    say(page, "안녕")
    answered(page)
    assert engine.asks[-1].key == key_of(KEY).digest
    page.context.close()


def test_a_key_is_kept_for_its_tab_alone(locked: str, engine: Any, browser: Any) -> None:
    page = arrive(browser, locked)
    bring(page, KEY)
    page.wait_for_function("document.querySelector('#model input').value !== ''")
    page.reload()
    page.wait_for_function("document.querySelector('#model input')?.value")
    assert page.evaluate("Object.values(localStorage).join() + document.cookie").find(KEY) == -1
    neighbour = page.context.new_page()
    neighbour.goto(locked)
    until(neighbour, lambda: "API 키가 있어야" in status(neighbour))
    page.context.close()


@pytest.mark.parametrize(("key", "says"), [("a-key-that-is-none", "API 키가 있어야"), ("키 하나", "빈칸 없이")])
def test_a_wrong_key_opens_nothing(locked: str, browser: Any, key: str, says: str) -> None:
    page = arrive(browser, locked)
    bring(page, key)
    until(page, lambda: says in status(page))
    assert page.input_value("#model input") == ""
    page.context.close()


def test_without_keys_none_is_asked_for(address: str, browser: Any) -> None:
    page = arrive(browser, address)
    assert page.get_by_label("API 키").count() == 0
    page.context.close()


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/gradio_api/upload"),
        ("GET", "/gradio_api/file=/etc/passwd"),
        ("GET", "/gradio_api/proxy=http://127.0.0.1:1/"),
        ("POST", "/gradio_api/call/answer"),
        ("POST", "/gradio_api/run/predict"),
        ("POST", "/gradio_api/vibe-edit"),
        ("GET", "/gradio_api/runs"),
        ("GET", "/gradio_api/dev/reload"),
        ("POST", "/gradio_api/component_server"),
        ("GET", "/monitoring"),
        ("POST", "/login"),
    ],
)
def test_gradios_other_routes_stay_shut(address: str, method: str, path: str) -> None:
    response = httpx.request(method, address + path)
    assert response.status_code == 404 and response.json()["error"]["code"] == "not_found"


def test_what_the_page_may_send_is_bounded(address: str) -> None:
    join = f"{address}/gradio_api/queue/join"
    assert httpx.post(join, content=b" " * (2**20 + 1)).status_code == 413
    assert httpx.post(join, content=iter([b"{}"])).status_code == 413


def test_only_the_page_and_the_command_know_gradio() -> None:
    folder = Path(__file__).parents[2] / "serve"
    found = {path for path in folder.rglob("*.py") if "import gradio" in path.read_text(encoding="utf-8")}
    assert found and all(path.parent.name == "ui" for path in found)
