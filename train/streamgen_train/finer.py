"""Start a model of finer patches from one of coarser ones: what was learned about words, motion and layout is kept.

Only three tensors depend on the patch: its embedding, the head, and the table of places. A finer patch's embedding is
the sum over the coarse patch's parts, scaled so that equal parts give tokens of the same size; the head's is their
mean; places are interpolated. The network is wrong at first and recovers within some hundred steps.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

EMBEDDING, HEAD, PLACES = "patch_embedding.weight", "head.head", "place_embedding"


def finer_patches(
    tensors: dict[str, Tensor], patch: tuple[int, int, int], places: tuple[int, int] | None
) -> dict[str, Tensor]:
    """Weights of a transformer for `patch` (1, rows, columns) and a place grid, from those of a multiple of it.

    The same weights if the patch is the same. ValueError if the patches are no multiples.
    """
    had = tuple(tensors[EMBEDDING].shape[2:])
    if had == tuple(patch):
        return tensors
    rows, columns = had[1] // patch[1], had[2] // patch[2]
    if had[0] != patch[0] or had[1] % patch[1] or had[2] % patch[2] or rows * columns == 1:
        raise ValueError(f"patches of {list(had)} are no multiple of {list(patch)}")
    out = dict(tensors)
    coarse = tensors[EMBEDDING].unflatten(4, (columns, -1)).unflatten(3, (rows, -1))
    out[EMBEDDING] = coarse.sum((3, 5)) / math.sqrt(rows * columns)
    for kind in ("weight", "bias"):
        head = tensors[f"{HEAD}.{kind}"]  # laid out (patch row, patch column, channel), channel fastest
        parts = head.unflatten(0, (rows, patch[1], columns, patch[2], -1))
        out[f"{HEAD}.{kind}"] = parts.mean((0, 2)).flatten(0, 2)
    if places is not None:
        grid = tensors[PLACES].unflatten(0, (places[0] // rows, -1)).permute(2, 0, 1)[None]
        finer = F.interpolate(grid, places, mode="bilinear", align_corners=False)[0]
        out[PLACES] = finer.permute(1, 2, 0).flatten(0, 1).contiguous()
    return out
