"""What `model` may say, and which folder names cannot be one."""

import pytest

from serve.names import find, refuse_name
from serve.refusal import Refusal

NAMES = ("base", "casual", "말투")


@pytest.mark.parametrize("word", NAMES)
def test_a_served_name_is_itself(word: str) -> None:
    assert find(word, NAMES) == word


@pytest.mark.parametrize("word", ["auto", "mix:casual=0.7,말투=0.3", "vote:casual,말투", "casual/brief"])
def test_names_of_later_versions_are_answered(word: str) -> None:
    with pytest.raises(Refusal, match="not in this version") as raised:
        find(word, NAMES)
    assert (raised.value.status, raised.value.param, raised.value.code) == (400, "model", "unsupported_parameter")


@pytest.mark.parametrize("word", ["gpt-4o", "../casual", "other/brief", "Casual", "casual ", "x" * 200])
def test_an_unknown_name_is_answered_with_those_there_are(word: str) -> None:
    with pytest.raises(Refusal, match="base, casual, 말투") as raised:
        find(word, NAMES)
    assert (raised.value.status, raised.value.param, raised.value.code) == (404, "model", "model_not_found")
    assert len(raised.value.message) < 250


@pytest.mark.parametrize("name", ["base", "auto", "a:b", "a=b", "a,b", "a\nb"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    assert "Rename" in (refuse_name(name) or "")


def test_ordinary_names_are_not_refused() -> None:
    assert refuse_name("casual_chat-2") is None and refuse_name("말투") is None
