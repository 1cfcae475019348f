"""The bucket that a clip goes to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Bucket:
    """The size of all clips in a batch."""

    height: int
    width: int
    frames: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.frames}"


def choose_bucket(height: int, width: int, frames: int, buckets: Sequence[Bucket]) -> int | str:
    """Number of the bucket nearest in aspect (then largest, then longest) that the clip fills, or why it fills none.

    A clip fills a bucket if it has as many rows, columns and frames, so that nothing is enlarged or repeated.
    """
    large = [b for b in buckets if height >= b.height and width >= b.width]
    if not large:
        least = min(buckets, key=lambda b: (b.height * b.width, b.frames))
        return f"too small: {height}x{width} pixels, and the smallest bucket is {least}"
    filled = [b for b in large if frames >= b.frames]
    if not filled:
        least = min(large, key=lambda b: b.frames)
        return f"too short: {frames} frames at the target fps, and the shortest bucket of its size is {least}"

    def distance(bucket: Bucket) -> tuple[float, int, int]:
        stretch = abs(math.log(width * bucket.height) - math.log(height * bucket.width))
        return (round(stretch, 9), -bucket.height * bucket.width, -bucket.frames)  # equal aspects must tie

    return buckets.index(min(filled, key=distance))
