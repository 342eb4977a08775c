"""Which folder names cannot be a model's."""

import pytest

from serve.names import refuse_name


@pytest.mark.parametrize("name", ["base", "auto", "mix", "vote", "a:b", "a=b", "a,b", "a/b", "a\nb"])
def test_a_name_that_means_something_else_is_refused(name: str) -> None:
    assert "Rename" in (refuse_name(name) or "")


def test_ordinary_names_are_not_refused() -> None:
    assert refuse_name("casual_chat-2") is None and refuse_name("말투") is None
