"""What a live stream is asked for and what it gives: the words between the runtime and whoever watches. No torch here.

Times in seconds are of two kinds: `media_s` counts from the first frame of a stream (frame index / fps), `_at_s` is
the runtime's monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np

ApplyAt = Literal["next_block", "playhead"]
"""When a change holds: at the first block that has not begun, or at the first one that the viewer has not seen."""

EventKind = Literal["applied", "degraded", "restored", "ended", "failed"]

# Flags of a block: what was done to hold its deadline. They are bits, in the order of the degrading ladder.
FEWER_STEPS = 1
PREVIEW_CODEC = 2
REPEATED = 4
LATE = 8
"""The block was ready after its deadline."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamRequest:
    """A stream that somebody wants to watch."""

    prompt: str
    seed: int = 0
    fps: float | None = None
    """Frames per second of the playback; the model's own by default."""
    steps: int | None = None
    """Steps per block; by default the scheduler chooses among those the model was trained for."""
    cache: str | None = None
    """A cache policy; the one the model was trained with by default."""
    lead_s: float = 1.5
    """How much media may be made ahead of the viewer's playhead."""
    start_s: float = 1.0
    """Allowed time from acceptance to the first frame: deadlines count from there."""
    max_seconds: float | None = None
    """Length of the video in media time; None: until closed."""
    paused: bool = False
    """Nothing is made before the first `LiveStream.play`: prompts for its first blocks can still be given."""
    saved: dict[str, Any] | None = None
    """A state of `LiveStream.state_dict` to go on from; prompt and seed are its own then."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MadeBlock:
    """A finished block of frames on its way to the viewer."""

    epoch: int
    """Counts how often the stream was turned back (seek, playhead change): frames of older epochs are stale."""
    index: int
    frames: np.ndarray
    """uint8 [frames, H, W, 3], RGB."""
    first_frame: int
    """Number of the first of them since the stream's start."""
    media_s: float
    """Media time of that frame."""
    due_at_s: float
    """Deadline of that frame, on the runtime's clock."""
    ready_at_s: float
    steps: int
    prompt_version: int
    flags: int = 0

    @property
    def slack_s(self) -> float:
        """Time left when it was ready; negative: late."""
        return self.due_at_s - self.ready_at_s


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """A change was received: its version and the block (and media time) that will first show it."""

    version: int
    block: int
    media_s: float
    warnings: tuple[str, ...] = ()
    """What is odd about it, in words: unknown words of a prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamEvent:
    """Something happened to a stream that is not a block."""

    kind: EventKind
    block: int
    version: int | None = None
    """With `applied`: of the prompt that this block is the first to use."""
    message: str = ""


class Refused(Exception):
    """A stream that cannot be admitted: which resource is short, its numbers, and when to try again."""

    def __init__(self, resource: str, message: str, *, retry_after_s: float, numbers: dict[str, float]) -> None:
        super().__init__(message)
        self.resource, self.retry_after_s, self.numbers = resource, retry_after_s, numbers


@dataclass(slots=True, kw_only=True)
class RuntimeStats:
    """Counters since the start, for /metrics and the status line."""

    streams: int = 0
    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    launches: int = 0
    blocks: int = 0
    frames: int = 0
    late_blocks: int = 0
    degraded_blocks: int = 0
    failed_launches: int = 0
    busy_s: float = 0.0
    """Time spent in launches."""
    bytes_held: int = 0
