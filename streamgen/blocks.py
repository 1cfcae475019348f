"""What a stream gives out: blocks with their times, receipts of prompts, and snapshots to turn back to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from streamgen.codec import CodecState


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTiming:
    """Wall milliseconds of one block."""

    text_ms: float
    recache_ms: float
    denoise_ms: list[float]
    """One entry per step."""
    decode_ms: float
    commit_ms: float
    total_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One finished block."""

    index: int
    frames: np.ndarray
    """uint8 [frames, H, W, 3], RGB."""
    prompt: str
    prompt_version: int
    timing: BlockTiming


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReceipt:
    """A prompt was received: its version, and the block (and media time) that will first show it."""

    version: int
    block: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A stream at a block's edge, to be turned back to: all but its prompts. Holds copies of the cache."""

    position: int
    cache: dict[str, Any]
    recent: Mapping[int, Tensor]
    codec: CodecState | None

    def with_codec(self, codec: CodecState | None) -> Snapshot:
        """The same with the codec's state of the same block, which may come later."""
        return replace(self, codec=codec)

    def nbytes(self) -> int:
        held = [*self.cache.values(), *self.recent.values(), *(self.codec or {}).values()]
        return sum(value.nbytes for value in held if isinstance(value, Tensor))
