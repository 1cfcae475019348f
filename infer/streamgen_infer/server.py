"""The frame server: sessions, who may have them, and their end. Routes are in routes.py; no torch here.

Everything of the server happens on one event loop; the runtime has a thread of its own.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen_infer import protocol as p
from streamgen_infer.free_memory import give_back
from streamgen_infer.serve import saving
from streamgen_infer.serve.connection import Connection
from streamgen_infer.serve.frame_encoders import FrameEncoder
from streamgen_infer.serve.limits import Quota, ServeSettings
from streamgen_infer.serve.metrics import ServeMetrics
from streamgen_infer.serve.session import Session
from streamgen_infer.serve.session_state import LIVE, OVER, Engine
from streamgen_infer.serve.waiting_line import Turn, WaitingLine, open_in_turn

log = logging.getLogger("streamgen.serve")
TICK_S = 0.25
GIVE_BACK_S = 10.0
"""Between two times that freed memory is given back to the system."""
CLIP_S = 600.0
"""So long a recording can be fetched."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A branch: a state to start a session from."""

    owner: str
    state: dict[str, Any]
    seed: int
    ours: bool
    """Made here, not uploaded: what goes wrong with it is not the client's fault."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A recording that waits to be fetched."""

    owner: str
    session: str
    path: Path
    made_s: float


