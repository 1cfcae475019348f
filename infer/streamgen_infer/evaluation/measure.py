"""Makes the videos of an evaluation and judges them while they are made; only readings and features are kept.

For every seed: rendered clips of the captions (what the figures are compared with, and what the codec is measured on);
then for every number of steps clips of 5 s, longer streams, and streams with a change of prompt. They are made in
batches, each row the same video as alone; the speed beside the quality is that of one stream made alone.
"""

from __future__ import annotations

import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from streamgen.batch import generate
from streamgen.codec import load_codec
from streamgen.metrics import adherence, motion, reconstruction, stream
from streamgen.metrics.adherence import SEGMENT_S, WINDOW_S, Row, SegmentJudge
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import Cancelled
from streamgen.worlds import checker, sprites
from streamgen.worlds.sprites import Caption
from streamgen_infer.evaluation.options import Options
from streamgen_infer.evaluation.show import Bar, steps_text
from streamgen_infer.interrupts import Stop
from streamgen_infer.live_view import warn
from streamgen_infer.report import StreamFigures

SWITCH_AT_S = 3.0
AFTER_SWITCH_S = 5.0
SHEET_CLIPS = 24
FIXED_CAPTIONS = 12
SHOWN_SWITCHES, SHOWN_BEFORE_S, SHOWN_AFTER_S = 6, 1.0, 3.0
Clip = np.ndarray


@dataclass(frozen=True, slots=True)
class Switched:
    """One stream with a change of prompt."""

    row: Row
    """Of its last 2 s, against the new caption."""
    latency_s: float | None
    """`adherence.switch_latency`."""


@dataclass(slots=True)
class Measured:
    """What one seed and one number of steps gave; holds for what has been made so far."""

    seed: int
    steps: int
    captions: list[Caption] = field(default_factory=list)
    readings: list[list[checker.Reading]] = field(default_factory=list)
    """Per clip, the windows of its 5 s."""
    features: list[Tensor] = field(default_factory=list)
    """Per clip, [T, D]."""
    motions: list[motion.Motion] = field(default_factory=list)
    long: SegmentJudge | None = None
    switched: dict[str, list[Switched]] = field(default_factory=dict)
    """By transition."""

    def add_clip(self, frames: Clip, caption: Caption, features: Tensor, fps: float) -> None:
        """One clip of SEGMENT_S."""
        self.captions.append(caption)
        self.readings.append(adherence.segment_readings(frames, fps)[0][1])
        self.features.append(features)
        self.motions.append(motion.motion_of(frames, fps))

    @property
    def rows(self) -> list[Row]:
        return [adherence.row_of(one, c) for one, c in zip(self.readings, self.captions, strict=True)]


@dataclass(slots=True)
class Rendered:
    """Real video of one seed's captions: what the figures of generated video are compared with."""

    real: Measured
    again: list[Tensor] = field(default_factory=list)
    """Features of a second rendering, other places and speeds: what perfect video would score."""
    decoded: Measured = field(default_factory=lambda: Measured(0, 0))
    """The first rendering, encoded and decoded by the model's codec in fp32."""
    squared_errors: list[float] = field(default_factory=list)
    """Mean squared error of the codec, per clip."""


@dataclass(slots=True)
class Speed:
    """Frames made in batches in so many seconds, and the report's fields of one stream alone."""

    frames: int = 0
    seconds: float = 0.0
    alone: dict[str, Any] = field(default_factory=dict)


