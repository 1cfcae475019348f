"""A replica: one runtime with its model, in a process of its own, as the front door talks to it.

    front door -- open, command, tell, release --> Replica --> Runtime
    front door <---------- take (waits for something) ---------- outbox: blocks, events, saved states, in their order

What goes to and fro can be pickled. No Ray here: whoever can call methods of an object far away can have replicas.
"""

from __future__ import annotations

import os
import pickle
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from streamgen.errors import UserError
from streamgen_infer.requests import MadeBlock, Refused, RuntimeStats, StreamEvent, StreamRequest
from streamgen_infer.serve.placement import SavedPoint

if TYPE_CHECKING:
    from streamgen_infer.live_stream import LiveStream
    from streamgen_infer.runtime import Runtime

SHOWN = "shown_frames"
"""Key of a saved state, as in `streamgen_infer.live_stream`."""
STATE_EVERY_S = 1.0
STATE_SHARE = 0.05
"""Of a replica's time, at most so much goes into the states of one stream."""
OUTBOX_BYTES = 64 << 20
"""Frames that wait to be taken; streams pause while there are more."""
COMMANDS = ("prompt", "seek", "steps", "state_dict", "branch")
"""Of a stream, that are answered; `tell` carries what is not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """What the server asks of a pipeline's scheduler."""

    trained_steps: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What the server asks of a pipeline, where the pipeline is elsewhere, and where that is."""

    geometry: Any
    scheduler: Steps
    process: int
    host: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """A stream to be opened: a new one, or one that goes on from where another replica left it."""

    request: StreamRequest
    saved: bytes | None = None
    """A packed state to go on from; None: from the request's own beginning."""
    timeline: list[dict[str, Any]] | None = None
    """All prompts accepted so far, in place of the state's own."""
    next_frame: int | None = None
    """With a stream that moves: the first frame that the viewer has not got."""
    changes: int = 0
    """How many changes of the prompt are among them, as whoever orders counts."""
    paused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of an order or a command; of the three that are errors at most one is set."""

    value: Any = None
    epoch: int = 0
    warnings: tuple[str, ...] = ()
    timeline: list[dict[str, Any]] = field(default_factory=list)
    mistake: str | None = None
    """A UserError's words."""
    refused: tuple[str, str, float, dict[str, float]] | None = None
    """A Refused, as the arguments to make it again."""
    gone: bool = False
    """The stream is not here (any more)."""


@dataclass(frozen=True, slots=True)
class Released:
    """The last word about a stream that leaves: the state after its last frame. All its frames came before."""

    position: int
    packed: bytes


Item = MadeBlock | StreamEvent | SavedPoint | Released


@dataclass(frozen=True, slots=True, kw_only=True)
class Handed:
    """All that waited, and how the replica is."""

    items: list[tuple[str, Item]]
    now_s: float
    """The replica's clock, which the times of blocks are on."""
    stats: RuntimeStats
    failure: str | None = None


@dataclass(slots=True)
class _Entry:
    """A stream here. Its lock makes what is read of it belong together, against commands."""

    live: LiveStream
    lock: threading.Lock = field(default_factory=threading.Lock)
    changes: int = 0
    """Prompts accepted, here and before it came."""
    paused: bool = False
    pause_number: int = -1
    held: bool = False
    """Paused because the outbox was full."""
    releasing: bool = False
    new_blocks: int = 0
    """Since its last saved state."""
    state_due_s: float = 0.0


