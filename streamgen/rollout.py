"""Advance a stream by one block: the heart. Training, the command line and the server all come through `BlockRun`.

    noise(seed, block, 0) -> [ model at sigma 0, re-noise, model at sigma 1, ... ] -> clean latents -> commit -> cache

A BlockRun says which pass of the model comes next and what its result does. `rollout_block` runs them one after the
other; the engine of the server puts passes of several streams, at whatever steps they are, into one forward.
The few-step sampler is Self-Forcing's (arXiv 2506.08009, algorithm 1). Noise belongs to the cell
(seed, block, step), so a block that was cancelled or failed can be made again, to the bit. Latents are BFCHW, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from streamgen.cache import BlockCache, KVCache, RowsCache
from streamgen.codec import CodecState
from streamgen.flow import Prediction, add_noise, guided, timestep_of, to_x0
from streamgen.geometry import VideoGeometry
from streamgen.ops import Ops, select
from streamgen.samplers import MULTISTEP, SAMPLERS
from streamgen.timeline import PromptTimeline
from streamgen.transformer import CausalWanModel, TextContext
from streamgen.unipc import Visited


class Cancelled(Exception):
    """The caller asked to stop between two passes; the stream stands where it stood before the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a block is denoised."""

    sigmas: tuple[float, ...]
    """Noise level of each step, descending (`flow.step_sigmas`)."""
    prediction: Prediction = "flow"
    sampler: str = "renoise"
    """How one step leads to the next: a name of SAMPLERS or MULTISTEP."""
    guidance: float = 1.0
    """Scale of classifier-free guidance; 1 is off. Else every pass has two rows for each row of the stream, those with
    the prompt, then those with the negative one, and so have text and cache."""
    context_noise: float = 0.0
    """Noise level of the latents whose keys and values are kept; 0 is clean."""
    commits: bool = True
    """False: the keys and values of a block's last step are kept, and no pass follows it. For models trained with a
    context_noise of that step's level; such a pass would see nothing else."""
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
    noise_source: Callable[[int, int], Tensor] | None = None
    """(block, step) -> noise [B, F, C, H, W] from elsewhere (a recording), in place of the seeds'."""
    ops: Ops = field(default_factory=select)
    """Makes the noise; that of the model, where it is known."""
    given: Tensor | None = None
    """Clean latents [B, f, C, H, W] that block 0 begins with (an image); a block that they fill is committed as it is.
    """

    def noise(self, step: int, block: int | None = None) -> Tensor:
        """The noise of a cell (float32, [B, F, C, H, W]); of the next block by default."""
        g, block = self.geometry, self.position if block is None else block
        if self.noise_source is not None:
            return self.noise_source(block, step)
        shape = (g.block_size(block), g.latent_channels, g.latent_height, g.latent_width)
        return self.ops.cell_noise(self.seeds, block, step, shape, self.cache.k.device)


def next_level(state: StreamState, x_t: Tensor, out: Tensor, sampling: Sampling, step: int, block: int) -> Tensor:
    """The input of the step after `step`, by a sampler of SAMPLERS, from the model's output for x_t."""
    sigma, sigma_next = sampling.sigmas[step : step + 2]
    if sampling.sampler == "renoise" and state.noise_source is None:  # one operation, noise and all
        levels = sigma, sigma_next, sampling.prediction
        return state.ops.renoise_step(out, x_t, *levels, state.seeds, block, step + 1)
    x0 = to_x0(out, x_t, sigma, sampling.prediction)
    return SAMPLERS[sampling.sampler](x_t, x0, sigma, sigma_next, lambda: state.noise(step + 1, block))


class Pass(NamedTuple):
    """One forward that a stream waits for, at one noise level."""

    latents_BFCHW: Tensor
    sigma: float
    text: TextContext
    cache: BlockCache
    clean_frames: int = 0
    """So many of the first latent frames are clean, whatever sigma says."""


PassKind = Literal["recache", "step", "commit"]


