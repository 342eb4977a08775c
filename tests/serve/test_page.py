"""The chat in a real browser, at a desk's and a phone's width, over an engine that says what it is told."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve.engines.contract import Auto, Mix
from serve.store import Store
from tests.page_world import (
    DESK,
    PHONE,
    answered,
    button,
    choose,
    open_browser,
    reload,
    say,
    serving,
    status,
    tab,
    tab_to,
    told,
    until,
    visiting,
)  # fmt: skip

pytestmark = pytest.mark.slow  # gradio and a browser have to start


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


@pytest.fixture
def address(engine: Any, tmp_path: Path) -> Iterator[str]:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    with serving(engine, store=store) as address:
        yield address
    store.close()


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    with visiting(browser) as visit:
        yield visit


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_a_talk_goes_back_and_forth(address: str, engine: Any, visit: Any, size: dict[str, int]) -> None:
    page = visit(address, size)
    say(page, "오늘 뭐 먹지?")
    answered(page)
    assert told(page, "bot") == ["아무거나 먹자."]
    say(page, "왜?")
    answered(page, 2)
    turns = [(turn.role, turn.content) for turn in engine.asks[-1].turns]
    assert turns == [("user", "오늘 뭐 먹지?"), ("assistant", "아무거나 먹자."), ("user", "왜?")]
    assert engine.asks[-1].model == "casual"
    assert page.input_value("#box textarea") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
def test_nothing_sticks_out_and_every_word_can_be_read(
    address: str, engine: Any, visit: Any, size: dict[str, int], scheme: str
) -> None:
    engine.pieces = ["아주 ", "긴" * 400]
    page = visit(address, size, scheme=scheme)
    choose(page, "mix")
    say(page, "오늘 뭐 먹지?")
    answered(page)
    for name in ("대화", "겨루기", "의견"):
        tab(page, name)
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        assert page.evaluate(FAINT) == []


# Texts whose contrast with what lies behind them is under 4.5 : 1 (WCAG 2.2, 1.4.3), but for buttons that are off.
FAINT = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1); return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = (color) => { const [r, g, b] = color.map((c) => { const v = c / 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (node) => { for (let at = node; at; at = at.parentElement) { const color = rgba(getComputedStyle(at).backgroundColor); if (color[3] > 250) return color; } return [255, 255, 255, 255]; };
  const faint = [];
  for (const node of document.querySelectorAll("main *")) {
    const says = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
    if (!says || !node.checkVisibility({ visibilityProperty: true }) || node.closest(":disabled") || !node.getClientRects().length) continue;
    const [one, other] = [light(rgba(getComputedStyle(node).color)), light(behind(node))].sort((a, b) => b - a);
    if ((one + 0.05) / (other + 0.05) < 4.5) faint.push(node.textContent.slice(0, 40));
  }
  return faint;
}"""  # noqa: E501


@pytest.mark.parametrize(
    ("locale", "words"),
    [
        ("ko-KR", ["대화", "겨루기", "의견", "다시", "멈춤", "지우기", "모델", "설정", "보내기"]),
        ("en-US", ["Chat", "Arena", "Feedback", "Again", "Stop", "Clear", "Model", "Settings", "Send"]),
    ],
)
def test_labels_follow_the_browsers_language(address: str, visit: Any, locale: str, words: list[str]) -> None:
    page = visit(address, PHONE, locale)
    for word in words:
        page.get_by_text(word, exact=True).locator("visible=true").first.wait_for()


def test_a_switch_changes_every_word_and_the_talk_stays(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "안녕")
    answered(page)
    button(page, "English").click()
    for word in ("Again", "Stop", "Clear", "Edit", "Correct", "Send"):
        button(page, word).wait_for()
    assert page.get_attribute("html", "lang") == "en" and told(page, "user") == ["안녕"]
    page.get_by_text("Settings", exact=True).click()
    page.get_by_text("Repetition penalty", exact=True).wait_for()
    tab(page, "Arena")
    button(page, "Both bad").wait_for()
    tab(page, "Feedback")
    page.get_by_text("Nothing is stored of you here", exact=False).wait_for()
    said = page.locator("main").inner_text().replace("말투", "").replace("한국어", "")
    assert not [letter for letter in said if "가" <= letter <= "힣"]
    reload(page)
    button(page, "Edit").wait_for()
    assert told(page, "user") == ["안녕"] and page.get_attribute("html", "lang") == "en"


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
    answered(page, 2)
    assert engine.asks[-1].turns[1].content.strip() == kept[0].strip()


def test_again_asks_the_same_once_more(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "오늘 뭐 먹지?")
    answered(page)
    engine.pieces = ["국수!"]
    button(page, "다시").click()
    until(page, lambda: told(page, "bot") == ["국수!"])
    assert engine.asks[0].turns == engine.asks[1].turns and len(told(page, "user")) == 1