class Replica:
    """See the module. Methods may be called from several threads at once; `take` from one."""

    def __init__(
        self,
        make_runtime: Callable[[], Runtime],
        *,
        state_every_s: float = STATE_EVERY_S,
        outbox_bytes: int = OUTBOX_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._make_runtime, self._clock = make_runtime, clock
        self._state_every_s, self._outbox_bytes = state_every_s, outbox_bytes
        self._entries: dict[str, _Entry] = {}
        self._outbox: list[tuple[str, Item]] = []
        self._waiting_bytes = 0
        self._filled = threading.Condition()

    def start(self) -> Card:
        """Load the model and warm up."""
        self.runtime = self._make_runtime()
        self.runtime.start()
        pipe = self.runtime.pipe
        return Card(
            geometry=pipe.geometry,
            scheduler=Steps(trained_steps=tuple(pipe.scheduler.trained_steps)),
            process=os.getpid(),
            host=socket.gethostname(),
        )

    def open(self, name: str, order: Order) -> Answer:
        """A stream under a name of the caller's; its blocks begin to come to the outbox."""
        opened = threading.Event()

        def on_block(block: MadeBlock) -> None:
            opened.wait()
            self._block(name, block)

        def on_event(event: StreamEvent) -> None:
            opened.wait()
            self._event(name, event)

        try:
            live = self.runtime.open(self._request(order), on_block=on_block, on_event=on_event)
        except Refused as error:
            return Answer(refused=(error.resource, str(error), error.retry_after_s, error.numbers))
        except UserError as error:
            return Answer(mistake=str(error))
        due_s = self._clock() + self._state_every_s
        entry = _Entry(live, changes=order.changes, paused=order.paused, state_due_s=due_s)
        self._entries[name] = entry
        with suppress(UserError):  # it was at its end already
            self._pause_or_play(entry)
        opened.set()
        timeline = live.stream.timeline.state_dict()
        return Answer(value=float(live.fps), warnings=live.warnings, timeline=timeline)

    def _request(self, order: Order) -> StreamRequest:
        """The request with the state that the order speaks of."""
        if order.next_frame is None:
            return order.request
        request, pipe = order.request, self.runtime.pipe
        saved = request.saved if order.saved is None else pickle.loads(order.saved)
        if saved is None:
            begin = pipe.stream(request.prompt, seed=request.seed, steps=request.steps, cache=request.cache)
            saved = begin.state_dict()
        saved = {**saved, SHOWN: order.next_frame}
        if order.timeline is not None:
            saved["timeline"] = order.timeline
        return replace(request, saved=saved)

    def command(self, name: str, method: str, *arguments: Any, **named: Any) -> Answer:
        """One of COMMANDS of a stream; states come packed."""
        assert method in COMMANDS, method
        entry = self._entries.get(name)
        if entry is None:
            return Answer(gone=True)
        with entry.lock:
            if entry.releasing:
                return Answer(gone=True)
            live = entry.live
            try:
                value = getattr(live, method)(*arguments, **named)
            except UserError as error:
                return Answer(mistake=str(error))
            if method == "prompt":
                entry.changes += 1
            elif method == "steps":
                entry.state_due_s, entry.new_blocks = 0.0, 1  # what was made with the old count is not made again
            elif method in ("state_dict", "branch"):
                value = pack(value)
            timeline = live.stream.timeline.state_dict()
            return Answer(value=value, epoch=live.epoch, warnings=live.warnings, timeline=timeline)

    def tell(self, name: str, what: Literal["playhead", "paused"], value: float, number: int) -> None:
        """Where the viewer is, or that time stands (1) or goes on (0). What is overtaken by a later number is void."""
        entry = self._entries.get(name)
        if entry is None:
            return
        with entry.lock, suppress(UserError):  # it has ended: the event says so
            if what == "playhead":
                entry.live.playhead(value)
            elif number > entry.pause_number:
                entry.pause_number, entry.paused = number, bool(value)
                self._pause_or_play(entry)

    def release(self, name: str) -> bool:
        """End a stream here, to go on elsewhere: its last item will be Released. False: it is not here."""
        entry = self._entries.get(name)
        if entry is None:
            return False
        with entry.lock:
            if entry.live.closed:
                return False
            entry.releasing = True
            entry.live.close()
        return True

    def forget(self, name: str) -> None:
        """End a stream, for good."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            entry.live.close()

    def take(self, wait_s: float) -> Handed:
        """All that waits; nothing, if nothing comes within the time."""
        with self._filled:
            self._filled.wait_for(lambda: self._outbox, wait_s)
            items, self._outbox, self._waiting_bytes = self._outbox, [], 0
        for entry in list(self._entries.values()):
            if entry.held:
                with entry.lock, suppress(UserError):
                    entry.held = False
                    self._pause_or_play(entry)
        items += self._points()
        failure = self.runtime.failure
        message = None if failure is None else f"{type(failure).__name__}: {failure}"
        return Handed(items=items, now_s=self._clock(), stats=self.runtime.stats(), failure=message)

    def close(self) -> None:
        """End all."""
        self.runtime.close()

    # On the runtime's thread.

    def _block(self, name: str, block: MadeBlock) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        entry.new_blocks += 1
        with self._filled:
            self._outbox.append((name, block))
            self._waiting_bytes += block.frames.nbytes
            full = self._waiting_bytes > self._outbox_bytes
            self._filled.notify_all()
        if full:
            entry.held = True
            entry.live.pause()

    def _event(self, name: str, event: StreamEvent) -> None:
        entry = self._entries.get(name)
        if entry is None:
            return
        item: Item = event
        if event.kind == "ended" and entry.releasing:
            saved = entry.live.state_dict()
            item = Released(saved["position"], pack(saved))
            del self._entries[name]
        elif event.kind in ("ended", "failed") and self.runtime.failure is not None:
            return  # of the whole runtime: `take` says so
        with self._filled:
            self._outbox.append((name, item))
            self._filled.notify_all()

    # On `take`'s.

    def _points(self) -> list[tuple[str, Item]]:
        """States of the streams whose time has come."""
        points: list[tuple[str, Item]] = []
        for name, entry in list(self._entries.items()):
            started_s = self._clock()
            if not entry.new_blocks or started_s < entry.state_due_s or entry.live.closed:
                continue
            with entry.lock:
                entry.new_blocks = 0
                saved, changes = entry.live.state_dict(), entry.changes
            position = saved["position"]
            first = self.runtime.pipe.geometry.block_pixel_start(position)
            point = SavedPoint(position=position, first_frame=first, changes=changes, packed=pack(saved))
            points.append((name, point))
            took_s = self._clock() - started_s
            entry.state_due_s = started_s + max(self._state_every_s, took_s / STATE_SHARE)
        return points

    def _pause_or_play(self, entry: _Entry) -> None:
        if entry.live.closed:
            return
        if entry.paused or entry.held:
            entry.live.pause()
        else:
            entry.live.play()


def pack(state: dict[str, Any]) -> bytes:
    """A stream's state as bytes, from whatever device it is on."""

    def on_host(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: on_host(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(on_host(one) for one in value)
        return value.cpu() if hasattr(value, "cpu") else value

    return pickle.dumps(on_host(state), protocol=5)


def unpack(packed: bytes) -> dict[str, Any]:
    """The state again. Only for what a replica of ours packed: a pickle can hold anything."""
    state: dict[str, Any] = pickle.loads(packed)
    return state
