"""Autoregressive flow matching with teacher forcing (CausVid, arXiv 2412.07772; Causal Forcing's first stage).

The clean and the noisy copy of a clip go through the transformer as one sequence under one mask: clean block b sees
clean blocks up to b, noisy block b sees clean blocks before b and itself. Each block has its own noise level and its
own prompt. Loss: bounded_flow_weight(sigma) |x0_hat - x0|^2, which for the flow is |v_hat - v|^2 with less weight
on nearly clean input.

Letters: B clips, G blocks, F latent frames, C H W latent, L D text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.attention import teacher_forcing_mask
from streamgen.rope import rope_table
from streamgen.text import SpritesTextEncoder
from streamgen.transformer import CausalWanModel
from streamgen_train.objective import Turn
from streamgen_train.objectives import video
from streamgen_train.objectives.video import Batch, VideoObjective

VALIDATION_SIGMAS = (1.0, 0.95, 0.85, 0.6)


@dataclass(kw_only=True)
class Config(video.Config):
    shifts: tuple[float, ...] = (8.0,)
    """Noise levels are uniform u warped by one of these shifts, drawn evenly: high ones train the decisions (what and
    where), low ones the drawing."""
    sigma_floor: float = 0.3


class ArObjective(VideoObjective):
    """Teacher forcing: every block learns from the clean blocks before it."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self._tables: dict[int, tuple[tuple[Tensor, Tensor], Tensor]] = {}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        super().prepare(device, dtype)
        self._tables.clear()

    def tables(self, blocks: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Rotary table and mask of [clean | noisy] for a clip of `blocks` blocks."""
        if blocks not in self._tables:
            g, c = self.config.geometry, self.config
            sizes = [g.block_size(b) for b in range(blocks)]
            head_dim = c.model.head_dim
            cos, sin = rope_table(range(sum(sizes)), g.grid_height, g.grid_width, head_dim, c.model.rope_theta)
            mask = teacher_forcing_mask(
                sizes, g.tokens_per_frame, window_frames=c.window_frames, sink_frames=c.sink_frames
            )
            rope = (torch.cat([cos, cos]).to(self.device), torch.cat([sin, sin]).to(self.device))
            self._tables[blocks] = (rope, mask.to(self.device))
        return self._tables[blocks]

    def predict_x0(
        self,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        x_t: Tensor,
        sigma_BF: Tensor,
        ids_BGL: Tensor | None = None,
    ) -> Tensor:
        """x0 of every noisy block, given the clean blocks before it: [B, F, C, H, W] float32."""
        model, text = modules["transformer"], modules["text"]
        assert isinstance(model, CausalWanModel) and isinstance(text, SpritesTextEncoder)
        ids = batch.ids_BGL if ids_BGL is None else ids_BGL
        frames, blocks = x_t.shape[1], ids.shape[1]
        if blocks == 1:  # nothing before it: the clean half would be dead weight
            cos, sin = self.tables(1)[0]
            half = len(cos) // 2
            context = model.encode_text(text.encode_ids(ids))
            timestep = flow.timestep_of(sigma_BF)
            out = model(x_t, timestep, context, rope=(cos[:half], sin[:half]))
            return flow.to_x0(out.float(), x_t, sigma_BF, self.config.model.prediction)
        rope, mask = self.tables(blocks)
        context = model.encode_text(text.encode_ids(torch.cat([batch.clean_ids_BGL, ids], 1)))
        both = torch.cat([batch.x0_BFCHW, x_t], 1)
        timestep = flow.timestep_of(torch.cat([torch.zeros_like(sigma_BF), sigma_BF], 1))
        out = model(both, timestep, context, rope=rope, mask=mask)[:, frames:]
        return flow.to_x0(out.float(), x_t, sigma_BF, self.config.model.prediction)

    def draw_sigma(self, like_BG: Tensor) -> Tensor:
        """A noise level for each block."""
        shifts = torch.tensor(self.config.shifts, device=like_BG.device)
        shift_BG = shifts[torch.randint(len(shifts), like_BG.shape, device=like_BG.device)]
        return flow.sample_sigma(torch.rand_like(like_BG), shift_BG)

    def loss(self, batch: Batch, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch.x0_BFCHW
        sigma_BG = self.draw_sigma(batch.scored_BG)
        sigma_BF = self.per_frame(sigma_BG)
        x_t = flow.add_noise(x0, torch.randn_like(x0), sigma_BF)
        error_BF = (self.predict_x0(self.modules(), batch, x_t, sigma_BF) - x0).square().mean((2, 3, 4))
        weight_BF = flow.bounded_flow_weight(sigma_BF, self.config.sigma_floor) * self.per_frame(batch.scored_BG)
        loss = (weight_BF * error_BF).mean()
        frames = self.config.geometry.block_size(0)
        return loss, {f"mse_{batch.kind}": error_BF.detach().mean(), "mse_first": error_BF[:, :frames].detach().mean()}

    def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Error of x0 at fixed noise levels, for a block from nothing and for one with clean context."""
        rng = torch.Generator().manual_seed(3)
        scores = {}
        for kind in ("single", "story"):
            batch = self.make_batch(kind, self.config.validation_clips, rng)
            noise = torch.randn(batch.x0_BFCHW.shape, generator=rng).to(self.device)
            for sigma in VALIDATION_SIGMAS:
                sigma_BF = torch.full(batch.x0_BFCHW.shape[:2], sigma, device=self.device)
                x_t = flow.add_noise(batch.x0_BFCHW, noise, sigma_BF)
                error = (self.predict_x0(modules, batch, x_t, sigma_BF) - batch.x0_BFCHW).square()
                if kind == "story":  # later blocks only: the first one has no context
                    error = error[:, self.config.geometry.block_size(0) :]
                scores[f"{kind}_{sigma}"] = float(error.mean())
        scores["variance"] = float(batch.x0_BFCHW.var())
        return scores


def build(config: Config) -> ArObjective:
    return ArObjective(config)
