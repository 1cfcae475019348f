"""Reconstruction of sprites video by the streaming codec: squared error, with a little noise on the latents.

The noise makes the decoder forgive small errors of the diffusion model. Most of a frame is still background, so
crops are taken where the edges are; whole frames are used for validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.codec import SpritesCodec, SpritesCodecConfig, fit_normalisation, init_linear_from_pca, load_codec
from streamgen.errors import UserError
from streamgen.sheets import contact_sheet
from streamgen.weights import save_component
from streamgen.worlds import sprites
from streamgen_train.data import pick_captions
from streamgen_train.objective import Objective, Turn


@dataclass(kw_only=True)
class Config:
    codec: SpritesCodecConfig = field(default_factory=SpritesCodecConfig)
    clips: int = 64
    clip_frames: int = 8
    crop: int = 32
    """Side in pixels of the training crops; a multiple of the codec's spatial stride."""
    crop_candidates: int = 4
    """Crops drawn per clip, of which the one with the most edges is used."""
    latent_noise: float = 0.05
    """Deviation of the noise added to raw latents."""
    edge_weight: float = 0.0
    """Error next to an edge of the target counts up to 1 + edge_weight times: shapes are read from edges."""
    train_encoder: bool = True
    """False: only the decoder learns (the latents that a diffusion model was trained on stay as they are)."""
    init_from: str | None = None
    """Codec folder (exported) to take weights and normalisation from."""
    pca_clips: int = 600
    validation_clips: int = 128
    side: int = 64
    fps: float = 16.0