class FrameServer:
    """`run` during the life of the process: load, warm up, serve; `drain` at its end."""

    def __init__(
        self,
        make_engine: Callable[[], Engine],
        settings: ServeSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.make_engine, self.settings, self.clock = make_engine, settings, clock
        self.metrics = ServeMetrics()
        self.engine: Engine | None = None
        self.failure: str | None = None
        self.draining = False
        self.sessions: dict[str, Session] = {}
        self.connections: set[Connection] = set()
        self.branches: dict[str, Kept] = {}
        self.clips: dict[str, Clip] = {}
        self.line = WaitingLine(settings.waiting)
        self._saved_s: dict[str, float] = {}
        self._freed, self._gave_back_s = False, clock()
        self._poke = asyncio.Event()
        """Look now: there is something to save."""
        self._tasks: list[asyncio.Task[None]] = []

    # Life of the process.

    async def start(self) -> None:
        """Begin to load and warm up, in a thread; /readyz says when it is over."""
        self._tasks = [asyncio.create_task(self._warm_up()), asyncio.create_task(self._watch())]

    async def _warm_up(self) -> None:
        def make() -> Engine:
            engine = self.make_engine()
            engine.start()
            return engine

        try:
            engine = await asyncio.to_thread(make)
            await self._restore(engine)
            self.engine = engine
            log.info("ready")
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            log.exception("the engine did not start")

    async def _restore(self, engine: Engine) -> None:
        folder = self.settings.save_dir
        if folder is None:
            return
        for path in saving.saved_files(folder):
            try:
                session = await saving.restore(path, self._new_session, engine)
            except (UserError, p.Refusal, KeyError, ValueError, TypeError) as error:
                log.error("%s is not continued: %s", path, error)
                continue
            except Exception:  # whatever is in one file, the other sessions go on
                log.exception("%s is not continued", path)
                continue
            self.sessions[session.id] = session
            log.info("session restored", extra={"session": session.id})

    @property
    def ready(self) -> str | None:
        """None if sessions can begin, else why not."""
        if self.failure is not None:
            return self.failure
        if self.engine is None:
            return "the model is loading and warming up"
        if self.engine.failure is not None:
            return f"the runtime failed: {self.engine.failure}"
        return "the server is draining" if self.draining else None

    async def drain(self) -> None:
        """Save every session, tell its client when to come back, and end. A second call does nothing."""
        if self.draining:
            return
        self.draining = True
        self.line.wake_all()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        retry_s = self.settings.retry_s
        for session in list(self.sessions.values()):
            if session.life.state in LIVE:
                if self.settings.save_dir is not None:
                    await self._save(session)
                session.go("draining")
        refusal = p.Refusal("draining", "the server ends; come back", fatal=True, retry_after_s=retry_s)
        for connection in list(self.connections):
            connection.kick(refusal)
        for session in list(self.sessions.values()):
            await session.close()
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)
        log.info("drained")

    # Sessions.

    def _new_session(self, start: p.Start, owner: str) -> Session:
        session = Session(
            start,
            owner=owner,
            folder=self.settings.work_dir,
            metrics=self.metrics,
            keep_branch=self.keep_branch,
            keep_clip=self.keep_clip,
            clock=self.clock,
        )
        session.resume_within_s = self.settings.resume_s
        if (folder := self.settings.save_dir) is not None:
            session.before_receipt = lambda: self._save_journal(session, folder)
        return session

    def _check_ready(self) -> Engine:
        if (why := self.ready) is not None:
            code: p.Code = "draining" if self.draining else "not_ready"
            raise p.Refusal(code, why, retry_after_s=self.settings.retry_s)
        assert self.engine is not None
        return self.engine

    async def begin(self, start: p.Start, quota: Quota, turn: Turn | None = None) -> Session:
        """A new session; Refusal with the reason if there is none to be had. turn: wait for it, if that may help."""
        engine = self._check_ready()
        mine = [one for one in self.sessions.values() if one.owner == quota.owner and one.life.state not in OVER]
        if len(mine) >= quota.sessions:
            self.metrics.refused("quota")
            raise p.Refusal("quota", f"{len(mine)} sessions are open, this token may have {quota.sessions}")
        kept = None if start.branch is None else self.branch(start.branch, quota.owner)
        if kept is None and not (start.prompt or "").strip():
            raise p.Refusal("bad_message", "session.start: name a prompt, or a branch")
        if kept is not None:
            start = start.model_copy(update={"seed": kept.seed})
        session = self._new_session(start, quota.owner)
        self.sessions[session.id] = session
        try:
            state = None if kept is None else kept.state
            await open_in_turn(session, engine, state, self.line, turn, check=self._check_ready)
            if kept is not None and start.prompt is not None:
                change = p.Interaction(event_id="start", event=p.Event(prompt=start.prompt))
                await session.handle(p.Interact(type="session.interaction", interaction=change))
        except p.Refusal:
            self.sessions.pop(session.id, None)
            raise
        except Exception as error:
            self.sessions.pop(session.id, None)
            await session.close()
            if kept is None or kept.ours:
                log.exception("a session did not open", extra={"session": session.id})
                raise p.Refusal("internal", "the session did not open") from error
            raise p.Refusal("bad_request", f"the uploaded state is not whole: {type(error).__name__}") from None
        session.dirty = True  # from its first moment on it outlives a kill
        self._poke.set()
        return session

    async def resume(self, message: p.Resume, quota: Quota) -> Session:
        """The session of a resume token, taken from whatever connection it had."""
        self._check_ready()
        for session in self.sessions.values():
            same = secrets.compare_digest(session.token.encode(), message.resume_token.encode())
            if same and session.owner == quota.owner:
                break
        else:
            raise p.Refusal("unknown_session", "there is no session of this token any more: start a new one")
        if isinstance(session.connection, Connection):
            session.connection.kick(p.Refusal("replaced", "another connection resumed this session", fatal=True))
        if message.format is not None:
            session.start = session.start.model_copy(update={"format": message.format})
        self.metrics.resumes.inc()
        return session

    async def handle(self, session: Session, message: Any) -> None:
        await session.handle(message)

    async def left(self, connection: Connection, session: Session) -> None:
        """A connection is gone: a session that is over goes with it, another waits to be resumed.

        One that came to its own end waits too: its last frames may have been lost with the connection.
        """
        session.detach(connection)
        if session.finished and session.queue.sent:
            await session.close()  # the frames alone are kept
            self.line.poke()
        elif session.life.state in OVER and not session.answers:
            await self._forget(session)

    async def end(self, session: Session) -> None:
        """On behalf of its owner."""
        session.stopped = True
        await session.close()
        self.line.wake_all()  # it may be among those who wait
        if session.connection is None:
            await self._forget(session)

    async def _forget(self, session: Session) -> None:
        await session.close()
        self._freed = True
        self.line.poke()
        if not self.draining:
            self.sessions.pop(session.id, None)
            self._saved_s.pop(session.id, None)
            if self.settings.save_dir is not None:
                await asyncio.to_thread(saving.forget, session.id, self.settings.save_dir)

    def config(self, session: Session, encoder: FrameEncoder) -> p.VideoConfig:
        geometry, start = session.geometry, session.start
        assert self.engine is not None
        return p.VideoConfig(
            width=geometry.width,
            height=geometry.height,
            fps=session.fps,
            seed=start.seed,
            block_frames=geometry.block_pixel_frames(1),
            model=self.settings.model,
            trained_steps=tuple(self.engine.pipe.scheduler.trained_steps),
            drop=start.drop,
            queue_seconds=session.queue.limit_frames / session.fps,
            mime=encoder.mime,
        )

    # Branches.

    def keep_branch(self, session: Session, state: dict[str, Any]) -> str:
        return self.add_branch(Kept(session.owner, state, session.start.seed, ours=True))

    def keep_clip(self, session: Session, path: Path) -> None:
        self.clips[path.name] = Clip(session.owner, session.id, path, self.clock())

    def add_branch(self, kept: Kept) -> str:
        """A name for it; the owner's oldest makes room."""
        mine = [name for name, one in self.branches.items() if one.owner == kept.owner]
        for name in mine[: max(0, len(mine) + 1 - self.settings.branches)]:
            del self.branches[name]
        name = f"b{secrets.token_hex(8)}"
        self.branches[name] = kept
        return name

    def branch(self, name: str, owner: str) -> Kept:
        """Refusal unless there is one and it is this owner's."""
        kept = self.branches.get(name)
        if kept is None or kept.owner != owner:
            why = f"there is no branch {name[:64]} (any more: the newest {self.settings.branches} are kept)"
            raise p.Refusal("unknown_session", why)
        return kept

    # What happens by itself.

    async def _watch(self) -> None:
        """Limits in time, and saving."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(TICK_S):  # wait_for of Python 3.11 may swallow the task's end with the poke
                    await self._poke.wait()
            self._poke.clear()
            self._drop_clips()
            await self._look_after_sessions()
            if self._freed and self.clock() - self._gave_back_s > GIVE_BACK_S:
                self._freed, self._gave_back_s = False, self.clock()
                await asyncio.to_thread(give_back)

    async def _look_after_sessions(self) -> None:
        for session in list(self.sessions.values()):
            try:
                await self._check_time(session)
                await self._save_in_time(session)
            except Exception:  # the watch over the others goes on
                log.exception("a session could not be looked after", extra={"session": session.id})

    def _drop_clips(self) -> None:
        for name, clip in list(self.clips.items()):
            if self.clock() - clip.made_s > CLIP_S:
                del self.clips[name]
                clip.path.unlink(missing_ok=True)

    async def _check_time(self, session: Session) -> None:
        now_s, settings = self.clock(), self.settings
        connection = session.connection
        if connection is None:
            if now_s - session.left_s > settings.resume_s and session.life.state != "queued":
                log.info("session given up", extra={"session": session.id})
                await self._forget(session)
            return
        assert isinstance(connection, Connection)
        end = None
        if now_s - session.accepted_s > settings.session_s:
            end = p.Refusal("time_limit", f"a session lasts at most {settings.session_s:g} s", fatal=True)
        elif now_s - session.heard_s > settings.idle_s:
            end = p.Refusal("idle", f"nothing was heard for {settings.idle_s:g} s", fatal=True)
        if end is not None:
            self.metrics.error(end.code)
            connection.kick(end)
            await self._forget(session)

    async def _save_in_time(self, session: Session) -> None:
        folder, now_s = self.settings.save_dir, self.clock()
        if folder is None or session.life.state not in LIVE:
            return
        turning = any(item.above_epoch is not None for item in session.receipts.waiting)
        due_s = self._saved_s.get(session.id, session.accepted_s) + self.settings.save_every_s
        if not turning and (session.dirty or now_s >= due_s):
            await self._save(session)

    async def _save(self, session: Session) -> None:
        assert self.settings.save_dir is not None
        self._saved_s[session.id] = self.clock()
        try:
            await saving.save(session, self.settings.save_dir)
        except (UserError, OSError) as error:  # a full disk ends no stream
            log.error("not saved: %s", error, extra={"session": session.id})
        except p.Refusal:  # it failed meanwhile, and said so
            return
        except Exception:  # nor does it keep the server from its end
            log.exception("not saved", extra={"session": session.id})

    def _save_journal(self, session: Session, folder: Path) -> None:
        try:
            saving.save_journal(session, folder)
        except (UserError, OSError) as error:
            log.error("a prompt is not saved: %s", error, extra={"session": session.id})

    def metrics_text(self) -> bytes:
        """For /metrics."""
        counts: dict[str, int] = {}
        for session in self.sessions.values():
            counts[session.life.state] = counts.get(session.life.state, 0) + 1
        for state in p.STATES:
            self.metrics.sessions.labels(state).set(counts.get(state, 0))
        opened = [one for one in self.sessions.values() if one.opened]
        self.metrics.held.labels("queues").set(sum(one.queue.bytes_held for one in opened))
        self.metrics.queued.set(max((len(one.queue.waiting) / one.fps for one in opened), default=0.0))
        leads = [one.next_frame / one.fps - one.playhead_s for one in opened if one.playhead_s is not None]
        self.metrics.lead.set(min(leads, default=0.0))
        return self.metrics.text(None if self.engine is None else self.engine.stats())
