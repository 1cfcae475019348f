"""A stream whose work is spread over processes that may die: started, watched, and built again from latents.

    with PipedStream(pipe, "a red star spinning over a snow background", job) as stream:
        for block in stream:
            show(block.frames)

Orders go to the first rank, one block ahead of it, so that a new prompt is late by what is in flight and no more. Every
rank says what it ran, before anybody else gets it; the journal keeps the inputs. A rank that died is known at once, one
that hangs within `lost_after_s` (no heartbeat) or `stalled_after_s` (heartbeats, but nothing gets done). Then all ranks
are killed and started again (forks of a server that has torch loaded), run the journal's cells, and go on with the
first block that was not out. Noise belongs to cells, so what follows is the undisturbed stream, to the bit.
"""

from __future__ import annotations

import itertools
import multiprocessing
import pickle
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import Any

import torch.distributed as dist

from streamgen.errors import UserError
from streamgen.parallel.host import LOADING, WORKING, Start
from streamgen.parallel.job import NOTHING, STOP, VISIBILITY, Job, Order, Orders, check_job, new_cache_of
from streamgen.parallel.piped import Loss, PipedBlock, Rank, State, Watch
from streamgen.parallel.processes import START_S, ProcessError
from streamgen.parallel.replay import Journal, Reach, without_rows
from streamgen.parallel.ring import blocks_in_flight
from streamgen.parallel.transport import NO_TEXT
from streamgen.parallel.worker import Assignment, supervised
from streamgen.pipeline import StreamPipeline
from streamgen.stream import PromptReceipt
from streamgen.timeline import PromptTimeline
from streamgen.weights import user_errors

BEATS = 8
"""Heartbeats in `lost_after_s`."""
MAX_LOSSES = 3
"""Losses without a new block between them, after which the pipeline gives up."""
ORDERS_AHEAD = 2


