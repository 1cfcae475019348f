"""How fast one stream is over several processes, beside what the processors could give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from streamgen.errors import UserError
from streamgen.parallel.job import CodecPlace, Job, Split
from streamgen.parallel.piped import Watch
from streamgen.parallel.supervise import PipedStream
from streamgen.pipeline import StreamPipeline

PROMPT = "a red star spinning over a snow background"


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSpeed:
    """One pipeline's speed once it is full; codec and all that passes between processes included."""

    split: Split
    ranks: int
    codec: CodecPlace
    threads: int
    blocks: int
    fps: float
    """Frames per wall second."""
    period_ms: float
    """Between blocks."""
    first_block_s: float
    """From the start of the processes, the model's loading included."""
    cpu_ms: tuple[float, ...]
    """Processor milliseconds of each rank for a block."""
    fps_bound: float
    """If every rank had its processors to itself and nothing else took time: the busiest rank sets the pace."""
    bounds: tuple[int, ...]
    """Of a layer ring, if layers were moved."""


def measure_pipeline(
    pipe: StreamPipeline,
    split: Split,
    ranks: Sequence[int] = (1, 2),
    *,
    blocks: int = 40,
    warmup_blocks: int = 12,
    steps: int | None = None,
    codec: CodecPlace = "shared",
    threads: int = 1,
    devices: tuple[str, ...] = ("cpu",),
    force: bool = False,
    prompt: str = PROMPT,
) -> list[PipelineSpeed]:
    """Run the same stream over each number of ranks, one after the other. UserError where a job does not fit."""
    if pipe.folder is None:
        raise UserError("this pipeline was built in memory; save_pretrained() and load it, for processes load it too")
    if blocks < 1 or warmup_blocks < 1:
        raise UserError(f"blocks is {blocks} and warmup_blocks {warmup_blocks}; both must be at least 1")
    found = []
    for count in ranks:
        job = Job(
            model=str(pipe.folder),
            split=split,
            ranks=count,
            codec=codec,
            steps=pipe.scheduler.trained_steps[0] if steps is None else steps,
            dtype=pipe.dtype_name,
            devices=devices,
            threads=threads,
            force=force,
        )
        found.append(_measure(pipe, job, prompt, blocks, warmup_blocks))
    return found


def _measure(pipe: StreamPipeline, job: Job, prompt: str, blocks: int, warmup_blocks: int) -> PipelineSpeed:
    # Beats are frequent here, for they carry the processor times.
    with PipedStream(pipe, prompt, job, watch=Watch(lost_after_s=2.0)) as stream:
        for block in stream:
            if block.index == 0:
                first_block_s = block.ready_s - stream.started_s
            if block.index == warmup_blocks - 1:
                warm_s, warm_cpu_s = block.ready_s, stream.cpu_s
            if block.index == warmup_blocks + blocks - 1:
                break
        spent_s, cpu_s = block.ready_s - warm_s, stream.cpu_s
        frames = pipe.geometry.block_pixel_frames(1)
        cpu_ms = tuple(1000 * (after - before) / blocks for before, after in zip(warm_cpu_s, cpu_s, strict=True))
        return PipelineSpeed(
            split=job.split,
            ranks=job.ranks,
            codec=job.codec,
            threads=job.threads,
            blocks=blocks,
            fps=frames * blocks / spent_s,
            period_ms=1000 * spent_s / blocks,
            first_block_s=first_block_s,
            cpu_ms=cpu_ms,
            fps_bound=1000 * frames * job.threads / max(cpu_ms) if max(cpu_ms) else math.inf,
            bounds=stream.bounds,
        )
