"""docs/openapi.json is what the server says of itself."""

import json
from pathlib import Path

import pytest

from serve.api import describe_api
from serve.commands import run_command

FILE = Path(__file__).parents[2] / "docs" / "openapi.json"


def test_the_checked_in_description_is_the_servers() -> None:
    checked_in = json.loads(FILE.read_text(encoding="utf-8"))
    assert checked_in == describe_api(), "python -m serve openapi --out docs/openapi.json"


def test_every_reference_leads_somewhere() -> None:
    described = describe_api()
    text = json.dumps(described)
    names = {part.split('"', 1)[0] for part in text.split("#/components/schemas/")[1:]}
    assert len(names) > 5 and names <= set(described["components"]["schemas"])


def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    run_command(["openapi"], {})
    assert json.loads(capsys.readouterr().out)["info"]["title"] == "Maltu"
