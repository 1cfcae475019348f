"""`streamgen stream`: a prompt and its successors into a video, on one device, one block after the other.

`_Run.make` is the loop: block -> sink -> view.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from streamgen import __version__
from streamgen.errors import UserError
from streamgen_infer import machine
from streamgen_infer.encoders import Video
from streamgen_infer.errors import Failure
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.live_view import Status, View, open_view, warn
from streamgen_infer.preparing import told
from streamgen_infer.report import StreamFigures, write_report
from streamgen_infer.sinks import STDOUT, Sink
from streamgen_infer.stream_options import SCHEDULES, SPLITS, Options, Request, check

if TYPE_CHECKING:
    from streamgen.geometry import VideoGeometry
    from streamgen.parallel.job import Split
    from streamgen.parallel.piped import PipedBlock
    from streamgen.parallel.supervise import PipedStream
    from streamgen.pipeline import Block, Stream, StreamPipeline

ON_ONE_DEVICE = {"clean": "serial", "same_level": "stream_batch", "joint": "rolling"}
"""Visibility -> the schedule that one device runs it by."""
NAP_S = 0.02  # a signal waits no longer for the pacer


def run(options: Options, interrupts: Interrupts) -> int:
    """The command; returns the exit code."""
    request = check(options)
    view = open_view(options.quiet)
    try:
        return _stream(request, view, interrupts)
    finally:
        view.close()


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
    with told(view):
        pipe = StreamPipeline.from_pretrained(
            options.model,
            device=options.device,
            dtype=dtype,
            threads=options.threads,
            ops=options.ops,
            attention=options.attention,
            weights_dtype=options.weights_dtype or (saved or {}).get("weights_dtype"),
        )
    fps = options.fps or (saved or {}).get("geometry", {}).get("fps") or pipe.geometry.fps
    pipe.geometry = dataclasses.replace(pipe.geometry, fps=fps)
    for lora in request.loras:
        pipe.load_lora(lora.path, lora.strength)
    names = [None if lora is None else pipe.adapters.load(lora.path) for _, lora in request.loras_at]
    loaded_s = time.perf_counter()
    with _spoken_warnings(silent=True):
        first_prompt = options.prompt or (saved or {})["timeline"][0]["prompt"]
        next(pipe.stream(first_prompt, steps=options.steps, max_blocks=1))
    accepted_s = time.perf_counter()

    with _spoken_warnings():
        stream, tail, shown_s = _open_stream(pipe, request, saved)
        for (at_s, adapter), name in zip(request.loras_at, names, strict=True):
            one = cast("Stream", stream)  # `check` saw to it
            transition = "recache" if options.transition == "blend" else options.transition
            strengths = {} if adapter is None or name is None else {name: adapter.strength}
            block = max(one.geometry.block_at_seconds(shown_s + at_s), one.made_blocks)  # frames of it may be waiting
            one.use_loras(strengths, transition, at_block=block)
    sink = Sink(request.output, Video(height=pipe.geometry.height, width=pipe.geometry.width, fps=fps), options.scale)
    figures = StreamFigures(fps=fps, accepted_s=accepted_s)
    run = _Run(request, stream, tail, sink, figures, view)
    with interrupts.deferred(stream.cancel) as stop:
        path = None
        try:
            run.make(stop)
        finally:
            stream.close()
            path = sink.close()
        interrupted = stop.requested
        view.close()
        if options.save_state is not None and stream.made_blocks:  # of one rank, `check` saw to it
            _save_state(cast("Stream", stream), run.left_over, options.save_state)
        where = str(path or request.output.name)
        values = {
            "command": "stream",
            "version": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "frames": sink.frames,
            "seconds": sink.frames / fps,
            "out": where,
            "interrupted": interrupted,
            "load_s": round(accepted_s - load_started_s, 4),
            "ttff_cold_s": round(accepted_s - loaded_s, 4),
            **figures.report(),
            "process_start_to_first_frame_s": run.first_written_age_s,
            **_settings(request, stream),
        }
        if options.report is not None:
            write_report(options.report, values)
        if not options.quiet:
            print(summary(values), file=sys.stderr if request.output.suffix == STDOUT else sys.stdout, flush=True)
    if not interrupted:
        return 0
    kept = f"{sink.frames} frames are in {where}" if sink.frames else "there is no frame yet"
    print(f"streamgen: interrupted; {kept}", file=sys.stderr)
    return INTERRUPTED


def _settings(request: Request, stream: Stream | PipedStream) -> dict[str, Any]:
    """What the stream was made with."""
    import torch

    from streamgen.pipeline import DTYPES

    options, pipe = request.options, stream.pipe
    stored_as = None if options.ranks > 1 else cast("Stream", stream).state.cache.stored_as
    return {
        "model": options.model,
        "prompt": stream.timeline.prompts[0].prompt,
        "switches": [dataclasses.asdict(entry) for entry in stream.timeline.prompts[1:]],
        "image": None if options.image is None else str(options.image),
        "loras": {str(lora.path): lora.strength for lora in request.loras},
        "steps": stream.steps,
        "schedule": options.schedule or ON_ONE_DEVICE[stream.visibility],
        "visibility": stream.visibility,
        "cache": stream.cache_policy,
        "transition": options.transition,
        "media_fps": pipe.geometry.fps,
        "device": str(pipe.device),
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == pipe.dtype),
        "cache_dtype": stored_as or pipe.dtype_name,
        "weights_dtype": pipe.weights_dtype or pipe.dtype_name,
        "ops": pipe.transformer.ops.backend,
        "threads": torch.get_num_threads(),
        "seed": stream.seed,
        "ranks": options.ranks,
        "losses": [dataclasses.asdict(loss) for loss in getattr(stream, "losses", ())],
        "scale": options.scale,
        "realtime": options.realtime,
    }


def _open_stream(
    pipe: StreamPipeline, request: Request, saved: dict[str, Any] | None
) -> tuple[Stream | PipedStream, Any, float]:
    """The stream with its switches, the frames that a saved one had made and not shown, and the seconds shown."""
    from streamgen_infer.plan.card import choose_visibility

    options = request.options
    tail = None
    if saved is None:
        assert options.prompt is not None
        visibility = choose_visibility(
            options.schedule or SCHEDULES[0],
            pipe.scheduler.visibility,
            model=options.model,
            wanted="same_level" if options.ranks > 1 else None,
            force=options.force,
        )
        stream: Stream | PipedStream
        if options.ranks > 1:
            stream = _over_ranks(pipe, request)
        else:
            stream = pipe.stream(
                options.prompt,
                seed=options.seed or 0,
                steps=options.steps,
                cache=options.cache,
                visibility=visibility,
                cache_dtype=options.cache_dtype,
                image=options.image,
            )
        geometry, shown_s = _geometry(stream), 0.0
    else:
        stream = pipe.resume(saved)
        able = _schedules_of(stream)
        if options.schedule not in (None, *able):
            raise UserError(
                f"--schedule {options.schedule}: the saved stream has visibility {stream.visibility}, which is run by: "
                + ", ".join(able)
            )
        for name, given, kept in (
            ("--seed", options.seed, stream.seed),
            ("--steps", options.steps, stream.steps),
            ("--cache", options.cache, stream.cache_policy),
            ("--cache-dtype", options.cache_dtype, stream.state.cache.stored_as or "the model's own dtype"),
        ):
            if given is not None and given != kept:
                raise UserError(f"{name} {given}: the saved stream goes on with {kept}; leave the option out")
        _check_loras(stream, request)
        if "tail" in saved:
            tail = saved["tail"].numpy()
        waiting, geometry = 0 if tail is None else len(tail), _geometry(stream)
        shown_s = (geometry.block_pixel_start(stream.made_blocks) - waiting) / geometry.fps
        if options.prompt is not None:
            stream.prompt(options.prompt, options.transition)
    if math.isfinite(request.seconds):
        end_s = shown_s + whole_frames(request.seconds, geometry.fps) / geometry.fps
        stream.max_blocks = max(geometry.blocks_for_seconds(end_s), stream.made_blocks)
    before = None
    for at_s, prompt in request.switches:
        receipt = stream.prompt(prompt, options.transition, at_seconds=shown_s + at_s)
        if before is not None and before.block == receipt.block:
            warn(f"two prompts fall on the block at {receipt.seconds - shown_s:g} s; the later one is shown: {prompt}")
        before = receipt
    return stream, tail, shown_s


def _check_loras(stream: Stream, request: Request) -> None:
    """A saved stream goes on with the adapters that it had; --lora gives it their files."""
    given = {lora.path.stem: lora.strength for lora in request.loras if lora.strength}
    kept = {name: strength for name, strength in stream.loras.items() if strength}
    if given != kept:
        listed = " ".join(f"--lora {name}.safetensors={strength:g}" for name, strength in kept.items())
        raise UserError(
            f"the saved stream goes on with {listed or 'no --lora'}; give that (=0 for files of later on), and change "
            "it with --lora-at 0=FILE"
        )


def _geometry(stream: Stream | PipedStream) -> VideoGeometry:
    """A stream that begins with an image has its own."""
    geometry: VideoGeometry = getattr(stream, "geometry", stream.pipe.geometry)
    return geometry


def _over_ranks(pipe: StreamPipeline, request: Request) -> PipedStream:
    """The stream in processes of its own; they start with its first block."""
    import torch

    from streamgen.parallel.job import Job
    from streamgen.parallel.supervise import PipedStream

    options = request.options
    assert options.prompt is not None and options.schedule in SPLITS  # `check` saw to it
    if "same_level" not in pipe.scheduler.visibility:
        warn(f"the model was trained for visibility {', '.join(pipe.scheduler.visibility)}, not same_level")
    job = Job(
        model=options.model,
        split=cast("Split", options.schedule),
        ranks=options.ranks,
        steps=options.steps or pipe.scheduler.trained_steps[0],
        seed=options.seed or 0,
        cache=options.cache,
        dtype=pipe.dtype_name,
        devices=(options.device,) if options.device != "cuda" else tuple(f"cuda:{i}" for i in range(options.ranks)),
        threads=max(1, torch.get_num_threads() // options.ranks) if options.threads is None else options.threads,
        force=options.force,
    )
    return PipedStream(pipe, options.prompt, job)


def _schedules_of(stream: Stream | PipedStream) -> list[str]:
    """The schedules that make this stream's video."""
    from streamgen.schedules import schedule

    return [name for name in SCHEDULES if stream.visibility in schedule(name).visibilities]


def whole_frames(seconds: float, fps: float) -> int:
    return max(1, round(seconds * fps))


class _Run:
    """The loop of one stream."""

    def __init__(
        self, request: Request, stream: Stream | PipedStream, tail: Any, sink: Sink, figures: StreamFigures, view: View
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
            block = cast("Block | PipedBlock | None", next(self.stream, None))
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
        geometry, position = _geometry(self.stream), self.stream.made_blocks
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
            cache=self.stream.cache_fill(),
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
    try:
        save_tree(state, path, STATE_MARK)
    except UserError as error:  # what the user could have done better was said before the stream began
        raise Failure(str(error)) from error


@contextmanager
def _spoken_warnings(silent: bool = False) -> Iterator[None]:
    """Warnings of the library as lines of ours."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for line in dict.fromkeys(str(warning.message) for warning in caught):
        if not silent:
            warn(line)


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
