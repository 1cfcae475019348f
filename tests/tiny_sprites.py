"""The sprites objectives, as small as they go: 32 x 32 pixels, blocks of two latent frames of four tokens."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.geometry import VideoGeometry
from streamgen.text import SpritesTextConfig
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import save_component
from streamgen_train.config import CheckpointConfig, LogConfig, OptimConfig, ScheduleConfig, TrainConfig
from streamgen_train.objectives import ar

GEOMETRY = VideoGeometry(height=32, width=32, latent_channels=4, block_frames=2)
CODEC = SpritesCodecConfig(latent_channels=4, encoder_dim=8, decoder_dim=8, decoder_blocks=1, head_dim=8)
TRANSFORMER = TransformerConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_channels=4,
    out_channels=4,
    text_dim=8,
    text_len=8,
    freq_dim=16,
    pooled_text=True,
)


def spread(*modules: nn.Module, std: float = 0.15) -> None:
    """Random weights everywhere: fresh ones answer zero and look at nothing."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=std)


def save_codec(folder: Path, seed: int = 0) -> Path:
    """A codec folder with random weights, in fp16 as exported ones are."""
    torch.manual_seed(seed)
    codec = SpritesCodec(CODEC)
    spread(codec, std=0.05)
    save_component(folder, {"_class_name": "SpritesCodec", **asdict(CODEC)}, codec.half().state_dict())
    return folder


def ar_values(codec: Path, **changes: Any) -> dict[str, Any]:
    """Keywords of the config of an autoregressive objective (or of one that adds to it)."""
    values: dict[str, Any] = {
        "model": TRANSFORMER,
        "codec_from": str(codec),
        "text": SpritesTextConfig(text_dim=8),
        "geometry": GEOMETRY,
        "window_frames": 8,
        "sink_frames": 2,
        "clips": 2,
        "single_clips": 3,
        "gap_share": 0.5,
        "validation_clips": 2,
        "sample_steps": 2,
    }
    return values | changes


def build_ar(codec: Path, seed: int = 0, **changes: Any) -> ar.ArObjective:
    torch.manual_seed(seed)
    objective = ar.build(ar.Config(**ar_values(codec, **changes)))
    spread(*objective.modules().values())
    return objective


def train_config(**changes: Any) -> TrainConfig:
    """A row of the log and a checkpoint at every step that matters; no validation, no pictures."""
    values: dict[str, Any] = {
        "max_steps": 8,
        "validate_every": 0,
        "sample_every": 0,
        "optim": OptimConfig(lr=3e-3),
        "schedule": ScheduleConfig(warmup_steps=2),
        "log": LogConfig(every=1, curves=False),
        "checkpoint": CheckpointConfig(every=3),
    }
    return TrainConfig(**(values | changes))
