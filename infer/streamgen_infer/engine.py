"""Runs launches: passes of several streams, at different steps, in one forward; and the codec's passes.

A launch either happened for a stream or it did not: a block's run changes only when the result of its pass is there.
What fails (out of memory, values that are not finite) is tried again in smaller launches, and then is the failure of
one stream, never of its neighbours. The engine knows no clock and no deadlines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from streamgen.clocks import clock_of
from streamgen.frames import Coming
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import BlockRun, run_passes
from streamgen.stream import Stream
from streamgen.timeline import Cue


@dataclass(frozen=True, slots=True)
class Finished:
    """A block whose last step is done."""

    index: int
    latents: Tensor
    cue: Cue
    steps: int


class Work:
    """A stream in the engine's hands: the block that it is making, and the one that waits for the codec."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.run: BlockRun | None = None
        self.finished: Finished | None = None
        """Its commit, and all passes of the next block but the last, need not wait for the codec."""
        self.cue: Cue | None = None

    def begin(self, steps: int | None = None, cue: Cue | None = None) -> None:
        """Open the stream's next block; steps: other than the stream's own. cue: what `Stream.fix_cue` gave for it."""
        assert self.run is None
        self.cue, self.run = self.stream.begin(steps, cue)

    def choose_steps(self, steps: int) -> None:
        """The number of steps of a block that has not made its first one."""
        assert self.run is not None and self.run.step == 0 and self.run.kind != "commit"
        self.run.use(self.stream.pipe.sampling(steps))

    def drop(self) -> None:
        """Give up what is in progress: the stream stands at its last commit, its prompt may change again."""
        self.cue = self.run = self.finished = None
        self.stream.state.begun = False

    def advanced(self) -> bool:
        """After a pass: note what it finished; True when the block is committed and another may begin."""
        run = self.run
        assert run is not None and self.cue is not None
        if run.kind is None:
            self.cue = self.run = None
            return True
        if run.kind == "commit":
            assert run.latents is not None and self.finished is None, "one block waits for the codec at most"
            self.finished = Finished(self.stream.state.position, run.latents, self.cue, run.last + 1)
        if run.keeps_last_step:
            run.keep()
            self.cue = self.run = None
            return True
        return False


class Engine:
    """One model on one device."""

    def __init__(self, pipe: StreamPipeline) -> None:
        self.pipe = pipe
        self._clock = clock_of(pipe.device)
        self.passes_s = 0.0
        """What the device has spent on passes so far."""

    @torch.no_grad()
    def forward(self, works: Sequence[Work], meanwhile: Callable[[], None] = lambda: None) -> dict[int, Exception]:
        """One forward for the waiting pass of every work -> what failed, by place in `works`.

        The passes must have equal latent shapes: a recache, which is as long as the cache's window, goes alone.
        Returns when the device has done them: a scheduler that only queued its launches would take them for cheap, and
        decide about a device that is far behind. meanwhile: called while it does them.
        """
        runs = [work.run for work in works]
        assert all(run is not None and run.kind is not None for run in runs)
        asked = [run.waiting() for run in runs if run is not None]
        start = self._clock.mark()
        try:
            outputs = run_passes(self.pipe.transformer, asked)
        except RuntimeError as error:  # OutOfMemoryError is one; the CPU's allocator raises the plain kind
            if not _out_of_memory(error):
                raise
            if len(works) == 1:
                return {0: error}
            half = len(works) // 2
            if self.pipe.device.type == "cuda":
                torch.cuda.empty_cache()
            first, second = self.forward(works[:half]), self.forward(works[half:])
            return first | {half + place: e for place, e in second.items()}
        meanwhile()
        failed: dict[int, Exception] = {}
        for place, (run, one, out) in enumerate(zip(runs, asked, outputs, strict=True)):
            assert run is not None
            try:
                run.take(one, out)
            except FloatingPointError as error:
                failed[place] = error
        end = self._clock.mark()
        self._clock.reach(end)
        self.passes_s += self._clock.ms(start, end) / 1000
        return failed

    @property
    def overlaps(self) -> bool:
        """Does the codec run beside the transformer?"""
        return self.pipe.frames.overlaps

    def begin_decode(self, work: Work) -> Coming:
        """Give the block that waits for the codec to it; none waits then."""
        assert work.finished is not None
        coming = work.stream.begin_decode(work.finished.latents)
        work.stream.state.codec, work.finished = coming.codec, None
        return coming

    def decode(self, work: Work) -> np.ndarray:
        """The frames of the block that waits for the codec, uint8 [frames, H, W, 3]."""
        return self.begin_decode(work).wait()


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
