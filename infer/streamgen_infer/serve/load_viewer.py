"""One viewer of `streamgen load`: what it asks for, what it saw, and whether every frame came once.

Latency of a frame: its deadline on the server's clock, moved to this clock by the acceptance of the session, against
its arrival here. TTFF: before the connection is opened, to the first frame. Control latency: prompt sent to the arrival
of the first frame that carries it; prompt to screen: to the moment when a player shows that frame.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from streamgen_infer import protocol as p

REPORT_S = 0.1
Fate = Literal["watches", "stops", "killed", "cut"]
"""To the end of its video; leaves before, with a word; is gone without one; loses its connection and comes back."""


@dataclass(frozen=True, slots=True)
class Switch:
    """A prompt, asked for when the frames reach this media time. more: fields of `interaction`."""

    at_s: float
    prompt: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """What one viewer does. start: fields of `session.start`, `max_seconds` among them."""

    url: str
    token: str | None
    start: Mapping[str, Any]
    switches: Sequence[Switch] = ()
    fate: Fate = "watches"
    breaks_at_s: float = 0.0
    """Media time at which a fate other than `watches` is met."""


@dataclass(slots=True)
class Seen:
    """What one viewer saw."""

    fate: Fate = "watches"
    ttff_s: float | None = None
    queued: bool = False
    frames: int = 0
    late_frames: int = 0
    dropped_frames: int = 0
    lost_frames: int = 0
    """Missing, and the server did not say that it left them out."""
    repeated_frames: int = 0
    late_blocks: int = 0
    blocks: int = 0
    latency_s: list[float] = field(default_factory=list)
    jitter_s: list[float] = field(default_factory=list)
    control_s: list[float] = field(default_factory=list)
    screen_s: list[float] = field(default_factory=list)
    screen_media_s: list[float] = field(default_factory=list)
    refused_prompts: int = 0
    resumes: int = 0
    refused: str | None = None
    failed: str | None = None


@dataclass(slots=True)
class Screen:
    """A player: its clock starts with the first frame, and stands while the next one is not there."""

    zero_s: float | None = None
    """This machine's clock at media time 0."""
    newest_s: float = 0.0

    def add(self, media_s: float, at_s: float) -> float:
        """A frame came -> when it is on the screen."""
        if self.zero_s is None or at_s > self.zero_s + media_s:
            self.zero_s = at_s - media_s
        self.newest_s = media_s
        return self.zero_s + media_s

    def position_s(self, now_s: float) -> float:
        """Media time on the screen."""
        return 0.0 if self.zero_s is None else max(0.0, min(self.newest_s, now_s - self.zero_s))


@dataclass(slots=True)
class FrameCount:
    """Whether every frame comes once, in order; a new epoch goes on anywhere that was reached."""

    epoch: int = 0
    last: int | None = None

    def add(self, header: p.FrameHeader, seen: Seen) -> None:
        expected = header.frame if self.last is None else self.last + 1
        missing = header.frame - expected - header.dropped
        if header.epoch == self.epoch or self.last is None:
            seen.lost_frames += max(missing, 0)
            seen.repeated_frames += max(expected - header.frame, 0)
        elif header.epoch > self.epoch:
            seen.lost_frames += max(missing, 0)
        else:
            seen.repeated_frames += 1
        self.epoch, self.last = header.epoch, header.frame


async def visit(visit: Visit, viewer: Any, seen: Seen) -> None:
    """Come, watch, meet one's fate. viewer: `streamgen_infer.client.Viewer`. Never raises: `seen` tells."""
    asked_s, seen.fate = time.monotonic(), visit.fate
    watching = viewer(visit.url, token=visit.token, playback=False, **visit.start)
    try:
        async with watching:
            screen = Screen()
            reporting = asyncio.create_task(_report(watching, screen))
            try:
                await _watch(watching, visit, screen, asked_s, seen)
            finally:
                reporting.cancel()
                await asyncio.gather(reporting, return_exceptions=True)
    except p.Refusal as refusal:
        seen.refused = refusal.code
    except Exception as error:  # noqa: BLE001 (counted and told in the report: other viewers go on)
        seen.failed = f"{type(error).__name__}: {error}"
    for message in watching.messages:
        if isinstance(message, p.VideoStart):
            seen.lost_frames += message.lost_frames
        seen.queued |= isinstance(message, p.SessionState) and message.state == "queued"
    seen.resumes = watching.resumed


async def _report(watching: Any, screen: Screen) -> None:
    while True:
        await asyncio.sleep(REPORT_S)
        if screen.zero_s is not None:
            await watching.report(screen.position_s(time.monotonic()))


async def _watch(watching: Any, visit: Visit, screen: Screen, asked_s: float, seen: Seen) -> None:
    waiting, told = list(visit.switches), dict[int, tuple[float, float]]()
    block, block_at_s, block_media_s = (-1, -1), 0.0, 0.0
    count, broken = FrameCount(), visit.fate == "watches"
    async for frame in watching.frames():
        header = frame.header
        if header.kind != p.MEDIA:
            continue
        count.add(header, seen)
        shown_s = screen.add(header.media_s, frame.at_s)
        if seen.ttff_s is None:
            seen.ttff_s = frame.at_s - asked_s
        late_s = frame.at_s - (watching.accepted_at_s + header.deadline_s)
        seen.frames += 1
        seen.dropped_frames += header.dropped
        seen.late_frames += late_s > 0
        seen.latency_s.append(late_s)
        if (header.epoch, header.block) != block:
            if seen.blocks:
                seen.jitter_s.append(abs(frame.at_s - block_at_s - (header.media_s - block_media_s)))
            block, block_at_s, block_media_s = (header.epoch, header.block), frame.at_s, header.media_s
            seen.blocks += 1
            seen.late_blocks += late_s > 0
        for version in [version for version in told if header.prompt_version >= version]:
            sent_s, from_s = told.pop(version)
            seen.control_s.append(frame.at_s - sent_s)
            seen.screen_s.append(shown_s - sent_s)
            seen.screen_media_s.append(header.media_s - from_s)
        if waiting and header.media_s >= waiting[0].at_s:
            await _ask(watching, waiting.pop(0), screen.position_s(time.monotonic()), told, seen)
        if not broken and header.media_s >= visit.breaks_at_s:
            broken = True
            if visit.fate == "stops":
                return
            watching.cut()
            if visit.fate == "killed":
                return await watching.leave()


async def _ask(
    watching: Any, switch: Switch, position_s: float, told: dict[int, tuple[float, float]], seen: Seen
) -> None:
    sent_s = time.monotonic()
    try:
        await watching.report(position_s)  # what `playhead` goes by
        answer = await watching.prompt(switch.prompt, **switch.more)
    except (p.Refusal, TimeoutError):  # most likely the stream has ended: all its frames are made
        seen.refused_prompts += 1
    else:
        told[answer.prompt_version] = (sent_s, position_s)
