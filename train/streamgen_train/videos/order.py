"""Which items make up a batch: a function of (sizes of the buckets, seed, step, microbatch), without any state.

All microbatches of a step come from one bucket, so that processes take equally long, and buckets take turns in
proportion to their items. Each bucket is one endless row of positions: epoch e holds the positions e * n to
(e + 1) * n - 1 and gives each of its n items once, in an order of its own. A step takes the next
microbatches * count positions. So within an epoch no two microbatches get the same item, and nothing is left over.
A bucket of fewer items than one step takes runs through several epochs in that step: an item then comes again, but
never twice before all others came once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from streamgen.errors import UserError
from streamgen.noise import philox

SHUFFLE, DRAW = 1, 2  # word 3 of the counter; cell_noise has 0 there
_WORD = 2**32


@dataclass(frozen=True, slots=True)
class Slot:
    """One place in a batch."""

    bucket: int
    position: int
    """In the endless row of the bucket."""
    stride: int
    """From a slot of one step to the same slot of the same microbatch at the next turn of the bucket."""


@dataclass(frozen=True, slots=True)
class Order:
    sizes: tuple[int, ...]
    """Items of each bucket, at least one."""
    seed: int
    microbatches: int
    """Per step, over all processes."""

    def __post_init__(self) -> None:
        assert self.sizes and min(self.sizes) >= 1, self.sizes

    def slots(self, step: int, microbatch: int, count: int) -> list[Slot]:
        """The `count` places of a batch; UserError for a microbatch that the order does not know of."""
        if not 0 <= microbatch < self.microbatches:
            raise UserError(
                f"microbatch {microbatch} of a source with microbatches={self.microbatches}: set it to the number of "
                "microbatches in a step, over all processes"
            )
        if step < 0 or count < 1:
            raise UserError(f"step {step}, {count} clips: a batch needs a step from 0 on and at least one clip")
        bucket, turn = bucket_turn(step, self.sizes)
        first = (turn * self.microbatches + microbatch) * count
        return [Slot(bucket, first + i, self.microbatches * count) for i in range(count)]

    def item(self, bucket: int, position: int) -> int:
        """Number of the item in its bucket."""
        epoch, place = divmod(position, self.sizes[bucket])
        return int(shuffled(self.seed, bucket, epoch, self.sizes[bucket])[place])

    def draw(self, slot: Slot, choices: int) -> int:
        """A number from 0 to choices - 1 that belongs to the slot."""
        words = _words(self.seed, np.array([slot.position % _WORD]), slot.position // _WORD, slot.bucket, DRAW)
        return int(words[0]) % choices

    def stand_ins(self, slot: Slot) -> Iterator[int]:
        """Positions that take the place of a slot whose item is broken, in this order, each of the epoch once.

        First those of the same slot in other steps of this microbatch, which no other microbatch gets in this epoch;
        if all of these are broken, the others.
        """
        size = self.sizes[slot.bucket]
        place = slot.position % size
        start = slot.position - place
        own = range(place % slot.stride, size, slot.stride)
        at = own.index(place)
        yield from (start + p for part in (own[at + 1 :], own[:at]) for p in part)
        others = (p % size for p in range(place + 1, place + size))
        yield from (start + p for p in others if p not in own)


def bucket_turn(step: int, sizes: Sequence[int]) -> tuple[int, int]:
    """(bucket of a step, how many earlier steps had it), spread evenly; exact shares after each sum(sizes) steps."""
    rest = sum(sizes)
    for bucket, size in enumerate(sizes[:-1]):
        before = step * size // rest
        if (step + 1) * size // rest > before:
            return bucket, before
        step, rest = step - before, rest - size
    return len(sizes) - 1, step


@lru_cache(maxsize=16)  # a memo: several buckets, each with an epoch that ends and one that begins
def shuffled(seed: int, bucket: int, epoch: int, size: int) -> np.ndarray:
    """The items of a bucket in the order of an epoch: sorted by a random number that belongs to (epoch, item)."""
    order = np.argsort(_words(seed, np.arange(size), epoch, bucket, SHUFFLE), kind="stable").astype(np.int32)
    order.flags.writeable = False
    return order


def _words(seed: int, first: np.ndarray, second: int, bucket: int, purpose: int) -> np.ndarray:
    """64-bit random words, one for each value of `first`."""
    counters = np.empty((4, len(first)), dtype=np.uint64)
    counters[0], counters[1], counters[2], counters[3] = first, second, bucket, purpose
    words = philox(seed, counters).astype(np.uint64)
    return (words[:, 0] << np.uint64(32)) | words[:, 1]
