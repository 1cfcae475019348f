"""A frame server for tests of the page: speaks streamgen.v1, draws the world instead of asking a model.

Pictures are drawn from the prompt, so what the page shows can be judged exactly. Every message is parsed by the
protocol's own types: what the page says wrongly is refused here as there. Runs alone too:
    python -m tests.browser.mock_server PORT
"""

from __future__ import annotations

import asyncio
import io
import itertools
import json
import mimetypes
import sys
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import numpy as np
import torch
from PIL import Image
from websockets.asyncio.server import Request, Response, ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed

from streamgen.resources import web_dir
from streamgen.worlds import sprites
from streamgen.worlds.grammar import parse
from streamgen_infer import protocol
from streamgen_infer.protocol import SUBPROTOCOL, FrameHeader, Refusal, pack_frame, parse_client

FPS, BLOCK_FRAMES, SIDE = 16.0, 12, 64
LEAD_S = 1.5
BLOCK_S = BLOCK_FRAMES / FPS


@dataclass(slots=True)
class Session:
    """What the server knows of one stream."""

    token: str
    seed: int
    prompts: list[tuple[int, int, str]]
    """(first block, version, text)"""
    block: int = 0
    epoch: int = 0
    version: int = 1
    playhead_s: float = 0.0
    paused: bool = False
    steps: int = 4
    commands: int = 0
    made: dict[int, bytes] = field(default_factory=dict)
    """Frames of this epoch, as sent."""
    told: int = 1
    """Newest prompt version that was announced as applied."""
    first: int = 0
    """After a seek: frames before this one are not sent again."""