class Evaluation:
    """One evaluation as it goes."""

    def __init__(self, pipe: StreamPipeline, options: Options, stop: Stop) -> None:
        self.pipe, self.options, self._stop = pipe, options, stop
        self.geometry = pipe.geometry
        self.heldout = sprites.captions("heldout", options.part)
        trained = pipe.scheduler.trained_steps
        self.steps = options.steps or trained[:1]
        for steps in self.steps:
            if steps not in trained:
                warn(f"the model was trained for {trained} steps, not {steps}")
        self.features = stream.FEATURES[stream.DEFAULT_FEATURES]
        self.measured: list[Measured] = []
        self.rendered: list[Rendered] = []
        self.speed = {steps: Speed() for steps in self.steps}
        self.sheet: list[tuple[Clip, Caption]] = []
        """The first clips."""
        self.fixed: dict[int, Clip] = {}
        """Steps -> clips of the captions of `fixed_captions`, for the pictures."""
        self.shown_switches: dict[str, list[tuple[Clip, Caption, Caption]]] = {}
        """Transition -> frames around the switch, the caption before and after, for the pictures."""

    def run(self) -> None:
        """Cancelled if a signal asks for a stop."""
        for steps in self.steps:
            self._time_one(steps)
        for seed in self.options.seeds:
            captions = random.Random(seed).sample(self.heldout, self.options.n)
            self._render(seed, captions)
            for steps in self.steps:
                self._measure(Measured(seed, steps), captions)
        if self.options.pictures is not None:
            self._fixed()

    def _measure(self, to: Measured, captions: Sequence[Caption]) -> None:
        options, geometry = self.options, self.geometry
        self.measured.append(to)
        size = round(SEGMENT_S * geometry.fps)
        many = f", seed {to.seed}, {steps_text(to.steps)}" if len(options.seeds) * len(self.steps) > 1 else ""
        with Bar(f"clips{many}", options.n) as bar:
            for rows in _slices(options.n, options.batch):
                made = self._generate(to, captions[rows], rows.start, SEGMENT_S)[:, :size]
                for clip, caption, features in zip(made, captions[rows], self.features(made), strict=True):
                    to.add_clip(clip, caption, features, geometry.fps)
                    if options.sheet is not None and to is self.measured[0] and len(self.sheet) < SHEET_CLIPS:
                        self.sheet.append((clip, caption))
                bar.advance(len(made))
        if options.seconds > SEGMENT_S:
            with Bar(f"long streams (blocks){many}", geometry.blocks_for_seconds(options.seconds)) as bar:
                self._long(to, captions[: options.long_n], bar)
        for transition in options.transitions if options.switches else ():
            with Bar(f"switches ({transition}){many}", options.switches) as bar:
                for rows in _slices(options.switches, options.batch):
                    self._switch(to, rows, transition)
                    bar.advance(rows.stop - rows.start)

    def _generate(
        self,
        to: Measured,
        captions: Sequence[Caption],
        first: int,
        seconds: float,
        *,
        switches: dict[int, list[str]] | None = None,
        transition: str = "recache",
        on_frames: Callable[[Clip], None] | None = None,
    ) -> Clip:
        """Video of the captions, uint8 [B, T, H, W, 3], or its blocks one after the other to `on_frames`."""
        made: list[Clip] = []
        speed = self.speed[to.steps]
        last_s = time.perf_counter()

        def on_block(block: int, frames: Tensor) -> None:
            nonlocal last_s
            speed.seconds += time.perf_counter() - last_s
            speed.frames += frames.shape[0] * frames.shape[1]
            (made.append if on_frames is None else on_frames)(frames.numpy())
            self._check_stop()
            last_s = time.perf_counter()

        seeds = [to.seed * 1_000_003 + first + row for row in range(len(captions))]
        generate(
            self.pipe,
            [caption.text for caption in captions],
            seeds,
            self.geometry.blocks_for_seconds(seconds),
            steps=to.steps,
            cache=self.options.cache,
            cache_dtype=self.options.cache_dtype,
            switches=switches,
            transition=transition,
            on_block=on_block,
        )
        return np.concatenate(made, 1) if made else np.empty(0, np.uint8)

    def _long(self, to: Measured, captions: Sequence[Caption], bar: Bar) -> None:
        """Streams of the first captions, judged segment by segment while they run."""
        judge = to.long = SegmentJudge(captions, self.geometry.fps)

        def on_frames(frames: Clip) -> None:
            bar.advance(1)
            judge.add(frames)

        self._generate(to, captions, 0, self.options.seconds, on_frames=on_frames)

    def _switch(self, to: Measured, rows: slice, transition: str) -> None:
        """Streams whose prompt becomes the next held-out caption of the draw."""
        geometry, fps = self.geometry, self.geometry.fps
        draw = random.Random(to.seed + 1).sample(self.heldout, self.options.switches + 1)
        block = geometry.block_at_seconds(SWITCH_AT_S)
        start = geometry.block_pixel_start(block)
        before, after = draw[rows], draw[rows.start + 1 : rows.stop + 1]
        switches = {block: [caption.text for caption in after]}
        seconds = start / fps + AFTER_SWITCH_S
        video = self._generate(to, before, rows.start, seconds, switches=switches, transition=transition)
        shown = self.shown_switches.setdefault(transition, [])
        for frames, old, new in zip(video, before, after, strict=True):
            row = adherence.row_of([checker.check(frames[-round(WINDOW_S * fps) :], fps)], new)
            latency_s = adherence.switch_latency(frames, new, start, fps)
            to.switched.setdefault(transition, []).append(Switched(row, latency_s))
            if to is self.measured[0] and len(shown) < SHOWN_SWITCHES:
                shown.append(
                    (frames[start - round(SHOWN_BEFORE_S * fps) : start + round(SHOWN_AFTER_S * fps)], old, new)
                )

    def _render(self, seed: int, captions: Sequence[Caption]) -> None:
        """The captions as the world shows them, twice, and as the codec leaves them."""
        assert self.pipe.folder is not None, "an evaluated pipeline comes from a folder"
        codec = load_codec(self.pipe.folder).eval().to(self.pipe.device)
        geometry, fps = self.geometry, self.geometry.fps
        frames = geometry.block_pixel_start(geometry.blocks_for_seconds(SEGMENT_S))  # whole latent frames
        size = round(SEGMENT_S * fps)
        to = Rendered(Measured(seed, 0))
        rngs = [torch.Generator().manual_seed(2 * seed + k) for k in range(2)]
        with Bar("rendered clips", len(captions)) as bar:
            for rows in _slices(len(captions), self.options.batch):
                items = captions[rows]
                video, other = (
                    sprites.render(sprites.sample_scenes(items, rng), frames, fps=fps, side=geometry.height)
                    for rng in rngs
                )
                for one, item in zip(video.to(self.pipe.device), items, strict=True):
                    decoded, error = reconstruction.reconstruct(codec, one[None])
                    to.squared_errors.append(error)
                    shown = sprites.to_uint8(decoded[0]).cpu().numpy()
                    to.decoded.captions.append(item)
                    to.decoded.readings.append(adherence.segment_readings(shown[:size], fps)[0][1])
                clips, others = (sprites.to_uint8(v[:, :size]).numpy() for v in (video, other))
                for clip, item, features in zip(clips, items, self.features(clips), strict=True):
                    to.real.add_clip(clip, item, features, fps)
                to.again += list(self.features(others))
                bar.advance(len(items))
                self._check_stop()
        self.rendered.append(to)

    def _fixed(self) -> None:
        """Clips of captions that are the same in every evaluation of this part of the world."""
        captions = fixed_captions(self.heldout)
        with Bar("clips of fixed captions", len(captions) * len(self.steps)) as bar:
            for steps in self.steps:
                self.fixed[steps] = self._generate(Measured(0, steps), captions, 0, SEGMENT_S)
                bar.advance(len(captions))

    def _time_one(self, steps: int) -> None:
        """One stream alone, after one to warm up: the fields of a stream's report."""
        geometry, prompt = self.geometry, self.heldout[0].text
        options = self.options
        stream = partial(self.pipe.stream, prompt, steps=steps, cache=options.cache, cache_dtype=options.cache_dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # said once, in __init__
            next(stream())
            figures = StreamFigures(fps=geometry.fps, accepted_s=time.perf_counter())
            blocks = geometry.blocks_for_seconds(SEGMENT_S)
            alone = stream(max_blocks=blocks)
        started_s = time.perf_counter()
        for block in alone:
            ready_s = time.perf_counter()
            figures.block(len(block.frames), started_s, ready_s)
            started_s = time.perf_counter()
            self._check_stop()
        wanted = ("ttff_s", "block_ms", "deadline_misses", "peak_rss_mb")
        found = {name: value for name, value in figures.report().items() if name in wanted}
        self.speed[steps].alone = {**found, "stream_fps": figures.frames_per_second}

    def _check_stop(self) -> None:
        if self._stop.requested:
            raise Cancelled("evaluation")


def fixed_captions(heldout: Sequence[Caption]) -> list[Caption]:
    """The captions of the picture that shows the same of every model (a training run's sample sheets show them too)."""
    order = torch.randperm(len(heldout), generator=torch.Generator().manual_seed(4))
    return [heldout[i] for i in order[:FIXED_CAPTIONS]]


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))
