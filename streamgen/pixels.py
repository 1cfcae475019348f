"""The one place where video in [-1, 1] becomes bytes."""

import torch
from torch import Tensor


def to_uint8(video: Tensor) -> Tensor:
    """Float [..., 3, H, W] in [-1, 1] -> uint8 [..., H, W, 3] on the same device."""
    scaled = ((video.float() + 1) * 127.5).round_().clamp_(0, 255).to(torch.uint8)
    return scaled.movedim(-3, -1).contiguous()