class BlockRun:
    """The next block of a stream on its way: [recache], one step after the other, commit (a pass, or `keep`).

    `waiting` is the pass to run; `take` gets its result. Between the two nothing changes that a second try would
    miss: a pass that failed is asked for again. After the last step `latents` are final; after the commit `kind` is
    None and the stream has advanced.
    """

    def __init__(
        self,
        state: StreamState,
        text: TextContext,
        sampling: Sampling,
        *,
        transition: str | None = None,
        exit_step: int | None = None,
    ) -> None:
        self.state, self.text, self.sampling = state, text, sampling
        self.last = len(sampling.sigmas) - 1 if exit_step is None else exit_step
        self.step = 0
        self.kind: PassKind | None = "step"
        self.latents: Tensor | None = None
        """Clean latents [B, F, C, H, W], once the last step is done."""
        self._handle: BlockCache | None = None
        self._x_t: Tensor | None = None
        self._past: tuple[Visited, ...] = ()
        """With a sampler of MULTISTEP: the last two steps."""
        state.begun = True
        if transition == "scene":
            state.cache.reset()
            state.recent = {}
        elif transition == "recache" and frames_to_recache(state, sampling):
            self.kind = "recache"
        given = _given(state)
        if given is not None and given.shape[1] == state.geometry.block_size(state.position):
            self.latents, self.kind = given, "commit"

    def use(self, sampling: Sampling) -> None:
        """Other steps, before the first one is made."""
        self.sampling, self.last = sampling, len(sampling.sigmas) - 1

    @property
    def passes_left(self) -> int:
        """Passes until the latents are final; the commit is not among them."""
        return int(self.kind == "recache") + (0 if self.kind == "commit" else self.last + 1 - self.step)

    def waiting(self) -> Pass:
        """The next pass."""
        state, sampling = self.state, self.sampling
        if self.kind == "recache":
            window = torch.stack([state.recent[frame] for frame in frames_to_recache(state, sampling)], dim=1)
            self._handle = state.cache.begin_recache(protect_sink=sampling.protect_sink)
            return Pass(self._rows(window), sampling.context_noise, self.text, self._handle)
        if self._handle is None:
            frames = state.geometry.block_size(state.position)
            self._handle = state.cache.begin(state.geometry.block_start(state.position), frames)
        given = _given(state)
        clean = 0 if given is None else given.shape[1]
        if self.kind == "step":
            if self._x_t is None:
                self._x_t = _with_given(state, state.noise(0))
            return Pass(self._rows(self._x_t), sampling.sigmas[self.step], self.text, self._handle, clean)
        if self.latents is None:
            raise ValueError("the block is done: nothing waits")
        context = self._rows(_context(state, self.latents, sampling))
        return Pass(context, sampling.context_noise, self.text, self._handle, clean)

    @property
    def keeps_last_step(self) -> bool:
        """All that is left of the block is `keep`."""
        return self.kind == "commit" and not self.sampling.commits and self._x_t is not None

    def keep(self) -> None:
        """In place of the commit pass: what the last step wrote into the cache stays, and the stream advances."""
        assert self.keeps_last_step and self._handle is not None and self._x_t is not None
        _keep(self.state, self._handle, self._x_t)
        self.kind = None

    def take(self, asked: Pass, out: Tensor) -> None:
        """The model's output for the pass that `waiting` gave."""
        state, sampling = self.state, self.sampling
        if self.kind == "recache":
            state.cache.commit(asked.cache)
            self.kind, self._handle = "step", None
        elif self.kind == "commit":
            _keep(state, asked.cache, self._prompted(asked.latents_BFCHW))
            self.kind = None
        else:
            x_t = self._prompted(asked.latents_BFCHW)
            if sampling.guidance != 1:
                with_prompt, without = out.chunk(2)
                out = guided(without, with_prompt, sampling.guidance)
            if self.step < self.last:
                self._advance(x_t, out, asked.sigma)
                return
            x0 = _with_given(state, to_x0(out, x_t, asked.sigma, sampling.prediction))
            if not bool(torch.isfinite(x0).all()):
                raise FloatingPointError(f"block {state.position}: the denoised latents are not finite")
            self.latents, self.kind = x0, "commit"

    def _advance(self, x_t: Tensor, out: Tensor, sigma: float) -> None:
        """To the next step."""
        state, sampling = self.state, self.sampling
        if sampling.sampler in MULTISTEP:
            x0 = _with_given(state, to_x0(out, x_t, sigma, sampling.prediction))
            sigma_next = sampling.sigmas[self.step + 1]
            x_next, visited = MULTISTEP[sampling.sampler](x_t, x0, sigma, sigma_next, self._past)
            self._past = (*self._past[-1:], visited)
        else:
            x_next = next_level(state, x_t, out, sampling, self.step, state.position)
        self._x_t = _with_given(state, x_next)
        self.step += 1

    def _rows(self, latents_BFCHW: Tensor) -> Tensor:
        """Of a pass: with guidance every row comes twice."""
        return latents_BFCHW if self.sampling.guidance == 1 else torch.cat([latents_BFCHW, latents_BFCHW])

    def _prompted(self, rows: Tensor) -> Tensor:
        """The rows of a pass that stand for the stream's."""
        return rows if self.sampling.guidance == 1 else rows.chunk(2)[0]


