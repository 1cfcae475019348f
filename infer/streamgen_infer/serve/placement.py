"""Where streams go among replicas, and from what a lost one goes on. Plain values, no thread, no torch, no Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

from streamgen_infer.requests import Refused, RuntimeStats

OFFSET_SAMPLES = 64
TRAIL_BYTES = 32 << 20
"""Of a stream's saved states; the newest is kept whatever it takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaView:
    """A replica as the choice sees it."""

    name: str
    streams: int
    draining: bool = False
    alive: bool = True


def candidates(replicas: Iterable[ReplicaView], *, moving: bool = False) -> list[str]:
    """Who is asked for a stream, in this order: the least loaded first, equals in the order given.

    A draining replica takes no new stream. A stream that is moving may stay on one when no other admits it.
    """
    able = [one for one in replicas if one.alive and (moving or not one.draining)]
    return [one.name for one in sorted(able, key=lambda one: (one.draining, one.streams))]


def refusal(refusals: Sequence[Refused]) -> Refused:
    """What a viewer is told when nobody admits it: the refusal that ends first; no replica at all is one too."""
    if not refusals:
        return Refused("replicas", "no replica is ready: they are starting anew", retry_after_s=5.0, numbers={})
    first = min(refusals, key=lambda one: one.retry_after_s)
    numbers = {**first.numbers, "replicas": float(len(refusals))}
    message = str(first) if len(refusals) == 1 else f"{first} (and so say all {len(refusals)} replicas)"
    return Refused(first.resource, message, retry_after_s=first.retry_after_s, numbers=numbers)


def total(parts: Iterable[RuntimeStats]) -> RuntimeStats:
    """The counters of all replicas together."""
    summed = RuntimeStats()
    for part in parts:
        for one in fields(RuntimeStats):
            if one.name != "refused":
                setattr(summed, one.name, getattr(summed, one.name) + getattr(part, one.name))
        for resource, count in part.refused.items():
            summed.refused[resource] = summed.refused.get(resource, 0) + count
    return summed


@dataclass(slots=True)
class ClockOffset:
    """What to add to another machine's monotonic clock to have this one's.

    A reading that took d seconds to come gives an offset that is d too large, so the smallest of the newest is taken.
    """

    _samples_s: deque[float] = field(default_factory=lambda: deque(maxlen=OFFSET_SAMPLES))

    def heard(self, there_s: float, here_s: float) -> None:
        """`there_s` was read before `here_s`."""
        self._samples_s.append(here_s - there_s)

    @property
    def offset_s(self) -> float:
        return min(self._samples_s, default=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedPoint:
    """A stream's state, taken while it ran on."""

    position: int
    """Blocks that are behind it."""
    first_frame: int
    """The first frame that can be made from it."""
    changes: int
    """Changes of the prompt that it knows of."""
    packed: bytes
    """The state itself, `replica.pack`ed."""


@dataclass(slots=True)
class Trail:
    """What is kept of a stream to make it anew elsewhere: the newest states and where its prompts changed since.

    A state taken before a change lacks it, but is good as long as it lies before the changed block: the prompts
    themselves are carried beside it. A state of frames that have not come yet would lose them, so it has to wait.
    Of the states that newer ones replace some are kept, ever further apart, for viewers who go back.
    """

    budget_bytes: int = TRAIL_BYTES
    change_blocks: list[int] = field(default_factory=list)
    _points: list[SavedPoint] = field(default_factory=list)

    def changed(self, block: int) -> None:
        """A prompt was accepted that holds from `block` on, which may have been made already."""
        self.change_blocks.append(block)

    def add(self, point: SavedPoint, next_frame: int) -> None:
        """Keep a state; while there are too many bytes, every second one that is older than the best is let go."""
        self._points.append(point)
        best = self.best(next_frame)
        old = self._points.index(best) if best is not None else 0
        while old and sum(len(one.packed) for one in self._points) > self.budget_bytes:
            self._points = self._points[1:old:2] + self._points[old:] if old > 1 else self._points[old:]
            old //= 2

    def forget_unanswered(self) -> None:
        """The replica is gone, and with it each change that it had not answered: states that know of more are void."""
        self._points = [one for one in self._points if one.changes <= len(self.change_blocks)]

    def best(self, next_frame: int) -> SavedPoint | None:
        """The latest state from which `next_frame` can be made; None: only the stream's beginning will do."""
        good = (one for one in reversed(self._points) if self._good(one, next_frame))
        return max(good, key=lambda one: one.position, default=None)

    def _good(self, point: SavedPoint, next_frame: int) -> bool:
        if point.first_frame > next_frame or point.changes > len(self.change_blocks):
            return False
        return all(block >= point.position for block in self.change_blocks[point.changes :])
