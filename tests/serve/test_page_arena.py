"""The arena in a real browser: two models, unseen until the vote."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from serve.engines.contract import One
from serve.store import Store, Which
from tests.page_world import DESK, PHONE, button, open_browser, serving, status, tab, told, until, visiting

pytestmark = pytest.mark.slow  # gradio and a browser have to start
VOTES = {
    "ko-KR": {"왼쪽이 나아요": "a", "오른쪽이 나아요": "b", "비겼어요": "tie", "둘 다 별로": "both_bad"},
    "en-US": {"Left is better": "a", "Right is better": "b", "Tie": "tie", "Both bad": "both_bad"},
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    yield from open_browser()


@pytest.fixture
def address(engine: Any, store: Store) -> Iterator[str]:
    with serving(engine, store=store) as address:
        yield address


@pytest.fixture
def visit(browser: Any) -> Iterator[Callable[..., Any]]:
    with visiting(browser) as visit:
        yield visit


def fight(page: Any, prompt: str, name: str = "겨루기") -> None:
    tab(page, name)
    page.fill("#arena-box textarea", prompt)
    page.press("#arena-box textarea", "Enter")


def both(page: Any) -> list[str]:
    return [*told(page, "bot", "#left"), *told(page, "bot", "#right")]


def names(page: Any) -> list[str]:
    return [page.inner_text(f"#{side} .bot .who") for side in ("left", "right")]


def is_open(page: Any, name: str = "비겼어요") -> bool:
    return bool(button(page, name).is_enabled())


def test_both_are_asked_at_once_so_that_they_share_a_batch(address: str, engine: Any, visit: Any) -> None:
    engine.pieces, engine.pace = [f"말{i} " for i in range(30)], 0.1
    page = visit(address)
    fight(page, "오늘 뭐 먹지?")
    until(page, lambda: len(both(page)) == 2)
    assert len(engine.asks) == 2 and all(reply.n_given < 30 for reply in engine.replies)
    assert {ask.model for ask in engine.asks} == {"casual", "polite"} and not is_open(page)
    assert [[turn.content for turn in ask.turns] for ask in engine.asks] == [["오늘 뭐 먹지?"]] * 2
    assert [ask.sampling.temperature for ask in engine.asks] == [0.5, 0.5]  # each one's own
    until(page, lambda: is_open(page))
    assert both(page) == ["".join(engine.pieces)] * 2


@pytest.mark.parametrize(
    ("locale", "size", "name"),
    [(locale, size, name) for locale, size in (("ko-KR", PHONE), ("en-US", DESK)) for name in VOTES[locale]],
)
def test_a_vote_names_the_models_and_is_stored_as_a_pair(
    address: str, engine: Any, visit: Any, store: Store, locale: str, size: dict[str, int], name: str
) -> None:
    page = visit(address, size, locale)
    fight(page, "오늘 뭐 먹지?", "겨루기" if locale == "ko-KR" else "Arena")
    until(page, lambda: is_open(page, name))
    assert page.query_selector("#sides .bot .who").text_content() == ""
    button(page, name).click()
    until(page, lambda: status(page, "#arena-status") != "" and all(names(page)))
    left, right = names(page)
    assert {left, right} == {"casual", "polite"} and not is_open(page, name)
    (record,) = store.feedback(Which("", None), 10)
    assert record.kind == "pair" and record.payload["winner"] == VOTES[locale][name]
    assert [answer["model"] for answer in record.payload["answers"]] == [left, right]
    assert [answer["known"] for answer in record.payload["answers"]] == [True, True]
    assert record.payload["messages"] == [{"role": "user", "content": "오늘 뭐 먹지?"}]


def test_a_run_that_chose_an_expert_is_told_with_it(
    address: str, engine: Any, visit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = engine.served
    engine.names = ["duo", "duo/polite"]
    monkeypatch.setattr(engine, "served", lambda who: plain(One("duo/polite")))
    page = visit(address)
    fight(page, "안녕")
    until(page, lambda: is_open(page))
    button(page, "비겼어요").click()
    until(page, lambda: all(names(page)))
    assert sorted(names(page)) == ["duo → duo/polite", "duo/polite"]


def test_the_browser_is_not_told_who_is_who_before_the_vote(engine: Any, visit: Any, store: Store) -> None:
    sent: list[bytes] = []
    with serving(engine, store=store, sent=sent) as address:
        page = visit(address)
        page.wait_for_timeout(500)
        sent.clear()
        fight(page, "안녕")
        until(page, lambda: is_open(page))
        said = b"".join(sent).decode()
        assert "아무거나" in said and not [word for word in ("casual", "polite", "chatcmpl-") if word in said]


def test_sides_are_drawn_anew_each_round(address: str, engine: Any, visit: Any) -> None:
    page, lefts = visit(address), set[str]()
    for _ in range(20):
        fight(page, "안녕")
        until(page, lambda: is_open(page))
        button(page, "비겼어요").click()
        until(page, lambda: not is_open(page) and status(page, "#arena-status") != "")
        until(page, lambda: all(names(page)))
        lefts.add(names(page)[0])
        if len(lefts) == 2:
            return
    raise AssertionError("the left side was the same model twenty times")


def test_trouble_of_one_side_ends_the_round_and_gives_the_prompt_back(
    address: str, engine: Any, visit: Any, refusal: Any
) -> None:
    engine.refusal = refusal(429, "64 requests are waiting already.", "a_code_without_words")
    page = visit(address)
    fight(page, "안녕")
    until(page, lambda: "64 requests" in status(page, "#arena-status"))
    assert page.input_value("#arena-box textarea") == "안녕" and not is_open(page)


def test_silence_can_be_voted_on(address: str, engine: Any, visit: Any, store: Store) -> None:
    engine.pieces = []
    page = visit(address)
    fight(page, "안녕")
    until(page, lambda: is_open(page))
    assert both(page) == ["(아무 말도 안 함)"] * 2


def test_one_model_alone_makes_no_arena(address: str, engine: Any, visit: Any) -> None:
    engine.names = ["casual"]
    page = visit(address)
    fight(page, "안녕")
    until(page, lambda: "모델이 둘은" in status(page, "#arena-status"))
    assert engine.asks == []
