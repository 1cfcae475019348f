"""The web application around a FrameServer: websocket, REST, metrics and the page."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.types import Message as ASGIMessage

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.serve.connection import Connection
from streamgen_infer.serve.limits import Quota, check_origin
from streamgen_infer.serve.session import Session
from streamgen_infer.server import FrameServer, Kept

HTTP_STATUS: dict[p.Code, int] = {
    "unauthorized": 401,
    "forbidden_origin": 403,
    "unknown_session": 404,
    "too_large": 413,
    "quota": 429,
    "rate": 429,
    "not_ready": 503,
    "draining": 503,
    "internal": 500,
}
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; "
    "connect-src 'self'; style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'none'; frame-ancestors 'none'",
}


class Guard:
    """Around every HTTP request: refuses other sites' pages, and adds the headers of SECURITY to the answer."""

    def __init__(self, app: ASGIApp, server: FrameServer) -> None:
        self.app, self.settings, self.metrics = app, server.settings, server.metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, settings = Headers(scope=scope), self.settings

        async def secured(message: ASGIMessage) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(SECURITY)
            await send(message)

        try:
            check_origin(headers.get("origin"), headers.get("host"), bound_to=settings.host, allowed=settings.origins)
        except p.Refusal as refusal:
            self.metrics.error(refusal.code)
            return await as_response(refusal)(scope, receive, secured)
        await self.app(scope, receive, secured)


def as_response(refusal: p.Refusal) -> Response:
    headers = {} if refusal.retry_after_s is None else {"Retry-After": f"{refusal.retry_after_s:.0f}"}
    body = p.error_of(refusal).model_dump(exclude_none=True)
    return JSONResponse(body, HTTP_STATUS.get(refusal.code, 400), headers)


def build_app(server: FrameServer) -> FastAPI:
    """The application; its lifespan starts and drains the server."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await server.start()
        yield
        await server.drain()

    app = FastAPI(title="streamgen", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)

    app.state.frames = server

    @app.exception_handler(p.Refusal)
    async def refused(_: Request, refusal: p.Refusal) -> Response:
        server.metrics.error(refusal.code)
        return as_response(refusal)

    app.add_middleware(Guard, server=server)

    @app.websocket(p.PATH)
    async def video(socket: WebSocket) -> None:
        connection = Connection(socket, server, server.clock)
        server.connections.add(connection)
        try:
            await connection.run()
        finally:
            server.connections.discard(connection)

    _add_health(app, server)
    _add_sessions(app, server)
    if server.settings.web is not None:
        app.mount("/", StaticFiles(directory=server.settings.web, html=True))
    return app


def quota_of(request: Request) -> Quota:
    """The quota of the request's token."""
    server: FrameServer = request.app.state.frames
    return server.settings.tokens.check(request.headers.get("authorization"), [])


Owner = Annotated[Quota, Depends(quota_of)]


