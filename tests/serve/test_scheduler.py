"""Whose turn it is, without a model: admission, chunks, and that the policy knows nothing of tensors."""

import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from serve.scheduler import PATIENCE, Limits, Scheduler, Ticket


def scheduler(**limits: int) -> Scheduler:
    return Scheduler(Limits(**limits))


def join(one: Scheduler, *tickets: Ticket) -> Sequence[Ticket]:
    for ticket in tickets:
        one.join(ticket)
    return tickets


def ticket(model: str = "casual", n_prompt: int = 10, n_columns: int = 20, is_alone: bool = False) -> Ticket:
    return Ticket(model, n_prompt, n_columns, is_alone)


def run(one: Scheduler) -> list[tuple[Ticket, int]]:
    """One step, as an engine would obey it; what was read."""
    one.admit()
    step = one.step()
    for read, n_tokens in step.reading:
        read.n_read += n_tokens
    return list(step.reading)


def test_it_loads_no_torch() -> None:
    code = "import sys, serve.scheduler; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "False"


def test_slots_bound_who_runs_and_the_queue_who_waits() -> None:
    one = scheduler(n_slots=2, n_queue=3)
    join(one, *(ticket() for _ in range(4)))
    assert not one.is_full() and one.is_full(n_coming=1)
    join(one, ticket())
    assert one.is_full() and len(one.admit()) == 2
    assert one.is_full() and (len(one.running), len(one.waiting)) == (2, 3)
    one.leave(one.waiting[0])
    assert not one.is_full()


def test_when_to_come_again_follows_the_queue_and_the_pace_and_stays_from_1_to_60() -> None:
    one = scheduler(n_slots=1)
    assert one.retry_after_s() == 2
    join(one, *(ticket() for _ in range(4)))
    assert one.retry_after_s() == 10 and one.retry_after_s(n_coming=1) == 12
    for _ in range(50):
        one.leave(ticket(), took_s=1e3)
    assert one.retry_after_s() == 60
    for _ in range(100):
        one.leave(ticket(), took_s=0.0)
    assert one.retry_after_s() == 1


def test_the_first_to_come_is_the_first_to_run() -> None:
    one = scheduler(n_slots=3)
    tickets = join(one, *(ticket() for _ in range(5)))
    assert one.admit() == (tickets[0], tickets[1], tickets[2])


def test_a_free_slot_goes_to_the_model_with_the_fewest_answers() -> None:
    one = scheduler(n_slots=3)
    crowd = join(one, *(ticket("casual") for _ in range(6)))
    late = join(one, ticket("polite"), ticket("polite"))
    assert [t.model for t in one.admit()] == ["casual", "polite", "casual"]
    one.leave(crowd[0])
    assert one.admit() == (late[1],)


def test_whoever_has_nothing_running_comes_before_whose_turn_is_longer_ago() -> None:
    one = scheduler(n_slots=3)
    join(one, ticket("casual"), ticket("casual"))
    one.admit()
    polite = join(one, ticket("polite"))
    one.admit()
    one.leave(polite[0])
    late = join(one, ticket("casual"), ticket("polite"))
    assert one.admit() == (late[1],)


def test_one_slot_is_shared_by_turns() -> None:
    one = scheduler(n_slots=1)
    join(one, *(ticket("casual") for _ in range(3)), *(ticket("polite") for _ in range(3)))
    order = []
    while admitted := one.admit():
        order.append(admitted[0].model)
        one.leave(admitted[0])
    assert order == ["casual", "polite"] * 3


def test_the_cache_is_not_promised_twice() -> None:
    one = scheduler(n_slots=8, n_cells=100)
    join(one, *(ticket(n_columns=30) for _ in range(5)))
    assert len(one.admit()) == 3  # 3 rows of 30; a fourth would need 120


def test_a_request_larger_than_the_cache_runs_by_itself() -> None:
    one = scheduler(n_slots=8, n_cells=100)
    huge = join(one, ticket(n_columns=1000))[0]
    assert one.admit() == (huge,)
    join(one, ticket(n_columns=1))
    assert one.admit() == ()


def test_what_fits_overtakes_what_does_not_but_not_for_ever() -> None:
    one = scheduler(n_slots=4, n_cells=100)
    running = list(join(one, ticket(n_columns=40)))
    one.admit()
    large = join(one, ticket("polite", n_columns=90))[0]
    n_passed = 0
    for _ in range(2 * PATIENCE):
        join(one, ticket(n_columns=40))
        admitted = one.admit()
        if large in admitted:
            break
        one.leave(running.pop(0))
        running += admitted
        n_passed += len(admitted)
        if not running:
            break
    assert n_passed == PATIENCE and one.admit() == (large,)


def test_a_prompt_is_read_once_and_whole_and_then_written() -> None:
    one = scheduler(chunk=16, small_chunk=8)
    long = join(one, ticket(n_prompt=50))[0]
    widths = [read[0][1] for read in iter(lambda: run(one), [])]
    assert sum(widths) == 50 and max(widths) == 16 and one.step().writing == (long,)


def test_a_chunk_is_small_while_most_are_writing() -> None:
    one = scheduler(chunk=64, small_chunk=8)
    join(one, ticket(n_prompt=2), ticket(n_prompt=2))
    run(one)
    join(one, ticket(n_prompt=100))
    assert [n_tokens for _, n_tokens in run(one)] == [8]
    join(one, ticket(n_prompt=100), ticket(n_prompt=100))
    assert sum(n_tokens for _, n_tokens in run(one)) > 8