def draw_block(prompt: str, seed: int, block: int) -> np.ndarray:
    """uint8 [BLOCK_FRAMES, SIDE, SIDE, 3]: the prompt's scene at this block's time."""
    scenes = sprites.sample_scenes([parse(prompt)], torch.Generator().manual_seed(seed))
    drawn = sprites.render(scenes, BLOCK_FRAMES, fps=FPS, side=SIDE, start_s=block * BLOCK_S)[0]
    return ((drawn.permute(0, 2, 3, 1) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()


class Mock:
    """Sessions live as long as this object, connections as long as one `listen`."""

    def __init__(self, *, saves: bool = True) -> None:
        self.sessions: dict[str, Session] = {}
        self.branches: dict[str, Session] = {}
        self.numbers = itertools.count(1)
        self.saves = saves
        self.places: list[int] = []
        """What a new client is told before its session begins, each for a while: its places in the line."""
        self.heard: list[dict[str, Any]] = []
        """Every message of every client."""

    async def handle(self, connection: ServerConnection) -> None:
        session: Session | None = None
        maker: asyncio.Task[None] | None = None
        try:
            async for text in connection:
                assert isinstance(text, str)
                self.heard.append(json.loads(text))
                try:
                    message = parse_client(text)
                    if session is None:
                        session = await self.begin(connection, message)
                        maker = asyncio.create_task(self.make(connection, session))
                    else:
                        await self.obey(connection, session, message)
                except Refusal as refusal:
                    identifier = self.heard[-1].get("id")
                    fatal = session is None
                    error = protocol.error_of(refusal, identifier)
                    await say(connection, error.model_copy(update={"fatal": fatal}))
                    if fatal:
                        await connection.close(protocol.CLOSE_CODES[refusal.code])
        except ConnectionClosed:
            pass
        finally:
            if maker is not None:
                maker.cancel()

    async def begin(self, connection: ServerConnection, message: Any) -> Session:
        if isinstance(message, protocol.Resume):
            session = self.sessions.get(message.resume_token)
            if session is None:
                raise Refusal("unknown_session", "this server does not know that token")
            first = message.last_frame + 1 if message.epoch == session.epoch else session.block * BLOCK_FRAMES
        else:
            for place in self.places:
                waiting = protocol.SessionState(state="queued", place=place, message="all streams are taken")
                await say(connection, waiting)
                await asyncio.sleep(0.6)
            session = self.opened(message)
            self.sessions[session.token] = session
            first = session.block * BLOCK_FRAMES
        config = protocol.VideoConfig(
            width=SIDE, height=SIDE, fps=FPS, seed=session.seed, block_frames=BLOCK_FRAMES, model="mock",
            trained_steps=(4,), drop="oldest", queue_seconds=2.0, mime="image/jpeg",
        )  # fmt: skip
        _, version, text = self.at(session, session.block)
        start = protocol.VideoStart(
            id=message.id, request_id=session.token, resume_token=session.token, resume_within_seconds=60,
            format="jpeg", config=config, epoch=session.epoch, next_frame=first,
            state="paused" if session.paused else "playing", prompt=text, prompt_version=version,
        )  # fmt: skip
        await say(connection, start)
        for number in sorted(session.made):
            if number >= first:
                await connection.send(session.made[number])
        return session

    def opened(self, message: Any) -> Session:
        token = f"token-{next(self.numbers)}"
        if message.branch is None:
            check_words(message.prompt)
            return Session(token=token, seed=message.seed, prompts=[(0, 1, message.prompt)], steps=message.steps or 4)
        source = self.branches[message.branch]
        return Session(
            token=token, seed=source.seed, prompts=list(source.prompts), block=source.block, version=source.version,
            playhead_s=source.block * BLOCK_S, steps=source.steps, told=source.told,
        )  # fmt: skip

    def at(self, session: Session, block: int) -> tuple[int, int, str]:
        return max((p for p in session.prompts if p[0] <= block), key=lambda p: (p[0], p[1]))

    async def obey(self, connection: ServerConnection, session: Session, message: Any) -> None:
        if isinstance(message, protocol.Playback):
            session.playhead_s = max(session.playhead_s, message.position_seconds)
            return
        session.commands += 1
        if isinstance(message, protocol.Interact):
            await self.interact(connection, session, message)
            return
        answer = protocol.Applied(
            id=message.id, command=message.type, version=session.commands,
            block=session.block, media_seconds=session.block * BLOCK_S, epoch=session.epoch,
        )  # fmt: skip
        received = protocol.Received(id=message.id, command=message.type, version=session.commands)
        await say(connection, received)
        match message:
            case protocol.Pause() | protocol.Play():
                session.paused = isinstance(message, protocol.Pause)
            case protocol.Steps():
                session.steps = message.steps or 4
            case protocol.Seek():
                turn_back(session, int(message.position_seconds / BLOCK_S + 1e-6))
                session.first = round(message.position_seconds * FPS)
                session.made = {number: data for number, data in session.made.items() if number < session.first}
                at_s = session.first / FPS
                answer = answer.model_copy(
                    update={"epoch": session.epoch, "block": session.block, "media_seconds": at_s}
                )
            case protocol.Branch():
                name = f"branch-{next(self.numbers)}"
                copy = Session(
                    token="", seed=session.seed, prompts=list(session.prompts), block=session.block,
                    version=session.version, steps=session.steps, told=session.told,
                )  # fmt: skip
                self.branches[name] = copy
                answer = answer.model_copy(update={"branch": name})
            case protocol.Record(action="stop"):
                answer = answer.model_copy(update={"url": "/v1/sessions/x/recordings/a.mp4"})
            case protocol.Stop():
                del self.sessions[session.token]
                done = protocol.Done(chunks=session.block, frames=0, dropped_frames=0, stopped=True)
                await say(connection, done)
                await connection.close(1000)
                return
        await say(connection, answer)

    async def interact(self, connection: ServerConnection, session: Session, message: Any) -> None:
        what = message.interaction
        check_words(what.event.prompt)
        if what.at_seconds is not None:
            block = max(session.block, round(what.at_seconds / BLOCK_S))
        elif what.apply_at == "playhead":
            begun = session.block
            turn_back(session, min(begun, int(session.playhead_s / BLOCK_S) + 1))
            block = session.block
            session.prompts = [p for p in session.prompts if not 0 < block <= p[0] < begun]
        else:
            block = session.block
        session.version += 1
        session.prompts.append((block, session.version, what.event.prompt))
        queued = protocol.InteractionQueued(
            id=message.id, event_id=what.event_id or "e", version=session.commands,
            prompt_version=session.version, block=block, media_seconds=block * BLOCK_S,
        )  # fmt: skip
        await say(connection, queued)

    async def make(self, connection: ServerConnection, session: Session) -> None:
        while True:
            ahead_s = session.block * BLOCK_S - session.playhead_s
            if session.paused or ahead_s > LEAD_S:
                await asyncio.sleep(0.02)
                continue
            await asyncio.sleep(0.08)
            block, epoch = session.block, session.epoch
            _, version, text = self.at(session, block)
            if version > session.told:
                session.told = version
                applied = protocol.InteractionApplied(
                    event_id="e", version=session.commands, prompt_version=version, block=block,
                    media_seconds=block * BLOCK_S, epoch=epoch,
                )  # fmt: skip
                await say(connection, applied)
            for offset, picture in enumerate(draw_block(text, session.seed, block)):
                number = block * BLOCK_FRAMES + offset
                if number < session.first:
                    continue
                data = packed(picture, session, number, version)
                session.made[number] = data
                await connection.send(data)
            if session.block == block and session.epoch == epoch:
                session.block += 1


def packed(picture: np.ndarray, session: Session, number: int, version: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "JPEG", quality=92, subsampling=0)
    slack_s = 0.9 + 0.35 * np.sin(number // BLOCK_FRAMES * 0.7)
    header = FrameHeader(
        epoch=session.epoch, block=number // BLOCK_FRAMES, frame=number, prompt_version=version, media_s=number / FPS,
        deadline_s=1.0 + number / FPS, sent_s=0.0, slack_s=slack_s, steps=session.steps, dropped=0, width=SIDE,
        height=SIDE, flags=0, encoding=1, kind=protocol.MEDIA, byte_length=encoded.tell(),
    )  # fmt: skip
    return pack_frame(header, encoded.getvalue())


def turn_back(session: Session, block: int) -> None:
    session.block, session.epoch = block, session.epoch + 1
    session.playhead_s = min(session.playhead_s, block * BLOCK_S)
    session.made = {number: data for number, data in session.made.items() if number < block * BLOCK_FRAMES}


def check_words(prompt: str) -> None:
    try:
        parse(prompt)
    except ValueError as error:
        raise Refusal("bad_request", f"the prompt holds no word that this model knows: {error}") from None


async def say(connection: ServerConnection, message: Any) -> None:
    await connection.send(message.model_dump_json(exclude_none=True))


def serve_file(connection: ServerConnection, request: Request) -> Response | None:
    """The page's files; None for the websocket."""
    if request.path == protocol.PATH:
        return None
    if request.path.startswith("/v1/sessions/"):
        return Response(
            HTTPStatus.OK, "OK", Headers({"Content-Type": "video/mp4", "Content-Length": "9"}), b"recording"
        )
    name = request.path.split("?")[0].lstrip("/") or "index.html"
    file = web_dir() / name
    if not file.is_file():
        return Response(HTTPStatus.NOT_FOUND, "Not Found", Headers({"Content-Length": "0"}), b"")
    data = file.read_bytes()
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    policy = "default-src 'self'; img-src 'self' blob:; connect-src 'self'; style-src 'self'; media-src 'self' blob:"
    headers = Headers(
        {
            "Content-Type": kind,
            "Content-Length": str(len(data)),
            "Content-Security-Policy": policy,
            "Connection": "close",
        }
    )
    return Response(HTTPStatus.OK, "OK", headers, data)


class Running:
    """A mock that listens in a thread of its own; `stop` cuts every connection, as a kill would."""

    def __init__(self, mock: Mock, port: int = 0) -> None:
        self.mock, self.port = mock, port
        self.loop = asyncio.new_event_loop()
        self.listening = threading.Event()
        self.thread = threading.Thread(target=self.loop.run_until_complete, args=(self._serve(),), daemon=True)
        self.thread.start()
        assert self.listening.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    async def _serve(self) -> None:
        self.over = asyncio.Event()
        options: dict[str, Any] = {"process_request": serve_file, "subprotocols": [SUBPROTOCOL], "compression": None}
        async with serve(self.mock.handle, "127.0.0.1", self.port, **options) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            self.listening.set()
            await self.over.wait()
            for connection in list(server.connections):
                connection.transport.abort()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.over.set)
        self.thread.join(10)


if __name__ == "__main__":
    running = Running(Mock(), int(sys.argv[1]))
    print(running.url, flush=True)
    running.thread.join()
