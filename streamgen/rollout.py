"""Advance a stream by one block: the heart. Training, the command line and the server all call `rollout_block`.

    noise(seed, block, 0) -> [ model at sigma 0, re-noise, model at sigma 1, ... ] -> clean latents -> commit -> cache

The few-step sampler is Self-Forcing's (arXiv 2506.08009, algorithm 1). Noise belongs to the cell
(seed, block, step), so a block that was cancelled or failed can be made again, to the bit. Latents are BFCHW, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from streamgen.cache import BlockCache, KVCache
from streamgen.codec import CodecState
from streamgen.flow import Prediction, add_noise, euler_step, renoise, timestep_of, to_flow, to_x0
from streamgen.geometry import VideoGeometry
from streamgen.noise import cell_noise
from streamgen.timeline import PromptTimeline
from streamgen.transformer import CausalWanModel, TextContext


class Cancelled(Exception):
    """The caller asked to stop between two passes; the stream stands where it stood before the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a block is denoised."""

    sigmas: tuple[float, ...]
    """Noise level of each step, descending (`flow.step_sigmas`)."""
    prediction: Prediction = "flow"
    sampler: str = "renoise"
    """How one step leads to the next: a name of SAMPLERS."""
    context_noise: float = 0.0
    """Noise level of the latents whose keys and values are kept; 0 is clean."""
    protect_sink: bool = True
    """A recache leaves the sink as it is, so that the scene's identity survives a prompt switch."""


@dataclass(slots=True, kw_only=True)
class StreamState:
    """Everything that one stream's video depends on, besides the model. In training it is a batch of B streams."""

    geometry: VideoGeometry
    cache: KVCache
    seeds: tuple[int, ...]
    """One for each row of the batch: a row's noise does not depend on its neighbours."""
    timeline: PromptTimeline | None = None
    codec: CodecState | None = None
    position: int = 0
    """The next block."""
    begun: bool = False
    """A launch of that block has begun and not ended; its prompt is fixed, for its transition may have been applied."""
    recent: Mapping[int, Tensor] = field(default_factory=dict)
    """Latent frame -> [B, C, H, W] as committed, for the frames that the cache holds: what a recache re-encodes."""

    def noise(self, step: int, block: int | None = None) -> Tensor:
        """The noise of a cell (float32, [B, F, C, H, W]); of the next block by default."""
        g, block = self.geometry, self.position if block is None else block
        shape = (g.block_size(block), g.latent_channels, g.latent_height, g.latent_width)
        device = self.cache.k.device
        return torch.stack([cell_noise(seed, block, step, shape, device=device) for seed in self.seeds])


def _renoise(x_t: Tensor, x0: Tensor, sigma: float, sigma_next: float, eps: Tensor) -> Tensor:
    return renoise(x0, eps, sigma_next)


def _euler(x_t: Tensor, x0: Tensor, sigma: float, sigma_next: float, eps: Tensor) -> Tensor:
    return euler_step(x_t, to_flow(x0, x_t, sigma, "x0"), sigma, sigma_next)


SAMPLERS = {"renoise": _renoise, "euler": _euler}


