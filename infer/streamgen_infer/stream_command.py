"""`streamgen stream`: a prompt and its successors into a video, on one device, one block after the other.

All that can be known without the model is checked before it is loaded. `make` is the loop: block -> sink -> view.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import machine
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.live_view import Status, View, one_line, open_view, warn
from streamgen_infer.report import StreamFigures, check_report, write_report
from streamgen_infer.sinks import STDOUT, Output, Sink, Video, check_output, check_place

if TYPE_CHECKING:
    from streamgen.pipeline import Stream, StreamPipeline

SCHEDULES = ("serial",)
CACHES = ("relative", "window")
TRANSITIONS = ("cut", "recache", "blend", "scene")
DTYPES = ("auto", "fp32", "bf16")
MAX_SECONDS = 1e7
MAX_FPS = 240
MAX_STEPS = 1000
MAX_SCALE = 32
NAP_S = 0.02  # a signal waits no longer for the pacer


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments, as typed."""

    prompt: str | None = None
    switch: tuple[str, ...] = ()
    seconds: str = "8"
    seed: int | None = None
    out: str | None = None
    model: str = "sprites"
    steps: int | None = None
    schedule: str = "serial"
    cache: str | None = None
    transition: str = "recache"
    fps: float | None = None
    device: str = "cpu"
    dtype: str = "auto"
    threads: int | None = None
    scale: int = 1
    realtime: bool = False
    report: Path | None = None
    save_state: Path | None = None
    resume: Path | None = None
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Options that make sense."""

    options: Options
    seconds: float
    """May be inf."""
    switches: tuple[tuple[float, str], ...]
    output: Output


def run(options: Options, interrupts: Interrupts) -> int:
    """The command; returns the exit code."""
    request = check(options)
    view = open_view(options.quiet)
    try:
        return _stream(request, view, interrupts)
    finally:
        view.close()


# Before the model is loaded.


def check(options: Options) -> Request:
    """UserError for everything that can be refused without the model."""
    if options.prompt is None and options.resume is None:
        raise UserError("name a prompt: streamgen stream 'a red star spinning over a snow background'")
    if options.prompt is not None and not options.prompt.strip():
        raise UserError("the prompt is empty; describe a scene, e.g. 'a red star spinning over a snow background'")
    seconds = parse_seconds(options.seconds)
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
        ("--schedule", options.schedule, SCHEDULES),
        ("--cache", options.cache, CACHES),
        ("--transition", options.transition, TRANSITIONS),
        ("--dtype", options.dtype, DTYPES),
    ):
        if choice is not None and choice not in known:
            raise UserError(f"{name} {choice!r} does not exist; there are: {', '.join(known)}")
    check_device(options.device)
    switches = parse_switches(options.switch, seconds)
    output = check_output(options.out, fps=options.fps, overwrite=options.overwrite)
    _check_files(options, output)
    return Request(options=options, seconds=seconds, switches=switches, output=output)


def parse_seconds(text: str) -> float:
    """Seconds of video, or inf."""
    try:
        seconds = float(text)
    except ValueError:
        raise UserError(f"--seconds {text!r} is no number; give seconds of video, or inf") from None
    if math.isnan(seconds) or seconds <= 0:
        raise UserError(f"--seconds is {text}; it must be above 0")
    if MAX_SECONDS < seconds < math.inf:
        raise UserError(f"--seconds is {text}; at most {MAX_SECONDS:.0f} (116 days), or inf to run until Ctrl-C")
    return seconds


def parse_switches(items: tuple[str, ...], seconds: float) -> tuple[tuple[float, str], ...]:
    """"SECONDS=PROMPT", in the order of their time -> ((seconds, prompt), ...)."""
    found: list[tuple[float, str]] = []
    for item in items:
        when, equals, prompt = item.partition("=")
        try:
            at_s = float(when) if equals else math.nan
        except ValueError:
            at_s = math.nan
        if not math.isfinite(at_s):
            raise UserError(f"--switch {one_line(item, 60)!r} is not SECONDS=PROMPT, e.g. '5=a blue ring rising'")
        if not prompt.strip():
            raise UserError(f"--switch {item!r}: the prompt after = is empty")
        if at_s <= 0:
            raise UserError(f"--switch at {when} s: it must be after 0 s, where PROMPT holds")
        if at_s >= seconds:
            raise UserError(f"--switch at {when} s is past the end of the video at {seconds:g} s")
        if found and at_s <= found[-1][0]:
            raise UserError(f"--switch at {when} s comes after the one at {found[-1][0]:g} s: give them in order of time")
        found.append((at_s, prompt))
    return tuple(found)


def check_device(device: str) -> None:
    if not re.fullmatch(r"cpu|mps|cuda(:\d{1,3})?", device):
        raise UserError(f"--device {device!r} does not exist; there are: cpu, cuda, cuda:N, mps")


def _check_files(options: Options, output: Output) -> None:
    """The other files can be written, none of the user's is replaced unasked, and no two are the same."""
    if options.resume is not None and not options.resume.is_file():
        raise UserError(f"--resume {options.resume}: there is no such file")
    if options.report is not None:
        check_place(options.report, "--report")
        check_report(options.report, "--report", overwrite=options.overwrite)
    if options.save_state is not None:
        check_place(options.save_state, "--save-state")
        continues = options.resume is not None and options.resume.resolve() == options.save_state.resolve()
        if options.save_state.is_dir():
            raise UserError(f"--save-state {options.save_state} is a folder; give a file")
        if options.save_state.exists() and not continues and not options.overwrite:
            raise UserError(f"--save-state {options.save_state} exists; choose another name or add --overwrite")
    written = [p.resolve() for p in (output.path, options.report, options.save_state) if p is not None]
    if len(set(written)) < len(written):
        raise UserError("--out, --report and --save-state must be different files")


