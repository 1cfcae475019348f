"""Advance a stream by a rolling window: joint visibility (Rolling Forcing, arXiv 2509.25161, algorithm 1).

Consecutive blocks are denoised together, the oldest nearly clean and the newest pure noise; they see each other in both
directions, and the clean blocks before them in the cache. Every launch brings each block of the window one step on:

    launch w:   block     w-T+1   ...   w-1     w          T steps, noise levels sigma_0 > ... > sigma_T-1
                step       T-1    ...    1      0

The block at its last step is finished: it is committed, and a new one enters with the next launch. So a block costs one
launch of T blocks instead of T launches, and one in T of the waiting. Needs a model trained for joint visibility.
Latents are BFCHW, float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from streamgen.flow import timestep_of, to_x0
from streamgen.rollout import Sampling, StreamState, commit_block
from streamgen.samplers import SAMPLERS
from streamgen.transformer import CausalWanModel, TextContext

TextOfBlock = Callable[[int], TextContext]


@dataclass(slots=True)
class RollingWindow:
    """The blocks in progress of one stream (or batch of streams)."""

    launch: int = 0
    """The next launch; the block of this number enters with it."""
    noisy: dict[int, Tensor] = field(default_factory=dict)
    """Block -> its latents [B, F, C, H, W] at the noise level of its next step, oldest first."""


def roll(
    model: CausalWanModel,
    state: StreamState,
    window: RollingWindow,
    text: TextOfBlock,
    sampling: Sampling,
    *,
    stop: int | None = None,
    grad: bool = False,
) -> dict[int, Tensor]:
    """One launch -> x0 [B, F, C, H, W] of every block of the window; the finished one, if any, is in the cache then.

    stop: no block from this number on enters (a video of that length ends); None: for ever.
    grad: autograd sees this launch. What the next launch starts from is detached.
    """
    steps = len(sampling.sigmas)
    noisy = dict(window.noisy)
    if stop is None or window.launch < stop:
        noisy[window.launch] = state.noise(0, window.launch)
    if not noisy:
        raise ValueError(f"the video ends before block {stop}: nothing is left to roll")
    step_of = {block: window.launch - block for block in noisy}
    with torch.set_grad_enabled(grad):
        x0 = _joint_pass(model, state, noisy, step_of, text, sampling)

    following: dict[int, Tensor] = {}
    for block, step in step_of.items():
        if step + 1 < steps:
            here, there = sampling.sigmas[step], sampling.sigmas[step + 1]
            eps = partial(state.noise, step + 1, block)
            following[block] = SAMPLERS[sampling.sampler](noisy[block], x0[block].detach(), here, there, eps)
    oldest = next(iter(noisy))
    if step_of[oldest] == steps - 1:
        handle = state.cache.begin(state.geometry.block_start(oldest), state.geometry.block_size(oldest))
        commit_block(model, state, handle, x0[oldest], text(oldest), sampling)
    window.noisy, window.launch = following, window.launch + 1
    return x0


def _joint_pass(
    model: CausalWanModel,
    state: StreamState,
    noisy: dict[int, Tensor],
    step_of: dict[int, int],
    text: TextOfBlock,
    sampling: Sampling,
) -> dict[int, Tensor]:
    """The model's x0 of all blocks at once, each at its own noise level and under its own prompt."""
    sizes = [state.geometry.block_size(block) for block in noisy]
    levels = torch.tensor([sampling.sigmas[step_of[block]] for block in noisy])
    x_t = torch.cat(list(noisy.values()), 1)
    sigma_BF = levels.repeat_interleave(torch.tensor(sizes)).to(x_t.device).expand(len(x_t), -1)
    view = state.cache.begin(state.geometry.block_start(next(iter(noisy))), sum(sizes), peek=True)
    out = model(x_t, timestep_of(sigma_BF), join_texts([text(block) for block in noisy]), cache=view)
    x0 = to_x0(out, x_t, sigma_BF, sampling.prediction)
    return dict(zip(noisy, x0.split(sizes, 1), strict=True))


def join_texts(texts: list[TextContext]) -> TextContext:
    """Contexts of consecutive blocks as one with as many groups."""
    if len(texts) == 1:
        return texts[0]
    kv = [
        (torch.cat([k for k, _ in layer], 1), torch.cat([v for _, v in layer], 1))
        for layer in zip(*(context.kv for context in texts), strict=True)
    ]
    pooled = [context.pooled_BGD for context in texts if context.pooled_BGD is not None]
    return TextContext(kv, torch.cat(pooled, 1) if pooled else None)
