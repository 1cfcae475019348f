"""Replicas in this process, reached as if they were far away; and a viewer who writes down what he is shown."""

from __future__ import annotations

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from pathlib import Path
from typing import Any

import numpy as np

from streamgen import StreamPipeline
from streamgen_infer.requests import MadeBlock, StreamEvent, StreamRequest
from streamgen_infer.runtime import Runtime
from streamgen_infer.serve.fleet import Fleet
from streamgen_infer.serve.moving_stream import Dead, MovingStream
from streamgen_infer.serve.replica import Replica
from tests.server.harness import wait_for

PROMPT, NEXT = "a red star", "two blue rings"


class Near:
    """A handle on a replica here: all that goes to and fro is pickled, and `crash` makes it silent for ever."""

    def __init__(self, replica: Replica, name: str) -> None:
        self.replica, self.name = replica, name
        self.pool = ThreadPoolExecutor(16, thread_name_prefix=name)
        self.crashed = threading.Event()
        self.hung = False
        self.calls: list[str] = []

    def call(self, method: str, *arguments: Any, timeout_s: float, **named: Any) -> Any:
        if self.crashed.is_set():
            raise Dead(f"{self.name} has crashed")
        self.calls.append(method)
        call = self.pool.submit(self._far, method, pickle.dumps((arguments, named)))
        try:
            answer = call.result(timeout_s)
        except Late:
            raise Dead(f"{self.name} is silent") from None
        if self.crashed.is_set():
            raise Dead(f"{self.name} has crashed")
        return pickle.loads(answer)

    def send(self, method: str, *arguments: Any) -> None:
        if not self.crashed.is_set():
            self.pool.submit(self._far, method, pickle.dumps((arguments, {})))

    def kill(self) -> None:
        self.crashed.set()
        self.replica.close()
        self.pool.shutdown(wait=False)

    def crash(self) -> None:
        """kill -9."""
        self.crashed.set()

    def _far(self, method: str, packed: bytes) -> bytes:
        while self.hung and not self.crashed.is_set():
            time.sleep(0.01)
        arguments, named = pickle.loads(packed)
        return pickle.dumps(getattr(self.replica, method)(*arguments, **named))


class Neighbours:
    """`spawn` for a Fleet: real runtimes of a model."""

    def __init__(self, model: Path, *, max_streams: int = 4, **settings: Any) -> None:
        self.model, self.max_streams, self.settings = model, max_streams, settings
        self.handles: dict[str, Near] = {}

    def __call__(self, name: str) -> Near:
        self.handles[name] = Near(Replica(self._runtime, **self.settings), name)
        return self.handles[name]

    def _runtime(self) -> Runtime:
        pipe = StreamPipeline.from_pretrained(self.model, dtype="fp32")
        return Runtime(pipe, max_streams=self.max_streams, admission=True, warm_up_prompt=PROMPT)


class Watcher:
    """One stream's frames and events, as they came."""

    def __init__(self, fleet: Fleet, **request: Any) -> None:
        self.blocks: list[MadeBlock] = []
        self.events: list[StreamEvent] = []
        values: dict[str, Any] = {"prompt": PROMPT, "steps": 2, "lead_s": 1000.0, "start_s": 60.0, **request}
        self.stream: MovingStream = fleet.open(
            StreamRequest(**values), on_block=self.blocks.append, on_event=self.events.append
        )

    @property
    def shown(self) -> int:
        """Frames in the newest epoch's time."""
        return self.blocks[-1].first_frame + len(self.blocks[-1].frames) if self.blocks else 0

    def until(self, frames: int) -> None:
        wait_for(lambda: self.shown >= frames)

    def until_ended(self) -> None:
        wait_for(lambda: any(event.kind == "ended" for event in self.events))

    def numbers(self) -> list[int]:
        return [block.first_frame + at for block in list(self.blocks) for at in range(len(block.frames))]

    def pixels(self) -> np.ndarray:
        """What a viewer has in the end: later epochs in place of earlier ones."""
        video: dict[int, np.ndarray] = {}
        for block in list(self.blocks):
            video |= {block.first_frame + at: image for at, image in enumerate(block.frames)}
        return np.stack([video[number] for number in sorted(video)])


def alone(model: Path, seed: int, frames: int, changes: dict[int, str] | None = None) -> np.ndarray:
    """The same video by StreamPipeline, without replicas."""
    stream = StreamPipeline.from_pretrained(model, dtype="fp32").stream(PROMPT, seed=seed, steps=2)
    for block, prompt in (changes or {}).items():
        stream.prompt(prompt, "recache", at_block=block)
    return np.concatenate([next(stream).frames for _ in range(-(-frames // 12))])[:frames]


def place_of(watcher: Watcher) -> str:
    """The replica that makes it now."""
    wait_for(lambda: watcher.stream.place is not None)
    place = watcher.stream.place
    assert place is not None
    return place.replica