def _add_health(app: FastAPI, server: FrameServer) -> None:
    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/readyz")
    async def readyz() -> Response:
        why = server.ready
        return JSONResponse({"status": "ready" if why is None else why}, 200 if why is None else 503)

    @app.get("/metrics", dependencies=[Depends(quota_of)])
    async def metrics() -> Response:
        return Response(server.metrics_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/limits")
    async def limits(quota: Owner) -> dict[str, Any]:
        """What sessions may ask for, and how many more of them there may be."""
        if server.engine is None:
            raise p.Refusal("not_ready", server.ready or "", retry_after_s=server.settings.retry_s)
        pipe = server.engine.pipe
        mine = [one for one in server.sessions.values() if one.owner == quota.owner]
        return {
            "model": server.settings.model,
            "width": pipe.geometry.width,
            "height": pipe.geometry.height,
            "fps": pipe.geometry.fps,
            "trained_steps": list(pipe.scheduler.trained_steps),
            "formats": list(p.FORMATS),
            "sessions": len(mine),
            "sessions_allowed": quota.sessions,
        }


def _add_sessions(app: FastAPI, server: FrameServer) -> None:
    def own(session_id: str, quota: Quota) -> Session:
        session = server.sessions.get(session_id)
        if session is None or session.owner != quota.owner:
            raise p.Refusal("unknown_session", f"there is no session {session_id[:64]}")
        return session

    @app.get("/v1/sessions")
    async def sessions(quota: Owner) -> list[dict[str, Any]]:
        return [described(one) for one in server.sessions.values() if one.owner == quota.owner]

    @app.get("/v1/sessions/{session_id}")
    async def session(session_id: str, quota: Owner) -> dict[str, Any]:
        return described(own(session_id, quota))

    @app.delete("/v1/sessions/{session_id}")
    async def end(session_id: str, quota: Owner) -> dict[str, Any]:
        found = own(session_id, quota)
        await server.end(found)
        return described(found)

    @app.get("/v1/sessions/{session_id}/recordings/{name}")
    async def recording(session_id: str, name: str, quota: Owner) -> Response:
        clip = server.clips.get(name)
        if clip is None or (clip.owner, clip.session) != (quota.owner, session_id):
            raise p.Refusal("unknown_session", "there is no such recording (any more)")
        return FileResponse(clip.path, filename=f"streamgen{clip.path.suffix}")

    @app.post("/v1/branches")
    async def upload(request: Request, quota: Owner) -> dict[str, str]:
        """A state that `--save-state` or a download wrote; the answer's `branch` is for session.start."""
        state = await asyncio.to_thread(_read_state, await _body(request, server.settings.max_upload_bytes))
        return {"branch": server.add_branch(Kept(quota.owner, state, int(state["seeds"][0]), ours=False))}

    @app.get("/v1/branches/{name}")
    async def download(name: str, quota: Owner) -> Response:
        kept = server.branch(name, quota.owner)
        return Response(await asyncio.to_thread(_write_state, kept.state), media_type="application/octet-stream")


def described(session: Session) -> dict[str, Any]:
    """A session, for its owner. The resume token is not in it."""
    return {
        "id": session.id,
        "state": session.life.state,
        "connected": session.connection is not None,
        "prompt": session.prompt,
        "seed": session.start.seed,
        "frames_made": session.next_frame,
        "frames_sent": session.frames_sent,
        "age_seconds": round(session.clock() - session.accepted_s, 3),
    }


async def _body(request: Request, most_bytes: int) -> bytes:
    """The body as it is; Refusal for a packed one (a bomb may be inside) and for a large one, before it is read."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise p.Refusal("bad_request", "send the state as it is, without a content encoding")
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > most_bytes:
            raise p.Refusal("too_large", f"a state of more than {most_bytes} bytes")
        parts.append(part)
    return b"".join(parts)


def _read_state(body: bytes) -> dict[str, Any]:
    """Refusal for what is no saved stream."""
    from streamgen.stream import STATE_MARK
    from streamgen.weights import load_tree

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(body)
        file.flush()
        try:
            state = load_tree(Path(file.name), STATE_MARK)
            seeds = state["seeds"]
            if not (isinstance(seeds, list) and len(seeds) == 1 and isinstance(seeds[0], int)):
                raise UserError("it holds no seed")
            if any(len(entry["prompt"]) > p.MAX_PROMPT_CHARACTERS for entry in state.get("timeline", ())):
                raise UserError(f"a prompt of more than {p.MAX_PROMPT_CHARACTERS} characters")
        except (UserError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            why = str(error).replace(file.name, "the state")
            raise p.Refusal("bad_request", f"no saved stream: {why}"[:500]) from None
    return state


def _write_state(state: dict[str, Any]) -> bytes:
    from streamgen.stream import STATE_MARK
    from streamgen.weights import save_tree

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save_tree(state, path, STATE_MARK)
        return path.read_bytes()
