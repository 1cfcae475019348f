"""The caption grammar of the sprites world, and which captions are held out."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from functools import lru_cache

COUNTS = ("a", "two")
SIZES = ("large", "small")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 220, 60),
    "blue": (50, 90, 250),
    "yellow": (250, 225, 40),
    "purple": (180, 50, 220),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
MOTIONS = (
    "moving left",
    "moving right",
    "rising",
    "falling",
    "bouncing",
    "orbiting",
    "growing",
    "shrinking",
    "spinning",
)
BACKGROUNDS = ("black", "navy", "sunset", "grass", "snow")
ATTRIBUTES = ("count", "size", "color", "shape", "motion", "background")
AXES = (COUNTS, SIZES, tuple(COLORS), SHAPES, MOTIONS, BACKGROUNDS)
"""Values of each of ATTRIBUTES."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One caption of the grammar; `text` is its canonical form."""

    count: str
    size: str
    color: str
    shape: str
    motion: str
    background: str

    @property
    def text(self) -> str:
        shape = self.shape + ("s" if self.count == "two" else "")
        return f"{self.count} {self.size} {self.color} {shape} {self.motion} over a {self.background} background"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A part of the world: captions whose attributes are among these; an empty tuple allows all values."""

    count: tuple[str, ...] = ()
    size: tuple[str, ...] = ()
    color: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    motion: tuple[str, ...] = ()
    background: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for attribute, allowed in zip(ATTRIBUTES, AXES, strict=True):
            for value in getattr(self, attribute):
                if value not in allowed:
                    raise ValueError(f"{attribute} {value!r} is not in the world; allowed: {', '.join(allowed)}")

    def __contains__(self, caption: Caption) -> bool:
        allowed = ((getattr(self, attribute), getattr(caption, attribute)) for attribute in ATTRIBUTES)
        return all(not values or value in values for values, value in allowed)


WHOLE = Part()


def all_captions() -> list[Caption]:
    """All 5400 captions, in a fixed order."""
    return [Caption(*values) for values in itertools.product(*AXES)]


def is_held_out(caption: Caption) -> bool:
    """The held-out tenth: never rendered for training, in any role."""
    return zlib.crc32(caption.text.encode()) % 10 == 0


@lru_cache(maxsize=12)
def captions(split: str = "train", part: Part = WHOLE) -> tuple[Caption, ...]:
    """Captions of a split ('train', 'heldout' or 'all') of a part of the world; ValueError if there are none."""
    if split not in ("train", "heldout", "all"):
        raise ValueError(f"split is {split!r}; allowed: 'train', 'heldout', 'all'")
    kept = tuple(c for c in all_captions() if c in part and (split == "all" or is_held_out(c) == (split == "heldout")))
    if not kept:
        raise ValueError(f"no {split} caption is in {part}: allow more values")
    return kept


def parse(text: str) -> Caption:
    """Read a canonical caption back; raises ValueError for anything outside the grammar."""
    for caption in _by_text().get(" ".join(text.lower().split()), ()):
        return caption
    raise ValueError(f"{text!r} is not a caption of the sprites grammar")


@lru_cache(maxsize=1)
def _by_text() -> dict[str, tuple[Caption, ...]]:
    return {c.text: (c,) for c in all_captions()}
