"""A person's own data, as small as it goes: cached latents with captions, and the captions' embeddings."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from streamgen.embedded_text import save_embeddings
from streamgen.geometry import VideoGeometry
from streamgen_train.videos.latents import HEADER_FILE, Header, Row, shard_file, shard_metadata

PROMPTS = [f"a video of number {i}" for i in range(6)]


def save_latents(folder: Path, geometry: VideoGeometry, frames: int, prompts: list[str] = PROMPTS) -> Path:
    """One shard of random latents [frames, C, H, W], one for each prompt."""
    folder.mkdir(parents=True)
    g, rng = geometry, torch.Generator().manual_seed(0)
    shape = (frames, g.latent_channels, g.latent_height, g.latent_width)
    rows = [Row(f"{i}", f"{i}.mp4", 0, prompt, 0) for i, prompt in enumerate(prompts)]
    tensors = {row.key: torch.randn(shape, generator=rng).half() for row in rows}
    save_file(tensors, shard_file(folder, 0), shard_metadata(rows, {}))
    pixel_frames = g.pixel_frames(0, frames)
    header = Header(
        codec="of a test",
        dtype="fp16",
        fps=g.fps,
        buckets=[[g.height, g.width, pixel_frames]],
        windows=1,
        shard_clips=len(prompts),
        jobs=len(prompts),
    )
    (folder / HEADER_FILE).write_text(json.dumps(asdict(header)))
    return folder


def save_text(path: Path, text_len: int, text_dim: int, prompts: list[str] = PROMPTS) -> Path:
    rows = torch.randn(len(prompts), text_len, text_dim, generator=torch.Generator().manual_seed(1))
    save_embeddings(path, prompts, rows)
    return path
