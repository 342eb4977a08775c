"""Files that are no recipe, and YAML that means harm: each is one clear RecipeError."""

import os
from pathlib import Path

import pytest

from toolkit.errors import RecipeError
from toolkit.recipe.read import read_recipe

GOOD = "name: mine\nbase: {model: spoken-mini}\ndata: {train: ['maltu:probes.jsonl']}\n"


def refused(content: str | bytes, tmp_path: Path) -> str:
    file = tmp_path / "r.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(RecipeError) as caught:
        read_recipe(file)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value)


def accepted(content: bytes, tmp_path: Path) -> str:
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    return read_recipe(file).name


def bomb() -> str:
    levels = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    names = "abcdefghi"
    levels += [f"{names[n]}: &{names[n]} [{', '.join(['*' + names[n - 1]] * 9)}]" for n in range(1, 9)]
    return "\n".join(levels)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- name: mine\n", "line 1  must be a map of keys (name: …), not a list"),
        ("name:mine\n", "line 1  must be a map of keys (name: …), not plain text"),
        (GOOD + "\ttrain: 3\n", "line 4  is indented with a tab"),
        ("name: a: b\n", "line 1  a second ': ' here"),
        (GOOD + "track: [wandb\n", "A bracket or quote may not be closed"),
        (GOOD + "serve: @x\n", "line 4"),
        (GOOD + "serve: *nowhere\n", "line 4  found undefined alias"),
        (GOOD + "---\n" + GOOD, "line 4  a second document begins here"),
        (
            GOOD + "train: !!python/object/apply:os.system ['touch made']\n",
            "line 4  train: the tag !!python/object/apply:os.system is refused",
        ),
        (GOOD + "train: !!python/name:os.system\n", "line 4  train: the tag"),
        (GOOD + "track: !!set {a, b}\n", "line 4  track: the tag !!set is refused"),
        (GOOD + "serve: !mine {a: 1}\n", "line 4  serve: the tag !mine is refused"),
        (GOOD + "train: {seed: !!int zwei}\n", "'zwei' is not what its tag !!int says"),
        (GOOD + "train: &t {epochs: *t}\n", "line 4  train.epochs: an alias (*) stands inside its own anchor"),
        (GOOD + bomb(), "more than 20,000 values once aliases (*) are written out"),
        (GOOD + "serve: " + "[" * 40 + "]" * 40, "nested too deeply"),
        (GOOD + "serve: " + "[" * 100_000, "nested too deeply"),
        (GOOD + "train: {seed: " + "9" * 5000 + "}\n", "train.seed: is a number of more than 400 digits"),
        (GOOD + "name: yours\n", "line 4  name: is written twice (first on line 1). Keep one of them"),
        (GOOD + "train:\n  seed: 1\n  seed: 2\n", "line 6  train.seed: is written twice (first on line 5)"),
        (GOOD + "? [a, b]\n: 1\n", "line 4  a key must be a word"),
        (GOOD + "~: 1\n", "line 4  a key must be a word"),
        (GOOD + 'data2: "\\ud800"\n', "holds half a character"),
        (
            GOOD + 'evaluate: {prompts: "a\\0b"}\n',
            "evaluate.prompts: holds half a character (\\ud800 to \\udfff) or a NUL",
        ),
        (GOOD + "<<: {seed: 1}\n", "line 4  <<: no key here: YAML's merge key is not read here"),
        (b"name: \x00\n", "line 1  holds a control character (U+0000)"),
        ("name: 말투\n".encode("cp949"), "line 1  is not UTF-8"),
        (GOOD.encode("utf-16"), "is UTF-16. Save it as UTF-8"),
        (b"name: mine\nbase: \xff\n", "line 2  is not UTF-8"),
    ],
)
def test_what_is_no_recipe_is_refused_in_one_sentence(content: str | bytes, says: str, tmp_path: Path) -> None:
    message = refused(content, tmp_path)
    assert says in message
    assert "1 problem\n" in message


def test_a_file_of_fifty_megabytes_is_not_even_parsed(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    with file.open("wb") as sparse:
        sparse.truncate(50_000_000)
    with pytest.raises(RecipeError, match="is larger than 256 KB"):
        read_recipe(file)


def test_a_folder_and_a_missing_file_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder"):
        read_recipe(tmp_path)
    (tmp_path / "친구.yaml").write_text(GOOD, encoding="utf-8")
    with pytest.raises(RecipeError, match=r"there is no such file\. Did you mean '.*친구\.yaml'"):
        read_recipe(tmp_path / "친구.yml")
    with pytest.raises(RecipeError, match="there is no such file"):
        read_recipe(tmp_path / "친구.yaml" / "x.yaml")


def test_a_missing_file_that_ships_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"Did you mean 'maltu:recipes/casual_chat\.yaml'"):
        read_recipe(tmp_path / "recipes" / "casual_chat.yaml")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    loop = tmp_path / "loop.yaml"
    os.symlink(loop, loop)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(loop)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(Path("a\0b"))


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="the administrator may read everything")
def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(GOOD)
    file.chmod(0)
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(file)


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    assert accepted(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(), tmp_path) == "mine"
    message = refused(b"\xef\xbb\xbf" + (GOOD + "trian: 3\n").replace("\n", "\r\n").encode(), tmp_path)
    assert "line 4  trian: not a key of a recipe. Did you mean 'train'?" in message


def test_an_alias_used_twice_is_plain_reuse(tmp_path: Path) -> None:
    text = GOOD + "train: {warmup_ratio: &share 0.2, weight_decay: *share}\n"
    (tmp_path / "r.yaml").write_text(text)
    assert read_recipe(tmp_path / "r.yaml").train.weight_decay == 0.2


def test_a_tag_builds_no_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(GOOD + "serve: !!python/object/apply:os.mkdir [made]\n", tmp_path)
    assert not (tmp_path / "made").exists()


def test_problems_of_the_file_stand_beside_those_of_its_values(tmp_path: Path) -> None:
    message = refused(GOOD + "train: {seed: 1, seed: 2, epochs: -1}\nserve: !!set {a}\n한국어: 1\n", tmp_path)
    for says in (
        "seed: is written twice",
        "epochs: must be more than 0",
        "serve: the tag",
        "line 6  한국어: not a key",
    ):
        assert says in message
    assert "4 problems" in message


def test_thousands_of_mistakes_are_told_shortly(tmp_path: Path) -> None:
    message = refused(GOOD + "".join(f"key{n}: {n}\n" for n in range(5000)), tmp_path)
    assert 40 < len(message.splitlines()) < 60
