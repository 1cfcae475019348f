"""Text encoders: prompt -> rows of numbers, zero beyond the last word.

The sprites encoder is a table of the words that carry meaning in the sprites world. It reads any wording: case,
punctuation and order do not matter, plurals and common synonyms are understood, filler is skipped, unknown words
are reported with the nearest known one. Letters: B prompts, L rows, D width of a row.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from streamgen.errors import UserError

MAX_REPORTED_WORDS = 5

SPRITES_VOCABULARY = (
    *("one", "two", "large", "small"),
    *("red", "green", "blue", "yellow", "purple", "white"),
    *("circle", "square", "triangle", "star", "ring"),
    *("left", "right", "rising", "falling", "bouncing", "orbiting", "growing", "shrinking", "spinning"),
    *("black", "navy", "sunset", "grass", "snow"),
)
SHAPE_WORDS = frozenset(("circle", "square", "triangle", "star", "ring"))
SYNONYMS = {
    synonym: word
    for word, synonyms in {
        "one": ("1", "single"),
        "two": ("2", "pair", "both", "couple"),
        "large": ("big", "huge"),
        "small": ("little", "tiny"),
        "purple": ("violet",),
        "circle": ("disc", "disk", "ball"),
        "square": ("box", "boxes"),
        "ring": ("donut",),
        "left": ("leftward", "leftwards"),
        "right": ("rightward", "rightwards"),
        "rising": ("rise", "up", "upward", "upwards"),
        "falling": ("fall", "down", "downward", "downwards"),
        "bouncing": ("bounce",),
        "orbiting": ("orbit", "circling"),
        "growing": ("grow",),
        "shrinking": ("shrink",),
        "spinning": ("spin", "rotating", "turning"),
        "grass": ("grassy",),
        "snow": ("snowy",),
    }.items()
    for synonym in synonyms
}
FILLER = frozenset(
    (
        *("a", "an", "the", "of", "in", "on", "over", "with", "and", "at", "to", "from", "is", "are", "it", "its"),
        *("some", "background", "backdrop", "scene", "moving", "move", "moves", "going", "there", "that", "this"),
        *("against", "above", "sprite", "sprites"),
    )
)


class EncodedPrompt(NamedTuple):
    """What tokenising found: word ids in order of appearance, and lines for the user about what was not understood."""

    ids: tuple[int, ...]
    warnings: tuple[str, ...]


class TextEncoder(Protocol):
    """What the pipeline asks of a text encoder."""

    text_len: int
    text_dim: int

    def tokenize(self, prompt: str) -> EncodedPrompt: ...

    def encode(self, prompts: Sequence[str]) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpritesTextConfig:
    """Sizes and words of the sprites text encoder."""

    text_len: int = 8
    text_dim: int = 128
    vocabulary: tuple[str, ...] = SPRITES_VOCABULARY

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocabulary", tuple(self.vocabulary))  # JSON has lists only
        if self.text_len < 1 or self.text_dim < 1 or not self.vocabulary:
            raise ValueError("text_len, text_dim and the vocabulary must not be empty")


class SpritesTextEncoder(nn.Module):
    """Word table: prompts -> float [B, text_len, text_dim], zero rows for padding; all zeros means 'no prompt'."""

    def __init__(self, config: SpritesTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_len, self.text_dim = config.text_len, config.text_dim
        self.index = {word: i for i, word in enumerate(config.vocabulary)}
        self.words = nn.Embedding(len(config.vocabulary), config.text_dim)

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def tokenize(self, prompt: str) -> EncodedPrompt:
        """Word ids of a prompt; UserError when it is empty or holds no known word."""
        written = re.findall(r"[^\W_]+", prompt.lower())
        if not written:
            raise UserError("the prompt is empty; describe a scene, e.g. 'a red star spinning over a snow background'")
        found: list[str] = []
        unknown: list[str] = []
        plural = False
        for raw in written:
            word = self._known(raw)
            if word is not None:
                plural |= word in SHAPE_WORDS and raw != word and raw.endswith("s")
                found.append(word)
            elif raw not in FILLER:
                unknown.append(raw)
        if not found:
            raise UserError(
                f"the prompt holds no word that this model knows ({_listed(unknown or written)}); "
                f"it knows: {', '.join(self.config.vocabulary)}"
            )
        counted = {"one", "two"} & set(found) or not {"one", "two"} <= self.index.keys()
        if SHAPE_WORDS & set(found) and not counted:
            found.insert(0, "two" if plural else "one")
        unique = list(dict.fromkeys(found))
        strange = list(dict.fromkeys(unknown))
        warnings = [self._unknown_warning(word) for word in strange[:MAX_REPORTED_WORDS]]
        if len(strange) > MAX_REPORTED_WORDS:
            warnings.append(f"{len(strange) - MAX_REPORTED_WORDS} more unknown words were left out")
        if len(unique) > self.text_len:
            dropped = unique[self.text_len :]
            warnings.append(f"a prompt has room for {self.text_len} words here; left out: {_listed(dropped)}")
        return EncodedPrompt(tuple(self.index[w] for w in unique[: self.text_len]), tuple(warnings))

    def _known(self, raw: str) -> str | None:
        for word in (raw, SYNONYMS.get(raw), raw.removesuffix("s"), SYNONYMS.get(raw.removesuffix("s"))):
            if word in self.index:
                return word
        return None

    def _unknown_warning(self, word: str) -> str:
        near = difflib.get_close_matches(word, [*self.index, *SYNONYMS], n=1, cutoff=0.0)
        return f"unknown word {word[:40]!r} was left out; the nearest known word is {near[0]!r}"

    def encode_ids(self, ids_BL: Tensor) -> Tensor:
        """Word ids [..., L], -1 for padding -> rows [..., L, D], zero for padding."""
        rows = self.words(ids_BL.clamp(min=0))
        return rows * (ids_BL >= 0).unsqueeze(-1).to(rows.dtype)

    def ids(self, prompts: Sequence[str]) -> Tensor:
        """Padded word ids, int64 [B, text_len]; an empty string is the empty prompt of guidance."""
        table = torch.full((len(prompts), self.text_len), -1)
        for row, prompt in zip(table, prompts, strict=True):
            found = self.tokenize(prompt).ids if prompt else ()
            row[: len(found)] = torch.tensor(found, dtype=torch.long)
        return table

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> rows [B, text_len, text_dim]; an empty string gives zeros (the empty prompt of guidance)."""
        return self.encode_ids(self.ids(prompts).to(self.words.weight.device))


def _listed(words: Sequence[str]) -> str:
    shown = ", ".join(repr(w[:40]) for w in words[:MAX_REPORTED_WORDS])
    return shown + (", ..." if len(words) > MAX_REPORTED_WORDS else "")
