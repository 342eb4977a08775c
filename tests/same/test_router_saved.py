"""A router that was saved and loaded gives the very chances of the one that was trained."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.router_world import tiny_base
from tests.stacked_world import make_base
from toolkit.combine.route import KINDS, Router
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble import router_rows
from toolkit.ensemble.router import train_router

LINES = {"요리": ["김치찌개 끓이는 법", "how long to boil eggs"], "수학": ["분수 덧셈이 안 돼요", "what is a prime"]}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_saved_equals_reloaded(kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_rows, "N_SAID", 40)
    monkeypatch.setattr(router_rows, "_written", lambda: ["교량이 완전히 침수되었다.", "Repairs were completed."] * 9)
    base = tiny_base("qwen3")
    talks = {
        name: [
            Talk((Turn("user", f"{line} {i}"), Turn("assistant", "응")), f"말:{i}") for line in lines for i in range(6)
        ]
        for name, lines in LINES.items()
    }
    router, _ = train_router(base, talks, kind=kind)
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router", base.hash)
    asked = [[Turn("user", text)] for text in ("김치 얼마나 넣어", "분수 나눗셈", "말5 말9 말33", "")]
    said = router.probabilities(base.model, base.tokenizer, asked)
    again = loaded.probabilities(make_base("qwen3"), base.tokenizer, asked)
    assert torch.equal(said, again)
    assert {path.suffix for path in (tmp_path / "router").iterdir()} == {".safetensors", ".json"}
    assert loaded.experts == router.experts and loaded.kind == kind
