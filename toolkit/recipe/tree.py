"""From a recipe's text to plain values, each with the line it stands on.

Plain words are read as YAML 1.2 does: `1e-3` is a number; `yes`, dates and 12:30 are text. Only maps, lists, text,
numbers, true, false and null come out: no tag builds an object, no anchor loops, no alias grows without bound.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from toolkit.errors import Problem, RecipeError
from toolkit.recipe.nearest import did_you_mean, nearest_file
from toolkit.shipped import PREFIX, shipped

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 32

Key = tuple[str | int, ...]
TAG = "tag:yaml.org,2002:"
TOO_DEEP = "lists and maps are nested too deeply. A recipe needs five levels"
WORDS = {
    "null": re.compile(r"^(?:~|null|Null|NULL|)$"),
    "bool": re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"),
    "int": re.compile(r"^[-+]?(?:\d[\d_]*|0x[\dA-Fa-f_]+|0o[0-7_]+)$"),
    "float": re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.Inf|\.INF|\.nan|\.NaN|\.NAN)$"
    ),
}
RESOLVERS = {None: [(TAG + name, pattern) for name, pattern in WORDS.items()]}


class RecipeLoader(yaml.SafeLoader):
    """PyYAML's loader with YAML 1.2's plain words; only its node tree is used."""

    yaml_implicit_resolvers = RESOLVERS


class RecipeDumper(yaml.SafeDumper):
    """PyYAML's dumper that quotes what RecipeLoader would not read as text, and writes no anchors."""

    yaml_implicit_resolvers = RESOLVERS

    def ignore_aliases(self, data: Any) -> bool:
        """Write every value out where it is used."""
        return True


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with line ends, or with signs that cannot be seen, in double quotes: there they survive."""
    return dumper.represent_scalar(TAG + "str", text, style=None if text.isprintable() else '"')


RecipeDumper.add_representer(str, _write_text)


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of the file, or an override of the command line."""

    line: int | None = None
    override: str | None = None


@dataclass
class Tree:
    """A recipe as written: plain values, the place of every key and list item, and what was wrong already."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    spoiled: set[Key] = field(default_factory=set)

    def place(self, key: Key) -> Place:
        """The place of the key, or of the nearest section around it that was written."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, Place())

    def problem(self, key: Key, says: str) -> Problem:
        """A problem with the value at a key, saying where it was written."""
        place, name = self.place(key), dotted(key)
        if place.override is None:
            return Problem(name, says, place.line)
        same = place.override.startswith(f"{name}=")
        return Problem(f"override {place.override}" + ("" if same else f"  {name}"), says)


def dotted(key: Key) -> str:
    """A key as people write it: `data.train.0`."""
    return ".".join(str(part) for part in key)


def parts_of(name: str | Key) -> Key:
    """The parts of a key that people wrote: numbers are places in a list."""
    if isinstance(name, tuple):
        return name
    return tuple(int(part) if part.isdecimal() else part for part in name.split("."))


def read_text(path: Path, source: str) -> str:
    """The text of a recipe file, without a byte order mark. Raises RecipeError unless it is a small UTF-8 file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except IsADirectoryError:
        raise _alone(source, "is a folder. Name a recipe file, as in recipes/casual_chat.yaml") from None
    except (FileNotFoundError, NotADirectoryError):
        own = os.path.isfile(shipped(f"recipes/{path.name}"))
        guess = f"{PREFIX}recipes/{path.name}" if own else nearest_file(path)
        raise _alone(source, f"there is no such file{did_you_mean(guess)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise _alone(source, f"cannot be read ({reason}). Check the path and its permissions") from None
    if len(raw) > MAX_BYTES:
        says = f"is larger than {MAX_BYTES // 1024} KB, so it is no recipe. Talk belongs in files that data.train names"
        raise _alone(source, says)
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _alone(source, "is UTF-16. Save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        says = "is not UTF-8 (an editor saved it as CP949 or another code page?). Save it as UTF-8"
        raise _alone(source, says, line) from None


def parse(text: str, source: str) -> Tree:
    """The values of a recipe's text and their places. Raises RecipeError when the text is no YAML map."""
    root = compose(text, source)
    if root is None:
        raise _alone(source, "is empty. The smallest recipe: name: …, base: {model: …}, data: {train: […]}")
    if not isinstance(root, yaml.MappingNode):
        found = "a list" if isinstance(root, yaml.SequenceNode) else "plain text"
        raise _alone(source, f"must be a map of keys (name: …), not {found}", _line(root))
    tree = Tree()
    values = plant(tree, (), root, None)
    tree.values = values if isinstance(values, dict) else {}
    return tree


