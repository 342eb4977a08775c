"""report.html in a real browser: at a desk's and a phone's width, light and dark, and on paper."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.report_world import make_run
from tests.toolkit.test_report import evil_run, full
from toolkit.report.seen import see
from toolkit.report.several import several_page
from toolkit.report.write import report_page

playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("no Chromium is installed (apt-get install chromium)", allow_module_level=True)

pytestmark = pytest.mark.slow  # a browser has to start
DESK, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
# Of every text that is shown: its contrast with what lies behind it, as WCAG 2 counts it.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const over = (color, under) => { canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3); };
  const behind = (one) => { const all = []; for (let at = one; at; at = at.parentElement) all.unshift(at);
    return all.reduce((so_far, at) => over(getComputedStyle(at).backgroundColor, so_far), [255, 255, 255]); };
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), low = []; let n = 0;
  while (walker.nextNode()) { const one = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !one.getClientRects().length || one.closest("svg, script")) continue;
    const back = behind(one), [a, b] = [light(over(getComputedStyle(one).color, back)), light(back)]; n += 1;
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${ratio.toFixed(2)} ${one.className} ${walker.currentNode.data.slice(0, 40)}`); }
  return { n, low }; }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser: Any, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Opens a page; afterwards nothing must have gone wrong in it, and nothing been fetched."""
    opened: list[tuple[Any, list[str]]] = []

    def run(page_text: str, size: dict[str, int] = DESK, scheme: str = "light", locale: str = "ko-KR") -> Any:
        file = tmp_path / f"page{len(opened)}.html"
        file.write_text(page_text, encoding="utf-8")
        context = browser.new_context(viewport=size, color_scheme=scheme, locale=locale)
        page, wrong = context.new_page(), list[str]()
        page.on("request", lambda request: None if request.url == file.as_uri() else wrong.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(file.as_uri())
        opened.append((context, wrong))
        return page

    yield run
    for context, wrong in opened:
        context.close()
        assert wrong == []


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_report_fits_its_window_and_every_text_can_be_read(
    visit: Callable[..., Any], tmp_path: Path, size: dict[str, int], scheme: str
) -> None:
    page = visit(report_page(see(full(tmp_path / "tiny"))), size, scheme)
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
    found = page.evaluate(CONTRAST)
    assert found["n"] > 200 and found["low"] == []
    plots = page.eval_on_selector_all(".plot svg", "all => all.map((one) => one.getBoundingClientRect().width)")
    assert len(plots) >= 3 and all(width > 200 for width in plots)


@pytest.mark.parametrize(("locale", "shown", "other"), [("ko-KR", "비용", "Cost"), ("en-US", "Cost", "비용")])
def test_the_page_speaks_the_browsers_language_and_the_other_on_demand(
    visit: Callable[..., Any], tmp_path: Path, locale: str, shown: str, other: str
) -> None:
    page = visit(report_page(see(full(tmp_path / "tiny"))), locale=locale)
    heading = page.locator("#cost h2")
    assert heading.inner_text() == shown
    assert page.evaluate("document.documentElement.lang") == locale[:2]
    page.locator(".switch label", has_text="English" if locale == "ko-KR" else "한국어").click()
    assert heading.inner_text() == other


def test_nothing_that_was_written_runs(visit: Callable[..., Any], tmp_path: Path) -> None:
    run = evil_run(tmp_path / "tiny")
    for text in (report_page(see(run)), several_page([see(run), see(make_run(tmp_path / "b"))], tmp_path / "c.html")):
        page = visit(text, PHONE)
        assert page.evaluate("typeof hacked") == "undefined"
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]


def test_on_paper_everything_is_unfolded_and_the_switch_is_gone(visit: Callable[..., Any], tmp_path: Path) -> None:
    page = visit(report_page(see(full(tmp_path / "tiny"))))
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0 and not page.locator(".switch").is_visible()
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details[open]").count() == 0
    assert len(page.pdf()) > 10_000


def test_runs_side_by_side_fit_a_phone(visit: Callable[..., Any], tmp_path: Path) -> None:
    seen = [see(make_run(tmp_path / f"run-with-a-name-{at}")) for at in range(6)]
    page = visit(several_page(seen, tmp_path / "c.html"), PHONE, "dark")
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert page.evaluate(CONTRAST)["low"] == []
