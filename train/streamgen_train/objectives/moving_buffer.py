"""Flow matching on a moving buffer with mixed partitions (StreamDiT, arXiv 2507.03745).

A buffer of blocks is cut into chunks. All blocks of a chunk have one noise level, and levels rise from the oldest chunk
to the newest; the buffer moves by a chunk whenever the oldest is clean. With n chunks the uniform level of chunk j is

    u_j = (j + 1 - phase) / n,      phase in [0, 1): how far the buffer is on the way to its next move

One partition makes a model that knows one speed of noise; so the chunk's size is drawn for each clip: from one block (a
rolling window) to the whole buffer (one level for all: ordinary diffusion of a clip). Everything sees everything.

Letters: B clips, G blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from streamgen import flow
from streamgen_train.objectives import bidirectional
from streamgen_train.objectives.bidirectional import BidirectionalObjective
from streamgen_train.objectives.video import Batch


@dataclass(kw_only=True)
class Config(bidirectional.Config):
    chunk_blocks: tuple[int, ...] = (1, 2, 4)
    """Sizes of chunks, drawn evenly; each divides clip_blocks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        wrong = [size for size in self.chunk_blocks if size < 1 or self.clip_blocks % size]
        if wrong or not self.chunk_blocks:
            raise ValueError(
                f"chunk_blocks is {list(self.chunk_blocks)}; give sizes that divide clip_blocks ({self.clip_blocks})"
            )


class MovingBufferObjective(BidirectionalObjective):
    """The levels of a buffer in motion."""

    config: Config

    def levels(self, batch: Batch) -> Tensor:
        like_BG = batch.scored_BG
        clips, blocks = like_BG.shape
        sizes = [size for size in self.config.chunk_blocks if blocks % size == 0]
        if len(sizes) < len(self.config.chunk_blocks):  # a shorter clip (a single block, one after a gap): one level
            return self.draw_sigma(like_BG[:, :1]).expand_as(like_BG)
        drawn = torch.randint(len(sizes), (clips,), device=like_BG.device)
        u_BG = buffer_u(torch.tensor(sizes, device=like_BG.device)[drawn], blocks, torch.rand_like(like_BG[:, 0]))
        shifts = torch.tensor(self.config.shifts, device=like_BG.device)
        shift_B1 = shifts[torch.randint(len(shifts), (clips, 1), device=like_BG.device)]
        return flow.sample_sigma(u_BG, shift_B1)


def buffer_u(chunk_blocks_B: Tensor, blocks: int, phase_B: Tensor) -> Tensor:
    """Uniform noise levels u [B, G] in (0, 1] of buffers cut into chunks of so many blocks."""
    chunk_BG = torch.arange(blocks, device=phase_B.device) // chunk_blocks_B[:, None]
    return (chunk_BG + 1 - phase_B[:, None]) * chunk_blocks_B[:, None] / blocks


def build(config: Config) -> MovingBufferObjective:
    return MovingBufferObjective(config)
