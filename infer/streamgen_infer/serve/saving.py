"""Sessions on disk: saved every few seconds and at every drain, continued bit by bit after a restart.

ID.safetensors holds the stream's state, the session's own words and the frames that its viewer has not confirmed;
ID.json the prompts accepted since, so that a kill loses none. Both are replaced whole (written aside, renamed).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.serve.session import Session
from streamgen_infer.serve.session_state import LIVE, Engine
from streamgen_infer.serve.viewer_queue import BlockInfo, QueuedFrame

log = logging.getLogger("streamgen.serve")
MARK = "streamgen-session"
MAX_TAIL_BYTES = 64 * 2**20
KEPT = (
    "id",
    "token",
    "owner",
    "prompt",
    "epoch",
    "next_block",
    "next_frame",
    "newest_version",
    "chunks",
    "user_paused",
)


async def save(session: Session, folder: Path) -> None:
    """One session into its file; the stream goes on meanwhile."""
    async with session.lock:
        if session.life.state not in LIVE:
            return
        session.dirty = False
        stream = await session.call(session.live.state_dict)
        # Blocks that are in this state were posted before its answer: the queue has them.
        tail = session.queue.tail(MAX_TAIL_BYTES)
        words = {name: getattr(session, name) for name in KEPT}
        words |= {"start": session.start.model_dump(mode="json"), "version": session.receipts.version}
        words |= {"number": session.save_number + 1, "user_paused": session.user_paused}
        await asyncio.to_thread(_write, folder / f"{session.id}.safetensors", words, stream, tail)
        session.save_number += 1
        session.journal.clear()


def save_journal(session: Session, folder: Path) -> None:
    """The prompts since the last save; small, and written before their receipt is sent."""
    from streamgen.weights import write_json

    write_json(folder / f"{session.id}.json", {"after": session.save_number, "prompts": session.journal})


def forget(session_id: str, folder: Path) -> None:
    """The session is over."""
    for suffix in (".safetensors", ".json"):
        (folder / f"{session_id}{suffix}").unlink(missing_ok=True)


def saved_files(folder: Path) -> list[Path]:
    """The saved sessions, oldest first."""
    return sorted(folder.glob("[0-9a-f]*.safetensors"), key=lambda path: path.stat().st_mtime)


async def restore(path: Path, session_of: Callable[[p.Start, str], Session], engine: Engine) -> Session:
    """The session of a file, playing on, without a connection yet; UserError or Refusal if it cannot be."""
    words, stream, tail = await asyncio.to_thread(_read, path)
    session = session_of(p.Start.model_validate(words["start"]), words["owner"])
    for name in KEPT:
        setattr(session, name, words[name])
    session.receipts.version, session.save_number = words["version"], words["number"]
    session.user_paused = words["user_paused"]
    session.epoch_base, session.skip_through, session.tail = session.epoch, session.next_frame - 1, tail
    await session.open(engine, stream, hold=True)  # until the prompts are there: they may be for its next block
    try:
        for entry in _journal(path, session.save_number):
            await session.call(
                session.live.prompt,
                entry["prompt"],
                entry["transition"],
                at_media_s=entry["media_s"],
                blend_blocks=entry["blend_blocks"],
            )
            session.prompt = entry["prompt"]
            session.journal.append(entry)
    except BaseException:
        await session.close()
        raise
    if session.user_paused:
        session.go("paused")
    else:
        await session.call(session.live.play)
    return session


def _journal(path: Path, number: int) -> list[dict[str, Any]]:
    from streamgen.weights import read_json

    file = path.with_suffix(".json")
    if not file.exists():
        return []
    journal = read_json(file)
    prompts: list[dict[str, Any]] = journal["prompts"] if journal["after"] == number else []
    return prompts


def _write(path: Path, words: dict[str, Any], stream: dict[str, Any], tail: list[QueuedFrame]) -> None:
    import numpy as np
    import torch

    from streamgen.weights import save_tree

    tree: dict[str, Any] = {"session": words, "stream": stream}
    if tail:
        infos = [{name: getattr(item.info, name) for name in BlockInfo.__slots__} for item in tail]
        frames = [{"frame": item.frame, "media_s": item.media_s, "dropped": item.dropped} for item in tail]
        pixels = torch.from_numpy(np.stack([item.rgb_HWC for item in tail]))
        tree["tail"] = {"infos": infos, "frames": frames, "rgb": pixels}
    save_tree(tree, path, MARK)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], list[QueuedFrame]]:
    from streamgen.weights import load_tree

    tree = load_tree(path, MARK)
    if not {"session", "stream"} <= tree.keys():
        raise UserError(f"{path} is no saved session")
    kept, tail = tree.get("tail"), []
    if kept is not None:
        pixels, blocks = kept["rgb"].numpy(), dict[str, BlockInfo]()
        for at, (info, frame) in enumerate(zip(kept["infos"], kept["frames"], strict=True)):
            shared = blocks.setdefault(str(info), BlockInfo(**info))
            tail.append(QueuedFrame(info=shared, due_at_s=0.0, rgb_HWC=pixels[at], **frame))
    return tree["session"], tree["stream"], tail
