"""Attention backends, and the one rule that says who sees whom.

Letters: B batch, N heads, T query tokens, S key tokens, K head width. Masks are bool [T, S], True where a query may
look. Frames are latent frames; a window counts all visible frames: sink, past and the query's own block.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def _sdpa(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask_TS: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q_BNTK, k_BNSK, v_BNSK, attn_mask=mask_TS)


def _math(q_BNTK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor, mask_TS: Tensor | None) -> Tensor:
    scores = (q_BNTK * q_BNTK.shape[-1] ** -0.5) @ k_BNSK.transpose(-2, -1)
    if mask_TS is not None:
        scores = scores.masked_fill(~mask_TS, float("-inf"))
    return scores.softmax(dim=-1) @ v_BNSK


class Backend(NamedTuple):
    """One way to compute softmax(q k^T / sqrt(K)) v."""

    attend: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    limits: str
    """What it is for and what it costs."""


BACKENDS = {
    "sdpa": Backend(
        _sdpa,
        "torch's fused kernel: any device and mask; on a CPU its backward is the slowest part of a step",
    ),
    "math": Backend(
        _math,
        "written out, holds [B, N, T, S] scores: faster to train under torch.compile on a CPU",
    ),
}


def attend(
    q_BNTK: Tensor,
    k_BNSK: Tensor,
    v_BNSK: Tensor,
    mask_TS: Tensor | None = None,
    backend: str = "sdpa",
) -> Tensor:
    """softmax(q k^T / sqrt(K)) v -> [B, N, T, K]. No mask: every query sees every key."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: no such attention backend; choose from {', '.join(BACKENDS)}")
    return BACKENDS[backend].attend(q_BNTK, k_BNSK, v_BNSK, mask_TS)


def visible(
    q_block: Tensor,
    q_block_stop: Tensor,
    q_clean: Tensor,
    k_frame: Tensor,
    k_block: Tensor,
    k_clean: Tensor,
    window_frames: int | None,
    sink_frames: int,
) -> Tensor:
    """May a query look at a key? The arguments broadcast; frames are absolute, `q_block_stop` ends the query's block.

    Own block: always and in both directions, within the same copy (clean with clean, noisy with noisy).
    Past blocks: only their clean copy, and only the sink (never evicted) and the last window - sink frames, the own
    block included: exactly what the ring cache holds while this block is made.
    """
    own = (k_block == q_block) & (k_clean == q_clean)
    past = (k_block < q_block) & k_clean
    if window_frames is None:
        return own | past
    kept = (k_frame < sink_frames) | (k_frame >= q_block_stop - (window_frames - sink_frames))
    return own | (past & kept)


def block_causal_mask(
    block_frames: Sequence[int],
    tokens_per_frame: int,
    *,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Bool [T, T] for a clean video of blocks of the given sizes: what cached streaming computes, in one forward."""
    return _mask(block_frames, tokens_per_frame, (True,), window_frames, sink_frames)


def teacher_forcing_mask(
    block_frames: Sequence[int],
    tokens_per_frame: int,
    *,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Bool [2T, 2T] for [clean | noisy] copies of one video joined along time; both halves have the same positions.

    Clean block b sees clean blocks up to b, noisy block b sees clean blocks before b and itself, within the window.
    """
    return _mask(block_frames, tokens_per_frame, (True, False), window_frames, sink_frames)


def _mask(
    block_frames: Sequence[int],
    tokens_per_frame: int,
    copies: tuple[bool, ...],
    window_frames: int | None,
    sink_frames: int,
) -> Tensor:
    if window_frames is not None and window_frames < sink_frames + max(block_frames):
        raise ValueError(
            f"window_frames={window_frames}: must hold the sink ({sink_frames}) and a block ({max(block_frames)})"
        )
    sizes = torch.tensor(block_frames)
    block = torch.repeat_interleave(sizes).repeat(len(copies))
    frame = torch.arange(int(sizes.sum())).repeat(len(copies))
    stop = sizes.cumsum(0)[block]
    clean = torch.tensor(copies).repeat_interleave(int(sizes.sum()))
    frames_FF = visible(
        block[:, None],
        stop[:, None],
        clean[:, None],
        frame,
        block,
        clean,
        window_frames,
        sink_frames,
    )
    return frames_FF.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
