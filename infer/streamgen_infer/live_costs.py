"""What streams of one model cost, before one is promised: their bytes and shapes, and a warm-up that measures time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from streamgen.pipeline import StreamPipeline
from streamgen.stream import Stream
from streamgen_infer.admission import Load
from streamgen_infer.cost_model import CostModel
from streamgen_infer.engine import Engine, Work
from streamgen_infer.live_stream import LiveStream
from streamgen_infer.machine import memory_mb
from streamgen_infer.requests import StreamRequest

WARM_UP_ROWS = (1, 2, 4)
UNKNOWN_MEMORY_BYTES = 4 << 30
"""Taken for streams where the system does not say what is free."""


@dataclass(slots=True)
class StreamCosts:
    """Sizes of the streams of one model."""

    pipe: StreamPipeline
    checkpoint_bytes: int
    """Per stream, for turning back."""
    codec_bytes: int = 0
    """Of one stream's codec state, as the warm-up found it."""

    def shape(self, block: int) -> str:
        """What cells must have in common to share a launch."""
        return f"{self.pipe.geometry.block_size(block)} latent frames"

    def dense(self, request: StreamRequest) -> int:
        """Blocks that a change at the playhead may turn back over: the lead, and the ones at its ends."""
        period_s = self.pipe.geometry.block_pixel_frames(1) / (request.fps or self.pipe.geometry.fps)
        return int(request.lead_s / period_s) + 3

    def load(self, request: StreamRequest, stream: Stream, live: LiveStream | None = None) -> Load:
        """A stream as admission sees it: one that wants to run, or one that does (`live`)."""
        geometry, fps = self.pipe.geometry, request.fps or self.pipe.geometry.fps
        frame_bytes = 3 * geometry.height * geometry.width
        cache = stream.state.cache
        recent_bytes = 4 * cache.fill()[1] * geometry.latent_channels * geometry.latent_height * geometry.latent_width
        snapshot_bytes = cache.nbytes() + recent_bytes + self.codec_bytes
        # The dense snapshots and the first are kept beyond the budget; one more waits for its codec state.
        checkpoint_bytes = max(self.checkpoint_bytes, (self.dense(request) + 1) * snapshot_bytes) + snapshot_bytes
        steps = request.steps if live is None else live.fixed_steps
        return Load(
            shape=self.shape(1),
            period_s=geometry.block_pixel_frames(1) / fps,
            steps=steps or self.pipe.scheduler.trained_steps[0],
            bytes=cache.nbytes() + checkpoint_bytes + int(request.lead_s * fps * frame_bytes),
            due_s=0.0 if live is None else live.clock.origin_s,
        )


def warm_up(engine: Engine, times: CostModel, sizes: StreamCosts, prompt: str, most_rows: int) -> None:
    """Two blocks of 1, 2, 4 streams together: kernels are chosen, memory is touched, costs are known."""
    pipe, shape = engine.pipe, sizes.shape

    def timed(kind: str, block: int, works: Sequence[Work]) -> None:
        started_s = time.perf_counter()
        if kind == "decode":
            engine.decode(works[0])
        else:
            engine.forward(works)
        times.observe(kind, shape(block), len(works), max(time.perf_counter() - started_s, 1e-6))

    for rows in (r for r in WARM_UP_ROWS if r <= most_rows):
        works = [Work(pipe.stream(prompt, seed=seed)) for seed in range(rows)]
        for block in range(2):
            for work in works:
                work.begin()
            while works[0].run is not None:
                timed("forward", block, works)
                for work in works:
                    if not work.advanced() and work.finished:
                        timed("decode", block, [work])
        codec = works[0].stream.state.codec or {}
        sizes.codec_bytes = sum(tensor.nbytes for tensor in codec.values())
        if rows == 1:
            works[0].stream.prompt(prompt, "recache")
            works[0].begin()
            timed("recache", 1, works)
            if shape(0) != shape(1):
                times.give("recache", shape(0), 1, times.predict("recache", shape(1), 1))


def half_of_free_memory() -> int:
    """Bytes for streams, when nothing else is said."""
    known = memory_mb()
    return UNKNOWN_MEMORY_BYTES if known is None else int(known[1] * 1e6 / 2)
