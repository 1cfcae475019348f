"""What the codec alone loses: no model over it can look better than real video that was encoded and decoded."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from streamgen.codec import StreamingCodec


def psnr_db(mean_squared_error: float) -> float:
    """Peak signal-to-noise ratio (dB) of values in [-1, 1] with this mean squared error; inf for none."""
    return -10 * math.log10(mean_squared_error / 4) if mean_squared_error > 0 else math.inf


@torch.inference_mode()
def reconstruct(codec: StreamingCodec, video_BTCHW: Tensor) -> tuple[Tensor, float]:
    """Video in [-1, 1] -> what the codec makes of it, of the same shape, and the mean squared error between them."""
    out = codec.decode(codec.encode(video_BTCHW)).to(video_BTCHW.dtype)
    return out, float((out - video_BTCHW).square().mean())
