"""A router applied: what it reads of a conversation, its folder, and decisions that stick."""

import json
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import BertModel

from tests.router_world import save_bert, spaced
from tests.stacked_world import BASES, make_base
from toolkit.combine import route_encoder
from toolkit.combine.route import FACTS, PLAIN, WEIGHTS, Choice, Router, chances_of, choose, shapes
from toolkit.combine.route_encoder import open_encoder
from toolkit.combine.route_features import (
    N_ALL,
    N_BUCKETS,
    N_TOKENS,
    hidden,
    last_user_turns,
    pieces,
    states_after,
)
from toolkit.combine.route_style import N_MANNERS, signs
from toolkit.corpus.talk import Turn
from toolkit.errors import BaseError, InputError, RunError

EXPERTS = ("casual", "polite", "teacher")
ASKED = [Turn("user", "말5 말6 말7"), Turn("assistant", "말9"), Turn("user", "말30")]


def random_router(base: Any, experts: tuple[str, ...] = EXPERTS, base_hash: str = "그 베이스") -> Router:
    """A router of random numbers for a tiny base."""
    noise = torch.Generator().manual_seed(3)
    width = 2 * base.config.hidden_size
    tensors = {name: torch.rand(shape, generator=noise) for name, shape in shapes(len(experts), width).items()}
    return Router("classifier", experts, width, base_hash, tensors)


def test_only_what_the_user_says_is_read() -> None:
    base = make_base()
    router = random_router(base)
    other_answers = [ASKED[0], Turn("assistant", "말50 말51"), ASKED[2]]
    system = [Turn("system", "말70"), *ASKED]
    chances = router.probabilities(base, spaced(), [ASKED, other_answers, system])
    assert torch.equal(chances[0], chances[1]) and torch.equal(chances[0], chances[2])
    assert last_user_turns(ASKED) == "말5 말6 말7\n말30"


def test_rows_are_chances() -> None:
    base = make_base()
    chances = random_router(base).probabilities(base, spaced(), [ASKED, [Turn("user", "말8")]])
    assert chances.shape == (2, 4)
    assert torch.allclose(chances.sum(1), torch.ones(2)) and (chances > 0).all()
    assert random_router(base).probabilities(base, spaced(), []).shape == (0, 4)


def test_a_user_who_has_said_nothing_fits_nobody() -> None:
    base = make_base()
    chances = random_router(base).probabilities(base, spaced(), [[Turn("assistant", "말9")], [], [Turn("user", " ")]])
    assert chances.tolist() == [[0.0, 0.0, 0.0, 1.0]] * 3


def test_decomposed_hangul_is_the_same_text() -> None:
    import unicodedata

    base = make_base()
    apart = [Turn(turn.role, unicodedata.normalize("NFD", turn.content)) for turn in ASKED]
    one, other = random_router(base).probabilities(base, spaced(), [ASKED, apart])
    assert torch.equal(one, other)


def test_a_text_scores_the_same_alone_and_in_a_batch() -> None:
    base = make_base()
    router = random_router(base)
    talks = [ASKED, [Turn("user", "말8")], [Turn("user", " ".join(f"말{n}" for n in range(5, 60)))]]
    together = router.probabilities(base, spaced(), talks)
    alone = torch.cat([router.probabilities(base, spaced(), [talk]) for talk in talks])
    assert torch.allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(BASES))
def test_states_are_those_of_the_whole_model_and_no_later_layer_runs(name: str) -> None:
    base = make_base(name)
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        whole = base(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    ran = []
    for layer in _layers(base)[1:]:
        layer.register_forward_hook(lambda *_: ran.append(1))
    states = states_after(base, 1, ids, mask)
    assert torch.equal(states, whole.hidden_states[1])
    assert not ran
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids, attention_mask=mask).logits, whole.logits)
    assert len(ran) == len(_layers(base)) - 1


def _layers(base: Any) -> Any:
    from toolkit.adapters.anatomy import decoder_layers

    return decoder_layers(base)


def test_another_thread_may_use_the_model_meanwhile() -> None:
    base = make_base()
    ids = torch.tensor([[5, 6, 7]])
    found: list[Any] = []

    def run_through() -> None:
        with torch.no_grad():
            found.append(base(input_ids=ids).logits)

    def meanwhile(*_: Any) -> None:
        if threading.current_thread() is threading.main_thread():
            thread = threading.Thread(target=run_through)
            thread.start()
            thread.join()

    _layers(base)[0].register_forward_pre_hook(meanwhile)
    states_after(base, 1, ids, torch.ones_like(ids))
    assert len(found) == 1 and found[0].shape == (1, 3, 96)


