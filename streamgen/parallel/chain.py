"""Steps over ranks: rank i runs step i of every block and keeps the cache of step i; one rank decodes.

    rank 0   A0 B0 C0 D0 E0
    rank 1      A1 B1 C1 D1       latents go from rank to rank, a few hundred kilobytes at most
    rank 2         A2 B2 C2
    codec             A  B        with the last rank's steps, or a rank of its own

Timestep-forcing pipeline parallelism of Live Avatar (arXiv 2512.04677), for any number of ranks up to that of steps,
with sends that overlap the next cell, and prompts that travel with their block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamgen.codec import CodecState
from streamgen.parallel.host import Host, Start
from streamgen.parallel.job import NOTHING, Job, Texts, even_bounds, make_levels
from streamgen.parallel.levels import LevelCaches, run_cell
from streamgen.parallel.replay import replayed_transition, skip_to
from streamgen.parallel.transport import CELL, END, NO_TEXT, Inbox, Message, Outbox, Wire
from streamgen.pipeline import StreamPipeline


def latent_wire(
    job: Job, pipe: StreamPipeline, *, numbers: int = 0, outstanding: int | None = None, group: Any = None
) -> Wire:
    """Of links that carry a block's latents."""
    g, t = pipe.geometry, pipe.transformer.config
    return Wire(
        shape=lambda frames: (1, frames, g.latent_channels, g.latent_height, g.latent_width),
        dtype=torch.float32,
        device=pipe.device,
        rows_shape=(1, t.text_len, t.text_dim),
        numbers=numbers,
        outstanding=job.outstanding if outstanding is None else outstanding,
        group=group,
    )


class Decoder:
    """The codec's end of a pipeline."""

    def __init__(self, pipe: StreamPipeline, host: Host, state: CodecState | None) -> None:
        self._pipe, self._host = pipe, host
        self._state = None if state is None else {name: tensor.to(pipe.device) for name, tensor in state.items()}

    def decode(self, block: int, latents: Tensor) -> None:
        coming = self._pipe.frames.begin(self._pipe.codec, latents, self._state)
        frames, self._state = torch.from_numpy(coming.wait()), coming.codec
        self._host.on_block(block, latents, frames, self._state)


def run_chain(job: Job, pipe: StreamPipeline, host: Host, start: Start) -> None:
    """This rank's part, until the end of the stream."""
    wire = latent_wire(job, pipe)
    if host.rank > 0:
        host.taken = Inbox(wire, host.rank - 1, host.mail).taken
    outbox = Outbox(wire, host.rank + 1) if host.rank + 1 < job.ranks else None
    decoder = Decoder(pipe, host, start.codec) if outbox is None else None
    if host.rank >= job.model_ranks:
        assert decoder is not None
        decode_all(host, decoder)
        return

    bounds = even_bounds(job.steps, job.model_ranks)
    steps = range(bounds[host.rank], bounds[host.rank + 1])
    levels, texts = make_levels(job, pipe, steps), Texts(pipe, keep=1)
    _replay(pipe, host, levels, texts, start)
    sampling, text_sent = pipe.sampling(job.steps), NO_TEXT
    while True:
        message = _from_order(host) if host.rank == 0 else host.next()
        assert isinstance(message, Message)
        if message.kind == CELL:
            if host.rank == 0:
                message.payload = levels[0].noise(0, message.block)
                message.frames = pipe.geometry.block_size(message.block)
            text = texts.context(message.text_id, message.rows_RLD)
            for step in steps:
                assert message.payload is not None
                message.payload = run_cell(
                    pipe.transformer,
                    levels,
                    message.block,
                    step,
                    message.payload,
                    text,
                    sampling,
                    transition=message.transition,
                )
                host.on_cell(message.block, step, message.payload)
            if decoder is not None:
                assert message.payload is not None
                decoder.decode(message.block, message.payload)
        if outbox is not None:
            if message.text_id == text_sent:
                message.rows_RLD = None
            text_sent = message.text_id
            outbox.send(message)
        if message.kind == END:
            if outbox is not None:
                outbox.flush()
            return


def _from_order(host: Host) -> Message:
    order = host.next_order()
    if order.block == NOTHING:
        return Message(kind=END)
    return Message(
        kind=CELL, block=order.block, text_id=order.text_id, rows_RLD=order.rows_RLD, transition=order.transition
    )


def decode_all(host: Host, decoder: Decoder) -> None:
    while True:
        message = host.next()
        assert isinstance(message, Message)
        if message.kind == END:
            return
        assert message.payload is not None
        decoder.decode(message.block, message.payload)


def _replay(pipe: StreamPipeline, host: Host, levels: LevelCaches, texts: Texts, start: Start) -> None:
    """Build the caches of this rank's steps again from the inputs of their passes."""
    sampling = pipe.sampling(host.job.steps)
    for entry in start.history:
        order = entry.order
        text = texts.context(order.text_id, order.rows_RLD)
        for step, state in levels.states.items():
            skip_to(state, order.block, start.shot_start)
            x_t = entry.inputs[step].to(pipe.device) if step else state.noise(0, order.block)
            transition = replayed_transition(state, sampling, order)
            run_cell(pipe.transformer, levels, order.block, step, x_t, text, sampling, transition=transition)
        host.on_replayed(order.block)
