"""What the noisy blocks of a batch see of the past, and which noise levels they have then.

One checkpoint can be trained for several ways of streaming: each batch draws a visibility (streamgen.attention), which
fixes the mask and how noise levels are drawn. A joint window is Rolling Forcing's (arXiv 2509.25161): consecutive
blocks whose noise rises from the oldest to the newest, which see each other and the clean blocks before them. Windows
tile a clip, as in its training; a first one that is short is a stream's beginning, a last one its end.
Letters: B clips, G blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from streamgen.geometry import VideoGeometry
from streamgen.visibility import VISIBILITIES, Layout, Visibility, check_window

NOISY_CONTEXT: tuple[Visibility, ...] = ("same_level", "latest")
"""Visibilities for which the clean copy of a clip is not needed."""


@dataclass(frozen=True, slots=True)
class View:
    """The visibility of one batch."""

    visibility: Visibility = "clean"
    window_starts: tuple[int, ...] = ()
    """Joint: first blocks of the windows."""
    steps: tuple[int, ...] = ()
    """Joint: the step at which each block stands, 0 is the noisiest."""
    lag_blocks: int = 1

    @property
    def alone(self) -> bool:
        """The noisy copy is its own context."""
        return self.visibility in NOISY_CONTEXT

    @property
    def shares_level(self) -> bool:
        """All blocks of a clip have one noise level."""
        return self.visibility in ("same_level", "lagged")

    def layout(self, blocks: int, geometry: VideoGeometry, window_frames: int, sink_frames: int) -> Layout:
        """Copies and mask of a clip of so many blocks."""
        return Layout(
            block_frames=tuple(geometry.block_size(b) for b in range(blocks)),
            copies=(False,) if self.alone else (True, False),
            window_starts=self.window_starts,
            lag_blocks=self.lag_blocks,
            window_frames=window_frames,
            sink_frames=sink_frames,
        )


CLEAN = View()
ALONE = View("latest")


def joint_view(blocks: int, joint_blocks: int, stops: Iterable[int]) -> View:
    """Windows that end before the blocks `stops` (rising, the last one at `blocks` or beyond: the clip cuts it off).

    A block takes its last step in the window that it is the oldest of, and its first one as the newest.
    """
    ends = list(stops)
    steps = tuple(next(end for end in ends if end > block) - 1 - block for block in range(blocks))
    assert max(steps) < joint_blocks, (blocks, ends)
    return View("joint", (0, *(end for end in ends if end < blocks)), steps)


def draw_joint(blocks: int, joint_blocks: int, after_gap: bool, rng: torch.Generator) -> View:
    """Windows from a random place on; after a gap the first block is the sink, and finished long ago."""
    first = int(torch.randint(1, joint_blocks + 1, (), generator=rng))
    if after_gap:
        return joint_view(blocks, joint_blocks, [1, *range(1 + first, blocks + joint_blocks, joint_blocks)])
    return joint_view(blocks, joint_blocks, range(first, blocks + joint_blocks, joint_blocks))


def whole_windows(blocks: int, joint_blocks: int) -> View:
    """Windows of which the last one is full and ends with the clip."""
    return joint_view(blocks, joint_blocks, range(blocks % joint_blocks or joint_blocks, blocks + 1, joint_blocks))


def joint_u(view: View, joint_blocks: int, phase_B1: Tensor) -> Tensor:
    """Uniform noise levels u [B, G] of a clip's windows.

    phase in [0, 1): how far the windows are on the way to their next step. At 0 the levels are those of a sampler of
    `joint_blocks` steps; between, those of a model of many steps, whose windows move by less than a block at a time.
    """
    steps = torch.tensor(view.steps, device=phase_B1.device)
    return (joint_blocks - steps - phase_B1) / joint_blocks


def draw_visibility(shares: Mapping[Visibility, float], rng: torch.Generator) -> Visibility:
    """One of the visibilities by its share; a single one costs no random number."""
    names = [name for name, share in shares.items() if share > 0]
    if len(names) == 1:
        return names[0]
    drawn = torch.multinomial(torch.tensor([shares[name] for name in names]), 1, generator=rng)
    return names[int(drawn)]


def card_visibility(shares: Mapping[Visibility, float]) -> tuple[Visibility, ...]:
    """What a model's card may list. Independent levels (`latest`) include equal ones and clean ones."""
    trained = {name for name, share in shares.items() if share > 0}
    if "latest" in trained:
        trained |= {"clean", "same_level"}
    return tuple(name for name in VISIBILITIES if name in trained)


def check_shares(
    shares: Mapping[Visibility, float],
    *,
    clip_blocks: int,
    joint_blocks: int,
    lag_blocks: int,
    geometry: VideoGeometry,
    window_frames: int,
    sink_frames: int,
) -> None:
    """ValueError for shares that are none, or that such clips and such a window cannot show."""
    if min(shares.values(), default=0.0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
        listed = ", ".join(f"{name} {share}" for name, share in shares.items()) or "nothing"
        raise ValueError(f"visibility has the shares {listed}; they must be 0 or more and add up to 1")
    for name, key, count in (("joint", "joint_blocks", joint_blocks), ("lagged", "lag_blocks", lag_blocks)):
        if shares.get(name, 0) <= 0:  # type: ignore[call-overload]
            continue
        if not 2 <= count < clip_blocks:
            raise ValueError(
                f"{key} is {count} and clip_blocks {clip_blocks}; visibility {name} needs at least 2, "
                "and clips that are longer than that"
            )
    if shares.get("joint", 0) > 0:
        check_window(window_frames, sink_frames, joint_blocks * geometry.block_frames)
