"""The whole application without a socket: a websocket of ASGI events on the test's own event loop.

A message is handled when the application asks for the next one, so a test knows when it may look.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from streamgen_infer import protocol as p
from streamgen_infer.serve.limits import ServeSettings, Tokens
from streamgen_infer.serve.routes import build_app
from streamgen_infer.server import FrameServer

SCOPE = {
    "type": "websocket",
    "asgi": {"version": "3.0", "spec_version": "2.4"},
    "http_version": "1.1",
    "scheme": "ws",
    "path": p.PATH,
    "raw_path": p.PATH.encode(),
    "query_string": b"",
    "root_path": "",
    "headers": [(b"host", b"127.0.0.1")],
    "client": ("127.0.0.1", 1),
    "server": ("127.0.0.1", 80),
    "subprotocols": [p.SUBPROTOCOL],
    "state": {},
}


@asynccontextmanager
async def application(runtime: Any, folder: Path, **settings: Any) -> AsyncIterator[tuple[FrameServer, Any]]:
    """A ready server and its ASGI application; drained at the end."""
    values: dict[str, Any] = {"tokens": Tokens({}, 100_000), "work_dir": folder / "work", **settings}
    server = FrameServer(lambda: runtime, ServeSettings(**values))
    app = build_app(server)
    await server.start()
    while server.ready is not None:
        await asyncio.sleep(0.001)
    try:
        yield server, app
    finally:
        await server.drain()


class Wire:
    """One connection. `said` and `frames` hold what came, `close_code` the end."""

    def __init__(self, app: Any) -> None:
        self.said: list[Any] = []
        self.frames: list[p.FrameHeader] = []
        self.close_code: int | None = None
        self._events: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._asked = asyncio.Event()
        """The application waits for a message: all before it are handled."""
        self._events.put_nowait({"type": "websocket.connect"})
        self.task = asyncio.create_task(app(dict(SCOPE), self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._events.empty():
            self._asked.set()
        return await self._events.get()

    async def _send(self, event: dict[str, Any]) -> None:
        if event["type"] == "websocket.close":
            self.close_code = event.get("code", 1000)
        elif (data := event.get("bytes")) is not None:
            self.frames.append(p.unpack_frame(data)[0])
        elif (text := event.get("text")) is not None:
            self.said.append(p.parse_server(text))

    async def send(self, message: Any) -> None:
        """Until the application has handled it, or has ended."""
        if isinstance(message, bytes):
            event: dict[str, Any] = {"type": "websocket.receive", "bytes": message}
        else:
            text = message if isinstance(message, str) else json.dumps(message)
            event = {"type": "websocket.receive", "text": text}
        self._asked.clear()
        self._events.put_nowait(event)
        await self._handled()

    async def _handled(self) -> None:
        asked = asyncio.create_task(self._asked.wait())
        await asyncio.wait((asked, self.task), return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()

    async def until(self, kind: Any) -> Any:
        """The first message of this type."""
        while True:
            for item in self.said:
                if isinstance(item, kind):
                    return item
            assert not self.task.done(), f"the connection ended ({self.close_code}) without a {kind}"
            await asyncio.sleep(0)

    @property
    def over(self) -> bool:
        return self.task.done()

    async def cut(self) -> None:
        """The client is gone; what the application raises is raised here."""
        self._events.put_nowait({"type": "websocket.disconnect", "code": 1006})
        await self.task
