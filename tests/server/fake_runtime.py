"""A runtime without a model: blocks come when a test asks, or by themselves in a thread. Frames tell their own number.

Frame n of seed s under prompt version v is filled with bytes that are a function of (n, s, v), so that a test can read
back what it was shown.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen_infer.requests import MadeBlock, Receipt, Refused, RuntimeStats, StreamEvent, StreamRequest

GEOMETRY = VideoGeometry(height=16, width=16, latent_channels=4)


def picture(frame: int, seed: int, version: int, side: int = 16) -> np.ndarray:
    return np.full((side, side, 3), [frame % 256, seed % 256, version % 256], np.uint8)


class FakeStream:
    """Blocks of 12 frames at 16 frames per second; see `tests/server/fake_runtime.py`."""

    def __init__(self, runtime: FakeRuntime, request: StreamRequest, on_block: Any, on_event: Any) -> None:
        saved = request.saved or {}
        self.runtime, self.request, self.on_block, self.on_event = runtime, request, on_block, on_event
        self.geometry, self.fps = runtime.geometry, request.fps or runtime.geometry.fps
        self.position: int = saved.get("position", 0)
        self.seed: int = saved.get("seeds", [request.seed])[0]
        self.changes: list[list[Any]] = [list(one) for one in saved.get("changes", [[0, 0, request.prompt]])]
        self.warnings: tuple[str, ...] = ()
        self.epoch, self.shown_s, self.fixed = 0, 0.0, request.steps or 4
        self.paused, self.closed, self.ended = request.paused, False, False
        self.lock = threading.RLock()
        limit = request.max_seconds
        self.last_block = None if limit is None else max(1, self.geometry.blocks_for_seconds(limit))

    def _open(self) -> None:
        if self.closed or self.ended:
            raise UserError("the stream is closed")

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        apply_at: str = "next_block",
        at_media_s: float | None = None,
        blend_blocks: int = 4,
    ) -> Receipt:
        with self.lock:
            self._open()
            if "unknown" in text:
                raise UserError("no known word in the prompt")
            block = self.position
            if at_media_s is not None:
                block = self.geometry.block_at_seconds(at_media_s)
                if block < self.position:
                    raise UserError("too late")
            elif apply_at == "playhead":
                block = min(block, self.geometry.block_at_seconds(self.shown_s))
            version = max(one[1] for one in self.changes) + 1
            self.changes.append([block, version, text])
            if block < self.position:
                self.position, self.epoch = block, self.epoch + 1
            return Receipt(version=version, block=block, media_s=self._media_s(block))

    def playhead(self, media_s: float) -> None:
        self._open()
        self.shown_s = media_s

    def pause(self) -> None:
        self._open()
        self.paused = True

    def play(self) -> None:
        self._open()
        self.paused = False

    def seek(self, media_s: float) -> Receipt:
        with self.lock:
            self._open()
            self.position = min(int(media_s * self.fps) // 12, self.position)
            self.epoch += 1
            return Receipt(version=0, block=self.position, media_s=self._media_s(self.position))

    def steps(self, count: int | None) -> None:
        self._open()
        if count is not None and count not in (2, 4):
            raise UserError(f"{count} steps: trained for 2, 4")
        self.fixed = count or 4

    def state_dict(self) -> dict[str, Any]:
        with self.lock:
            return {"position": self.position, "seeds": [self.seed], "changes": [list(one) for one in self.changes]}

    branch = state_dict

    def close(self) -> None:
        with self.lock:
            self.closed = True
            self.runtime.streams.discard(self)

    def make(self) -> bool:
        """One block, if the stream takes one."""
        with self.lock:
            if self.closed or self.paused or self.ended:
                return False
            version = max((b, v) for b, v, _ in self.changes if b <= self.position)[1]
            first = 12 * self.position
            side = self.geometry.height
            frames = np.stack([picture(first + at, self.seed, version, side) for at in range(12)])
            now = time.monotonic()
            block = MadeBlock(
                epoch=self.epoch,
                index=self.position,
                frames=frames,
                first_frame=first,
                media_s=first / self.fps,
                due_at_s=now + 0.5,
                ready_at_s=now,
                steps=self.fixed,
                prompt_version=version,
            )
            self.position += 1
            self.on_block(block)
            if self.last_block is not None and self.position >= self.last_block:
                self.ended = True
                self.on_event(StreamEvent(kind="ended", block=self.position))
            return True

    def _media_s(self, block: int) -> float:
        return float(12 * block / self.fps)


class FakeRuntime:
    """`make_every_s`: blocks by themselves for every stream; None: by `make` alone."""

    def __init__(self, *, max_streams: int = 8, make_every_s: float | None = 0.01, side: int = 16) -> None:
        self.geometry = VideoGeometry(height=side, width=side, latent_channels=4)
        self.pipe = SimpleNamespace(geometry=self.geometry, scheduler=SimpleNamespace(trained_steps=(4, 2)))
        self.failure: BaseException | None = None
        self.max_streams, self.make_every_s = max_streams, make_every_s
        self.streams: set[FakeStream] = set()
        self.opened: list[FakeStream] = []
        self.counter = itertools.count()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        self.thread.start()

    def open(
        self, request: StreamRequest, *, on_block: Callable[[MadeBlock], None], on_event: Callable[[StreamEvent], None]
    ) -> FakeStream:
        if len(self.streams) >= self.max_streams:
            raise Refused("streams", "all streams are taken", retry_after_s=2.0, numbers={"streams": 8.0})
        if "unknown" in request.prompt:
            raise UserError("no known word in the prompt")
        stream = FakeStream(self, request, on_block, on_event)
        self.streams.add(stream)
        self.opened.append(stream)
        return stream

    def make(self, blocks: int = 1) -> None:
        for _ in range(blocks):
            for stream in list(self.streams):
                stream.make()

    def stats(self) -> RuntimeStats:
        return RuntimeStats(streams=len(self.streams))

    def close(self) -> None:
        self.over.set()
        for stream in list(self.streams):
            stream.close()

    def _run(self) -> None:
        while self.make_every_s is not None and not self.over.wait(self.make_every_s):
            self.make()
