"""Runs launches: passes of several streams, at different steps, in one forward; and the codec's passes.

A launch either happened for a stream or it did not: a block's run changes only when the result of its pass is there.
What fails (out of memory, values that are not finite) is tried again in smaller launches, and then is the failure of
one stream, never of its neighbours. The engine knows no clock and no deadlines.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from streamgen.codec import CodecState
from streamgen.pipeline import StreamPipeline
from streamgen.rollout import BlockRun, run_passes
from streamgen.stream import Stream
from streamgen.timeline import Cue


class Work:
    """A stream in the engine's hands, and the block that it is making."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.cue: Cue | None = None
        self.run: BlockRun | None = None
        self.steps = 0
        self.decoded: tuple[np.ndarray, CodecState] | None = None

    def begin(self, steps: int) -> None:
        """Open the stream's next block."""
        self.cue, self.run = self.stream.begin(steps)
        self.steps, self.decoded = steps, None

    def drop(self) -> None:
        """Give the block in progress up: the stream stands where it stood before, its prompt may change again."""
        self.cue = self.run = self.decoded = None
        self.stream.state.begun = False

    @property
    def decodable(self) -> bool:
        return self.run is not None and self.run.kind == "commit" and self.decoded is None

    @property
    def done(self) -> bool:
        """Committed and decoded: `close_block` may follow."""
        return self.run is not None and self.run.kind is None and self.decoded is not None

    def close_block(self) -> None:
        """The block is finished: the codec's state follows the cache's, and another may begin."""
        assert self.done and self.decoded is not None
        self.stream.state.codec = self.decoded[1]
        self.cue = self.run = self.decoded = None


class Engine:
    """One model on one device."""

    def __init__(self, pipe: StreamPipeline) -> None:
        self.pipe = pipe

    @torch.no_grad()
    def forward(self, works: Sequence[Work]) -> dict[int, Exception]:
        """One forward for the waiting pass of every work -> what failed, by place in `works`.

        The passes must have equal latent shapes: a recache, which is as long as the cache's window, goes alone.
        """
        runs = [work.run for work in works]
        assert all(run is not None and run.kind is not None for run in runs)
        asked = [run.waiting() for run in runs if run is not None]
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
            failed = self.forward(works[:half])
            return failed | {half + place: e for place, e in self.forward(works[half:]).items()}
        failed = {}
        for place, (run, one, out) in enumerate(zip(runs, asked, outputs, strict=True)):
            assert run is not None
            try:
                run.take(one, out)
            except FloatingPointError as error:
                failed[place] = error
        return failed

    def decode(self, work: Work) -> np.ndarray:
        """The frames of a block whose last step is done, uint8 [frames, H, W, 3]."""
        assert work.run is not None and work.run.latents is not None
        work.decoded = work.stream.decode(work.run.latents)
        return work.decoded[0]


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
