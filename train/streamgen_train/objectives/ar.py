"""Autoregressive flow matching: teacher forcing (CausVid, arXiv 2412.07772; Causal Forcing's first stage), and other
visibilities in shares.

Teacher forcing: the clean and the noisy copy of a clip go through the transformer as one sequence under one mask:
clean block b sees clean blocks up to b, noisy block b sees clean blocks before b and itself. Each block has its own
noise level and its own prompt.
`visibility` mixes in batches of other kinds, so that one checkpoint can be streamed in several ways:
    same_level  the noisy copy alone, all blocks of a clip at one level
    latest      the noisy copy alone, each block at its own level: diffusion forcing (df.py)
    lagged      both copies at one level: clean blocks from `lag_blocks` back, noisy ones between
    joint       both copies; windows of `joint_blocks` noisy blocks of rising noise see each other

Letters: B clips, G blocks, F latent frames, C H W latent, L D text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.card import SchedulerConfig
from streamgen.embedded_text import EmbeddedText
from streamgen.errors import UserError
from streamgen.rope import rope_table
from streamgen.text import SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen.visibility import Layout, Visibility, frame_mask, mask_of
from streamgen_train.objective import Turn
from streamgen_train.objectives import flow_matching
from streamgen_train.objectives.flow_matching import VALIDATION_SIGMAS, FlowMatching
from streamgen_train.objectives.video import Batch
from streamgen_train.objectives.views import (
    ALONE,
    CLEAN,
    View,
    card_visibility,
    check_shares,
    draw_joint,
    draw_visibility,
    joint_u,
    whole_windows,
)


@dataclass(kw_only=True)
class Config(flow_matching.Config):
    visibility: dict[Visibility, float] = field(default_factory=lambda: {"clean": 1.0})
    """Shares of what a block sees of earlier ones, over batches of more than one block."""
    joint_blocks: int = 3
    """Blocks, and noise levels, of a joint window."""
    lag_blocks: int = 2
    """Blocks by which the clean past is behind in `lagged`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(
            self.visibility,
            clip_blocks=self.clip_blocks,
            joint_blocks=self.joint_blocks,
            lag_blocks=self.lag_blocks,
            geometry=self.geometry,
            window_frames=self.window_frames,
            sink_frames=self.sink_frames,
        )


