"""One viewer's stream: block after block of frames, prompts that change on the way, and a state that can be saved."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from streamgen.adapters import AdapterPlan, stronger
from streamgen.blocks import Block, BlockTiming, PromptReceipt, Snapshot
from streamgen.clocks import Laps
from streamgen.codec import CodecState
from streamgen.errors import UserError
from streamgen.frames import Coming
from streamgen.geometry import VideoGeometry
from streamgen.rollout import BlockRun, Cancelled, Sampling, StreamState, rollout_block
from streamgen.stream_state import STATE_MARK, read_state, saved_state
from streamgen.timeline import Cue, PromptTimeline
from streamgen.transformer import TextContext
from streamgen.weights import save_tree, user_errors

if TYPE_CHECKING:
    from streamgen.pipeline import StreamPipeline

__all__ = ["MAX_STEPS", "STATE_MARK", "Block", "BlockTiming", "PromptReceipt", "Snapshot", "Stream"]

MAX_STEPS = 1000
MAX_WARNINGS = 64


class Stream(Iterator[Block]):
    """One viewer's video. Iterate for blocks; `prompt` and `cancel` may be called from any thread meanwhile.

    Whoever runs passes of several streams together takes `begin`, `decode` and the BlockRun between them instead.
    """

    visibility = "clean"
    """What a block sees of earlier ones (`streamgen.visibility.Visibility`); other classes are in `pipelined`."""

    def __init__(
        self,
        pipe: StreamPipeline,
        state: StreamState,
        steps: int,
        first_steps: int | None,
        max_blocks: int | None,
    ) -> None:
        self.pipe, self.state = pipe, state
        self.steps, self.first_steps, self.max_blocks = steps, first_steps, max_blocks
        self.warnings: list[str] = []
        """What is odd about what was asked for, each once; the newest."""
        self._texts, self._adapters = _Texts(pipe), AdapterPlan(pipe)
        self._lock = threading.Lock()
        self._cancelled = threading.Event()
        if max_blocks is not None and max_blocks < 1:
            raise UserError(f"max_blocks is {max_blocks}; it must be at least 1")
        if self.visibility not in pipe.scheduler.visibility:
            trained = ", ".join(pipe.scheduler.visibility)
            self._warn(f"the model was trained for visibility {trained}, not {self.visibility}")
        for count in {steps, steps if first_steps is None else first_steps}:
            self.check_steps(count)

    @classmethod
    def from_state(cls, pipe: StreamPipeline, saved: Mapping[str, Any], max_blocks: int | None) -> Stream:
        """The stream that `state_dict` described; UserError where it does not belong to `pipe`."""
        state = read_state(pipe, saved)
        stream = cls(pipe, state, saved["steps"], saved["first_steps"], max_blocks)
        stream._adapters.load_state_dict(saved.get("adapters", {}))
        stream._adapters.enter(state.position)
        stream._load_flights(saved)
        return stream

    def _load_flights(self, saved: Mapping[str, Any]) -> None:
        """What a saved state has beyond a serial stream's."""

    @property
    def geometry(self) -> VideoGeometry:
        """The pipeline's, but that block 0 may be an image alone."""
        return self.state.geometry

    @property
    def timeline(self) -> PromptTimeline:
        assert self.state.timeline is not None  # the pipeline makes every state with one
        return self.state.timeline

    def __next__(self) -> Block:
        state = self.state
        if self._cancelled.is_set() or (self.max_blocks is not None and state.position >= self.max_blocks):
            raise StopIteration
        cue = self.fix_cue()
        laps = Laps(self.pipe.device)
        transition = stronger(self._adapters.enter(state.position), cue.transition)
        text = self._texts.context(self.timeline, cue)
        laps.mark("text")
        coming: list[Coming] = []

        def decode(latents: Tensor) -> None:
            coming.append(self.begin_decode(latents))
            laps.mark("decode")

        index = state.position
        try:
            rollout_block(
                self.pipe.transformer,
                state,
                text,
                self._sampling(None),
                transition=transition,
                cancelled=self._cancelled.is_set,
                mark=laps.mark,
                emit=decode,
            )
        except Cancelled:
            raise StopIteration from None
        frames, state.codec = coming[0].wait(), coming[0].codec
        stages, total_ms = laps.read()
        timing = BlockTiming(
            text_ms=stages["text"][0],
            recache_ms=stages["enter"][0],
            denoise_ms=stages.get("denoise", []),
            decode_ms=coming[0].decode_ms(),
            commit_ms=stages["commit"][0],
            total_ms=total_ms,
        )
        return Block(
            index=index,
            frames=frames,
            prompt=cue.prompt,
            prompt_version=cue.version,
            timing=timing,
        )

    def begin(self, steps: int | None = None, cue: Cue | None = None) -> tuple[Cue, BlockRun]:
        """The next block, to be run pass by pass; from here on its prompt is fixed. steps: other than the stream's.

        cue: what `fix_cue` gave, if it was asked for already.
        """
        if self.state.given is not None:
            raise UserError("a stream from an image shares no launches; iterate over it")
        if self._adapters:
            raise UserError("a stream with adapters of its own shares no launches; give them to the pipeline instead")
        cue = self.fix_cue() if cue is None else cue
        self._adapters.enter(self.state.position)
        text = self._texts.context(self.timeline, cue)
        return cue, BlockRun(self.state, text, self._sampling(steps), transition=cue.transition)

    def begin_decode(self, latents: Tensor) -> Coming:
        """A block's latents -> its frames on their way, and the codec's state after them.

        The state belongs into `state.codec` once the block is committed, so that both stand at the same block.
        """
        return self.pipe.frames.begin(self.pipe.codec, latents, self.state.codec)

    def decode(self, latents: Tensor) -> tuple[np.ndarray, CodecState]:
        """The same, and wait for the frames: uint8 [frames, H, W, 3]."""
        coming = self.begin_decode(latents)
        return coming.wait(), coming.codec

    def change(
        self, text: str, transition: str, block: int, *, begun: int, blend_blocks: int = 4
    ) -> tuple[int, tuple[str, ...]]:
        """Let a prompt hold from `block` on, also a block that was made and will be made again -> its version, and
        what is odd about it.

        Other prompts of that block and of later ones before `begun` are given up, those for blocks after that stay.
        """
        odd = tuple(self.pipe.text.tokenize(text).warnings)
        with self._lock:
            version = self.timeline.add(
                text, block, transition, blend_blocks=blend_blocks, insert=True, replace_until=max(begun, block + 1)
            )
        for warning in odd:
            self._note(warning)
        return version, odd

    def snapshot(self) -> Snapshot:
        """Where the stream stands, between blocks."""
        state = self.state
        return Snapshot(position=state.position, cache=state.cache.state_dict(), recent=state.recent, codec=state.codec)

    def restore(self, snapshot: Snapshot) -> None:
        """Turn back to where a snapshot was taken; what follows is made again, to the bit."""
        state = self.state
        state.cache.load_state_dict(snapshot.cache)
        state.position, state.recent, state.codec, state.begun = (
            snapshot.position,
            snapshot.recent,
            snapshot.codec,
            False,
        )

    @property
    def seed(self) -> int:
        return self.state.seeds[0]

    @property
    def cache_policy(self) -> str:
        return self.state.cache.spec.policy

    def cache_fill(self) -> tuple[int, int]:
        """(latent frames held, capacity)."""
        return self.state.cache.fill()

    def close(self) -> None:
        """Let go of what the stream holds: here nothing but memory."""

    @property
    def made_blocks(self) -> int:
        """Blocks whose frames were given out."""
        return self.state.position

    @property
    def _open_block(self) -> int:
        """The first block whose prompt may still change."""
        return self.state.position + int(self.state.begun)

    def fix_cue(self) -> Cue:
        """The prompt of the next block, which does not change from here on."""
        with self._lock:
            self.state.begun = True
            return self.timeline.at(self.state.position)

    def _sampling(self, steps: int | None) -> Sampling:
        if steps is None:
            steps = self.first_steps if self.first_steps and self.state.position == 0 else self.steps
        return self.pipe.sampling(steps)

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        at_block: int | None = None,
        at_seconds: float | None = None,
        blend_blocks: int = 4,
    ) -> PromptReceipt:
        """Change the prompt, by default at the next block that has not begun."""
        geometry = self.geometry
        if at_block is not None and at_seconds is not None:
            raise UserError("give at_block or at_seconds, not both")
        self.check_prompt(text)
        if at_seconds is not None:
            with user_errors("at_seconds"):
                at_block = geometry.block_at_seconds(at_seconds)
        with self._lock:
            earliest = self._open_block
            block = earliest if at_block is None else at_block
            if self.max_blocks is not None and block >= self.max_blocks:
                raise UserError(f"a prompt for block {block} is past the end: the stream has {self.max_blocks} blocks")
            version = self.timeline.add(text, block, transition, blend_blocks=blend_blocks, earliest=earliest)
        seconds = geometry.block_pixel_start(block) / geometry.fps
        return PromptReceipt(version=version, block=block, seconds=seconds)

    def use_loras(
        self, strengths: Mapping[str, float], transition: str = "recache", *, at_block: int | None = None
    ) -> int:
        """Other adapters from a block on, by default the next that has not begun -> that block.

        strengths: name -> strength of files that `pipe.load_lora` has loaded; {} for none. The prompt is encoded anew.
        transition: what becomes of the keys and values of earlier blocks, which the old weights made. "recache" makes
        those of the window anew (not the sink's, if the card protects it), "cut" leaves all, "scene" forgets all. Of
        this and of the transition of a prompt for the same block the one that changes more holds.
        """
        if self.visibility != "clean":
            raise UserError(f"visibility {self.visibility}: blocks that are made together have the same weights")
        with self._lock:
            block = self._open_block if at_block is None else at_block
            if block < self._open_block:
                raise UserError(f"adapters for block {block} come too late: the earliest is {self._open_block}")
            if self.max_blocks is not None and block >= self.max_blocks:
                raise UserError(f"adapters for block {block} are past the end: the stream has {self.max_blocks} blocks")
            self._adapters.change(strengths, transition, block)
        return block

    @property
    def loras(self) -> dict[str, float]:
        """Adapters of the next block, name -> strength."""
        return self._adapters.at(self.state.position)

    def cancel(self) -> None:
        """End the iteration before its next pass. The state stays at the last whole block, for saving or resuming."""
        self._cancelled.set()

    def state_dict(self, at: Snapshot | None = None) -> dict[str, Any]:
        """Everything that the rest of the video depends on: JSON values and tensors.

        As it stands between blocks, or as it stood at a snapshot (at any time).
        """
        state = self.state
        if at is None:
            at, begun = self.snapshot(), state.begun
        else:
            begun = False
        saved = saved_state(self.pipe, state, at, begun=begun, steps=self.steps, first_steps=self.first_steps)
        if adapters := self._adapters.state_dict(at.position):
            saved["adapters"] = adapters
        return saved

    def save_state(self, path: str | Path) -> None:
        """Write `state_dict` to one file, whole or not at all."""
        save_tree(self.state_dict(), Path(path), STATE_MARK)

    def check_steps(self, steps: int) -> None:
        if not 1 <= steps <= MAX_STEPS:
            raise UserError(f"steps is {steps}; it must be 1 to {MAX_STEPS}")
        trained = self.pipe.scheduler.trained_steps
        if steps not in trained:
            self._warn(f"the model was trained for {_either(trained)} steps, not {steps}")

    def check_prompt(self, prompt: str) -> None:
        """UserError for a prompt without a known word; a warning for each word that is left out."""
        for warning in self.pipe.text.tokenize(prompt).warnings:
            self._warn(warning)

    def _note(self, message: str) -> None:
        if message not in self.warnings:  # a new list: other threads may be reading the old one
            self.warnings = [*self.warnings, message][-MAX_WARNINGS:]

    def _warn(self, message: str) -> None:
        self._note(message)
        warnings.warn(message, UserWarning, stacklevel=4)


class _Texts:
    """Text keys and values: each version is encoded once, each mixture's keys made once; what is past is dropped."""

    def __init__(self, pipe: StreamPipeline) -> None:
        self._pipe = pipe
        self._rows: dict[int, Tensor] = {}  # version -> [1, L, D] float32
        self._mix: tuple[tuple[int, float], ...] = ()
        self._context: TextContext | None = None
        self._version = 0  # of the weights that the context was made with

    @torch.no_grad()
    def context(self, timeline: PromptTimeline, cue: Cue) -> TextContext:
        weights = self._pipe.adapters.version
        if self._context is None or cue.mix != self._mix or weights != self._version:
            old = self._rows
            self._rows = {
                version: old[version] if version in old else self._pipe.text.encode([timeline.text_of(version)]).float()
                for version, _ in cue.mix
            }
            mixed = torch.stack([share * self._rows[version] for version, share in cue.mix]).sum(0)
            self._context = self._pipe.encode_text(mixed)
            self._mix, self._version = cue.mix, weights
        return self._context


def _either(counts: tuple[int, ...]) -> str:
    return " or ".join(map(str, counts))
