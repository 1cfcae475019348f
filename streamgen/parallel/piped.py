"""What a supervised pipeline gives out, and what it keeps in mind."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import numpy as np
from torch import Tensor

from streamgen.codec import CodecState
from streamgen.parallel.host import LOADING
from streamgen.parallel.job import Order
from streamgen.parallel.replay import Journal
from streamgen.parallel.transport import NO_TEXT


@dataclass(frozen=True, slots=True, kw_only=True)
class PipedBlock:
    """One finished block."""

    index: int
    frames: np.ndarray
    """uint8 [frames, H, W, 3], RGB."""
    latents: Tensor
    """Clean, [1, F, C, H, W]."""
    prompt: str
    prompt_version: int
    ready_s: float
    """`time.monotonic` when it came out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """A rank was lost, and the stream went on."""

    rank: int | None
    """None: nothing got done, and no rank was found at work."""
    reason: str
    block: int
    """The first block that was made again."""
    silent_s: float
    """Since the rank's last sign of life, when the loss was noticed."""
    gap_s: float
    """Between the last block before and the first block after."""


@dataclass(slots=True, kw_only=True)
class Watch:
    """How long silence may last."""

    lost_after_s: float = 5.0
    """Without a heartbeat. While a rank loads its model, START_S."""
    stalled_after_s: float = 60.0
    """With heartbeats, but without a cell run anywhere."""
    buffer_blocks: int = 2
    """Finished blocks that may wait for the reader."""


@dataclass(slots=True)
class Rank:
    """A process of the present life."""

    process: Any
    link: Connection
    heard_s: float
    threads: list[threading.Thread] = field(default_factory=list)
    """One reads what it says, one writes what it is told."""
    orders: SimpleQueue[bytes | None] = field(default_factory=SimpleQueue)
    ended: bool = False
    gone: bool = False
    """Its end of the line is closed, and all that it said has been read."""
    activity: str = LOADING
    activity_s: float = 0.0
    cpu_s: float = 0.0
    """Processor time that it has used."""


@dataclass(slots=True)
class State:
    """Where the stream is; guarded by the lock where the reader's thread looks too."""

    journal: Journal
    ready: deque[PipedBlock] = field(default_factory=deque)
    consumed: int = 0
    error: Exception | None = None
    closed: bool = False
    fixed: dict[int, Order] = field(default_factory=dict)
    """Orders of blocks that are not out yet: given again as they were."""
    next_fixed: int = 0
    next_order: int = 0
    begun: int = -1
    """The last block whose first step was run."""
    stop_sent: bool = False
    text_sent: int = NO_TEXT
    """The text that the first rank of this life has."""
    decoded: dict[int, tuple[Tensor, np.ndarray, CodecState]] = field(default_factory=dict)
    codec: CodecState | None = None
    bounds: tuple[int, ...] = ()
    progress_s: float = 0.0
    ordered_s: float = 0.0
    looked_s: float = field(default_factory=time.monotonic)
    """When the ranks were last looked after."""
    orphaned_s: float = 0.0
    """When ranks said that another one is gone; 0: they did not."""
    released_s: float = field(default_factory=time.monotonic)
    lost: list[Loss] = field(default_factory=list)
    """Since the last block."""
