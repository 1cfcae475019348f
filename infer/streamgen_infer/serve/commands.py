"""What each command does to a session; the session's lock is held, its state takes commands."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from streamgen_infer import protocol as p
from streamgen_infer.requests import Receipt
from streamgen_infer.serve.clip_recorder import ClipRecorder
from streamgen_infer.serve.receipts import Waiting

if TYPE_CHECKING:
    from streamgen_infer.serve.session import Session

log = logging.getLogger("streamgen.serve")
MAX_WAITING = 1024
"""Commands that were received and wait for the block that obeys them."""


async def obey(session: Session, message: Any) -> None:
    """Do it and say so; Refusal, with nothing changed, if it cannot be done."""
    if len(session.receipts.waiting) >= MAX_WAITING and isinstance(message, p.Interact | p.Seek | p.Steps):
        raise p.Refusal("rate", f"{MAX_WAITING} commands wait for their block: wait until some are applied")
    match message:
        case p.Interact():
            await _interact(session, message)
        case p.Pause() | p.Play():
            await _pause_or_play(session, message)
        case p.Seek():
            await _seek(session, message)
        case p.Branch():
            tree = await session.call(session.live.branch)
            name = session.keep_branch(session, tree)
            block = int(tree["position"])
            item = _received(session, message)
            session.say(item.applied(block, session.media_s(block), session.epoch, branch=name))
        case p.Steps():
            await session.call(session.live.steps, message.steps)
            session.start = session.start.model_copy(update={"steps": message.steps})
            session.receipts.supersede_steps()
            session.receipts.waiting.append(_received(session, message, steps=message.steps))
            session.dirty = True
        case p.Record():
            await _record(session, message)
        case p.Stop():
            _received(session, message)
            session.stopped = True
            await session.close()
        case _:
            raise p.Refusal("illegal_state", f"the session has begun: {message.type} comes first or not at all")


def _received(session: Session, message: p.Command, **condition: Any) -> Waiting:
    command = str(message.type)  # type: ignore[attr-defined]
    item = session.receipts.accept(command, message.id, **condition)
    session.say(p.Received(id=message.id, command=command, version=item.version))
    return item


def _done(session: Session, item: Waiting, **more: str | None) -> None:
    """Applied at once: from the next block on."""
    block = session.next_block
    session.say(item.applied(block, session.media_s(block), session.epoch, **more))


async def _pause_or_play(session: Session, message: p.Pause | p.Play) -> None:
    session.user_paused = isinstance(message, p.Pause)
    running = not session.user_paused and not session.stalled
    session.nudge("play" if running else "pause")  # here and now, in the order of what `hold_back` says
    item = _received(session, message)
    if session.life.state != "warming":
        session.go("paused" if session.user_paused else "playing")
    _done(session, item)
    session.hold_back()


async def _interact(session: Session, message: p.Interact) -> None:
    change, before = message.interaction, session.epoch
    receipt: Receipt = await session.call(
        session.live.prompt,
        change.event.prompt,
        change.transition,
        apply_at=change.apply_at,
        at_media_s=change.at_seconds,
        blend_blocks=change.transition_chunks,
    )
    session.prompt = change.event.prompt
    if change.apply_at == "playhead" and change.at_seconds is None:
        if session.epoch == before:
            session.unmake(receipt)
        session.dirty = True
    elif session.before_receipt is not None:
        entry = {"prompt": change.event.prompt, "transition": change.transition}
        session.journal.append(entry | {"blend_blocks": change.transition_chunks, "media_s": receipt.media_s})
        await asyncio.to_thread(session.before_receipt)
    event_id = change.event_id or f"prompt-{receipt.version}"
    item = session.receipts.accept(
        message.type, message.id, event_id=event_id, prompt_version=receipt.version, from_block=receipt.block
    )
    session.say(
        p.InteractionQueued(
            id=message.id,
            event_id=event_id,
            version=item.version,
            prompt_version=receipt.version,
            block=receipt.block,
            media_seconds=receipt.media_s,
            warnings=list(receipt.warnings),
        )
    )
    session.metrics.prompts.inc()
    if session.newest_version >= receipt.version:  # its block was quicker than its receipt
        session.say(item.applied(receipt.block, receipt.media_s, session.epoch))
    else:
        session.receipts.waiting.append(item)


async def _seek(session: Session, message: p.Seek) -> None:
    before = session.epoch
    receipt: Receipt = await session.call(session.live.seek, message.position_seconds)
    item = _received(session, message, above_epoch=before)
    session.ended, session.dirty = False, True
    if session.epoch > before:  # its first block was quicker than its receipt
        session.say(item.applied(receipt.block, receipt.media_s, session.epoch))
        return
    session.unmake(receipt)
    session.receipts.waiting.append(item)


async def _record(session: Session, message: p.Record) -> None:
    if message.action == "start":
        if session.recorder is not None:
            raise p.Refusal("illegal_state", "a recording is running already: stop it first")
        session.recorder = ClipRecorder(session.folder / "recordings", message.format, session.geometry, session.fps)
        return _done(session, _received(session, message))
    if session.recorder is None:
        raise p.Refusal("illegal_state", "no recording is running: start one first")
    name = await finish_recording(session)
    if name is None:
        raise p.Refusal("bad_request", "there is no recording: nothing was shown since it began, or it failed")
    _done(session, _received(session, message), url=f"/v1/sessions/{session.id}/recordings/{name}")


async def finish_recording(session: Session) -> str | None:
    """Close the recording that runs; the name of its file."""
    recorder, session.recorder = session.recorder, None
    if recorder is None:
        return None
    try:
        path = await asyncio.to_thread(recorder.finish)
    except Exception:
        log.exception("a recording failed", extra={"session": session.id})
        return None
    if path is None:
        return None
    session.keep_clip(session, path)
    return path.name
