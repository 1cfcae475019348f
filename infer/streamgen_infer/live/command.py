"""`streamgen live`: a stream in a terminal that follows what is typed while it plays.

    typed line --> LiveStream.prompt, seek ...         (streamgen_infer.runtime makes blocks in its own thread)
    block of frames --> Playback --> at its media time --> the terminal and the file

The file holds what was shown: what a new prompt took back before its time is not in it, what was shown twice is twice.
"""

from __future__ import annotations

import math
import queue
import sys
import time
import warnings
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streamgen.errors import UserError
from streamgen_infer.encoders import Video
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.live.keys import Keys, LineKeys, TerminalKeys, Typed
from streamgen_infer.live.lines import HELP, Line, Manner, parse_line
from streamgen_infer.live.playback import Playback, Waiting
from streamgen_infer.live.screen import Face, PlainFace, ScreenFace, Standing
from streamgen_infer.requests import LATE, MadeBlock, StreamEvent, StreamRequest
from streamgen_infer.sinks import STDOUT, Output, Sink, check_output
from streamgen_infer.stream_command import whole_frames
from streamgen_infer.stream_options import (
    CACHES,
    DTYPES,
    MAX_FPS,
    MAX_SCALE,
    MAX_STEPS,
    TRANSITIONS,
    check_device,
    parse_seconds,
)

if TYPE_CHECKING:
    from streamgen_infer.live_stream import LiveStream
    from streamgen_infer.runtime import Runtime

NAP_S = 0.05  # a signal and a key wait no longer
LEAD_S = 1.5
RATE_FRAMES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    prompt: str | None = None
    seconds: str = "inf"
    seed: int = 0
    out: str | None = None
    model: str = "sprites"
    steps: int | None = None
    cache: str | None = None
    transition: str = "recache"
    fps: float | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    scale: int = 1
    preview: bool = True
    overwrite: bool = False
    quiet: bool = False


def check(options: Options) -> tuple[float, Output | None]:
    """Seconds and output; UserError for everything that can be refused without the model."""
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("the prompt is empty; describe a scene, or leave it out and type it later")
    for name, value, low, high in (
        ("--seed", options.seed, 0, 2**64 - 1),
        ("--steps", options.steps, 1, MAX_STEPS),
        ("--fps", options.fps, 1, MAX_FPS),
        ("--threads", options.threads, 1, 1024),
        ("--scale", options.scale, 1, MAX_SCALE),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low} to {high}")
    for name, choice, known in (
        ("--cache", options.cache, CACHES),
        ("--transition", options.transition, TRANSITIONS),
        ("--dtype", options.dtype, DTYPES),
    ):
        if choice is not None and choice not in known:
            raise UserError(f"{name} {choice!r} does not exist; there are: {', '.join(known)}")
    check_device(options.device)
    seconds = parse_seconds(options.seconds)
    if options.out is None:
        return seconds, None
    return seconds, check_output(options.out, fps=options.fps, overwrite=options.overwrite)


def run(options: Options, interrupts: Interrupts) -> int:
    """The command; returns the exit code."""
    seconds, output = check(options)
    if not options.quiet:
        print(f"loading {options.model} ...", file=sys.stderr, flush=True)
    from streamgen.pipeline import StreamPipeline
    from streamgen_infer.runtime import Runtime

    pipe = StreamPipeline.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, threads=options.threads
    )
    fps = options.fps or pipe.geometry.fps
    video = Video(height=pipe.geometry.height, width=pipe.geometry.width, fps=fps)
    sink = None if output is None else Sink(output, video, options.scale)
    runtime = Runtime(pipe, max_streams=1, admission=False)
    runtime.start()
    with interrupts.deferred() as stop:
        keys, face = open_terminal(options)
        try:
            show = Show(options, runtime, Playback(fps), sink, face, keys, seconds)
            show.play(stop)
        finally:
            keys.close()
            face.close()
            runtime.close()
            path = None if sink is None else sink.close()
        where = None if output is None else str(path or output.name)
        return _farewell(options, show, where, stop.requested)


