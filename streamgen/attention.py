"""Attention backends: one table of ways to compute softmax(q k^T / sqrt(K)) v, with what each is for.

Letters: B batch, N heads, T query tokens, S key tokens, K head width. Masks are those of `streamgen.visibility`: bool
[T, S], True where a query may look, or the same rule as a BlockMask (backend `flex`) or as Spans (backend `spans`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from os import environ
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from streamgen.errors import UserError
from streamgen.linear import attend_by_heads, attends_by_heads
from streamgen.visibility import Spans

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def _sdpa(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q_BNTK, k_BNSK, v_BNSK, attn_mask=mask)


def _math(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Tensor | None) -> Tensor:
    scores = (q_BNTK * q_BNTK.shape[-1] ** -0.5) @ k_BNSK.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(dim=-1) @ v_BNSK


def _spans(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    if mask is None:
        return _math(q_BNTK, k_BNSK, v_BNSK, None)
    if not isinstance(mask, Spans) or not mask.tokens == q_BNTK.shape[2] == k_BNSK.shape[2]:
        kind = f"spans of {mask.tokens} tokens" if isinstance(mask, Spans) else f"a {type(mask).__name__}"
        raise ValueError(
            f"backend='spans' got {kind}: it needs `span_mask` for {q_BNTK.shape[2]} x {k_BNSK.shape[2]} tokens"
        )
    outs = []
    for (start, stop), keys in mask.seen:
        k, v = (torch.cat([x[:, :, a:b] for a, b in keys], 2) for x in (k_BNSK, v_BNSK))
        outs.append(_math(q_BNTK[:, :, start:stop], k, v, None))
    return torch.cat(outs, 2)


SMALL_SCORES = 1 << 25
"""Scores of an attention that may be held in memory, for `auto`."""


def _products(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
    """Written out as two batched products with the scale in the first; holds the scores."""
    B, N, T, K = q_BNTK.shape
    S = k_BNSK.shape[2]
    q, k, v = (x.reshape(B * N, -1, K) for x in (q_BNTK, k_BNSK, v_BNSK))
    scores = torch.baddbmm(q.new_empty(1).expand(B * N, T, S), q, k.transpose(1, 2), beta=0, alpha=K**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).view(B, N, T, K)


def _auto(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Tensor | None) -> Tensor:
    """By a rule and not by a measurement: the same stream must come out the same in the next process.

    On a CPU torch's fused kernel does the bf16 products in fp32: 2.5 ms where two products take 0.9
    (1 x 5 heads, 192 queries, 768 keys, 64 wide, one thread of a Zen 5). In fp32 it multiplies with MKL
    (`streamgen.linear`).
    """
    small = q_BNTK.shape[0] * q_BNTK.shape[1] * q_BNTK.shape[2] * k_BNSK.shape[2] <= SMALL_SCORES
    plain = mask is None and not torch.is_grad_enabled()
    if plain and small and q_BNTK.dtype == torch.bfloat16 and q_BNTK.device.type == "cpu":
        return _products(q_BNTK, k_BNSK, v_BNSK)
    if plain and attends_by_heads(q_BNTK, k_BNSK):
        return attend_by_heads(q_BNTK, k_BNSK, v_BNSK)
    return _sdpa(q_BNTK, k_BNSK, v_BNSK, mask)


@cache
def _flex_kernel(device_type: str) -> Callable[..., Any]:
    """Compiled on a GPU: there the uncompiled op holds all scores, and is only good for comparing."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel: Callable[..., Any] = flex_attention
    return kernel if device_type == "cpu" else torch.compile(kernel, dynamic=False)


