"""What the documentation says of itself: links lead somewhere, marks are known, examples and messages are real."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.docs_world import KINDS, REASONS, ROOT, Block, all_blocks, name_of, pages

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#{1,6} (.+?)\s*$", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
MESSAGES = ROOT / "docs" / "howto" / "troubleshooting.md"
NO_MESSAGES_OF_OURS = ("command not found: maltu",)  # the shell's own
# Blocks that no test runs, by reason and page, with how each begins.
NOT_RUN = {
    "set-up": {
        ("README.md", "make demo"), ("README.md", "python3 -m venv"), ("README.ko.md", "make demo"),
        ("README.ko.md", "python3 -m venv"), ("docs/tour.md", "git clone"), ("docs/tour.ko.md", "git clone"),
        ("docs/deploy.md", "cd /opt/maltu"),
    },
    "network": {
        ("README.md", "maltu choose"), ("README.ko.md", "maltu choose"), ("docs/choose.md", "python -m toolkit choose"),
        ("docs/howto/pick-a-base.md", "maltu choose"), ("docs/trackers.md", "python -m toolkit sync"),
    },
    "long": {
        ("README.md", "maltu train"), ("README.ko.md", "maltu train"), ("docs/search.md", "python -m toolkit.train"),
        ("docs/howto/ensembles.md", "maltu train"),
    },
    "GPU": {
        ("docs/howto/one-gpu-qlora.md", "TORCH=cuda make setup"), ("docs/howto/one-gpu-qlora.md", "maltu check"),
    },
    "Docker": {("docs/deploy.md", "docker build")},
    "a server elsewhere": {
        ("docs/deploy.md", "VLLM_ALLOW"), ("docs/serving.md", "curl -X POST"),
        ("docs/serving.md", "python -m serve feedback export"), ("docs/serving.md", "pip install 'maltu[otel]'"),
    },
}  # fmt: skip


def test_the_walk_finds_the_pages() -> None:
    names = {name_of(page) for page in pages()}
    assert len(names) > 25 and {"README.ko.md", "docs/tour.md", "docs/howto/serve.md"} <= names


def test_every_mark_is_one_that_tests_know() -> None:
    for block in all_blocks():
        for kind, word in block.marks:
            assert kind in KINDS, f"{block}: <!-- {kind}: … --> is no mark"
            assert kind != "not run" or word in REASONS, f"{block}: {word} is no reason"
            assert kind != "exits" or word.isdecimal(), f"{block}: {word} is no exit status"


def test_what_is_not_run_is_listed_with_its_reason() -> None:
    found: dict[str, set[Block]] = {reason: set() for reason in REASONS}
    for block in all_blocks():
        if reason := block.mark("not run"):
            found[reason].add(block)
    for reason, blocks in found.items():
        listed = NOT_RUN.get(reason, set())
        for block in blocks:
            assert any(block.page == page and block.code.startswith(begins) for page, begins in listed), (
                f"{block} is not run ({reason}) and not listed in NOT_RUN: {block.code.splitlines()[0]}"
            )
        for page, begins in listed:
            assert any(block.page == page and block.code.startswith(begins) for block in blocks), (
                f"{page}: no block is not run for {reason} and begins with {begins!r}"
            )


def test_every_block_of_python_compiles() -> None:
    found = [block for block in all_blocks() if block.language == "python"]
    assert len(found) > 4
    for block in found:
        compile(block.code, str(block), "exec")


@pytest.mark.parametrize(("language", "read"), [("yaml", yaml.safe_load), ("json", json.loads)])
def test_every_block_of_data_can_be_read(language: str, read: object) -> None:
    assert callable(read)
    for block in all_blocks():
        if block.language == language and "…" not in block.code:
            read(block.code)


def slugs(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in HEADING.findall(text)}


def links() -> Iterator[tuple[Path, str]]:
    for page in [*pages(), ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md"]:
        text = FENCED.sub("", page.read_text(encoding="utf-8"))
        for target in LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
            if not re.match(r"[a-z]+:", target):
                yield page, target


def test_every_link_leads_somewhere() -> None:
    found = list(links())
    assert len(found) > 60
    for page, target in found:
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: {target} leads nowhere"
        if anchor:
            assert anchor in slugs(there), f"{name_of(page)}: {there.name} has no heading #{anchor}"


def test_every_how_to_and_reference_is_linked_from_somewhere() -> None:
    linked = {(page.parent / target.partition("#")[0]).resolve() for page, target in links() if target[0] != "#"}
    for folder in ("howto", "reference"):
        found = sorted((ROOT / "docs" / folder).glob("*.md"))
        assert len(found) >= 3
        assert not [page.name for page in found if page.resolve() not in linked]


def said_by_the_code() -> str:
    """Every text in the source and in the set-up script, with … where a message fills something in."""
    texts = [(ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")]
    for folder in ("toolkit", "serve"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    texts.append("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
    return "\n".join(texts)


def test_every_message_in_troubleshooting_is_one_that_the_code_says() -> None:
    text, said = MESSAGES.read_text(encoding="utf-8"), said_by_the_code()
    entries = re.findall(r"^- (?:\d{3} )?((?:`[^`]+`(?:, )?)+)", text, re.MULTILINE)
    assert len(entries) > 50
    for message in (one for entry in entries for one in re.findall(r"`([^`]+)`", entry)):
        parts = [part.strip() for part in re.split(r"…|'[^']*'", message) if len(part.strip()) > 3]
        missing = [part for part in parts if part not in said]
        assert message in NO_MESSAGES_OF_OURS or (parts and not missing), f"nothing says {message!r}: {missing}"
