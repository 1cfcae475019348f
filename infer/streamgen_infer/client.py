"""A viewer of the frame server, for programs: `Viewer` with asyncio, `watch` without. Needs websockets and pydantic.

async with Viewer("ws://127.0.0.1:8765", prompt="a red star over a snow background") as viewer:
    async for frame in viewer.frames():
        show(frame.rgb())
"""

from __future__ import annotations

import asyncio
import io
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake

from streamgen_infer import protocol as p

if TYPE_CHECKING:
    import numpy as np

MAX_FRAME_BYTES = 64 * 2**20
ANSWER_S = 30.0
PLAYBACK_S = 0.1
FIRST_RETRY_S, LAST_RETRY_S = 0.1, 5.0


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame as it came. `at_s` is this machine's monotonic clock."""

    header: p.FrameHeader
    payload: bytes
    at_s: float

    def rgb(self) -> np.ndarray:
        """uint8 [height, width, 3]; ValueError for m4s, whose frames only a decoder of the whole stream can show."""
        import numpy as np

        header = self.header
        if header.encoding == p.ENCODINGS["rgb"]:
            return np.frombuffer(self.payload, np.uint8).reshape(header.height, header.width, 3)
        if header.encoding == p.ENCODINGS["m4s"]:
            raise ValueError("a fragment of an MP4 is no picture by itself: join all payloads and decode them")
        from PIL import Image

        return np.asarray(Image.open(io.BytesIO(self.payload)).convert("RGB"))


