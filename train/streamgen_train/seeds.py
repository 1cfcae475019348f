"""All random numbers of a run are functions of (seed, step, microbatch, player): resuming needs no generator state."""

from __future__ import annotations

import numpy as np

EVALUATION = 2**31  # microbatch number that seeds validation and pictures
SHARED = EVALUATION + 1  # what all microbatches of a turn have in common
ADAPTERS = EVALUATION + 2  # initial weights of LoRA adapters


def step_seed(seed: int, step: int, microbatch: int, player: int = 0) -> int:
    """63-bit seed of all random numbers of one microbatch. `player`: 0 for "model", counted from 1 for others."""
    words = [seed, step, microbatch] + ([player] if player else [])
    state = np.random.SeedSequence(words).generate_state(2, np.uint32)
    return (int(state[0]) << 31) ^ int(state[1])
