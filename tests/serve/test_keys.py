"""API keys: made once, kept as hashes."""

import stat
from pathlib import Path

import pytest

from serve.keys import Key, Keys, key_of, new_key, read_keys
from toolkit.errors import InputError, Problem


def test_a_new_key_opens_and_its_file_does_not_tell_it(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    first, second = new_key("app", file), new_key("app.2", file)
    problems: list[Problem] = []
    keys = Keys(read_keys(str(file), "--api-key-file", problems))
    assert not problems and first != second
    assert [key and key.name for key in (keys.owner(f"Bearer {first}"), keys.owner(f"bearer  {second} "))] == [
        "app",
        "app.2",
    ]
    text = file.read_text(encoding="utf-8")
    assert first not in text and first.removeprefix("maltu-")[:8] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_new_key_starts_a_line_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours", encoding="utf-8")
    new_key("app", file)
    assert file.read_text(encoding="utf-8").splitlines()[0] == "# ours" and len(file.read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "한글", "x" * 64])
def test_a_name_that_would_not_read_back_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="no name of a key"):
        new_key(name, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()


def test_no_keys_have_no_owner() -> None:
    assert Keys(()).owner("Bearer x") is None and not Keys(()).are_there


@pytest.mark.parametrize(
    "header", ["", "Bearer", "Bearer ", "Basic geheim", "geheim", "Bearer geheim2", "Bearer geheim x"]
)
def test_what_is_not_the_key_opens_nothing(header: str) -> None:
    assert Keys([key_of("geheim")]).owner(header) is None


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("serve.keys.hmac.compare_digest", lambda a, b: bool(seen.append(b)) or a == b)
    keys = [key_of("하나", "one"), key_of("둘", "two"), key_of("셋", "three")]
    assert Keys(keys).owner("Bearer 하나") == Key("one", keys[0].digest)
    assert seen == [key.digest for key in keys]
