"""Training a router: what it learns from, that it learns, what it reports and what it refuses."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.router_world import save_bert, tiny_base
from toolkit.combine.route import KINDS, STRANGE, Router, chances_of
from toolkit.combine.route_features import N_ALL
from toolkit.combine.route_style import N_MANNERS, manners
from toolkit.corpus.talk import Talk, Turn
from toolkit.ensemble import router_rows
from toolkit.ensemble.router import Design, fit, folds, train_router
from toolkit.ensemble.router_report import OTHER, TURNED_AWAY, calibrate, judge, report_of
from toolkit.ensemble.router_rows import Rows, add_strangers, rows_of, strangers
from toolkit.errors import InputError

KITCHEN = ["김치찌개 끓이는 법", "밥이 질어졌어", "라면 물 얼마나 넣어", "how long to boil eggs", "감자 볶음 어떻게 해"]
NUMBERS = [
    "삼각형 넓이 구하는 법",
    "분수 덧셈이 안 돼요",
    "소수는 왜 끝이 없어",
    "what is a prime number",
    "방정식 풀이 좀",
]


def talks_of(lines: Sequence[str], n: int = 20) -> list[Talk]:
    """Talks of three user turns, drawn from a few lines."""
    found = []
    for i in range(n):
        said = [f"{lines[(i + k) % len(lines)]} {i * (k + 3) % 17}" for k in range(3)]
        turns = [turn for text in said for turn in (Turn("user", text), Turn("assistant", "응"))]
        found.append(Talk(tuple(turns), f"말.jsonl:{i}"))
    return found


TALKS = {"요리": talks_of(KITCHEN), "수학": talks_of(NUMBERS)}


ALL_WRITTEN = router_rows._written


@pytest.fixture(autouse=True)
def _few_strangers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_rows, "N_SAID", 40)
    monkeypatch.setattr(router_rows, "_written", lambda: ALL_WRITTEN()[::12])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding"])
def test_a_router_learns_who_is_asked(kind: Any) -> None:
    base = tiny_base()
    router, report = train_router(base, TALKS, kind=kind, seed=1)
    assert router.experts == ("요리", "수학") and router.base_hash == "그 베이스"
    new = [[Turn("user", "김치찌개 물 얼마나")], [Turn("user", "분수 방정식 풀이")]]
    chances = router.probabilities(base.model, base.tokenizer, new)
    assert chances[0, 0] > chances[0, 1] and chances[1, 1] > chances[1, 0]
    assert report["labels"] == ["요리", "수학", OTHER] and report["kind"] == kind
    assert report["after 1"]["n"] == 40 and report["all"]["n"] == 120 and report["after 1"]["accuracy"] > 0.85
    assert report["all"]["other"] <= 2 * TURNED_AWAY[0] and report["strangers sent to other"] > 0.6
    assert report["milliseconds"] > 0
    json.dumps(report, allow_nan=False)


def test_three_experts_and_the_same_seed_give_the_same_router() -> None:
    third = talks_of(["배송 언제 와요", "환불하고 싶어요", "where is my order"], 6)
    talks = {**TALKS, "가게": third}
    one, _ = train_router(tiny_base(), talks, seed=3)
    other, _ = train_router(tiny_base(), talks, seed=3)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)
    assert one.tensors["pieces"].shape == (N_ALL, 3 + STRANGE)


def test_an_encoder_of_the_users_own_is_read_instead_of_the_base(tmp_path: Path) -> None:
    bert = save_bert(tmp_path / "bert")
    base = tiny_base()
    router, report = train_router(base, TALKS, kind="embedding", encoder=bert)
    assert router.width == 16 and router.base_hash == "" and report["after 3"]["accuracy"] > 0.6
    router.save(tmp_path / "router")
    loaded = Router.load(tmp_path / "router", "딴 베이스")
    asked = [[Turn("user", "김치찌개 물 얼마나")]]
    first = router.probabilities(base.model, base.tokenizer, asked)
    assert torch.equal(first, loaded.probabilities(base.model, base.tokenizer, asked))


def test_an_encoder_that_changed_is_refused(tmp_path: Path) -> None:
    from toolkit.errors import RunError

    bert = save_bert(tmp_path / "bert")
    few = {name: talks[:4] for name, talks in TALKS.items()}
    router, _ = train_router(tiny_base(), few, kind="embedding", encoder=bert)
    router.save(tmp_path / "router")
    save_bert(tmp_path / "bert", seed=1)
    with pytest.raises(RunError, match="not the encoder"):
        Router.load(tmp_path / "router")


def test_talk_is_learnt_from_as_far_as_it_has_come() -> None:
    rows = rows_of({"요리": TALKS["요리"][:2], "수학": TALKS["수학"][:2]})
    first = [text.split("\n") for text, talk in zip(rows.texts, rows.talk, strict=True) if talk == 0]
    assert [len(lines) for lines in first] == [1, 2, 3, 1, 1]
    assert rows.turns[:5] == [1, 2, 3, 0, 0] and rows.talk == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert rows.owner == [0] * 10 + [1] * 10
    assert not any("응" in text for text in rows.texts)


def test_much_talk_is_thinned_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_rows, "MOST_TALKS", 5)
    monkeypatch.setattr(router_rows, "MOST_TURNS", 2)
    long = [Talk(tuple(Turn("user", f"말{n} {k}") for k in range(4)), "말:1") for n in range(12)]
    rows = rows_of({"요리": long, "수학": TALKS["수학"][:5]})
    assert [text for text, turns in zip(rows.texts, rows.turns, strict=True) if turns == 1][:5] == [
        "말0 0", "말2 0", "말4 0", "말7 0", "말9 0",
    ]  # fmt: skip
    assert rows.turns.count(2) == 10 and 3 not in rows.turns and len(set(rows.talk)) == 10


def test_one_expert_alone_or_one_without_talk_is_refused() -> None:
    with pytest.raises(InputError, match="요리: a router chooses between two experts or more"):
        train_router(tiny_base(), {"요리": TALKS["요리"]})
    silent = [Talk((Turn("assistant", "응"),), "말.jsonl:1")] * 9
    with pytest.raises(InputError) as caught:
        train_router(tiny_base(), {"요리": TALKS["요리"], "수학": TALKS["수학"][:1], "없음": silent})
    assert [problem.where for problem in caught.value.problems] == ["수학", "없음"]


def test_an_encoder_goes_with_kind_embedding_alone() -> None:
    with pytest.raises(InputError, match="is needed by router embedding"):
        train_router(tiny_base(), TALKS, kind="embedding")
    with pytest.raises(InputError, match="is read by no such router"):
        train_router(tiny_base(), TALKS, encoder="./bert")


def test_strangers_are_nobodys_text(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    monkeypatch.setattr(router_rows, "_written", ALL_WRITTEN)
    written, said = strangers(base.model, base.tokenizer, [], 0)
    assert len(written) > 600 and said and any("교량" in text for text in written)
    left, _ = strangers(base.model, base.tokenizer, written[:600], 0)
    assert left == written[600:]


def test_strangers_stand_alone_and_in_a_row_and_a_group_stays_together() -> None:
    rows = Rows([], [], [], [], [])
    add_strangers(rows, [f"말{n}" for n in range(7)], 2, 0)
    add_strangers(rows, ["글1", "글2", "글3"], 3, 0)
    assert rows.talk == [-1] * 4 + [-2] * 4 + [-3] * 2 + [-4] * 4
    assert sum("\n" in text for text in rows.texts) == 3 and set(rows.turns) == {0}
    for talk in (-1, -2, -4):
        group = [text for text, of in zip(rows.texts, rows.talk, strict=True) if of == talk]
        assert set(group[-1].split("\n")) <= set(group[:-1])


def test_a_base_that_says_nothing_leaves_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_rows, "_said", lambda *_: [])
    router, report = train_router(tiny_base(), TALKS)
    assert all(tensor.isfinite().all() for tensor in router.tensors.values())
    assert report["strangers sent to other"] > 0.6


def test_no_strangers_at_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_rows, "_said", lambda *_: [])
    monkeypatch.setattr(router_rows, "_written", list)
    with pytest.raises(InputError, match="no text is left that is no expert's"):
        train_router(tiny_base(), TALKS)


def test_folds_keep_a_talk_whole_and_every_expert_in_training() -> None:
    rows = rows_of({"요리": TALKS["요리"], "수학": TALKS["수학"][:2]})
    design = _design_of(rows)
    fold = folds(design, 0)
    for talk in range(22):
        assert len(set(fold[design.talk == talk])) == 1
    for number in range(fold.max() + 1):
        assert set(design.owner[fold != number]) == {0, 1}


def _design_of(rows: Rows) -> Design:
    from toolkit.combine.route_features import pieces

    numbers = torch.rand(len(rows.texts), 4, generator=torch.Generator().manual_seed(0))
    return Design(pieces(rows.texts), numbers, np.array(rows.owner), np.array(rows.talk), np.array(rows.weight), 2)


def test_a_talk_does_not_make_itself_familiar() -> None:
    rows = rows_of(TALKS)
    rows.add("처음 듣는 소리", 2, -1, 0, 1.0)
    design = _design_of(rows)
    tensors = fit(design, np.ones(len(rows.texts), dtype=bool), "centroid")
    own = torch.from_numpy((design.talk >= 0).astype(np.float32))
    all_known = design.found.familiarity(tensors["known"])
    others = design.found.familiarity(tensors["known"], own)
    assert (others[:-1, 0] < all_known[:-1, 0]).all() and torch.equal(others[-1], all_known[-1])


def test_calibration_turns_the_promised_share_away_and_softens_what_is_too_sure() -> None:
    noise = torch.Generator().manual_seed(0)
    n = 2000
    owner = torch.randint(0, 2, (n,), generator=noise)
    sure = 20.0 * torch.nn.functional.one_hot(owner ^ (torch.rand(n, generator=noise) < 0.3).long(), 2)
    strange = torch.randn(n, STRANGE, generator=noise)
    far = torch.cat([torch.zeros(n, 2), strange + 4.0], dim=1)
    scores = torch.cat([torch.cat([sure, strange], dim=1), far])
    rows = Rows([""] * 2 * n, [*owner.tolist(), *[2] * n], [*range(n), *[-1] * n], [1] * n + [0] * n, [1.0] * 2 * n)
    chances = chances_of(scores, calibrate(scores, rows, 2)[0])
    report = report_of(chances, rows, ["요리", "수학"])
    assert report["after 1"]["other"] == pytest.approx(TURNED_AWAY[0], abs=0.01)
    assert report["after 1"]["calibration_error"] < 0.06
    assert report["strangers sent to other"] > 0.8


def test_each_manner_is_calibrated_by_itself_where_it_has_enough_texts() -> None:
    noise = torch.Generator().manual_seed(0)
    n = 1200
    owner = torch.randint(0, 2, (n,), generator=noise)
    texts = ["오늘 뭐 먹지?", "오늘 뭐 먹지?\n배고파", "so tired today"] * (n // 3)
    wrong = torch.rand(n, generator=noise) < torch.tensor([0.1, 0.1, 0.4]).repeat(n // 3)
    sure = 3.0 * torch.nn.functional.one_hot(owner ^ wrong.long(), 2)
    strange = torch.randn(n, STRANGE, generator=noise)
    scores = torch.cat([torch.cat([sure, strange], dim=1), torch.cat([torch.zeros(n, 2), strange + 4.0], dim=1)])
    rows = Rows(texts * 2, [*owner.tolist(), *[2] * n], [*range(n), *[-1] * n], [1] * n + [0] * n, [1.0] * 2 * n)
    calibration = calibrate(scores, rows, 2)
    assert calibration.shape == (N_MANNERS, 3)
    of = manners(rows.texts)
    assert calibration[of[2], 0] > 2 * calibration[of[0], 0]
    told = report_of(chances_of(scores, calibration[of]), rows, ["요리", "수학"])
    assert told["all"]["calibration_error"] < 0.06
    away = (chances_of(scores, calibration[of])[:n].argmax(1) == 2).reshape(-1, 3).float().mean(0)
    assert away[0] == pytest.approx(TURNED_AWAY[0], abs=0.01) and away[1] == pytest.approx(TURNED_AWAY[1], abs=0.01)
    unseen = int((set(range(N_MANNERS)) - set(of.tolist())).pop())
    assert calibration[of[0], 0] < calibration[unseen, 0] < calibration[of[2], 0]


def test_a_report_counts_what_was_sent_to_nobody_as_wrong() -> None:
    rows = Rows(["가"] * 3, [0, 0, 1], [0, 1, 2], [1, 1, 3], [1.0] * 3)
    chances = torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.2, 0.6], [0.1, 0.7, 0.2]])
    report = report_of(chances, rows, ["요리", "수학"])
    assert report["after 1"] == {
        "n": 2, "accuracy": 0.5, "calibration_error": 0.4, "other": 0.5, "confusion": [[1, 0, 1], [0, 0, 0]],
    }  # fmt: skip
    assert report["after 3"]["confusion"] == [[0, 0, 0], [0, 1, 0]] and report["all"]["n"] == 3


def test_held_out_talk_judges_a_router() -> None:
    base = tiny_base()
    router, _ = train_router(base, TALKS)
    held = judge(router, base.model, base.tokenizer, {"수학": TALKS["수학"][:4], "요리": TALKS["요리"][:6]})
    assert held["after 1"]["n"] == 10 and held["after 3"]["accuracy"] > 0.9
