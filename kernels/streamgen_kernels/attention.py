"""Attention over a cache ring and the block in progress: softmax(q k^T / sqrt(K)) v with per-row lengths, in place.

The ring is read where it lies: the sink and what follows are pages of `page_tokens` tokens (a latent frame each) of a
head-major buffer [B, N, S, K], found through a table of pages, of which every row of the batch has its own number. The
block's own keys and values come from their own tensors. Nothing is concatenated, and lengths are read on the device, so
that rows at different places of their videos share a launch, and a graph that was captured once serves them all.

Keys and values may be stored as int8 or float8_e4m3fn with a scale per token and head (`quantise.py`); they are
widened in registers, the key's scale multiplies its column of scores, the value's its probability: exact, and K times
fewer multiplications than scaling the vectors.

Online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; FlashAttention-2, arXiv 2307.08691) in float32.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamgen_kernels.common import INTERPRETED, check_place, check_shape, loop_end, power_of_2
from streamgen_kernels.quantise import LEAST

STORED = (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
"""Dtypes in which a ring may be stored."""
_LOWEST = tl.constexpr(-1e30)  # not -inf: the difference of two must be a number


def reference(
    q_BNTK: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    lengths_B: Tensor,
    pages_BP: Tensor,
    page_tokens: int,
    block_k_BNTK: Tensor | None = None,
    block_v_BNTK: Tensor | None = None,
    k_scale_BNS: Tensor | None = None,
    v_scale_BNS: Tensor | None = None,
) -> Tensor:
    """In plain torch, a row of the batch at a time, with copies."""
    out = []
    for b in range(len(q_BNTK)):
        held = torch.arange(int(lengths_B[b]), device=q_BNTK.device)
        places = pages_BP[b].long()[held // page_tokens] * page_tokens + held % page_tokens
        seen = []
        for ring, scale, block in (
            (ring_k_BNSK, k_scale_BNS, block_k_BNTK),
            (ring_v_BNSK, v_scale_BNS, block_v_BNTK),
        ):
            past = ring[b][:, places].float()
            past = past if scale is None else past * scale[b][:, places, None].float()
            seen.append(past if block is None else torch.cat((past, block[b].float()), 1))
        scores = q_BNTK[b].float() @ seen[0].transpose(1, 2) * q_BNTK.shape[-1] ** -0.5
        out.append(scores.softmax(-1) @ seen[1])
    return torch.stack(out).to(q_BNTK.dtype)


@triton.jit
def _look(  # type: ignore[no-untyped-def]
    q, k_ptr, v_ptr, k_token, v_token, k_scale_ptr, v_scale_ptr, places, keep, peak, total, acc,
    SCALED: tl.constexpr, K: tl.constexpr, K2: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the new maximum, sum and weighted values of the online softmax."""
    inner = tl.arange(0, K2)
    inside = keep[:, None] & (inner < K)[None, :]
    far = places.to(tl.int64)
    k = tl.load(k_ptr + far[:, None] * k_token + inner[None, :], inside, 0.0).to(q.dtype)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SCALED:
        scores = scores * tl.load(k_scale_ptr + far, keep, 0.0).to(tl.float32)[None, :]
    scores = tl.where(keep[None, :], scores, _LOWEST)
    highest = tl.maximum(peak, tl.max(scores, 1))
    weights = tl.where(keep[None, :], tl.exp2(scores - highest[:, None]), 0.0)
    shrink = tl.exp2(peak - highest)
    total = total * shrink + tl.sum(weights, 1)
    if SCALED:
        weights = weights * tl.load(v_scale_ptr + far, keep, 0.0).to(tl.float32)[None, :]
    v = tl.load(v_ptr + far[:, None] * v_token + inner[None, :], inside, 0.0).to(q.dtype)
    return highest, total, acc * shrink[:, None] + tl.dot(weights.to(q.dtype), v, input_precision="ieee")


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    q_ptr, k_ptr, v_ptr, block_k_ptr, block_v_ptr, k_scale_ptr, v_scale_ptr, lengths_ptr, pages_ptr, out_ptr,
    q_b, q_n, q_t, k_b, k_n, k_s, v_b, v_n, v_s, bk_b, bk_n, bk_t, bv_b, bv_n, bv_t, scale_b, scale_n,
    pages_b, page_tokens, T, block_tokens, softmax_scale,
    N: tl.constexpr, K: tl.constexpr, K2: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGED: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    b = (tl.program_id(1) // N).to(tl.int64)
    n = (tl.program_id(1) % N).to(tl.int64)
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    inner = tl.arange(0, K2)
    keep_q = (rows < T)[:, None] & (inner < K)[None, :]
    far = rows[:, None].to(tl.int64)
    q = tl.load(q_ptr + b * q_b + n * q_n + far * q_t + inner[None, :], keep_q, 0.0)
    q = (q.to(tl.float32) * softmax_scale).to(tl.float32 if WIDE else q_ptr.dtype.element_ty)
    peak = tl.full((BM,), _LOWEST, tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, K2), tl.float32)
    length = tl.load(lengths_ptr + b)
    scales = b * scale_b + n * scale_n
    for start in range(0, loop_end(length), BN):
        tokens = start + tl.arange(0, BN)
        keep = tokens < length
        if PAGED:  # a gather of page numbers and not a loop over pages: tiles stay full whatever the size of a frame
            page = tl.load(pages_ptr + b * pages_b + tokens // page_tokens, keep, 0)
            tokens = page * page_tokens + tokens % page_tokens
        peak, total, acc = _look(
            q, k_ptr + b * k_b + n * k_n, v_ptr + b * v_b + n * v_n, k_s, v_s,
            k_scale_ptr + scales, v_scale_ptr + scales, tokens, keep, peak, total, acc, SCALED, K, K2,
        )  # fmt: skip
    if BLOCK:
        for start in range(0, loop_end(block_tokens), BN):
            tokens = start + tl.arange(0, BN)
            peak, total, acc = _look(
                q, block_k_ptr + b * bk_b + n * bk_n, block_v_ptr + b * bv_b + n * bv_n, bk_t, bv_t,
                k_scale_ptr, v_scale_ptr, tokens, tokens < block_tokens, peak, total, acc, False, K, K2,
            )  # fmt: skip
    out = acc / tl.where(total > 0.0, total, 1.0)[:, None]  # a row that sees nothing is zero
    places = ((b * N + n) * T + far) * K + inner[None, :]
    tl.store(out_ptr + places, out, keep_q)


@torch.library.custom_op("streamgen::ring_attention", mutates_args=())
def _op(
    q_BNTK: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    lengths_B: Tensor,
    pages_BP: Tensor | None,
    page_tokens: int,
    block_k_BNTK: Tensor | None,
    block_v_BNTK: Tensor | None,
    k_scale_BNS: Tensor | None,
    v_scale_BNS: Tensor | None,
) -> Tensor:
    q, k, v = (_inner_dense(x) for x in (q_BNTK, ring_k_BNSK, ring_v_BNSK))
    block_k, block_v = (k if x is None else _inner_dense(x) for x in (block_k_BNTK, block_v_BNTK))
    B, N, T, K = q.shape
    out = q.new_empty(B, N, T, K)
    # [128, 64] tiles of 8 warps hold q, acc and the scores of 128-wide heads in registers; short blocks waste less with
    # fewer queries. float32 has no tensor cores at full precision: small tiles, or the code is a megabyte.
    exact = q.dtype == torch.float32
    queries, keys = (32, 32) if exact and not INTERPRETED else (64 if T <= 64 else 128, 64)
    queries = max(16, min(queries, power_of_2(T)))
    scaled = k_scale_BNS is not None
    scales = (k_scale_BNS, v_scale_BNS) if scaled else (lengths_B, lengths_B)
    wide = q.dtype == torch.float32 or (INTERPRETED and q.dtype == torch.bfloat16)  # its bf16 products are wrong
    _kernel[triton.cdiv(T, queries), B * N](
        q, k, v, block_k, block_v, *scales, lengths_B, lengths_B if pages_BP is None else pages_BP, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *block_k.stride()[:3], *block_v.stride()[:3],
        *(k_scale_BNS.stride()[:2] if k_scale_BNS is not None else (0, 0)),
        0 if pages_BP is None else pages_BP.stride(0), page_tokens, T,
        0 if block_k_BNTK is None else block_k.shape[2], K**-0.5 * math.log2(math.e),
        N=N, K=K, K2=max(16, power_of_2(K)), BM=queries, BN=keys, PAGED=pages_BP is not None,
        BLOCK=block_k_BNTK is not None, SCALED=scaled, WIDE=wide, num_warps=8 if queries == 128 else 4,
    )  # fmt: skip
    return out


def _inner_dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@_op.register_fake
def _(
    q_BNTK: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    lengths_B: Tensor,
    pages_BP: Tensor | None,
    page_tokens: int,
    block_k_BNTK: Tensor | None,
    block_v_BNTK: Tensor | None,
    k_scale_BNS: Tensor | None,
    v_scale_BNS: Tensor | None,
) -> Tensor:
    return torch.empty_like(q_BNTK, memory_format=torch.contiguous_format)


def ring_attention(
    q_BNTK: Tensor,
    ring_k_BNSK: Tensor,
    ring_v_BNSK: Tensor,
    lengths_B: Tensor,
    pages_BP: Tensor | None = None,
    page_tokens: int = 1,
    *,
    block_k_BNTK: Tensor | None = None,
    block_v_BNTK: Tensor | None = None,
    k_scale_BNS: Tensor | None = None,
    v_scale_BNS: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v over the ring's first `lengths_B` tokens and the block -> [B, N, T, K], q's dtype.

    lengths_B: int32, visible tokens of the ring, in the order of the page table (not checked: they are on the device;
    a row that sees nothing comes out zero). pages_BP: int32, which page of `page_tokens` tokens comes when; none: the
    ring from its start. Scales: float32 or float16, needed exactly for int8 and float8_e4m3fn rings. Forward only.
    ValueError for shapes, dtypes and devices that do not go together.
    """
    B, N, _, K = q_BNTK.shape
    S = ring_k_BNSK.shape[2]
    check_place(q_BNTK, ring_k_BNSK, ring_v_BNSK, lengths_B)
    for name, ring in (("ring_k", ring_k_BNSK), ("ring_v", ring_v_BNSK)):
        check_shape(name, ring, (B, N, S, K))
        if ring.dtype not in STORED or ring.dtype != ring_k_BNSK.dtype:
            raise ValueError(f"{name} is {ring.dtype}: keys and values must both be one of {STORED}")
    check_shape("lengths", lengths_B, (B,))
    for name, index in (("lengths", lengths_B), ("pages", pages_BP)):
        if index is not None and index.dtype != torch.int32:
            raise ValueError(f"{name} is {index.dtype}: must be int32")
    if pages_BP is not None:
        check_place(q_BNTK, pages_BP)
        check_shape("pages", pages_BP, (B, pages_BP.shape[-1]))
    _check_block(q_BNTK, block_k_BNTK, block_v_BNTK)
    _check_scales(ring_k_BNSK, k_scale_BNS, v_scale_BNS)
    out: Tensor = _op(
        q_BNTK, ring_k_BNSK, ring_v_BNSK, lengths_B, pages_BP, page_tokens,
        block_k_BNTK, block_v_BNTK, k_scale_BNS, v_scale_BNS,
    )  # fmt: skip
    return out


def attend(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
    """Every query sees every key: `ring_attention` of a ring that is full."""
    lengths = torch.full((len(q_BNTK),), k_BNSK.shape[2], dtype=torch.int32, device=q_BNTK.device)
    return ring_attention(q_BNTK, k_BNSK, v_BNSK, lengths)


def _check_block(q_BNTK: Tensor, block_k_BNTK: Tensor | None, block_v_BNTK: Tensor | None) -> None:
    if (block_k_BNTK is None) != (block_v_BNTK is None):
        raise ValueError("the block's keys and values go together: give both or neither")
    for name, block in (("block_k", block_k_BNTK), ("block_v", block_v_BNTK)):
        if block is None or block_k_BNTK is None:
            continue
        check_place(q_BNTK, block)
        check_shape(name, block, (*q_BNTK.shape[:2], block_k_BNTK.shape[2], q_BNTK.shape[3]))
        if block.dtype != q_BNTK.dtype:
            raise ValueError(f"{name} is {block.dtype}: must be as the queries, {q_BNTK.dtype}")


def _check_scales(ring_k_BNSK: Tensor, k_scale_BNS: Tensor | None, v_scale_BNS: Tensor | None) -> None:
    small = ring_k_BNSK.dtype in (torch.int8, torch.float8_e4m3fn)
    for name, scale in (("k_scale", k_scale_BNS), ("v_scale", v_scale_BNS)):
        if (scale is not None) != small:
            raise ValueError(f"{name}: a ring of {ring_k_BNSK.dtype} {'needs' if small else 'has no'} scales")
        if scale is None or k_scale_BNS is None:
            continue
        check_place(ring_k_BNSK, scale)
        check_shape(name, scale, tuple(ring_k_BNSK.shape[:3]))
        if scale.dtype not in LEAST or scale.dtype != k_scale_BNS.dtype or not scale.is_contiguous():
            raise ValueError(f"{name} is {scale.dtype}: both must be contiguous, float32 or float16")
