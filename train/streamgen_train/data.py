"""Captions and clips of the sprites world for training; held-out captions never get here unless
asked for.
"""

from __future__ import annotations

import torch

from streamgen.worlds.grammar import WHOLE, Caption, Part, captions


def pick_captions(count: int, rng: torch.Generator, split: str = "train", part: Part = WHOLE) -> list[Caption]:
    """`count` captions drawn evenly, with replacement."""
    items = captions(split, part)
    return [items[i] for i in torch.randint(len(items), (count,), generator=rng).tolist()]
