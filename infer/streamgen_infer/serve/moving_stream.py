"""A viewer's stream at the front door, on whichever replica makes it now. No torch, no Ray here.

A session sees one `Live` from its first frame to its last. Below it the stream may be released by one replica and go
on at another, or be made anew from its last saved state: frames are passed on once each and in their order.
"""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from streamgen.errors import UserError
from streamgen_infer.requests import ApplyAt, MadeBlock, Receipt, StreamEvent, StreamRequest
from streamgen_infer.serve.placement import SavedPoint, Trail
from streamgen_infer.serve.replica import Answer, Order, Released, unpack

COMMAND_S = 30.0
"""A replica that has not answered a command by then counts as dead."""
MOVE_S = 90.0
"""So long a command waits for a stream that has no replica now."""


class Dead(Exception):
    """A replica does not answer any more."""


class Handle(Protocol):
    """A `Replica` somewhere else."""

    def call(self, method: str, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        """Dead if the replica is, or is silent for too long; then it is never asked again."""

    def send(self, method: str, *arguments: Any) -> None:
        """A call without an answer; lost where the replica is."""

    def kill(self) -> None:
        """End its process."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a stream is: a replica and the stream's name there."""

    replica: str
    handle: Handle
    name: str


class MovingStream:
    """See the module. `enter` and `leave` belong to the fleet, the rest is `session_state.Live`."""

    def __init__(
        self,
        id: str,
        request: StreamRequest,
        geometry: Any,
        *,
        on_block: Callable[[MadeBlock], None],
        on_event: Callable[[StreamEvent], None],
        on_dead: Callable[[str, str], None],
        on_homeless: Callable[[MovingStream, Place], None],
    ) -> None:
        self.id, self.request, self._geometry = id, request, geometry
        self._fps = float(request.fps or geometry.fps)
        self._on_block, self._on_event = on_block, on_event
        self._on_dead, self._on_homeless = on_dead, on_homeless
        self.place: Place | None = None
        self.closed = self.ended = False
        self.paused = False
        self._changed = threading.Condition(threading.RLock())
        self._commands = threading.Lock()
        self._numbers = itertools.count()
        self._places = itertools.count()
        self._trail = Trail()
        self._timeline: list[dict[str, Any]] | None = None
        self._warnings: list[str] = []
        self._started = False
        self._next_frame = 0
        self._first_frame = 0
        """Of the stream, which is not 0 if it began from a state."""
        self._from_frame = 0
        """The first that the replica which has it now can go back to."""
        self._turn_frame = 0
        """Frames of the epoch before are void from here on."""
        self._epoch_base, self._epoch = 0, 0
        self._early: list[MadeBlock] = []
        """Blocks of a turn back whose answer is still under way."""
        self._entering: str | None = None
        self._arrivals: list[tuple[MadeBlock | StreamEvent | SavedPoint, float]] = []
        """What came from a place before it was known that the stream is there."""

    # For the fleet.

    def order(self) -> tuple[str, Order]:
        """What to tell the replica that the stream goes to, and the stream's name there."""
        with self._changed:
            name = self._entering = f"{self.id}.{next(self._places)}"
            self._arrivals.clear()
            if not self._started:
                return name, Order(request=self.request, paused=self.paused)
            self._trail.forget_unanswered()
            point = self._trail.best(self._next_frame)
            self._from_frame = self._first_frame if point is None else point.first_frame
            return name, Order(
                request=self.request,
                saved=None if point is None else point.packed,
                timeline=self._timeline,
                changes=len(self._trail.change_blocks),
                next_frame=self._next_frame,
                paused=self.paused,
            )

    def enter(self, place: Place, answer: Answer) -> bool:
        """The stream is there from now on; False if it was closed meanwhile."""
        with self._changed:
            if self.closed:
                return False
            if not self._started:
                self._started, saved = True, self.request.saved
                if saved is not None:
                    self._first_frame = self._from_frame = self._geometry.block_pixel_start(saved["position"])
                    self._next_frame = saved.get("shown_frames", self._first_frame)
            self._timeline = answer.timeline
            self._note(answer.warnings)
            self._epoch_base, self._epoch = self._epoch_base + self._epoch, 0
            self._early.clear()
            self.place = place
            place.handle.send("tell", place.name, "paused", float(self.paused), next(self._numbers))
            arrivals, self._arrivals, self._entering = self._arrivals, [], None
            for item, offset_s in arrivals:
                self.take(place.name, item, offset_s)
            self._changed.notify_all()
            return True

    def release(self) -> None:
        """Ask its replica to let it go, between two commands: so every command is in the state that comes of it."""
        with self._commands:
            place = self.place
            if place is None:
                return
            try:
                place.handle.call("release", place.name, timeout_s=COMMAND_S)
            except Dead as error:
                dead: Dead | None = error
            else:
                dead = None
        if dead is not None:
            self._on_dead(place.replica, str(dead))

    def leave(self, name: str, released: Released | None = None) -> bool:
        """The stream is nowhere until it enters again; False if that was long known. released: its last state."""
        with self._changed:
            if self.place is None or self.place.name != name:
                return False
            self.place = None
            if released is not None:
                point = SavedPoint(
                    position=released.position,
                    first_frame=self._geometry.block_pixel_start(released.position),
                    changes=len(self._trail.change_blocks),
                    packed=released.packed,
                )
                self._trail.add(point, self._next_frame)
            return not self.closed and not self.ended

    def take(self, name: str, item: MadeBlock | StreamEvent | SavedPoint, offset_s: float) -> None:
        """What a replica gave; offset_s: from its clock to ours."""
        with self._changed:
            if name == self._entering:
                self._arrivals.append((item, offset_s))
                return
            if self.closed or self.place is None or self.place.name != name:
                return
            if isinstance(item, SavedPoint):
                self._trail.add(item, self._next_frame)
            elif isinstance(item, StreamEvent):
                self.ended = self.ended or item.kind in ("ended", "failed")
                self._on_event(item)
            else:
                due_s, ready_s = item.due_at_s + offset_s, item.ready_at_s + offset_s
                self._block(replace(item, due_at_s=due_s, ready_at_s=ready_s))
            self._changed.notify_all()

    def fail(self, message: str) -> None:
        """It cannot go on."""
        with self._changed:
            if not self.closed and not self.ended:
                self.ended = True
                block = self._geometry.block_at_seconds(self._next_frame / self._geometry.fps)
                self._on_event(StreamEvent(kind="failed", block=block, message=message))
            self._changed.notify_all()

    def _block(self, block: MadeBlock) -> None:
        if block.epoch > self._epoch:
            self._early.append(block)
            return
        frames, end = block.frames, block.first_frame + len(block.frames)
        if block.epoch < self._epoch:
            end = min(end, self._turn_frame)
            frames = frames[: max(end - block.first_frame, 0)]
        if not len(frames):
            return
        self._next_frame = end
        # A copy, because what came through shared memory would keep its place there while the viewer's queue has it.
        self._on_block(replace(block, epoch=self._epoch_base + block.epoch, frames=np.array(frames)))

    # For the session.

    @property
    def geometry(self) -> Any:
        return self._geometry

    @property
    def fps(self) -> float:
        return self._fps

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about what was asked for so far, in words."""
        return tuple(self._warnings)

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        apply_at: ApplyAt = "next_block",
        at_media_s: float | None = None,
        blend_blocks: int = 4,
    ) -> Receipt:
        """As `LiveStream.prompt`."""
        named: dict[str, Any] = {"apply_at": apply_at, "at_media_s": at_media_s, "blend_blocks": blend_blocks}

        def accepted(answer: Answer) -> None:
            self._trail.changed(answer.value.block)
            self._turned(answer)

        receipt: Receipt = self._ask(accepted, "prompt", text, transition, **named)
        return receipt

    def seek(self, media_s: float) -> Receipt:
        """As `LiveStream.seek`; also to what another replica made, which is made anew from an older state."""

        def out_of_reach() -> Receipt | None:
            if not (math.isfinite(media_s) and media_s >= 0):
                return None  # the stream itself says what is wrong
            frame = max(min(round(media_s * self._fps), self._next_frame), self._first_frame)
            return self._begin_again(frame) if frame < self._from_frame else None

        receipt: Receipt = self._ask(self._turned, "seek", media_s, instead=out_of_reach)
        return receipt

    def steps(self, count: int | None) -> None:
        """As `LiveStream.steps`."""

        def accepted(answer: Answer) -> None:
            self.request = replace(self.request, steps=count)

        self._ask(accepted, "steps", count)

    def branch(self) -> dict[str, Any]:
        """As `LiveStream.branch`."""
        return unpack(self._ask(lambda answer: None, "branch"))

    def state_dict(self) -> dict[str, Any]:
        """As `LiveStream.state_dict`, when all frames before it were passed on."""
        state = unpack(self._ask(lambda answer: None, "state_dict"))
        with self._changed:
            here = self._changed.wait_for(lambda: self.closed or self._next_frame >= state["shown_frames"], MOVE_S)
            if not here or self.closed:
                raise UserError(f"stream {self.id} has no state now: it is closed, or its replica is lost")
        return state

    def playhead(self, media_s: float) -> None:
        """As `LiveStream.playhead`."""
        self._tell("playhead", media_s)

    def pause(self) -> None:
        """As `LiveStream.pause`."""
        self._pause(True)

    def play(self) -> None:
        """As `LiveStream.play`."""
        self._pause(False)

    def close(self) -> None:
        """Give the stream up. Twice is once."""
        with self._changed:
            self.closed, place, self.place = True, self.place, None
            self._early.clear()
            self._changed.notify_all()
        if place is not None:
            place.handle.send("forget", place.name)

    def _pause(self, paused: bool) -> None:
        with self._changed:
            self._check_open()
            self.paused = paused
            self._tell("paused", float(paused))

    def _tell(self, what: str, value: float) -> None:
        with self._changed:
            self._check_open()
            if self.place is not None:
                self.place.handle.send("tell", self.place.name, what, value, next(self._numbers))

    def _ask(
        self,
        accepted: Callable[[Answer], None],
        method: str,
        *arguments: Any,
        instead: Callable[[], Any] = lambda: None,
        **named: Any,
    ) -> Any:
        """A command's answer, from wherever the stream is. One that its replica took into the grave is asked again.

        instead: the answer, where it can be had without the replica that the stream is on.
        """
        with self._commands:
            until_s = time.monotonic() + MOVE_S
            while True:
                with self._changed:
                    place = self._where(until_s - time.monotonic())
                    if (known := instead()) is not None:
                        return known
                try:
                    call = place.handle.call
                    answer = call("command", place.name, method, *arguments, timeout_s=COMMAND_S, **named)
                except Dead as error:
                    self._on_dead(place.replica, str(error))
                    answer = Answer(gone=True)
                with self._changed:
                    if self.place is place and not answer.gone:
                        if answer.mistake is not None:
                            raise UserError(answer.mistake)
                        self._timeline = answer.timeline
                        self._note(answer.warnings)
                        accepted(answer)
                        return answer.value
                    # Released before it, or lost before its answer: nothing of it was carried along.
                    self._changed.wait_for(lambda: self.closed or self.ended or self.place is not place, 1.0)  # noqa: B023

    def _where(self, within_s: float) -> Place:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self.ended or self.place is not None, max(within_s, 0.0))
            if self.closed or self.place is None or within_s <= 0:
                raise UserError(f"stream {self.id} is closed, or has no replica now")
            return self.place

    def _turned(self, answer: Answer) -> None:
        """If the stream was turned back by it, what is void is void from now on, and what waited may pass."""
        if answer.epoch == self._epoch:
            return
        self._epoch, self._turn_frame = answer.epoch, round(answer.value.media_s * self._fps)
        self._next_frame = min(self._next_frame, self._turn_frame)
        early, self._early = self._early, []
        for block in early:
            self._block(block)

    def _begin_again(self, frame: int) -> Receipt:
        """Go on from a frame that its replica cannot make; on the same one or another."""
        place, self.place = self.place, None
        self._epoch_base, self._epoch, self._next_frame = self._epoch_base + self._epoch + 1, 0, frame
        if place is not None:  # else somebody is looking for a replica already, and will ask where to go on
            place.handle.send("forget", place.name)
            self._on_homeless(self, place)
        block = max(self._geometry.block_at_seconds((frame + 1) / self._geometry.fps) - 1, 0)
        holding = [prompt for prompt in self._timeline or [] if prompt["block"] <= block]
        version = max(holding, key=lambda prompt: prompt["block"])["version"] if holding else 0
        return Receipt(version=version, block=block, media_s=frame / self._fps)

    def _note(self, warnings: tuple[str, ...]) -> None:
        self._warnings += [one for one in warnings if one not in self._warnings]

    def _check_open(self) -> None:
        if self.closed or self.ended:
            raise UserError(f"stream {self.id} is closed")
