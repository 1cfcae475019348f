"""A stream and its viewer: commands in, answers and frames out, over however many connections it takes.

All of a session happens on the event loop's thread: what the runtime's thread gives is posted there, what may block
(the calls of `Live`) runs in a worker thread, one command at a time. A connection takes `next_item` until it is None.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.requests import MadeBlock, Receipt, Refused, StreamEvent
from streamgen_infer.serve.clip_recorder import ClipRecorder
from streamgen_infer.serve.commands import finish_recording, obey
from streamgen_infer.serve.metrics import ServeMetrics
from streamgen_infer.serve.opening import open_stream
from streamgen_infer.serve.receipts import Receipts
from streamgen_infer.serve.session_state import LIVE, OVER, Engine, Lifecycle, Live
from streamgen_infer.serve.viewer_queue import BlockInfo, QueuedFrame, ViewerQueue

log = logging.getLogger("streamgen.serve")
MAX_ANSWERS = 64
"""So many may wait for a connection; then it must read before it may ask again."""


class Session:
    """Made by the server for a `session.start`; `open` before anything else."""

    geometry: Any
    fps: float
    queue: ViewerQueue
    """From `open` on, as those above."""

    def __init__(
        self,
        start: p.Start,
        *,
        owner: str,
        folder: Path,
        metrics: ServeMetrics,
        keep_branch: Callable[[Session, dict[str, Any]], str],
        keep_clip: Callable[[Session, Path], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id, self.token = secrets.token_hex(8), secrets.token_urlsafe(24)
        self.start, self.owner, self.folder, self.metrics = start, owner, folder, metrics
        self.keep_branch, self.keep_clip, self.clock = keep_branch, keep_clip, clock
        self.life, self.lock, self.wake = Lifecycle(), asyncio.Lock(), asyncio.Event()
        self.accepted_s = self.heard_s = self.left_s = clock()
        self.opened = False
        self.given: Live | None = None
        """What the engine gave."""
        self.connection: object | None = None
        self.answers: deque[p.Message] = deque()
        self.receipts = Receipts()
        self.chunks, self.frames_sent = 0, 0
        self.epoch, self.epoch_base, self.skip_through = 0, 0, -1
        self.next_block, self.next_frame, self.newest_version = 0, 0, -1
        self.prompt = start.prompt or ""
        self.stopped, self.ended, self.done, self.dirty = False, False, False, False
        self.user_paused, self.stalled = False, False
        self.announced: BlockInfo | None = None
        self.early: list[MadeBlock] = []
        self.tail: list[QueuedFrame] = []
        """Of a saved session: what its viewer had not confirmed."""
        self.before_receipt: Callable[[], None] | None = None
        """Called when a prompt is accepted, before it is said; None: there is no journal."""
        self.last_ready_s: float | None = None
        self.recorder: ClipRecorder | None = None
        self.playhead_s: float | None = None
        self.save_number = 0
        self.journal: list[dict[str, Any]] = []
        """Prompts accepted since the last save, with the block that they hold from."""

    # The stream.

    @property
    def live(self) -> Live:
        """The runtime's stream, from `open` until the end."""
        if self.given is None:
            raise p.Refusal("illegal_state", f"the session is {self.life.state}")
        return self.given

    async def open(
        self,
        engine: Engine,
        saved: dict[str, Any] | None = None,
        *,
        hold: bool = False,
        again: Callable[[Refused], Awaitable[bool]] | None = None,
    ) -> None:
        """Ask for the stream; Refusal if it is not to be had. hold: it makes nothing before its first `play`.

        again: waits until it is worth asking once more, after the engine refused; False, or a Refusal: it is not.
        """
        await open_stream(self, engine, saved, hold=hold, again=again)

    def take_block(self, block: MadeBlock) -> None:
        """Frames from the runtime, on the loop's thread."""
        if self.life.state == "queued":  # quicker than `open` heard of its own success
            self.early.append(block)
        if self.life.state not in LIVE:
            return
        epoch = self.epoch_base + block.epoch
        info = BlockInfo(
            epoch=epoch,
            block=block.index,
            first_frame=block.first_frame,
            frames=len(block.frames),
            steps=block.steps,
            prompt_version=block.prompt_version,
            flags=block.flags,
            slack_s=block.slack_s,
        )
        since_s = block.ready_at_s - (self.accepted_s if self.last_ready_s is None else self.last_ready_s)
        self.metrics.block(block, first=self.chunks == 0, since_s=since_s, media_s=len(block.frames) / self.fps)
        self.chunks, self.last_ready_s = self.chunks + 1, block.ready_at_s
        self.epoch, self.next_block, self.newest_version = epoch, block.index + 1, block.prompt_version
        self.next_frame = block.first_frame + len(block.frames)
        items = [
            QueuedFrame(
                info=info,
                frame=block.first_frame + at,
                media_s=block.media_s + at / self.fps,
                due_at_s=block.due_at_s + at / self.fps,
                rgb_HWC=rgb_HWC,
            )
            for at, rgb_HWC in enumerate(block.frames)
            if block.epoch or block.first_frame + at > self.skip_through
        ]
        self.queue.drop = self.start.drop if self.connection is not None else "stall"
        self.metrics.dropped(self.queue.put(items))
        if self.life.state == "warming":
            self.go("paused" if self.user_paused else "playing")
        for applied in self.receipts.block(info, block.media_s):
            self.say(applied)
        self.hold_back()
        self.wake.set()

    def take_event(self, event: StreamEvent) -> None:
        """What else the runtime says; `applied` is read from the blocks themselves."""
        if self.life.state not in LIVE:
            return
        if event.kind == "ended":
            self.ended = True
        elif event.kind == "failed":
            self.fail(event.message)
        self.wake.set()

    def unmake(self, receipt: Receipt) -> None:
        """The runtime turned the stream back to this block: what waits from there on is void."""
        frame = round(receipt.media_s * self.fps)
        self.queue.unmake(frame)
        self.next_block, self.next_frame = min(self.next_block, receipt.block), min(self.next_frame, frame)
        self.hold_back()
        self.wake.set()

    # What goes to the connection.

    def say(self, message: p.Message) -> None:
        self.answers.append(message)
        self.wake.set()

    def go(self, state: p.State, message: str = "") -> None:
        if self.life.go(state):
            log.info("session %s", state, extra={"session": self.id})
            self.say(p.SessionState(state=state, message=message))

    def next_item(self) -> p.Message | QueuedFrame | None:
        """What the connection sends next; None: wait for `wake`."""
        if self.answers:
            return self.answers.popleft()
        if self.life.state == "playing" or (self.finished and not self.done):
            if self.queue.waiting and self.queue.open and self.queue.waiting[0].info is not self.announced:
                return self._announce(self.queue.waiting[0].info)
            if item := self.queue.take():
                self.frames_sent += 1
                if self.recorder is not None and not item.again:
                    self.recorder.add(item.rgb_HWC)
                self.hold_back()
                return item
            if self.ended and not self.queue.waiting:
                self._finish()
                return self.answers.popleft()
        return None

    @property
    def finished(self) -> bool:
        """The stream came to its own end, and all its frames were sent; that they arrived is not known."""
        return self.ended and not self.stopped and self.life.state == "closed"

    def _announce(self, info: BlockInfo) -> p.ChunkMetadata:
        self.announced = info
        return p.ChunkMetadata(
            epoch=info.epoch,
            generation_chunk_index=info.block,
            first_frame=info.first_frame,
            num_frames=info.frames,
            media_seconds=info.first_frame / self.fps,
            slack_seconds=info.slack_s,
            steps=info.steps,
            prompt_version=info.prompt_version,
            flags=info.flags,
            started_event_ids=self.receipts.started(info.block),
        )

    def hold_back(self) -> None:
        """The stream waits while a viewer who wants every frame, or who is away, has a full queue."""
        stall = self.start.drop == "stall" or self.connection is None
        held = self.stalled
        if stall and self.queue.full:
            self.stalled = True
        elif not stall or self.queue.half_empty:
            self.stalled = False
        if held != self.stalled and not self.user_paused:
            self.nudge("pause" if self.stalled else "play")

    # Commands.

    async def handle(self, message: Any) -> None:
        """One message of the client; every command gets an answer."""
        self.heard_s = self.clock()
        if isinstance(message, p.Playback):
            return self._playback(message)
        if isinstance(message, p.Ping):
            return self.say(p.Pong(id=message.id, server_seconds=self.clock() - self.accepted_s))
        try:
            async with self.lock:
                if self.life.state not in LIVE:
                    raise p.Refusal("illegal_state", f"the session is {self.life.state}: it takes no {message.type}")
                await obey(self, message)
        except p.Refusal as refusal:
            self.metrics.error(refusal.code)
            self.say(p.error_of(refusal, message.id))

    async def call(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        try:
            return await asyncio.to_thread(function, *arguments, **named)
        except UserError as error:
            raise p.Refusal("bad_request", str(error)) from None
        except Exception as error:
            log.exception("a command failed", extra={"session": self.id})
            self.fail(f"{type(error).__name__}: {error}")
            raise p.Refusal("internal", "the stream failed", fatal=True) from error

    def _playback(self, message: p.Playback) -> None:
        if self.life.state not in LIVE:
            return
        self.playhead_s = message.position_seconds
        self.nudge("playhead", message.position_seconds)
        if message.received_frame is not None:
            self.queue.confirm(message.received_frame)
            self.wake.set()

    def nudge(self, name: str, *arguments: float) -> None:
        """Tell the stream, if there is one still; it never blocks and needs no answer."""
        if self.given is not None and not self.ended:
            with suppress(UserError):  # it has ended this moment: the event is under way
                getattr(self.given, name)(*arguments)

    def media_s(self, block: int) -> float:
        """Media time of a block's first frame."""
        return float(self.geometry.block_pixel_start(block) / self.fps)

    # Connections come and go.

    def attach(self, connection: object, config: p.VideoConfig, resume: p.Resume | None = None) -> None:
        """Frames go to this connection from now on; its first message is `video.start`."""
        lost, resumed = 0, resume is not None
        if resume is not None:
            lost = self.queue.rewind(resume.epoch, resume.last_frame)
            self.skip_through = max(self.skip_through, resume.last_frame)
            while self.queue.waiting and self.queue.waiting[0].key <= (resume.epoch, resume.last_frame):
                self.queue.waiting.popleft()
            if self.finished:  # the end is said again, behind the frames that did not come through
                self.done = False
                self.answers = deque(one for one in self.answers if not isinstance(one, p.Done))
        self.connection, self.announced = connection, None
        self.heard_s = self.clock()
        first = next(iter(self.queue.waiting), None)
        following = resume.last_frame + 1 if resume is not None else 0
        started = p.VideoStart(
            id=resume.id if resume is not None else self.start.id,
            request_id=self.id,
            resume_token=self.token,
            resume_within_seconds=self.resume_within_s,
            format=self.start.format,
            config=config,
            epoch=self.epoch,
            next_frame=first.frame if first is not None else max(following, self.queue.newest[1] + 1),
            lost_frames=lost,
            state=self.life.state,
            prompt=self.prompt,
            prompt_version=max(0, self.newest_version),
            warnings=[] if self.given is None else list(self.given.warnings),
        )
        if resumed:
            self.answers.appendleft(started)
        else:
            self.answers = deque([started, *(m for m in self.answers if not isinstance(m, p.SessionState))])
        self.hold_back()
        self.wake.set()

    resume_within_s = 30.0

    def detach(self, connection: object) -> None:
        """That connection is gone; the session waits for another."""
        if self.connection is connection:
            self.connection, self.left_s = None, self.clock()
            if self.life.state in LIVE:
                self.hold_back()
            self.wake.set()

    # The end.

    def _finish(self) -> None:
        self.done = True
        self.go("closed")
        self.say(
            p.Done(
                chunks=self.chunks,
                frames=self.frames_sent,
                dropped_frames=self.queue.dropped_frames,
                stopped=self.stopped,
            )
        )

    async def close(self) -> None:
        """End the stream; what waits is not sent any more. A second call does nothing."""
        if self.life.state not in OVER:
            if self.opened:
                self.queue.waiting.clear()
                self._finish()
            else:
                self.go("closed")
        live, self.given = self.given, None
        if live is not None:
            await asyncio.to_thread(live.close)
            await finish_recording(self)

    def fail(self, message: str) -> None:
        """The stream broke: said once, and the end."""
        if self.life.state not in OVER:
            self.go("failed", message)
            self.metrics.error("internal")
            self.say(p.Error(code="internal", message=message[:2000], fatal=True))
