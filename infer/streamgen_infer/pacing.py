"""When a stream's frames are due: its media clock. No thread, no clock of its own: `now_s` is an argument.

Media time m is due at `origin_s + m`. The origin moves only in these ways:

    late block      the last frame stays on screen until it comes; all later frames move by as much, so no burst follows
    pause           later, by the length of the pause
    viewer report   to what the viewer really shows: later at once, earlier slowly (clocks that drift)
    clock jumps     a clock that was set back takes the origin with it; one that leapt ahead makes the next block late

What is made ahead of the viewer is bounded by `lead_s`, so a slow viewer costs frames of its own and no memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

DEAD_BAND_S = 0.05
"""Reports this near to the estimate change nothing: they carry the network's jitter."""
DRIFT = 0.01
"""How much faster than real time a viewer's reports can make the stream."""


@dataclass(slots=True, kw_only=True)
class MediaClock:
    """Due times of one stream, on the clock whose readings it is given (all `_s` here but media times are readings)."""

    origin_s: float
    """When media time 0 is due; for a new stream the time by which its first frame was promised."""
    lead_s: float
    """Most media made ahead of what the viewer sees; at least two blocks are allowed: one shown, one in the making."""
    made_s: float = 0.0
    """Media time up to which frames were delivered."""
    stalls: int = 0
    stalled_s: float = 0.0
    """How long, in all, the last frame had to stay because the next was late."""
    _seen_s: float = -inf
    _paused_s: float | None = None
    _reported: tuple[float, float] | None = None
    """The last report: (reading, media time)."""
    _shown: bool = False
    """A block was delivered since the start or the last `turn`: there is something to report."""
    _from_s: float = field(init=False)
    """Media time of the start or of the last `turn`: the viewer is there, before anything new is shown."""

    def __post_init__(self) -> None:
        self._from_s = self.made_s

    def _at(self, now_s: float) -> float:
        """The reading at which the viewer's time stands: `now_s`, or the pause's beginning."""
        if now_s < self._seen_s:
            back_s = self._seen_s - now_s
            self.origin_s -= back_s
            if self._paused_s is not None:
                self._paused_s -= back_s
            if self._reported is not None:
                self._reported = self._reported[0] - back_s, self._reported[1]
        self._seen_s = now_s
        return now_s if self._paused_s is None else self._paused_s

    @property
    def paused(self) -> bool:
        """Between `pause` and `resume`."""
        return self._paused_s is not None

    def due_s(self, media_s: float) -> float:
        """When the frame at this media time must be there; inf while paused."""
        return inf if self._paused_s is not None else self.origin_s + media_s

    def not_before_s(self, media_s: float, block_s: float) -> float:
        """When the making of a block of `block_s` that starts at `media_s` may begin; -inf: at once."""
        ahead_s = max(self.lead_s - block_s, block_s)
        if media_s <= ahead_s:
            return -inf
        return inf if self._paused_s is not None else self.origin_s + media_s - ahead_s

    def playhead_s(self, now_s: float) -> float:
        """Media time that the viewer sees now, as far as is known."""
        return min(max(self._at(now_s) - self.origin_s, self._from_s), self.made_s)

    def delivered(self, media_s: float, block_s: float, now_s: float) -> float:
        """A block is ready -> its slack at that moment, in seconds; negative: late, and all later frames move."""
        at_s = self._at(now_s)  # first: it may move the origin
        slack_s = self.origin_s + media_s - at_s
        if slack_s < 0:
            self.origin_s -= slack_s
            self.stalls += 1
            self.stalled_s -= slack_s
        self.made_s = media_s + block_s
        self._shown = True
        return slack_s

    def report(self, media_s: float, now_s: float) -> None:
        """The viewer shows `media_s` now; the first report sets the clock. More than was delivered is not believed."""
        at_s = self._at(now_s)
        media_s = min(media_s, self.made_s)
        stale = self._reported is not None and media_s < self._reported[1]
        if media_s < 0 or stale or self._paused_s is not None or not self._shown:
            return
        before, self._reported = self._reported, (at_s, media_s)
        behind_s = min(at_s - self.origin_s, self.made_s) - media_s
        if before is None or behind_s > DEAD_BAND_S:
            self.origin_s += behind_s
        elif behind_s < -DEAD_BAND_S:
            self.origin_s -= min(-behind_s, DRIFT * (at_s - before[0]))

    def pause(self, now_s: float) -> None:
        """Time stands still; nothing is due. Twice is once."""
        if self._paused_s is None:
            self._paused_s = self._at(now_s)

    def resume(self, now_s: float) -> None:
        """Time goes on; without a pause before nothing happens."""
        if self._paused_s is not None:
            since_s = self._at(now_s)
            self.origin_s += now_s - since_s
            self._paused_s = None

    def turn(self, media_s: float, now_s: float, start_s: float) -> None:
        """The stream goes on from another media time, due in `start_s`; what was made from there on is void."""
        self._at(now_s)
        self.origin_s = now_s + start_s - media_s
        self.made_s = self._from_s = media_s
        self._reported, self._shown = None, False
        if self._paused_s is not None:
            self._paused_s = now_s
