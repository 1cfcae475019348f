"""One rank of a pipeline: as a process that the supervisor starts, or as one of torchrun's.

A supervised rank beats: a thread says every fraction of a second what the rank is at, so that one that stopped is known
by its silence. When the supervisor is gone, the rank ends by itself. Everything that passes between them is pickled by
value: what a rank said before it was killed can be read after.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamgen.codec import CodecState
from streamgen.errors import UserError
from streamgen.parallel.chain import run_chain
from streamgen.parallel.host import WORKING, Host, Start, from_iterator
from streamgen.parallel.job import Job, Order, check_job
from streamgen.parallel.processes import LOST, leave
from streamgen.parallel.ring import run_ring
from streamgen.pipeline import StreamPipeline

FOR_EVER = timedelta(days=365)
"""Ranks wait for each other without a limit: the supervisor watches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What a process is started with."""

    job: Job
    rank: int
    life: int
    """Number of the pipeline's start; ranks of different lives never meet."""
    port: int
    """Of the supervisor's TCPStore."""
    beat_s: float
    start: Start


def run_rank(job: Job, pipe: StreamPipeline, host: Host, start: Start) -> None:
    """One rank's part of a pipeline whose processes have joined."""
    {"step_chain": run_chain, "layer_ring": run_ring}[job.split](job, pipe, host, start)


def run_joined(
    job: Job,
    pipe: StreamPipeline,
    orders: Iterable[Order],
    on_block: Callable[[int, Tensor, Tensor], None],
) -> None:
    """The pipeline of processes that torchrun started (inside `processes.joined`), without supervision: torchrun ends
    them all when one is lost. `orders` are read by rank 0; `on_block` (block, clean latents, uint8 frames) is called in
    the rank that decodes. UserError where the job does not fit.
    """
    check_job(job, pipe)
    if dist.get_world_size() != job.ranks:
        raise UserError(
            f"ranks is {job.ranks}, but torchrun started {dist.get_world_size()} processes; make them equal"
        )
    host = Host(job, dist.get_rank())
    host.more_orders = from_iterator(iter(orders))
    host.on_block = lambda block, latents, frames, codec: on_block(block, latents, frames)
    run_rank(job, pipe, host, Start())
    dist.barrier()


def supervised(assignment: bytes, link: Connection) -> None:
    """The whole life of a process of the supervisor's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the supervisor, which ends the ranks
    given: Assignment = pickle.loads(assignment)
    voice = _Voice(link)
    host = Host(given.job, given.rank)
    threading.Thread(target=_beat, args=(voice, host, given.beat_s), daemon=True).start()
    threading.Thread(target=_listen, args=(link, host), daemon=True).start()
    try:
        torch.set_num_threads(given.job.threads)
        pipe = _join(given)
        _connect(host, voice, given.job)
        host.is_at(WORKING)
        voice.say("beat", WORKING, 0.0, time.process_time())
        run_rank(given.job, pipe, host, given.start)
    except Exception as error:  # noqa: BLE001 (told to the supervisor, which raises or builds anew)
        lost = isinstance(error, RuntimeError) and any(word in str(error) for word in LOST)
        voice.say("failed", isinstance(error, UserError), lost, f"{type(error).__name__}: {error}")
        leave(1)
    voice.say("ended")
    leave(0)


class _Voice:
    """Tells the supervisor, from any thread."""

    def __init__(self, link: Connection) -> None:
        self._link, self._lock = link, threading.Lock()

    def say(self, *event: Any) -> None:
        data = pickle.dumps(event)
        with self._lock:
            self._link.send_bytes(data)


def _join(given: Assignment) -> StreamPipeline:
    """Load the model, meet the others."""
    job, rank = given.job, given.rank
    device = job.devices[rank % len(job.devices)]
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    pipe = StreamPipeline.from_pretrained(job.model, device=device, dtype=job.dtype)
    store = dist.TCPStore("127.0.0.1", given.port, is_master=False)  # type: ignore[attr-defined]
    dist.init_process_group(
        "gloo" if pipe.device.type == "cpu" else "cpu:gloo,cuda:nccl",
        store=dist.PrefixStore(f"life {given.life}", store),  # type: ignore[attr-defined]
        rank=rank,
        world_size=job.ranks,
        timeout=FOR_EVER,
    )
    return pipe


def _connect(host: Host, voice: _Voice, job: Job) -> None:
    def cell(block: int, step: int, latents: Tensor) -> None:
        voice.say("cell", block, step, latents.cpu() if step + 1 < job.steps else None)

    def block(number: int, latents: Tensor, frames: Tensor, codec: CodecState) -> None:
        voice.say("block", number, latents.cpu(), frames, {name: tensor.cpu() for name, tensor in codec.items()})

    host.on_cell, host.on_block = cell, block
    host.on_bounds = lambda bounds: voice.say("bounds", bounds)
    host.on_replayed = lambda block: voice.say("replayed", block)


def _beat(voice: _Voice, host: Host, every_s: float) -> None:
    while True:
        voice.say("beat", host.activity, time.monotonic() - host.since_s, time.process_time())
        time.sleep(every_s)


def _listen(link: Connection, host: Host) -> None:
    """Orders into the mail. Without a supervisor there is nobody to work for."""
    try:
        while True:
            host.mail.put(("order", pickle.loads(link.recv_bytes())))
    except (EOFError, OSError):
        os._exit(1)