def test_at_most_64_tokens_are_read_and_they_are_the_last() -> None:
    base = make_base()
    long = " ".join(["말5"] * 200 + ["말6"] * (N_TOKENS - 1))
    seen = []
    _layers(base)[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    found = hidden(base, spaced(), [long, " ".join(["말6"] * (N_TOKENS - 1))])
    assert seen == [N_TOKENS]
    assert torch.equal(found[0], found[1])


def test_the_opening_token_says_nothing_of_a_text() -> None:
    base = make_base()
    found = hidden(base, spaced(), ["말6", ""])
    states = states_after(base, 1, torch.tensor([[1, 6]]), torch.ones(1, 2, dtype=torch.long))[0]
    assert torch.allclose(found[0], states[1].repeat(2), rtol=0, atol=1e-6)
    assert torch.allclose(found[1], states[0].repeat(2), rtol=0, atol=1e-6)  # where there is nothing else


def test_pieces_are_counted_the_same_on_every_machine() -> None:
    found = pieces(["오늘 뭐 먹지?", "", "a1 a2"])
    spelled = found.buckets < N_BUCKETS
    assert np.bincount(found.rows[spelled]).tolist() == [29, 0, 11]
    assert found.buckets[:4].tolist() == [823, 1886, 12147, 12379]
    again = pieces(["A1  a2"]).buckets
    assert np.array_equal(again[again < N_BUCKETS], found.buckets[spelled][29:])


def test_signs_stand_behind_the_pieces_and_make_nothing_familiar() -> None:
    text = "오늘 뭐 먹지?"
    found = pieces([text])
    behind = found.buckets[found.buckets >= N_BUCKETS] - N_BUCKETS
    assert behind.tolist() == sorted(signs(text)) and found.buckets.max() < N_ALL
    known = torch.zeros(N_BUCKETS)
    known[torch.from_numpy(found.buckets[found.buckets < N_BUCKETS])] = 9.0
    assert found.familiarity(known)[0, 1:].tolist() == [0.0, 0.0]
    assert pieces([""]).familiarity(known).tolist() == [[0.0, 0.0, 0.0]]


def test_digits_are_alike_inside_words() -> None:
    one, other = (set(pieces([text]).buckets.tolist()) for text in ("a1", "a7"))
    assert len(one - other) == 1  # the whole word alone keeps its digit


def test_pieces_do_not_depend_on_their_neighbours() -> None:
    together = pieces(["오늘 뭐 먹지?", "비 온다"])
    alone = pieces(["비 온다"])
    assert np.array_equal(together.buckets[together.starts[1] :], alone.buckets)
    weighed = together.weighed(torch.ones(N_ALL))
    assert weighed[: together.starts[1]].square().sum().item() == pytest.approx(1.0)


def test_calibration_divides_and_shifts() -> None:
    scores = torch.tensor([[2.0, 0.0, -9.0, -9.0]])
    plain = chances_of(scores, torch.tensor([1.0, 1.0, 0.0]))
    soft = chances_of(scores, torch.tensor([4.0, 1.0, 0.0]))
    wary = chances_of(scores, torch.tensor([1.0, 1.0, 8.0]))
    assert plain[0, 0] > soft[0, 0] > soft[0, 1] > plain[0, 1]
    assert wary[0, 2] > plain[0, 2]


def test_each_text_is_calibrated_by_its_manner() -> None:
    base = make_base()
    router = random_router(base)
    latin = [Turn("user", "how long"), Turn("user", "to boil eggs")]
    asked = [latin[:1], latin, [Turn("user", "말5 말6")], ASKED]
    numbers = hidden(base, spaced(), [last_user_turns(talk) for talk in asked])
    chances = router.probabilities(base, spaced(), asked)
    for at, talk in enumerate(asked):
        scores = router.scores(pieces([last_user_turns(talk)]), numbers[at : at + 1])
        alone = chances_of(scores, router.tensors["calibration"][at])
        assert torch.allclose(chances[at], alone[0], rtol=0, atol=1e-5)


# The folder


def test_a_base_of_another_width_is_refused() -> None:
    other = make_base()
    other.config.hidden_size = 48
    with pytest.raises(RunError, match=r"32 wide, this one's are 48"):
        random_router(make_base()).probabilities(other, spaced(), [ASKED])


def test_a_router_of_another_base_is_refused(tmp_path: Path) -> None:
    random_router(make_base()).save(tmp_path / "router")
    assert Router.load(tmp_path / "router", "그 베이스").experts == EXPERTS
    with pytest.raises(RunError, match="another base"):
        Router.load(tmp_path / "router", "딴 베이스")


def test_a_router_saved_before_there_were_signs_says_what_it_said(tmp_path: Path) -> None:
    base = make_base()
    router = random_router(base)
    now = dict(router.tensors)
    now["rarity"][N_BUCKETS:] = 0.0
    now["calibration"] = now["calibration"][:1].repeat(N_MANNERS, 1)
    same = Router(router.kind, router.experts, router.width, router.base_hash, now)
    then = now | {"rarity": now["rarity"][:N_BUCKETS], "pieces": now["pieces"][:N_BUCKETS]}
    then["calibration"] = now["calibration"][0]
    same.save(tmp_path / "router")
    path = tmp_path / "router" / FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": PLAIN}))
    with pytest.raises(RunError, match=r"rarity is .*has \[65536\]"):
        Router.load(tmp_path / "router")
    save_file({name: tensor.contiguous() for name, tensor in then.items()}, tmp_path / "router" / WEIGHTS)
    asked = [ASKED, [Turn("user", "Who are you?")]]
    read = Router.load(tmp_path / "router").probabilities(base, spaced(), asked)
    assert torch.equal(read, same.probabilities(base, spaced(), asked))


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"there is no router"):
        Router.load(tmp_path / "없음")


