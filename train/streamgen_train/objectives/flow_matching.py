"""Flow matching on noised clips: the loss and the validation of every objective whose targets are the clips themselves.

Loss: bounded_flow_weight(sigma) |x0_hat - x0|^2, which for the flow is |v_hat - v|^2 with less weight on nearly clean
input. Subclasses say which noise levels the blocks get and what the model sees.

Letters: B clips, G blocks, F latent frames, C H W latent, L text rows.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.costs import Work, activation_bytes, trained_factor
from streamgen.transformer_config import TransformerConfig
from streamgen.visibility import Layout
from streamgen_train.clips import Kind
from streamgen_train.objective import HeaviestPass, Turn
from streamgen_train.objectives import video
from streamgen_train.objectives.video import Batch, VideoObjective
from streamgen_train.objectives.views import CLEAN, View

VALIDATION_SIGMAS = (1.0, 0.95, 0.85, 0.6)


@dataclass(kw_only=True)
class Config(video.Config):
    shifts: tuple[float, ...] = (8.0,)
    """Noise levels are uniform u warped by one of these shifts, drawn evenly: high ones train the decisions (what and
    where), low ones the drawing."""
    sigma_floor: float = 0.3


class FlowMatching(VideoObjective):
    """Learns the clean clip from a noised one."""

    config: Config

    @abstractmethod
    def predict_x0(
        self,
        modules: Mapping[str, nn.Module],
        batch: Batch,
        x_t: Tensor,
        sigma_BF: Tensor,
        ids_BGL: Tensor | None = None,
    ) -> Tensor:
        """x0 of every noisy block: [B, F, C, H, W] float32. `ids_BGL`: other prompts than the batch's own."""

    def draw_sigma(self, like_BG: Tensor) -> Tensor:
        """A noise level for each element."""
        shifts = torch.tensor(self.config.shifts, device=like_BG.device)
        shift_BG = shifts[torch.randint(len(shifts), like_BG.shape, device=like_BG.device)]
        return flow.sample_sigma(torch.rand_like(like_BG), shift_BG)

    def levels(self, batch: Batch) -> Tensor:
        """The noise level of each block [B, G] in training; every block has its own unless a subclass says else."""
        return self.draw_sigma(batch.scored_BG)

    def loss(self, batch: Batch, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch.x0_BFCHW
        sigma_BF = self.per_frame(self.levels(batch))
        x_t = flow.add_noise(x0, torch.randn_like(x0), sigma_BF)
        error_BF = (self.predict_x0(self.modules(), batch, x_t, sigma_BF) - x0).square().mean((2, 3, 4))
        weight_BF = flow.bounded_flow_weight(sigma_BF, self.config.sigma_floor) * self.per_frame(batch.scored_BG)
        loss = (weight_BF * error_BF).mean()
        frames = self.config.geometry.block_size(0)
        name = batch.kind if batch.view.visibility == "clean" else batch.view.visibility
        return loss, {f"mse_{name}": error_BF.detach().mean(), "mse_first": error_BF[:, :frames].detach().mean()}

    def work(self) -> list[tuple[TransformerConfig, Work]]:
        c = self.config
        longer, factor = (1 - c.single_share) * c.clips, trained_factor(c.model, self.recomputed)
        whole = self.clip_work("clips, forward and backward", longer, c.clip_blocks, self.layout(c.clip_blocks), factor)
        single = self.clip_work("single blocks", c.single_share * c.single_clips, 1, None, factor)
        return [(c.model, work) for work in (whole, single) if work.passes]

    def layout(self, blocks: int) -> Layout | None:
        """What a clip's tokens see of each other, for the count of work; None: all of all."""
        return None

    def working_bytes(self, bytes_per_value: int) -> float:
        return self._clips_bytes(self.recomputed, bytes_per_value)

    def least_working_bytes(self, bytes_per_value: int) -> float:
        return self._clips_bytes(self.config.model.num_layers, bytes_per_value)

    def _clips_bytes(self, recomputed: int, bytes_per_value: int) -> float:
        clips, blocks = self.largest_batch()
        tokens = clips * self._most_tokens(blocks)
        return activation_bytes(
            self.config.model, tokens, recomputed_layers=recomputed, bytes_per_value=bytes_per_value
        )

    # -- the largest batch ----------------------------------------------------------------------

    def largest_batch(self) -> tuple[int, int]:
        """(clips, blocks of each) of the batch that has most tokens."""
        c = self.config
        sizes = [(c.clips, c.clip_blocks)]
        if c.data is None and (c.single_share > 0 or c.single_until > 0):
            sizes.append((c.single_clips, 1))
        return max(sizes, key=lambda size: size[0] * self._most_tokens(size[1]))

    def heaviest_view(self, blocks: int) -> View | None:
        """What noisy blocks see in those clips of several blocks that cost most; None: everything sees everything."""
        return None

    def _most_tokens(self, blocks: int) -> int:
        """Of a clip in one pass."""
        c, view = self.config, self.heaviest_view(blocks) if blocks > 1 else None
        layout = None if view is None else view.layout(blocks, c.geometry, c.window_frames, c.sink_frames)
        return self.clip_work("", 1, blocks, layout, 1.0).tokens

    def heaviest_pass(self) -> HeaviestPass:
        g, (clips, blocks) = self.config.geometry, self.largest_batch()
        x0 = torch.zeros(clips, g.block_start(blocks), g.latent_channels, g.latent_height, g.latent_width)
        x0 = x0.to(self.device)
        ids = self.text.ids([""] * clips)[:, None].expand(-1, blocks, -1).to(self.device)
        scored = torch.ones(clips, blocks, device=self.device)
        kind: Kind = "single" if blocks == 1 else "story"
        batch = Batch(x0, ids, ids, scored, kind, (self.heaviest_view(blocks) if blocks > 1 else None) or CLEAN)
        sigma_BF = torch.ones(x0.shape[:2], device=self.device)
        key = "single_clips" if (clips, blocks) != (self.config.clips, self.config.clip_blocks) else "clips"
        return HeaviestPass(
            self.model, lambda: self.predict_x0(self.modules(), batch, x0, sigma_BF), f"objective.{key}={clips}"
        )

    def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        """Error of x0 at fixed noise levels, for a block from nothing and for a clip.

        A person's own data has no held-out part, so there is nothing to validate on.
        """
        if self.source is not None:
            return {}
        rng = torch.Generator().manual_seed(3)
        scores: dict[str, float] = {}
        for kind in ("single", "story"):
            batch = self.make_batch(kind, self.config.validation_clips, rng)
            noise = torch.randn(batch.x0_BFCHW.shape, generator=rng).to(self.device)
            scores |= self.scores(modules, batch, noise)
        scores["variance"] = float(batch.x0_BFCHW.var())
        return scores

    def scores(self, modules: Mapping[str, nn.Module], batch: Batch, noise: Tensor) -> dict[str, float]:
        """Error of all frames by noise level."""
        return {
            f"{batch.kind}_{sigma}": float(self.error_at(modules, batch, noise, sigma).mean())
            for sigma in VALIDATION_SIGMAS
        }

    def error_at(self, modules: Mapping[str, nn.Module], batch: Batch, noise: Tensor, sigma: float | Tensor) -> Tensor:
        """Squared error [B, F, C, H, W] of x0 at one level, or at [B, G] levels."""
        x0 = batch.x0_BFCHW
        if isinstance(sigma, Tensor):
            sigma_BF = self.per_frame(sigma)
        else:
            sigma_BF = torch.full(x0.shape[:2], sigma, device=self.device)
        x_t = flow.add_noise(x0, noise, sigma_BF)
        return (self.predict_x0(modules, batch, x_t, sigma_BF) - x0).square()
