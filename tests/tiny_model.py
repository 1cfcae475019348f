"""A real model folder, as small as it goes, with weights that leave no term at zero."""

from pathlib import Path

import numpy as np
import torch

from streamgen.codec import SpritesCodec, SpritesCodecConfig
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import SchedulerConfig, StreamPipeline
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen.transformer_config import TransformerConfig


def save_tiny_model(folder: Path, *, seed: int = 0, height: int = 32, width: int = 32) -> Path:
    """Blocks of 12 frames at 16 frames per second, two steps, a window of 9 latent frames with a sink of 1."""
    torch.manual_seed(seed)
    sizes = {"dim": 24, "ffn_dim": 32, "num_heads": 2, "num_layers": 2, "freq_dim": 16}
    config = TransformerConfig(in_channels=4, out_channels=4, text_dim=8, text_len=8, **sizes)
    codec = SpritesCodecConfig(latent_channels=4, encoder_dim=8, decoder_dim=8, decoder_blocks=1, head_dim=8)
    pipe = StreamPipeline(
        transformer=CausalWanModel(config),
        codec=SpritesCodec(codec),
        text=SpritesTextEncoder(SpritesTextConfig(text_dim=8)),
        geometry=VideoGeometry(height=height, width=width, latent_channels=4),
        scheduler=SchedulerConfig(trained_steps=(2, 4), window_frames=9, sink_frames=1),
    )
    for parameter in (*pipe.transformer.parameters(), *pipe.codec.parameters()):
        torch.nn.init.normal_(parameter, std=0.15)
    pipe.save_pretrained(folder)
    return folder


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal but for the rounding of values that differ by 1e-6 in batches of another size."""
    return one.shape == other.shape and int(np.abs(one.astype(int) - other.astype(int)).max()) <= 1
