"""`streamgen eval sprites`: does the video show what its prompt says? Held-out captions, judged from the pixels.

Clips of 5 s give the figures, longer streams the curve over time, streams with a change of prompt the switch. They are
made in batches, each row the same video as alone; the speed beside the quality is that of one stream made alone.
"""

from __future__ import annotations

import math
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from streamgen import __version__
from streamgen.batch import generate
from streamgen.errors import UserError
from streamgen.metrics.adherence import WINDOW_S, adherence, by_segment, nulls, switch_latency
from streamgen.pipeline import DTYPES, StreamPipeline
from streamgen.rollout import Cancelled
from streamgen.sheets import contact_sheet
from streamgen.worlds import sprites
from streamgen.worlds.sprites import ATTRIBUTES, Caption
from streamgen_infer.interrupts import INTERRUPTED, Interrupts, Stop
from streamgen_infer.live_view import warn
from streamgen_infer.report import StreamFigures, check_report, write_report
from streamgen_infer.sinks import check_place

SUITES = ("sprites",)
SEGMENT_S = 5.0
SWITCH_AT_S = 3.0
AFTER_SWITCH_S = 5.0
SHEET_CLIPS, SHEET_FRAMES = 24, 8
Clip = np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The command's arguments."""

    model: str
    n: int
    seed: int
    seconds: float
    long_n: int
    switches: int
    steps: int | None
    cache: str
    transition: str
    device: str
    dtype: str
    threads: int | None
    batch: int
    json: Path | None
    sheet: Path | None
    overwrite: bool


def run(suite: str, options: Options, interrupts: Interrupts) -> int:
    """The command; returns the exit code."""
    check(suite, options)
    started_s = time.perf_counter()
    pipe = StreamPipeline.from_pretrained(
        options.model, device=options.device, dtype=options.dtype, threads=options.threads
    )
    loaded_s = time.perf_counter() - started_s
    if pipe.geometry.height != pipe.geometry.width:
        raise UserError(
            f"the sprites world is square, {options.model} makes {pipe.geometry.width}x{pipe.geometry.height}"
        )
    with interrupts.deferred() as stop:
        evaluation = Evaluation(pipe, options, stop)
        try:
            evaluation.run()
        except Cancelled:
            print("streamgen: interrupted; these figures are of what was made so far", file=sys.stderr)
        if not evaluation.clips:
            return INTERRUPTED
        values = {
            "command": "eval",
            "suite": suite,
            "version": __version__,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "interrupted": stop.requested,
            "load_s": round(loaded_s, 4),
            **evaluation.report(),
            "model": options.model,
            "schedule": "serial",
            "cache": options.cache,
            "device": str(pipe.device),
            "dtype": next(name for name, dtype in DTYPES.items() if dtype == pipe.dtype),
            "threads": torch.get_num_threads(),
            "seed": options.seed,
        }
        _print(values)
        if options.json is not None:
            write_report(options.json, _without_nan(values))
        if options.sheet is not None:
            shown = evaluation.clips[:SHEET_CLIPS]
            marked_sheet(shown, evaluation.captions[: len(shown)]).save(options.sheet, "PNG")
    return INTERRUPTED if stop.requested else 0


def check(suite: str, options: Options) -> None:
    """UserError for everything that can be refused without the model."""
    if suite not in SUITES:
        raise UserError(f"no suite {suite!r}; there are: {', '.join(SUITES)}")
    most = len(sprites.captions("heldout"))
    for name, value, low, high in (
        ("--n", options.n, 2, most),
        ("--long-n", options.long_n, 1, most),
        ("--switches", options.switches, 0, most - 1),
        ("--seed", options.seed, 0, 2**32 - 1),
        ("--seconds", options.seconds, SEGMENT_S, 3600),
        ("--steps", options.steps, 1, 1000),
        ("--batch", options.batch, 1, 256),
    ):
        if value is not None and not low <= value <= high:
            raise UserError(f"{name} is {value}; it must be {low:g} to {high:g}")
    for path, option in ((options.json, "--json"), (options.sheet, "--sheet")):
        if path is not None:
            check_place(path, option)
    if options.json is not None:
        check_report(options.json, "--json", overwrite=options.overwrite)
    if options.sheet is not None and options.sheet.exists() and not options.overwrite:
        raise UserError(f"--sheet {options.sheet} exists; choose another name or add --overwrite")


