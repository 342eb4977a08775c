"""The chat page for tests: served over a scripted engine, and opened in a real browser."""

import asyncio
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serve.keys import Key
from serve.store import Store

playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (apt-get install chromium)", allow_module_level=True)

DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def open_browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@contextmanager
def serving(
    engine: Any,
    keys: tuple[Key, ...] = (),
    store: Store | None = None,
    is_shared: bool = False,
    sent: list[bytes] | None = None,
) -> Any:
    """API and page over an engine, in a thread of their own; gives the address. sent: all that the page is told."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import uvicorn

    from serve.api import Bounds, create_app
    from serve.ui.page import mount

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = create_app(engine, Bounds(1000, keys, is_shared=is_shared), has_page=True, store=store)
        mount(app, address, wants_key=bool(keys))

        async def noting(scope: Any, receive: Any, send: Any) -> None:
            async def note(event: Any) -> None:
                if sent is not None and "queue/data" in scope.get("path", ""):
                    sent.append(event.get("body", b""))
                await send(event)

            await app(scope, receive, note)

        server = uvicorn.Server(
            uvicorn.Config(noting, log_config=None, lifespan="on", timeout_graceful_shutdown=1, ws="none")
        )
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        while not server.started:
            time.sleep(0.02)
        try:
            yield address
        finally:
            server.should_exit = True
            thread.join(timeout=20)


@contextmanager
def visiting(browser: Any) -> Any:
    """Opens pages; afterwards nothing must have gone wrong in them."""
    opened: list[tuple[Any, list[str]]] = []

    def visit(
        address: str, size: dict[str, int] = DESK, locale: str = "ko-KR", scheme: str = "light", waits: bool = True
    ) -> Any:
        context = browser.new_context(viewport=size, locale=locale, color_scheme=scheme)
        page, wrong = context.new_page(), list[str]()
        allowed = (address, f"blob:{address}")
        page.on("request", lambda one: None if one.url.startswith(allowed) else wrong.append(one.url))
        page.on("response", lambda one: wrong.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
        page.set_default_timeout(20_000)
        page.goto(address)
        page.wait_for_selector("#box textarea")
        page.wait_for_selector("#talk .empty")
        if waits:
            page.wait_for_function("document.querySelector('#model input').value !== ''")
        opened.append((context, wrong))
        page.wrong = wrong
        return page

    yield visit
    for context, wrong in opened:
        context.close()
        assert not wrong, wrong


def reload(page: Any) -> None:
    """Load the page again, which keeps its talk. Gradio tells of streams that the leaving page cuts off."""
    page.reload()
    page.wait_for_selector("#talk .bot")
    news = ("AbortError: ", "Unexpected error Connection errored out.")
    page.wrong[:] = [line for line in page.wrong if not line.startswith(news)]


def say(page: Any, text: str) -> None:
    page.fill("#box textarea", text)
    page.press("#box textarea", "Enter")


def told(page: Any, who: str, where: str = "#talk") -> list[str]:
    return [element.text_content() for element in page.query_selector_all(f"{where} [data-testid={who}]")]


def status(page: Any, where: str = "#status") -> str:
    return str(page.text_content(where)).strip()


def until(page: Any, holds: Callable[[], bool]) -> None:
    for _ in range(200):
        if holds():
            return
        page.wait_for_timeout(100)
    raise AssertionError(f"did not happen: {page.inner_text('body')}")


def answered(page: Any, n_answers: int = 1) -> None:
    """Wait until the talk has so many answers, and none of them is on its way."""
    until(page, lambda: len(told(page, "bot")) == n_answers and page.query_selector("#talk .part.busy") is None)


def button(page: Any, name: str) -> Any:
    return page.get_by_role("button", name=name, exact=True)


def tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()


def choose(page: Any, model: str) -> None:
    page.click("#model input")
    page.get_by_role("option", name=model, exact=True).click()
    page.wait_for_timeout(500)


def tab_to(page: Any, is_there: str) -> None:
    """Press Tab until the focused element satisfies an expression of `at`."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate(f"(() => {{ const at = document.activeElement; return Boolean({is_there}); }})()"):
            return
    raise AssertionError(f"no Tab leads to {is_there}")