class ArObjective(FlowMatching):
    """Every block learns from the blocks before it."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._tables: dict[tuple[int, View], tuple[tuple[Tensor, Tensor], Any]] = {}

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        if self.config.attention_backend == "spans" and self.config.visibility.get("joint", 0) > 0:
            raise UserError(
                "objective.attention_backend=spans compiles anew for every mask, and the visibility joint draws many; "
                "take math, or train.compile=false"
            )
        super().compile(modules)

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        self._tables.clear()

    def batch(self, turn: Turn) -> Batch:
        batch = super().batch(turn)
        if batch.kind != "single":
            visibility, blocks = draw_visibility(self.config.visibility, turn.rng), batch.scored_BG.shape[1]
            if visibility == "joint":
                batch.view = draw_joint(blocks, self.config.joint_blocks, batch.kind == "gap", turn.rng)
            else:
                batch.view = self.view(visibility)
        return batch

    def view(self, visibility: Visibility) -> View:
        """Of every visibility but `joint`, whose windows are drawn."""
        return View(visibility, lag_blocks=self.config.lag_blocks if visibility == "lagged" else 1)

    def tables(self, blocks: int, view: View = CLEAN) -> tuple[tuple[Tensor, Tensor], Any]:
        """Rotary table and mask (as the attention backend takes it) of a clip of `blocks` blocks: of [clean | noisy],
        or of the noisy copy for views without a clean one. No mask: all frames see all.
        """
        if (blocks, view) not in self._tables:
            g, c = self.config.geometry, self.config
            layout = view.layout(blocks, g, c.window_frames, c.sink_frames)
            frames = [*range(sum(layout.block_frames))] * len(layout.copies)
            cos, sin = rope_table(frames, g.grid_height, g.grid_width, c.model.head_dim, c.model.rope_theta)
            mask: Any = None
            if blocks > 1 or len(layout.copies) > 1:
                mask = mask_of(layout, g.tokens_per_frame, c.attention_backend, self.device)
            self._tables[blocks, view] = ((cos.to(self.device), sin.to(self.device)), mask)
        return self._tables[blocks, view]

    def layout(self, blocks: int) -> Layout:
        """Of the visibility that has the largest share."""
        c = self.config
        most = max(c.visibility, key=lambda name: c.visibility[name])
        return self._whole_view(most, blocks).layout(blocks, c.geometry, c.window_frames, c.sink_frames)

    def _whole_view(self, visibility: Visibility, blocks: int) -> View:
        """Of every visibility; joint windows begin with the clip."""
        return whole_windows(blocks, self.config.joint_blocks) if visibility == "joint" else self.view(visibility)

    def heaviest_view(self, blocks: int) -> View:
        c = self.config

        def cost(view: View) -> tuple[int, int]:
            layout = view.layout(blocks, c.geometry, c.window_frames, c.sink_frames)
            return len(layout.copies), int(frame_mask(layout).sum())

        return max((self._whole_view(name, blocks) for name, share in c.visibility.items() if share > 0), key=cost)

    def predict_x0(
        self,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        x_t: Tensor,
        sigma_BF: Tensor,
        ids_BGL: Tensor | None = None,
    ) -> Tensor:
        """x0 of every noisy block, given what the batch's view shows of the blocks before it."""
        model, text = modules["transformer"], modules["text"]
        assert isinstance(model, CausalWanModel) and isinstance(text, SpritesTextEncoder | EmbeddedText)
        ids = batch.ids_BGL if ids_BGL is None else ids_BGL
        frames, blocks = x_t.shape[1], ids.shape[1]
        if blocks == 1 or batch.view.alone:  # nothing before it, or nothing clean: no clean half
            rope, mask = self.tables(blocks, ALONE)
            out = model(x_t, flow.timestep_of(sigma_BF), model.encode_text(text.encode_ids(ids)), rope=rope, mask=mask)
        else:
            rope, mask = self.tables(blocks, batch.view)
            context = model.encode_text(text.encode_ids(torch.cat([batch.clean_ids_BGL, ids], 1)))
            both = torch.cat([batch.x0_BFCHW, x_t], 1)
            timestep = flow.timestep_of(torch.cat([torch.zeros_like(sigma_BF), sigma_BF], 1))
            out = model(both, timestep, context, rope=rope, mask=mask)[:, frames:]
        return flow.to_x0(out.float(), x_t, sigma_BF, self.config.model.prediction)

    def levels(self, batch: Batch) -> Tensor:
        view, like_BG = batch.view, batch.scored_BG
        if view.visibility == "joint":
            phase_B1 = torch.rand_like(like_BG[:, :1])
            return flow.sample_sigma(joint_u(view, self.config.joint_blocks, phase_B1), self.config.sample_shift)
        if view.shares_level:
            return self.draw_sigma(like_BG[:, :1]).expand_as(like_BG)
        return self.draw_sigma(like_BG)

    def scores(self, modules: Mapping[str, nn.Module], batch: Batch, noise: Tensor) -> dict[str, float]:
        """With clean context, and for clips with every other visibility that is trained; a clip's first block has no
        context and does not count.
        """
        if batch.kind == "single":
            return super().scores(modules, batch, noise)
        found: dict[str, float] = {}
        first = self.config.geometry.block_size(0)
        for visibility in dict.fromkeys(("clean", *self.config.visibility)):
            if visibility == "joint":
                found |= self._joint_scores(modules, batch, noise)
                continue
            seen, name = replace(batch, view=self.view(visibility)), batch.kind if visibility == "clean" else visibility
            for sigma in VALIDATION_SIGMAS:
                found[f"{name}_{sigma}"] = float(self.error_at(modules, seen, noise, sigma)[:, first:].mean())
        return found

    def _joint_scores(self, modules: Mapping[str, nn.Module], batch: Batch, noise: Tensor) -> dict[str, float]:
        """Error of each block of a full window at the levels of the sampler, by level."""
        n, g = self.config.joint_blocks, self.config.geometry
        view = whole_windows(batch.scored_BG.shape[1], n)
        u_BG = joint_u(view, n, torch.zeros_like(batch.scored_BG[:, :1]))
        sigma_BG = flow.sample_sigma(u_BG, self.config.sample_shift)
        error = self.error_at(modules, replace(batch, view=view), noise, sigma_BG)
        found = {}
        for block in range(len(view.steps) - n, len(view.steps)):
            frames = slice(g.block_start(block), g.block_start(block) + g.block_size(block))
            found[f"joint_{float(sigma_BG[0, block]):.3g}"] = float(error[:, frames].mean())
        return found

    def card_scheduler(self, trained_steps: tuple[int, ...], sampler: str) -> SchedulerConfig:
        """With the visibilities that were trained."""
        c, visibility = self.config, card_visibility(self.config.visibility)
        return replace(
            super().card_scheduler(trained_steps, sampler),
            visibility=visibility,
            joint_blocks=c.joint_blocks if "joint" in visibility else 0,
            lag_blocks=c.lag_blocks if "lagged" in visibility else 0,
        )


def build(config: Config) -> ArObjective:
    return ArObjective(config)