DAMAGE = {
    "not json": (FACTS, b"{", "damaged"),
    "no version": (FACTS, b"{}", "damaged"),
    "a list": (FACTS, b"[1]", "damaged"),
    "weights cut off": (WEIGHTS, b"\x10\x00", "cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_told(case: str, tmp_path: Path) -> None:
    name, content, says = DAMAGE[case]
    random_router(make_base()).save(tmp_path / "router")
    (tmp_path / "router" / name).write_bytes(content)
    with pytest.raises(RunError, match=says):
        Router.load(tmp_path / "router")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("version", 99, "version 99"),
        ("experts", ["casual"], "damaged"),
        ("experts", ["casual", "polite"], r"pieces is torch.float32 \[\d+, 5\]; a router of 2 experts"),
        ("kind", "llm", "damaged"),
        ("width", "64", "damaged"),
        ("buckets", 5, "damaged"),
    ],
)
def test_facts_that_do_not_fit_are_told(key: str, value: Any, says: str, tmp_path: Path) -> None:
    random_router(make_base()).save(tmp_path / "router")
    path = tmp_path / "router" / FACTS
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(RunError, match=says):
        Router.load(tmp_path / "router")


def test_numbers_that_are_not_finite_are_told(tmp_path: Path) -> None:
    router = random_router(make_base())
    broken = {**router.tensors, "bias": torch.full((5,), torch.nan)}
    Router(router.kind, router.experts, router.width, "", broken).save(tmp_path / "router")
    with pytest.raises(RunError, match="bias holds numbers that are not finite"):
        Router.load(tmp_path / "router")


# Encoders


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """A tiny random encoder in a plain folder."""
    return Path(save_bert(tmp_path / "bert"))


def test_a_plain_folder_gives_averaged_states_of_length_1(bert: Path) -> None:
    encode, found = open_encoder(str(bert))
    vectors = encode(["말5 말6", "말7", "말5 " * 100])
    model = BertModel.from_pretrained(bert).eval()
    with torch.no_grad():
        mean = model(**spaced()(["말5 말6"], return_tensors="pt")).last_hidden_state.mean(1)[0]
    assert vectors.shape == (3, 16) and len(found) == 64
    assert torch.allclose(vectors[0], mean / mean.norm(), rtol=0, atol=1e-6)


def test_without_sentence_transformers_its_folders_are_refused(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bert / "modules.json").write_text("[]")
    monkeypatch.setattr(route_encoder, "find_spec", lambda name: None)
    with pytest.raises(BaseError, match=r"pip install sentence-transformers"):
        open_encoder(str(bert))


