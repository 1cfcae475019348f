"""Layers over ranks: rank g runs its range of layers of every cell, so cells of several blocks go round at a time.

    rank 0   embed, layers 0-2   A0 B0 C0 A1 B1 C1 A2 ...     makes x of the next step from what comes back
    rank 1   layers 3-5, head       A0 B0 C0 A1 B1 C1 ...     tokens go on, the model's output goes back to rank 0

The layer split of StreamDiffusion 2 (arXiv 2511.07399). A rank has the caches of all steps, for its layers. Cells come
to every rank in one order, so (block, step) always finds what (block - 1, step) left there, and a change of layers,
which is a message in the same line, meets every rank between the same two cells: keys and values move, nothing drains.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from streamgen.cache import BlockCache
from streamgen.flow import timestep_of
from streamgen.parallel.balance import Balancer
from streamgen.parallel.chain import Decoder, decode_all, latent_wire
from streamgen.parallel.host import Host, Start
from streamgen.parallel.job import NOTHING, Job, Order, Texts, even_bounds, make_levels, resized
from streamgen.parallel.levels import (
    after_cell,
    commit_cell,
    enter_level,
    open_cell,
    seen_window,
    window_frames,
)
from streamgen.parallel.replay import replayed_transition, skip_to
from streamgen.parallel.transport import (
    BOUNDS,
    CELL,
    END,
    MOVE_TAG,
    NO_TEXT,
    RECACHE,
    REPLAY,
    Inbox,
    Message,
    Outbox,
    Wire,
)
from streamgen.pipeline import StreamPipeline
from streamgen.transformer import Call


@dataclass(frozen=True, slots=True)
class LayersOf:
    """A block's cache handle, whose layer 0 is the model's layer `first`."""

    handle: BlockCache
    first: int

    def rope(self) -> tuple[Tensor, Tensor]:
        return self.handle.rope()

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]:
        return self.handle.append(layer - self.first, k_BNTK, v_BNTK)


class RingRank:
    """One rank's layers, their caches, and its clock."""

    def __init__(self, job: Job, pipe: StreamPipeline, host: Host, start: Start) -> None:
        self.job, self.pipe, self.host, self.rank = job, pipe, host, host.rank
        self.bounds = start.bounds or even_bounds(pipe.transformer.config.num_layers, job.model_ranks)
        self.shot_start = start.shot_start
        self.sampling = pipe.sampling(job.steps)
        self.levels = make_levels(job, pipe, range(job.steps), self.layers)
        self.texts = Texts(pipe, keep=blocks_in_flight(job) + 1)
        self.layers_s = self.other_s = 0.0
        """Since they were last told."""

    @property
    def layers(self) -> range:
        return range(self.bounds[self.rank], self.bounds[self.rank + 1])

    @property
    def is_last(self) -> bool:
        return self.rank == self.job.model_ranks - 1

    @torch.no_grad()
    def run(self, message: Message, latents: Tensor | None = None) -> Tensor:
        """This rank's layers of a pass -> tokens for the next rank, or of the last rank the model's output.

        latents: the pass's input [1, F, C, H, W], in the first rank; the others find tokens in the message.
        """
        began = time.perf_counter()
        model, state = self.pipe.transformer, self.levels[message.step]
        if message.kind == REPLAY:
            skip_to(state, message.block, self.shot_start)
        handle = enter_level(state, self.sampling, message.transition)
        if message.kind != RECACHE:
            handle = open_cell(state, message.block)
        assert handle is not None, "there was nothing to encode again"
        text = self.texts.context(message.text_id, message.rows_RLD)
        sigma = self.sampling.sigmas[message.step]
        timestep = torch.full((1, 1), timestep_of(sigma), device=self.pipe.device)
        x_BFSD = model.embed(latents) if latents is not None else message.payload
        assert x_BFSD is not None
        e_BFD = model.embed_time(timestep, text, message.frames, 1)
        call = Call(handle.rope(), LayersOf(handle, self.layers.start), None, 1, model.ops, model.attention_backend)
        entered = self._clock()
        x_BFSD = model.run_layers(x_BFSD, e_BFD, text, call, self.layers)
        left = self._clock()
        if message.kind == RECACHE:
            state.cache.commit(handle)
        else:
            commit_cell(state, handle, latents)
        if self.is_last:
            g = self.pipe.geometry
            like = torch.empty(0, 1, 1, g.latent_height, g.latent_width)
            x_BFSD = model.unembed(x_BFSD, e_BFD, like)
        self.layers_s += left - entered
        self.other_s += self._clock() - began - (left - entered)
        return x_BFSD

    def tell_times(self, message: Message) -> None:
        """Write this rank's times since the last telling into a message on its way round."""
        nanoseconds = [round(1e9 * self.layers_s), round(1e9 * self.other_s)]
        numbers = message.numbers or [0] * (2 * self.job.model_ranks)
        numbers[2 * self.rank : 2 * self.rank + 2] = nanoseconds
        message.numbers, self.layers_s, self.other_s = numbers, 0.0, 0.0

    def move(self, bounds: tuple[int, ...]) -> None:
        """Exchange keys and values with the other ranks, so that each has those of its new layers."""
        old, self.bounds = self.bounds, bounds
        for step, state in self.levels.states.items():
            saved = state.cache.state_dict()
            pieces = self._exchange(old, MOVE_TAG + 2 * step, (saved["k"], saved["v"]))
            state.cache = resized(state.cache, len(self.layers))
            saved["k"], saved["v"] = (torch.cat(parts) for parts in zip(*pieces, strict=True))
            state.cache.load_state_dict({**saved, "spec": state.cache.state_dict()["spec"]})

    def _exchange(self, old: tuple[int, ...], tag: int, mine: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        """Send what others take over of `mine` (tensors [layers, ...]) -> the parts of the new layers, in order.

        Ranges stay in the order of ranks, so of two ranks only one gives to the other: nothing waits in a circle.
        """
        ranks, new = range(self.job.model_ranks), self.bounds
        parts: list[tuple[Tensor, ...]] = []
        works: list[Any] = []
        for source in ranks:
            for to in ranks:
                first, stop = max(old[source], new[to]), min(old[source + 1], new[to + 1])
                if first >= stop or self.rank not in (source, to):
                    continue
                if source == self.rank:
                    part = tuple(x[first - old[source] : stop - old[source]].contiguous() for x in mine)
                else:
                    part = tuple(x.new_empty((stop - first, *x.shape[1:])) for x in mine)
                if to == self.rank:
                    parts.append(part)
                if source != to:
                    other, act = (to, dist.isend) if source == self.rank else (source, dist.irecv)
                    works += [act(x, other, tag=tag + i) for i, x in enumerate(part)]
        for work in works:
            work.wait()
        return parts

    def _clock(self) -> float:
        if self.pipe.device.type == "cuda" and self.job.rebalance:
            torch.cuda.current_stream(self.pipe.device).synchronize()
        return time.perf_counter()


@dataclass(slots=True)
class Flight:
    """A block in the ring."""

    order: Order
    step: int
    x_t: Tensor


class Driver:
    """The first rank: chooses the next cell, turns outputs into the next step's inputs, watches the balance."""

    def __init__(self, ring: RingRank, onward: Outbox | None, finished: Decoder | Outbox) -> None:
        self.ring, self.onward, self.finished = ring, onward, finished
        self.host, self.job = ring.host, ring.job
        self.flights: dict[int, Flight] = {}
        self.ready: deque[Flight] = deque()
        self.orders: deque[Order] = deque()
        self.balancer = Balancer(ring.bounds)
        self.text_sent = NO_TEXT

    def drive(self) -> None:
        """Until the stream has ended and every block is out. The oldest block goes first."""
        ending = False
        while True:
            while not ending and len(self.flights) < blocks_in_flight(self.job):
                order = self.orders.popleft() if self.orders else self.host.more_orders()
                if order is None:
                    break
                ending = order.block == NOTHING and not order.bounds
                self._begin(order)
            if self.ready:
                self._inject(self.ready.popleft())
            elif self.flights or not ending:
                found = self.host.next()
                if isinstance(found, Order):
                    self.orders.append(found)
                else:
                    self._returned(found)
            else:
                return

    def replay(self, start: Start) -> None:
        """Have all ranks build their caches again from the inputs of finished blocks."""
        for entry in start.history:
            order = entry.order
            for step, state in self.ring.levels.states.items():
                skip_to(state, order.block, start.shot_start)
                x_t = entry.inputs[step].to(self.ring.pipe.device) if step else state.noise(0, order.block)
                self._pass(REPLAY, order, step, x_t, replayed_transition(state, self.ring.sampling, order))
            self.host.on_replayed(order.block)

    def _begin(self, order: Order) -> None:
        if order.block != NOTHING:
            flight = Flight(order, 0, self.ring.levels[0].noise(0, order.block))
            self.flights[order.block] = flight
            self.ready.append(flight)
        elif order.bounds:
            self._move(order.bounds)

    def _inject(self, flight: Flight) -> None:
        output = self._pass(CELL, flight.order, flight.step, flight.x_t, flight.order.transition)
        if self.onward is None:
            self._took(flight, output)

    def _pass(self, kind: int, order: Order, step: int, x_t: Tensor, transition: str | None) -> Tensor:
        """This rank's part of a cell, and before it of the recache that its block may begin with; both go on."""
        state, sampling = self.ring.levels[step], self.ring.sampling
        passes = [(kind, x_t, transition if transition == "scene" else None)]
        if transition == "recache" and window_frames(state, sampling):
            passes.insert(0, (RECACHE, seen_window(state, sampling), transition))
        for what, latents, entering in passes:
            message = Message(
                kind=what,
                block=order.block,
                step=step,
                frames=latents.shape[1],
                text_id=order.text_id,
                rows_RLD=order.rows_RLD,
                transition=entering,
            )
            output = self.ring.run(message, latents)
            if self.onward is not None:
                if order.text_id <= self.text_sent:
                    message.rows_RLD = None
                self.text_sent = max(self.text_sent, order.text_id)
                message.payload = output
                if what == CELL:
                    self.ring.tell_times(message)
                self.onward.send(message)
        return output

    def _returned(self, message: Message) -> None:
        assert message.payload is not None
        self._took(self.flights[message.block], message.payload)
        seconds = [1e-9 * number for number in message.numbers]
        bounds = self.balancer.saw(seconds[::2], seconds[1::2])
        if bounds is not None and self.job.rebalance:
            self._move(bounds)

    def _took(self, flight: Flight, output: Tensor) -> None:
        """The model's output for a block's step."""
        began = time.perf_counter()
        block, step, ring = flight.order.block, flight.step, self.ring
        latents = after_cell(ring.levels[step], block, step, flight.x_t, output, ring.sampling)
        self.host.on_cell(block, step, latents)
        if step + 1 < self.job.steps:
            flight.step, flight.x_t = step + 1, latents
            self.ready.append(flight)
        else:
            del self.flights[block]
            if isinstance(self.finished, Decoder):
                self.finished.decode(block, latents)
            else:
                self.finished.send(Message(kind=CELL, block=block, frames=latents.shape[1], payload=latents))
        ring.other_s += time.perf_counter() - began

    def _move(self, bounds: tuple[int, ...]) -> None:
        if self.onward is not None and bounds != self.ring.bounds:
            self.onward.send(Message(kind=BOUNDS, numbers=list(bounds)))
            self.ring.move(bounds)
            self.host.on_bounds(bounds)
        self.balancer.moved(bounds)


def blocks_in_flight(job: Job) -> int:
    """Enough that no rank waits: one more than ranks."""
    return job.model_ranks + 1 if job.model_ranks > 1 else 1


def run_ring(job: Job, pipe: StreamPipeline, host: Host, start: Start) -> None:
    """This rank's part, until the end of the stream."""
    count, flying = job.model_ranks, blocks_in_flight(job)
    t, g = pipe.transformer.config, pipe.geometry
    # What comes back never waits: as many messages may be under way as there are blocks in the ring.
    groups = [dist.new_group() for _ in range(2)] if pipe.device.type == "cuda" else [None, None]
    latents = latent_wire(job, pipe, numbers=2 * count, outstanding=flying, group=groups[1])
    tokens = Wire(
        shape=lambda frames: (1, frames, g.tokens_per_frame, t.dim),
        dtype=pipe.dtype,
        device=pipe.device,
        rows_shape=latents.rows_shape,
        numbers=2 * count,
        outstanding=job.outstanding,
        group=groups[0],
    )
    if host.rank == count:
        host.taken = Inbox(latents, 0, host.mail).taken
        decode_all(host, Decoder(pipe, host, start.codec))
        return
    ring = RingRank(job, pipe, host, start)
    if host.rank > 0:
        host.taken = Inbox(tokens, host.rank - 1, host.mail).taken
        _follow(ring, Outbox(latents, 0) if ring.is_last else Outbox(tokens, host.rank + 1))
        return
    onward = Outbox(tokens, 1) if count > 1 else None
    if onward is not None:
        host.taken = Inbox(latents, count - 1, host.mail).taken
    finished = Outbox(latents, count) if job.codec == "own" else Decoder(pipe, host, start.codec)
    driver = Driver(ring, onward, finished)
    driver.replay(start)
    driver.drive()
    for outbox in (onward, finished):
        if isinstance(outbox, Outbox):
            outbox.send(Message(kind=END))
            outbox.flush()
    if onward is not None:
        host.next()  # the END has gone round


def _follow(ring: RingRank, outbox: Outbox) -> None:
    """Any rank but the first."""
    while True:
        message = ring.host.next()
        assert isinstance(message, Message)
        if message.kind == END:
            outbox.send(message)
            outbox.flush()
            return
        if message.kind == BOUNDS:
            if not ring.is_last:
                outbox.send(message)
            ring.move(tuple(message.numbers[: ring.job.model_ranks + 1]))
            continue
        message.payload = ring.run(message)
        if message.kind == CELL:
            ring.tell_times(message)
        if not ring.is_last:
            outbox.send(message)
        elif message.kind == CELL:
            message.rows_RLD = None
            outbox.send(message)
