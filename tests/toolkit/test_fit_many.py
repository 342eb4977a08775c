"""Who learns when: places are filled, left and filled again; patience, pruning and evaluations are each one's own."""

from pathlib import Path

import pytest
import torch

from tests.many_world import fit, member_of, some_talk
from toolkit.errors import TrainingError
from toolkit.fit.batches import Limits, Share, micro_batches, n_supervised
from toolkit.fit.many import Setup

VALID = some_talk(5, seed=9)


def test_a_place_that_becomes_free_is_filled_at_once(tmp_path: Path) -> None:
    members = [member_of(f"말{i}", rows=some_talk(4 * (i + 1)), epochs=1.0) for i in range(4)]
    heard = fit(tmp_path, members, Setup(2, Limits(256, 4096), 0))
    assert heard.together == [
        ("말0", "말1"), ("말1", "말2"), ("말2", "말3"), ("말2", "말3"), ("말3",), ("말3",)
    ]  # fmt: skip
    assert all(heard.fitted[f"말{i}"].stopped == "done" and heard.fitted[f"말{i}"].steps == i + 1 for i in range(4))


def test_one_that_is_pruned_takes_no_step_more_and_keeps_its_best(tmp_path: Path) -> None:
    members = [member_of(name, rows=some_talk(16), valid=VALID, epochs=1.0, evaluate_every=0.25) for name in "ab"]
    heard = fit(tmp_path, members, prune={"a": 2})
    assert heard.fitted["a"].stopped == "pruned" and heard.fitted["a"].steps == 2
    assert heard.fitted["b"].stopped == "done" and heard.fitted["b"].steps == 4
    assert len(heard.looks_of("a")) == 2 and len(heard.looks_of("b")) == 4
    assert "a" in heard.adapters


def test_one_that_is_done_anyway_is_not_pruned_at_its_last_evaluation(tmp_path: Path) -> None:
    heard = fit(
        tmp_path, [member_of("a", rows=some_talk(16), valid=VALID, epochs=1.0, evaluate_every=0.25)], prune={"a": 4}
    )
    assert heard.fitted["a"].stopped == "done" and heard.fitted["a"].steps == 4


def test_the_crew_is_heard_of_between_forward_passes(tmp_path: Path) -> None:
    heard = fit(tmp_path, [member_of("a", rows=some_talk(16), valid=VALID)], Setup(1, Limits(30, 4096), 0))
    assert heard.n_alive > 2 * len(heard.together)


def test_patience_is_each_members_own(tmp_path: Path) -> None:
    hasty = member_of("hasty", valid=VALID, epochs=20.0, learning_rate=0.2, early_stop_patience=1)
    patient = member_of("patient", valid=VALID, epochs=20.0, learning_rate=0.2, early_stop_patience=3)
    heard = fit(tmp_path, [hasty, patient])
    assert heard.fitted["hasty"].stopped == heard.fitted["patient"].stopped == "early"
    assert heard.fitted["hasty"].steps < heard.fitted["patient"].steps
    losses = heard.looks_of("hasty")
    assert losses[-1] >= min(losses[:-1]) and heard.fitted["hasty"].best_loss == min(losses)


def test_the_best_tensors_leave_not_the_last(tmp_path: Path) -> None:
    it = member_of("it", valid=VALID, epochs=12.0, learning_rate=0.2)
    heard = fit(tmp_path, [it])
    best = heard.fitted["it"].best_step
    assert best is not None and best < heard.fitted["it"].steps
    short = member_of("it", valid=VALID, epochs=12.0, learning_rate=0.2)
    again = fit(tmp_path / "again", [short], prune={"it": heard.looks_of("it").index(min(heard.looks_of("it"))) + 1})
    tensors = heard.adapters["it"].tensors
    assert all(torch.equal(tensors[key], again.adapters["it"].tensors[key]) for key in tensors)


def test_without_held_out_rows_nothing_is_measured_and_the_last_tensors_leave(tmp_path: Path) -> None:
    heard = fit(tmp_path, [member_of("it", early_stop_patience=1)])
    assert heard.looks == [] and heard.fitted["it"].best_step is None and heard.fitted["it"].steps == 6


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    from dataclasses import replace

    member = member_of("it", valid=VALID)
    fit(tmp_path, [member], stop_after=2)
    (saved,) = tmp_path.glob("stack-*/it")
    (saved / "learner.safetensors").write_bytes(b"half")
    with pytest.raises(TrainingError, match=r"it: damaged .*--fresh"):
        fit(tmp_path, [replace(member, continues=saved)])


def test_a_torn_checkpoint_does_not_count(tmp_path: Path) -> None:
    from toolkit.fit.many import find_saved

    fit(tmp_path, [member_of("it", valid=VALID)], stop_after=2)
    assert find_saved(tmp_path, "it") is not None and find_saved(tmp_path, "다른") is None
    (whole,) = tmp_path.glob("stack-*")
    (whole / "it" / "learner.safetensors").write_bytes(b"half")
    assert find_saved(tmp_path, "it") is None


# Batches


def test_every_row_is_in_one_batch_within_the_limits_and_loses_nothing() -> None:
    shares = [
        Share(0, some_talk(9), True),
        Share(3, some_talk(4, seed=1, longest=30), False),
        Share(1, some_talk(1, seed=2), True),
        Share(2, some_talk(6, seed=3), False),
    ]
    limits = Limits(64, 40)
    batches = list(micro_batches(shares, limits, 0, torch.device("cpu")))
    assert len(batches) > 4
    learned = [0] * 4
    for batch in batches:
        assert batch.input_ids_BT.numel() <= 64 and len(batch.targets_N) <= 40
        assert len(batch.owners) == len(batch.input_ids_BT)
        kinds = {shares[number].packing for number in batch.share_N.tolist()}
        assert kinds == {"position_ids" in batch.extra}
        for number in batch.share_N.tolist():
            learned[number] += 1
        assert torch.equal(batch.input_ids_BT.roll(-1, 1)[batch.keep_BT], batch.targets_N)
    assert learned == [n_supervised(share.rows) for share in shares]


def test_a_row_longer_than_the_limit_stands_alone() -> None:
    shares = [Share(0, [*some_talk(2), *some_talk(1, shortest=50, longest=50)], True)]
    batches = list(micro_batches(shares, Limits(20, 4096), 0, torch.device("cpu")))
    assert [batch.input_ids_BT.shape[1] for batch in batches].count(50) == len(batches)
    assert sum(len(batch.targets_N) for batch in batches) == n_supervised(shares[0].rows)
