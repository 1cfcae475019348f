"""Many streams of one model made together, row by row the same videos as one at a time: for evaluation and training.

Serving mixes streams at different steps and is the engine's work; here all rows are at the same block and step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from streamgen.pipeline import StreamPipeline
from streamgen.pixels import to_uint8
from streamgen.rollout import StreamState, rollout_block
from streamgen.transformer import TextContext


@torch.inference_mode()
def generate(
    pipe: StreamPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    blocks: int,
    *,
    steps: int | None = None,
    first_steps: int | None = None,
    cache: str | None = None,
    cache_dtype: str | None = None,
    switches: Mapping[int, Sequence[str]] | None = None,
    transition: str = "recache",
    on_block: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Videos of `prompts` -> uint8 [B, T, H, W, 3]; with `on_block`, each block [B, n, H, W, 3] goes there instead.

    first_steps, cache, cache_dtype: as of `StreamPipeline.stream`.
    switches: block -> new prompts of all rows, taken over with `transition` ('cut', 'recache' or 'scene').
    """
    if len(prompts) != len(seeds) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(seeds)} seeds: one seed for each of at least one prompt")
    state = StreamState(
        geometry=pipe.geometry,
        cache=pipe.new_cache(pipe.scheduler.positions if cache is None else cache, len(prompts), stored_as=cache_dtype),
        seeds=tuple(seeds),
        ops=pipe.transformer.ops,
    )
    plan = pipe.sampling(pipe.scheduler.trained_steps[0] if steps is None else steps)
    first_steps = pipe.scheduler.first_steps if first_steps is None else first_steps
    first_plan = plan if first_steps is None else pipe.sampling(first_steps)
    if pipe.adapters.names:
        pipe.use_loras(pipe.loras)  # a stream may have had others
    made: list[Tensor] = []
    text = encode_prompts(pipe, prompts)
    for block in range(blocks):
        change = (switches or {}).get(block)
        if change is not None:
            text = encode_prompts(pipe, change)
        latents = rollout_block(
            pipe.transformer,
            state,
            text,
            first_plan if block == 0 else plan,
            transition=transition if change is not None else None,
        )
        video, state.codec = pipe.codec.decode_stream(latents, state.codec)
        frames = to_uint8(video).cpu()
        if on_block is None:
            made.append(frames)
        else:
            on_block(block, frames)
    return torch.cat(made, 1) if made else torch.empty(0, dtype=torch.uint8)


def encode_prompts(pipe: StreamPipeline, prompts: Sequence[str]) -> TextContext:
    """Text context of a batch of prompts, one per row."""
    return pipe.encode_text(pipe.text.encode(list(prompts)))
