"""What a rank of a pipeline is told and tells: orders in, cells and frames out, and where it is at (for heartbeats)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

from torch import Tensor

from streamgen.codec import CodecState
from streamgen.parallel.job import STOP, Job, Order
from streamgen.parallel.replay import Entry
from streamgen.parallel.transport import Message

LOADING, WAITING, WORKING = "loading", "waiting", "working"


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a pipeline starts: at block 0, or after what the journal of an earlier life holds."""

    history: tuple[Entry, ...] = ()
    shot_start: int = 0
    codec: CodecState | None = None
    next_block: int = 0
    bounds: tuple[int, ...] = ()


@dataclass(slots=True)
class Host:
    """One rank's link to whoever runs the pipeline. `mail` carries ("message", Message), ("order", Order) and
    ("error", exception), from whatever threads there are.
    """

    job: Job
    rank: int
    mail: SimpleQueue[tuple[str, Any]] = field(default_factory=SimpleQueue)
    more_orders: Callable[[], Order | None] = lambda: None
    """The next order, where the rank fetches orders itself instead of finding them in the mail; None: not yet."""
    on_cell: Callable[[int, int, Tensor], None] = lambda block, step, latents: None
    """(block, step, what the next step takes), before that goes anywhere else."""
    on_block: Callable[[int, Tensor, Tensor, CodecState], None] = lambda block, latents, frames, codec: None
    """(block, clean latents, uint8 frames [n, H, W, 3], the codec's state after them)."""
    on_bounds: Callable[[tuple[int, ...]], None] = lambda bounds: None
    """A layer ring has moved layers."""
    on_replayed: Callable[[int], None] = lambda block: None
    """A finished block's cells were run again."""
    taken: Callable[[], None] = lambda: None
    """A message has left the mail."""
    activity: str = LOADING
    since_s: float = field(default_factory=time.monotonic)

    def next(self) -> Message | Order:
        """The next thing in the mail, an order or a message; raises what a thread found. Waits."""
        self.is_at(WAITING)
        kind, item = self.mail.get()
        self.is_at(WORKING)
        if kind == "error":
            raise item
        if kind == "message":
            self.taken()
        assert isinstance(item, Message | Order)
        return item

    def next_order(self) -> Order:
        """Of the first rank of a chain."""
        order = self.more_orders()
        if order is None:
            found = self.next()
            assert isinstance(found, Order)
            return found
        return order

    def is_at(self, activity: str) -> None:
        self.activity, self.since_s = activity, time.monotonic()


def from_iterator(orders: Iterator[Order]) -> Callable[[], Order | None]:
    """Orders that are all known beforehand; STOP after the last."""
    return lambda: next(orders, STOP)
