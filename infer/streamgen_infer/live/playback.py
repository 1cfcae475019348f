"""The media clock of `streamgen live`: when a frame that was made is shown. `now_s` is an argument: no clock here."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

    from streamgen_infer.requests import MadeBlock

STALL_S = 0.1


class Waiting(NamedTuple):
    """A frame whose time has not come."""

    number: int
    frame_HWC: np.ndarray
    block: MadeBlock


@dataclass(slots=True)
class Playback:
    """Frames that wait for their time. The clock stands while the next frame is not there: none is skipped."""

    fps: float
    waiting: deque[Waiting] = field(default_factory=deque)
    epoch: int = 0
    paused: bool = False
    position: int = 0
    """Number of the next frame to show."""
    due_s: float = -math.inf
    """When it is due."""

    def add(self, block: MadeBlock) -> None:
        """Its frames wait; a newer epoch replaces what was not shown yet from its first frame on."""
        if block.epoch < self.epoch:
            return
        if block.epoch > self.epoch:
            self.epoch = block.epoch
            self.waiting = deque(frame for frame in self.waiting if frame.number < block.first_frame)
        numbered = enumerate(block.frames, block.first_frame)
        self.waiting.extend(Waiting(number, frame, block) for number, frame in numbered)

    def turn(self, epoch: int, position: int) -> None:
        """Forget what waits: the stream was turned back to this frame, with this epoch."""
        self.waiting.clear()
        self.epoch, self.position = epoch, position

    def next_due_s(self) -> float:
        """When there will be something to show; inf if that is not known."""
        return self.due_s if self.waiting and not self.paused else math.inf

    def take(self, now_s: float) -> Waiting | None:
        """The frame that is due."""
        if now_s < self.next_due_s():
            return None
        frame = self.waiting.popleft()
        behind = now_s - self.due_s > max(1 / self.fps, STALL_S)
        self.due_s = (now_s if behind else self.due_s) + 1 / self.fps  # a stall moves the clock, a short delay does not
        self.position = frame.number + 1
        return frame