# The model and the stream.


def _stream(request: Request, view: View, interrupts: Interrupts) -> int:
    options = request.options
    load_started_s = time.perf_counter()
    if not options.quiet:
        view.note(f"loading {options.model} ...")
    from streamgen.pipeline import STATE_MARK, StreamPipeline
    from streamgen.weights import load_tree

    saved = None if options.resume is None else load_tree(options.resume, STATE_MARK)
    dtype = saved.get("dtype", "auto") if saved is not None and options.dtype == "auto" else options.dtype
    pipe = StreamPipeline.from_pretrained(options.model, device=options.device, dtype=dtype, threads=options.threads)
    fps = options.fps or (saved or {}).get("geometry", {}).get("fps") or pipe.geometry.fps
    pipe.geometry = dataclasses.replace(pipe.geometry, fps=fps)
    loaded_s = time.perf_counter()
    with _spoken_warnings(silent=True):
        first_prompt = options.prompt or (saved or {})["timeline"][0]["prompt"]
        next(pipe.stream(first_prompt, steps=options.steps, max_blocks=1))
    accepted_s = time.perf_counter()

    with _spoken_warnings():
        stream, tail = _open_stream(pipe, request, saved)
    sink = Sink(request.output, Video(height=pipe.geometry.height, width=pipe.geometry.width, fps=fps), options.scale)
    figures = StreamFigures(fps=fps, accepted_s=accepted_s)
    run = _Run(request, stream, tail, sink, figures, view)
    path = None
    with interrupts.deferred(stream.cancel) as stop:
        try:
            run.make(stop)
        finally:
            path = sink.close()
        if options.save_state is not None and stream.state.position:
            _save_state(stream, run.left_over, options.save_state)
    interrupted = stop.requested
    view.close()
    values = {
        "command": "stream",
        "version": __version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "frames": sink.frames,
        "seconds": sink.frames / fps,
        "out": str(path or request.output.name),
        "interrupted": interrupted,
        "load_s": round(accepted_s - load_started_s, 4),
        "ttff_cold_s": round(accepted_s - loaded_s, 4),
        **figures.report(),
        "process_start_to_first_frame_s": run.first_written_age_s,
        "model": options.model,
        "prompt": stream.timeline.prompts[0].prompt,
        "switches": [dataclasses.asdict(entry) for entry in stream.timeline.prompts[1:]],
        "steps": stream.steps,
        "schedule": options.schedule,
        "cache": stream.state.cache.spec.policy,
        "transition": options.transition,
        "media_fps": fps,
        "device": str(pipe.device),
        "dtype": next(name for name, dtype in _dtypes().items() if dtype == pipe.dtype),
        "threads": _threads(),
        "seed": stream.state.seeds[0],
        "scale": options.scale,
        "realtime": options.realtime,
    }
    if options.report is not None:
        write_report(options.report, values)
    if not options.quiet:
        print(summary(values), file=sys.stderr if request.output.suffix == STDOUT else sys.stdout, flush=True)
    if interrupted:
        kept = f"{sink.frames} frames are kept in {path or request.output.name}" if sink.frames else "there is no frame yet"
        print(f"streamgen: interrupted; {kept}", file=sys.stderr)
    return INTERRUPTED if interrupted else 0


def _open_stream(pipe: StreamPipeline, request: Request, saved: dict[str, Any] | None) -> tuple[Stream, Any]:
    """The stream with its switches, and the frames that a saved one had made and not shown."""
    options, geometry = request.options, pipe.geometry
    tail = None
    if saved is None:
        assert options.prompt is not None
        stream = pipe.stream(options.prompt, seed=options.seed or 0, steps=options.steps, cache=options.cache or "relative")
        shown_s = 0.0
    else:
        stream = pipe.resume(saved)
        for name, given, kept in (
            ("--seed", options.seed, stream.state.seeds[0]),
            ("--steps", options.steps, stream.steps),
            ("--cache", options.cache, stream.state.cache.spec.policy),
        ):
            if given is not None and given != kept:
                raise UserError(f"{name} {given}: the saved stream goes on with {kept}; leave the option out")
        if "tail" in saved:
            tail = saved["tail"].numpy()
        waiting = 0 if tail is None else len(tail)
        shown_s = (geometry.block_pixel_start(stream.state.position) - waiting) / geometry.fps
        if options.prompt is not None:
            stream.prompt(options.prompt, options.transition)
    if math.isfinite(request.seconds):
        end_s = shown_s + whole_frames(request.seconds, geometry.fps) / geometry.fps
        stream.max_blocks = max(geometry.blocks_for_seconds(end_s), stream.state.position)
    before = None
    for at_s, prompt in request.switches:
        receipt = stream.prompt(prompt, options.transition, at_seconds=shown_s + at_s)
        if before is not None and before.block == receipt.block:
            warn(f"two prompts fall on the block at {receipt.seconds - shown_s:g} s; the later one is shown: {prompt}")
        before = receipt
    return stream, tail


