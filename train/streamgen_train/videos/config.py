"""What a source of training data is; filled by `streamgen_train.config.from_dict`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from streamgen.errors import UserError


@dataclass(kw_only=True)
class VideoConfig:
    path: str
    """A folder of video files and tar shards, searched to any depth, or one .tar."""
    buckets: tuple[tuple[int, int, int], ...]
    """Sizes that batches come in: (height, width, frames). A clip goes to the one nearest in aspect that it fills
    without being enlarged; a batch holds one size."""
    fps: float = 16.0
    """Frames per second that clips are brought to."""
    max_broken_share: float = 0.05
    """The run fails when more of the clips than this are broken ..."""
    broken_tries: int = 20
    """... judged after this many clips."""
    index_file: str | None = None
    """Keeps the sizes and lengths found (JSONL), so that the next start opens only clips that are new or changed."""
    workers: int = 1
    """Clips that are opened or decoded at once."""

    def __post_init__(self) -> None:
        if not self.buckets:
            raise UserError("videos.buckets is empty; name at least one (height, width, frames)")
        for bucket in self.buckets:
            if min(bucket) < 1:
                raise UserError(f"videos.buckets has {list(bucket)}; height, width and frames must be at least 1")
        if len(set(self.buckets)) != len(self.buckets):
            raise UserError(f"videos.buckets names a size twice: {[list(bucket) for bucket in self.buckets]}")
        if not (math.isfinite(self.fps) and 0.1 <= self.fps <= 1000):
            raise UserError(f"videos.fps is {self.fps}; it must be 0.1 to 1000")
        if not 0 <= self.max_broken_share <= 1:
            raise UserError(f"videos.max_broken_share is {self.max_broken_share}; it must be 0 to 1")
        for name, value in (("broken_tries", self.broken_tries), ("workers", self.workers)):
            if value < 1:
                raise UserError(f"videos.{name} is {value}; it must be at least 1")


@dataclass(kw_only=True)
class LatentConfig:
    path: str
    """A folder that `streamgen latents` wrote."""


@dataclass(kw_only=True)
class PromptConfig:
    path: str
    """A text file with one prompt per line, or a .jsonl file of objects with `prompt`."""


@dataclass(kw_only=True)
class SourceConfig:
    """Exactly one of `videos`, `latents` and `prompts`, and the order in which it is gone through."""

    videos: VideoConfig | None = None
    latents: LatentConfig | None = None
    prompts: PromptConfig | None = None
    seed: int = 0
    microbatches: int = 1
    """Microbatches per step, over all processes."""

    def __post_init__(self) -> None:
        given = [name for name in ("videos", "latents", "prompts") if getattr(self, name) is not None]
        if len(given) != 1:
            raise UserError(f"a source is one of videos, latents and prompts; got {', '.join(given) or 'none'}")
        if not 0 <= self.seed < 2**64:
            raise UserError(f"the seed of the source is {self.seed}; it must be 0 to 2^64 - 1")
        if self.microbatches < 1:
            raise UserError(f"microbatches of the source is {self.microbatches}; it must be at least 1")


@dataclass(kw_only=True)
class CacheConfig:
    """What `streamgen latents` makes."""

    videos: VideoConfig
    codec: str
    """Codec folder (config.json and weights), or a model folder that has one."""
    dtype: Literal["fp16", "bf16"] = "fp16"
    windows: int = 1
    """Windows taken of a clip at most, one after another from its first frame; 0: as many as it has."""
    shard_clips: int = 128
    """Windows in one file of latents: what an interrupted start may have to make again."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.windows < 0:
            raise UserError(f"windows is {self.windows}; it must be at least 1, or 0 for all")
        if self.shard_clips < 1:
            raise UserError(f"shard_clips is {self.shard_clips}; it must be at least 1")
