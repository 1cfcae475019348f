"""Sink and sliding window at re-indexed positions (LongLive's infinite attention, Reward Forcing): no limit of length.

Keys are stored un-rotated; the visible frames, sink first and block last, get the temporal indices 0..n-1 anew at every
block. Equal to `window` while nothing has been evicted, and for ever without a sink: rotary attention sees differences.
"""

from streamgen.cache.kv import Policy, ring_slot

RELATIVE = Policy(
    name="relative", stores_rotated=False, slot=ring_slot, positions=lambda frames: list(range(len(frames)))
)
