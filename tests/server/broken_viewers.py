"""Viewers that break off at every point of a connection, on bare TCP sockets. Each function of WAYS is one of them."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from typing import Any

from streamgen_infer import protocol as p

MASK = b"\x00\x00\x00\x00"
HANDSHAKE = (
    f"GET {p.PATH} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    f"Sec-WebSocket-Protocol: {p.SUBPROTOCOL}\r\n\r\n"
).encode()
WAIT_S = 20.0


def frame(payload: bytes, opcode: int = 1) -> bytes:
    """A client's websocket frame (RFC 6455, 5.2), masked by zeros."""
    size = len(payload)
    head = bytes([0x80 | opcode])
    if size < 126:
        return head + bytes([0x80 | size]) + MASK + payload
    return head + bytes([0x80 | 126]) + struct.pack("!H", size) + MASK + payload


def text(**message: Any) -> bytes:
    return frame(json.dumps(message).encode())


START = text(type="session.start", prompt="a red star", format="rgb")


class Client:
    """Opens connections to one port; remembers the newest resume token."""

    def __init__(self, port: int) -> None:
        self.port, self.token = port, "none"

    def connect(self) -> Wire:
        return Wire(socket.create_connection(("127.0.0.1", self.port), timeout=WAIT_S))

    def websocket(self) -> Wire:
        wire = self.connect()
        wire.send(HANDSHAKE)
        while b"\r\n\r\n" not in wire.data:
            wire.more()
        assert wire.data.startswith(b"HTTP/1.1 101"), wire.data[:100]
        wire.data = wire.data.split(b"\r\n\r\n", 1)[1]
        return wire

    def playing(self, messages: int = 3) -> Wire:
        """A session, and so many of its messages and frames."""
        wire = self.websocket()
        wire.send(START)
        while True:
            opcode, payload = wire.read()
            if opcode == 1 and (said := json.loads(payload))["type"] == "video.start":
                self.token = said["resume_token"]
                break
            if opcode == 8 or (opcode == 1 and json.loads(payload)["type"] == "error"):
                return wire  # a full server refuses: an end of its own
        for _ in range(messages):
            if wire.read()[0] == 8:
                break
        return wire


class Wire:
    """One socket."""

    def __init__(self, raw: socket.socket) -> None:
        self.raw, self.data = raw, b""

    def send(self, data: bytes) -> None:
        self.raw.sendall(data)

    def more(self) -> None:
        data = self.raw.recv(65536)
        if not data:
            raise ConnectionError("the server hung up")
        self.data += data

    def _take(self, size: int) -> bytes:
        while len(self.data) < size:
            self.more()
        taken, self.data = self.data[:size], self.data[size:]
        return taken

    def read(self) -> tuple[int, bytes]:
        """Opcode and payload of the server's next frame; opcode 8 also for the end of the connection."""
        try:
            first, size = self._take(2)
            if size == 126:
                size = struct.unpack("!H", self._take(2))[0]
            elif size == 127:
                size = struct.unpack("!Q", self._take(8))[0]
            return first & 15, self._take(size)
        except ConnectionError:
            return 8, b""

    def until_the_end(self) -> None:
        while self.read()[0] != 8:
            pass

    def hang_up(self) -> None:
        self.raw.close()

    def cut(self) -> None:
        """A reset, as when a machine goes down."""
        self.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.raw.close()


def a_knock(client: Client) -> None:
    client.connect().hang_up()


def half_a_handshake(client: Client) -> None:
    wire = client.connect()
    wire.send(HANDSHAKE[: len(HANDSHAKE) // 2])
    wire.cut()


def no_http(client: Client) -> None:
    wire = client.connect()
    wire.send(b"\x16\x03\x01" + bytes(range(64)) + b"\r\n\r\n")
    wire.hang_up()


def a_handshake_and_no_word(client: Client) -> None:
    client.websocket().cut()


def half_a_start(client: Client) -> None:
    wire = client.websocket()
    wire.send(START[: len(START) // 2])
    wire.cut()


def gone_before_the_answer(client: Client) -> None:
    wire = client.websocket()
    wire.send(START)
    wire.cut()


def cut_in_the_stream(client: Client) -> None:
    client.playing().cut()


def hung_up_in_the_stream(client: Client) -> None:
    client.playing().hang_up()


def half_a_message_in_the_stream(client: Client) -> None:
    wire = client.playing()
    wire.send(text(type="session.pause")[:-5])
    wire.cut()


def closed_as_it_should_be(client: Client) -> None:
    wire = client.playing()
    wire.send(frame(struct.pack("!H", 1000), opcode=8))
    wire.until_the_end()
    wire.hang_up()


def stopped(client: Client) -> None:
    wire = client.playing(1)
    wire.send(text(type="session.stop"))
    wire.until_the_end()
    wire.hang_up()


def refused(client: Client) -> None:
    wire = client.websocket()
    wire.send(frame(b"{"))
    wire.until_the_end()
    wire.hang_up()


def resumed_and_cut(client: Client) -> None:
    client.playing().cut()
    wire = client.websocket()
    wire.send(text(type="session.resume", resume_token=client.token))
    wire.read()
    wire.cut()


def taken_over(client: Client) -> None:
    """Two connections of one session: the older one is let go."""
    first, second = client.playing(), client.websocket()
    second.send(text(type="session.resume", resume_token=client.token))
    second.read()
    first.until_the_end()
    first.hang_up()
    second.cut()


def no_websocket_frame(client: Client) -> None:
    wire = client.playing(1)
    wire.send(b"\xff\xff\xff\xff" * 4)
    wire.until_the_end()
    wire.cut()


WAYS: list[Callable[[Client], None]] = [
    a_knock,
    half_a_handshake,
    no_http,
    a_handshake_and_no_word,
    half_a_start,
    gone_before_the_answer,
    cut_in_the_stream,
    hung_up_in_the_stream,
    half_a_message_in_the_stream,
    closed_as_it_should_be,
    stopped,
    refused,
    resumed_and_cut,
    taken_over,
    no_websocket_frame,
]
