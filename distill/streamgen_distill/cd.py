"""Causal consistency distillation (Causal Forcing++; consistency models, arXiv 2303.01469, algorithm 2).

On a grid of noise levels, adjacent (sigma, sigma'): the teacher makes one Euler step from a noised real block to
sigma', with clean context and guidance; the student at sigma learns what its own average says at sigma':

    loss = | x0_student(x_sigma, sigma) - sg[ x0_ema(x_sigma', sigma') ] |^2,      x0_ema(x, 0) = x

so that one evaluation comes to stand for the whole path. Masks, clips and prompts are those of the teacher's training.

With `segments` > 1 the path is cut at as many noise levels, and one evaluation stands for the path to the end of its
own segment (multistep consistency models, arXiv 2403.06807): far easier to learn, and sampled by as many Euler steps.
Euler steps to a common end are weighted means of x0, so the target is one too:

    r = sigma' / sigma,  r' = sigma_end / sigma':   target = w x0_teacher + (1 - w) x0_ema,  w = r' (1 - r) / (1 - r r')

Step counts. A plain student answers with the end of the whole path at every level, so any steps on the grid do for it:
1, 2 and 4 are one training. A student in segments is told the noise level and not where its segment ends; the same
level begins segments of different lengths under different counts, and has another answer in each. One such model
therefore serves one count.
Visibilities other than clean (`visibility`) need a teacher that was trained for them. Where blocks share a level, so do
their steps on the grid; in a joint window a block's segment is its step, and the window moves as one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.card import SchedulerConfig
from streamgen_distill import teacher
from streamgen_distill.teacher import TaughtObjective
from streamgen_train.objective import Turn
from streamgen_train.objectives.video import Batch

PLAIN_STEPS = (4, 2, 1)


@dataclass(kw_only=True)
class Config(teacher.Config):
    grid_steps: int = 48
    grid_shift: float = 5.0
    segments: int = 1
    """1: plain consistency, sampled with re-noising. n: n pieces of the path, sampled by n Euler steps."""
    trained_steps: tuple[int, ...] | None = None
    """Step counts for the model's card, the default one first. null: 4, 2 and 1 where the grid has their levels
    (segments = 1), or segments."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid_steps < 2:
            raise ValueError(f"grid_steps is {self.grid_steps}; it must be at least 2")
        if self.segments < 1 or self.grid_steps % self.segments:
            raise ValueError(f"segments is {self.segments}; it must divide grid_steps ({self.grid_steps})")
        if self.grid_shift != self.sample_shift:
            raise ValueError(
                f"grid_shift is {self.grid_shift} and sample_shift {self.sample_shift}; they must be equal, "
                "for the sampler's steps lie on the grid"
            )
        self._check_steps()
        if self.visibility.get("joint", 0) > 0:
            if self.grid_steps % self.joint_blocks:
                raise ValueError(f"joint_blocks is {self.joint_blocks}; it must divide grid_steps ({self.grid_steps})")
            if self.segments not in (1, self.joint_blocks):
                raise ValueError(
                    f"segments is {self.segments} and joint_blocks {self.joint_blocks}; they must be equal "
                    "(or segments 1), for a block takes one step in each place of its window"
                )

    def _check_steps(self) -> None:
        if self.trained_steps is None:
            return
        if not self.trained_steps or min(self.trained_steps) < 1:
            raise ValueError(f"trained_steps is {self.trained_steps}; it must hold one or more counts of at least 1")
        if self.segments > 1 and self.trained_steps != (self.segments,):
            raise ValueError(
                f"trained_steps is {self.trained_steps} with segments {self.segments}; a model in segments serves that "
                "one count, for it is not told where its segment ends. Set segments=1 (re-noising) for several counts"
            )
        off = [count for count in self.trained_steps if self.grid_steps % count]
        if off:
            raise ValueError(
                f"trained_steps has {', '.join(map(str, off))}; each count must divide grid_steps ({self.grid_steps}), "
                "or its levels are never trained"
            )

    @property
    def step_counts(self) -> tuple[int, ...]:
        """`trained_steps`, or what it stands for."""
        if self.trained_steps is not None:
            return self.trained_steps
        if self.segments > 1:
            return (self.segments,)
        return tuple(count for count in PLAIN_STEPS if self.grid_steps % count == 0)


class ConsistencyObjective(TaughtObjective):
    """The student's loss against its own average, one teacher step apart."""

    needs_ema = True
    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        levels = flow.step_sigmas(config.grid_steps, config.grid_shift)
        self.grid = torch.tensor((*levels, 0.0))

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        self.grid = self.grid.to(device)

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        super().compile(modules)
        if self.teacher is not None and modules["transformer"] is self.model:
            self.compile_transformer(self.teacher["transformer"])

    def loss(self, batch: Batch, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        assert ema is not None
        x0 = batch.x0_BFCHW
        index_BG = self.grid_index(batch)
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
        name = batch.kind if batch.view.visibility == "clean" else batch.view.visibility
        return loss, {f"cd_{name}": error_BF.detach().mean()}

    def grid_index(self, batch: Batch) -> Tensor:
        """Place on the grid of each block [B, G], 0 the noisiest."""
        view, like_BG = batch.view, batch.scored_BG
        if view.visibility == "joint":  # every block at the same place within its step
            length = self.config.grid_steps // self.config.joint_blocks
            within_B1 = torch.randint(length, like_BG[:, :1].shape, device=like_BG.device)
            return torch.tensor(view.steps, device=like_BG.device) * length + within_B1
        shared = like_BG[:, :1] if view.shares_level else like_BG
        return torch.randint(self.config.grid_steps, shared.shape, device=like_BG.device).expand(like_BG.shape)

    def segment_end(self, index_BG: Tensor) -> Tensor:
        """Grid index at which the segment of a grid index ends."""
        length = self.config.grid_steps // self.config.segments
        return (index_BG // length + 1) * length

    @staticmethod
    def teacher_share(sigma: Tensor, following: Tensor, end: Tensor) -> Tensor:
        """w of the module's docstring; 1 where the teacher's step ends the segment."""
        r, rest = following / sigma, end / following.clamp(min=flow.MIN_SIGMA)
        return torch.where(following == end, 1.0, rest * (1 - r) / (1 - r * rest))

    def scheduler(self) -> SchedulerConfig:
        return self.card_scheduler(self.config.step_counts, "renoise" if self.config.segments == 1 else "euler")


def build(config: Config) -> ConsistencyObjective:
    return ConsistencyObjective(config)
