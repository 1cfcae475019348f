"""A small causal streaming video codec: 8x in space, 4x in time, one latent frame for every four frames.

Both directions add a learned residual to a linear map (initialised with principal components), so that
training starts from a codec that works. Time is causal: a latent frame sees its own four frames and the four
before them; a decoded frame sees its own latent and the one before. That one previous frame is the whole
state, so streaming equals coding a whole video at once, to the bit for equal chunk shapes.

Letters: B batch, T pixel frames, F latent frames, C latent channels, H W latent grid, D features,
P values of one patch (temporal_stride * 3 * patch * patch).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.weights import build_config, load_component, load_weights

CodecState = dict[str, Tensor]


class StreamingCodec(Protocol):
    """What the rollout and the pipeline ask of a codec."""

    spatial_stride: int
    temporal_stride: int
    first_latent_frames: int
    latent_channels: int

    def encode(self, video_BTCHW: Tensor) -> Tensor: ...

    def decode(self, latents_BFCHW: Tensor) -> Tensor: ...

    def encode_stream(self, video_BTCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]: ...

    def decode_stream(self, latents_BFCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SpritesCodecConfig:
    """Sizes of the sprites codec."""

    latent_channels: int = 16
    spatial_stride: int = 8
    temporal_stride: int = 4
    encoder_dim: int = 512
    encoder_blocks: int = 1
    decoder_dim: int = 192
    decoder_blocks: int = 3
    head_dim: int = 768

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ValueError(f"codec {name} is {value}; it must be at least 1")

    @property
    def patch_values(self) -> int:
        return self.temporal_stride * 3 * self.spatial_stride**2


def _zero(layer: nn.Linear | nn.Conv2d) -> None:
    """A residual that adds nothing until it has learned something."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.get_parameter("bias"))


class _PatchBlock(nn.Module):
    """Residual MLP on the features of one patch."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        _zero(self.down)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.down(F.gelu(self.up(h), approximate="tanh"))


class _GridBlock(nn.Module):
    """Residual 3x3 convolution and 1x1 mix over the latent grid."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.spatial, self.mix = nn.Conv2d(dim, dim, 3, padding=1), nn.Conv2d(dim, dim, 1)
        _zero(self.mix)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mix(F.gelu(self.spatial(h), approximate="tanh"))