def open_terminal(options: Options) -> tuple[Keys, Face]:
    """A screen where both ends are a terminal, plain lines otherwise."""
    if sys.stdin.isatty() and sys.stderr.isatty() and not options.quiet and TerminalKeys.possible():
        from rich.console import Console

        known = Console(stderr=True).color_system
        colors = known if options.preview and known in ("truecolor", "256") else None
        return TerminalKeys(), ScreenFace(sys.stderr, colors)
    return LineKeys(), PlainFace(options.quiet)


def _farewell(options: Options, show: Show, where: str | None, interrupted: bool) -> int:
    made = f"{show.frames} frames, {show.frames / show.playback.fps:.4g} s"
    kept = f"{made} are in {where}" if show.frames else "there is no frame yet"
    if interrupted:
        print("streamgen: interrupted" + (f"; {kept}" if where else ""), file=sys.stderr)
        return INTERRUPTED
    if not options.quiet:
        out = sys.stderr if where is None or options.out == STDOUT else sys.stdout
        print(f"{made} shown, {show.late} blocks late" + (f"; {kept}" if where else ""), file=out, flush=True)
    return 0


class Show:
    """The loop: what was typed, what was made, what is due."""

    def __init__(
        self,
        options: Options,
        runtime: Runtime,
        playback: Playback,
        sink: Sink | None,
        face: Face,
        keys: Keys,
        seconds: float,
    ) -> None:
        self.options, self.runtime, self.playback = options, runtime, playback
        self.sink, self.face, self.keys = sink, face, keys
        self.last_frame = math.inf if math.isinf(seconds) else whole_frames(seconds, playback.fps)
        self.max_seconds = None if math.isinf(seconds) else seconds
        self.inbox: queue.SimpleQueue[Typed | MadeBlock | StreamEvent | str] = queue.SimpleQueue()
        self.manner = Manner(transition=options.transition)
        self.live: LiveStream | None = None
        self.agenda: list[Line] = []
        """Commands whose time has not come."""
        self.prompts: dict[int, str] = {}
        self.on_screen: Waiting | None = None
        self.unwritten: list[np.ndarray] = []
        self.shown_s: deque[float] = deque(maxlen=RATE_FRAMES)
        self.frames = self.late = self.received = 0
        self.ended = self.quit = self.no_more_lines = False

    def play(self, stop: Stop) -> None:
        """Until it ends, by itself or by somebody."""
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.showwarning = lambda message, *rest, **named: self.inbox.put(f"warning: {message}")
            if self.options.prompt is not None:
                self._open(self.options.prompt)
            else:
                self.face.note(HELP)
            self.keys.start(self.inbox.put)
            try:
                while not (stop.requested or self.quit or self._is_over()):
                    self._hear()
                    self._show_due()
                    self.face.show(self.on_screen and self.on_screen.frame_HWC, self._standing(), self.keys.editor)
            finally:
                self._write()
                if self.live is not None:
                    self.live.close()

    def _is_over(self) -> bool:
        if self.playback.position >= self.last_frame:
            return True
        if self.live is None:
            return self.no_more_lines
        return self.ended and not self.playback.waiting

    def _hear(self) -> None:
        """Wait for the next thing to do, and take all that has come."""
        wait_s = min(NAP_S, self.playback.next_due_s() - time.monotonic())
        with suppress(queue.Empty):
            self._take(self.inbox.get(timeout=max(wait_s, 0.0)))
            while True:
                self._take(self.inbox.get_nowait())

    def _take(self, item: Typed | MadeBlock | StreamEvent | str) -> None:
        match item:
            case MadeBlock():
                self.playback.add(item)
                self.late += bool(item.flags & LATE)
            case StreamEvent(kind="failed"):
                raise Failure(f"the stream failed: {item.message}")
            case StreamEvent(kind="ended"):
                self.ended = True
            case StreamEvent(kind="applied", version=int(version)) if version > 0:
                self.face.note(f"prompt {version} holds from {self._block_s(item.block):.4g} s")
            case Typed(line=None):
                self.no_more_lines = True
            case Typed(line=str(line)):
                self._line(line)
            case str():
                self.face.note(item)

    # What was typed.

    def _line(self, text: str) -> None:
        if not text.strip():
            return
        try:
            line = parse_line(text)
            if line.at_s is not None and line.command != "prompt":
                self.agenda.append(line)
            else:
                self._obey(line)
        except UserError as error:
            self.face.note(f"streamgen: {error}")

    def _obey(self, line: Line) -> None:
        if line.command == "quit":
            self.quit = True
        elif line.command == "help":
            self.face.note(HELP)
        elif self.manner.obey(line):
            self.face.note(f"the next prompts take over by {self.manner.transition}")
        elif self.live is None and line.command == "prompt" and line.at_s is None:
            self._open(line.text)
        elif self.live is None:
            raise UserError("nothing plays yet: type a prompt first")
        elif line.command == "prompt":
            self._prompt(self.live, line)
        else:
            self._move(self.live, line)

    def _open(self, prompt: str) -> None:
        options = self.options
        request = StreamRequest(
            prompt=prompt,
            seed=options.seed,
            fps=self.playback.fps,
            steps=options.steps,
            cache=options.cache,
            lead_s=LEAD_S,
            max_seconds=self.max_seconds,
        )
        self.live = self.runtime.open(request, on_block=self.inbox.put, on_event=self.inbox.put)
        self.prompts[0] = prompt

    def _prompt(self, live: LiveStream, line: Line) -> None:
        receipt = live.prompt(
            line.text,
            self.manner.transition,
            apply_at="playhead",
            at_media_s=line.at_s,
            blend_blocks=self.manner.blend_blocks,
        )
        self.received = receipt.version
        self.prompts[receipt.version] = line.text
        self.face.note(f"prompt {receipt.version} received: {line.text}")

    def _move(self, live: LiveStream, line: Line) -> None:
        here_s = self.playback.position / self.playback.fps
        match line.command:
            case "pause":
                live.pause()
                self.playback.paused = True
            case "play":
                live.play()
                self.playback.paused = False
            case "steps":
                live.steps(None if line.number is None else int(line.number))
            case "seek" | "back":
                assert line.number is not None
                receipt = live.seek(line.number if line.command == "seek" else max(here_s - line.number, 0.0))
                self.playback.turn(live.epoch, round(receipt.media_s * self.playback.fps))
                self.face.note(f"from {receipt.media_s:.4g} s again")

    # What is due.

    def _show_due(self) -> None:
        while self.playback.position < self.last_frame and (frame := self.playback.take(time.monotonic())) is not None:
            self.on_screen = frame
            self.frames += 1
            self.shown_s.append(time.monotonic())
            self.unwritten.append(frame.frame_HWC)
            if len(self.unwritten) >= len(frame.block.frames):
                self._write()
            if self.live is not None and not self.ended:
                with suppress(UserError):  # it has ended, and the word of it is on its way
                    self.live.playhead(frame.number / self.playback.fps)
        here_s = self.playback.position / self.playback.fps
        for line in [line for line in self.agenda if line.at_s is not None and line.at_s <= here_s]:
            self.agenda.remove(line)
            try:
                self._obey(line)
            except UserError as error:
                self.face.note(f"streamgen: {error}")

    def _write(self) -> None:
        frames, self.unwritten = self.unwritten, []
        if self.sink is not None and frames:
            self.sink.write(np.stack(frames))

    def _standing(self) -> Standing:
        shown, now_s = self.on_screen, time.monotonic()
        rate = None
        if len(self.shown_s) > 1 and now_s - self.shown_s[-1] < 1:
            rate = (len(self.shown_s) - 1) / max(self.shown_s[-1] - self.shown_s[0], 1e-6)
        version = 0 if shown is None else shown.block.prompt_version
        return Standing(
            state="paused" if self.playback.paused else "playing" if shown is not None else "starting",
            media_s=self.playback.position / self.playback.fps,
            rate=rate,
            slack_s=None if shown is None else shown.block.slack_s,
            steps=None if shown is None else shown.block.steps,
            late=self.late,
            received=self.received,
            shown=version,
            prompt=self.prompts.get(version, ""),
        )

    def _block_s(self, block: int) -> float:
        geometry = self.runtime.pipe.geometry
        return geometry.block_pixel_start(block) / self.playback.fps
