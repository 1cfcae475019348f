"""The door to training data: `open_source(config)` gives an object whose `batch(step, microbatch, count)` is a function
of its arguments, the config and the files. Nothing is remembered from one batch to the next, so a run resumes exactly,
and its processes need not talk: each asks for its own microbatch numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from streamgen.errors import UserError
from streamgen_train.videos.broken import Broken
from streamgen_train.videos.buckets import Bucket
from streamgen_train.videos.config import SourceConfig, VideoConfig
from streamgen_train.videos.decode import BrokenClip, read_window
from streamgen_train.videos.index import Clip, build_index
from streamgen_train.videos.latents import LatentSource
from streamgen_train.videos.order import Order, Slot
from streamgen_train.videos.prompts import PromptSource


class VideoSource:
    """Windows of clips, each clip once per epoch."""

    def __init__(self, config: VideoConfig, seed: int, microbatches: int, log_dir: Path | None = None) -> None:
        """Finds and opens every clip of `config.path`; names of broken ones are appended to log_dir/broken.jsonl."""
        self.config = config
        self.broken = Broken(config.max_broken_share, config.broken_tries, log_dir)
        self.clips = build_index(config, self.broken)
        sizes = [Bucket(*size) for size in config.buckets]
        filled = sorted({clip.bucket for clip in self.clips})
        self.buckets = [sizes[number] for number in filled]
        """Those that at least one clip goes to."""
        self._rows = [[clip for clip in self.clips if clip.bucket == number] for number in filled]
        self._order = Order(tuple(map(len, self._rows)), seed, microbatches)
        self._sizes = sizes

    def describe(self) -> str:
        """One line: how many clips of which size, and how many are broken."""
        rows = zip(self._rows, self.buckets, strict=True)
        counts = ", ".join(f"{len(row)} of {bucket}" for row, bucket in rows)
        return f"{len(self.clips)} clips ({counts}), {len(self.broken.reasons)} broken"

    def planned(self, step: int, microbatch: int, count: int) -> list[Clip]:
        """The clips of a batch, before any that turns out broken is replaced; decodes nothing."""
        return [self._clip(slot.bucket, slot.position) for slot in self._order.slots(step, microbatch, count)]

    def batch(self, step: int, microbatch: int, count: int) -> tuple[Tensor, list[str]]:
        """(video [B, T, 3, H, W] float32 in [-1, 1], captions [B]); all of one bucket.

        A clip that cannot be decoded is named and counted, and another takes its place: one that the same microbatch
        shows in another step of the epoch. UserError when more than `max_broken_share` is broken.
        """
        slots = self._order.slots(step, microbatch, count)
        with ThreadPoolExecutor(min(self.config.workers, count)) as pool:
            shown = list(pool.map(self._show, slots))
        return torch.stack([video for video, _ in shown]), [caption for _, caption in shown]

    def read(self, clip: Clip, start_frame: int) -> Tensor:
        """One window of a clip, float32 [T, 3, H, W] in [-1, 1], from `start_frame` at the target fps.

        BrokenClip (counted) if it cannot be decoded.
        """
        bucket = self._sizes[clip.bucket]
        try:
            video = read_window(clip.place, clip.facts, fps=self.config.fps, start_frame=start_frame, bucket=bucket)
        except BrokenClip as error:
            self.broken.tried(clip.name, str(error))
            raise
        self.broken.tried(clip.name, None)
        return video

    def _show(self, slot: Slot) -> tuple[Tensor, str]:
        for clip in self._candidates(slot):
            # Drawn for the slot: a clip that stands in shows another part than at its own turn.
            start = self._order.draw(slot, clip.frames - self._sizes[clip.bucket].frames + 1)
            try:
                return self.read(clip, start), clip.caption
            except BrokenClip:  # `read` has named it
                continue
        raise UserError(f"{self.config.path}: no clip of {self.buckets[slot.bucket]} can be decoded")

    def _candidates(self, slot: Slot) -> Iterator[Clip]:
        positions = chain([slot.position], self._order.stand_ins(slot))
        return (self._clip(slot.bucket, position) for position in positions)

    def _clip(self, bucket: int, position: int) -> Clip:
        return self._rows[bucket][self._order.item(bucket, position)]


Source = VideoSource | LatentSource | PromptSource


def open_source(config: SourceConfig, log_dir: Path | None = None) -> Source:
    """The source that `config` names.

    `batch(step, microbatch, count)` of a VideoSource gives (video [B, T, 3, H, W] in [-1, 1], captions), of a
    LatentSource (latents [B, F, C, H, W], captions), of a PromptSource prompts. Ask with one `count` throughout a run:
    it decides which clips belong to which step. Names of broken clips are appended to log_dir/broken.jsonl.
    """
    if config.videos is not None:
        return VideoSource(config.videos, config.seed, config.microbatches, log_dir)
    if config.latents is not None:
        return LatentSource(config.latents, config.seed, config.microbatches)
    assert config.prompts is not None  # SourceConfig refuses anything else
    return PromptSource(config.prompts, config.seed, config.microbatches)
