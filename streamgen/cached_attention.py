"""Self-attention of a streamed block over its cache: keys and values into the ring, then every query over all it sees.

`attend_cached` goes through `append` of the cache, part by part, and works everywhere: it is the reference. `fused`
makes the same of kernels: one norms and rotates queries and keys and writes the ring in place, the other reads the ring
where it lies. Both are entries of the table of `streamgen.ops`.
Letters: B batch, T tokens of the block, N heads, K head width, D = N K, S slots of the ring.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from streamgen.attention import attend
from streamgen.cache.rows import RowsCache
from streamgen.cache.slots import Slots, Turn


class Projected(NamedTuple):
    """The block's tokens after the projections, before norm and rotation."""

    q_BTD: Tensor
    k_BTD: Tensor
    v_BTD: Tensor
    q_weight_D: Tensor | None
    """Of the RMSNorm of the queries; None: they are not normed."""
    k_weight_D: Tensor | None
    eps: float
    num_heads: int
    rope: tuple[Tensor, Tensor]
    """Cosines and sines, each [T, K/2], or [B, 1, T, K/2] where rows stand at different places."""

    def rows(self, start: int, stop: int, rope: tuple[Tensor, Tensor]) -> Projected:
        """Some rows of the batch."""
        return self._replace(
            q_BTD=self.q_BTD[start:stop], k_BTD=self.k_BTD[start:stop], v_BTD=self.v_BTD[start:stop], rope=rope
        )


class Appends(Protocol):
    """What the reference needs of a cache (`streamgen.transformer.BlockCache`)."""

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]: ...


Norm = Callable[[Tensor, Tensor | None, float, int], Tensor]
NormRope = Callable[[Tensor, Tensor | None, float, int, Tensor, Tensor], Tensor]
AttendCached = Callable[[Any, int, Projected, Tensor | None, str], Tensor]
"""(cache, layer, projected, mask, attention backend) -> [B, N, T, K]."""


def by_parts(rms_norm: Norm, rms_norm_rope: NormRope) -> AttendCached:
    """One operation after the other, through `append`: for every cache, with and without gradients."""

    def attend_cached(cache: Any, layer: int, p: Projected, mask: Tensor | None, backend: str) -> Tensor:
        q_BNTK = rms_norm_rope(p.q_BTD, p.q_weight_D, p.eps, p.num_heads, *p.rope)
        v_BNTK = p.v_BTD.unflatten(-1, (p.num_heads, -1)).transpose(1, 2)
        k_BNTK = rms_norm(p.k_BTD, p.k_weight_D, p.eps, p.num_heads)
        if isinstance(cache, RowsCache):
            return cache.attend(layer, q_BNTK, k_BNTK, v_BNTK, backend)
        appends: Appends = cache
        return attend(q_BNTK, *appends.append(layer, k_BNTK, v_BNTK), mask, backend)

    return attend_cached


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheKernels:
    """The kernels of `fused` (`streamgen_kernels`: norm_rope, norm_rope_store, ring_attention, ring_rope)."""

    norm_rope: Callable[..., Tensor]
    store: Callable[..., Tensor]
    ring_attention: Callable[..., Tensor]
    turn: Turn


def fused(kernels: CacheKernels) -> AttendCached:
    """The same in two launches, where nobody differentiates and the ring can be written; else `by_parts`."""
    parts = by_parts(kernels.norm_rope, kernels.norm_rope)

    def attend_cached(cache: Any, layer: int, p: Projected, mask: Tensor | None, backend: str) -> Tensor:
        if isinstance(cache, RowsCache):
            out, start = [], 0
            for handle, size in zip(cache.handles, cache.sizes, strict=True):
                rows = p.rows(start, start + size, handle.rope())
                out.append(attend_cached(handle, layer, rows, None, backend))
                start += size
            return torch.cat(out)
        graded = torch.is_grad_enabled() and any(x.requires_grad for x in (p.q_BTD, p.k_BTD, p.v_BTD))
        find = getattr(cache, "slots", None)  # caches of other forms, as layers spread over processes, have `append`
        slots: Slots | None = None if find is None or graded or mask is not None else find(layer, kernels.turn)
        if slots is None:
            return parts(cache, layer, p, mask, backend)
        return _attend_slots(kernels, slots, p, backend)

    return attend_cached


def _attend_slots(kernels: CacheKernels, slots: Slots, p: Projected, backend: str) -> Tensor:
    codes = slots.codes
    scales = None if codes is None else (codes.k_scale_BNS, codes.v_scale_BNS)
    q_BNTK = kernels.store(
        (p.q_BTD, p.k_BTD, p.v_BTD), (p.q_weight_D, p.k_weight_D), p.eps, p.rope,
        slots.places_BT, (slots.k_BNSK, slots.v_BNSK), slots.raw_k_BNSK, scales,
    )  # fmt: skip
    if codes is None:
        seen = slots.seen_tokens
        return attend(q_BNTK, slots.k_BNSK[:, :, :seen], slots.v_BNSK[:, :, :seen], None, backend)
    return kernels.ring_attention(
        q_BNTK,
        slots.k_BNSK,
        slots.v_BNSK,
        codes.lengths_B,
        codes.pages_BP,
        codes.page_tokens,
        block_k_BNTK=kernels.norm_rope(p.k_BTD, p.k_weight_D, p.eps, p.num_heads, *p.rope),
        block_v_BNTK=p.v_BTD.unflatten(-1, (p.num_heads, -1)).transpose(1, 2),
        k_scale_BNS=codes.k_scale_BNS,
        v_scale_BNS=codes.v_scale_BNS,
    )