def test_prompts_of_like_length_are_read_in_one_chunk() -> None:
    one = scheduler(chunk=64)
    join(one, *(ticket(n_prompt=n) for n in (15, 16, 16, 14, 16)))
    assert sorted(n_tokens for _, n_tokens in run(one)) == [14, 15, 16, 16]


@pytest.mark.parametrize("lengths", [(1, 64), (1, 1, 1, 200), (3, 40, 5, 60, 7), (64, 1, 64, 1)])
def test_less_than_half_of_a_chunk_is_padding(lengths: tuple[int, ...]) -> None:
    one = scheduler(chunk=64)
    join(one, *(ticket(n_prompt=n) for n in lengths))
    n_read = 0
    while chunk := [n_tokens for _, n_tokens in run(one)]:
        assert 2 * sum(chunk) > max(chunk) * len(chunk)
        n_read += sum(chunk)
    assert n_read == sum(lengths)


def test_short_prompts_do_not_wait_for_a_long_one_and_do_not_starve_it() -> None:
    one = scheduler(chunk=32, small_chunk=32)
    long = join(one, ticket(n_prompt=3200))[0]
    run(one)
    waits = []
    for _ in range(60):
        short = join(one, ticket(n_prompt=20))[0]
        n_steps = 0
        while short.n_left:
            run(one)
            n_steps += 1
        waits.append(n_steps)
        one.leave(short)
    assert max(waits) <= 2 and long.n_read >= 50 * 32


def test_answers_on_models_of_their_own_take_turns() -> None:
    one = scheduler()
    tickets = join(one, *(ticket(is_alone=True, n_columns=10**9) for _ in range(3)))
    one.admit()
    assert {one.step().alone for _ in range(3)} == set(tickets)
    assert one.step().writing == one.step().reading == ()


@pytest.mark.parametrize("seed", range(5))
def test_whatever_comes_and_goes_everybody_is_served_within_the_limits(seed: int) -> None:
    dice = random.Random(seed)
    one = scheduler(n_slots=4, n_queue=20, n_cells=400, chunk=32, small_chunk=8)
    written: dict[Ticket, int] = {}
    n_joined = n_over = 0
    for _ in range(20_000):
        if n_joined < 300 and not one.is_full():
            n_prompt = dice.choice([1, 5, 30, 200])
            join(one, ticket(dice.choice("abc"), n_prompt, n_prompt + 10, dice.random() < 0.1))
            n_joined += 1
        one.admit()
        step = one.step()
        assert len(one.running) <= 4 and len({id(t) for t in one.running}) == len(one.running)
        rows = [t.n_columns for t in one.running if not t.is_alone]
        assert len(rows) <= 1 or len(rows) * max(rows) <= 400
        width = max((n for _, n in step.reading), default=0)
        assert len(step.reading) * width <= 32 and all(0 < n <= t.n_left for t, n in step.reading)
        for t, n_tokens in step.reading:
            t.n_read += n_tokens
        for t in (*step.writing, *([step.alone] if step.alone else [])):
            written[t] = written.get(t, 0) + 1
            if written[t] == 10 or dice.random() < 0.02:
                one.leave(t)
                n_over += 1
        if n_joined == 300 and not one.running and not one.waiting:
            break
    assert n_over == n_joined == 300


def team(n_rows: int, n_prompt: int = 10, n_columns: int = 20) -> Ticket:
    return Ticket("mix", n_prompt, n_columns, n_rows=n_rows)


def test_a_team_takes_as_many_slots_as_it_has_rows_or_none() -> None:
    one = scheduler(n_slots=4)
    join(one, ticket(), ticket())
    pair = join(one, team(2))[0]
    assert len(one.admit()) == 3 and one.n_rows == 4
    late = join(one, team(3))[0]
    one.leave(pair)
    assert one.admit() == ()
    one.leave(one.running[0])
    assert one.admit() == (late,)


def test_a_team_that_waits_for_slots_is_overtaken_but_not_for_ever() -> None:
    one = scheduler(n_slots=3, n_queue=1000)
    running = list(join(one, ticket("a"), ticket("b")))
    one.admit()
    large = join(one, team(3))[0]
    for n_passed in range(3 * PATIENCE):
        join(one, ticket(f"model {n_passed}"))
        admitted = one.admit()
        if large in admitted:
            break
        running += admitted
        one.leave(running.pop(0))
    assert large in one.running and n_passed <= 2 * PATIENCE


def test_a_team_larger_than_everything_runs_by_itself() -> None:
    one = scheduler(n_slots=2, n_cells=100)
    large = join(one, team(5, n_columns=1000))[0]
    assert one.admit() == (large,)
    join(one, ticket())
    assert one.admit() == ()
    one.leave(large)
    assert len(one.admit()) == 1


def test_memory_is_counted_by_rows() -> None:
    one = scheduler(n_slots=9, n_cells=100)
    join(one, team(3, n_columns=30))
    one.admit()
    join(one, ticket(n_columns=30))
    assert one.admit() == ()


def test_a_slot_that_a_team_needs_no_more_is_free() -> None:
    one = scheduler(n_slots=3)
    pair = join(one, team(3))[0]
    one.admit()
    join(one, ticket())
    assert one.admit() == ()
    pair.n_rows -= 1
    assert len(one.admit()) == 1


def test_a_chunk_counts_every_row_of_a_team() -> None:
    one = scheduler(chunk=64, small_chunk=64)
    join(one, team(4, n_prompt=200), ticket(n_prompt=200))
    assert all(sum(read.n_rows * n_tokens for read, n_tokens in run(one)) <= 64 for _ in range(5))
    wide = scheduler(chunk=4, small_chunk=4)
    join(wide, team(9, n_prompt=2))
    assert [n_tokens for _, n_tokens in run(wide)] == [1]
