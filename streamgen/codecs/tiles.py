"""A picture in overlapping tiles, so that a codec needs the memory of one: where they lie, and how they are joined.

Tiles lie `step` apart and overlap by `size` - `step`; across an overlap one fades linearly into the next. The last one
of a row or column reaches to the edge and is the only one that may be smaller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """Tiles of `size` pixels, `step` from one to the next; both multiples of the codec's spatial stride."""

    size: int = 256
    step: int = 192

    def __post_init__(self) -> None:
        if not 0 < self.step <= self.size <= 2 * self.step:
            raise ValueError(
                f"tiles of {self.size} pixels every {self.step}: they must overlap, and no more than two of them"
            )

    def scaled(self, pixels: int) -> Tiling:
        """The same in units of so many pixels."""
        if self.size % pixels or self.step % pixels:
            raise ValueError(f"tiles of {self.size} pixels every {self.step}: must be multiples of {pixels}")
        return Tiling(size=self.size // pixels, step=self.step // pixels)

    def spans(self, length: int) -> list[slice]:
        """Where the tiles of one axis lie."""
        starts = [
            0,
            *(start for start in range(self.step, length, self.step) if start + self.size - self.step < length),
        ]
        return [slice(start, min(start + self.size, length)) for start in starts]

    def join(self, rows: Sequence[Sequence[Tensor]]) -> Tensor:
        """Tiles [..., h, w] in rows -> the whole picture."""
        overlap = self.size - self.step
        above: list[Tensor] = []
        bands = []
        for tiles in rows:
            done: list[Tensor] = []
            for column, tile in enumerate(tiles):
                if above:
                    tile = _faded(above[column], tile, overlap, dim=-2)
                if done:
                    tile = _faded(done[-1], tile, overlap, dim=-1)
                done.append(tile)
            above = done
            bands.append(torch.cat([*(tile[..., : self.step] for tile in done[:-1]), done[-1]], dim=-1))
        return torch.cat([*(band[..., : self.step, :] for band in bands[:-1]), bands[-1]], dim=-2)


def _faded(before: Tensor, tile: Tensor, overlap: int, dim: int) -> Tensor:
    """`tile` with its first rows (or columns) faded in from the last ones of the tile before."""
    if overlap == 0:
        return tile
    share = torch.arange(overlap, device=tile.device, dtype=tile.dtype) / overlap
    share = share.view(-1, *[1] * (-1 - dim))
    old = before.narrow(dim, before.shape[dim] - overlap, overlap)
    new = tile.narrow(dim, 0, overlap)
    rest = tile.narrow(dim, overlap, tile.shape[dim] - overlap)
    return torch.cat([old * (1 - share) + new * share, rest], dim=dim)