def compose(text: str, source: str) -> yaml.Node | None:
    """The YAML node tree of a text. Raises RecipeError with the line where it is no YAML."""
    try:
        return yaml.compose(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _alone(source, _no_yaml(error, text), mark.line + 1 if mark else None) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        sign = error.character if isinstance(error.character, int) else ord(error.character[:1])
        raise _alone(source, f"holds a control character (U+{sign:04X}). Remove it", line) from None
    except RecursionError:
        raise _alone(source, TOO_DEEP) from None


def plant(tree: Tree, key: Key, node: yaml.Node, override: str | None) -> Any:
    """The plain value of a node; places and problems go into the tree. What cannot be had is None, and spoiled."""
    try:
        return _Walk(tree, override).value(key, node, ())
    except _TooMuch as stop:
        tree.problems.append(tree.problem(stop.key, str(stop)))
        tree.spoiled.add(())
        return None


class _TooMuch(Exception):
    """The walk has to end: what is written would never end, or would not fit."""

    def __init__(self, key: Key, says: str) -> None:
        super().__init__(says)
        self.key = key


class _Walk:
    """One pass over a node tree, with the count of what it has seen."""

    def __init__(self, tree: Tree, override: str | None) -> None:
        self.tree, self.override, self.n_values = tree, override, 0

    def value(self, key: Key, node: yaml.Node, around: tuple[int, ...]) -> Any:
        self.n_values += 1
        if id(node) in around:
            raise _TooMuch(
                key, "an alias (*) stands inside its own anchor (&): it would never end. Write the value out"
            )
        if self.n_values > MAX_VALUES:
            raise _TooMuch(key, f"more than {MAX_VALUES:,} values once aliases (*) are written out. Write fewer")
        if len(around) > MAX_DEPTH:
            raise _TooMuch(key, TOO_DEEP)
        if isinstance(node, yaml.MappingNode) and node.tag == TAG + "map":
            return self.mapping(key, node, (*around, id(node)))
        if isinstance(node, yaml.SequenceNode) and node.tag == TAG + "seq":
            return self.sequence(key, node, (*around, id(node)))
        try:
            return _scalar(node)
        except ValueError as error:
            self.refuse(key, str(error))
            return None

    def mapping(self, key: Key, node: yaml.MappingNode, around: tuple[int, ...]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name_node, value_node in node.value:
            line = _line(name_node)
            name = name_node.value
            if not isinstance(name, str) or name_node.tag == TAG + "null" or _cannot_be_kept(name):
                self.tree.problems.append(Problem(dotted(key), "a key must be a word, as in name: …", line))
                continue
            place = (*key, name)
            if name in found:
                first = self.tree.places[place].line
                on = "" if first is None else f" (first on line {first})"
                self.tree.problems.append(Problem(dotted(place), f"is written twice{on}. Keep one of them", line))
                self.tree.spoiled.add(place)
                continue
            self.tree.places[place] = Place(None if self.override else line, self.override)
            found[name] = self.value(place, value_node, around)
        return found

    def sequence(self, key: Key, node: yaml.SequenceNode, around: tuple[int, ...]) -> list[Any]:
        found = []
        for index, item in enumerate(node.value):
            place = (*key, index)
            self.tree.places[place] = Place(None if self.override else _line(item), self.override)
            found.append(self.value(place, item, around))
        return found

    def refuse(self, key: Key, says: str) -> None:
        self.tree.problems.append(self.tree.problem(key, says))
        self.tree.spoiled.add(key)


def _scalar(node: yaml.Node) -> Any:
    """The value of a plain node. Raises ValueError with what to say when it has none."""
    kind, text = node.tag.removeprefix(TAG), node.value
    if not isinstance(node, yaml.ScalarNode) or kind not in ("null", "bool", "int", "float", "str"):
        tag = node.tag.replace(TAG, "!!")
        raise ValueError(f"the tag {tag} is refused: a recipe holds text, numbers, lists and maps only. Remove it")
    if kind == "str":
        if _cannot_be_kept(text):
            raise ValueError("holds half a character (\\ud800 to \\udfff) or a NUL, which no file can keep. Remove it")
        return text
    if not WORDS[kind].match(text):
        raise ValueError(f"'{text}' is not what its tag !!{kind} says. Remove the tag")
    if len(text) > 400:
        raise ValueError("is a number of more than 400 digits. Write a smaller one")
    if kind == "int":
        return int(text.replace("_", ""), 0 if text.lstrip("+-")[:2] in ("0x", "0o") else 10)
    if kind == "float":
        return float(re.sub(r"(?i)\.(inf|nan)$", r"\1", text.replace("_", "")))
    return None if kind == "null" else text.lower() == "true"


def _cannot_be_kept(text: str) -> bool:
    return any(0xD800 <= ord(sign) <= 0xDFFF or sign == "\0" for sign in text)


def _no_yaml(error: yaml.MarkedYAMLError, text: str) -> str:
    problem = error.problem or error.context or "is no YAML"
    mark = error.problem_mark
    lines = text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "'\\t'" in problem:
        return "is indented with a tab. YAML wants spaces"
    if "mapping values are not allowed" in problem:
        return "a second ': ' here, or a key indented deeper than its neighbours. Put text that holds ': ' in quotes"
    if "expected a single document" in (error.context or ""):
        return "a second document begins here (---). A recipe is one document"
    if "undefined alias" in problem:
        return f"{problem}. Text that begins with * needs quotes"
    if line.lstrip().startswith(("@", "`", "%")) or "cannot start any token" in problem:
        return f"{problem}. Put the text in quotes"
    if "expected ',' or" in problem or "<stream end>" in problem:
        return f"{problem}. A bracket or quote may not be closed"
    return f"no YAML: {problem}. Check indentation, quotes and brackets"


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _alone(source: str, says: str, line: int | None = None) -> RecipeError:
    return RecipeError(source, [Problem("", says, line)])
