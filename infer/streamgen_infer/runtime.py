"""Streams of one model on this machine, live: a thread that runs what the scheduler chooses, while viewers come and go.

    open, prompt, seek ... (any thread) --> numbers in LiveStream, under one lock
    the thread: [turn back what was asked] -> views -> scheduler.choose -> engine launch -> costs, frames, events

Tensors belong to the thread. The lock is not held during a launch, nor while a viewer's callback runs.
"""

from __future__ import annotations

import itertools
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from streamgen.errors import UserError
from streamgen.frames import Coming
from streamgen.pipeline import StreamPipeline
from streamgen.timeline import Cue
from streamgen.transfers import use_device
from streamgen_infer.admission import Limits, Memory, admit
from streamgen_infer.checkpoints import Checkpoints
from streamgen_infer.cost_model import CostModel
from streamgen_infer.engine import Engine, Finished, Work
from streamgen_infer.free_memory import map_large
from streamgen_infer.live_costs import StreamCosts, half_of_free_memory, warm_up
from streamgen_infer.live_stream import InProgress, LiveStream, OnBlock, OnEvent, new_stream
from streamgen_infer.requests import (
    LATE,
    EventKind,
    MadeBlock,
    Refused,
    RuntimeStats,
    StreamEvent,
    StreamRequest,
)
from streamgen_infer.scheduler import Launch, Rules, Wait, choose

Told = tuple[LiveStream, StreamEvent]

CHECKPOINT_BYTES = 64 << 20
"""Per stream, for turning back."""


class _Decoding(NamedTuple):
    """A block that was given to the codec."""

    live: LiveStream
    epoch: int
    finished: Finished
    flags: int
    coming: Coming


