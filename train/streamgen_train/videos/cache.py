"""Encoding a source of videos once, to disk.

Which windows a shard holds depends on its number alone, and a shard appears whole or not at all. So a start that
continues another makes the files that one start would have made. One window is encoded at a time: what it becomes does
not depend on its neighbours.
Letters: B batch, T pixel frames, F latent frames, C channels, H W.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamgen.errors import UserError
from streamgen.weights import replacing, user_errors, write_json
from streamgen_train.checkpoint import run_lock
from streamgen_train.videos.broken import BROKEN_FILE
from streamgen_train.videos.config import CacheConfig
from streamgen_train.videos.decode import BrokenClip
from streamgen_train.videos.index import Clip
from streamgen_train.videos.latents import (
    HEADER_FILE,
    Header,
    Row,
    read_header,
    read_rows,
    shard_file,
    shard_metadata,
)
from streamgen_train.videos.source import VideoSource

STORED = {"fp16": torch.float16, "bf16": torch.bfloat16}


class Encoder(Protocol):
    """What is asked of a codec."""

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Video [B, T, 3, h, w] in [-1, 1] -> latents [B, F, C, H, W]."""
        ...


@dataclass(frozen=True, slots=True)
class Job:
    """One window to encode."""

    key: str
    clip: Clip
    first_frame: int


@dataclass(frozen=True, slots=True)
class Summary:
    latents: int
    shards: int
    made_now: int
    """Shards that this start made."""
    broken: int
    """Clips left out."""


def cache_latents(
    config: CacheConfig,
    codec: Encoder,
    codec_fingerprint: str,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Encode the clips of config.videos into `folder`, or go on where an earlier start ended.

    `codec` is on config.device. `on_progress(windows done, windows in all)` is called after each. Broken clips are
    left out and named in broken.jsonl. UserError if the folder holds anything else, or latents of another codec, of
    other settings or of other clips, or if too many clips are broken.
    """
    header = Header(
        codec=codec_fingerprint,
        dtype=config.dtype,
        fps=config.videos.fps,
        buckets=[list(bucket) for bucket in config.videos.buckets],
        windows=config.windows,
        shard_clips=config.shard_clips,
        source=config.videos.path,
    )
    with ExitStack() as stack:
        _take(folder, stack)
        _refuse_another(folder, header, ("codec", "dtype", "fps", "buckets", "windows", "shard_clips"))
        source = VideoSource(config.videos, 0, 1, folder)
        jobs = _jobs(source, config.windows)
        header = replace(header, clips=_clips_fingerprint(source.clips), jobs=len(jobs))
        _refuse_another(folder, header, ("clips", "jobs"))
        if not (folder / HEADER_FILE).exists():
            write_json(folder / HEADER_FILE, asdict(header))
        return _make_shards(folder, header, source, jobs, codec, config, on_progress)


def _take(folder: Path, stack: ExitStack) -> None:
    """Hold `folder` until the stack ends, without what a killed start left half written."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; name a folder for the latents")
    if folder.is_dir() and not (folder / HEADER_FILE).exists():
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name != BROKEN_FILE)
        if foreign:
            raise UserError(f"{folder} holds something else ({foreign[0]}); name a new folder for the latents")
    try:
        stack.enter_context(run_lock(folder))
    except UserError:  # it speaks of training
        raise UserError(f"another process is writing to {folder}; wait for it, or name another folder") from None
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()


def _refuse_another(folder: Path, header: Header, names: tuple[str, ...]) -> None:
    if not (folder / HEADER_FILE).exists():
        return
    there = read_header(folder)
    for name in names:
        old, new = getattr(there, name), getattr(header, name)
        if old != new:
            what = "clips other than" if name in ("clips", "jobs") else f"latents of another {name} than"
            values = "" if name in ("clips", "jobs") else f" ({_short(old)}, now {_short(new)})"
            raise UserError(f"{folder} holds {what} what is asked for{values}; name a new folder, or ask for the same")


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _jobs(source: VideoSource, windows: int) -> list[Job]:
    jobs: list[Job] = []
    for clip in source.clips:
        frames = source.config.buckets[clip.bucket][2]
        fit = clip.frames // frames
        for window in range(min(fit, windows) if windows else fit):
            jobs.append(Job(f"{len(jobs):08d}", clip, window * frames))
    return jobs


def _clips_fingerprint(clips: list[Clip]) -> str:
    digest = hashlib.sha256()
    for clip in clips:
        line = [clip.name, clip.place.size_bytes, clip.caption, clip.frames, clip.bucket]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


def _make_shards(
    folder: Path,
    header: Header,
    source: VideoSource,
    jobs: list[Job],
    codec: Encoder,
    config: CacheConfig,
    on_progress: Callable[[int, int], None],
) -> Summary:
    latents = made = 0
    for number in range(header.shards):
        path, start = shard_file(folder, number), number * header.shard_clips
        share = jobs[start : start + header.shard_clips]
        if path.exists():
            rows, broken = read_rows(path)
            for job in share:
                source.broken.tried(job.clip.name, broken.get(job.clip.name))
            on_progress(start + len(share), len(jobs))
        else:
            tensors, rows, broken = {}, [], {}
            for done, job in enumerate(share, start + 1):
                try:
                    tensors[job.key] = _encode(source, job, codec, config)
                    rows.append(Row(job.key, job.clip.name, job.first_frame, job.clip.caption, job.clip.bucket))
                except BrokenClip as error:
                    broken[job.clip.name] = str(error)
                on_progress(done, len(jobs))
            with replacing(path) as temporary:
                save_file(tensors, temporary, shard_metadata(rows, broken))
            made += 1
        latents += len(rows)
    if not latents:
        raise UserError(f"{config.videos.path}: no clip could be decoded; see {folder / BROKEN_FILE}")
    return Summary(latents, header.shards, made, len(source.broken.reasons))


@torch.no_grad()
def _encode(source: VideoSource, job: Job, codec: Encoder, config: CacheConfig) -> Tensor:
    """Latents [F, C, H, W] of one window, as they are stored."""
    video = source.read(job.clip, job.first_frame).to(config.device)
    with user_errors(f"the codec does not take {source.config.buckets[job.clip.bucket]} (height, width, frames)"):
        latents = codec.encode(video[None])[0]
    stored = latents.to("cpu", STORED[config.dtype]).contiguous()
    if not bool(torch.isfinite(stored).all()):
        hint = "; bf16 holds larger numbers" if bool(torch.isfinite(latents).all()) else ""
        raise UserError(f"{job.clip.name}: its latents are not finite in {config.dtype}{hint}")
    return stored