def whole_frames(seconds: float, fps: float) -> int:
    return max(1, round(seconds * fps))


class _Run:
    """The loop of one stream."""

    def __init__(
        self, request: Request, stream: Stream, tail: Any, sink: Sink, figures: StreamFigures, view: View
    ) -> None:
        self.request, self.stream, self.tail = request, stream, tail
        self.sink, self.figures, self.view = sink, figures, view
        self.first_written_age_s: float | None = None
        self.left_over: Any = None
        """Frames of the last block beyond the seconds asked for."""

    def make(self, stop: Stop) -> None:
        seconds, fps = self.request.seconds, self.figures.fps
        wanted = math.inf if math.isinf(seconds) else whole_frames(seconds, fps)
        if self.tail is not None:
            self._write(self.tail, wanted)
        while not stop.requested and self.sink.frames < wanted:
            if self.request.options.realtime:
                self._pace(stop)
            started_s = time.perf_counter()
            block = next(self.stream, None)
            if block is None:
                break
            ready_s = time.perf_counter()
            self.figures.block(len(block.frames), started_s, ready_s)
            before = self.sink.frames
            self._write(block.frames, wanted)
            self.figures.write_s += time.perf_counter() - ready_s
            if self.first_written_age_s is None:
                self.first_written_age_s = machine.process_age_s()
            self.view.update(self._status(block.prompt, before, 1000 * (ready_s - started_s)))

    def _write(self, frames: Any, wanted: float) -> None:
        room = len(frames) if math.isinf(wanted) else int(min(len(frames), wanted - self.sink.frames))
        self.sink.write(frames[:room])
        self.left_over = frames[room:] if room < len(frames) else None

    def _pace(self, stop: Stop) -> None:
        """Keep one block ahead of the media clock and no more."""
        if self.figures.first_ready_s is None:
            return
        geometry, position = self.stream.pipe.geometry, self.stream.state.position
        begin_s = self.figures.deadline_s() - geometry.block_pixel_frames(position) / geometry.fps
        while not stop.requested and (wait_s := begin_s - time.perf_counter()) > 0:
            time.sleep(min(wait_s, NAP_S))

    def _status(self, prompt: str, start_frames: int, block_ms: float) -> Status:
        return Status(
            frames=self.sink.frames,
            media_s=self.sink.frames / self.figures.fps,
            block_start_s=start_frames / self.figures.fps,
            total_s=self.request.seconds,
            fps=self.figures.frames_per_second,
            slack_s=self.figures.slack_s(time.perf_counter()),
            prompt=prompt,
            cache=self.stream.state.cache.fill(),
            block_ms=block_ms,
            misses=self.figures.deadline_misses,
        )


def _save_state(stream: Stream, left_over: Any, path: Path) -> None:
    """The stream, and with it the frames that it has made and nobody has seen."""
    import torch

    from streamgen.pipeline import STATE_MARK
    from streamgen.weights import save_tree

    state = stream.state_dict()
    if left_over is not None:
        state["tail"] = torch.from_numpy(left_over.copy())
    save_tree(state, path, STATE_MARK)


@contextmanager
def _spoken_warnings(silent: bool = False) -> Iterator[None]:
    """Warnings of the library as lines of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        if not silent:
            warn(line)


def _dtypes() -> dict[str, Any]:
    from streamgen.pipeline import DTYPES as known

    return known


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def summary(values: dict[str, Any]) -> str:
    """What the command says at its end."""
    lines = [f"{values['out']}: {values['frames']} frames, {values['seconds']:.4g} s at {values['media_fps']:g} fps"]
    if values["fps"] is not None:
        times = values["fps"] / values["media_fps"]
        late = f"{values['deadline_misses']} of {values['blocks']} blocks missed their deadline"
        lines.append(f"{values['fps']:.1f} frames per second, {times:.1f}x real time (codec included); {late}")
    if values["ttff_s"] is not None:
        since = values["process_start_to_first_frame_s"]
        started = "" if since is None else f", in the file {since:.2f} s after the program started"
        lines.append(f"first frame {values['ttff_s']:.3f} s after the request{started}")
    return "\n".join(lines)
