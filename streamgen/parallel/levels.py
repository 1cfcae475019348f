"""Same-level visibility: a block at step i attends to earlier blocks as they were at step i, so there is one cache for
each step and no clean pass (StreamDiffusion 2, arXiv 2511.07399; Live Avatar, arXiv 2512.04677).

    step 0   A0 B0 C0 D0      reads and writes the cache of step 0
    step 1      A1 B1 C1      ... of step 1
    step 2         A2 B2      ... of step 2

A cell (block, step) needs its own predecessor (block, step - 1) and the cache that (block - 1, step) left, and nothing
else. So one function runs a cell, `run_cell`, and the serial order, the stream batch, the step chain and the layer ring
differ only in where and when they call it. Latents are BFCHW, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from streamgen.cache import BlockCache, KVCache
from streamgen.flow import to_x0
from streamgen.geometry import VideoGeometry
from streamgen.rollout import Pass, Sampling, StreamState, next_level, run_passes
from streamgen.transformer import CausalWanModel, TextContext


@dataclass(slots=True)
class LevelCaches:
    """What one stream (or batch of streams) remembers at each step that runs here: a cache, and what it was made from.

    `states[step].position` is the next block of that step, `.recent` the step's inputs for the frames that its cache
    holds: what a recache re-encodes.
    """

    states: dict[int, StreamState]

    @classmethod
    def make(
        cls, new_cache: Callable[[], KVCache], steps: Iterable[int], geometry: VideoGeometry, seeds: tuple[int, ...]
    ) -> LevelCaches:
        """Empty, one cache for each of `steps` (0 is the noisiest)."""
        return cls({step: StreamState(geometry=geometry, cache=new_cache(), seeds=seeds) for step in steps})

    def __getitem__(self, step: int) -> StreamState:
        return self.states[step]

    def nbytes(self) -> int:
        """Bytes of all caches."""
        return sum(state.cache.nbytes() for state in self.states.values())

    def reset(self) -> None:
        """Forget everything; the next block is block 0."""
        for state in self.states.values():
            state.cache.reset()
            state.recent, state.position = {}, 0

    def state_dict(self) -> dict[int, dict[str, Any]]:
        """Copies, by step; see `load_state_dict`."""
        return {
            step: {"position": state.position, "recent": dict(state.recent), "cache": state.cache.state_dict()}
            for step, state in self.states.items()
        }

    def load_state_dict(self, saved: Mapping[int, Mapping[str, Any]]) -> None:
        """Restore to the bit. ValueError if the steps or the caches are others."""
        if saved.keys() != self.states.keys():
            raise ValueError(f"the saved caches are of steps {sorted(saved)}, these are of {sorted(self.states)}")
        for step, state in self.states.items():
            state.cache.load_state_dict(saved[step]["cache"])
            state.position, state.recent = saved[step]["position"], dict(saved[step]["recent"])


@torch.no_grad()
def run_cell(
    model: CausalWanModel,
    levels: LevelCaches,
    block: int,
    step: int,
    x_t: Tensor,
    text: TextContext,
    sampling: Sampling,
    *,
    transition: str | None = None,
) -> Tensor:
    """One cell -> the input of the block's next step, or after the last step its clean latents [B, F, C, H, W].

    x_t: what the cell before returned; of step 0 the noise, `levels[0].noise(0, block)`.
    transition: of the block's prompt (`timeline.Cue.transition`); every step applies it to its own cache when the block
    comes there. A cell that failed may be run again.
    """
    state = levels[step]
    asked = recache_pass(state, step, text, sampling, transition)
    if asked is not None:
        run_passes(model, [asked])
        state.cache.commit(asked.cache)
    asked = cell_pass(state, block, step, x_t, text, sampling)
    return finish_cell(state, block, step, asked, run_passes(model, [asked])[0], sampling)


def run_block(
    model: CausalWanModel,
    levels: LevelCaches,
    text: TextContext,
    sampling: Sampling,
    *,
    transition: str | None = None,
) -> Tensor:
    """The serial order: all steps of the next block, one after the other -> its clean latents [B, F, C, H, W]."""
    block = levels[0].position
    x_t = levels[0].noise(0, block)
    for step in range(len(sampling.sigmas)):
        x_t = run_cell(model, levels, block, step, x_t, text, sampling, transition=transition)
    return x_t


# A cell as passes of the model, for those that put several into one forward (`rollout.run_passes`).


def recache_pass(
    state: StreamState, step: int, text: TextContext, sampling: Sampling, transition: str | None
) -> Pass | None:
    """What a prompt's transition needs before the cell: a pass over what the step saw, to be run and committed."""
    handle = enter_level(state, sampling, transition)
    return None if handle is None else Pass(seen_window(state, sampling), sampling.sigmas[step], text, handle)


def cell_pass(state: StreamState, block: int, step: int, x_t: Tensor, text: TextContext, sampling: Sampling) -> Pass:
    """The cell's own pass."""
    return Pass(x_t, sampling.sigmas[step], text, open_cell(state, block))


def finish_cell(state: StreamState, block: int, step: int, asked: Pass, output: Tensor, sampling: Sampling) -> Tensor:
    """The model's output for `cell_pass` -> what `run_cell` returns; the step stands at its next block."""
    following = after_cell(state, block, step, asked.latents_BFCHW, output, sampling)
    commit_cell(state, asked.cache, asked.latents_BFCHW)
    return following


# A cell without its forward, for those that spread the layers over processes.


def enter_level(state: StreamState, sampling: Sampling, transition: str | None) -> BlockCache | None:
    """Apply a transition to one step's cache -> the frames to re-encode and commit first, if it is a recache."""
    if transition == "scene":
        state.cache.reset()
        state.recent = {}
    elif transition == "recache" and window_frames(state, sampling):
        return state.cache.begin_recache(protect_sink=sampling.protect_sink)
    return None


def window_frames(state: StreamState, sampling: Sampling) -> list[int]:
    """The latent frames that a recache rewrites."""
    return state.cache.frames[state.cache.spec.sink_frames if sampling.protect_sink else 0 :]


def seen_window(state: StreamState, sampling: Sampling) -> Tensor:
    """What this step saw of those frames, [B, F, C, H, W]."""
    return torch.stack([state.recent[frame] for frame in window_frames(state, sampling)], dim=1)


def open_cell(state: StreamState, block: int) -> BlockCache:
    """The block as the model's forward wants it; blocks come to a step in order."""
    assert block == state.position, f"block {block} came to a step whose next block is {state.position}"
    return state.cache.begin(state.geometry.block_start(block), state.geometry.block_size(block))


def after_cell(state: StreamState, block: int, step: int, x_t: Tensor, output: Tensor, sampling: Sampling) -> Tensor:
    """The input of the next step, or the clean latents; FloatingPointError if those are not finite."""
    if step + 1 < len(sampling.sigmas):
        return next_level(state, x_t, output, sampling, step, block)
    x0 = to_x0(output, x_t, sampling.sigmas[step], sampling.prediction)
    if not bool(torch.isfinite(x0).all()):
        raise FloatingPointError(f"block {block}: the denoised latents are not finite")
    return x0


def commit_cell(state: StreamState, handle: BlockCache, x_t: Tensor | None) -> None:
    """Make the pass part of what later blocks see at this step. x_t: its input, where the step's inputs are kept."""
    state.cache.commit(handle)
    if x_t is not None:
        start = state.geometry.block_start(state.position)
        recent = {**state.recent, **{start + i: frame for i, frame in enumerate(x_t.unbind(1))}}
        state.recent = {frame: recent[frame] for frame in state.cache.frames if frame in recent}
    state.position += 1
