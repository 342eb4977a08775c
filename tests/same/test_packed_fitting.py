"""Adapters that learn side by side end with the numbers that each would have alone."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.many_world import SETUP, Listening, fit, going_on, member_of, some_talk
from tests.stacked_world import make_base, off
from toolkit.adapters.kinds import kind_of
from toolkit.fit.batches import Limits
from toolkit.fit.many import Setup, fit_many
from toolkit.fit.member import Member
from toolkit.stack.adapter import Adapter
from toolkit.stack.stack import Stack

KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4},
    "lora-stable": {"kind": "lora", "rank": 7, "rank_stabilised": True},
    "prefix": {"kind": "prefix", "tokens": 4},
    "reft": {"kind": "reft", "rank": 2},
    "embedding": {"kind": "embedding"},
}
VALID = some_talk(5, seed=9)


def apart(left: Adapter, right: Adapter) -> float:
    assert left.tensors.keys() == right.tensors.keys()
    return max(off(left.tensors[key], right.tensors[key]) for key in left.tensors)


def moved(member: Member, heard: Listening) -> float:
    return apart(member.adapter, heard.adapters[member.name])


def test_members_of_like_rows_have_the_bits_of_each_alone(tmp_path: Path) -> None:
    rows = some_talk(12, shortest=10, longest=10)
    valid = some_talk(4, seed=9, shortest=10, longest=10)
    members = [
        member_of("하나", rows=rows, valid=valid, learning_rate=1e-2),
        member_of("둘", {"kind": "lora", "rank": 4}, rows[::-1], valid, learning_rate=3e-3, seed=5),
        member_of("셋", rows=rows, valid=valid, learning_rate=2e-2, schedule="linear", max_grad_norm=0.1),
    ]
    together = fit(tmp_path / "all", members)
    for member in members:
        alone = fit(tmp_path / member.name, [member])
        assert moved(member, alone) > 1e-3
        assert apart(together.adapters[member.name], alone.adapters[member.name]) == 0
        assert together.looks_of(member.name) == alone.looks_of(member.name)


@pytest.mark.parametrize("kind", KINDS)
def test_among_all_kinds_each_is_as_alone_up_to_rounding(kind: str, tmp_path: Path) -> None:
    members = [
        member_of(name, options, some_talk(9 + i, seed=i), VALID, batch_size=2 + i, learning_rate=3e-3)
        for i, (name, options) in enumerate(KINDS.items())
    ]
    together = fit(tmp_path / "all", members, Setup(5, Limits(256, 4096), 0))
    (one,) = (member for member in members if member.name == kind)
    alone = fit(tmp_path / "alone", [one])
    assert moved(one, alone) > 1e-3
    assert (
        apart(together.adapters[kind], alone.adapters[kind]) < 3e-3 * one.plan.learning_rate * alone.fitted[kind].steps
    )
    assert together.looks_of(kind) == pytest.approx(alone.looks_of(kind), abs=1e-5)


@pytest.mark.parametrize("changed", ["rows", "rate", "token"])
def test_what_changes_one_member_changes_no_other(changed: str, tmp_path: Path) -> None:
    rows = some_talk(12, seed=3, shortest=10, longest=10)
    other = {"rows": some_talk(12, seed=4, shortest=10, longest=10), "rate": rows, "token": [*rows]}[changed]
    if changed == "token":
        ids, labels = rows[0]
        other[0] = ([*ids[:-1], 7], [*labels[:-1], 7])
    rate = 1e-2 * (1.001 if changed == "rate" else 1.0)
    still = member_of("그대로", rows=rows)
    before = fit(tmp_path / "before", [still, member_of("바뀐", rows=rows)])
    after = fit(tmp_path / "after", [still, member_of("바뀐", rows=other, learning_rate=rate)])
    assert apart(before.adapters["바뀐"], after.adapters["바뀐"]) > 1e-6
    assert apart(before.adapters["그대로"], after.adapters["그대로"]) == 0


def test_dropout_follows_from_the_members_own_seed(tmp_path: Path) -> None:
    rows = some_talk(8, shortest=10, longest=10)
    dropping = {"kind": "lora", "rank": 4, "dropout": 0.3}
    it = member_of("it", dropping, rows, seed=1)
    alone = fit(tmp_path / "alone", [it])
    among = fit(tmp_path / "among", [member_of("other", dropping, rows, seed=2), it])
    without = fit(tmp_path / "without", [member_of("it", {"kind": "lora", "rank": 4}, rows, seed=1)])
    assert apart(alone.adapters["it"], among.adapters["it"]) == 0
    assert apart(alone.adapters["it"], without.adapters["it"]) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_member_ends_where_plain_training_of_its_recipe_ends(kind: str, tmp_path: Path) -> None:
    """Against TRL and PEFT: the same rows in the same order, schedule, clipping and decay; rounding grows with the
    learning rate."""
    from rich.console import Console

    from toolkit.bundle import Run
    from toolkit.fit.display import Display
    from toolkit.fit.one import Job, fit_one
    from toolkit.track import open_track

    rows = some_talk(22, seed=6)
    member = member_of(
        kind, KINDS[kind], rows, max_steps=24, learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5, seed=3
    )
    heard = fit(tmp_path / "many", [member_of("neighbour", KINDS["lora"], some_talk(7), max_steps=30), member])
    base, recipe = make_base(), member.recipe
    model = kind_of(recipe.adapter).attach(base, recipe.adapter, seed=3, token_ids=list(range(5, 60)))
    run = Run(tmp_path / "one")
    run.path.mkdir()

    class Tokens:
        pad_token_id, eos_token_id, eos_token, pad_token = 0, 2, "<e>", "<p>"

    track = open_track(run.path, (), {}, 0, print)
    job = Job(recipe, member.plan, model, _tokenizer(), rows, None, run, track)
    fit_one(job, lambda total: Display(Console(quiet=True), total, is_quiet=True))
    folder = tmp_path / "saved"
    folder.mkdir()
    kind_of(recipe.adapter).save(model, folder)
    from toolkit.stack.adapter import read_adapter

    plain = read_adapter(folder, make_base())
    assert moved(member, heard) > 3e-3
    assert apart(plain, heard.adapters[kind]) < 0.02 * member.plan.learning_rate * 24


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<p>", "<b>", "<e>", *(f"말{i}" for i in range(93))])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<p>")), pad_token="<p>", bos_token="<b>", eos_token="<e>"
    )


# Stopped and gone on


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_stack_that_was_stopped_ends_with_the_same_bits(after: int, tmp_path: Path) -> None:
    members = [
        member_of("lora", {"kind": "lora", "rank": 4, "dropout": 0.2}, some_talk(12), VALID),
        member_of("prefix", KINDS["prefix"], some_talk(9, seed=2), VALID, epochs=3.0),
        member_of("reft", KINDS["reft"], some_talk(10, seed=4), VALID, schedule="linear"),
        member_of("words", KINDS["embedding"], some_talk(10, seed=5), VALID, batch_size=3),
    ]
    whole = fit(tmp_path / "whole", members)
    place = tmp_path / "cut"
    first = fit(place, members, stop_after=after)
    rest = [member for member in going_on(place, members) if member.name not in first.adapters]
    second = fit(place, rest)
    ended = {**first.adapters, **second.adapters}
    assert ended.keys() == whole.adapters.keys() and len(first.adapters) < 4
    for name, adapter in whole.adapters.items():
        assert apart(adapter, ended[name]) == 0
        assert [*first.looks_of(name), *second.looks_of(name)] == whole.looks_of(name)
        fitted = {**first.fitted, **second.fitted}[name]
        assert (fitted.best_step, fitted.steps) == (whole.fitted[name].best_step, whole.fitted[name].steps)


def test_the_newest_checkpoint_counts_after_a_second_stop(tmp_path: Path) -> None:
    members = [member_of("it", valid=VALID)]
    whole = fit(tmp_path / "whole", members)
    place = tmp_path / "cut"
    fit(place, members, stop_after=2)
    fit(place, going_on(place, members), stop_after=2)
    last = fit(place, going_on(place, members))
    assert len(last.losses["it"]) == whole.fitted["it"].steps - 4
    assert apart(whole.adapters["it"], last.adapters["it"]) == 0


# Memory


def test_what_memory_does_not_hold_is_done_in_smaller_batches_and_fewer_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [member_of(f"m{i}", rows=some_talk(8, seed=i), valid=VALID) for i in range(4)]
    roomy = fit(tmp_path / "roomy", members)
    held: list[int] = []
    call = Stack.__call__

    def scarce(self: Stack, ids: Any, *given: Any, **more: Any) -> Any:
        held.append(len(self.slots))
        if ids.numel() > 30 or len(self.slots) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(self, ids, *given, **more)

    monkeypatch.setattr(Stack, "__call__", scarce)
    tight = fit(tmp_path / "tight", members)
    assert max(held) == 4 and held[-1] <= 2
    assert not tight.reasons
    for member in members:
        assert apart(roomy.adapters[member.name], tight.adapters[member.name]) < 1e-4
        assert tight.looks_of(member.name) == pytest.approx(roomy.looks_of(member.name), abs=1e-5)


def test_one_that_memory_does_not_hold_alone_says_so_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = Stack.__call__

    def scarce(self: Stack, ids: Any, *given: Any, **more: Any) -> Any:
        if ids.shape[1] > 14:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return call(self, ids, *given, **more)

    monkeypatch.setattr(Stack, "__call__", scarce)
    long = member_of("긴말", rows=some_talk(4, shortest=20, longest=20))
    heard = fit(tmp_path, [member_of("짧은말"), long, member_of("다음")])
    assert set(heard.adapters) == {"짧은말", "다음"}
    assert "20 tokens" in heard.reasons["긴말"] and "train.max_length" in heard.reasons["긴말"]


def test_one_for_whose_moments_there_is_no_room_waits_for_another_to_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [member_of(f"m{i}", rows=some_talk(8, seed=i), valid=VALID) for i in range(3)]
    roomy = fit(tmp_path / "roomy", members)
    add = Stack.add

    def scarce(self: Stack, name: str, *given: Any, **more: Any) -> int:
        slot = add(self, name, *given, **more)
        if len(self.slots) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return slot

    monkeypatch.setattr(Stack, "add", scarce)
    tight = fit(tmp_path / "tight", members)
    assert not tight.reasons and {len(names) for names in tight.together} == {1}
    for member in members:
        assert apart(roomy.adapters[member.name], tight.adapters[member.name]) < 1e-4


def test_one_that_finds_no_room_even_alone_fails_and_the_rest_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = Stack.add

    def scarce(self: Stack, name: str, *given: Any, **more: Any) -> int:
        slot = add(self, name, *given, **more)
        if name == "wide":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return slot

    monkeypatch.setattr(Stack, "add", scarce)
    heard = fit(tmp_path, [member_of("wide"), member_of("다음")], Setup(1, Limits(256, 4096), 0))
    assert set(heard.adapters) == {"다음"} and "smaller" in heard.reasons["wide"]


def test_numbers_that_run_away_stay_with_their_owner(tmp_path: Path) -> None:
    rows = some_talk(12, shortest=10, longest=10)
    calm = member_of("calm", rows=rows)
    wild = member_of("wild", rows=rows, learning_rate=50.0, max_grad_norm=None)
    wild.adapter.tensors  # noqa: B018  (it starts as any other)
    with torch.no_grad():
        next(iter(wild.adapter.tensors.values())).fill_(1e30)
    alone = fit(tmp_path / "alone", [calm])
    heard = fit(tmp_path / "both", [wild, calm])
    assert "train.learning_rate" in heard.reasons["wild"]
    assert apart(alone.adapters["calm"], heard.adapters["calm"]) == 0


def test_the_base_is_as_it_was(tmp_path: Path) -> None:
    base = make_base()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    ids = torch.arange(5, 20)[None]
    with torch.no_grad():
        said = base(ids).logits
        stack = Stack(base)
        fit_many(stack, Listening([member_of("it"), member_of("p", KINDS["prefix"])]), SETUP, tmp_path)
        assert not stack.slots
        assert torch.equal(base(ids).logits, said)
    assert all(torch.equal(before[name], tensor) for name, tensor in base.state_dict().items())