def test_an_earlier_turn_is_edited_and_answered_anew(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    for n_answers, text in enumerate(["하나", "둘"], 1):
        say(page, text)
        answered(page, n_answers)
    button(page, "고치기").first.click()
    page.get_by_label("내가 한 말").fill("셋 <b>")
    page.locator("#talk").get_by_role("button", name="보내기").click()
    until(page, lambda: told(page, "user") == ["셋 <b>"])
    answered(page)
    assert [turn.content for turn in engine.asks[-1].turns] == ["셋 <b>"]


def test_an_edit_is_left_with_escape(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "하나")
    answered(page)
    button(page, "고치기").click()
    page.get_by_label("내가 한 말").press("Escape")
    assert page.query_selector("#talk textarea") is None and len(engine.asks) == 1
    assert page.evaluate("document.activeElement.textContent") == "고치기"


def test_an_open_correction_outlives_a_thumb(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "하나")
    answered(page)
    page.evaluate("""() => {
      const [thumb, correct] = ["좋은 답", "바로잡기"].map((name) =>
        [...document.querySelectorAll("#talk .act")].find((act) => act.title === name || act.textContent === name));
      thumb.click();
      correct.click();
    }""")
    page.keyboard.type(" 둘")
    until(page, lambda: page.locator("#talk [aria-pressed=true]").count() == 1)
    page.keyboard.type(" 셋")
    assert page.get_by_label("이렇게 말했어야 해요").input_value() == "아무거나 먹자. 둘 셋"
    page.keyboard.press("Control+Enter")
    until(page, lambda: page.locator("#talk .corrected").count() == 1)


def test_clear_starts_anew(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    say(page, "안녕")
    answered(page)
    button(page, "지우기").click()
    until(page, lambda: told(page, "user") == [] and told(page, "bot") == [])
    say(page, "다시 안녕")
    answered(page)
    assert len(engine.asks[-1].turns) == 1


def test_another_model_answers_with_its_own_settings(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    choose(page, "polite")
    say(page, "안녕하세요")
    answered(page)
    sampling = engine.asks[-1].sampling
    assert engine.asks[-1].model == "polite" and page.inner_text("#talk .bot .who") == "polite"
    assert (sampling.temperature, sampling.top_p, sampling.max_tokens) == (0.5, 0.8, 20)


def test_sliders_make_a_mixture_and_the_answer_says_who(address: str, engine: Any, visit: Any) -> None:
    page = visit(address, PHONE)
    assert page.query_selector("#weights input") is None
    choose(page, "mix")
    page.get_by_label("casual").fill("0.25")
    page.get_by_label("polite").fill("0.75")
    assert [one.text_content() for one in page.query_selector_all("#weights output")] == ["25 %", "75 %", "0 %"]
    say(page, "안녕")
    answered(page)
    assert engine.asks[-1].who == Mix((("casual", 0.25), ("polite", 0.75)))
    assert page.inner_text("#talk .bot .who") == "polite 75 % · casual 25 %"
    for name in ("casual", "polite"):
        page.get_by_label(name, exact=True).fill("0")
    say(page, "누구?")
    until(page, lambda: "비율을 주세요" in status(page))
    assert len(engine.asks) == 1


def test_the_last_answer_stays_in_sight_when_the_sliders_take_room(address: str, engine: Any, visit: Any) -> None:
    engine.pieces = ["아주 긴 말. "] * 60
    page = visit(address)
    for n_answers in (1, 2):
        say(page, "길게 말해 줘")
        answered(page, n_answers)
    choose(page, "mix")
    page.wait_for_selector("#weights input")
    until(page, lambda: page.evaluate(
        "(() => { const at = document.querySelector('#talk .turns'); "
        "return at.scrollHeight > 2 * at.clientHeight && at.scrollHeight - at.scrollTop - at.clientHeight < 5; })()"
    ))  # fmt: skip


def test_a_router_picks_where_there_is_one(
    address: str, engine: Any, visit: Any, refusal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = visit(address)
    choose(page, "auto")
    say(page, "안녕")
    answered(page)
    assert engine.asks[-1].who == Auto() and page.inner_text("#talk .bot .who") == "polite"
    plain = engine.served

    def without(who: Any) -> Any:
        if isinstance(who, Auto):
            raise refusal(400, "Nothing here chooses.", "invalid_value", "model")
        return plain(who)

    monkeypatch.setattr(engine, "served", without)
    page = visit(address)
    page.click("#model input")
    options = [option.get_attribute("aria-label") for option in page.get_by_role("option").all()]
    assert options == ["casual", "polite", "base", "mix"]


def test_settings_are_folded_away_and_sent(address: str, engine: Any, visit: Any) -> None:
    page = visit(address, PHONE)
    fields = page.get_by_role("spinbutton")
    assert not fields.first.is_visible()
    page.get_by_text("설정", exact=True).click()
    until(page, lambda: fields.first.input_value() == "0.5")  # the model's own values have come
    page.wait_for_timeout(300)
    for place, value in enumerate(["1.5", "0.6", "7", "0.1", "1.2", "33"]):
        fields.nth(place).fill(value)
        fields.nth(place).press("Tab")
    page.get_by_label("시드").fill("11")
    page.get_by_label("시드").press("Tab")
    page.wait_for_timeout(300)
    say(page, "안녕")
    answered(page)
    used = engine.asks[-1].sampling
    assert (used.temperature, used.top_p, used.top_k, used.min_p) == (1.5, 0.6, 7, 0.1)
    assert (used.repetition_penalty, used.max_tokens, used.seed) == (1.2, 33, 11)


def test_a_seed_that_nobody_wrote_is_none(address: str, engine: Any, visit: Any) -> None:
    page = visit(address, PHONE)
    page.get_by_text("설정", exact=True).click()
    field = page.get_by_label("시드")
    field.wait_for()
    page.wait_for_timeout(500)
    assert field.input_value() == ""
    say(page, "안녕")
    answered(page)
    field.fill("7")
    field.press("Tab")
    page.wait_for_timeout(300)
    field.fill("")
    field.press("Tab")
    page.wait_for_timeout(300)
    say(page, "안녕")
    answered(page, 2)
    drawn = {ask.sampling.seed for ask in engine.asks}
    assert len(drawn) == 2 and not drawn & {0, 7}  # the API draws one for whoever names none
    field.fill("일곱")
    field.press("Tab")
    page.wait_for_timeout(300)
    say(page, "안녕")
    until(page, lambda: "정수" in status(page))
    assert len(engine.asks) == 2


def test_trouble_is_told_and_the_talk_stays(address: str, engine: Any, visit: Any, refusal: Any) -> None:
    engine.refusal = refusal(429, "64 requests <b>are</b> waiting already.", "a_code_without_words")
    page = visit(address)
    say(page, "안녕")
    until(page, lambda: "64 requests <b>are</b> waiting" in status(page))
    engine.refusal = None
    button(page, "다시").click()
    until(page, lambda: told(page, "bot") == ["아무거나 먹자."] and status(page) == "")


def test_an_answer_that_breaks_off_is_kept_and_said_to_be_broken(address: str, engine: Any, visit: Any) -> None:
    engine.pieces = ["아무", RuntimeError("lost")]
    page = visit(address)
    say(page, "안녕")
    until(page, lambda: "⚠" in status(page))
    assert told(page, "bot") == ["아무"] and page.query_selector("#talk .part.busy") is None


def test_a_talk_beyond_the_context_loses_its_oldest_part_and_says_so(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    for n_answers, text in enumerate(["하나", "둘"], 1):
        say(page, text)
        answered(page, n_answers)
    engine.longest = 5
    say(page, "셋")
    answered(page, 3)
    assert [turn.content for turn in engine.asks[-1].turns] == ["셋"]
    until(page, lambda: "앞부분을 빼고" in status(page))


def test_what_is_typed_or_said_is_never_markup(address: str, engine: Any, visit: Any) -> None:
    bad = "<img src=x onerror=\"document.title='taken'\"> &amp; ~한 줄~ **굵게** $$x$$ ${1} {{value}}"
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


def test_all_of_it_works_by_keyboard_alone(address: str, engine: Any, visit: Any) -> None:
    page = visit(address)
    keys = page.keyboard
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "at.closest('#model')")
    for key in ("ArrowDown", "Enter"):
        keys.press(key)
    page.wait_for_timeout(500)
    tab_to(page, "at.closest('#box') && at.tagName === 'TEXTAREA'")
    keys.type("안녕")
    keys.press("Enter")
    answered(page)
    assert engine.asks[-1].model == "polite"
    keys.press("Shift+Tab")
    assert page.evaluate("document.activeElement.textContent") in ("복사", "바로잡기")
    page.focus("#language")
    tab_to(page, "at.title === '좋은 답'")
    keys.press("Enter")
    until(page, lambda: "저장했어요" in status(page))
    assert page.evaluate("document.activeElement.title") == "좋은 답"
    tab_to(page, "at.textContent === '바로잡기'")
    keys.press("Enter")
    keys.press("Control+a")
    keys.type("국수 먹자")
    keys.press("Control+Enter")
    until(page, lambda: "국수 먹자" in page.inner_text("#talk .corrected"))
    page.focus("#language")
    tab_to(page, "at.getAttribute('role') === 'tab' && at.textContent.trim() === '겨루기'")
    keys.press("Enter")
    page.locator("#arena-box textarea").wait_for(state="visible")
