"""Rolling key/value cache with frame sinks: constant memory and constant time per block, for ever.

Letters: B batch, N heads, T query tokens (of one block), S key tokens, K head width. Buffers are head-major
[B, N, S, K]. The frame slots of every layer, filled from the left, are [sink | ring]: the first `sink_frames` frames
of a shot stay, later ones replace the oldest of the ring in place. The filled slots are always a prefix, so attention
reads a view: no concat, no mask, no data moved on eviction. The ring is not in order in memory; host integers keep it.

The window counts latent frames in all: sink and the block in progress included (Self-Forcing's `local_attn_size`).
Writes are staged. A pass over a block writes only the slots of the frames that the block pushes out, and no bookkeeping
changes before `commit`, so a launch that fails is simply run again. No device value is read: no sync per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamgen.cache.slots import Slots, Turn, turn
from streamgen.rope import apply_rope, rope_table
from streamgen.transfers import to_device

if TYPE_CHECKING:
    from streamgen.geometry import VideoGeometry
    from streamgen.transformer_config import TransformerConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How a cache treats old keys. A new policy is one small file that fills in these answers."""

    name: str
    stores_rotated: bool
    """Keys are stored after the rotary embedding (positions never change) or before it (re-indexed at each block)."""
    slot: Callable[[int, int, int], int]
    """(frame since the start of the shot, window, sink) -> slot; whatever sat there leaves, which is the eviction."""
    positions: Callable[[Sequence[int]], Sequence[float]]
    """Visible frames in time order, the block in progress last -> their temporal positions."""
    committed: Callable[[KVCache, int], None] | None = None
    """Called with the number of latent frames after a block is committed: what its keys and values do to the sink."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSpec:
    """Shape of a cache. Two caches with equal specs, batch and dtype can load each other's state."""

    num_layers: int
    num_heads: int
    head_dim: int
    grid_height: int
    """Tokens per column of one latent frame, after patching."""
    grid_width: int
    window_frames: int
    """Latent frames a block may attend to, in all: sink and the block itself included."""
    sink_frames: int = 0
    """First frames of a shot that are never evicted."""
    rope_theta: float = 10000.0
    policy: str = "relative"

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "head_dim", "grid_height", "grid_width", "window_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.sink_frames < self.window_frames:
            raise ValueError(
                f"sink_frames is {self.sink_frames} in a window of {self.window_frames} latent frames; the window "
                "holds the sink and the block in progress, so take 0 <= sink_frames < window_frames"
            )

    @classmethod
    def of(
        cls,
        config: TransformerConfig,
        geometry: VideoGeometry,
        *,
        window_frames: int,
        sink_frames: int,
        policy: str = "relative",
    ) -> CacheSpec:
        """That of a model of these sizes, for video of this geometry."""
        return cls(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            grid_height=geometry.grid_height,
            grid_width=geometry.grid_width,
            window_frames=window_frames,
            sink_frames=sink_frames,
            rope_theta=config.rope_theta,
            policy=policy,
        )

    @property
    def tokens_per_frame(self) -> int:
        return self.grid_height * self.grid_width

    def check_block(self, frames: int) -> None:
        """Raise ValueError unless a block of so many latent frames fits beside the sink."""
        if frames < 1 or self.sink_frames + frames > self.window_frames:
            raise ValueError(
                f"a block of {frames} latent frames does not fit a window of {self.window_frames} with a sink of "
                f"{self.sink_frames}: sink + block must lie in {self.sink_frames + 1}..{self.window_frames}; "
                "raise window_frames or lower sink_frames"
            )


def held_frames(origin: int, end: int, window: int, sink: int) -> list[int]:
    """Frames of a shot [origin, end) that a full cache keeps, in time order: the first `sink`, then the most recent."""
    recent = max(origin + sink, end - (window - sink))
    return [*range(origin, min(origin + sink, end)), *range(recent, end)]


def ring_slot(index: int, window: int, sink: int) -> int:
    """Slot of the index-th frame of a shot: sinks keep theirs, later frames go round the ring."""
    return index if index < sink else sink + (index - sink) % (window - sink)