def run_passes(model: CausalWanModel, passes: Sequence[Pass]) -> list[Tensor]:
    """The model's output for each pass, from one forward. Passes of one forward have equal latent shapes [F, C, H, W]
    and one text group each; they may stand at different noise levels, prompts, positions and cache lengths.
    """
    if len(passes) == 1:
        asked = passes[0]
        return [model(asked.latents_BFCHW, _timestep(asked), asked.text, cache=asked.cache)]
    latents_BFCHW = torch.cat([asked.latents_BFCHW for asked in passes])
    frames = latents_BFCHW.shape[1] if any(asked.clean_frames for asked in passes) else 1
    timestep_BF = torch.cat([_timestep(asked).expand(-1, frames) for asked in passes])
    cache = RowsCache([asked.cache for asked in passes])
    out = model(latents_BFCHW, timestep_BF, stack_texts([asked.text for asked in passes]), cache=cache)
    return list(out.split([len(asked.latents_BFCHW) for asked in passes]))


def stack_texts(texts: Sequence[TextContext]) -> TextContext:
    """Contexts of several rows, one below the other."""
    kv = [
        (torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer]))
        for layer in zip(*(context.kv for context in texts), strict=True)
    ]
    pooled = [context.pooled_BGD for context in texts if context.pooled_BGD is not None]
    return TextContext(kv, torch.cat(pooled) if pooled else None)


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
    if grad and not sampling.commits:
        raise ValueError("a pass with gradients leaves nothing in the cache: train with commits and context_noise")
    run = BlockRun(state, text, sampling, transition=transition, exit_step=exit_step)
    enter_block(model, run)
    mark("enter")
    while run.kind == "step":
        _stop_if(cancelled, state)
        graded = grad and run.step == run.last
        asked = run.waiting()
        with torch.set_grad_enabled(graded):
            out = _run_checkpointed(model, asked) if graded and checkpointed else run_passes(model, [asked])[0]
            run.take(asked, out)
        mark("denoise")

    _stop_if(cancelled, state)
    assert run.latents is not None
    emit(run.latents)
    if run.keeps_last_step:
        run.keep()
    else:
        with torch.no_grad():
            asked = run.waiting()
            run.take(asked, run_passes(model, [asked])[0])
    mark("commit")
    return run.latents


@torch.no_grad()
def enter_block(model: CausalWanModel, run: BlockRun) -> None:
    """Apply the prompt's transition to the cache, where it needs a pass. Doing it again changes nothing, so a block
    may be tried again.
    """
    while run.kind == "recache":
        asked = run.waiting()
        run.take(asked, run_passes(model, [asked])[0])


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
    asked = Pass(_context(state, latents, sampling), sampling.context_noise, text, block)
    run_passes(model, [asked])
    _keep(state, block, asked.latents_BFCHW)


def frames_to_recache(state: StreamState, sampling: Sampling) -> list[int]:
    """The latent frames that a change of prompt re-encodes: what the cache holds, but for a protected sink."""
    return state.cache.frames[state.cache.spec.sink_frames if sampling.protect_sink else 0 :]


def _context(state: StreamState, latents: Tensor, sampling: Sampling) -> Tensor:
    """What the commit pass looks at: the block's latents, with a little noise where the model wants it, given ones
    without.
    """
    context = latents.detach()
    if sampling.context_noise:
        noised = add_noise(context, state.noise(len(sampling.sigmas)), sampling.context_noise)
        context = _with_given(state, noised)
    return context


def _keep(state: StreamState, block: BlockCache, context: Tensor) -> None:
    """After the commit pass: the block belongs to the past, and the stream stands at the next one."""
    state.cache.commit(block)
    start = state.geometry.block_start(state.position)
    recent = {**state.recent, **{start + i: frame for i, frame in enumerate(context.unbind(1))}}
    state.recent = {frame: recent[frame] for frame in state.cache.frames}
    state.position += 1
    state.begun = False


def _given(state: StreamState) -> Tensor | None:
    """The latents that the next block begins with."""
    return state.given if state.position == 0 else None


def _with_given(state: StreamState, latents_BFCHW: Tensor) -> Tensor:
    """The next block's latents, those that are given in their places."""
    given = _given(state)
    return latents_BFCHW if given is None else torch.cat([given, latents_BFCHW[:, given.shape[1] :]], dim=1)


def _timestep(asked: Pass) -> Tensor:
    """[B, 1], one noise level for all frames, or [B, F] where some are clean."""
    latents_BFCHW = asked.latents_BFCHW
    frames = latents_BFCHW.shape[1] if asked.clean_frames else 1
    timestep_BF = torch.full((len(latents_BFCHW), frames), timestep_of(asked.sigma), device=latents_BFCHW.device)
    timestep_BF[:, : asked.clean_frames] = 0
    return timestep_BF


def _run_checkpointed(model: CausalWanModel, asked: Pass) -> Tensor:
    """The same with activation checkpointing: what it saw of the cache is copied, for the cache moves on meanwhile."""
    seen = asked.cache.snapshot()
    return checkpoint(model, asked.latents_BFCHW, _timestep(asked), asked.text, cache=seen, use_reentrant=False)


def _stop_if(cancelled: Callable[[], bool], state: StreamState) -> None:
    if cancelled():
        raise Cancelled(f"block {state.position} was cancelled")