def rollout_block(
    model: CausalWanModel,
    state: StreamState,
    text: TextContext,
    sampling: Sampling,
    *,
    transition: str | None = None,
    exit_step: int | None = None,
    grad: bool = False,
    checkpointed: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
    mark: Callable[[str], None] = lambda stage: None,
    emit: Callable[[Tensor], None] = lambda latents: None,
) -> Tensor:
    """Make the next block -> its clean latents [B, F, C, H, W]; the state advances when all of it has succeeded.

    transition: of the block's prompt (`timeline.Cue.transition`); applied before the first pass.
    exit_step: stop at this step and take its x0; with `grad`, autograd sees this step alone (Self-Forcing's training),
    and with `checkpointed` it keeps no activations of it: the pass is run again in the backward.
    cancelled: asked between passes; True raises Cancelled. mark: told "enter", "denoise" or "commit" after each stage.
    emit: gets the latents before the commit pass, so that frames need not wait for it; if it raises, nothing advanced.
    """
    last = len(sampling.sigmas) - 1 if exit_step is None else exit_step
    state.begun = True
    enter_block(model, state, text, sampling, transition)
    mark("enter")
    frames = state.geometry.block_size(state.position)
    block = state.cache.begin(state.geometry.block_start(state.position), frames)

    x_t = state.noise(0)
    for step in range(last + 1):
        _stop_if(cancelled, state)
        sigma = sampling.sigmas[step]
        graded = grad and step == last
        run = _run_checkpointed if graded and checkpointed else _run
        with torch.set_grad_enabled(graded):
            x0 = to_x0(run(model, x_t, sigma, text, block), x_t, sigma, sampling.prediction)
        mark("denoise")
        if step < last:
            following = sampling.sigmas[step + 1]
            x_t = SAMPLERS[sampling.sampler](x_t, x0, sigma, following, state.noise(step + 1))

    _stop_if(cancelled, state)
    if not bool(torch.isfinite(x0).all()):
        raise FloatingPointError(f"block {state.position}: the denoised latents are not finite")
    emit(x0)
    commit_block(model, state, block, x0, text, sampling)
    mark("commit")
    return x0


@torch.no_grad()
def enter_block(
    model: CausalWanModel,
    state: StreamState,
    text: TextContext,
    sampling: Sampling,
    transition: str | None,
) -> None:
    """Apply a prompt's transition to the cache. Doing it again changes nothing, so a block may be tried again."""
    if transition == "scene":
        state.cache.reset()
        state.recent = {}
    elif transition == "recache":
        sink = state.cache.spec.sink_frames if sampling.protect_sink else 0
        frames = state.cache.frames[sink:]
        if frames:
            window = torch.stack([state.recent[frame] for frame in frames], dim=1)
            block = state.cache.begin_recache(protect_sink=sampling.protect_sink)
            _run(model, window, sampling.context_noise, text, block)
            state.cache.commit(block)


@torch.no_grad()
def commit_block(
    model: CausalWanModel,
    state: StreamState,
    block: BlockCache,
    latents: Tensor,
    text: TextContext,
    sampling: Sampling,
) -> None:
    """The pass that leaves the block's clean keys and values in the cache, then the stream's step to the next block."""
    context = latents.detach()
    if sampling.context_noise:
        eps = state.noise(len(sampling.sigmas))
        context = add_noise(context, eps, sampling.context_noise)
    _run(model, context, sampling.context_noise, text, block)
    state.cache.commit(block)
    start = state.geometry.block_start(state.position)
    recent = {**state.recent, **{start + i: frame for i, frame in enumerate(context.unbind(1))}}
    state.recent = {frame: recent[frame] for frame in state.cache.frames}
    state.position += 1
    state.begun = False


def _run(model: CausalWanModel, x_t: Tensor, sigma: float, text: TextContext, block: BlockCache) -> Tensor:
    """One pass at one noise level for all frames."""
    timestep = torch.full((x_t.shape[0], 1), timestep_of(sigma), device=x_t.device)
    return model(x_t, timestep, text, cache=block)


def _run_checkpointed(model: CausalWanModel, x_t: Tensor, sigma: float, text: TextContext, block: BlockCache) -> Tensor:
    """The same with activation checkpointing: what it saw of the cache is copied, for the cache moves on meanwhile."""
    timestep = torch.full((x_t.shape[0], 1), timestep_of(sigma), device=x_t.device)
    seen = block.snapshot()
    return checkpoint(model, x_t, timestep, text, cache=seen, use_reentrant=False)


def _stop_if(cancelled: Callable[[], bool], state: StreamState) -> None:
    if cancelled():
        raise Cancelled(f"block {state.position} was cancelled")
