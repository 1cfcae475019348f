"""Blocks of several streams in one pass: each row reads and writes its own cache, at its own place and length.

Letters as in kv.py; a row is one stream (B = 1) or a batch of streams that share a cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streamgen.attention import attend
from streamgen.cache.kv import BlockCache


class RowsCache:
    """Handles of one block each, of equal numbers of latent frames. Projections run over all rows at once, attention
    row by row: nothing is padded and no cache is copied, so a row's result does not depend on its neighbours' lengths.
    """

    def __init__(self, handles: Sequence[BlockCache]) -> None:
        self.handles = list(handles)
        self.sizes = [handle.cache.k.shape[1] for handle in self.handles]
        first, *others = self.handles
        self._rope = first.rope()
        if any(other.q_positions != first.q_positions for other in others):
            tables = [(handle.rope(), size) for handle, size in zip(self.handles, self.sizes, strict=True)]
            cos, sin = (
                torch.cat([table[part].expand(size, 1, -1, -1) for table, size in tables]) for part in range(2)
            )  # [B, 1, T, K/2]
            self._rope = cos, sin

    def rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the queries: [T, K/2] where all rows stand at the same place, else [B, 1, T, K/2]."""
        return self._rope

    def attend(self, layer: int, q_BNTK: Tensor, k_BNTK: Tensor, v_BNTK: Tensor, backend: str) -> Tensor:
        """Place each row's un-rotated keys and values, then let its (rotated) queries see its own cache."""
        out = []
        rows = (x.split(self.sizes) for x in (q_BNTK, k_BNTK, v_BNTK))
        for handle, q, k, v in zip(self.handles, *rows, strict=True):
            keys, values = handle.append(layer, k, v)
            out.append(attend(q, keys, values, None, backend))
        return torch.cat(out)
