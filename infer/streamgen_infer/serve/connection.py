"""One websocket: its first message, then a reader and a sender side by side until either is done."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from streamgen_infer import protocol as p
from streamgen_infer.serve.frame_encoders import FrameEncoder, new_encoder
from streamgen_infer.serve.limits import Quota, Rate, check_origin
from streamgen_infer.serve.session import MAX_ANSWERS, Session
from streamgen_infer.serve.session_state import OVER
from streamgen_infer.serve.viewer_queue import QueuedFrame
from streamgen_infer.serve.waiting_line import Turn

if TYPE_CHECKING:
    from streamgen_infer.server import FrameServer

log = logging.getLogger("streamgen.serve")
STRIKES, STRIKES_S = 10, 10.0
"""So many refused messages in so many seconds end a connection."""
INLINE_PIXELS = 256 * 256
"""Smaller frames are encoded at once: a worker thread would cost more than it saves."""
CLOSE_S = 2.0


class Connection:
    """`run` from the handshake to the close."""

    def __init__(self, socket: WebSocket, server: FrameServer, clock: Callable[[], float] = time.monotonic) -> None:
        self.socket, self.server, self.clock = socket, server, clock
        settings = server.settings
        self.rate = Rate(settings.messages_per_s, settings.messages_burst, clock)
        self.strikes: deque[float] = deque()
        self.end: p.Refusal | None = None
        self.session: Session | None = None
        self.tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        socket = self.socket
        offered = list(socket.scope.get("subprotocols", []))
        await socket.accept(subprotocol=p.SUBPROTOCOL if p.SUBPROTOCOL in offered else None)
        try:
            try:
                if p.SUBPROTOCOL not in offered:
                    raise p.Refusal("bad_request", f"offer the subprotocol {p.SUBPROTOCOL}", fatal=True)
                await self._begin(offered)
            except p.Refusal as refusal:
                self.server.metrics.error(refusal.code)
                refusal.fatal = True
                self.end = self.end or refusal
            if self.end is None and self.session is not None:
                await self._talk()
            await self._close()
        except (WebSocketDisconnect, ConnectionError) as error:
            log.info("connection lost: %s", type(error).__name__, extra={"session": self._name()})
            error.with_traceback(None)
        finally:
            if self.session is not None:
                await self.server.left(self, self.session)
            # Errors hold the frames that they passed through, and those hold a stream's memory: a circle, which would
            # stay until the garbage collector comes by.
            self.end = None

    def kick(self, refusal: p.Refusal) -> None:
        """End this connection from outside, also when its sender is stuck in a full socket."""
        self.end = refusal
        for task in self.tasks:
            task.cancel()

    # The beginning.

    async def _begin(self, offered: list[str]) -> None:
        headers, settings = self.socket.headers, self.server.settings
        check_origin(headers.get("origin"), headers.get("host"), bound_to=settings.host, allowed=settings.origins)
        quota = settings.tokens.check(headers.get("authorization"), offered)
        try:
            first = await asyncio.wait_for(self._receive(), settings.start_s)
        except TimeoutError:
            raise p.Refusal("idle", f"no session.start within {settings.start_s:g} s") from None
        self._meter(first)
        if isinstance(first, p.Resume):
            session = await self.server.resume(first, quota)
        elif isinstance(first, p.Start):
            begin = self._begin_in_turn if first.wait_seconds else self.server.begin
            opened: Session | None = await begin(first, quota)
            if opened is None:
                return
            session = opened
        else:
            raise p.Refusal("illegal_state", f"session.start or session.resume comes first, not {first.type}")
        self.session = session
        start = session.start
        self.encoder: FrameEncoder = new_encoder(
            start.format,
            height=session.geometry.height,
            width=session.geometry.width,
            fps=session.fps,
            quality=start.quality,
        )
        session.attach(self, self.server.config(session, self.encoder), first if isinstance(first, p.Resume) else None)

    async def _begin_in_turn(self, start: p.Start, quota: Quota) -> Session | None:
        """A session, for which the client may have to wait; None if it wants none any more."""
        turn = Turn(start.wait_seconds, self.clock)
        opening = asyncio.create_task(self.server.begin(start, quota, turn))
        beside = [asyncio.create_task(self._tell_place(turn)), asyncio.create_task(self._read_in_line())]
        self.tasks = beside
        try:
            await asyncio.wait([opening, *beside], return_when=asyncio.FIRST_COMPLETED)
        finally:
            turn.leave()
            left = [task for task in beside if task.done()]
            for task in beside:
                task.cancel()
            self.tasks = []
        await asyncio.gather(*beside, return_exceptions=True)
        if not left:
            return await opening
        (session,) = await asyncio.gather(opening, return_exceptions=True)
        if isinstance(session, Session):  # it came while the client went
            await self.server.end(session)
        for task in left:
            if not task.cancelled():
                task.result()
        return None

    async def _tell_place(self, turn: Turn) -> None:
        while True:
            await turn.changed.wait()
            turn.changed.clear()
            if turn.place is not None:
                state = p.SessionState(state="queued", place=turn.place, message=turn.short)
                await self._put(self.socket.send_text(state.model_dump_json(exclude_none=True)))

    async def _read_in_line(self) -> None:
        """What a client may say while it waits; returns when it stops."""
        while True:
            answer: p.Message
            command_id = None
            try:
                message = await self._receive()
                command_id = getattr(message, "id", None)
                self._meter(message)
                match message:
                    case p.Playback():
                        continue
                    case p.Ping():
                        answer = p.Pong(id=command_id, server_seconds=0.0)
                    case p.Stop():
                        answer = p.Received(id=command_id, command=message.type, version=1)
                    case _:
                        raise p.Refusal("illegal_state", f"the session waits for a place: it takes no {message.type}")
            except p.Refusal as refusal:
                self._strike(refusal)
                message, answer = None, p.error_of(refusal, command_id)
            await self._put(self.socket.send_text(answer.model_dump_json(exclude_none=True)))
            if isinstance(message, p.Stop):
                done = p.Done(chunks=0, frames=0, dropped_frames=0, stopped=True)
                await self._put(self.socket.send_text(done.model_dump_json(exclude_none=True)))
                return

    async def _receive(self) -> Any:
        """The next message; Refusal for what is none."""
        event = await self.socket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code") or 1006)
        if event.get("text") is None:
            raise p.Refusal("bad_message", "a client sends JSON as text, no binary messages")
        return p.parse_client(event["text"])

    def _meter(self, message: Any) -> None:
        if not self.rate.take(0.5 if isinstance(message, p.Playback) else 1.0):
            raise p.Refusal("rate", f"more than {self.server.settings.messages_per_s:g} messages per second")

    # Both directions.

    async def _talk(self) -> None:
        session = self.session
        assert session is not None
        self.tasks = [asyncio.create_task(self._read(session)), asyncio.create_task(self._send(session))]
        done, open_tasks = await asyncio.wait(self.tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in open_tasks:
            task.cancel()
        await asyncio.gather(*open_tasks, return_exceptions=True)
        self.tasks = []
        errors = [error for task in done if not task.cancelled() and (error := task.exception()) is not None]
        for error in errors:
            if isinstance(error, p.Refusal):
                self.end = self.end or error
            elif self.end is None:
                raise error

    async def _read(self, session: Session) -> None:
        while True:
            command_id = None
            try:
                message = await self._receive()
                command_id = getattr(message, "id", None)
                self._meter(message)
            except p.Refusal as refusal:
                self._strike(refusal)
                session.heard_s = self.clock()
                session.say(p.error_of(refusal, command_id))
                continue
            # Not cancelled half way: what the stream has accepted, the session must know.
            await asyncio.shield(self.server.handle(session, message))
            while len(session.answers) > MAX_ANSWERS:
                await asyncio.sleep(0.01)

    def _strike(self, refusal: p.Refusal) -> None:
        now_s = self.clock()
        self.server.metrics.error(refusal.code)
        self.strikes.append(now_s)
        while self.strikes[0] < now_s - STRIKES_S:
            self.strikes.popleft()
        if len(self.strikes) > STRIKES:
            refusal.fatal = True
            raise refusal

    async def _send(self, session: Session) -> None:
        if opening := self.encoder.opening():
            await self._send_bytes(self._header(session, None, len(opening)), opening)
        while True:
            item = session.next_item()
            if item is None:
                if session.life.state in OVER:
                    return
                session.wake.clear()
                await session.wake.wait()
            elif isinstance(item, QueuedFrame):
                started_s = self.clock()
                payload = await self._encode(item)
                self.server.metrics.encode.observe(self.clock() - started_s)
                await self._send_bytes(self._header(session, item, len(payload)), payload)
                self.server.metrics.frames.inc()
                await asyncio.sleep(0)  # a socket with room never waits: let others have a turn
            else:
                await self._put(self.socket.send_text(item.model_dump_json(exclude_none=True)))

    async def _put(self, sending: Awaitable[None]) -> None:
        try:
            await sending
        except RuntimeError as error:  # what a socket that closed meanwhile answers
            raise ConnectionError(str(error)) from error

    async def _encode(self, item: QueuedFrame) -> bytes:
        if item.rgb_HWC.shape[0] * item.rgb_HWC.shape[1] <= INLINE_PIXELS:
            return self.encoder.encode(item.rgb_HWC)
        return await asyncio.to_thread(self.encoder.encode, item.rgb_HWC)

    async def _send_bytes(self, header: p.FrameHeader, payload: bytes) -> None:
        message = p.pack_frame(header, payload)
        await self._put(self.socket.send_bytes(message))
        self.server.metrics.sent_bytes.inc(len(message))

    def _header(self, session: Session, item: QueuedFrame | None, size: int) -> p.FrameHeader:
        """Of a frame; without one, of the encoder's opening."""
        now_s, zero_s = self.clock(), session.accepted_s
        info = None if item is None else item.info
        height, width = session.geometry.height, session.geometry.width
        return p.FrameHeader(
            epoch=session.epoch if info is None else info.epoch,
            block=0 if info is None else info.block,
            frame=0 if item is None else item.frame,
            prompt_version=0 if info is None else info.prompt_version,
            media_s=0.0 if item is None else item.media_s,
            deadline_s=0.0 if item is None else item.due_at_s - zero_s,
            sent_s=now_s - zero_s,
            slack_s=0.0 if info is None else info.slack_s,
            steps=0 if info is None else info.steps,
            dropped=0 if item is None else min(item.dropped, 2**16 - 1),
            width=width,
            height=height,
            flags=0 if info is None else info.flags,
            encoding=p.ENCODINGS[session.start.format],
            kind=p.INIT if item is None else p.MEDIA,
            byte_length=size,
        )

    # The end.

    async def _close(self) -> None:
        """Say why, if there is a reason, and close; a socket that takes nothing is left to the server."""
        code, why = 1000, ""
        try:
            async with asyncio.timeout(CLOSE_S):
                if self.end is not None:
                    code, why = p.CLOSE_CODES[self.end.code], self.end.code
                    await self.socket.send_text(p.error_of(self.end).model_dump_json(exclude_none=True))
                elif self.session is not None and self.session.life.state == "failed":
                    code = 1011
                await self.socket.close(code, why)
        except (TimeoutError, RuntimeError):
            log.info("a connection took no close", extra={"session": self._name()})
        if hasattr(self, "encoder"):
            self.encoder.close()

    def _name(self) -> str:
        return "-" if self.session is None else self.session.id
