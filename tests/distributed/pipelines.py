"""A model of four layers trained (so its card says) for same-level visibility, and its streams in the serial order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from streamgen.parallel.job import Job, Orders
from streamgen.parallel.levels import LevelCaches, run_block
from streamgen.parallel.processes import joined, leave
from streamgen.parallel.worker import run_joined
from streamgen.pipeline import StreamPipeline
from streamgen.pixels import to_uint8
from streamgen.timeline import PromptTimeline
from streamgen.transformer import CausalWanModel
from tests.tiny_model import save_tiny_model

STAR, RING = "a red star spinning over a snow background", "a blue ring rising over a navy background"
STEPS = 4


def save_model(folder: Path) -> Path:
    tiny = StreamPipeline.from_pretrained(save_tiny_model(folder / "two"), dtype="fp32")
    torch.manual_seed(1)
    model = CausalWanModel(replace(tiny.transformer.config, num_layers=4))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    pipe = StreamPipeline(
        transformer=model,
        codec=tiny.codec,
        text=tiny.text,
        geometry=tiny.geometry,
        scheduler=replace(tiny.scheduler, visibility=("clean", "same_level")),
    )
    pipe.save_pretrained(folder / "four")
    return folder / "four"


def caches(pipe: StreamPipeline, steps: int, seed: int = 3) -> LevelCaches:
    return LevelCaches.make(lambda: pipe.new_cache("relative"), range(steps), pipe.geometry, (seed,))


@torch.no_grad()
def serial(
    pipe: StreamPipeline, timeline: PromptTimeline, blocks: int, *, steps: int = STEPS, seed: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """(clean latents, uint8 frames) of each block, one cell after the other in one process."""
    levels, codec, made = caches(pipe, steps, seed), None, []
    for block in range(blocks):
        cue = timeline.at(block)
        rows = torch.stack([share * pipe.text.encode([timeline.prompts[v].prompt]).float() for v, share in cue.mix])
        text = pipe.transformer.encode_text(rows.sum(0)[:, None])
        latents = run_block(pipe.transformer, levels, text, pipe.sampling(steps), transition=cue.transition)
        video, codec = pipe.codec.decode_stream(latents, codec)
        made.append((latents, to_uint8(video)[0]))
    return made


def timeline_of(*prompts: tuple[int, str, str]) -> PromptTimeline:
    """(block, prompt, transition) after STAR."""
    timeline = PromptTimeline(STAR)
    for block, prompt, transition in prompts:
        timeline.add(prompt, block, transition, blend_blocks=2)
    return timeline


def join_and_run(environment: dict[str, str], job: Job, prompts: list[tuple[int, str, str]], out: Path) -> None:
    """A process as torchrun starts it; the one that decodes saves what it made."""
    import os

    os.environ.update(environment)
    torch.set_num_threads(1)
    with joined(False, 60.0):
        pipe = StreamPipeline.from_pretrained(job.model, dtype="fp32")
        orders = Orders(pipe, timeline_of(*prompts))
        made: list[tuple[Tensor, Tensor]] = []
        run_joined(job, pipe, map(orders.make, range(8)), lambda block, latents, frames: made.append((latents, frames)))
        if made:
            torch.save(made, out)
    leave(0)
