"""A frame server in this process, on a free port, in a thread of its own; and a bare client of the protocol."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from streamgen_infer import protocol as p
from streamgen_infer.serve.limits import Quota, ServeSettings, Tokens
from streamgen_infer.serve.routes import build_app
from streamgen_infer.server import FrameServer

OPEN = Tokens({}, 1000)
LOCKED = Tokens({"secret-a": Quota("ann", 2), "secret-b": Quota("bob", 2)}, 20)


class Running:
    """A server and where it listens."""

    def __init__(self, server: FrameServer, port: int, loop: asyncio.AbstractEventLoop) -> None:
        self.server, self.port, self.loop = server, port, loop
        self.url, self.http = f"ws://127.0.0.1:{port}", f"http://127.0.0.1:{port}"

    def call(self, coroutine: Any) -> Any:
        """Run it on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)


@contextmanager
def serving(make_engine: Callable[[], Any], folder: Path, **settings: Any) -> Iterator[Running]:
    """A ready server; drained at the end."""
    port, ready_s = settings.pop("port", 0), settings.pop("ready_s", 20.0)
    values: dict[str, Any] = {"tokens": OPEN, "work_dir": folder / "work", **settings}
    server = FrameServer(make_engine, ServeSettings(**values))
    config = uvicorn.Config(
        build_app(server),
        port=port,
        log_config=None,
        ws="websockets-sansio",
        ws_max_size=256 * 1024,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=1,
    )
    web = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await web.serve()

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    wait_for(lambda: web.started and server.ready is None, ready_s)
    port = web.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(server, port, loops[0])
    finally:
        web.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


def wait_for(holds: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Until it holds; AssertionError if it never does."""
    until = time.monotonic() + seconds
    while not (value := holds()):
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.005)
    return value


class Talk:
    """One websocket, as it is: what was said and which frames came."""

    def __init__(self, running: Running, *, token: str | None = None, headers: Any = None, **more: Any) -> None:
        names: Any = more.pop("subprotocols", [p.SUBPROTOCOL])
        headers = dict(headers or {}) | ({} if token is None else {"Authorization": f"Bearer {token}"})
        self.socket: ClientConnection = connect(
            running.url + p.PATH,
            subprotocols=names,
            additional_headers=headers,
            compression=None,
            proxy=None,
            legacy=True,  # closed by `cut`, not by a handshake that reads all that is left
            **more,
        )
        self.said: list[Any] = []
        self.frames: list[tuple[p.FrameHeader, bytes]] = []

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *what: object) -> None:
        self.cut()

    def cut(self) -> None:
        """The cable is out: no close frame."""
        with suppress(OSError):
            self.socket.socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: Any) -> None:
        self.socket.send(message if isinstance(message, str | bytes) else json.dumps(message))

    def start(self, **fields: Any) -> p.VideoStart:
        self.send({"type": "session.start", "prompt": "a red star", "format": "rgb", **fields})
        return self.until(p.VideoStart)

    def next(self, seconds: float = 20.0) -> Any:
        data = self.socket.recv(seconds)
        if isinstance(data, bytes):
            header, payload = p.unpack_frame(data)
            self.frames.append((header, bytes(payload)))
            return self.frames[-1]
        self.said.append(p.parse_server(data))
        return self.said[-1]

    def until(self, kind: Any, **fields: Any) -> Any:
        """The next message of this type with these fields."""
        while True:
            item = self.next()
            if isinstance(item, kind) and all(getattr(item, name, None) == value for name, value in fields.items()):
                return item

    def ask(self, message: dict[str, Any]) -> Any:
        """The first answer to a command."""
        name = f"ask{len(self.said)}"
        self.send({**message, "id": name})
        return self.until(p.Message, id=name)

    def until_frame(self, number: int) -> p.FrameHeader:
        while not self.frames or self.frames[-1][0].frame < number:
            self.next()
        return self.frames[-1][0]

    def numbers(self) -> list[int]:
        return [header.frame for header, _ in self.frames if header.kind == p.MEDIA]

    def closed(self) -> int:
        """The close code, after whatever is left."""
        with suppress(ConnectionClosed):
            while True:
                self.next()
        assert self.socket.protocol.close_code is not None
        return self.socket.protocol.close_code


def get(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, body, {k.replace("_", "-"): v for k, v in headers.items()}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


def refused(running: Running, first: Any = None, **connection: Any) -> tuple[str, int]:
    """The code that the first message meets, and how the connection ends."""
    with Talk(running, **connection) as talk:
        if first is not None:
            with suppress(ConnectionClosed):  # refused before it could speak
                talk.send(first)
        code = talk.closed()
    return talk.said[-1].code, code


START = {"type": "session.start", "prompt": "a red star"}