class KVCache:
    """Keys and values of every layer of one model for `batch` streams that advance together.

    `begin` opens a block, the model calls `append` on the handle in every pass, `commit` makes the last pass permanent.
    """

    stored_as: str | None = None
    """The number format of what is stored, if it is not that of what attention reads (`quantised.STORAGES`)."""

    def __init__(
        self,
        spec: CacheSpec,
        *,
        batch: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        from streamgen.cache import policy  # the table imports this module

        self.spec = spec
        self.policy = policy(spec.policy)
        shape = (spec.num_layers, batch, spec.num_heads, spec.window_frames * spec.tokens_per_frame, spec.head_dim)
        self._allocate(shape, dtype, torch.device(device))
        self._origin = self._end = 0
        self._table: tuple[tuple[float, ...], tuple[Tensor, Tensor]] | None = None

    def _allocate(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # Keys as attention reads them. Un-rotated storage is rotated into a scratch once per block; it is never saved.
        self.read_k = self.k if self.policy.stores_rotated else torch.zeros_like(self.k)

    @property
    def stored(self) -> dict[str, Tensor]:
        """What a saved state holds the filled slots of, each [layers, B, N, S, width]."""
        return {"k": self.k, "v": self.v}

    @property
    def frames(self) -> list[int]:
        """Committed latent frames, in time order, sink first."""
        return held_frames(self._origin, self._end, self.spec.window_frames, self.spec.sink_frames)

    def begin(self, block_start_frame: int, frames: int, *, peek: bool = False) -> BlockCache:
        """Open the block [block_start_frame, +frames): it follows the last one, or starts the shot of an empty cache.

        A block whose launch failed is opened again with the same frames: what they push out may be gone already.
        peek: a pass that only reads. Nothing is written, so it cannot be committed and any frames may follow it.
        """
        self.spec.check_block(frames)
        empty = self._origin == self._end
        if not empty and block_start_frame != self._end:
            raise ValueError(
                f"block starts at latent frame {block_start_frame}, but the cache continues at {self._end}; "
                "reset() starts a new shot"
            )
        origin = block_start_frame if empty else self._origin
        return self._block(origin, block_start_frame + frames, frames, peek=peek)

    def begin_recache(self, *, protect_sink: bool = True) -> BlockCache:
        """Open a pass that rewrites the frames already held, each seeing all (LongLive, arXiv 2509.22622).

        Positions stay. It reads nothing that it overwrites: a pass that failed is repaired by running it again.
        """
        sink = self.spec.sink_frames if protect_sink else 0
        frames = len(self.frames[sink:])
        if frames == 0:
            raise ValueError("there is nothing to re-encode: the cache holds no frame outside the protected sink")
        return self._block(self._origin, self._end, frames)

    def _block(self, origin: int, end: int, frames: int, *, peek: bool = False) -> BlockCache:
        return BlockCache(self, origin, end, frames, peek=peek)

    def commit(self, block: BlockCache) -> None:
        """Make the last pass over `block` part of the context of later blocks."""
        if block.base != (self._origin, self._end):
            raise RuntimeError(
                f"stale block: it was opened at frames {block.base}, the cache is now at {(self._origin, self._end)}"
            )
        if len(block.written) != self.spec.num_layers:
            raise RuntimeError(
                f"{len(block.written)} of {self.spec.num_layers} layers were written; "
                "run a whole pass without gradients, then commit"
            )
        self._origin, self._end = block.span
        if self.policy.committed is not None and block.span != block.base:  # equal after a recache
            self.policy.committed(self, len(block.q_positions))

    def reset(self) -> None:
        """Forget every frame (a new shot). Memory stays allocated."""
        self._origin = self._end = 0

    def rope(self, positions: Sequence[float]) -> tuple[Tensor, Tensor]:
        """(cos, sin) [len(positions) * tokens_per_frame, K/2] on the cache's device; the last table is kept."""
        key = tuple(positions)
        if self._table is None or self._table[0] != key:
            cos, sin = rope_table(
                to_device(key, torch.float64, self.k.device),
                self.spec.grid_height,
                self.spec.grid_width,
                self.spec.head_dim,
                self.spec.rope_theta,
            )
            self._table = key, (cos, sin)
        return self._table[1]

    def fill(self) -> tuple[int, int]:
        """(latent frames held, capacity)."""
        return len(self.frames), self.spec.window_frames

    def nbytes(self) -> int:
        """Bytes of all buffers, the scratch included."""
        buffers = [self.k, self.v] + ([] if self.read_k is self.k else [self.read_k])
        return sum(buffer.nbytes for buffer in buffers)

    def state_dict(self) -> dict[str, Any]:
        """Copies of what is held (filled slots only), in slot order, with the shape they belong to."""
        stop = len(self.frames) * self.spec.tokens_per_frame
        held = {name: buffer[..., :stop, :].clone() for name, buffer in self.stored.items()}
        return {"spec": self._identity(), "origin": self._origin, "end": self._end, **held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore to the bit. Raises ValueError naming each field in which the state belongs to another cache."""
        mine, theirs = self._identity(), state["spec"]
        wrong = [
            f"{name} {theirs.get(name)!r} (this cache: {mine.get(name)!r})"
            for name in {**mine, **theirs}
            if theirs.get(name) != mine.get(name)
        ]
        if wrong:
            raise ValueError("the saved cache does not fit this one: " + ", ".join(wrong))
        held = held_frames(state["origin"], state["end"], self.spec.window_frames, self.spec.sink_frames)
        stop = len(held) * self.spec.tokens_per_frame
        for name, buffer in self.stored.items():
            shape, saved = (*buffer.shape[:3], stop, buffer.shape[4]), state[name]
            if tuple(saved.shape) != shape or saved.dtype != buffer.dtype:
                raise ValueError(
                    f"saved cache tensor '{name}' is {tuple(saved.shape)} {saved.dtype}, "
                    f"expected {shape} {buffer.dtype}"
                )
            buffer[..., :stop, :].copy_(saved)
        self._origin, self._end = state["origin"], state["end"]

    def _identity(self) -> dict[str, Any]:
        return {**asdict(self.spec), "batch": self.k.shape[1], "dtype": str(self.k.dtype).removeprefix("torch.")}


class BlockCache:
    """One block's view of the cache: what its queries see and where its keys go. The model gets it in every pass."""

    def __init__(self, cache: KVCache, origin: int, end: int, frames: int, *, peek: bool = False) -> None:
        spec = cache.spec
        self.peek = peek
        self.cache, self.base, self.span = cache, (cache._origin, cache._end), (origin, end)
        self.visible_frames = held_frames(origin, end, spec.window_frames, spec.sink_frames)
        self.written: set[int] = set()
        slots = [
            cache.policy.slot(frame - origin, spec.window_frames, spec.sink_frames) for frame in self.visible_frames
        ]
        context = len(slots) - frames
        self._slots = slots[:context], slots[context:]
        # Runs of neighbouring slots: (slice of the buffer, slice of the block or of the ordered context), in tokens.
        self._context = _runs(slots[:context], spec.tokens_per_frame)
        self._block = _runs(slots[context:], spec.tokens_per_frame)
        self._stop = len(slots) * spec.tokens_per_frame
        self._context_rotated: set[int] = set()
        positions = cache.policy.positions(self.visible_frames)
        self.q_positions = list(positions[context:])
        if cache.policy.stores_rotated:
            self._rope = cache.rope(self.q_positions)
        else:
            self._context_rope = cache.rope(positions)
            cos, sin = self._context_rope
            self._rope = cos[context * spec.tokens_per_frame :], sin[context * spec.tokens_per_frame :]

    def rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, K/2] of the block's own frames, for the queries."""
        return self._rope

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]:
        """Place this pass's un-rotated keys and values -> what the block's queries attend to: (k_BNSK rotated, v_BNSK).

        Without gradients the result is a view of the buffer. With gradients, and in a pass that only peeks, nothing is
        written (a later pass would overwrite what autograd saved): the constant context is concatenated with the
        block, and the commit pass, which runs without gradients, does the write.
        """
        cache = self.cache
        store_k, read_k, values = cache.k[layer], cache.read_k[layer], cache.v[layer]
        rotated = apply_rope(k_BNTK, *self._rope)
        self._rotate_context(layer)
        if self.peek or (torch.is_grad_enabled() and (k_BNTK.requires_grad or v_BNTK.requires_grad)):
            past_k, past_v = self._past(layer)
            return torch.cat([*past_k, rotated], dim=2), torch.cat([*past_v, v_BNTK], dim=2)
        for slots, tokens in self._block:
            read_k[:, :, slots] = rotated[:, :, tokens]
            values[:, :, slots] = v_BNTK[:, :, tokens]
            if not cache.policy.stores_rotated:
                store_k[:, :, slots] = k_BNTK[:, :, tokens]
        self.written.add(layer)
        return read_k[:, :, : self._stop], values[:, :, : self._stop]

    def slots(self, layer: int, turn: Turn = turn) -> Slots | None:
        """Where a kernel puts this pass's keys and values, in place of `append`; it counts as written.

        None where only `append` will do: in a pass that peeks (and in one with gradients, which the caller sees).
        """
        if self.peek:
            return None
        cache = self.cache
        self._rotate_context(layer, turn)
        self.written.add(layer)
        raw = None if cache.policy.stores_rotated else cache.k[layer]
        return Slots(cache.read_k[layer], cache.v[layer], raw, self.places, self._stop)

    @property
    def is_full(self) -> bool:
        """Does the block see as many frames as ever one will?"""
        return len(self.visible_frames) == self.cache.spec.window_frames

    @cached_property
    def places(self) -> Tensor:
        """int32 [B, T]: the slot of each of the block's tokens, on the cache's device."""
        k, tokens = self.cache.k, self.cache.spec.tokens_per_frame
        first_F = to_device(self._slots[1], torch.int32, k.device) * tokens
        places_T = (first_F[:, None] + torch.arange(tokens, dtype=torch.int32, device=k.device)).flatten()
        return places_T.expand(k.shape[1], -1).contiguous()

    def _past(self, layer: int) -> tuple[list[Tensor], list[Tensor]]:
        """Keys (rotated) and values of the context in time order, a part for each run of slots."""
        cache = self.cache
        self._rotate_context(layer)
        runs = [slots for slots, _ in self._context]
        return (
            [cache.read_k[layer][:, :, slots] for slots in runs],
            [cache.v[layer][:, :, slots] for slots in runs],
        )

    def snapshot(self) -> FrozenContext:
        """A copy of what the block sees of the past, for a pass that is run again in the backward (checkpointing).

        By then the ring holds later frames, so reading it again would give wrong gradients.
        """
        frozen = FrozenContext(self._rope, [], [])
        for layer in range(self.cache.spec.num_layers):
            for kept, parts in zip((frozen.k, frozen.v), self._past(layer), strict=True):
                kept.append(torch.cat(parts, 2) if parts else None)
        return frozen

    def _rotate_context(self, layer: int, turn: Turn = turn) -> None:
        """Rotate un-rotated keys of the context into the scratch: once per block and layer, for all its passes."""
        if self.cache.policy.stores_rotated or layer in self._context_rotated:
            return
        cos, sin = self._context_rope
        for slots, tokens in self._context:
            turn(self.cache.k[layer][:, :, slots], cos[tokens], sin[tokens], self.cache.read_k[layer][:, :, slots])
        self._context_rotated.add(layer)


@dataclass(frozen=True, slots=True)
class FrozenContext:
    """Keys (rotated) and values of a block's past, per layer; the model may pass over it any number of times."""

    queries_rope: tuple[Tensor, Tensor]
    k: list[Tensor | None]
    v: list[Tensor | None]

    def rope(self) -> tuple[Tensor, Tensor]:
        """(cos, sin) [T, K/2] of the block's own frames."""
        return self.queries_rope

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]:
        """What the block's queries attend to; nothing is kept."""
        rotated = apply_rope(k_BNTK, *self.queries_rope)
        past_k, past_v = self.k[layer], self.v[layer]
        if past_k is None or past_v is None:
            return rotated, v_BNTK
        return torch.cat([past_k, rotated], 2), torch.cat([past_v, v_BNTK], 2)


def _runs(slots: Sequence[int], tokens: int) -> list[tuple[slice, slice]]:
    """Merge neighbouring slots: [(slice of the buffer, slice of the sequence)], in tokens. A block has at most two."""
    runs: list[list[int]] = []  # first slot, first index, count
    for index, slot in enumerate(slots):
        if runs and slot == runs[-1][0] + runs[-1][2]:
            runs[-1][2] += 1
        else:
            runs.append([slot, index, 1])
    return [(slice(s * tokens, (s + n) * tokens), slice(i * tokens, (i + n) * tokens)) for s, i, n in runs]
