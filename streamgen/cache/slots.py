"""What a cache tells kernels that write its ring themselves (`streamgen.cached_attention`). Letters as in kv.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from streamgen.rope import apply_rope


class Slots(NamedTuple):
    """One layer of the ring for kernels that write a block's keys and values themselves, and then read in place."""

    k_BNSK: Tensor
    """Keys as attention reads them: rotated."""
    v_BNSK: Tensor
    raw_k_BNSK: Tensor | None
    """Also gets the keys as they are before the rotation, where those are what is kept."""
    places_BT: Tensor
    """int32: the slot of each of the block's tokens."""
    seen_tokens: int
    """The filled prefix, the block included; of a ring of codes what is before the block alone."""
    codes: Codes | None = None


class Codes(NamedTuple):
    """What a ring of one-byte numbers has besides; the block in progress is seen as it is, not by its codes."""

    k_scale_BNS: Tensor
    v_scale_BNS: Tensor
    lengths_B: Tensor
    """int32: tokens of the past."""
    pages_BP: Tensor
    """int32: the slots of the past's frames, in any order."""
    page_tokens: int


Turn = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""(keys [B, N, S, K], cos, sin [S, K/2], where the rotated ones go)."""


def turn(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    """Rotate keys from one ring into another."""
    out_BNSK.copy_(apply_rope(k_BNSK, cos_SK, sin_SK))
