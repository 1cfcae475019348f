"""What travels between the ranks of a pipeline: a header, one tensor, and a prompt's embeddings where they are new.

Point to point over torch.distributed: headers and text over gloo, tensors on CUDA over NCCL. A thread receives ahead of
the rank's work, up to `outstanding` messages; a rank that sent as many that nobody took waits. On CUDA the thread has a
stream of its own, so that what comes in does not wait for what is being computed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CELL, RECACHE, REPLAY, BOUNDS, END = range(5)
"""Kinds of messages. CELL: a cell to run (or a block to decode). RECACHE: a window to encode again. REPLAY: a cell of a
finished block, run for its keys and values. BOUNDS: new ranges of layers. END: nothing follows."""
TRANSITIONS = (None, "cut", "recache", "blend", "scene")
_HEADER, _ROWS, _PAYLOAD = 1, 2, 3
MOVE_TAG = 16
"""First tag of the keys and values that move when layers do."""
NO_TEXT = -1


@dataclass(slots=True, kw_only=True)
class Message:
    """One hop's worth."""

    kind: int
    block: int = 0
    step: int = 0
    frames: int = 0
    """Latent frames of the pass."""
    text_id: int = NO_TEXT
    transition: str | None = None
    numbers: list[int] = field(default_factory=list)
    """As many as the link was made for: times, bounds."""
    rows_RLD: Tensor | None = None
    payload: Tensor | None = None

    def header(self, numbers: int) -> Tensor:
        """int64 [8 + numbers]."""
        known = [self.kind, self.block, self.step, self.frames, self.text_id, TRANSITIONS.index(self.transition)]
        flags = [int(self.rows_RLD is not None), int(self.payload is not None)]
        return torch.tensor([*known, *flags, *self.numbers, *[0] * (numbers - len(self.numbers))])


@dataclass(frozen=True, slots=True, kw_only=True)
class Wire:
    """What both ends of a link know."""

    shape: Callable[[int], tuple[int, ...]]
    """Latent frames -> shape of the payload."""
    dtype: torch.dtype
    device: torch.device
    rows_shape: tuple[int, ...]
    numbers: int = 0
    outstanding: int = 2
    group: Any = None
    """Process group of the payloads. Two ranks that send to each other over NCCL need one for each direction: a pair's
    messages wait for each other there."""


class Outbox:
    """Sends to one rank, `outstanding` messages ahead of the other's taking them."""

    def __init__(self, wire: Wire, to: int) -> None:
        self._wire, self._to = wire, to
        self._sent: deque[list[tuple[Any, Tensor]]] = deque()  # the tensors stay alive as long as their sending

    def send(self, message: Message) -> None:
        """Waits while too many are on their way."""
        while len(self._sent) >= self._wire.outstanding:
            self._wait_oldest()
        parts = [(message.header(self._wire.numbers), _HEADER)]
        if message.rows_RLD is not None:
            parts.append((message.rows_RLD.float().cpu().contiguous(), _ROWS))
        if message.payload is not None:
            parts.append((message.payload.to(self._wire.device, self._wire.dtype).contiguous(), _PAYLOAD))
        group = self._wire.group
        self._sent.append([(dist.isend(tensor, self._to, group, tag), tensor) for tensor, tag in parts])

    def flush(self) -> None:
        """Wait until all has been taken."""
        while self._sent:
            self._wait_oldest()

    def _wait_oldest(self) -> None:
        for work, _ in self._sent[0]:
            work.wait()
        self._sent.popleft()


class Inbox:
    """Receives from one rank into `mail`, as ("message", Message), or ("error", exception) when the other is gone."""

    def __init__(self, wire: Wire, source: int, mail: SimpleQueue[tuple[str, Any]]) -> None:
        self._wire, self._source, self._mail = wire, source, mail
        self._room = threading.Semaphore(wire.outstanding)
        threading.Thread(target=self._run, name=f"inbox-{source}", daemon=True).start()

    def taken(self) -> None:
        """The reader has taken one message out of the mail: there is room for another."""
        self._room.release()

    def _run(self) -> None:
        on_cuda = self._wire.device.type == "cuda"
        try:
            with torch.cuda.stream(torch.cuda.Stream(self._wire.device)) if on_cuda else nullcontext():
                while True:
                    self._room.acquire()
                    message = self._receive()
                    if on_cuda:
                        torch.cuda.current_stream(self._wire.device).synchronize()
                    self._mail.put(("message", message))
                    if message.kind == END:
                        return
        except Exception as error:  # noqa: BLE001 (raised by whoever reads the mail)
            self._mail.put(("error", error))

    def _receive(self) -> Message:
        wire = self._wire
        header = torch.empty(8 + wire.numbers, dtype=torch.int64)
        dist.recv(header, self._source, wire.group, _HEADER)
        kind, block, step, frames, text_id, transition, has_rows, has_payload, *numbers = header.tolist()
        message = Message(kind=kind, block=block, step=step, frames=frames, text_id=text_id, numbers=numbers)
        message.transition = TRANSITIONS[transition]
        if has_rows:
            message.rows_RLD = torch.empty(wire.rows_shape)
            dist.recv(message.rows_RLD, self._source, wire.group, _ROWS)
        if has_payload:
            message.payload = torch.empty(wire.shape(frames), dtype=wire.dtype, device=wire.device)
            dist.recv(message.payload, self._source, wire.group, _PAYLOAD)
        return message
