"""The codec beside the transformer: the same frames as when everything waits for everything."""

import numpy as np
import pytest
import torch

from streamgen.clocks import clock_of
from streamgen.codec import CodecState
from streamgen.codecs.taehv import TaehvCodec, TaehvConfig
from streamgen.frames import FrameMaker
from streamgen.pixels import to_uint8

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


@torch.no_grad()
def test_frames_made_beside_other_work_are_those_made_alone() -> None:
    """Latents and states are dropped as soon as they may be, and their memory is written over at once."""
    torch.manual_seed(0)
    codec = TaehvCodec(TaehvConfig()).to(CUDA, torch.bfloat16).eval()
    clips = torch.randn(6, 1, 3, codec.latent_channels, 8, 12).to(torch.bfloat16)
    alone: list[np.ndarray] = []
    state: CodecState | None = None
    for clip in clips:
        video, state = codec.decode_stream(clip.to(CUDA), state)
        alone.append(to_uint8(video)[0].cpu().numpy())
    maker, work = FrameMaker(CUDA), torch.randn(2048, 2048, device=CUDA)
    state = None
    for clip, expected in zip(clips, alone, strict=True):
        latents = clip.to(CUDA)
        coming = maker.begin(codec, latents, state)
        state = coming.codec
        shape = latents.shape
        del latents
        for _ in range(20):
            work = (work @ work).clamp(-1, 1)
            torch.full(shape, float("nan"), device=CUDA, dtype=torch.bfloat16)
        frames = coming.wait()
        assert np.array_equal(frames, expected) and coming.decode_ms() > 0
    clock_of(CUDA).wait()
