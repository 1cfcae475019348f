"""Prompts over time: which text holds at which block, and how one takes over from the other.

A version is the number of a prompt in the order of arrival; 0 is the prompt that the stream began with. Transitions:
    cut      the new text from its block on; the cache keeps what it holds
    recache  as cut, and the window is first re-encoded under the new text (LongLive, arXiv 2509.22622)
    blend    text embeddings interpolated over `blend_blocks` blocks; the last of them has the new text alone
    scene    the cache is flushed to nothing: a new shot. The codec's state stays, because a stream's frames per latent
             are fixed by its geometry (a fresh Wan codec would give one frame for the first latent) and a causal codec
             takes a hard cut like any other change of picture.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import asdict, dataclass
from typing import Any

from streamgen.errors import UserError

TRANSITIONS = ("cut", "recache", "blend", "scene")

NEGLIGIBLE_SHARE = 1e-3
"""Where blends overlap, an older text below this share is dropped: memory stays bounded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One entry: `prompt` holds from `block` on."""

    block: int
    prompt: str
    version: int = 0
    transition: str = "cut"
    blend_blocks: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cue:
    """What one block is made from."""

    version: int
    prompt: str
    transition: str | None
    """The transition that starts at this block, if one does."""
    mix: tuple[tuple[int, float], ...]
    """(version, share) of the texts, newest first; the shares add up to 1."""


def _sound(entry: Prompt) -> bool:
    """Whether an entry that was read from somewhere can be used."""
    numbers = ((entry.block, 0), (entry.version, 0), (entry.blend_blocks, 1))
    return (
        all(isinstance(number, int) and number >= least for number, least in numbers)
        and isinstance(entry.prompt, str)
        and entry.transition in TRANSITIONS
    )


class PromptTimeline:
    """Prompts in the order of their blocks; it grows only at blocks that have not begun.

    A stream that is turned back may give up its later prompts (`cut`); their versions are not used again.
    """

    def __init__(self, prompt: str) -> None:
        self.prompts = [Prompt(block=0, prompt=prompt)]
        self.versions = 1
        """How many there have been."""

    def add(
        self,
        prompt: str,
        block: int,
        transition: str = "recache",
        *,
        blend_blocks: int = 4,
        earliest: int = 0,
        insert: bool = False,
        replace_until: int = 0,
    ) -> int:
        """Let `prompt` hold from `block` on and return its version; of two prompts for one block the later holds.

        `earliest` is the first block that has not begun. UserError for a block before it, and unless `insert` for one
        before the last prompt's. Prompts for the blocks [block, replace_until) are given up for it.
        """
        if transition not in TRANSITIONS:
            raise UserError(f"unknown transition {transition!r}; there are: {', '.join(TRANSITIONS)}")
        if blend_blocks < 1:
            raise UserError(f"blend_blocks is {blend_blocks}; a blend takes at least 1 block")
        if block < earliest:
            raise UserError(f"a prompt for block {block} comes too late: the earliest block is {earliest}")
        last = self.prompts[-1].block
        if block < last and not insert:
            raise UserError(
                f"prompts are out of order: block {block} comes before block {last}, "
                "which already has a prompt; give them in the order of their time"
            )
        blends = blend_blocks if transition == "blend" else 1
        version, self.versions = self.versions, self.versions + 1
        entry = Prompt(block=block, prompt=prompt, version=version, transition=transition, blend_blocks=blends)
        self.cut(block, replace_until)
        # A new list: other threads may be reading the old one.
        place = bisect_right(self.prompts, block, key=lambda other: other.block)
        self.prompts = [*self.prompts[:place], entry, *self.prompts[place:]]
        return version

    def cut(self, start: int, stop: int | None = None) -> None:
        """Forget the prompts for the blocks [start, stop), by default all from `start` on; the first of all stays."""
        self.prompts = [
            entry
            for entry in self.prompts
            if entry.version == 0 or entry.block < start or (stop is not None and entry.block >= stop)
        ]

    def text_of(self, version: int) -> str:
        return next(entry.prompt for entry in self.prompts if entry.version == version)

    def at(self, block: int) -> Cue:
        """The cue of a block: a pure function of the prompts."""
        entry = self._entry(block)
        starts = block == entry.block and entry.version > 0
        return Cue(
            version=entry.version,
            prompt=entry.prompt,
            transition=entry.transition if starts else None,
            mix=self._mix(block),
        )

    def _entry(self, block: int) -> Prompt:
        return self.prompts[bisect_right(self.prompts, block, key=lambda entry: entry.block) - 1]

    def _mix(self, block: int) -> tuple[tuple[int, float], ...]:
        """Follow unfinished blends back: each one started from the mixture of the block before it."""
        shares: list[tuple[int, float]] = []
        rest = 1.0
        while True:
            entry = self._entry(block)
            done = min(1.0, (block - entry.block + 1) / entry.blend_blocks) if entry.block else 1.0
            if rest * (1 - done) < NEGLIGIBLE_SHARE:
                return (*shares, (entry.version, rest))
            shares.append((entry.version, rest * done))
            rest *= 1 - done
            block = entry.block - 1

    def state_dict(self) -> list[dict[str, Any]]:
        return [asdict(entry) for entry in self.prompts]

    @classmethod
    def from_state(cls, state: list[dict[str, Any]]) -> PromptTimeline:
        """The inverse of `state_dict`; UserError for what it cannot have given."""
        timeline = cls("")
        try:
            timeline.prompts = [Prompt(**{"version": number, **entry}) for number, entry in enumerate(state)]
        except TypeError:
            timeline.prompts = []
        blocks = [entry.block for entry in timeline.prompts]
        versions = {entry.version for entry in timeline.prompts}
        whole = all(_sound(entry) for entry in timeline.prompts) and blocks == sorted(blocks)
        if not whole or not blocks or blocks[0] != 0 or len(versions) != len(blocks):
            raise UserError("the saved prompts are not whole: each needs a block, a text, a version and a transition")
        timeline.versions = 1 + max(versions)
        return timeline
