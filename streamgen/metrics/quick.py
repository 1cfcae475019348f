"""Adherence of a model in one call: for validation in a training run, and for studies of many models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamgen.batch import generate
from streamgen.metrics.adherence import SEGMENT_S, WINDOW_S, SegmentJudge, over_time
from streamgen.pipeline import StreamPipeline
from streamgen.worlds.sprites import Caption


def quick_adherence(
    pipe: StreamPipeline,
    captions: Sequence[Caption],
    seeds: Sequence[int],
    *,
    seconds: float = SEGMENT_S,
    steps: int | None = None,
    segments: bool = True,
    cache: str | None = None,
) -> dict[str, Any]:
    """Streams of `captions`, made together, judged per 5 s while they run: memory does not grow with `seconds`.

    One seed per caption. seconds: at least 2; below 5 the one segment is as long as the streams. segments: False
    reads only the first and the last of long streams, which saves the checker's time.
    -> 'first', 'last' and 'by_segment' (shares, 'start_s', 'n' and 'intervals', see `adherence.merged`), 'drift'
    (`intervals.drift`; None with one segment), 'n', 'seconds'. Figures of held-out captions say something of the
    world, those of others of memory: the caller chooses.
    """
    if seconds < WINDOW_S:
        raise ValueError(f"seconds is {seconds}; at least {WINDOW_S} (one window of the checker) is needed")
    segment_s = min(SEGMENT_S, seconds)
    geometry = pipe.geometry
    blocks = geometry.blocks_for_seconds(seconds)
    whole = geometry.block_pixel_start(blocks) // round(segment_s * geometry.fps)
    judge = SegmentJudge(captions, geometry.fps, segment_s, None if segments else (0, whole - 1))
    texts = [caption.text for caption in captions]
    generate(
        pipe, texts, seeds, blocks, steps=steps, cache=cache, on_block=lambda block, frames: judge.add(frames.numpy())
    )
    found = over_time(judge.rows)
    by = found["by_segment"]
    return {"first": by[0], "last": by[-1], **found, "n": len(captions), "seconds": seconds}
