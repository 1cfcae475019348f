"""Bidirectional flow matching: the score teacher (Wan, arXiv 2503.20314; the role of `real score` in DMD).

A whole clip is denoised together at one noise level, all frames see all frames, every block under its own prompt. A
share of clips has a level for each block, which a score of unevenly noised video needs. Batches of the kind `gap`
lose their first block here: they are clips from the middle of a stream, whose first latent frame has seen the frames
before it. The parameters are those of the autoregressive models, so either can start from the other (`init_from`).

Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.embedded_text import EmbeddedText
from streamgen.errors import UserError
from streamgen.rope import rope_table
from streamgen.sheets import contact_sheet
from streamgen.text import SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen.worlds import sprites
from streamgen_train.clips import Kind
from streamgen_train.data import pick_captions
from streamgen_train.objectives import flow_matching
from streamgen_train.objectives.flow_matching import FlowMatching
from streamgen_train.objectives.video import Batch


@dataclass(kw_only=True)
class Config(flow_matching.Config):
    own_level_share: float = 0.0
    """Share of clips of which every block has its own noise level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.own_level_share <= 1:
            raise ValueError(f"own_level_share is {self.own_level_share}; it must be in [0, 1]")
        if self.gap_share > 0 and self.clip_blocks < 2:
            raise ValueError(f"clip_blocks is {self.clip_blocks}; with gap_share above 0 it must be at least 2")


class BidirectionalObjective(FlowMatching):
    """All frames see all frames."""

    config: Config

    @torch.no_grad()
    def make_batch(self, kind: Kind, count: int, rng: torch.Generator) -> Batch:
        batch = super().make_batch(kind, count, rng)
        if kind != "gap":
            return batch
        first = self.config.geometry.block_size(0)
        return replace(
            batch,
            x0_BFCHW=batch.x0_BFCHW[:, first:],
            ids_BGL=batch.ids_BGL[:, 1:],
            clean_ids_BGL=batch.clean_ids_BGL[:, 1:],
            scored_BG=torch.ones_like(batch.scored_BG[:, 1:]),
        )

    def levels(self, batch: Batch) -> Tensor:
        like_BG = batch.scored_BG
        sigma_B1 = self.draw_sigma(like_BG[:, :1])
        if self.config.own_level_share == 0:
            return sigma_B1.expand_as(like_BG)
        own_B1 = torch.rand_like(sigma_B1) < self.config.own_level_share
        return torch.where(own_B1, self.draw_sigma(like_BG), sigma_B1)

    def predict_x0(
        self,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        x_t: Tensor,
        sigma_BF: Tensor,
        ids_BGL: Tensor | None = None,
    ) -> Tensor:
        return whole_clip_x0(modules, x_t, sigma_BF, batch.ids_BGL if ids_BGL is None else ids_BGL)

    def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        """Whole clips of held-out captions, one row each."""
        if self.codec is None or self.source is not None:
            return {}
        g, rng = self.config.geometry, torch.Generator().manual_seed(4)
        items = pick_captions(12, rng, "heldout", self.config.world)
        ids_BGL = self.text.ids([c.text for c in items])[:, None].expand(-1, self.config.clip_blocks, -1)
        shape = (g.block_start(self.config.clip_blocks), g.latent_channels, g.latent_height, g.latent_width)
        noise = torch.randn(len(items), *shape, generator=rng)
        sigmas = flow.step_sigmas(self.config.sample_steps, self.config.sample_shift)
        latents = sample_clips(modules, noise.to(self.device), ids_BGL.to(self.device), sigmas)
        videos = sprites.to_uint8(self.codec.decode(latents).float().cpu())
        return {"samples": contact_sheet(list(videos.numpy()), [c.text for c in items], frames=9, columns=2)}

    def export(self, modules: Mapping[str, nn.Module], folder: Path) -> None:
        raise UserError(
            "a bidirectional model cannot be streamed, so it does not become a model folder; "
            "name its run folder as the teacher of a distillation, or as init_from"
        )


def whole_clip_x0(modules: Mapping[str, nn.Module], x_t: Tensor, sigma_BF: Tensor, ids_BGL: Tensor) -> Tensor:
    """x0 [B, F, C, H, W] float32 of clips in which all frames see all frames; the blocks divide the frames evenly."""
    model, text = modules["transformer"], modules["text"]
    assert isinstance(model, CausalWanModel) and isinstance(text, SpritesTextEncoder | EmbeddedText)
    c = model.config
    grid = (x_t.shape[3] // c.patch[1], x_t.shape[4] // c.patch[2])
    rope = _rope(x_t.shape[1], grid, c.head_dim, c.rope_theta, x_t.device)
    out = model(x_t, flow.timestep_of(sigma_BF), model.encode_text(text.encode_ids(ids_BGL)), rope=rope)
    return flow.to_x0(out.float(), x_t, sigma_BF, c.prediction)


@lru_cache(maxsize=8)
def _rope(
    frames: int, grid: tuple[int, int], head_dim: int, theta: float, device: torch.device
) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(range(frames), *grid, head_dim, theta)
    return cos.to(device), sin.to(device)


@torch.no_grad()
def sample_clips(
    modules: Mapping[str, nn.Module], noise_BFCHW: Tensor, ids_BGL: Tensor, sigmas: tuple[float, ...]
) -> Tensor:
    """Whole clips by Euler steps from noise at these levels to clean: [B, F, C, H, W] float32."""
    x = noise_BFCHW
    for sigma, following in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        x0 = whole_clip_x0(modules, x, torch.full(x.shape[:2], sigma, device=x.device), ids_BGL)
        x = flow.euler_step(x, flow.flow_from_x0(x, x0, sigma), sigma, following)
    return x


def build(config: Config) -> BidirectionalObjective:
    return BidirectionalObjective(config)
