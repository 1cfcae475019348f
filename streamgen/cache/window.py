"""Sink and sliding window at absolute positions (Self-Forcing, LongLive): keys are stored rotated, never touched again.

The distance from the sink grows with the stream, beyond what training saw; use `relative` for long streams.
"""

from streamgen.cache.kv import Policy, ring_slot

WINDOW = Policy(name="window", stores_rotated=True, slot=ring_slot, positions=list)