class Runtime:
    """See the module. `start` before `open`; `close` ends all streams.

    admission: refuse what the measured costs do not allow. Without it one viewer on a slow machine sees a video that
    stalls, and not an error.
    """

    def __init__(
        self,
        pipe: StreamPipeline,
        *,
        max_streams: int = 8,
        memory_bytes: int | None = None,
        admission: bool = True,
        checkpoint_bytes: int = CHECKPOINT_BYTES,
        costs: CostModel | None = None,
        warm_up_prompt: str = "a red star",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pipe, self.engine = pipe, Engine(pipe)
        self.costs = costs or CostModel()
        self.rules = Rules(commit_passes=int(pipe.scheduler.commits))
        self.limits = Limits(most_streams=max_streams)
        self.admission, self.sizes = admission, StreamCosts(pipe, checkpoint_bytes)
        self.memory_bytes = half_of_free_memory() if memory_bytes is None else memory_bytes
        self._warm_up_prompt = warm_up_prompt
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        """What ended the thread, if anything did."""
        self._now = clock
        self._streams: dict[str, LiveStream] = {}
        self._stats = RuntimeStats()
        self._numbers = itertools.count(1)
        self._coming: deque[_Decoding] = deque()
        self._lock = threading.Condition(threading.RLock())
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="streamgen-runtime", daemon=True)

    # For viewers, from any thread.

    def start(self) -> None:
        """Warm up and measure on the calling thread, then run. Sets how this process frees memory (`map_large`)."""
        map_large()
        warm_up(self.engine, self.costs, self.sizes, self._warm_up_prompt, self.limits.most_streams)
        self._thread.start()
        self.ready.set()

    def open(self, request: StreamRequest, *, on_block: OnBlock, on_event: OnEvent = lambda event: None) -> LiveStream:
        """Admit a stream and begin to make it. Callbacks come from the runtime's thread and must not block.

        UserError for what is wrong with the request, Refused for what the machine cannot carry now.
        """
        if not self.ready.is_set():
            raise UserError("the runtime is not ready yet: it is warming up")
        stream = new_stream(self.pipe, request)
        with self._lock:
            if self._closing:
                raise Refused("streams", "the runtime is closing", retry_after_s=10.0, numbers={})
            load = self.sizes.load(request, stream)
            due_s = self._now() + request.start_s
            if self.admission:
                verdict = admit(
                    self._now(),
                    [self.sizes.load(live.request, live.stream, live) for live in self._streams.values()],
                    load,
                    self.costs,
                    Memory(total_bytes=self.memory_bytes),
                    start_s=request.start_s,
                    rules=self.rules,
                    limits=self.limits,
                )
                if isinstance(verdict, Refused):
                    self._stats.refused[verdict.resource] = self._stats.refused.get(verdict.resource, 0) + 1
                    raise verdict
                due_s = verdict.due_s
            live = LiveStream(
                stream,
                request,
                id=f"s{next(self._numbers)}",
                lock=self._lock,
                now=self._now,
                checkpoints=Checkpoints(self.sizes.checkpoint_bytes, self.sizes.dense(request)),
                on_block=on_block,
                on_event=on_event,
            )
            live.clock.origin_s = due_s - live.clock.made_s
            self._streams[live.id] = live
            self._stats.admitted += 1
            self._lock.notify_all()
        return live

    def stats(self) -> RuntimeStats:
        """A copy of the counters."""
        with self._lock:
            s = self._stats
            held = sum(live.stream.state.cache.nbytes() + live.checkpoints.nbytes() for live in self._streams.values())
            values = {name: getattr(s, name) for name in RuntimeStats.__dataclass_fields__}
            return RuntimeStats(
                **{**values, "streams": len(self._streams), "refused": dict(s.refused), "bytes_held": held}
            )

    def close(self) -> None:
        """End the streams and the thread; returns when the launch in progress is over."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # The thread.

    def _run(self) -> None:
        try:
            use_device(self.pipe.device)
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001 (kept for those who ask, and told to every viewer)
            self.failure = error
            traceback.print_exc()
        finally:
            self._coming.clear()
            with self._lock:
                self._closing = True
                left = list(self._streams.values())
                self._streams.clear()
            message = "" if self.failure is None else f"{type(self.failure).__name__}: {self.failure}"
            for live in left:
                live.closed = True
                kind: EventKind = "ended" if self.failure is None else "failed"
                self._tell([(live, StreamEvent(kind=kind, block=live.stream.state.position, message=message))])

    def _turn(self) -> bool:
        """One launch, or one wait; False when the runtime is closing."""
        cues: dict[str, Cue] = {}
        with self._lock:
            if self._closing:
                return False
            ended = self._settle()
            views = [live.view(self.sizes.shape, self.pipe.scheduler.trained_steps) for live in self._streams.values()]
            decision = choose(self._now(), views, self.costs, self.rules)
            if isinstance(decision, Wait):
                if not ended and not self._coming:
                    until_s = decision.until_s
                    self._lock.wait(None if until_s is None else max(until_s - self._now(), 0.0))
                events, launch, lives = ended, None, []
            else:
                launch, lives = decision, [self._streams[name] for name in decision.streams]
                cues, events = self._fix_cues(launch, lives)
                events = ended + events
        self._tell(events)
        if launch is not None and (lives := self._begin(launch, lives, cues)):
            self._launch(launch, lives)
        else:
            self._deliver()
        return True

    def _settle(self) -> list[Told]:
        """Turn back what was asked to, and let go of what has ended."""
        events: list[Told] = []
        for live in list(self._streams.values()):
            live.do_turn()
            if live.ended:
                del self._streams[live.id]
                live.closed = True
                events.append((live, StreamEvent(kind="ended", block=live.stream.state.position)))
        return events

    def _fix_cues(self, launch: Launch, lives: Sequence[LiveStream]) -> tuple[dict[str, Cue], list[Told]]:
        """The prompts of the blocks that this launch begins."""
        events: list[Told] = []
        cues: dict[str, Cue] = {}
        for live in lives:
            if launch.kind in ("decode", "preview") or live.work.run is not None:
                continue
            cue = cues[live.id] = live.stream.fix_cue()
            if cue.version != live.version_shown:
                live.version_shown = cue.version
                event = StreamEvent(kind="applied", block=live.stream.state.position, version=cue.version)
                events.append((live, event))
        return cues, events

    def _begin(self, launch: Launch, lives: Sequence[LiveStream], cues: Mapping[str, Cue]) -> list[LiveStream]:
        """Open the blocks that this launch begins, with the steps chosen for them -> the streams that are ready.

        A text may have to be encoded, so the lock is not held.
        """
        if launch.kind in ("decode", "preview"):
            return list(lives)
        ready: list[LiveStream] = []
        for live in lives:
            if live.id in cues:
                live.current = InProgress()
                try:
                    live.work.begin(cue=cues[live.id])
                except Exception as error:  # noqa: BLE001 (told to the one stream that it concerns)
                    self._fail(live, error)
                    continue
            if live.id in launch.steps:
                live.work.choose_steps(launch.steps[live.id])
                live.current.steps_chosen = True
                live.current.flags |= launch.flags.get(live.id, 0)
            ready.append(live)
        return ready

    def _launch(self, launch: Launch, lives: Sequence[LiveStream]) -> None:
        if launch.kind in ("decode", "preview"):
            self._decode(launch, lives)
            return
        shape = self.sizes.shape(lives[0].stream.state.position)
        started_s, passes_s = self._now(), self.engine.passes_s
        failed = self._forward([live.work for live in lives], self._deliver)
        # Frames may have been collected meanwhile, and viewers called: that is no cost of the passes.
        took_s = self.engine.passes_s - passes_s if self.engine.overlaps else self._now() - started_s
        with self._lock:
            self._count(launch.kind, shape, len(lives), took_s)
            for place, live in enumerate(lives):
                live.last_served_s = self._now()
                if place in failed or live.turn is not None:
                    continue
                waited = live.work.finished is not None
                if live.work.advanced():
                    live.pending_snapshot = live.stream.snapshot()
                    if live.work.finished is None:
                        live.keep_snapshot()
                if live.work.finished is not None and not waited:
                    live.undecoded_flags = live.current.flags
        for place, error in failed.items():
            self._fail(lives[place], error)

    def _forward(self, works: Sequence[Work], meanwhile: Callable[[], None] = lambda: None) -> dict[int, Exception]:
        """One forward; when it raises, one for each stream, so that only the one to blame fails."""
        try:
            return self.engine.forward(works, meanwhile)
        except Exception as error:  # noqa: BLE001 (a launch may fail for any reason; it is told, not swallowed)
            self._stats.failed_launches += 1
            if len(works) == 1:
                return {0: error}
        alone = [self._forward([work]) for work in works]
        return {place: failed[0] for place, failed in enumerate(alone) if failed}

    def _decode(self, launch: Launch, lives: Sequence[LiveStream]) -> None:
        """Where the codec runs beside the transformer, frames are collected while the next launch runs."""
        self._deliver()  # a stream has one block in the codec
        shape, started_s = self.sizes.shape(lives[0].stream.state.position), self._now()
        for live in lives:
            with self._lock:
                epoch, finished, is_turned = live.epoch, live.work.finished, live.turn is not None
            if is_turned:  # the block is of a video that nobody wants any more
                continue
            assert finished is not None
            flags = live.undecoded_flags | launch.flags.get(live.id, 0)
            try:
                coming = self.engine.begin_decode(live.work)
            except Exception as error:  # noqa: BLE001 (told to the one stream that it concerns)
                self._fail(live, error)
                continue
            live.decoding = True
            self._coming.append(_Decoding(live, epoch, finished, flags, coming))
            if not self.engine.overlaps:
                self._deliver()
        if not self.engine.overlaps:
            with self._lock:
                self._count(launch.kind, shape, len(lives), self._now() - started_s)

    def _deliver(self) -> None:
        """Collect the frames of what was given to the codec, and give them to the viewers."""
        while self._coming:
            one = self._coming.popleft()
            live = one.live
            live.decoding = False
            try:
                frames = one.coming.wait()
            except Exception as error:  # noqa: BLE001 (told to the one stream that it concerns)
                self._fail(live, error)
                continue
            with self._lock:
                if self.engine.overlaps:
                    self._count("decode", self.sizes.shape(one.finished.index), 1, one.coming.decode_ms() / 1000)
                turned = one.epoch != live.epoch or live.id not in self._streams
                made, event = (None, None) if turned else self._made(one, frames)
                if made is not None:
                    live.handing = threading.get_ident()
            if made is not None:
                self._guarded(live, lambda live=live, made=made: live.on_block(made))  # type: ignore[misc]
                with self._lock:
                    live.handing = None
                    self._lock.notify_all()
            if event is not None:
                self._tell([(live, event)])

    def _made(self, one: _Decoding, frames: np.ndarray) -> tuple[MadeBlock | None, StreamEvent | None]:
        """What the viewer gets of a decoded block, and what is to be told; with the lock held."""
        live, finished, ready_s = one.live, one.finished, self._now()
        live.last_served_s = ready_s
        if live.pending_snapshot is not None:
            live.keep_snapshot()
        first = self.pipe.geometry.block_pixel_start(finished.index)
        hidden = max(live.next_frame - first, 0)  # made again on the way to where the viewer wants to be
        if hidden >= len(frames):
            return None, None
        frame = first + hidden
        media_s, length_s = live.media_s(frame), (len(frames) - hidden) / live.fps
        slack_s = live.clock.delivered(media_s, length_s, ready_s)  # in a pause too: as if it ended now
        late, degraded = slack_s < 0, bool(one.flags & ~LATE)
        live.next_frame = first + len(frames)
        self._stats.blocks += 1
        self._stats.frames += len(frames) - hidden
        self._stats.late_blocks += late
        self._stats.degraded_blocks += degraded
        event = None
        if degraded != live.degraded:
            live.degraded = degraded
            event = StreamEvent(kind="degraded" if degraded else "restored", block=finished.index)
        made = MadeBlock(
            epoch=live.epoch,
            index=finished.index,
            frames=frames[hidden:],
            first_frame=frame,
            media_s=media_s,
            due_at_s=ready_s + slack_s,
            ready_at_s=ready_s,
            steps=finished.steps,
            prompt_version=finished.cue.version,
            flags=one.flags | (LATE if late else 0),
        )
        return made, event

    def _count(self, kind: str, shape: str, rows: int, took_s: float) -> None:
        self._stats.launches += 1
        self._stats.busy_s += took_s
        self.costs.observe(kind, shape, rows, max(took_s, 1e-6))

    def _fail(self, live: LiveStream, error: Exception) -> None:
        """The end of one stream; the others go on."""
        with self._lock:
            live.closed = True
            self._streams.pop(live.id, None)
        message = f"{type(error).__name__}: {error}"
        self._tell([(live, StreamEvent(kind="failed", block=live.stream.state.position, message=message))])

    def _tell(self, events: Sequence[Told]) -> None:
        for live, event in events:
            self._guarded(live, lambda live=live, event=event: live.on_event(event))  # type: ignore[misc]

    def _guarded(self, live: LiveStream, call: Callable[[], None]) -> None:
        """A viewer's callback that raises ends its own stream and nobody else's."""
        try:
            call()
        except Exception:  # noqa: BLE001 (printed; the stream ends by it)
            traceback.print_exc()
            live.close()