class Evaluation:
    """One evaluation as it goes; `report` holds for what has been made so far."""

    def __init__(self, pipe: StreamPipeline, options: Options, stop: Stop) -> None:
        self.pipe, self.options, self._stop = pipe, options, stop
        self.geometry = pipe.geometry
        heldout = sprites.captions("heldout")
        self.captions = random.Random(options.seed).sample(heldout, options.n)
        self.clips: list[Clip] = []
        self.segments: dict[float, list[dict[str, float]]] = {}
        self.switched: list[tuple[Clip, Caption, float | None]] = []
        self.speed: dict[str, Any] = {}
        self._frames, self._generation_s = 0, 0.0
        self.steps = pipe.scheduler.trained_steps[0] if options.steps is None else options.steps
        if self.steps not in pipe.scheduler.trained_steps:
            warn(f"the model was trained for {pipe.scheduler.trained_steps} steps, not {self.steps}")

    def run(self) -> None:
        """Cancelled if a signal asks for a stop."""
        options, geometry = self.options, self.geometry
        self._time_one()
        clip_frames = round(SEGMENT_S * geometry.fps)
        with _Bar("clips", options.n) as bar:
            for rows in _slices(options.n, options.batch):
                made = self._generate(self.captions[rows], rows.start, SEGMENT_S)
                self.clips += list(made[:, :clip_frames])
                bar.advance(len(made))
        if options.seconds > SEGMENT_S:
            with _Bar("long streams (blocks)", geometry.blocks_for_seconds(options.seconds)) as bar:
                self._long(bar)
        if options.switches:
            with _Bar("switches", options.switches) as bar:
                for rows in _slices(options.switches, options.batch):
                    self._switch(rows)
                    bar.advance(rows.stop - rows.start)

    def report(self) -> dict[str, Any]:
        clips, captions, fps = self.clips, self.captions[: len(self.clips)], self.geometry.fps
        first = _merged([by_segment(c, caption, fps, SEGMENT_S)[0] for c, caption in zip(clips, captions, strict=True)])
        window = round(WINDOW_S * fps)
        segments = {0.0: [first]} if not self.segments else self.segments
        return {
            "frames": self._frames,
            "fps": self._frames / self._generation_s,
            "batch": self.options.batch,
            **self.speed,
            "steps": self.steps,
            "n": len(clips),
            "held_out": True,
            "adherence": {name: first[name] for name in (*ATTRIBUTES, "obeys")},
            "presence": first["presence"],
            "by_segment": [{"start_s": start_s, **_merged(rows)} for start_s, rows in sorted(segments.items())],
            "seconds": self.options.seconds,
            "switch": self._switch_report(),
            "nulls": nulls([clip[:window] for clip in clips], captions, fps) if len(clips) > 1 else None,
        }

    def _generate(
        self,
        captions: Sequence[Caption],
        first: int,
        seconds: float,
        switches: dict[int, list[str]] | None = None,
        on_frames: Callable[[Clip], None] | None = None,
    ) -> Clip:
        """Video of the captions, uint8 [B, T, H, W, 3], or its blocks one after the other to `on_frames`."""
        made: list[Clip] = []
        last_s = time.perf_counter()

        def on_block(block: int, frames: torch.Tensor) -> None:
            nonlocal last_s
            self._generation_s += time.perf_counter() - last_s
            self._frames += frames.shape[0] * frames.shape[1]
            (made.append if on_frames is None else on_frames)(frames.numpy())
            if self._stop.requested:
                raise Cancelled("evaluation")
            last_s = time.perf_counter()

        seeds = [self.options.seed * 1_000_003 + first + row for row in range(len(captions))]
        generate(
            self.pipe,
            [caption.text for caption in captions],
            seeds,
            self.geometry.blocks_for_seconds(seconds),
            steps=self.steps,
            cache=self.options.cache,
            switches=switches,
            transition=self.options.transition,
            on_block=on_block,
        )
        return np.concatenate(made, 1) if made else np.empty(0, np.uint8)

    def _long(self, bar: _Bar) -> None:
        """Streams of the first captions, judged segment by segment while they run."""
        captions, fps = self.captions[: self.options.long_n], self.geometry.fps
        size = round(SEGMENT_S * fps)
        waiting: list[Clip] = []
        done = 0

        def judge(frames: Clip) -> None:
            nonlocal waiting, done
            bar.advance(1)
            waiting.append(frames)
            have = sum(part.shape[1] for part in waiting)
            if have < size:
                return
            video = np.concatenate(waiting, 1)
            waiting = [video[:, size:]]
            rows = [by_segment(v[:size], c, fps, SEGMENT_S)[0] for v, c in zip(video, captions, strict=True)]
            self.segments[done * SEGMENT_S] = rows
            done += 1

        self._generate(captions, 0, self.options.seconds, on_frames=judge)

    def _switch(self, rows: slice) -> None:
        """Streams whose prompt becomes the next held-out caption of the draw."""
        geometry = self.geometry
        draw = random.Random(self.options.seed + 1).sample(sprites.captions("heldout"), self.options.switches + 1)
        block = geometry.block_at_seconds(SWITCH_AT_S)
        start = geometry.block_pixel_start(block)
        before, after = draw[rows], draw[rows.start + 1 : rows.stop + 1]
        switches = {block: [caption.text for caption in after]}
        video = self._generate(before, rows.start, start / geometry.fps + AFTER_SWITCH_S, switches)
        for frames, caption in zip(video, after, strict=True):
            self.switched.append((frames, caption, switch_latency(frames, caption, start, geometry.fps)))

    def _switch_report(self) -> dict[str, Any]:
        window = round(WINDOW_S * self.geometry.fps)
        latencies = [latency for _, _, latency in self.switched if latency is not None]
        ends = [frames[-window:] for frames, _, _ in self.switched]
        captions = [caption for _, caption, _ in self.switched]
        return {
            "obeys": adherence(ends, captions, self.geometry.fps)["obeys"] if ends else None,
            "median_latency_s": statistics.median(latencies) if latencies else None,
            "reached": len(latencies),
            "n": len(self.switched),
            "transition": self.options.transition,
        }

    def _time_one(self) -> None:
        """One stream alone, after one to warm up: the fields of a stream's report."""
        geometry, prompt = self.geometry, self.captions[0].text
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, in __init__
            next(self.pipe.stream(prompt, steps=self.steps, cache=self.options.cache))
            figures = StreamFigures(fps=geometry.fps, accepted_s=time.perf_counter())
            blocks = geometry.blocks_for_seconds(SEGMENT_S)
            stream = self.pipe.stream(prompt, steps=self.steps, cache=self.options.cache, max_blocks=blocks)
        started_s = time.perf_counter()
        for block in stream:
            ready_s = time.perf_counter()
            figures.block(len(block.frames), started_s, ready_s)
            started_s = time.perf_counter()
            if self._stop.requested:
                raise Cancelled("evaluation")
        wanted = ("ttff_s", "block_ms", "deadline_misses", "peak_rss_mb")
        self.speed = {name: value for name, value in figures.report().items() if name in wanted}
        self.speed["stream_fps"] = figures.frames_per_second


