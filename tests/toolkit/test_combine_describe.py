"""docs/methods.md says what the code says."""

import json
from pathlib import Path

from toolkit.combine.describe import MEASURED, document
from toolkit.combine.methods import METHODS

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_code_and_the_figures_give() -> None:
    measured = json.loads(MEASURED.read_text(encoding="utf-8")) if MEASURED.exists() else {}
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert page == document(measured), "run: python -m toolkit.combine.describe > docs/methods.md"


def test_every_method_stands_on_it_with_its_paper() -> None:
    page = document({})
    for method in METHODS:
        assert f"### {method.name}\n" in page
        assert method.paper in page


def test_a_combination_that_hurts_is_said_to_hurt() -> None:
    verdict = {
        "best": "반말", "measure": "loss", "of_best": 4.0, "of_combination": 4.4, "gain": -0.1, "low": -0.12,
        "high": -0.08, "helps": False, "hurts": True,
    }  # fmt: skip
    cases = {"tone_mix": {"0": {"kind": "mix", "verdict": verdict, "seconds": 61.2}}}
    assert "| tone_mix | loss 4 (반말) | 4.4 | -10.0 % (-12.0 to -8.0) | 0 of 1 seeds, hurts in 1 | 61 |" in document(
        {"cases": cases}
    )