class Viewer:
    """A session. Lost connections are taken up again by themselves while the server keeps the session.

    `start` are fields of `session.start` (prompt, seed, format, ...). Methods that ask for something return the
    server's answer and raise `protocol.Refusal`. With `playback` the position of the newest frame taken is reported
    ten times a second, as a player does.
    """

    def __init__(
        self, url: str, *, token: str | None = None, playback: bool = True, retry_s: float = 20.0, **start: Any
    ) -> None:
        self.address = url.rstrip("/").replace("http", "ws", 1) if url.startswith("http") else url.rstrip("/")
        if not self.address.endswith(p.PATH):
            self.address += p.PATH
        self.token, self.playback, self.retry_s = token, playback, retry_s
        self.asked = {"type": "session.start", **start}
        self.started: p.VideoStart | None = None
        self.done: p.Done | None = None
        self.messages: list[p.Message] = []
        """All that the server said, oldest first; the caller may clear it."""
        self.resumed = 0
        self.accepted_at_s = 0.0
        """When `video.start` came first."""
        self._last = {"last_frame": -1, "epoch": 0}
        self._shown_s: float | None = None
        self._socket: ClientConnection | None = None
        self._frames: asyncio.Queue[Frame | BaseException | None] = asyncio.Queue()
        self._answers: dict[str, tuple[asyncio.Future[p.Message], type[p.Message]]] = {}
        self._ids = itertools.count(1)
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Viewer:
        await self._connect(self.asked)
        self._tasks = [asyncio.create_task(self._receive())]
        if self.playback:
            self._tasks.append(asyncio.create_task(self._report()))
        return self

    async def __aexit__(self, *what: object) -> None:
        if self.done is None and self._socket is not None:
            with suppress(p.Refusal, ConnectionClosed, TimeoutError):
                await self.ask({"type": "session.stop"})
        await self.leave()

    async def leave(self) -> None:
        """Go without a word: the server keeps the session for a while."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            await self._socket.close()

    async def frames(self) -> AsyncIterator[Frame]:
        """Every frame once, in order; a frame of a higher epoch replaces later ones of lower epochs."""
        while True:
            item = await self._frames.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            if item.header.kind == p.MEDIA:
                self._shown_s = item.header.media_s
            yield item

    # Asking.

    async def prompt(self, text: str, **more: Any) -> p.Message:
        """A new prompt; the answer names its version, block and time. more: fields of `interaction`."""
        return await self.ask({"type": "session.interaction", "interaction": {"event": {"prompt": text}, **more}})

    async def pause(self) -> p.Message:
        return await self.ask({"type": "session.pause"})

    async def play(self) -> p.Message:
        return await self.ask({"type": "session.play"})

    async def seek(self, media_s: float) -> p.Message:
        return await self.ask({"type": "session.seek", "position_seconds": media_s})

    async def branch(self) -> str:
        """A name for `Viewer(url, branch=...)`."""
        answer = await self.ask({"type": "session.branch"}, p.Applied)
        assert isinstance(answer, p.Applied) and answer.branch is not None
        return answer.branch

    async def report(self, position_s: float) -> None:
        """What is on the screen now; with `playback` it is done by itself."""
        if self._socket is None:
            return
        report: dict[str, Any] = {"type": "session.playback", "position_seconds": position_s}
        if self._last["last_frame"] >= 0:
            report["received_frame"] = self._last["last_frame"]
        with suppress(ConnectionClosed):  # the receiver sees to it
            await self._socket.send(p.dump(report))

    def cut(self) -> None:
        """Break the connection off, as a network that goes down does; without `leave` it is taken up again."""
        if self._socket is not None:
            self._socket.transport.abort()

    async def ask(self, message: dict[str, Any], answer: type[p.Message] | None = None) -> p.Message:
        """Send a command and wait for its first answer, or for the one of this type; Refusal if it is refused."""
        assert self._socket is not None
        name, future = f"c{next(self._ids)}", asyncio.get_running_loop().create_future()
        self._answers[name] = (future, answer or p.Message)
        try:
            await self._socket.send(p.dump({**message, "id": name}))
            return await asyncio.wait_for(future, ANSWER_S)
        except ConnectionClosed as error:
            raise p.Refusal("illegal_state", "the connection is lost") from error
        finally:
            del self._answers[name]

    # The connection.

    async def _connect(self, first: dict[str, Any]) -> None:
        headers = {} if self.token is None else {"Authorization": f"Bearer {self.token}"}
        subprotocols: Any = [p.SUBPROTOCOL]
        socket = await connect(
            self.address,
            subprotocols=subprotocols,
            additional_headers=headers,
            max_size=MAX_FRAME_BYTES,
            compression=None,
            proxy=None,
        )
        try:
            await socket.send(p.dump(first))
            while True:
                message = p.parse_server(await socket.recv())
                self.messages.append(message)
                if isinstance(message, p.Error):
                    retry_s = message.retry_after_seconds
                    raise p.Refusal(message.code, message.message, fatal=True, retry_after_s=retry_s)
                if isinstance(message, p.VideoStart):
                    break
        except BaseException:
            await socket.close()
            raise
        self.accepted_at_s = self.accepted_at_s or time.monotonic()
        self.started, self._socket = message, socket  # from now on it may be spoken to

    async def _receive(self) -> None:
        try:
            while True:
                try:
                    assert self._socket is not None
                    async for data in self._socket:
                        self._take(data)
                    if self.done is not None:
                        break
                except ConnectionClosed:
                    if self.done is not None:
                        break
                await self._resume()
            self._frames.put_nowait(None)
        except (p.Refusal, OSError, InvalidHandshake, ConnectionClosed) as error:
            self._frames.put_nowait(error)
        finally:
            for future, _ in self._answers.values():
                if not future.done():
                    future.set_exception(p.Refusal("illegal_state", "the session is over"))

    async def _resume(self) -> None:
        """Knock until the server takes the session up again, or says that it will not."""
        assert self.started is not None
        until_s, pause_s = time.monotonic() + self.retry_s, FIRST_RETRY_S
        while True:
            first = {"type": "session.resume", "resume_token": self.started.resume_token, **self._last}
            try:
                await self._connect(first)
                self.resumed += 1
                return
            except (OSError, InvalidHandshake, ConnectionClosed):
                if time.monotonic() > until_s:
                    raise
            except p.Refusal as refusal:
                if refusal.code not in ("not_ready", "draining") or time.monotonic() > until_s:
                    raise
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, LAST_RETRY_S)

    def _take(self, data: str | bytes) -> None:
        if isinstance(data, bytes):
            header, payload = p.unpack_frame(data)
            if header.kind == p.MEDIA:
                self._last = {"last_frame": header.frame, "epoch": header.epoch}
            self._frames.put_nowait(Frame(header, bytes(payload), time.monotonic()))
            return
        message = p.parse_server(data)
        self.messages.append(message)
        if isinstance(message, p.Done):
            self.done = message
        future, wanted = self._answers.get(getattr(message, "id", None) or "", (None, p.Message))
        if future is None or future.done():
            return
        if isinstance(message, p.Error):
            future.set_exception(p.Refusal(message.code, message.message))
        elif isinstance(message, wanted):
            future.set_result(message)

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PLAYBACK_S)
            if self._shown_s is not None:
                await self.report(self._shown_s)


def watch(url: str, *, seconds: float | None = None, **named: Any) -> Iterator[Frame]:
    """Frames without asyncio; arguments of `Viewer`. seconds: of media, then the session is stopped."""
    if seconds is not None:
        named["max_seconds"] = seconds
    loop = asyncio.new_event_loop()
    viewer = Viewer(url, **named)
    try:
        loop.run_until_complete(viewer.__aenter__())
        frames = viewer.frames()
        while True:
            try:
                yield loop.run_until_complete(anext(frames))
            except StopAsyncIteration:
                return
    finally:
        loop.run_until_complete(viewer.__aexit__())
        loop.close()