def _merged(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over streams; sizes that cannot be read count nowhere."""
    names = (*ATTRIBUTES, "obeys", "presence")
    known = {name: [row[name] for row in rows if not math.isnan(row[name])] for name in names}
    means = {name: statistics.fmean(values) if values else math.nan for name, values in known.items()}
    return {**means, "n": len(rows)}


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _without_nan(value: Any) -> Any:
    """JSON has no nan."""
    if isinstance(value, dict):
        return {name: _without_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


# What is shown.


class _Bar:
    """A progress bar on a terminal, two lines elsewhere."""

    def __init__(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._progress = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
        self._task = self._progress.add_task(what, total=total)
        self._what, self._total = what, total

    def __enter__(self) -> _Bar:
        if not sys.stderr.isatty():
            print(f"{self._what}: {self._total} ...", file=sys.stderr, flush=True)
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def advance(self, count: int) -> None:
        self._progress.advance(self._task, count)


def _print(values: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"{values['model']}, {values['n']} held-out captions, {values['steps']} steps"
    table = Table(title=title, box=box.SIMPLE)
    columns = (*ATTRIBUTES, "obeys", "presence")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")

    def row(name: str, shares: dict[str, float]) -> None:
        table.add_row(
            name, *("-" if math.isnan(v := shares[a]) else f"{100 * v:.1f}" for a in (*ATTRIBUTES, "obeys", "presence"))
        )

    row("first 5 s", {**values["adherence"], "presence": values["presence"]})
    segments = values["by_segment"]
    if len(segments) > 1:
        shown = sorted({round(i * (len(segments) - 1) / 7) for i in range(8)})
        for one in (segments[index] for index in shown):
            row(f"from {one['start_s']:g} s", one)
    console = Console(highlight=False)
    console.print(table)
    if values["nulls"] is not None:
        null = values["nulls"]
        console.print(
            f"worth nothing: obeys {100 * null['shuffled']:.1f} % against shuffled captions, "
            f"{100 * null['background_only']:.1f} % with backgrounds alone"
        )
    switch = values["switch"]
    if switch["n"]:
        latency = switch["median_latency_s"]
        after = "never reached" if latency is None else f"median latency {latency:.2f} s"
        console.print(f"after a switch ({switch['transition']}): obeys {100 * switch['obeys']:.1f} %, {after}")


def marked_sheet(clips: Sequence[Clip], captions: Sequence[Caption]) -> Image.Image:
    """Clips under their captions, with a mark: + obeys, - does not (its two windows of 2 s)."""
    marks = ["+" if by_segment(c, item)[0]["obeys"] > 0.5 else "-" for c, item in zip(clips, captions, strict=True)]
    texts = [f"{mark} {item.text}" for mark, item in zip(marks, captions, strict=True)]
    return Image.fromarray(contact_sheet(clips, texts, frames=SHEET_FRAMES, columns=2))
