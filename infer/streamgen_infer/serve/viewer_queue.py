"""What waits for one viewer: bounded in media time, with the drop policy that the viewer chose, and kept for a resume.

Pure bookkeeping, no clock and no thread: frames come in by `put`, leave by `take` in the order of the stream, and stay
in `sent` until the viewer confirms them. Frames are uint8 RGB [H, W, 3], views of their block's array.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from streamgen_infer.protocol import Drop

if TYPE_CHECKING:
    import numpy as np

REPLAY_SECONDS = 10.0
"""Media that is kept after it was sent, in case the connection is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockInfo:
    """What all frames of a block share."""

    epoch: int
    block: int
    first_frame: int
    frames: int
    steps: int
    prompt_version: int
    flags: int
    slack_s: float


@dataclass(slots=True, kw_only=True)
class QueuedFrame:
    info: BlockInfo
    frame: int
    media_s: float
    due_at_s: float
    """On the runtime's clock."""
    rgb_HWC: np.ndarray
    dropped: int = 0
    """Frames left out just before this one."""
    again: bool = False
    """It was sent before, over a connection that was lost."""

    @property
    def key(self) -> tuple[int, int]:
        return self.info.epoch, self.frame


@dataclass(slots=True, kw_only=True)
class ViewerQueue:
    """The frames of one viewer: `waiting`, then `sent`."""

    fps: float
    limit_frames: int
    """At most so many wait."""
    drop: Drop
    window_frames: int | None = None
    """At most so many are sent and not confirmed."""
    waiting: deque[QueuedFrame] = field(default_factory=deque)
    sent: deque[QueuedFrame] = field(default_factory=deque)
    newest: tuple[int, int] = (0, -1)
    """Epoch and number of the newest frame that was offered."""
    dropped_frames: int = 0
    _gap: int = 0
    _confirms: bool = False

    @property
    def full(self) -> bool:
        return len(self.waiting) >= self.limit_frames

    @property
    def half_empty(self) -> bool:
        return len(self.waiting) <= self.limit_frames // 2

    @property
    def open(self) -> bool:
        """The window lets one more frame go."""
        return self.window_frames is None or not self._confirms or len(self.sent) < self.window_frames

    @property
    def bytes_held(self) -> int:
        return sum(item.rgb_HWC.nbytes for item in chain(self.waiting, self.sent))

    def put(self, items: Iterable[QueuedFrame]) -> int:
        """Take the frames of a block, which replaces what waits of older epochs from its first frame on.

        Returns how many were dropped, of these or of earlier ones.
        """
        before = self.dropped_frames
        for item in items:
            if item.info.epoch > self.newest[0]:
                self.unmake(item.frame)
            self.newest = item.key
            if self.full and self.drop == "oldest":
                self._drop_oldest()
            if self.full and self.drop == "newest":
                self._gap += 1
                self.dropped_frames += 1
                continue
            item.dropped, self._gap = item.dropped + self._gap, 0
            self.waiting.append(item)
        return self.dropped_frames - before

    def unmake(self, first_frame: int) -> None:
        """Frames from this one on are void: those that still wait are thrown away."""
        while self.waiting and self.waiting[-1].frame >= first_frame:
            self._gap = self.waiting.pop().dropped  # frames that were left out before it stay left out

    def take(self) -> QueuedFrame | None:
        """The next frame to send, if there is one and the window is open."""
        if not self.waiting or not self.open:
            return None
        item = self.waiting.popleft()
        self.sent.append(item)
        while len(self.sent) > max(1, round(REPLAY_SECONDS * self.fps)):
            self.sent.popleft()
        return item

    def confirm(self, frame: int) -> None:
        """The viewer has this frame and all before it."""
        self._confirms = True
        if any(item.frame == frame for item in self.sent):
            while self.sent and self.sent.popleft().frame != frame:
                pass

    def rewind(self, epoch: int, last_frame: int) -> int:
        """The connection was lost, and this was the last frame that came through: what followed waits again.

        Returns how many frames between are not kept any more.
        """
        sent = list(self.sent)
        self.sent.clear()
        self._confirms = False
        found = [at for at, item in enumerate(sent) if item.key == (epoch, last_frame)]
        again = sent[found[0] + 1 :] if found else [item for item in sent if item.key > (epoch, last_frame)]
        for item in again:
            item.again = True
        self.waiting.extendleft(reversed(again))
        first = next(iter(self.waiting), None)
        if found or first is None or first.info.epoch != epoch:
            return 0
        return max(0, first.frame - first.dropped - last_frame - 1)

    def tail(self, most_bytes: int) -> list[QueuedFrame]:
        """What a saved session needs to lose nothing: sent and unconfirmed, and waiting; the newest if too many."""
        kept: deque[QueuedFrame] = deque()
        size = 0
        for item in self._newest_first():
            size += item.rgb_HWC.nbytes
            if size > most_bytes:
                break
            kept.appendleft(item)
        return list(kept)

    def _newest_first(self) -> Iterator[QueuedFrame]:
        yield from reversed(self.waiting)
        yield from reversed(self.sent)

    def _drop_oldest(self) -> None:
        lost = self.waiting.popleft()
        self.dropped_frames += 1
        if self.waiting:
            self.waiting[0].dropped += lost.dropped + 1
        else:
            self._gap += lost.dropped + 1
