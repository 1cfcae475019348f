"""One viewer's stream inside the runtime: what may be asked of it from any thread, and where it stands.

Every method takes the runtime's lock, changes a few numbers and returns; tensors are touched by the runtime's thread
alone. A change that turns the stream back (seek, a prompt at the playhead) is noted here and done there.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from streamgen.errors import UserError
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import frames_to_recache
from streamgen.stream import Snapshot, Stream
from streamgen.weights import user_errors
from streamgen_infer.checkpoints import Checkpoints
from streamgen_infer.engine import Work
from streamgen_infer.pacing import MediaClock
from streamgen_infer.requests import ApplyAt, MadeBlock, Receipt, StreamEvent, StreamRequest
from streamgen_infer.scheduler import StreamView

SHOWN = "shown_frames"
"""Key of a saved state: frames that the viewer has been given."""
MAX_FRAMES = 2**32
MAX_PROMPTS_AHEAD = 1024
"""Prompts for blocks that have not begun."""

OnBlock = Callable[[MadeBlock], None]
OnEvent = Callable[[StreamEvent], None]


class Turn(NamedTuple):
    """Go back to a snapshot, and give the viewer nothing before this frame again."""

    snapshot: Snapshot
    first_frame: int


@dataclass(slots=True)
class InProgress:
    """What the runtime remembers of a block until its frames are out."""

    flags: int = 0
    steps_chosen: bool = False


def new_stream(pipe: StreamPipeline, request: StreamRequest) -> Stream:
    """The stream that a request asks for; UserError for what is wrong with it, before any weight is touched."""
    geometry, blocks = pipe.geometry, None
    if request.max_seconds is not None:
        seconds = request.max_seconds * (request.fps or geometry.fps) / geometry.fps
        blocks = max(geometry.blocks_for_seconds(seconds), 1)
    if request.saved is not None:
        with user_errors("the saved state"):
            _check_saved(pipe, request.saved)
        return pipe.resume(request.saved, max_blocks=blocks)
    return pipe.stream(request.prompt, seed=request.seed, steps=request.steps, cache=request.cache, max_blocks=blocks)


def _check_saved(pipe: StreamPipeline, saved: Mapping[str, Any]) -> None:
    """UserError for a state that cannot share launches with other streams: all are of one geometry, one set of
    weights, and make block after block.
    """
    visibility = saved.get("visibility", Stream.visibility)
    if visibility != Stream.visibility:
        raise UserError(f"the state is of a stream with visibility {visibility}: live are clean ones only")
    loras = saved.get("adapters", {}).get("changes", [[0, {}, None]])
    if loras != [[0, pipe.loras, None]]:
        names = ", ".join(sorted({name for _, strengths, _ in loras for name in strengths})) or "none"
        raise UserError(
            f"the state has other LoRA files ({names}) than the model here ({', '.join(pipe.loras) or 'none'}), whose "
            "weights all live streams share: go on with streamgen stream --resume"
        )
    made, own = (json.loads(json.dumps(one)) for one in (saved["geometry"], asdict(pipe.geometry)))
    other = [name for name in own if name in made and made[name] != own[name]]
    if other == ["first_block_frames"]:
        raise UserError(
            "the state began with an image as a block of its own, as no live stream does: go on with streamgen stream "
            "--resume"
        )
    if other:
        listed = ", ".join(f"{name} {made[name]} instead of {own[name]}" for name in other)
        raise UserError(f"the state is of another geometry than this model ({listed}): use the model that made it")


class LiveStream:
    """Made by `Runtime.open`."""

    def __init__(
        self,
        stream: Stream,
        request: StreamRequest,
        *,
        id: str,
        lock: threading.Condition,
        now: Callable[[], float],
        checkpoints: Checkpoints,
        on_block: OnBlock,
        on_event: OnEvent,
    ) -> None:
        self.id, self.pipe, self.geometry = id, stream.pipe, stream.pipe.geometry
        self.stream, self.work, self.request = stream, Work(stream), request
        self.fps = request.fps or self.geometry.fps
        self.on_block, self.on_event = on_block, on_event
        self.epoch = 0
        self.fixed_steps = request.steps
        self.paused = self.closed = self.degraded = False
        start = self.geometry.block_pixel_start(stream.state.position)
        self.next_frame = start if request.saved is None else request.saved.get(SHOWN, start)
        if not (isinstance(self.next_frame, int) and start <= self.next_frame < MAX_FRAMES):
            raise UserError(f"the state was shown up to frame {self.next_frame!r}; it begins at frame {start}")
        """The first frame that the viewer has not been given; what is before it is made again and not shown."""
        self.last_served_s = now()
        self.current = InProgress()
        self.undecoded_flags = 0
        self.decoding = False
        """A block is in the codec, or its frames wait to be collected."""
        self.pending_snapshot: Snapshot | None = None
        """Taken at a commit whose block still waits for the codec."""
        self.version_shown = -1
        self.handing: int | None = None
        """The thread that gives a block to the viewer at this moment."""
        self.turn: Turn | None = None
        self.checkpoints = checkpoints
        checkpoints.add(stream.snapshot())
        self.clock = MediaClock(
            origin_s=now() + request.start_s - self.media_s(self.next_frame),
            lead_s=request.lead_s,
            made_s=self.media_s(self.next_frame),
        )
        self._lock, self._now = lock, now
        if request.paused:
            self.pause()

    # What a viewer may ask; from any thread.

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        apply_at: ApplyAt = "next_block",
        at_media_s: float | None = None,
        blend_blocks: int = 4,
    ) -> Receipt:
        """Change the prompt: at the next block, at what the viewer has not seen yet, or at a time still to be made.

        With `playhead` the blocks that wait to be played are given up and made anew under the new prompt.
        UserError for unknown words, transitions and times that have begun.
        """
        with self._lock:
            self._check_open()
            begun = block = self._earliest_block()
            if at_media_s is not None:
                block = self._block_at(at_media_s, "a prompt")
                if block < begun:
                    raise UserError(
                        f"a prompt at {at_media_s:g} s comes too late: the earliest is {self._block_s(begun):g} s"
                    )
            elif apply_at == "playhead":
                block = min(begun, self._unseen_block())
            elif apply_at != "next_block":
                raise UserError(f"apply_at is {apply_at!r}; it is one of: next_block, playhead")
            self._check_room(block, begun)
            version, odd = self.stream.change(text, transition, block, begun=begun, blend_blocks=blend_blocks)
            if block < begun:
                self._turn_back(block, self.geometry.block_pixel_start(block), self._block_s(block))
            self._lock.notify_all()
            return Receipt(version=version, block=block, media_s=self._block_s(block), warnings=odd)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is odd about what was asked for so far, in words."""
        return tuple(self.stream.warnings)

    def playhead(self, media_s: float) -> None:
        """What the viewer shows now, in seconds of media."""
        if not math.isfinite(media_s):
            raise UserError(f"a playhead of {media_s} s; it must be a number")
        with self._lock:
            self._check_open()
            self.clock.report(media_s, self._now())
            self._lock.notify_all()

    def pause(self) -> None:
        """Stop the media clock, and the making at the end of the block in progress."""
        with self._lock:
            self._check_open()
            self.paused = True
            self.clock.pause(self._now())

    def play(self) -> None:
        """Go on after a pause."""
        with self._lock:
            self._check_open()
            self.paused = False
            self.clock.resume(self._now())
            self.last_served_s = self._now()
            self._lock.notify_all()

    def seek(self, media_s: float) -> Receipt:
        """Show from an earlier time again, to the bit; a time not made yet is answered with the end of what is."""
        with self._lock:
            self._check_open()
            if not (math.isfinite(media_s) and media_s >= 0):
                raise UserError(f"a seek to {media_s} s; it must be a number of at least 0")
            frame = max(min(round(media_s * self.fps), self._next_frame()), self._first_frame())
            block = self._block_of_frame(frame)
            self._turn_back(block, frame, self.media_s(frame))
            self._lock.notify_all()
            return Receipt(version=self.stream.timeline.at(block).version, block=block, media_s=self.media_s(frame))

    def steps(self, count: int | None) -> None:
        """Make every block with so many steps; None: as many of the trained counts as the time allows."""
        with self._lock:
            self._check_open()
            if count is not None:
                self.stream.check_steps(count)
            self.fixed_steps = count

    def branch(self, media_s: float | None = None) -> dict[str, Any]:
        """A state to open a second stream from: as at a media time (the kept block edge before it), else now."""
        with self._lock:
            block = self._unseen_block() if media_s is None else self._block_at(media_s, "a branch")
            block = min(block, self._block_of_frame(self._next_frame()))
            saved = self.stream.state_dict(self.checkpoints.before(block))
            return {**saved, SHOWN: self.geometry.block_pixel_start(block)}

    def state_dict(self) -> dict[str, Any]:
        """The stream after the last frame that was given out; `StreamRequest.saved` goes on from there, exactly."""
        with self._lock:
            # What is on its way to the viewer must be there before the state that holds it.
            self._lock.wait_for(lambda: self.handing in (None, threading.get_ident()))
            frame = self._next_frame()
            return {**self.stream.state_dict(self.checkpoints.before(self._block_of_frame(frame))), SHOWN: frame}

    def close(self) -> None:
        """Give the stream up. Twice is once."""
        with self._lock:
            self.closed = True
            self._lock.notify_all()

    # What the runtime asks; with the lock held.

    def view(self, shape: Callable[[int], str], trained_steps: tuple[int, ...]) -> StreamView:
        """What the scheduler needs to know now."""
        state, run = self.stream.state, self.work.run
        position = state.position
        ready = None if run is None else run.kind
        begins = run is None and not self._held()
        if begins:
            cue = self.stream.timeline.at(position)
            again = cue.transition == "recache" and frames_to_recache(state, self.pipe.sampling(self.stream.steps))
            ready = "recache" if again else "step"
        works_for = position + int(run is not None and run.kind == "commit")
        finished = self.work.finished
        return StreamView(
            id=self.id,
            shape=shape(position),
            ready=ready,
            due_at_s=self.clock.due_s(self._block_s(works_for)),
            period_s=self._block_s(works_for + 1) - self._block_s(works_for),
            trained_steps=self._choices(position, trained_steps),
            passes_left=run.passes_left if run is not None and self.current.steps_chosen else None,
            not_before_s=self.clock.not_before_s(
                self._block_s(position), self._block_s(position + 1) - self._block_s(position)
            ),
            last_served_s=self.last_served_s,
            decode_due_s=None if finished is None else self.clock.due_s(self._block_s(finished.index)),
        )

    @property
    def ended(self) -> bool:
        """All blocks are made and out, or nobody wants more."""
        if self.closed:
            return True
        limit = self.stream.max_blocks
        idle = self.work.run is None and self.work.finished is None and not self.decoding and self.turn is None
        return idle and limit is not None and self.stream.state.position >= limit

    def do_turn(self) -> None:
        """Carry out what was noted; on the runtime's thread."""
        if self.turn is None:
            return
        self.work.drop()
        self.stream.restore(self.turn.snapshot)
        self.checkpoints.cut_after(self.turn.snapshot.position)
        self.next_frame, self.current, self.turn = self.turn.first_frame, InProgress(), None
        self.pending_snapshot = None

    def keep_snapshot(self) -> None:
        """The last commit's, now that the codec stands at the same block."""
        assert self.pending_snapshot is not None
        self.checkpoints.add(self.pending_snapshot.with_codec(self.stream.state.codec))
        self.pending_snapshot = None

    def media_s(self, frame: int) -> float:
        return frame / self.fps

    def _choices(self, block: int, trained_steps: tuple[int, ...]) -> tuple[int, ...]:
        """Step counts that a block may have; all blocks build on the first, so what its model's card says holds."""
        if self.fixed_steps is not None:
            return (self.fixed_steps,)
        first = self.stream.first_steps
        return (first,) if block == 0 and first is not None else trained_steps

    def _held(self) -> bool:
        limit = self.stream.max_blocks
        return self.paused or self.closed or (limit is not None and self.stream.state.position >= limit)

    def _turn_back(self, block: int, frame: int, media_s: float) -> None:
        snapshot = self.checkpoints.before(block)
        self.turn = Turn(snapshot, frame)
        self.epoch += 1
        self.clock.turn(media_s, self._now(), self.request.start_s)

    def _block_s(self, block: int) -> float:
        return self.media_s(self.geometry.block_pixel_start(block))

    def _block_of_frame(self, frame: int) -> int:
        """The block that holds a frame."""
        return max(self.geometry.block_at_seconds((frame + 1) / self.geometry.fps) - 1, 0)

    def _block_at(self, media_s: float, what: str) -> int:
        """The first block that starts at or after a media time."""
        if not (math.isfinite(media_s) and media_s >= 0):
            raise UserError(f"{what} at {media_s} s; it must be a number of at least 0")
        return self.geometry.block_at_seconds(media_s * self.fps / self.geometry.fps)

    def _next_frame(self) -> int:
        """The first frame that the viewer is still to be given, with a turn that waits to be carried out."""
        return self.next_frame if self.turn is None else self.turn.first_frame

    def _first_frame(self) -> int:
        """The earliest that can be gone back to: 0, or where a stream that was opened from a state came in."""
        return self.geometry.block_pixel_start(self.checkpoints.blocks()[0])

    def _earliest_block(self) -> int:
        """The first block whose prompt is open. What is made again on the way to it keeps its own."""
        if self.turn is not None:
            return self._block_of_frame(self.turn.first_frame)
        state = self.stream.state
        return max(state.position + int(state.begun), self._block_of_frame(self.next_frame))

    def _unseen_block(self) -> int:
        """The first block of which the viewer sees nothing yet."""
        seen = math.ceil(self.clock.playhead_s(self._now()) * self.fps - 1e-6)
        block = 0 if self.next_frame == 0 or seen <= 0 else self._block_of_frame(seen) + 1
        return max(block, self.checkpoints.blocks()[0])

    def _check_room(self, block: int, begun: int) -> None:
        """UserError for a prompt past the end, or one too many."""
        limit = self.stream.max_blocks
        if limit is not None and block >= limit:
            raise UserError(f"a prompt for block {block} is past the end: the stream has {limit} blocks")
        if sum(entry.block > max(block, begun) for entry in self.stream.timeline.prompts) >= MAX_PROMPTS_AHEAD:
            raise UserError(f"{MAX_PROMPTS_AHEAD} prompts wait for their block: no more until some have begun")

    def _check_open(self) -> None:
        if self.closed:
            raise UserError(f"stream {self.id} is closed")
