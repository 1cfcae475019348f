"""What precedes cached attention, in one launch: q and k normed, split and turned; k and v put into the ring's slots.

A program takes whole tokens of q, k and v, so that each is read once and nothing but the result is written: queries
head-major, keys and values straight to where attention reads them (`attention.py`), rotated and, if a second ring is
given, un-rotated as well (for policies that re-index positions). Rings of int8 or float8_e4m3fn get their scales here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels import norm_rope, quantise
from streamgen_kernels.common import check_place, check_shape
from streamgen_kernels.norm_rope import check_heads, check_tables, check_weight, head_launch, head_tile, rms_inverse
from streamgen_kernels.norm_rope import turned as rotated_pairs
from streamgen_kernels.quantise import LARGEST, LEAST, eight_bits


def reference(
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    rope: tuple[Tensor, Tensor],
    places_BT: Tensor,
    rings: tuple[Tensor, Tensor],
    raw_k_BNSK: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """In plain torch, ring by ring."""
    N = rings[0].shape[1]
    q, k, v = qkv
    written = [norm_rope.reference(k, weights[1], eps, N, *rope), norm_rope.reference(v, None, eps, N, None, None)]
    targets = list(rings)
    if raw_k_BNSK is not None:
        written.append(norm_rope.reference(k, weights[1], eps, N, None, None))
        targets.append(raw_k_BNSK)
    for index, (value_BNTK, ring) in enumerate(zip(written, targets, strict=True)):
        for b, places in enumerate(places_BT.long()):
            if scales is None or index == 2:
                ring[b, :, places] = value_BNTK[b].to(ring.dtype)
                continue
            small, scale = quantise.reference(value_BNTK[b], ring.dtype, scales[index].dtype)
            scales[index][b, :, places] = scale
            ring[b].view(torch.uint8)[:, places] = small.view(torch.uint8)  # torch indexes no float8
    return norm_rope.reference(q, weights[0], eps, N, *rope)


@triton.jit
def _put(  # type: ignore[no-untyped-def]
    x, ring_ptr, scale_ptr, places, keep, ring_b, ring_n, ring_s, scale_b, scale_n, b, heads, inner,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    """[R, N2, K2] into the slots of its tokens."""
    if LARGEST > 0:
        x, scale = eight_bits(x, 2, scale_ptr, LARGEST, INTEGER, LEAST)
        first = tl.max(keep.to(tl.int32), 2) > 0
        flat_heads = tl.arange(0, x.shape[1])[None, :]
        row_b = tl.reshape(b, (x.shape[0], 1))
        row_places = tl.reshape(places, (x.shape[0], 1))
        tl.store(scale_ptr + row_b * scale_b + flat_heads * scale_n + row_places, scale, first)
    target = ring_ptr + b * ring_b + heads * ring_n + places * ring_s + inner
    tl.store(target, x.to(ring_ptr.dtype.element_ty), keep)


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, places_ptr, out_ptr,
    ring_k_ptr, ring_v_ptr, raw_k_ptr, k_scale_ptr, v_scale_ptr,
    k_b, k_n, k_s, v_b, v_n, v_s, raw_b, raw_n, raw_s, scale_b, scale_n, T, total, eps,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, RAW: tl.constexpr,
    LARGEST: tl.constexpr, INTEGER: tl.constexpr, LEAST: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, N2: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * R + tl.arange(0, R)
    heads, inner, keep = head_tile(rows, total, N, K, N2, K2)
    wide = rows[:, None, None].to(tl.int64)
    b = wide // T
    source = wide * (N * K) + heads * K + inner
    inside = (heads < N) & (inner < K)
    places = tl.load(places_ptr + wide, (rows < total)[:, None, None], 0).to(tl.int64)

    q = tl.load(q_ptr + source, keep, 0.0).to(tl.float32)
    if NORM_Q:
        weight = tl.load(q_weight_ptr + heads * K + inner, inside, 0.0).to(tl.float32)
        q = q * rms_inverse(q, eps, N * K) * weight
    q = rotated_pairs(q, cos_ptr, sin_ptr, rows % T, rows < total, 1, K, R, N2, K2)
    tl.store(out_ptr + ((b * N + heads) * T + wide % T) * K + inner, q, keep)

    k = tl.load(k_ptr + source, keep, 0.0).to(tl.float32)
    if NORM_K:
        weight = tl.load(k_weight_ptr + heads * K + inner, inside, 0.0).to(tl.float32)
        k = k * rms_inverse(k, eps, N * K) * weight
    if RAW:
        raw = raw_k_ptr + b * raw_b + heads * raw_n + places * raw_s + inner
        tl.store(raw, k.to(raw_k_ptr.dtype.element_ty), keep)
    k = rotated_pairs(k, cos_ptr, sin_ptr, rows % T, rows < total, 1, K, R, N2, K2)
    _put(
        k, ring_k_ptr, k_scale_ptr, places, keep, k_b, k_n, k_s, scale_b, scale_n, b, heads, inner,
        LARGEST, INTEGER, LEAST,
    )  # fmt: skip
    v = tl.load(v_ptr + source, keep, 0.0).to(tl.float32)
    _put(
        v, ring_v_ptr, v_scale_ptr, places, keep, v_b, v_n, v_s, scale_b, scale_n, b, heads, inner,
        LARGEST, INTEGER, LEAST,
    )  # fmt: skip


@torch.library.custom_op(
    "streamgen::norm_rope_store", mutates_args=("ring_k_BNSK", "ring_v_BNSK", "raw_k_BNSK", "k_scale", "v_scale")
)
def _op(
    q_BTD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_TK: Tensor,
    sin_TK: Tensor,
    places_BT: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    raw_k_BNSK: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    q, k, v = q_BTD.contiguous(), k_BTD.contiguous(), v_BTD.contiguous()
    B, T, D = q.shape
    N = ring_k_BNSK.shape[1]
    out = q.new_empty(B, N, T, D // N)
    programs, sizes = head_launch(B * T, N, D)
    raw = ring_k_BNSK if raw_k_BNSK is None else raw_k_BNSK
    scales = (q, q) if k_scale is None else (k_scale, v_scale)
    _kernel[(programs,)](
        q, k, v, q if q_weight_D is None else q_weight_D, k if k_weight_D is None else k_weight_D,
        cos_TK.contiguous(), sin_TK.contiguous(), places_BT.contiguous(), out, ring_k_BNSK, ring_v_BNSK, raw, *scales,
        *ring_k_BNSK.stride()[:3], *ring_v_BNSK.stride()[:3], *raw.stride()[:3],
        *((0, 0) if k_scale is None else k_scale.stride()[:2]), T, B * T, eps,
        NORM_Q=q_weight_D is not None, NORM_K=k_weight_D is not None, RAW=raw_k_BNSK is not None,
        LARGEST=0.0 if k_scale is None else LARGEST[ring_k_BNSK.dtype], INTEGER=ring_k_BNSK.dtype == torch.int8,
        LEAST=0.0 if k_scale is None else LEAST[k_scale.dtype], **sizes,
    )  # fmt: skip
    return out


@_op.register_fake
def _(
    q_BTD: Tensor,
    k_BTD: Tensor,
    v_BTD: Tensor,
    q_weight_D: Tensor | None,
    k_weight_D: Tensor | None,
    eps: float,
    cos_TK: Tensor,
    sin_TK: Tensor,
    places_BT: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    raw_k_BNSK: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> Tensor:
    B, T, D = q_BTD.shape
    N = ring_k_BNSK.shape[1]
    return q_BTD.new_empty(B, N, T, D // N)


def norm_rope_store(
    qkv: tuple[Tensor, Tensor, Tensor],
    weights: tuple[Tensor | None, Tensor | None],
    eps: float,
    rope: tuple[Tensor, Tensor],
    places_BT: Tensor,
    rings: tuple[Tensor, Tensor],
    raw_k_BNSK: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Writes k (rotated) and v of [B, T, D] into the rings [B, N, S, K] -> the queries [B, N, T, K], ready to attend.

    weights: of the norms of q and k, None: no norm. rope: float32 [T, K/2] each, of the block's frames. places_BT:
    int32, the token's place in its row's ring, below S and no place twice in a row (not checked: they are on the
    device). raw_k_BNSK: also gets the keys as they were before the rotation. scales: float32 or float16 [B, N, S] of
    keys and values, written too; needed exactly for rings of int8 and float8_e4m3fn. Forward only.
    ValueError for shapes, dtypes and devices that do not go together.
    """
    B, _, N, S, K = len(qkv[0]), *rings[0].shape
    q = qkv[0]
    check_heads(q, N)
    check_tables(q, N, *rope)
    for name, x in zip("qkv", qkv, strict=True):
        check_place(q, x)
        check_shape(name, x, tuple(q.shape))
    for name, weight in zip(("weight of q", "weight of k"), weights, strict=True):
        check_weight(name, weight, q)
    check_shape("places", places_BT, tuple(q.shape[:2]))
    if places_BT.dtype != torch.int32:
        raise ValueError(f"places is {places_BT.dtype}: must be int32")
    _check_rings((B, N, S, K), q, [*rings, *([] if raw_k_BNSK is None else [raw_k_BNSK])], places_BT)
    if (rings[0].dtype in LARGEST) != (scales is not None) or rings[0].dtype != rings[1].dtype:
        raise ValueError(
            f"rings of {rings[0].dtype} and {rings[1].dtype} {'with' if scales else 'without'} scales: both must have "
            "one dtype, and scales if that is int8 or float8_e4m3fn"
        )
    for scale in scales or ():
        check_place(q, scale)
        check_shape("scale", scale, (B, N, S))
        if scale.dtype not in LEAST or not scale.is_contiguous():
            raise ValueError(f"scale is {scale.dtype}: must be contiguous float32 or float16")
    out: Tensor = _op(*qkv, *weights, eps, *rope, places_BT, *rings, raw_k_BNSK, *(scales or (None, None)))
    return out


def _check_rings(shape: tuple[int, int, int, int], q: Tensor, rings: list[Tensor], places_BT: Tensor) -> None:
    check_place(q, places_BT, *rings)
    for ring in rings:
        check_shape("ring", ring, shape)
        if ring.stride(-1) != 1:
            raise ValueError(f"ring: strides {ring.stride()}, the last must be 1")