def test_with_sentence_transformers_it_opens_them(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Opened:
        def __init__(self, path: str, **options: Any) -> None:
            assert path == str(bert) and options["local_files_only"]

        def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
            return torch.full((len(texts), 4), 3.0)

    library = type(sys)("sentence_transformers")
    library.SentenceTransformer = Opened  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    monkeypatch.setattr(route_encoder, "find_spec", lambda name: object())
    (bert / "modules.json").write_text("[]")
    encode, _ = open_encoder(str(bert))
    assert encode(["가"]).tolist() == [[0.5] * 4]


def test_an_encoder_that_is_not_there_or_damaged_is_told(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseError, match="no such folder"):
        open_encoder(str(tmp_path / "없음"))
    (bert / "model.safetensors").write_bytes(b"x")
    with pytest.raises(BaseError, match="cannot be opened"):
        open_encoder(str(bert))
    (bert / "model.safetensors").unlink()
    with pytest.raises(BaseError, match="no safetensors"):
        open_encoder(str(bert))


# Decisions


def test_the_likeliest_answers() -> None:
    choice = choose([0.1, 0.6, 0.2, 0.1], EXPERTS)
    assert choice == Choice("polite", {"polite": 1.0}, 0.1, {"casual": 0.1, "polite": 0.6, "teacher": 0.2})


def test_what_fits_nobody_goes_to_the_base_or_the_default() -> None:
    row = [0.1, 0.2, 0.2, 0.5]
    assert choose(row, EXPERTS).expert is None
    assert choose(row, EXPERTS).weights == {"base": 1.0} and not choose(row, EXPERTS).fits
    assert choose(row, EXPERTS, default="teacher").expert == "teacher"
    assert choose(row, EXPERTS, default="teacher", top_k=2).weights == {"teacher": 1.0}


def test_an_expert_keeps_a_conversation_until_another_wins_by_the_margin() -> None:
    before = choose([0.7, 0.1, 0.1, 0.1], EXPERTS)
    assert choose([0.40, 0.45, 0.05, 0.1], EXPERTS, before=before, margin=0.1).expert == "casual"
    assert choose([0.30, 0.45, 0.15, 0.1], EXPERTS, before=before, margin=0.1).expert == "polite"
    assert choose([0.40, 0.05, 0.10, 0.45], EXPERTS, before=before, margin=0.1).expert == "casual"
    assert choose([0.40, 0.45, 0.05, 0.1], EXPERTS, before=before, margin=0.0).expert == "polite"


def test_nobody_keeps_a_conversation_too() -> None:
    before = choose([0.1, 0.1, 0.1, 0.7], EXPERTS, default="teacher")
    kept = choose([0.45, 0.1, 0.05, 0.4], EXPERTS, before=before, default="teacher")
    assert kept.expert == "teacher" and not kept.fits
    won = choose([0.6, 0.1, 0.1, 0.2], EXPERTS, before=before, default="teacher")
    assert won.expert == "casual" and won.fits


def test_an_expert_that_is_gone_keeps_nothing() -> None:
    before = Choice("옛날", {"옛날": 1.0}, 0.0, {"옛날": 1.0})
    assert choose([0.4, 0.45, 0.05, 0.1], EXPERTS, before=before).expert == "polite"


def test_several_answer_with_weights_that_sum_to_1() -> None:
    choice = choose([0.1, 0.6, 0.2, 0.1], EXPERTS, top_k=2)
    assert list(choice.weights) == ["polite", "teacher"]
    assert choice.weights["polite"] == pytest.approx(0.75) and sum(choice.weights.values()) == pytest.approx(1.0)
    assert len(choose([0.1, 0.6, 0.2, 0.1], EXPERTS, top_k=9).weights) == 3
    before = choose([0.9, 0.05, 0.0, 0.05], EXPERTS)
    kept = choose([0.40, 0.45, 0.05, 0.1], EXPERTS, before=before, top_k=2)
    assert list(kept.weights) == ["casual", "polite"] and kept.expert == "casual"


def test_what_cannot_be_decided_is_refused_all_at_once() -> None:
    with pytest.raises(InputError) as caught:
        choose([0.5, 0.5], EXPERTS, default="누구", top_k=0)
    assert [problem.where for problem in caught.value.problems] == ["row", "default", "top_k"]