class PipedStream(Iterator[PipedBlock]):
    """One stream over several processes. Iterate for blocks; `prompt` may be called from any thread meanwhile."""

    def __init__(
        self,
        pipe: StreamPipeline,
        prompt: str,
        job: Job,
        *,
        max_blocks: int | None = None,
        watch: Watch | None = None,
    ) -> None:
        """`pipe` encodes text and says what fits (UserError); the processes load `job.model` themselves.

        They are started by `multiprocessing`: a script that makes one guards its start by `__name__ == "__main__"`.
        """
        check_job(job, pipe)
        if max_blocks is not None and max_blocks < 1:
            raise UserError(f"max_blocks is {max_blocks}; it must be at least 1")
        pipe.text.tokenize(prompt)
        self.pipe, self.job, self.max_blocks = pipe, job, max_blocks
        self.watch = Watch() if watch is None else watch
        self.timeline = PromptTimeline(prompt)
        self.losses: list[Loss] = []
        with user_errors("cache"):
            spec = new_cache_of(job, pipe).spec
        reach = Reach(geometry=pipe.geometry, spec=spec, protect_sink=pipe.scheduler.protect_sink)
        self._state = State(Journal(reach))
        self._orders = Orders(pipe, self.timeline)
        self._lock = threading.Condition()
        self._mail: SimpleQueue[tuple[int, int, tuple[Any, ...]]] = SimpleQueue()
        self._ranks: list[Rank] = []
        self._life = 0
        self.started_s = time.monotonic()
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["streamgen.parallel.worker"])
        self._thread = threading.Thread(target=self._run, name="pipeline-watch", daemon=True)
        self._started = False

    def start(self) -> None:
        """Start the processes; the first block asked for does it too. Prompts given before hold from block 0 on."""
        if not self._started:
            self._started = True
            self._start_ranks()
            self._thread.start()

    def __enter__(self) -> PipedStream:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def __next__(self) -> PipedBlock:
        self.start()
        state = self._state
        with self._lock:
            while not state.ready:
                if state.error is not None:
                    raise state.error
                if state.closed or (self.max_blocks is not None and state.consumed >= self.max_blocks):
                    raise StopIteration
                self._lock.wait()
            state.consumed += 1
            return state.ready.popleft()

    def prompt(
        self,
        text: str,
        transition: str = "recache",
        *,
        at_block: int | None = None,
        at_seconds: float | None = None,
        blend_blocks: int = 4,
    ) -> PromptReceipt:
        """Change the prompt, by default at the next block that was not ordered. Blocks in flight finish under theirs;
        nothing is drained.
        """
        self.pipe.text.tokenize(text)
        if at_seconds is not None:
            if at_block is not None:
                raise UserError("give at_block or at_seconds, not both")
            with user_errors("at_seconds"):
                at_block = self.pipe.geometry.block_at_seconds(at_seconds)
        with self._lock:
            earliest = self._state.next_fixed
            block = earliest if at_block is None else at_block
            version = self.timeline.add(text, block, transition, blend_blocks=blend_blocks, earliest=earliest)
        geometry = self.pipe.geometry
        return PromptReceipt(version=version, block=block, seconds=geometry.block_pixel_start(block) / geometry.fps)

    def set_layers(self, bounds: tuple[int, ...]) -> None:
        """Give a layer ring other ranges: first layer of each rank, then the number of layers. Nothing is drained."""
        layers = self.pipe.transformer.config.num_layers
        rising = all(a < b for a, b in itertools.pairwise(bounds))
        if self.job.split != "layer_ring" or len(bounds) != self.job.model_ranks + 1:
            raise UserError(f"bounds {bounds} are for a layer_ring of {len(bounds) - 1} ranks, not for this pipeline")
        if not rising or bounds[0] != 0 or bounds[-1] != layers:
            raise UserError(f"bounds are {bounds}; they must rise from 0 to {layers}, the number of layers")
        with self._lock:
            self._state.bounds = bounds
            self._send(Order(block=NOTHING, bounds=bounds))

    # What a `Stream` says of itself, for those who show or report one.

    visibility = VISIBILITY

    @property
    def made_blocks(self) -> int:
        """Blocks whose frames were given out."""
        return self._state.consumed

    @property
    def steps(self) -> int:
        return self.job.steps

    @property
    def seed(self) -> int:
        return self.job.seed

    @property
    def cache_policy(self) -> str:
        return self.job.cache or self.pipe.scheduler.positions

    def cache_fill(self) -> tuple[int, int]:
        """(latent frames that the next block will find in a level's cache, capacity)."""
        window = self.pipe.scheduler.window_frames
        return min(self.pipe.geometry.block_start(self.made_blocks), window), window

    def cancel(self) -> None:
        """End the iteration; what is in flight is dropped. May be called from a signal's handler."""
        self._state.closed = True
        self._mail.put((0, 0, ()))

    @property
    def pids(self) -> list[int]:
        """Processes of the ranks, in order."""
        return [rank.process.pid for rank in self._ranks]

    @property
    def cpu_s(self) -> list[float]:
        """Processor seconds that each rank has used, as of its last heartbeat."""
        return [rank.cpu_s for rank in self._ranks]

    @property
    def bounds(self) -> tuple[int, ...]:
        """Of a layer ring, after a change: first layer of each rank, then the number of layers."""
        return self._state.bounds

    def close(self) -> None:
        """End all processes; what was not read is dropped."""
        if not self._started:
            return
        with self._lock:
            self._state.closed = True
            self._lock.notify_all()
        self._mail.put((0, 0, ()))  # wakes the thread
        self._thread.join()

    # What follows runs in the watching thread.

    def _run(self) -> None:
        state = self._state
        try:
            while not state.closed and not self._all_ended():
                try:
                    life, rank, event = self._mail.get(timeout=self.watch.lost_after_s / BEATS)
                except Empty:
                    pass
                else:
                    if life == self._life:
                        self._take(rank, event)
                lost = self._find_loss()
                if lost is not None:
                    self._rebuild(*lost)
                with self._lock:
                    self._give_orders()
        except Exception as error:  # noqa: BLE001 (raised by the reader of blocks)
            with self._lock:
                state.error = error
        finally:
            self._kill()
            with self._lock:
                self._lock.notify_all()

    def _all_ended(self) -> bool:
        return all(rank.ended for rank in self._ranks)

    def _take(self, number: int, event: tuple[Any, ...]) -> None:
        rank, state = self._ranks[number], self._state
        rank.heard_s = time.monotonic()
        match event:
            case ("beat", activity, age_s, cpu_s):
                if rank.activity == LOADING:
                    state.progress_s = rank.heard_s
                rank.activity, rank.activity_s, rank.cpu_s = activity, age_s, cpu_s
            case ("replayed", _):
                state.progress_s = rank.heard_s
            case ("cell", block, step, latents):
                state.progress_s = rank.heard_s
                state.journal.ran(block, step, latents, self.job.steps)
                if step == 0:
                    state.begun = block
            case ("block", block, latents, frames, codec):
                state.progress_s = rank.heard_s
                state.decoded[block] = latents, frames.numpy(), codec
            case ("bounds", bounds):
                state.bounds = bounds
            case ("ended",):
                rank.ended = True
            case ("gone",):
                rank.gone = True
            case ("failed", of_user, lost, reason):
                if not lost:
                    raise UserError(reason) if of_user else ProcessError(f"rank {number} failed: {reason}")
                rank.ended = True  # another one is gone; that one is the loss
                state.orphaned_s = rank.heard_s
        self._release()

    def _release(self) -> None:
        """Give out blocks of which every cell has been told."""
        state = self._state
        while (block := state.journal.last + 1) in state.decoded:
            if len(state.journal.pending[block].inputs) < self.job.steps - 1:
                return
            latents, frames, state.codec = state.decoded.pop(block)
            state.journal.finished(block)
            cue, now_s = self.timeline.at(block), time.monotonic()
            self.losses += [replace(loss, gap_s=now_s - state.released_s) for loss in state.lost]
            state.lost = []
            state.released_s = now_s
            made = PipedBlock(
                index=block,
                frames=frames,
                latents=latents,
                prompt=cue.prompt,
                prompt_version=cue.version,
                ready_s=now_s,
            )
            with self._lock:
                state.fixed.pop(block)
                state.ready.append(made)
                self._lock.notify_all()

    def _find_loss(self) -> tuple[int | None, str, float] | None:
        """(rank, reason, seconds of silence) of a rank that is gone or hangs."""
        now_s, watch, state = time.monotonic(), self.watch, self._state
        asleep_s, state.looked_s = now_s - state.looked_s, now_s
        if asleep_s > watch.lost_after_s / 2:  # this process was stopped: what the others said is still to be read
            for rank in self._ranks:
                rank.heard_s += asleep_s
        for number, rank in enumerate(self._ranks):
            silent_s = now_s - rank.heard_s
            if rank.gone and not rank.ended:
                rank.process.join(self.watch.lost_after_s)
                code = rank.process.exitcode
                by_signal = code is not None and code < 0
                return number, f"killed by signal {-code}" if by_signal else f"ended with code {code}", silent_s
            if not rank.ended and silent_s > (START_S if rank.activity == LOADING else watch.lost_after_s):
                return number, f"no heartbeat for {silent_s:.1f} s", silent_s
        if state.orphaned_s and now_s - state.orphaned_s > watch.lost_after_s:
            return None, "the ranks lost each other", now_s - state.orphaned_s
        idle_s = now_s - max(state.progress_s, state.ordered_s)
        loading = any(rank.activity == LOADING for rank in self._ranks)
        if state.journal.pending and not loading and idle_s > watch.stalled_after_s:
            busy = [(r.activity_s, i) for i, r in enumerate(self._ranks) if r.activity == WORKING]
            return max(busy)[1] if busy else None, f"nothing got done for {idle_s:.0f} s", idle_s
        return None

    def _rebuild(self, number: int | None, reason: str, silent_s: float) -> None:
        """All ranks anew, from what the journal holds."""
        state = self._state
        self._kill()
        while not self._mail.empty():  # what was said before the end counts
            life, rank, event = self._mail.get()
            if life == self._life and event[0] in ("cell", "block", "bounds"):
                self._take(rank, event)
        block = state.journal.last + 1
        state.lost.append(Loss(rank=number, reason=reason, block=block, silent_s=silent_s, gap_s=0.0))
        if len(state.lost) > MAX_LOSSES:
            raise ProcessError(
                f"the pipeline was lost {len(state.lost)} times without a block between; the last: rank {number}, "
                f"{reason}"
            )
        state.journal.roll_back()
        state.decoded, state.next_order, state.begun, state.orphaned_s = {}, block, block - 1, 0.0
        state.stop_sent = False
        self._start_ranks()

    def _give_orders(self) -> None:
        """One block ahead of the first rank, and no more than the reader's backlog allows."""
        state, job = self._state, self.job
        in_flight = max(blocks_in_flight(job), job.ranks) + 1
        while True:
            block = state.next_order
            if self.max_blocks is not None and block >= self.max_blocks:
                if not state.stop_sent:
                    state.stop_sent = True
                    self._send(STOP)
                return
            if block > state.begun + ORDERS_AHEAD or block >= state.consumed + in_flight + self.watch.buffer_blocks:
                return
            if block not in state.fixed:
                state.fixed[block] = self._orders.make(block)
                state.next_fixed = block + 1
            state.next_order = block + 1
            state.ordered_s = time.monotonic()
            state.journal.ordered(state.fixed[block])
            self._send(state.fixed[block])

    def _send(self, order: Order) -> None:
        if order.block != NOTHING:
            if order.text_id == self._state.text_sent:
                order = replace(order, rows_RLD=None)
            self._state.text_sent = order.text_id
        self._ranks[0].orders.put(pickle.dumps(order))

    def _start_ranks(self) -> None:
        state = self._state
        self._life += 1
        state.text_sent = NO_TEXT
        start = Start(
            history=tuple(without_rows(state.journal.history())),
            shot_start=state.journal.shot_start,
            codec=state.codec,
            next_block=state.journal.last + 1,
            bounds=state.bounds,
        )
        ranks = []
        for number in range(self.job.ranks):
            mine, theirs = self._context.Pipe()
            assignment = Assignment(
                job=self.job,
                rank=number,
                life=self._life,
                port=self._store.port,
                beat_s=self.watch.lost_after_s / BEATS,
                start=start,
            )
            process = self._context.Process(
                target=supervised, args=(pickle.dumps(assignment), theirs), daemon=True, name=f"rank-{number}"
            )
            process.start()
            theirs.close()
            rank = Rank(process, mine, time.monotonic())
            rank.threads = [
                threading.Thread(target=self._read, args=(self._life, number, mine), daemon=True),
                threading.Thread(target=self._write, args=(rank,), daemon=True),
            ]
            ranks.append(rank)
            for thread in rank.threads:
                thread.start()
        self._ranks = ranks

    def _read(self, life: int, number: int, link: Connection) -> None:
        """Everything that a rank says, until its end: a rank that stops in the middle of a word holds up only this."""
        try:
            while True:
                self._mail.put((life, number, pickle.loads(link.recv_bytes())))
        except (EOFError, OSError):
            self._mail.put((life, number, ("gone",)))

    def _write(self, rank: Rank) -> None:
        """Orders, each as soon as the rank takes it: one that stopped holds up only this."""
        try:
            while (order := rank.orders.get()) is not None:
                rank.link.send_bytes(order)
        except OSError:
            return  # the rank is gone, which the watch finds; orders of blocks that are not out are given again

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.process.kill()
            rank.orders.put(None)
        for rank in self._ranks:
            rank.process.join()
            for thread in rank.threads:
                thread.join()
            rank.link.close()
