"""Who sees whom: the one rule of visibility, and the masks that say it to the attention backends.

Frames are latent frames; a window counts all visible frames: sink, past and what is being denoised.
Letters: T tokens of the sequence, F its frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Visibility = Literal["clean", "same_level", "latest", "lagged", "joint"]
"""Which version of earlier blocks a block sees while it is denoised.

clean: finished (Self-Forcing, CausVid). same_level: as they were at its own noise level (StreamDiffusion 2, Live
Avatar). latest: at whatever level they have reached (diffusion forcing, MAGI-1). lagged: finished from a few blocks
back, at its own level between. joint: finished before a window of blocks of rising noise that see each other
(Rolling Forcing, StreamDiT).
"""
VISIBILITIES: tuple[Visibility, ...] = get_args(Visibility)


class Place(NamedTuple):
    """Where tokens stand; the fields broadcast. Frames and blocks are counted from the start of the clip."""

    frame: Tensor
    block: Tensor
    unit: Tensor
    """First block of what is denoised together with the token: its own block, or that of its joint window."""
    stop: Tensor
    """Frame at which the unit ends."""
    clean: Tensor
    """Of the clean copy (else of the noisy one)."""


def visible(
    q: Place,
    k: Place,
    window_frames: int | None,
    sink_frames: int,
    lag_blocks: int | Tensor = 1,
) -> Tensor:
    """May a query look at a key?

    Own unit: always and in both directions, within the same copy (clean with clean, noisy with noisy).
    Past blocks: each in one version. Clean queries see clean keys. Noisy ones see the clean copy of blocks that are
    `lag_blocks` or more before their unit, and the noisy copy of those between: a lag of 1 is clean context, one of
    all blocks is noisy context alone.
    Of the past only the sink (never evicted) and the last window - sink frames, the own unit included: exactly what
    the ring cache holds while this unit is made.
    """
    own = (k.unit == q.unit) & (k.clean == q.clean)
    past = (k.block < q.unit) & (k.clean == (q.clean | (k.block <= q.unit - lag_blocks)))
    if window_frames is None:
        return own | past
    kept = (k.frame < sink_frames) | (k.frame >= q.stop - (window_frames - sink_frames))
    return own | (past & kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A training sequence: the copies of a clip that it joins along time, and what each block sees."""

    block_frames: tuple[int, ...]
    """Latent frames of each block."""
    copies: tuple[bool, ...]
    """Which copies there are, in order: True is the clean one, False the noisy one."""
    window_starts: tuple[int, ...] = ()
    """First blocks of the noisy copy's joint windows, 0 among them; none: every block is denoised for itself."""
    lag_blocks: int = 1
    """How far the clean past is behind (see `visible`); of a noisy copy alone all of the past is noisy."""
    window_frames: int | None = None
    sink_frames: int = 0

    def __post_init__(self) -> None:
        starts, blocks = self.window_starts, len(self.block_frames)
        if starts and (starts[0] != 0 or list(starts) != sorted(set(starts)) or starts[-1] >= blocks):
            raise ValueError(f"window_starts={starts}: must rise from 0 within {blocks} blocks")
        if self.lag_blocks < 1:
            raise ValueError(f"lag_blocks={self.lag_blocks}: must be at least 1")
        check_window(self.window_frames, self.sink_frames, max(max(self._unit_frames(c)) for c in self.copies))

    @property
    def lag(self) -> int:
        """`lag_blocks`, or all blocks when there is no clean copy."""
        return self.lag_blocks if True in self.copies else len(self.block_frames)

    def place(self) -> Place:
        """Of every frame of the sequence; each field is [frames of all copies]."""
        sizes = torch.tensor(self.block_frames)
        ends, block = sizes.cumsum(0), torch.repeat_interleave(sizes)
        parts = []
        for clean in self.copies:
            units = self._units(clean)
            unit = torch.tensor([start for start, stop in units for _ in range(start, stop)])[block]
            stop = torch.tensor([int(ends[stop - 1]) for start, stop in units for _ in range(start, stop)])[block]
            parts.append(Place(torch.arange(len(block)), block, unit, stop, torch.full(block.shape, clean)))
        return Place(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def _units(self, clean: bool) -> list[tuple[int, int]]:
        """(first block, block after the last) of what is denoised together."""
        blocks = len(self.block_frames)
        starts = range(blocks) if clean or not self.window_starts else self.window_starts
        return list(pairwise([*starts, blocks]))

    def _unit_frames(self, clean: bool) -> list[int]:
        return [sum(self.block_frames[start:stop]) for start, stop in self._units(clean)]


def check_window(window_frames: int | None, sink_frames: int, unit_frames: int) -> None:
    """ValueError unless a window holds its sink and what is denoised together."""
    if window_frames is not None and window_frames < sink_frames + unit_frames:
        raise ValueError(
            f"window_frames={window_frames}: must be at least {sink_frames + unit_frames}, to hold the sink "
            f"({sink_frames}) and what is denoised together ({unit_frames} frames)"
        )


Span = tuple[int, int]
"""From a token to before another."""


class Spans(NamedTuple):
    """A mask without a mask: queries that see the same keys, and the keys that they see (`span_mask`)."""

    tokens: int
    """Of the sequence, queries and keys alike."""
    seen: tuple[tuple[Span, tuple[Span, ...]], ...]
    """The queries from the first token to the last, each group with its keys in order."""


def mask_of(layout: Layout, tokens_per_frame: int, backend: str, device: torch.device) -> Tensor | BlockMask | Spans:
    """The mask of a sequence as a backend takes it."""
    if backend == "flex":
        return flex_mask(layout, tokens_per_frame, device)
    if backend == "spans":
        return span_mask(layout, tokens_per_frame)
    return dense_mask(layout, tokens_per_frame).to(device)


def frame_mask(layout: Layout) -> Tensor:
    """Bool [F, F] of the frames of a sequence."""
    place = layout.place()
    q = Place(*(field[:, None] for field in place))
    return visible(q, place, layout.window_frames, layout.sink_frames, layout.lag)


def span_mask(layout: Layout, tokens_per_frame: int) -> Spans:
    """The same for the backend `spans`."""
    frames_FF = frame_mask(layout)
    rows = [tuple(row) for row in frames_FF.tolist()]

    def runs(values: Sequence[Any]) -> list[Span]:
        """Where neighbours are equal, in tokens."""
        starts = [0, *(i for i in range(1, len(values)) if values[i] != values[i - 1]), len(values)]
        return [(a * tokens_per_frame, b * tokens_per_frame) for a, b in pairwise(starts)]

    def keys(row: Sequence[bool]) -> tuple[Span, ...]:
        return tuple(run for run in runs(row) if row[run[0] // tokens_per_frame])

    seen = tuple((run, keys(rows[run[0] // tokens_per_frame])) for run in runs(rows))
    return Spans(len(rows) * tokens_per_frame, seen)


def dense_mask(layout: Layout, tokens_per_frame: int) -> Tensor:
    """Bool [T, T] of a sequence, for the backends `sdpa` and `math`."""
    frames_FF = frame_mask(layout)
    return frames_FF.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)


def flex_mask(layout: Layout, tokens_per_frame: int, device: torch.device | str = "cpu") -> BlockMask:
    """The same as a BlockMask for the backend `flex`; it fits sequences of this length alone, and any batch."""
    from torch.nn.attention.flex_attention import create_block_mask

    place = Place(*(field.to(device) for field in layout.place()))

    def rule(batch: Tensor, head: Tensor, q_token: Tensor, k_token: Tensor) -> Tensor:
        q = Place(*(field[q_token // tokens_per_frame] for field in place))
        k = Place(*(field[k_token // tokens_per_frame] for field in place))
        return visible(q, k, layout.window_frames, layout.sink_frames, layout.lag)

    tokens = len(place.frame) * tokens_per_frame
    compiled = torch.device(device).type != "cpu"  # else [T, T] integers are held while it is made
    return create_block_mask(rule, None, None, tokens, tokens, device=str(device), _compile=compiled)


def block_causal_mask(
    block_frames: Sequence[int],
    tokens_per_frame: int,
    *,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Bool [T, T] for a clean video of blocks of the given sizes: what cached streaming computes, in one forward."""
    layout = Layout(
        block_frames=tuple(block_frames), copies=(True,), window_frames=window_frames, sink_frames=sink_frames
    )
    return dense_mask(layout, tokens_per_frame)


def teacher_forcing_mask(
    block_frames: Sequence[int],
    tokens_per_frame: int,
    *,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Bool [2T, 2T] for [clean | noisy] copies of one video joined along time; both halves have the same positions.

    Clean block b sees clean blocks up to b, noisy block b sees clean blocks before b and itself, within the window.
    """
    layout = Layout(
        block_frames=tuple(block_frames), copies=(True, False), window_frames=window_frames, sink_frames=sink_frames
    )
    return dense_mask(layout, tokens_per_frame)
