"""Same-level caches made again from latents alone, to the bit.

The window alone does not do: the keys of layer l come from hidden states that looked at the keys of layer l - 1 of the
whole window, and those at the window before. So what a cache holds depends on the inputs of c L blocks back, c being
the blocks of the past in a window and L the layers; what lies before cannot matter. The blocks of the sink hold their
keys for ever, and see only each other. A recache makes its window again from inputs alone, so nothing before that
window matters. `Reach.needed_blocks` says which blocks these are; running their cells again in order, over a cache
whose other frames hold zeros, gives the cache. The journal keeps their inputs at every step, no keys and values.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from streamgen.cache.kv import CacheSpec, held_frames
from streamgen.geometry import VideoGeometry
from streamgen.parallel.job import Order
from streamgen.parallel.levels import window_frames
from streamgen.rollout import Sampling, StreamState


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """How far back the cache of a model depends on its inputs."""

    geometry: VideoGeometry
    spec: CacheSpec
    """Of the whole model."""
    protect_sink: bool

    @property
    def past_blocks(self) -> int:
        """Blocks before a block that its window may touch, the sink apart."""
        g, s = self.geometry, self.spec
        return -(-max(0, s.window_frames - s.sink_frames - g.block_frames) // g.block_frames)

    def needed_blocks(self, shot_start: int, last: int, recaches: Iterable[int]) -> list[int]:
        """Blocks whose inputs rebuild the caches as `last` left them. recaches: blocks of this shot that began so."""
        g, past = self.geometry, self.past_blocks
        begun = sorted(block for block in recaches if block <= last)
        first = last - past * self.spec.num_layers
        inside = [block for block in begun if block > first]
        if inside:
            first = inside[-1] - 1 - past
        wanted = set(range(max(shot_start, first), last + 1))
        if self.spec.sink_frames:
            shot_frame = g.block_start(shot_start)
            sink_last = g.block_of_latent(shot_frame + self.spec.sink_frames - 1)
            wanted |= set(range(shot_start, min(sink_last, last) + 1))
            if begun and not self.protect_sink:  # it rewrote the sink too, from what it saw then
                wanted |= set(range(max(shot_start, begun[-1] - 1 - past), begun[-1] + 1))
        return sorted(wanted)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A finished block, as its passes saw it."""

    order: Order
    inputs: dict[int, Tensor]
    """Step -> x_t [B, F, C, H, W], for all steps but 0, whose input is noise."""


@dataclass(slots=True)
class Journal:
    """What is kept outside of the ranks, to build them again: bounded, whatever the length of the stream."""

    reach: Reach
    entries: dict[int, Entry] = field(default_factory=dict)
    pending: dict[int, Entry] = field(default_factory=dict)
    """Blocks in flight."""
    last: int = -1
    """The last finished block."""

    shot_start: int = 0
    """The first block of the shot that `last` belongs to."""
    _recaches: list[int] = field(default_factory=list)

    def ordered(self, order: Order) -> None:
        """A block was begun."""
        self.pending[order.block] = Entry(order=order, inputs={})

    def ran(self, block: int, step: int, latents: Tensor, steps: int) -> None:
        """A cell was run; `latents` is what the next step takes (after the last step: nothing is kept)."""
        if step + 1 < steps:
            self.pending[block].inputs[step + 1] = latents

    def finished(self, block: int) -> None:
        """The block is out; what no rebuild can need any more is forgotten."""
        assert block == self.last + 1, f"block {block} finished after block {self.last}"
        entry = self.entries[block] = self.pending.pop(block)
        self.last = block
        if entry.order.transition == "scene":
            self.shot_start, self._recaches = block, []
        elif entry.order.transition == "recache":
            self._recaches.append(block)
        keep = self.reach.needed_blocks(self.shot_start, block, self._recaches)
        self.entries = {kept: self.entries[kept] for kept in keep}
        self._recaches = self._recaches[-1:]

    def roll_back(self) -> list[Order]:
        """Forget what was in flight -> its orders, to be given again."""
        orders = [entry.order for _, entry in sorted(self.pending.items())]
        self.pending = {}
        return orders

    def history(self) -> list[Entry]:
        """What a rebuild runs again, in order."""
        return [self.entries[block] for block in sorted(self.entries)]

    def nbytes(self) -> int:
        entries = [*self.entries.values(), *self.pending.values()]
        return sum(x.nbytes for entry in entries for x in entry.inputs.values())


def replayed_transition(state: StreamState, sampling: Sampling, order: Order) -> str | None:
    """The transition to apply when a block is run again: a recache whose window is not known cannot matter."""
    if order.transition == "recache" and any(frame not in state.recent for frame in window_frames(state, sampling)):
        return None
    return order.transition


def skip_to(state: StreamState, block: int, shot_start: int) -> None:
    """Let a cache stand before `block`, as if the blocks between had come; their keys and values are zeros."""
    g, cache = state.geometry, state.cache
    if state.position == block or block == shot_start:
        state.position = block
        return
    saved, spec = cache.state_dict(), cache.spec
    origin, end = g.block_start(shot_start), g.block_start(block)
    frames = len(held_frames(origin, end, spec.window_frames, spec.sink_frames))
    for name in ("k", "v"):
        known = saved[name]
        wider = known.new_zeros((*known.shape[:3], frames * spec.tokens_per_frame, known.shape[4]))
        wider[..., : known.shape[3], :] = known
        saved[name] = wider
    cache.load_state_dict({**saved, "origin": origin, "end": end})
    state.recent = {frame: state.recent[frame] for frame in cache.frames if frame in state.recent}
    state.position = block


def without_rows(entries: Iterable[Entry]) -> list[Entry]:
    """The same, each text given once."""
    seen: set[int] = set()
    found = []
    for entry in entries:
        known = entry.order.text_id in seen
        seen.add(entry.order.text_id)
        found.append(replace(entry, order=replace(entry.order, rows_RLD=None)) if known else entry)
    return found
