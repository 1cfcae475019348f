"""How a session gets its stream: asked of the engine, given its prompts, queue and clock; `Session.open`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.requests import Refused, StreamRequest
from streamgen_infer.serve.commands import obey
from streamgen_infer.serve.session_state import Engine
from streamgen_infer.serve.viewer_queue import ViewerQueue

if TYPE_CHECKING:
    from streamgen_infer.serve.session import Session


async def open_stream(
    session: Session,
    engine: Engine,
    saved: dict[str, Any] | None,
    *,
    hold: bool,
    again: Callable[[Refused], Awaitable[bool]] | None,
) -> None:
    """See `Session.open`."""
    start, loop = session.start, asyncio.get_running_loop()
    request = StreamRequest(
        prompt=start.prompt or "",
        seed=start.seed,
        fps=start.fps,
        steps=start.steps,
        cache=start.cache,
        lead_s=start.streaming_buffer_seconds,
        start_s=start.start_seconds,
        max_seconds=start.max_seconds,
        paused=hold or (saved is None and bool(start.timeline)),
        saved=saved,
    )

    def post(take: Callable[[Any], None]) -> Callable[[Any], None]:
        def posted(given: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(take, given)

        return posted

    opening = functools.partial(
        engine.open, request, on_block=post(session.take_block), on_event=post(session.take_event)
    )
    session.go("queued")
    try:
        while session.given is None:
            try:
                session.given = await asyncio.to_thread(opening)
            except Refused as error:
                if again is None or not await again(error):
                    raise
    except p.Refusal:
        session.go("closed")
        raise
    except Refused as error:
        session.metrics.refused(error.resource)
        code: p.Code = "memory" if error.resource == "memory" else "overload"
        session.go("closed")
        raise p.Refusal(
            code, str(error), fatal=True, retry_after_s=error.retry_after_s, numbers=error.numbers
        ) from None
    except UserError as error:
        session.metrics.refused("request")
        session.go("closed")
        raise p.Refusal("bad_request", str(error), fatal=True) from None
    try:
        await _opened(session, saved)
        if request.paused and not hold:
            await session.call(session.live.play)
    except BaseException:
        await session.close()
        raise


async def _opened(session: Session, saved: dict[str, Any] | None) -> None:
    """The stream is there: give it its prompts."""
    if session.life.state != "queued":
        raise p.Refusal("illegal_state", "the session was ended while it opened", fatal=True)
    start = session.start
    session.metrics.admitted()
    session.accepted_s = session.left_s = session.clock()
    session.geometry, session.fps = session.live.geometry, session.live.fps
    session.queue = _new_queue(session)
    session.queue.waiting.extend(session.tail)
    session.tail.clear()
    session.opened = True
    session.go("warming")
    for number, entry in enumerate(start.timeline if saved is None else ()):
        change = p.Interaction(
            event_id=f"timeline-{number}",
            event=p.Event(prompt=entry.prompt),
            transition=entry.transition,
            transition_chunks=entry.transition_chunks,
            at_seconds=entry.at_seconds,
        )
        try:
            await obey(session, p.Interact(type="session.interaction", interaction=change))
        except p.Refusal as refusal:
            raise p.Refusal("bad_request", f"timeline {number}: {refusal}", fatal=True) from None
    while session.early:
        session.take_block(session.early.pop(0))


def _new_queue(session: Session) -> ViewerQueue:
    fps, block_frames = session.fps, session.geometry.block_pixel_frames(1)
    window = session.start.window_seconds
    return ViewerQueue(
        fps=fps,
        limit_frames=max(block_frames, round(session.start.queue_seconds * fps)),
        drop=session.start.drop,
        window_frames=None if window is None else max(1, round(window * fps)),
    )
