"""Every command of the documentation, run as it stands there: a page's blocks in order, in one folder, offline.

What is trained is made short by overrides (tests/docs_world.py); blocks with `<!-- not run: … -->` are listed in
test_docs_pages.py.
"""

import shutil
from pathlib import Path

import pytest

from tests.docs_world import Place, all_blocks, blocks, is_run, name_of, pages

pytestmark = pytest.mark.slow  # trains and serves

RUN = [name_of(page) for page in pages() if any(is_run(b) for b in blocks(page.read_text("utf-8"), name_of(page)))]


def test_most_pages_for_users_are_run() -> None:
    tours = {"README.md", "README.ko.md", "docs/tour.md", "docs/tour.ko.md", "docs/serving.md"}
    assert tours <= set(RUN) and len(RUN) >= 12


@pytest.fixture(scope="session")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where runs that pages take as given are kept."""
    return tmp_path_factory.mktemp("given")


@pytest.mark.parametrize("page", RUN)
def test_its_commands_do_what_they_say(page: str, tmp_path: Path, given: Path) -> None:
    found = [block for block in all_blocks() if block.page == page]
    if shutil.which("curl") is None and any("curl " in block.code for block in found if is_run(block)):
        pytest.skip("curl is not installed")
    with Place(tmp_path, given) as place:
        for block in found:
            place.run(block)
    assert len(place.said) == sum(map(is_run, found)) > 0
