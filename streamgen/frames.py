"""Latents of a block become frames on the host.

On a CPU at once. On CUDA the codec and the copy have a stream of their own, so that the transformer's next passes run
beside them, and the copy goes through pinned memory, so that the host need not wait for it either.
Letters: B batch (1), F latent frames, C channels, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamgen.clocks import Clock, clock_of
from streamgen.codec import CodecState
from streamgen.pixels import to_uint8

if TYPE_CHECKING:
    from streamgen.codec import StreamingCodec


@dataclass(frozen=True, slots=True)
class Coming:
    """Frames on their way."""

    codec: CodecState
    """The codec's state after them. On CUDA other streams may read it once `wait` has returned."""
    _host: Tensor
    _clock: Clock
    _span: tuple[Any, Any]

    def wait(self) -> np.ndarray:
        """uint8 [frames, H, W, 3], RGB."""
        self._clock.reach(self._span[1])
        # Pinned memory is for the way only: who collects frames would pin all of them.
        return self._host.numpy().copy() if self._host.is_pinned() else self._host.numpy()

    def decode_ms(self) -> float:
        """Of codec and copy, after `wait`."""
        return self._clock.ms(*self._span)


class FrameMaker:
    """The way of one model's latents to the host."""

    def __init__(self, device: torch.device) -> None:
        self._clock = clock_of(device)
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def overlaps(self) -> bool:
        """Does `begin` return before the frames are there?"""
        return self._beside is not None

    @torch.no_grad()
    def begin(self, codec: StreamingCodec, latents_BFCHW: Tensor, state: CodecState | None) -> Coming:
        """Decode the latents [1, F, C, h, w] that follow what `state` stands for."""
        if self._beside is None:
            return self._decode(codec, latents_BFCHW, state)
        self._beside.wait_stream(torch.cuda.current_stream(latents_BFCHW.device))
        with torch.cuda.stream(self._beside):
            coming = self._decode(codec, latents_BFCHW, state)
        # Memory of the other stream that this one reads must not be given out again before it has.
        for tensor in (latents_BFCHW, *(state or {}).values()):
            if tensor.is_cuda:
                tensor.record_stream(self._beside)
        return coming

    def _decode(self, codec: StreamingCodec, latents_BFCHW: Tensor, state: CodecState | None) -> Coming:
        start = self._clock.mark()
        video_BTCHW, following = codec.decode_stream(latents_BFCHW, state)
        frames_THWC = to_uint8(video_BTCHW)[0]
        if frames_THWC.is_cuda:
            pinned = torch.empty(frames_THWC.shape, dtype=torch.uint8, pin_memory=True)
            frames_THWC = pinned.copy_(frames_THWC, non_blocking=True)
        return Coming(following, frames_THWC, self._clock, (start, self._clock.mark()))
