"""The order of training data: a function of its numbers, each item once per epoch, none for two microbatches."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgen.errors import UserError
from streamgen_train.videos.order import Order, Slot, bucket_turn, shuffled


def items(order: Order, step: int, microbatch: int, count: int) -> list[tuple[int, int]]:
    """(bucket, item) of a batch."""
    return [(s.bucket, order.item(s.bucket, s.position)) for s in order.slots(step, microbatch, count)]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 3))
def test_buckets_take_turns_in_exact_proportion(sizes: list[int], rounds: int) -> None:
    total = sum(sizes)
    turns = [bucket_turn(step, sizes) for step in range(total * (rounds + 1))]
    assert Counter(bucket for bucket, _ in turns) == {b: n * (rounds + 1) for b, n in enumerate(sizes)}
    for bucket, size in enumerate(sizes):
        own = [(step, turn) for step, (b, turn) in enumerate(turns) if b == bucket]
        assert [turn for _, turn in own] == list(range(size * (rounds + 1)))
        gaps = [after - before for (before, _), (after, _) in pairwise(own)]
        assert max(gaps, default=1) <= 2 * -(-total // size) + len(sizes)  # spread, not in runs


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 2**64 - 1),
)
def test_every_item_comes_once_per_epoch(sizes: list[int], microbatches: int, count: int, seed: int) -> None:
    """sum(sizes) steps are microbatches * count epochs of every bucket, whatever the sizes."""
    order = Order(tuple(sizes), seed, microbatches)
    rows: dict[int, list[int]] = {bucket: [] for bucket in range(len(sizes))}
    for step in range(sum(sizes)):
        batch = [pick for micro in range(microbatches) for pick in items(order, step, micro, count)]
        assert len({bucket for bucket, _ in batch}) == 1
        for bucket, item in batch:
            rows[bucket].append(item)
    for bucket, size in enumerate(sizes):
        assert len(rows[bucket]) == size * microbatches * count
        for start in range(0, len(rows[bucket]), size):
            assert sorted(rows[bucket][start : start + size]) == list(range(size))


@pytest.mark.parametrize(("size", "microbatches", "count"), [(24, 2, 3), (25, 2, 3), (100, 4, 2)])
def test_no_item_for_two_microbatches_within_an_epoch(size: int, microbatches: int, count: int) -> None:
    order = Order((size,), 7, microbatches)
    seen: dict[int, dict[int, set[int]]] = {}  # epoch -> microbatch -> items
    for step in range(3 * size // (microbatches * count)):
        for micro in range(microbatches):
            for slot in order.slots(step, micro, count):
                epoch = seen.setdefault(slot.position // size, {})
                epoch.setdefault(micro, set()).add(order.item(0, slot.position))
    assert len(seen) >= 2
    for epoch in seen.values():
        assert len(epoch) == microbatches
        assert sum(map(len, epoch.values())) == len(set().union(*epoch.values()))


def test_a_bucket_smaller_than_a_step() -> None:
    """Its items come again within the step, after all others came."""
    order = Order((3,), 0, 2)
    step = items(order, 0, 0, 2) + items(order, 0, 1, 2)
    assert sorted(item for _, item in step[:3]) == [0, 1, 2]


def test_the_order_is_a_pure_function() -> None:
    one = Order((17, 5), 3, 2)
    asked = [(step, micro) for step in range(40) for micro in range(2)]
    forward = {key: items(one, *key, 3) for key in asked}
    other = Order((17, 5), 3, 2)
    shuffled.cache_clear()
    assert {key: items(other, *key, 3) for key in reversed(asked)} == forward
    assert items(Order((17, 5), 4, 2), 0, 0, 3) != forward[0, 0]
    far = items(one, 10**12, 1, 3)
    assert far == items(other, 10**12, 1, 3) and all(0 <= item < 17 for _, item in far)


def test_a_known_order() -> None:
    """Runs go on with these numbers after an update: they must never change."""
    assert shuffled(0, 0, 0, 8).tolist() == KNOWN[0]
    assert shuffled(2**64 - 1, 3, 5, 8).tolist() == KNOWN[1]
    assert [Order((9,), 11, 1).draw(Slot(0, position, 1), 1000) for position in range(4)] == KNOWN[2]


KNOWN = [[2, 4, 0, 7, 5, 6, 3, 1], [5, 0, 7, 6, 3, 1, 2, 4], [767, 401, 259, 372]]


def test_epochs_buckets_and_seeds_are_shuffled_anew_and_evenly() -> None:
    orders = [tuple(shuffled(seed, bucket, epoch, 50)) for seed in (0, 1) for bucket in (0, 1) for epoch in range(3)]
    assert len(set(orders)) == len(orders)
    first = np.bincount([int(shuffled(0, 0, epoch, 10)[0]) for epoch in range(2000)], minlength=10)
    assert ((first - 200) ** 2 / 200).sum() < 27.9  # chi square, 9 degrees of freedom, 0.1 %


def test_draws_belong_to_the_slot() -> None:
    order = Order((9,), 0, 1)
    draws = [order.draw(Slot(0, position, 1), 10) for position in range(2000)]
    assert draws == [order.draw(Slot(0, position, 5), 10) for position in range(2000)]
    counts = np.bincount(draws, minlength=10)
    assert len(counts) == 10 and ((counts - 200) ** 2 / 200).sum() < 27.9
    assert order.draw(Slot(0, 2**32 + 1, 1), 10**9) != order.draw(Slot(0, 1, 1), 10**9)
    assert order.draw(Slot(0, 4, 1), 1) == 0


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 200))
def test_stand_ins_are_the_rest_of_the_epoch_the_own_microbatch_first(size: int, stride: int, position: int) -> None:
    order = Order((size,), 0, 1)
    found = list(order.stand_ins(Slot(0, position, stride)))
    epoch = range(position - position % size, position - position % size + size)
    assert sorted([position, *found]) == list(epoch)
    own = [p for p in found if (p - position) % stride == 0]
    assert found[: len(own)] == own
    assert own == sorted(own, key=lambda p: (p < position, p))  # the next ones, then from the front


@pytest.mark.parametrize(("step", "microbatch", "count"), [(0, 2, 1), (0, -1, 1), (-1, 0, 1), (0, 0, 0)])
def test_what_is_no_batch(step: int, microbatch: int, count: int) -> None:
    with pytest.raises(UserError, match=r"microbatches=2|at least one clip"):
        Order((5,), 0, 2).slots(step, microbatch, count)
