"""Causal consistency distillation (Causal Forcing++; consistency models, arXiv 2303.01469, algorithm 2).

On a grid of noise levels, adjacent (sigma, sigma'): the teacher makes one Euler step from a noised real block to
sigma', with clean context and guidance; the student at sigma learns what its own average says at sigma':

    loss = | x0_student(x_sigma, sigma) - sg[ x0_ema(x_sigma', sigma') ] |^2,      x0_ema(x, 0) = x

so that one evaluation comes to stand for the whole path. Masks, clips and prompts are those of the teacher's training.

With `segments` > 1 the path is cut at as many noise levels, and one evaluation stands for the path to the end of its
own segment (multistep consistency models, arXiv 2403.06807): far easier to learn, and sampled by as many Euler steps.
Euler steps to a common end are weighted means of x0, so the target is one too:

    r = sigma' / sigma,  r' = sigma_end / sigma':   target = w x0_teacher + (1 - w) x0_ema,  w = r' (1 - r) / (1 - r r')
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.pipeline import SchedulerConfig
from streamgen.text import SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen_train.checkpoint import load_into
from streamgen_train.objective import Turn
from streamgen_train.objectives.ar import ArObjective
from streamgen_train.objectives.ar import Config as ArConfig
from streamgen_train.objectives.video import Batch


@dataclass(kw_only=True)
class Config(ArConfig):
    teacher_from: str
    """Run folder or checkpoint of the autoregressive teacher; the student starts from its weights."""
    grid_steps: int = 48
    grid_shift: float = 5.0
    segments: int = 1
    """1: plain consistency, sampled with re-noising. n: n pieces of the path, sampled by n Euler steps."""
    guidance: float = 1.0
    """uncond + guidance (cond - uncond) of the teacher; 1 is off and saves its second pass."""
    text_drop: float = 0.0
    sample_steps: int = 4

    def __post_init__(self) -> None:
        if self.grid_steps < 2:
            raise ValueError(f"grid_steps is {self.grid_steps}; it must be at least 2")
        if self.segments < 1 or self.grid_steps % self.segments:
            raise ValueError(f"segments is {self.segments}; it must divide grid_steps ({self.grid_steps})")
        if self.segments > 1 and self.grid_shift != self.sample_shift:
            raise ValueError(
                f"grid_shift is {self.grid_shift} and sample_shift {self.sample_shift}; they must be equal, "
                "for the sampler's steps are the ends of the segments"
            )
        if self.init_from is None:
            self.init_from = self.teacher_from


class ConsistencyObjective(ArObjective):
    """The student's loss against its own average, one teacher step apart."""

    needs_ema = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.teacher: dict[str, nn.Module] | None = None
        levels = flow.step_sigmas(config.grid_steps, config.grid_shift)
        self.grid = torch.tensor((*levels, 0.0))

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.teacher is None:
            self.teacher = {
                "transformer": CausalWanModel(self.config.model, attention_backend=self.config.attention_backend),
                "text": SpritesTextEncoder(self.config.text),
            }
            load_into(Path(self.config.teacher_from), self.teacher)
        super().prepare(device, dtype)
        self.grid = self.grid.to(device)
        for module in self.teacher.values():
            module.to(device, dtype).eval().requires_grad_(False)

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        super().compile(modules)
        if self.teacher is not None and modules["transformer"] is self.model:
            self.teacher["transformer"].compile(dynamic=False)

    def loss(self, batch: Batch, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert ema is not None
        x0 = batch.x0_BFCHW
        index_BG = torch.randint(self.config.grid_steps, batch.scored_BG.shape, device=x0.device)
        sigma_BF, next_BF = (self.per_frame(self.grid[i]) for i in (index_BG, index_BG + 1))
        x_t = flow.add_noise(x0, torch.randn_like(x0), sigma_BF)
        with torch.no_grad():
            x0_teacher = self.teacher_x0(batch, x_t, sigma_BF)
            x_next = flow.euler_step(x_t, flow.flow_from_x0(x_t, x0_teacher, sigma_BF), sigma_BF, next_BF)
            x0_ema = self.predict_x0(ema, batch, x_next, next_BF)
            share = self.teacher_share(sigma_BF, next_BF, self.per_frame(self.grid[self.segment_end(index_BG)]))
            target = torch.lerp(x0_ema, x0_teacher, share[..., None, None, None])
        error_BF = (self.predict_x0(self.modules(), batch, x_t, sigma_BF) - target).square().mean((2, 3, 4))
        loss = (error_BF * self.per_frame(batch.scored_BG)).mean()
        return loss, {f"cd_{batch.kind}": error_BF.detach().mean()}

    def segment_end(self, index_BG: Tensor) -> Tensor:
        """Grid index at which the segment of a grid index ends."""
        length = self.config.grid_steps // self.config.segments
        return (index_BG // length + 1) * length

    @staticmethod
    def teacher_share(sigma: Tensor, following: Tensor, end: Tensor) -> Tensor:
        """w of the module's docstring; 1 where the teacher's step ends the segment."""
        r, rest = following / sigma, end / following.clamp(min=flow.MIN_SIGMA)
        return torch.where(following == end, 1.0, rest * (1 - r) / (1 - r * rest))

    def teacher_x0(self, batch: Batch, x_t: Tensor, sigma_BF: Tensor) -> Tensor:
        """The teacher's (guided) x0."""
        assert self.teacher is not None
        x0 = self.predict_x0(self.teacher, batch, x_t, sigma_BF)
        if self.config.guidance == 1.0:
            return x0
        empty = torch.full_like(batch.ids_BGL, -1)
        return flow.guided(self.predict_x0(self.teacher, batch, x_t, sigma_BF, empty), x0, self.config.guidance)

    def scheduler(self) -> SchedulerConfig:
        if self.config.segments == 1:
            return self.card_scheduler((self.config.sample_steps,), "renoise")
        return self.card_scheduler((self.config.segments,), "euler")


def build(config: Config) -> ConsistencyObjective:
    return ConsistencyObjective(config)
