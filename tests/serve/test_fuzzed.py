"""Whatever is sent to the routes as they are described, and whatever they are not described as: never a 5xx.

MALTU_CASES says how many cases (default 300).
"""

import contextlib
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from serve.api import Bounds, create_app
from serve.keys import key_of
from serve.store import Store

pytestmark = pytest.mark.slow  # hundreds of requests

N_CASES = int(os.environ.get("MALTU_CASES", "300"))
ADMIN = {"authorization": "Bearer admin-key-of-many-characters"}


@pytest.fixture
def client(engine: Any, tmp_path: Path) -> Iterator[TestClient]:
    store = Store(f"sqlite:///{tmp_path}/feedback.db")
    (tmp_path / "runs").mkdir()
    bounds = Bounds(
        100, admin_keys=(key_of("admin-key-of-many-characters", "root"),), keeps=True, folder=tmp_path / "runs"
    )
    app = create_app(engine, bounds, store=store)
    described = app.openapi()
    for name in ("Chat", "Completion", "Classify"):  # most of what is made up would be 404 otherwise
        described["components"]["schemas"][name]["properties"]["model"]["enum"] = ["casual", "auto", "nobody"]
    app.openapi = lambda: described  # type: ignore[method-assign]
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client
    store.close()


def test_nothing_that_is_sent_breaks_the_server(client: TestClient) -> None:
    schema = schemathesis.openapi.from_asgi("/openapi.json", client.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    varied = [one for one in operations if one.body or one.query or one.path_parameters]
    n_each = -(-N_CASES // (len(varied) * 2))
    statuses: Counter[tuple[str, int]] = Counter()

    def run(operation: Any, mode: GenerationMode, seed: int) -> None:
        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=n_each,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Any) -> None:
            response = case.call(session=client, headers=ADMIN if case.path.startswith("/admin") else None)
            statuses[operation.label, response.status_code] += 1
            assert response.status_code < 500, (case.as_curl_command(), response.text)

        with contextlib.suppress(Unsatisfiable):  # a path that is any text has no wrong value
            each()

    for operation in operations:
        run(operation, GenerationMode.POSITIVE, 0)
    seed = 0
    while statuses.total() < N_CASES:
        seed += 1
        for operation in varied:
            run(operation, GenerationMode.NEGATIVE, seed)
            run(operation, GenerationMode.POSITIVE, seed)
    assert statuses["POST /v1/chat/completions", 200] and statuses["POST /v1/chat/completions", 400]
    assert statuses["POST /v1/feedback", 201]
