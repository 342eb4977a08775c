"""Row slots against the plainest model of them: a list of numbers per row."""

import random

import pytest
import torch
from torch import Tensor

from serve.cache import BLOCK, Frame, SlotCache

N_LAYERS, HEADS, WIDTH = 2, 2, 3
CPU = torch.device("cpu")


def heads(values_RT: list[list[float]]) -> Tensor:
    """Keys [R, H, T, D] that carry a number per token."""
    one = torch.tensor(values_RT)[:, None, :, None]
    return one.expand(-1, HEADS, -1, WIDTH) + torch.arange(HEADS)[:, None, None] * 0.5


class Model:
    """What a forward pass does with the cache: every layer writes, and reads what it may see."""

    def __init__(self) -> None:
        self.cache = SlotCache(N_LAYERS, CPU)
        self.texts: dict[int, list[float]] = {}
        self._count = 0.0

    def start(self, slot: int, n_prefix: int = 0) -> None:
        own = self._numbers(n_prefix)
        held = [(heads([own])[0] + layer, -heads([own])[0] - layer) for layer in range(N_LAYERS)] if own else []
        self.cache.start(slot, held)
        self.texts[slot] = own

    def run(self, slots: list[int], counts: list[int], *, breaks: bool = False) -> Frame:
        """Write, then check that each row sees its own text and nothing else."""
        frame = self.cache.enter(slots, counts)
        new = [self._numbers(count) for count in counts]
        padded = [own + [9e9] * (max(counts) - len(own)) for own in new]
        mask_RTS = frame.mask(torch.float32)[:, 0]
        for layer in range(N_LAYERS):
            keys, values = self.cache.update(heads(padded) + layer, -heads(padded) - layer, layer)
            for row, (slot, own) in enumerate(zip(slots, new, strict=True)):
                text = self.texts[slot] + own
                for place in range(len(own)):
                    seen = keys[row][:, mask_RTS[row, place] == 0]
                    wanted = heads([text[: len(text) - len(own) + place + 1]])[0] + layer
                    assert torch.equal(seen, wanted) and torch.equal(values[row][:, mask_RTS[row, place] == 0], -wanted)
        if not breaks:
            self.cache.advance(frame)
            for slot, own in zip(slots, new, strict=True):
                self.texts[slot] += own
        return frame

    def _numbers(self, count: int) -> list[float]:
        self._count += count
        return [self._count - count + place for place in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_rows_do_each_sees_its_own_text_and_nothing_else(seed: int) -> None:
    dice, model = random.Random(seed), Model()
    for _ in range(120):
        free = next(slot for slot in range(99) if slot not in model.texts)
        act = dice.random()
        if not model.texts or act < 0.2:
            model.start(free, dice.choice([0, 0, 2, 5]))
        elif act < 0.3:
            gone = dice.choice(list(model.texts))
            model.cache.clear(gone)
            del model.texts[gone]
        elif act < 0.45:
            one, other = dice.choice(list(model.texts)), dice.randrange(len(model.texts) + 2)
            model.cache.swap(one, other)
            if one != other:
                moved = {one: model.texts.pop(other, None), other: model.texts.pop(one, None)}
                model.texts |= {slot: text for slot, text in moved.items() if text is not None}
        else:
            slots = dice.sample(list(model.texts), dice.randint(1, len(model.texts)))
            slots = sorted(slots) if dice.random() < 0.7 else slots
            counts = [dice.choice([1, 1, 1, 4, 9]) if act < 0.7 else 1 for _ in slots]
            model.run(slots, counts, breaks=dice.random() < 0.2)
        assert all(model.cache.length(slot) == len(text) for slot, text in model.texts.items())


def test_positions_count_the_prefix_and_padding_stays_inside_the_row() -> None:
    model = Model()
    model.start(0, n_prefix=3)
    model.start(1)
    frame = model.run([0, 1], [4, 2])
    assert frame.positions_RT.tolist() == [[3, 4, 5, 6], [0, 1, 1, 1]]
    assert model.run([0, 1], [1, 1]).positions_RT.tolist() == [[7], [2]]


def test_a_sliding_layer_sees_its_window() -> None:
    model = Model()
    model.start(0)
    frame = model.run([0], [6])
    seen = (frame.mask(torch.float32, window=3)[0, 0] == 0).int().tolist()
    assert seen == [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0],
                    [0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0], [0, 0, 0, 1, 1, 1]]  # fmt: skip
    one = model.run([0], [1])
    assert (one.mask(torch.float32, window=3)[0, 0] == 0).int().tolist() == [[0, 0, 0, 0, 1, 1, 1]]


def test_rows_side_by_side_are_read_where_they_lie_and_others_are_copied() -> None:
    model = Model()
    for slot in range(3):
        model.start(slot)
    model.run([0, 1, 2], [5, 5, 5])
    held = model.cache.layers[0].keys
    assert held is not None
    for slots, is_view in (([1, 2], True), ([0], True), ([0, 2], False), ([2, 1], False)):
        frame = model.cache.enter(slots, [1] * len(slots))
        keys, _ = model.cache.update(heads([[1.0]] * len(slots)), heads([[1.0]] * len(slots)), 0)
        assert (keys.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()) is is_view
        model.cache.advance(frame)


def test_nothing_of_a_row_stays_in_a_slot_that_was_cleared() -> None:
    model = Model()
    model.start(0)
    model.cache.advance(model.cache.enter([0], [2]))
    frame = model.cache.enter([0], [3])
    nan = torch.full((1, HEADS, 3, WIDTH), float("nan"))
    for layer in range(N_LAYERS):
        model.cache.update(nan, nan, layer)
    del frame  # the pass broke; its columns were written
    model.cache.clear(0)
    assert all(bool((tensor == 0).all()) for layer in model.cache.layers for tensor in (layer.keys, layer.values))


def test_memory_grows_in_blocks_and_is_given_back() -> None:
    model = Model()
    assert model.cache.n_bytes == 0
    model.start(0)
    model.run([0], [BLOCK + 1])
    per_cell = 2 * N_LAYERS * HEADS * WIDTH * 4
    assert model.cache.n_bytes == 2 * BLOCK * per_cell
    for slot in range(1, 20):
        model.start(slot)
    model.run([0], [1])
    assert model.cache.n_bytes <= 28 * 2 * BLOCK * per_cell
    model.cache.reset()
    assert model.cache.n_bytes == 0
    model.texts.clear()
    model.start(3, n_prefix=2)
    model.run([3], [4])


def test_writing_outside_a_pass_is_an_error() -> None:
    cache = SlotCache(1, CPU)
    cache.start(0)
    cache.advance(cache.enter([0], [1]))
    with pytest.raises(RuntimeError, match="enter"):
        cache.update(heads([[1.0]]), heads([[1.0]]), 0)
