"""A sink that remembers: what leaves the window goes into a running average (Reward Forcing, arXiv 2512.04678).

Positions and storage are those of `relative`. When a frame leaves the ring, a share of its un-rotated keys and values
goes into the sink frame of the same place: S <- SHARE S + (1 - SHARE) evicted. With blocks as long as the sink that is
the published rule, block by block. It is done right after a commit, for the frames that the next block pushes out (its
length is that of the last one), so the next block sees the new sink and a block made again sees the same one.
In bf16 most of so small a change is rounded away, as it is in the published code.
"""

from __future__ import annotations

from streamgen.cache.kv import KVCache, Policy, held_frames, ring_slot

SHARE = 0.999
"""Of the sink that stays (the published code's; its paper speaks of 0.99)."""


def fold(cache: KVCache, frames: int) -> None:
    """Average the frames that a block of so many latent frames will push out into the sink."""
    spec, held = cache.spec, cache.frames
    if spec.sink_frames == 0:
        return
    origin, end = held[0], held[-1] + 1
    stays = set(held_frames(origin, end + frames, spec.window_frames, spec.sink_frames))
    for frame in held:
        if frame in stays:
            continue
        index = frame - origin
        gone, kept = (
            slice(slot * spec.tokens_per_frame, (slot + 1) * spec.tokens_per_frame)
            for slot in (ring_slot(index, spec.window_frames, spec.sink_frames), index % spec.sink_frames)
        )
        for buffer in (cache.k, cache.v):
            sink = buffer[..., kept, :]
            sink.copy_(sink.float().lerp(buffer[..., gone, :].float(), 1 - SHARE))


EMA_SINK = Policy(
    name="ema_sink",
    stores_rotated=False,
    slot=ring_slot,
    positions=lambda frames: list(range(len(frames))),
    committed=fold,
)
