"""docs/reference/api.md says what the server says of itself."""

from pathlib import Path

from serve.api import describe_api
from serve.reference import document, prometheus, refusals
from serve.schemas import Chat
from serve.settings import parser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "api.md"


def test_the_page_is_what_the_server_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == document(), "run: python -m serve.reference > docs/reference/api.md"


def test_every_route_body_and_flag_stands_on_it() -> None:
    page, found = document(), describe_api()
    routes = [(method.upper(), path) for path, of in found["paths"].items() for method in of]
    assert len(routes) > 14
    assert [route for route in routes if f"\n### {route[0]} {route[1]}\n" not in page] == []
    sections = [name for name in found["components"]["schemas"] if name != "Error"]
    assert [name for name in sections if f"\n### {name}\n" not in page] == []
    assert [name for name in Chat.model_fields if f"`{name}`" not in page] == []
    flags = [action.option_strings[-1] for action in parser()._actions if action.dest not in ("run", "help")]
    assert len(flags) > 14 and [flag for flag in flags if f"| `{flag}" not in page] == []


def test_refusals_are_read_from_the_source_with_their_words() -> None:
    found: dict[tuple[int, str], str] = {}
    for status, code, says in refusals():
        found[status, code] = f"{found.get((status, code), '')}{says}\n"
    assert "requests are waiting already" in found[429, "queue_full"]
    assert "does not exist" in found[404, "model_not_found"]
    assert "as in: tools: " in found[400, "unsupported_parameter"]
    assert {status for status, _ in found} >= {400, 401, 403, 404, 408, 409, 413, 415, 429, 431, 500, 503}


def test_every_metric_is_told_with_its_labels() -> None:
    found = {name.strip("`"): (kind, labels) for name, kind, labels, _ in prometheus()}
    assert found["maltu_requests_total"] == ("counter", "`model`, `outcome`, `route`")
    assert found["maltu_request_seconds"] == ("histogram", "`route`")
    assert found["maltu_state"] == ("gauge", "`state`")
    watched = (ROOT / "docs" / "monitoring" / "README.md").read_text(encoding="utf-8")
    assert [name for name in found if name not in watched] == []