class CodecObjective(Objective):
    """Trains a SpritesCodec on clips of the sprites world."""

    def __init__(self, config: Config) -> None:
        if not config.train_encoder and config.init_from is None:
            raise UserError("objective.train_encoder=false needs objective.init_from=CODEC_FOLDER, the codec to keep")
        self.config = config
        self.clips_per_batch = config.clips
        self.codec = SpritesCodec(config.codec)
        if not config.train_encoder:
            for name, parameter in self.codec.named_parameters():
                parameter.requires_grad_(not name.startswith("encode_"))
        self._ready = False

    def modules(self) -> dict[str, nn.Module]:
        return {"codec": self.codec}

    def prepare(self, device: torch.device, dtype: torch.dtype) -> None:
        if not self._ready:
            if self.config.init_from is not None:
                self.codec.load_state_dict(load_codec(self.config.init_from).state_dict())
            else:
                rng = torch.Generator().manual_seed(0)
                init_linear_from_pca(self.codec, self._video(self.config.pca_clips, self.config.clip_frames, rng))
            self._ready = True
        super().prepare(device, dtype)
        for parameter in self.codec.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)

    def _video(self, clips: int, frames: int, rng: torch.Generator, split: str = "train") -> Tensor:
        scenes = sprites.sample_scenes(pick_captions(clips, rng, split), rng)
        return sprites.render(scenes, frames, fps=self.config.fps, side=self.config.side)

    def batch(self, turn: Turn) -> Tensor:
        video = self._video(self.config.clips, self.config.clip_frames, turn.rng)
        return self._crop(video, turn.rng).to(self.device, self.dtype)

    def _crop(self, video: Tensor, rng: torch.Generator) -> Tensor:
        """The crop with the most edges of a few random ones, aligned to the latent grid."""
        c, stride = self.config, self.config.codec.spatial_stride
        if c.crop == c.side:
            return video
        edges = (video[:, -1].diff(dim=-1)[..., :-1, :].abs() + video[:, -1].diff(dim=-2)[..., :-1].abs()).sum(1)
        energy = F.avg_pool2d(F.pad(edges, (0, 1, 0, 1)), c.crop, stride).flatten(1)
        columns = (c.side - c.crop) // stride + 1
        drawn = torch.randint(energy.shape[1], (len(video), c.crop_candidates), generator=rng)
        best = drawn.gather(1, energy.gather(1, drawn).argmax(1, keepdim=True))[:, 0]
        corners = zip((best // columns * stride).tolist(), (best % columns * stride).tolist(), strict=True)
        return torch.stack([v[..., y : y + c.crop, x : x + c.crop] for v, (y, x) in zip(video, corners, strict=True)])

    def loss(self, batch: Tensor, turn: Turn, ema: Mapping[str, nn.Module] | None) -> tuple[Tensor, dict[str, Tensor]]:
        patches = self.codec.patchify(batch)
        raw = self.codec.encode_patches(patches, _shifted(patches))
        noisy = raw + self.config.latent_noise * torch.randn_like(raw)
        out = self.codec.decode_raw(noisy.flatten(0, 1), _shifted(noisy).flatten(0, 1))
        error = (self.codec.unpatchify(out, len(batch)) - batch).float().square()
        loss = (
            error.mean() if self.config.edge_weight == 0 else _edge_mean(error, batch.float(), self.config.edge_weight)
        )
        return loss * 10, {"psnr_db": psnr_db(error.detach().mean())}

    def validate(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, float]:
        video = self._video(self.config.validation_clips, 16, torch.Generator().manual_seed(1), "heldout")
        video = video.to(self.device)
        out = _decoded(modules["codec"], video)
        return {"psnr_db": float(psnr_db((out - video).square().mean()))}

    def sample(self, step: int, modules: Mapping[str, nn.Module]) -> dict[str, np.ndarray]:
        rng = torch.Generator().manual_seed(2)
        items = pick_captions(6, rng, "heldout")
        video = sprites.render(sprites.sample_scenes(items, rng), 16, fps=self.config.fps, side=self.config.side)
        both = torch.cat([video, _decoded(modules["codec"], video.to(self.device)).cpu()], -1)
        clips = [c.numpy() for c in sprites.to_uint8(both)]
        return {"reconstruction": contact_sheet(clips, [c.text for c in items], frames=4, scale=2)}

    def export(self, modules: Mapping[str, nn.Module], folder: Path) -> None:
        codec = modules["codec"]
        assert isinstance(codec, SpritesCodec)
        if self.config.train_encoder:
            fit_normalisation(codec, self._video(300, 12, torch.Generator().manual_seed(5)))
        else:  # exactly the latents, and their scale, that a diffusion model was trained on
            assert self.config.init_from is not None
            before = load_codec(self.config.init_from).state_dict()
            kept = {name: tensor for name, tensor in before.items() if not name.startswith("decode_")}
            codec.load_state_dict({**codec.state_dict(), **kept})
        save_component(folder, {"_class_name": "SpritesCodec", **asdict(codec.config)}, codec.half().state_dict())


def _edge_mean(error_BTCHW: Tensor, video_BTCHW: Tensor, edge_weight: float) -> Tensor:
    """Mean error with more weight within a pixel of an edge; an edge of full weight is one of contrast 1 (of 2)."""
    if edge_weight == 0:
        return error_BTCHW.mean()
    across = F.pad(video_BTCHW.diff(dim=-1).abs().amax(2), (0, 1))
    down = F.pad(video_BTCHW.diff(dim=-2).abs().amax(2), (0, 0, 0, 1))
    edge_BTHW = F.max_pool2d(torch.maximum(across, down).clamp(max=1.0), 3, 1, 1)
    weight = 1 + edge_weight * edge_BTHW[:, :, None]
    return (error_BTCHW * weight).mean() / weight.mean()


def _shifted(x: Tensor) -> Tensor:
    """The same, one latent frame later, zeros first: what the stream's state holds."""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def _decoded(codec: nn.Module, video: Tensor) -> Tensor:
    assert isinstance(codec, SpritesCodec)
    dtype = codec.encode_linear.weight.dtype
    patches = codec.patchify(video.to(dtype))
    raw = codec.encode_patches(patches, _shifted(patches))
    out = codec.decode_raw(raw.flatten(0, 1), _shifted(raw).flatten(0, 1))
    return codec.unpatchify(out, len(video)).clamp(-1, 1).float()


def psnr_db(mean_squared_error: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of video in [-1, 1] (peak to peak 2), in dB."""
    return -10 * torch.log10(mean_squared_error / 4)


def build(config: Config) -> CodecObjective:
    return CodecObjective(config)
