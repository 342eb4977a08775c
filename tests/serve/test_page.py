"""The chat page in a real browser, at a desk's and a phone's width, over an engine that says what it is told."""

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from serve.keys import Key, key_of

playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (apt-get install chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow  # gradio and a browser have to start
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
KEY = "a-key-of-sixteen-characters"
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def address(engine: Any) -> Iterator[str]:
    yield from serve_page(engine, ())


@pytest.fixture
def locked(engine: Any) -> Iterator[str]:
    yield from serve_page(engine, (key_of(KEY),))


def serve_page(engine: Any, keys: tuple[Key, ...]) -> Iterator[str]:
    """API and page over the scripted engine, in a thread of their own."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import uvicorn

    from serve.api import Bounds, create_app
    from serve.ui import mount

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(engine, Bounds(1000, keys), has_page=True)
        mount(app, address, wants_key=bool(keys))
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1, ws="none")
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        while not server.started:
            time.sleep(0.02)
        yield address
        server.should_exit = True
        thread.join(timeout=20)


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the page; afterwards nothing must have gone wrong in it."""
    opened: list[tuple[Any, list[str]]] = []

    def run(address: str, size: dict[str, int] = DESK, locale: str = "ko-KR") -> Any:
        context = browser.new_context(viewport=size, locale=locale)
        page, wrong = context.new_page(), list[str]()
        page.on("request", lambda request: None if request.url.startswith(address) else wrong.append(request.url))
        page.on(
            "response",
            lambda response: wrong.append(f"{response.status} {response.url}") if response.status >= 400 else None,
        )
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_default_timeout(20_000)
        page.goto(address)
        page.wait_for_selector("#box textarea")
        page.wait_for_function("document.querySelector('#model input').value !== ''")
        opened.append((context, wrong))
        return page

    yield run
    for context, wrong in opened:
        context.close()
        assert wrong == []


def say(page: Any, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def told(page: Any, who: str) -> list[str]:
    return [element.inner_text() for element in page.query_selector_all(f"#talk [data-testid={who}]")]


def until(page: Any, holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"did not happen: {told(page, 'user')} {told(page, 'bot')} {page.inner_text('body')}")


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_talk_goes_back_and_forth(address: str, engine: Any, visit: Any, size: dict[str, int]) -> None:
    page = visit(address, size)
    say(page, "오늘 뭐 먹지?")
    until(page, lambda: told(page, "bot") == ["아무거나 먹자."])
    say(page, "왜?")
    until(page, lambda: len(told(page, "bot")) == 2)
    turns = [(turn.role, turn.content) for turn in engine.asks[-1].turns]
    assert turns == [("user", "오늘 뭐 먹지?"), ("assistant", "아무거나 먹자."), ("user", "왜?")]
    assert engine.asks[-1].model == "casual"
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    assert page.input_value("#box textarea") == ""


@pytest.mark.parametrize(
    ("locale", "words"),
    [("ko-KR", ["다시", "멈춤", "지우기", "설정"]), ("en-US", ["Again", "Stop", "Clear", "Settings"])],
)
def test_labels_follow_the_browsers_language(address: str, visit: Any, locale: str, words: list[str]) -> None:
    page = visit(address, PHONE, locale)
    for word in words:
        button(page, word).wait_for() if word not in ("설정", "Settings") else page.get_by_text(
            word, exact=True
        ).wait_for()


def test_an_answer_grows_as_it_is_made(address: str, engine: Any, visit: Any) -> None:
    engine.pieces, engine.pace = [f"말{i} " for i in range(30)], 0.1
    page = visit(address)
    say(page, "길게 말해 줘")
    until(page, lambda: "말2" in "".join(told(page, "bot")))
    assert "말29" not in "".join(told(page, "bot"))
    until(page, lambda: "말29" in "".join(told(page, "bot")))


def test_stop_keeps_what_was_said_and_cancels_the_rest(address: str, engine: Any, visit: Any) -> None:
    engine.pieces, engine.pace = [f"말{i} " for i in range(200)], 0.1
    page = visit(address)
    say(page, "길게 말해 줘")
    until(page, lambda: "말3" in "".join(told(page, "bot")))
    button(page, "멈춤").click()
    until(page, lambda: engine.replies[0].was_cancelled.is_set())
    kept = told(page, "bot")
    page.wait_for_timeout(600)
    assert told(page, "bot") == kept and "말3" in kept[0]
    engine.pieces, engine.pace = ["응"], 0.0
    say(page, "고마워")
    until(page, lambda: len(told(page, "bot")) == 2)
    assert engine.asks[-1].turns[1].content.strip() == kept[0].strip()


def test_again_asks_the_same_once_more(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "오늘 뭐 먹지?")
    until(page, lambda: len(told(page, "bot")) == 1)
    engine.pieces = ["국수!"]
    button(page, "다시").click()
    until(page, lambda: told(page, "bot") == ["국수!"])
    assert engine.asks[0].turns == engine.asks[1].turns and len(told(page, "user")) == 1


def test_clear_starts_anew(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "안녕")
    until(page, lambda: len(told(page, "bot")) == 1)
    button(page, "지우기").click()
    until(page, lambda: told(page, "user") == [] and told(page, "bot") == [])
    say(page, "다시 안녕")
    until(page, lambda: len(told(page, "bot")) == 1)
    assert len(engine.asks[-1].turns) == 1


def test_another_model_answers_with_its_own_settings(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    page.click("#model input")
    page.get_by_role("option", name="polite").click()
    page.wait_for_timeout(500)
    say(page, "안녕하세요")
    until(page, lambda: len(told(page, "bot")) == 1)
    sampling = engine.asks[-1].sampling
    assert engine.asks[-1].model == "polite"
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.8, 20)


def test_settings_are_folded_away_and_sent(address: str, engine: Any, visit: Any) -> None:
    page = visit(address, PHONE)
    number = page.get_by_role("spinbutton").nth(0)
    assert not number.is_visible()
    page.get_by_text("설정", exact=True).click()
    number.fill("1.5")
    number.press("Tab")
    page.wait_for_timeout(300)
    say(page, "안녕")
    until(page, lambda: len(told(page, "bot")) == 1)
    assert engine.asks[-1].sampling.temperature == 1.5


def test_trouble_is_told_and_the_talk_stays(address: str, engine: Any, visit: Any, refusal: Any) -> None:
    engine.refusal = refusal(429, "64 requests are waiting already.", "queue_full")
    page = visit(address)
    say(page, "안녕")
    until(page, lambda: "64 requests are waiting" in page.inner_text("#status"))
    engine.refusal = None
    button(page, "다시").click()
    until(page, lambda: told(page, "bot") == ["아무거나 먹자."] and page.inner_text("#status").strip() == "")


def test_a_talk_beyond_the_context_loses_its_oldest_part_and_says_so(
    address: str, engine: Any, visit: Any, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit = engine.submit

    async def small(ask: Any) -> Any:
        if len(ask.turns) > 3:
            raise refusal(400, "too long", "context_length_exceeded", "messages")
        return await submit(ask)

    monkeypatch.setattr(engine, "submit", small)
    page = visit(address)
    for n_answers, text in enumerate(["하나", "둘", "셋"], 1):
        say(page, text)
        until(page, lambda n=n_answers: len(told(page, "bot")) == n)
    assert [turn.content for turn in engine.asks[-1].turns if turn.role == "user"] == ["둘", "셋"]
    until(page, lambda: "앞부분을 빼고" in page.inner_text("#status"))


def test_what_is_typed_or_said_is_never_markup(address: str, engine: Any, visit: Any) -> None:
    bad = "<img src=x onerror=\"document.title='taken'\"> &amp; ~한 줄~ **굵게** $$x$$"
    engine.pieces = [bad]
    page = visit(address)
    say(page, bad)
    until(page, lambda: told(page, "bot") == [bad])
    assert engine.asks[0].turns[0].content == bad
    assert told(page, "user") == [bad] and page.title() != "taken" and page.query_selector("#talk img") is None


def test_a_syllable_is_composed_before_enter_sends(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    page.click("#box textarea")
    keyboard = page.context.new_cdp_session(page)
    for composing in ("ㅇ", "아", "안"):
        keyboard.send("Input.imeSetComposition", {"text": composing, "selectionStart": 1, "selectionEnd": 1})
    enter = {"type": "rawKeyDown", "key": "Process", "code": "Enter", "windowsVirtualKeyCode": 229}
    keyboard.send("Input.dispatchKeyEvent", enter)  # what Enter is while the input method has it
    keyboard.send("Input.insertText", {"text": "안"})
    page.wait_for_timeout(300)
    assert engine.asks == [] and page.input_value("#box textarea") == "안"
    page.press("#box textarea", "Enter")
    until(page, lambda: told(page, "user") == ["안"])


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


def test_a_locked_server_asks_the_visitor_for_a_key(locked: str, engine: Any, browser: Any) -> None:
    context = browser.new_context(viewport=DESK, locale="ko-KR")
    page = context.new_page()
    page.goto(locked)
    page.get_by_label("API 키").wait_for()
    until(page, lambda: "API key" in page.inner_text("#status"))
    page.get_by_label("API 키").fill(KEY)
    page.wait_for_function("document.querySelector('#model input').value !== ''")
    say(page, "안녕")
    until(page, lambda: told(page, "bot") == ["아무거나 먹자."])
    context.close()
