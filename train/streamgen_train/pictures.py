"""What a model in training makes of a few held-out captions, as a contact sheet."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from streamgen.batch import generate
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import SchedulerConfig, StreamPipeline
from streamgen.sheets import contact_sheet
from streamgen.worlds.grammar import WHOLE, Part, captions


def pipeline_of(
    modules: Mapping[str, nn.Module], codec: nn.Module, geometry: VideoGeometry, scheduler: SchedulerConfig
) -> StreamPipeline:
    """A pipeline over modules in training; they are put in eval mode."""
    return StreamPipeline(
        transformer=modules["transformer"],  # type: ignore[arg-type]
        codec=codec,
        text=modules["text"],
        geometry=geometry,
        scheduler=scheduler,
    )


def sample_sheet(
    pipe: StreamPipeline, *, steps: int, clips: int = 12, blocks: int = 3, part: Part = WHOLE
) -> np.ndarray:
    """Clips of fixed held-out captions, one row each."""
    held_out = captions("heldout", part)
    items = [held_out[i] for i in torch.randperm(len(held_out), generator=torch.Generator().manual_seed(4))[:clips]]
    videos = generate(pipe, [c.text for c in items], range(len(items)), blocks, steps=steps)
    return contact_sheet(list(videos.numpy()), [c.text for c in items], frames=9, columns=2)