class SpritesCodec(nn.Module):
    """Video [-1, 1] <-> normalised latents (about zero mean and unit deviation per channel)."""

    def __init__(self, config: SpritesCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_stride, self.temporal_stride = config.spatial_stride, config.temporal_stride
        self.first_latent_frames = config.temporal_stride
        self.latent_channels = config.latent_channels
        values, channels = config.patch_values, config.latent_channels
        e, d = config.encoder_dim, config.decoder_dim
        self.encode_linear = nn.Linear(values, channels)
        self.encode_in = nn.Linear(values, e)
        self.encode_before = nn.Linear(values, e, bias=False)
        self.encode_blocks = nn.ModuleList(_PatchBlock(e) for _ in range(config.encoder_blocks))
        self.encode_out = nn.Linear(e, channels)
        self.decode_linear = nn.Conv2d(channels, values, 1)
        self.decode_in = nn.Conv2d(channels, d, 3, padding=1)
        self.decode_before = nn.Conv2d(channels, d, 3, padding=1, bias=False)
        self.decode_blocks = nn.ModuleList(_GridBlock(d) for _ in range(config.decoder_blocks))
        self.decode_head = nn.Conv2d(d, config.head_dim, 1)
        self.decode_out = nn.Conv2d(config.head_dim, values, 1)
        _zero(self.encode_out)
        _zero(self.decode_out)
        self.register_buffer("latents_mean", torch.zeros(channels))
        self.register_buffer("latents_std", torch.ones(channels))
        self.latents_mean: Tensor
        self.latents_std: Tensor

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    # -- pixels <-> patches ------------------------------------------------------------------

    def patchify(self, video_BTCHW: Tensor) -> Tensor:
        """[B, T, 3, h, w] -> patches [B, F, H, W, P]; T must be a multiple of the temporal stride."""
        b, t, c, h, w = video_BTCHW.shape
        s, k = self.spatial_stride, self.temporal_stride
        if t % k or h % s or w % s or c != 3:
            raise ValueError(
                f"video is {t} frames of {c}x{h}x{w}; the codec takes multiples of {k} RGB frames "
                f"with sides that are multiples of {s}"
            )
        x = video_BTCHW.view(b, t // k, k, 3, h // s, s, w // s, s)
        return x.permute(0, 1, 4, 6, 2, 3, 5, 7).reshape(b, t // k, h // s, w // s, -1)

    def unpatchify(self, patches_NPHW: Tensor, batch: int) -> Tensor:
        """Patches [B * F, P, H, W] -> video [B, T, 3, h, w]."""
        n, _, h, w = patches_NPHW.shape
        s, k = self.spatial_stride, self.temporal_stride
        x = patches_NPHW.reshape(batch, n // batch, k, 3, s, s, h, w)
        return x.permute(0, 1, 2, 3, 6, 4, 7, 5).reshape(batch, n // batch * k, 3, h * s, w * s)

    # -- raw latents (not normalised), used by training ------------------------------------------

    def encode_patches(self, patches: Tensor, before: Tensor) -> Tensor:
        """Patches [B, F, H, W, P] and the patches one latent frame earlier -> raw latents [B, F, C, H, W]."""
        h = F.gelu(self.encode_in(patches) + self.encode_before(before), approximate="tanh")
        for block in self.encode_blocks:
            h = block(h)
        return (self.encode_linear(patches) + self.encode_out(h)).movedim(-1, 2)

    def decode_raw(self, raw_NCHW: Tensor, before_NCHW: Tensor) -> Tensor:
        """Raw latents of N frames and the ones before them -> patches [N, P, H, W]."""
        h = self.decode_in(raw_NCHW) + self.decode_before(before_NCHW)
        for block in self.decode_blocks:
            h = block(h)
        h = F.gelu(self.decode_head(h), approximate="tanh")
        return self.decode_linear(raw_NCHW) + self.decode_out(h)

    # -- the codec's door --------------------------------------------------------------------

    def encode_stream(self, video_BTCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Encode the next frames of a stream; `state` is None at its start. Returns latents [B, F, C, H, W]."""
        patches = self.patchify(video_BTCHW.to(self.latents_mean.dtype))
        first = torch.zeros_like(patches[:, :1]) if state is None else state["patches"]
        before = torch.cat([first, patches[:, :-1]], 1)
        raw = self.encode_patches(patches, before)
        mean, std = (v[:, None, None] for v in (self.latents_mean, self.latents_std))
        return (raw - mean) / std, {"patches": patches[:, -1:].clone()}

    def decode_stream(self, latents_BFCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Decode the next latents of a stream; `state` is None at its start. Returns video [B, T, 3, h, w]."""
        mean, std = (v[:, None, None] for v in (self.latents_mean, self.latents_std))
        raw = latents_BFCHW.to(mean.dtype) * std + mean
        first = torch.zeros_like(raw[:, :1]) if state is None else state["raw"]
        before = torch.cat([first, raw[:, :-1]], 1)
        patches = self.decode_raw(raw.flatten(0, 1), before.flatten(0, 1))
        return self.unpatchify(patches, raw.shape[0]).clamp(-1, 1), {"raw": raw[:, -1:].clone()}

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Encode a whole video: [B, T, 3, h, w] in [-1, 1] -> latents [B, F, C, H, W]."""
        return self.encode_stream(video_BTCHW, None)[0]

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decode a whole video: latents [B, F, C, H, W] -> [B, T, 3, h, w] in [-1, 1]."""
        return self.decode_stream(latents_BFCHW, None)[0]


@torch.no_grad()
def init_linear_from_pca(codec: SpritesCodec, video_BTCHW: Tensor) -> None:
    """Set the linear maps to the principal components of the video's patches.

    Component k is scaled by deviation^-1/2: whitening fully would turn the last ones into noise.
    """
    patches = codec.patchify(video_BTCHW).flatten(0, -2).double()
    mean = patches.mean(0)
    centred = patches - mean
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(patches))
    channels = codec.latent_channels
    deviation = values.flip(0)[:channels].clamp(min=1e-8).sqrt()
    basis = vectors.flip(1)[:, :channels]
    scale = deviation**-0.5
    codec.encode_linear.weight.copy_((basis * scale).T)
    codec.encode_linear.bias.copy_(-(mean @ (basis * scale)))
    codec.decode_linear.weight.copy_((basis / scale)[:, :, None, None])
    codec.decode_linear.get_parameter("bias").copy_(mean)


@torch.no_grad()
def fit_normalisation(codec: SpritesCodec, video_BTCHW: Tensor) -> None:
    """Centre the latents and scale channel k by (deviation_k * root mean square deviation)^-1/2.

    Half way between one scale for all, which buries the channels that carry shape, and whitening, which turns the
    last ones into noise.
    """
    codec.latents_mean.zero_()
    codec.latents_std.fill_(1.0)
    raw = codec.encode(video_BTCHW)
    deviation = raw.std((0, 1, 3, 4))
    codec.latents_mean.copy_(raw.mean((0, 1, 3, 4)))
    codec.latents_std.copy_((deviation * deviation.square().mean().sqrt()).sqrt())


def load_codec(folder: str | Path) -> SpritesCodec:
    """A sprites codec by itself in fp32, from its component folder or from a model folder that holds one."""
    path = Path(folder)
    path = path / "codec" if (path / "codec").is_dir() else path
    values, tensors = load_component(path)
    codec = SpritesCodec(build_config(SpritesCodecConfig, values, str(path)))
    load_weights(codec, tensors, where=str(path), dtype=torch.float32)
    return codec