def _flex(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    if mask is None:  # text, cached streaming: the fused kernel
        return _sdpa(q_BNTK, k_BNSK, v_BNSK, None)
    lengths, made_for = (q_BNTK.shape[2], k_BNSK.shape[2]), tuple(mask.shape[-2:])
    if isinstance(mask, Tensor) or made_for != lengths:  # the op itself takes a longer mask, and the wrong places
        kind = "a dense mask" if isinstance(mask, Tensor) else f"a block mask for {made_for[0]} x {made_for[1]} tokens"
        raise ValueError(f"backend='flex' got {kind}: it needs one of `flex_mask` for {lengths[0]} x {lengths[1]}")
    out: Tensor = _flex_kernel(q_BNTK.device.type)(q_BNTK, k_BNSK, v_BNSK, block_mask=mask)
    return out


@cache
def _triton_kernel() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from streamgen.ops import kernel_attention

    return kernel_attention()


def _triton(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    _refuse_mask("triton", mask)
    return _triton_kernel()(q_BNTK, k_BNSK, v_BNSK)


def _cudnn(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Tensor | None) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    with sdpa_kernel(order, set_priority=True):
        return _sdpa(q_BNTK, k_BNSK, v_BNSK, mask)


def _xformers(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    from xformers.ops import memory_efficient_attention

    _refuse_mask("xformers", mask)
    out_BTNK: Tensor = memory_efficient_attention(*(x.transpose(1, 2) for x in (q_BNTK, k_BNSK, v_BNSK)))
    return out_BTNK.transpose(1, 2)


def _flash3(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask: Any) -> Tensor:
    from flash_attn_interface import flash_attn_func

    _refuse_mask("flash3", mask)
    out = flash_attn_func(*(x.transpose(1, 2) for x in (q_BNTK, k_BNSK, v_BNSK)))
    out_BTNK: Tensor = out[0] if isinstance(out, tuple) else out  # its first versions also gave the log-sum-exp
    return out_BTNK.transpose(1, 2)


def _refuse_mask(name: str, mask: Any) -> None:
    if mask is not None:
        raise ValueError(f"backend={name!r} got a mask: it is for cached streaming and text, where all keys are seen")


class Backend(NamedTuple):
    """One way to compute softmax(q k^T / sqrt(K)) v."""

    attend: Callable[[Tensor, Tensor, Tensor, Any], Tensor]
    limits: str
    """What it is for and what it costs."""
    package: str = ""
    """What must be installed for it, by the name that is imported."""
    cuda: bool = False
    """It runs on CUDA devices alone."""
    masks: bool = True
    """It takes masks, and so may train."""
    float32: bool = True
    interpreted: bool = False
    """It also runs on a CPU, by Triton's interpreter."""

    def problem(self, device: torch.device, dtype: torch.dtype) -> str:
        """Why it cannot run on a device in a dtype, "" if it can."""
        if self.cuda and device.type != "cuda" and not (self.interpreted and environ.get("TRITON_INTERPRET") == "1"):
            return "it needs a CUDA device"
        if self.package and find_spec(self.package) is None:
            return f"{self.package} is not installed"
        if not self.float32 and dtype == torch.float32:
            return "it is made for bfloat16 and float16"
        return ""


BACKENDS = {
    "auto": Backend(
        _auto,
        "torch's fused kernel, but plain products on a CPU: in bf16 where the scores are few (3x faster), in fp32 head "
        "by head through oneDNN where MKL is slow (1.6x)",
    ),
    "sdpa": Backend(
        _sdpa,
        "torch's fused kernel: any device and mask; on a CPU its backward is the slowest part of a step",
    ),
    "cudnn": Backend(
        _cudnn,
        "torch's fused kernels, cuDNN's before the others: it is made for Hopper; `sdpa` where cuDNN has none",
    ),
    "math": Backend(
        _math,
        "written out, holds [B, N, T, S] scores: faster to train under torch.compile on a CPU",
    ),
    "spans": Backend(
        _spans,
        "written out, queries that see the same keys with those alone: under teacher forcing a third of the scores; "
        "for training under torch.compile on a CPU, with masks of `span_mask`, each of which compiles anew",
    ),
    "flex": Backend(
        _flex,
        "FlexAttention (PyTorch 2.5 on): passes over blocks of 128 x 128 tokens that nobody sees, and holds no mask of "
        "T x S; for training on a GPU, with masks of `flex_mask`. No backward on a CPU",
    ),
    "triton": Backend(
        _triton,
        "our kernel (`streamgen_kernels.attention`): reads views of the ring in place; needs a CUDA device and triton, "
        "takes no mask and has no backward",
        package="triton",
        cuda=True,
        masks=False,
        interpreted=True,
    ),
    "xformers": Backend(
        _xformers,
        "xformers' memory-efficient attention, for GPUs that torch's flash attention leaves out; takes no mask here",
        package="xformers",
        cuda=True,
        masks=False,
    ),
    "flash3": Backend(
        _flash3,
        "FlashAttention 3 (package flash_attn_interface), written for Hopper; bf16 and fp16, takes no mask here",
        package="flash_attn_interface",
        cuda=True,
        masks=False,
        float32=False,
    ),
}


def attend(
    q_BNTK: Tensor,
    k_BNSK: Tensor,
    v_BNSK: Tensor,
    mask: Tensor | BlockMask | Spans | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v -> [B, N, T, K]. No mask: every query sees every key."""
    check_backend(backend)
    return BACKENDS[backend].attend(q_BNTK, k_BNSK, v_BNSK, mask)


def check_backend(backend: str) -> None:
    """ValueError for a name that is none of BACKENDS."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: no such attention backend; choose from {', '.join(BACKENDS)}")


def check_trainable(backend: str, device: torch.device) -> None:
    """UserError for a backend that has no backward on a device."""
    if not BACKENDS[backend].masks:
        what = "has no backward" if backend == "triton" else "takes no mask"
        raise UserError(f"attention_backend={backend} {what}; train with sdpa, math, spans or flex")
    if backend == "flex" and device.type == "cpu":
        raise UserError("attention_backend=flex has no backward on a CPU; train with sdpa, math or spans there")
