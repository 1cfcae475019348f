"""Autoregressive flow matching with teacher forcing (CausVid, arXiv 2412.07772; Causal Forcing's first stage).

The clean and the noisy copy of a clip go through the transformer as one sequence under one mask: clean block b sees
clean blocks up to b, noisy block b sees clean blocks before b and itself. Each block has its own noise level and its
own prompt. Loss: bounded_flow_weight(sigma) |x0_hat - x0|^2, which for the flow is |v_hat - v|^2 with less weight
on nearly clean input.

Letters: B clips, G blocks, F latent frames, C H W latent, L D text rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from streamgen import flow
from streamgen.attention import teacher_forcing_mask
from streamgen.codec import SpritesCodec, load_codec
from streamgen.geometry import VideoGeometry
from streamgen.pipeline import SchedulerConfig
from streamgen.rope import rope_table
from streamgen.text import SpritesTextConfig, SpritesTextEncoder
from streamgen.transformer import CausalWanModel, TransformerConfig
from streamgen.worlds import sprites
from streamgen_train.checkpoint import load_into
from streamgen_train.clips import Clips, Kind, make_clips
from streamgen_train.objective import Objective
from streamgen_train.pictures import pipeline_of, sample_sheet

VALIDATION_SIGMAS = (1.0, 0.95, 0.85, 0.6)


@dataclass(kw_only=True)
class Config:
    model: TransformerConfig
    codec_from: str
    """Codec folder (config.json and weights), or a model folder that has one."""
    text: SpritesTextConfig = field(default_factory=SpritesTextConfig)
    geometry: VideoGeometry
    window_frames: int = 12
    sink_frames: int = 3
    clip_blocks: int = 4
    clips: int = 12
    """Clips of clip_blocks blocks in a batch."""
    single_clips: int = 48
    """Clips of one block in a batch of the 'single' kind."""
    single_share: float = 0.3
    """Share of 'single' batches ..."""
    single_until: int = 0
    """... and the first steps are all of that kind."""
    gap_share: float = 0.3
    """Share of 'gap' batches among the others."""
    switch_share: float = 0.5
    recache_share: float = 0.5
    """Share of clips whose past is shown under the last prompt, as after a re-cache."""
    shifts: tuple[float, ...] = (8.0,)
    """Noise levels are uniform u warped by one of these shifts, drawn evenly: high ones train the decisions (what and
    where), low ones the drawing."""
    sigma_floor: float = 0.3
    text_drop: float = 0.1
    word_drop: float = 0.1
    """Share of clips of which each word is left out with probability 0.3."""
    attention_backend: str = "sdpa"
    init_from: str | None = None
    """Run folder or checkpoint to take the weights from."""
    validation_clips: int = 32
    sample_steps: int = 16
    sample_shift: float = 5.0


@dataclass(slots=True)
class Batch:
    """What a loss needs, on the device. Clean and noisy halves may be shown different prompts."""

    x0_BFCHW: Tensor
    ids_BGL: Tensor
    clean_ids_BGL: Tensor
    scored_BG: Tensor
    kind: Kind


class ArObjective(Objective):
    """Trains transformer and text encoder against a frozen codec."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.clips_per_batch = config.clips
        self.model = CausalWanModel(config.model, attention_backend=config.attention_backend)
        self.text = SpritesTextEncoder(config.text)
        self.codec: SpritesCodec | None = None
        self._paint: sprites.Painter | None = None
        self._tables: dict[int, tuple[tuple[Tensor, Tensor], Tensor]] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"transformer": self.model, "text": self.text}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if self.codec is None:
            self.codec = load_codec(self.config.codec_from)
            self.codec.requires_grad_(False)
            if self.config.init_from is not None:
                load_into(Path(self.config.init_from), self.modules())
        super().prepare(device, dtype)
        self.codec.to(device, dtype)
        self._tables.clear()

    def compile(self, modules: Mapping[str, nn.Module]) -> None:
        modules["transformer"].compile(dynamic=False)
        self._paint = torch.compile(sprites.paint_frames, dynamic=False)

    # -- data ---------------------------------------------------------------------------------

    def batch(self, step: int, rng: torch.Generator) -> Batch:
        c = self.config
        draw = torch.rand(3, generator=rng).tolist()
        if step < c.single_until or draw[0] < c.single_share:
            return self.make_batch("single", c.single_clips, rng)
        return self.make_batch("gap" if draw[1] < c.gap_share else "story", c.clips, rng)

    @torch.no_grad()
    def make_batch(self, kind: Kind, count: int, rng: torch.Generator) -> Batch:
        """Render, encode and tokenise clips of one kind."""
        c = self.config
        clips = make_clips(kind, count, c.clip_blocks, c.geometry, rng, c.switch_share, self._paint)
        ids = torch.stack([self.text.ids([caption.text for caption in row]) for row in clips.captions])
        ids = drop_words(ids, c.text_drop, c.word_drop, rng)
        scored = torch.ones(ids.shape[:2])
        if kind == "gap":
            scored[:, 1] = 0  # what stands between it and the sink was never seen
        return Batch(
            self.encode(clips).to(self.device),
            ids.to(self.device),
            recached(ids, c.recache_share, rng).to(self.device),
            scored.to(self.device),
            kind,
        )

    def encode(self, clips: Clips) -> Tensor:
        """Latents of clips, float32 [B, F, C, H, W]; every piece starts the codec anew."""
        assert self.codec is not None
        video = clips.video.to(self.device, self.dtype)
        if clips.kind != "gap":
            return self.codec.encode(video).float()
        first = self.config.geometry.block_pixel_frames(0)
        later = self.codec.encode(video[:, first:])[:, clips.lead_frames // self.config.geometry.temporal_stride :]
        return torch.cat([self.codec.encode(video[:, :first]), later], 1).float()

    # -- the model ------------------------------------------------------------------------------

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

    def per_frame(self, values_BG: Tensor) -> Tensor:
        """[B, G] -> [B, F]."""
        sizes = [self.config.geometry.block_size(b) for b in range(values_BG.shape[1])]
        return values_BG.repeat_interleave(torch.tensor(sizes, device=values_BG.device), 1)

    def loss(self, batch: Batch, step: int, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        x0 = batch.x0_BFCHW
        sigma_BG = self.draw_sigma(batch.scored_BG)
        sigma_BF = self.per_frame(sigma_BG)
        x_t = flow.add_noise(x0, torch.randn_like(x0), sigma_BF)
        error_BF = (self.predict_x0(self.modules(), batch, x_t, sigma_BF) - x0).square().mean((2, 3, 4))
        weight_BF = flow.bounded_flow_weight(sigma_BF, self.config.sigma_floor) * self.per_frame(batch.scored_BG)
        loss = (weight_BF * error_BF).mean()
        frames = self.config.geometry.block_size(0)
        return loss, {f"mse_{batch.kind}": error_BF.detach().mean(), "mse_first": error_BF[:, :frames].detach().mean()}

    # -- what a person looks at ---------------------------------------------------------------------

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

    def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        assert self.codec is not None
        pipe = pipeline_of(modules, self.codec, self.config.geometry, self.scheduler())
        return {"samples": sample_sheet(pipe, steps=self.config.sample_steps)}

    def export(self, modules: Mapping[str, nn.Module], folder: Path) -> None:
        codec = load_codec(self.config.codec_from)
        half = {name: module.half() for name, module in modules.items()}
        pipeline_of(half, codec.half(), self.config.geometry, self.scheduler()).save_pretrained(folder)

    def scheduler(self) -> SchedulerConfig:
        """How the model in training is to be streamed."""
        return self.card_scheduler((self.config.sample_steps,), "euler")

    def card_scheduler(self, trained_steps: tuple[int, ...], sampler: str) -> SchedulerConfig:
        c = self.config
        return SchedulerConfig(
            trained_steps=trained_steps,
            window_frames=c.window_frames,
            sink_frames=c.sink_frames,
            shift=c.sample_shift,
            prediction=c.model.prediction,
            sampler=sampler,
        )


def drop_words(ids_BGL: Tensor, text_share: float, word_share: float, rng: torch.Generator) -> Tensor:
    """Leave the whole prompt out of some clips (for guidance), and single words out of others (for looser prompts)."""
    clips, words = ids_BGL.shape[0], ids_BGL.shape[2]
    draw = torch.rand(clips, generator=rng)
    gone = torch.rand(clips, 1, words, generator=rng) < 0.3
    gone &= ((draw >= text_share) & (draw < text_share + word_share))[:, None, None]
    gone |= (draw < text_share)[:, None, None]
    return ids_BGL.masked_fill(gone, -1)


def recached(ids_BGL: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """Prompts of the clean half: in a share of the clips the past is shown under the last prompt, as after a re-cache.

    The first block is the sink and keeps its own prompt. Blocks before a switch then see the prompt to come in their
    context; they are asked for the old one by their own text, and learn to heed that.
    """
    after = torch.cat([ids_BGL[:, :1], ids_BGL[:, -1:].expand(-1, ids_BGL.shape[1] - 1, -1)], 1)
    chosen = torch.rand(len(ids_BGL), generator=rng) < share
    return torch.where(chosen[:, None, None], after, ids_BGL)


def build(config: Config) -> ArObjective:
    return ArObjective(config)
