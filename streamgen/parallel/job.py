"""One stream over several processes: what all of them know, what a block's order says, and who does what."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from streamgen.cache import KVCache, policy
from streamgen.errors import UserError
from streamgen.parallel.levels import LevelCaches
from streamgen.pipeline import StreamPipeline
from streamgen.stream import MAX_STEPS
from streamgen.timeline import PromptTimeline
from streamgen.transformer import TextContext
from streamgen.weights import user_errors

Split = Literal["step_chain", "layer_ring"]
CodecPlace = Literal["shared", "own"]
VISIBILITY = "same_level"
NOTHING = -1
"""Block of an order that makes no block (see `Order`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every process of a pipeline is started with."""

    model: str
    """A model folder; every process loads it."""
    split: Split = "step_chain"
    """step_chain: steps over ranks, latents between them (Live Avatar). layer_ring: ranges of layers over ranks,
    activations between them, cells of several blocks going round (StreamDiffusion 2)."""
    ranks: int = 2
    codec: CodecPlace = "shared"
    """shared: decoded by the rank that finishes blocks (the last of a chain, the first of a ring). own: by the last of
    `ranks`, which does nothing else."""
    steps: int = 4
    """Of every block."""
    seed: int = 0
    cache: str | None = None
    """Policy of the caches; None: the model's (`SchedulerConfig.positions`)."""
    dtype: str = "fp32"
    devices: tuple[str, ...] = ("cpu",)
    """Rank r computes on devices[r % len(devices)]."""
    threads: int = 1
    """Of each process, for CPU tensors."""
    outstanding: int = 2
    """Messages that a rank may have sent, or received, ahead of those who take them."""
    rebalance: bool = True
    """Of a layer ring: move layers to where measured times say."""
    force: bool = False
    """Run a model that was not trained for same-level visibility."""

    @property
    def model_ranks(self) -> int:
        """Ranks that run the transformer: the first ones."""
        return self.ranks - (self.codec == "own")


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one block is to be made from; it travels with the block, so nothing is drained when it changes.

    With block NOTHING it is a change by itself: of `bounds`, or (without) the end of the stream.
    """

    block: int
    text_id: int = 0
    """Changes whenever the text does (every block, in a blend)."""
    rows_RLD: Tensor | None = None
    """The text's embeddings [1, text_len, text_dim] float32; None where `text_id` was seen before."""
    transition: str | None = None
    bounds: tuple[int, ...] = ()
    """New first layers of a ring's ranks, and the number of layers."""


STOP = Order(block=NOTHING)


def check_job(job: Job, pipe: StreamPipeline) -> None:
    """UserError where the job does not fit the model or itself."""
    with user_errors(job.split):
        pipe.scheduler.check_visibility(VISIBILITY)
        name = pipe.scheduler.positions if job.cache is None else job.cache
        if policy(name).committed is not None:
            raise ValueError(f"cache {name}: its sink cannot be made again from latents after a rank is lost")
    if pipe.loras:
        raise UserError(
            f"the ranks load {job.model} anew, without its adapters ({', '.join(pipe.loras)}); merge them into a model "
            "of their own first (streamgen convert --lora)"
        )
    trained = pipe.scheduler.visibility
    if VISIBILITY not in trained and not job.force:
        raise UserError(
            f"{job.split} needs a model trained for {VISIBILITY} visibility; the card lists {', '.join(trained)}; "
            "force=True runs it all the same (frames will be worse)"
        )
    if not 1 <= job.steps <= MAX_STEPS:
        raise UserError(f"steps is {job.steps}; it must be 1 to {MAX_STEPS}")
    if not 0 <= job.seed < 2**64:
        raise UserError(f"seed is {job.seed}; it must be 0 to 2**64 - 1")
    if job.codec == "own" and job.ranks < 2:
        raise UserError(f"ranks is {job.ranks} and the codec has one of its own: take at least 2 ranks")
    if job.ranks < 1:
        raise UserError(f"ranks is {job.ranks}; it must be at least 1")
    count, what = {
        "step_chain": (job.steps, "steps"),
        "layer_ring": (pipe.transformer.config.num_layers, "layers"),
    }[job.split]
    if job.model_ranks > count:
        raise UserError(
            f"a {job.split} over {job.model_ranks} ranks: the model has {count} {what}, so take at most {count}"
        )
    if job.outstanding < 1:
        raise UserError(f"outstanding is {job.outstanding}; it must be at least 1")
    if job.ranks > 1 and len({torch.device(name).type for name in job.devices}) > 1:
        raise UserError(f"devices are {', '.join(job.devices)}: ranks must be of one kind, all cpu or all cuda")


def even_bounds(count: int, parts: int) -> tuple[int, ...]:
    """`count` things in `parts` ranges, the first ones longer: (first of each ..., count)."""
    short, longer = divmod(count, parts)
    return tuple(part * short + min(part, longer) for part in range(parts + 1))


def make_levels(job: Job, pipe: StreamPipeline, steps: range, layers: range | None = None) -> LevelCaches:
    """Empty caches of these steps; with `layers`, of a range of the model's layers alone."""

    def new_cache() -> KVCache:
        cache = new_cache_of(job, pipe)
        return cache if layers is None else resized(cache, len(layers))

    return LevelCaches.make(new_cache, steps, pipe.geometry, (job.seed,))


def new_cache_of(job: Job, pipe: StreamPipeline) -> KVCache:
    """An empty cache of the whole model."""
    return pipe.new_cache(pipe.scheduler.positions if job.cache is None else job.cache)


def resized(cache: KVCache, num_layers: int) -> KVCache:
    """An empty cache like this one, of so many layers."""
    return KVCache(replace(cache.spec, num_layers=num_layers), dtype=cache.k.dtype, device=cache.k.device)


class Texts:
    """Text keys and values by `Order.text_id`, for as many as blocks may be in flight."""

    def __init__(self, pipe: StreamPipeline, keep: int) -> None:
        self._pipe, self._keep = pipe, keep
        self._contexts: dict[int, TextContext] = {}

    @torch.no_grad()
    def context(self, text_id: int, rows_RLD: Tensor | None) -> TextContext:
        """Of an order, or of a message that carries its text."""
        if text_id not in self._contexts:
            assert rows_RLD is not None, f"text {text_id} came without its rows"
            rows = rows_RLD[:, None].to(self._pipe.device, self._pipe.dtype)
            self._contexts[text_id] = self._pipe.transformer.encode_text(rows)
            while len(self._contexts) > self._keep:
                del self._contexts[next(iter(self._contexts))]
        return self._contexts[text_id]


class Orders:
    """Makes the orders of consecutive blocks from a timeline; prompts are encoded once."""

    def __init__(self, pipe: StreamPipeline, timeline: PromptTimeline) -> None:
        self._pipe, self._timeline = pipe, timeline
        self._rows: dict[int, Tensor] = {}  # version -> [1, L, D]
        self._mix: tuple[tuple[int, float], ...] = ()
        self._mixed: Tensor | None = None
        self._text_id = -1

    @torch.no_grad()
    def make(self, block: int) -> Order:
        """The order of a block, its text included."""
        cue = self._timeline.at(block)
        if self._mixed is None or cue.mix != self._mix:
            old = self._rows
            self._rows = {
                version: old[version]
                if version in old
                else self._pipe.text.encode([self._timeline.prompts[version].prompt]).float().cpu()
                for version, _ in cue.mix
            }
            self._mixed = torch.stack([share * self._rows[version] for version, share in cue.mix]).sum(0)
            self._mix = cue.mix
            self._text_id += 1
        return Order(block=block, text_id=self._text_id, rows_RLD=self._mixed, transition=cue.transition)
