"""Streams that denoise several blocks at once on one device; they iterate, save and change prompts like `Stream`.

    DiagonalStream  same-level visibility: {b at step 0, b-1 at step 1, ...} in one forward (StreamDiffusion 2); the
                    same video as Live Avatar's chain of devices and as the ring of layers, which run the same cells
    RollingStream   joint visibility: the same blocks see each other in one forward (Rolling Forcing, StreamDiT)

A finished block costs one launch, and a prompt shows as many blocks later as there are steps: the price of depth.
Blocks past the end of a stream of given length are begun all the same: every video is the beginning of a longer one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamgen.clocks import Laps
from streamgen.errors import UserError
from streamgen.parallel.levels import LevelCaches, after_cell, cell_pass, commit_cell, recache_pass
from streamgen.rolling import RollingWindow, roll
from streamgen.rollout import StreamState, run_passes
from streamgen.stream import Block, BlockTiming, Stream
from streamgen.timeline import Cue
from streamgen.transformer import TextContext
from streamgen.weights import user_errors

if TYPE_CHECKING:
    from streamgen.pipeline import StreamPipeline


@dataclass(slots=True)
class _Flight:
    """A block on its way."""

    cue: Cue
    text: TextContext
    x_t: Tensor
    step: int = 0


class PipelinedStream(Stream):
    """What both have in common: launches until a block comes out, then the codec."""

    visibility = ""

    def __init__(
        self, pipe: StreamPipeline, state: StreamState, steps: int, first_steps: int | None, max_blocks: int | None
    ) -> None:
        if first_steps not in (None, steps):
            raise UserError(
                f"first_steps is {first_steps}: blocks that are made together have equal steps, here {steps}"
            )
        super().__init__(pipe, state, steps, None, max_blocks)
        self.finished = 0
        """Blocks that came out."""
        self._made: tuple[Cue, Tensor] | None = None
        """A block on its way through the codec: a codec that fails is asked again."""

    @property
    def made_blocks(self) -> int:
        return self.finished

    def __next__(self) -> Block:
        if self._cancelled.is_set() or (self.max_blocks is not None and self.finished >= self.max_blocks):
            raise StopIteration
        laps = Laps(self.pipe.device)
        self._adapters.enter(self.state.position)  # another stream may have had others
        while self._made is None:
            self._made = self._launch()
            laps.mark("denoise")
            if self._made is None and self._cancelled.is_set():
                raise StopIteration
        cue, latents = self._made
        coming = self.begin_decode(latents)
        laps.mark("decode")
        frames, self.state.codec = coming.wait(), coming.codec
        stages, total_ms = laps.read()
        self._made = None
        timing = BlockTiming(
            text_ms=0.0,
            recache_ms=0.0,
            denoise_ms=stages.get("denoise", []),
            decode_ms=coming.decode_ms(),
            commit_ms=0.0,
            total_ms=total_ms,
        )
        index, self.finished = self.finished, self.finished + 1
        return Block(index=index, frames=frames, prompt=cue.prompt, prompt_version=cue.version, timing=timing)

    def _launch(self) -> tuple[Cue, Tensor] | None:
        """One forward -> the block that it finished, if any."""
        raise NotImplementedError

    def _text(self, block: int) -> tuple[Cue, TextContext]:
        cue = self.timeline.at(block)
        return cue, self._texts.context(self.timeline, cue)

    def state_dict(self, at: object = None) -> dict[str, Any]:
        """As `Stream.state_dict`, with what is in flight."""
        if at is not None:
            raise ValueError("a pipelined stream is saved as it stands; it has no snapshots")
        saved = {**super().state_dict(), "visibility": self.visibility, "finished": self.finished}
        return saved if self._made is None else {**saved, "made": self._made[1]}

    def _load_flights(self, saved: Mapping[str, Any]) -> None:
        self.finished = saved["finished"]
        if "made" in saved:
            self._made = self.timeline.at(self.finished), saved["made"].to(self.pipe.device)


class DiagonalStream(PipelinedStream):
    """Same-level visibility (see `streamgen.parallel.levels`), one forward per launch."""

    visibility = "same_level"

    def __init__(
        self, pipe: StreamPipeline, state: StreamState, steps: int, first_steps: int | None, max_blocks: int | None
    ) -> None:
        super().__init__(pipe, state, steps, first_steps, max_blocks)
        policy, stored_as = state.cache.spec.policy, state.cache.stored_as
        caches = {step: pipe.new_cache(policy, stored_as=stored_as) for step in range(1, steps)}
        others = {
            step: StreamState(geometry=pipe.geometry, cache=cache, seeds=state.seeds, ops=state.ops)
            for step, cache in caches.items()
        }
        self.levels = LevelCaches({0: state, **others})
        self._sampled = pipe.sampling(steps)
        self._flights: dict[int, _Flight] = {}

    @torch.no_grad()
    def _launch(self) -> tuple[Cue, Tensor] | None:
        state, sampling, model = self.state, self._sampled, self.pipe.transformer
        entering = state.position
        if entering not in self._flights:
            cue = self.fix_cue()
            self._flights[entering] = _Flight(cue, self._texts.context(self.timeline, cue), state.noise(0))
        for flight in self._flights.values():
            again = recache_pass(self.levels[flight.step], flight.step, flight.text, sampling, flight.cue.transition)
            if again is not None:
                run_passes(model, [again])
                self.levels[flight.step].cache.commit(again.cache)
        asked = {
            block: cell_pass(self.levels[flight.step], block, flight.step, flight.x_t, flight.text, sampling)
            for block, flight in self._flights.items()
        }
        outputs = dict(zip(asked, run_passes(model, list(asked.values())), strict=True))
        following = {  # all of them before anything advances: a launch that fails may be run again
            block: after_cell(self.levels[f.step], block, f.step, f.x_t, outputs[block], sampling)
            for block, f in self._flights.items()
        }
        for block, flight in self._flights.items():
            commit_cell(self.levels[flight.step], asked[block].cache, flight.x_t)
            flight.x_t, flight.step = following[block], flight.step + 1
        state.begun = False
        oldest = next(iter(self._flights))
        if self._flights[oldest].step < self.steps:
            return None
        done = self._flights.pop(oldest)
        return done.cue, done.x_t

    def state_dict(self, at: object = None) -> dict[str, Any]:
        saved = super().state_dict(at)
        saved["levels"] = {str(step): self._level_state(step) for step in range(1, self.steps)}
        saved["flights"] = {str(b): {"step": f.step, "x_t": f.x_t} for b, f in self._flights.items()}
        return saved

    def _level_state(self, step: int) -> dict[str, Any]:
        level = self.levels[step]
        held = {"position": level.position, "cache": level.cache.state_dict()}
        return {**held, "recent": torch.stack(list(level.recent.values()), 1)} if level.recent else held

    def _load_flights(self, saved: Mapping[str, Any]) -> None:
        with user_errors("the saved state"):
            for step in range(1, self.steps):
                level, held = self.levels[step], saved["levels"][str(step)]
                level.cache.load_state_dict(held["cache"])
                level.position = held["position"]
                if "recent" in held:
                    frames = held["recent"].to(self.pipe.device).unbind(1)
                    level.recent = dict(zip(level.cache.frames, frames, strict=True))
            for name, flight in saved["flights"].items():
                cue, text = self._text(int(name))
                self._flights[int(name)] = _Flight(cue, text, flight["x_t"].to(self.pipe.device), flight["step"])
        super()._load_flights(saved)


class RollingStream(PipelinedStream):
    """Joint visibility (see `streamgen.rolling`); the window has as many blocks as there are steps."""

    visibility = "joint"

    def __init__(
        self, pipe: StreamPipeline, state: StreamState, steps: int, first_steps: int | None, max_blocks: int | None
    ) -> None:
        super().__init__(pipe, state, steps, first_steps, max_blocks)
        blocks = pipe.scheduler.joint_blocks
        if blocks and steps != blocks:
            raise UserError(
                f"steps is {steps}: the model was trained for a window of {blocks} blocks, so take {blocks}"
            )
        state.cache.spec.check_block(steps * pipe.geometry.block_frames)
        self._sampled = pipe.sampling(steps)
        self._window = RollingWindow()
        self._texts_of: dict[int, tuple[Cue, TextContext]] = {}

    @property
    def _open_block(self) -> int:
        return self._window.launch + int(self.state.begun)

    def prompt(self, text: str, transition: str = "recache", **options: Any) -> Any:
        """As `Stream.prompt`; a scene has no place in a window whose blocks see each other."""
        if transition == "scene":
            raise UserError(
                "a rolling stream cannot cut to a new scene: its blocks see each other; take cut or recache"
            )
        return super().prompt(text, transition, **options)

    @torch.no_grad()
    def _launch(self) -> tuple[Cue, Tensor] | None:
        state, window = self.state, self._window
        entering = window.launch
        with self._lock:
            state.begun = True
        self._texts_of[entering] = self._text(entering)
        self._recache(entering)
        made = roll(self.pipe.transformer, state, window, lambda block: self._texts_of[block][1], self._sampled)
        state.begun = False
        oldest = next(iter(made))
        if entering - oldest < self.steps - 1:
            return None
        return self._texts_of.pop(oldest)[0], made[oldest]

    def _recache(self, entering: int) -> None:
        """The finished past under the new text, when the first block of it enters the window."""
        cue, text = self._texts_of[entering]
        if cue.transition == "recache":
            again = recache_pass(self.state, 0, text, self._sampled, cue.transition)
            if again is not None:
                run_passes(self.pipe.transformer, [again._replace(sigma=self._sampled.context_noise)])
                self.state.cache.commit(again.cache)

    def state_dict(self, at: object = None) -> dict[str, Any]:
        saved = super().state_dict(at)
        saved["flights"] = {str(block): {"x_t": x_t} for block, x_t in self._window.noisy.items()}
        saved["launch"] = self._window.launch
        return saved

    def _load_flights(self, saved: Mapping[str, Any]) -> None:
        noisy = {int(name): flight["x_t"].to(self.pipe.device) for name, flight in saved["flights"].items()}
        self._window = RollingWindow(saved["launch"], noisy)
        self._texts_of = {block: self._text(block) for block in noisy}
        super()._load_flights(saved)


BY_VISIBILITY: dict[str, type[Stream]] = {"clean": Stream, "same_level": DiagonalStream, "joint": RollingStream}
"""How a visibility is run on one device."""
