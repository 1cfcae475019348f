"""Wan's own video codec (2.1: 8x in space, 16 channels; 2.2: 16x, 48 channels), decoded and encoded as it streams.

The network is diffusers' (`AutoencoderKLWan`), whose causal convolutions take what they saw before from a list of
features. That list is the stream's state here, so nothing is decoded twice and a stream can be saved between blocks:
streaming equals coding the whole video at once, to the bit. Parameters have diffusers' names: its `vae/` folders load.
Without diffusers (the extra `wan`) this codec cannot be built.
Letters: B batch, T pixel frames, F latent frames, C latent channels, H W latent grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.codec import CodecState
from streamgen.codecs.tiles import Tiling
from streamgen.errors import UserError
from streamgen.weights import build_config, load_component, load_weights

MEAN_2_1 = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD_2_1 = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
REPEAT = "Rep"
"""diffusers' mark in the list of features: an upsampler that has passed its first frame and kept nothing of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WanCodecConfig:
    """diffusers' config of `AutoencoderKLWan`, with its names; the defaults are Wan 2.1's. Tiles are ours."""

    base_dim: int = 96
    decoder_base_dim: int | None = None
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    dropout: float = 0.0
    latents_mean: tuple[float, ...] = MEAN_2_1
    latents_std: tuple[float, ...] = STD_2_1
    is_residual: bool = False
    in_channels: int = 3
    out_channels: int = 3
    patch_size: int | None = None
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 8
    tile_pixels: int | None = None
    """Code in tiles of this size, every three quarters of it: the memory of one tile, a little more work."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), list):  # JSON has lists only
                object.__setattr__(self, field.name, tuple(value))
        if len(self.latents_mean) != self.z_dim or len(self.latents_std) != self.z_dim or min(self.latents_std) <= 0:
            raise ValueError(
                f"latents_mean and latents_std have {len(self.latents_mean)} and {len(self.latents_std)} values: "
                f"must be z_dim={self.z_dim}, and deviations above 0"
            )
        if self.scale_factor_temporal != 2 ** sum(self.temperal_downsample):
            raise ValueError(
                f"scale_factor_temporal={self.scale_factor_temporal}: temperal_downsample says "
                f"{2 ** sum(self.temperal_downsample)}"
            )
        tiling = self.tiling()
        if tiling is not None:
            tiling.scaled(self.scale_factor_spatial)

    def tiling(self) -> Tiling | None:
        return None if self.tile_pixels is None else Tiling(size=self.tile_pixels, step=self.tile_pixels * 3 // 4)


class WanCodec(nn.Module):
    """Video [-1, 1] <-> normalised latents, by the codec that Wan's models were trained on."""

    def __init__(self, config: WanCodecConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_stride, self.temporal_stride = config.scale_factor_spatial, config.scale_factor_temporal
        self.first_latent_frames, self.latent_channels = 1, config.z_dim
        self.tiling = config.tiling()
        autoencoder = _autoencoder(config)
        self.encoder, self.decoder = autoencoder.encoder, autoencoder.decoder
        self.quant_conv, self.post_quant_conv = autoencoder.quant_conv, autoencoder.post_quant_conv
        causal = type(autoencoder.quant_conv)
        self._slots = {
            side: sum(isinstance(module, causal) for module in getattr(self, side).modules())
            for side in ("encoder", "decoder")
        }

    def decode_stream(self, latents_BFCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Decode the next latents of a stream; `state` is None at its start. Returns video [B, T, 3, h, w]."""
        weight = self.post_quant_conv.weight
        mean, std = self._statistics(latents_BFCHW)
        z_BCFHW = (latents_BFCHW.float() * std + mean).to(weight.device, weight.dtype).transpose(1, 2)

        def decode(tile_BCFHW: Tensor, features: list[Any], start: bool) -> Tensor:
            frames = []
            for index, one in enumerate(tile_BCFHW.split(1, dim=2)):
                first = start and index == 0
                frames.append(self.decoder(self.post_quant_conv(one.contiguous()), features, [0], first_chunk=first))
            return torch.cat(frames, 2)

        patch = self.config.patch_size or 1
        tiling = self.tiling
        inside = None if tiling is None else tiling.scaled(self.spatial_stride)
        outside = None if tiling is None else tiling.scaled(patch)
        video, state = self._tiled(decode, "decoder", z_BCFHW, state, inside, outside)
        return _unpatchify(video, patch).clamp(-1, 1).transpose(1, 2), state

    def encode_stream(self, video_BTCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Encode the next frames of a stream: first 1 + 4 n, then 4 n. Returns latents [B, F, C, H, W] (the means)."""
        _, T, channels, h, w = video_BTCHW.shape
        s, k = self.spatial_stride, self.temporal_stride
        if (T - 1 if state is None else T) % k or T < 1 or channels != 3 or h % s or w % s:
            count = f"1 + a multiple of {k}" if state is None else f"a multiple of {k}"
            raise ValueError(
                f"video is {T} frames of {channels}x{h}x{w}; the codec takes {count} RGB frames here, with sides that "
                f"are multiples of {s}"
            )
        weight = self.quant_conv.weight
        patch = self.config.patch_size or 1
        x_BCTHW = _patchify(video_BTCHW.to(weight.device, weight.dtype).transpose(1, 2), patch)

        def encode(tile_BCTHW: Tensor, features: list[Any], start: bool) -> Tensor:
            first, rest = (1, T - 1) if start else (0, T)
            sizes = [1] * first + [k] * (rest // k)
            # One latent at a time also through the last convolution: over more it may sum in another order.
            return torch.cat(
                [self.quant_conv(self.encoder(chunk, features, [0])) for chunk in tile_BCTHW.split(sizes, dim=2)], 2
            )

        tiling = self.tiling
        inside = None if tiling is None else tiling.scaled(patch)
        outside = None if tiling is None else tiling.scaled(s)
        moments, state = self._tiled(encode, "encoder", x_BCTHW, state, inside, outside)
        mu_BFCHW = moments.transpose(1, 2)[:, :, : self.latent_channels].float()
        mean, std = self._statistics(mu_BFCHW)
        return (mu_BFCHW - mean) / std, state

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Encode a whole video of 1 + 4 n frames: [B, T, 3, h, w] in [-1, 1] -> latents [B, F, C, H, W]."""
        return self.encode_stream(video_BTCHW, None)[0]

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decode a whole video: latents [B, F, C, H, W] -> [B, T, 3, h, w] in [-1, 1]."""
        return self.decode_stream(latents_BFCHW, None)[0]

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of every latent channel, each [C, 1, 1]."""
        values = torch.tensor((self.config.latents_mean, self.config.latents_std), device=like.device)
        mean, std = values[:, :, None, None]
        return mean, std

    def _tiled(
        self,
        code: Callable[[Tensor, list[Any], bool], Tensor],
        side: str,
        x: Tensor,
        state: CodecState | None,
        inside: Tiling | None,
        outside: Tiling | None,
    ) -> tuple[Tensor, CodecState]:
        """Run one side over the tiles of x (one tile without tiling), each with its own features."""
        whole = [slice(None)]
        rows = whole if inside is None else inside.spans(x.shape[-2])
        columns = whole if inside is None else inside.spans(x.shape[-1])
        tiles = {f"{i}.{j}" for i in range(len(rows)) for j in range(len(columns))}
        if state is not None and {name.rpartition(".")[0] for name in state} != tiles:
            raise ValueError("the codec's state belongs to another size of video or of tiles")
        after: CodecState = {}
        made: list[list[Tensor]] = []
        for i, row in enumerate(rows):
            made.append([])
            for j, column in enumerate(columns):
                features = _features(state, f"{i}.{j}", self._slots[side])
                made[-1].append(code(x[..., row, column], features, state is None))
                after |= _saved(features, f"{i}.{j}")
        return made[0][0] if outside is None else outside.join(made), after


def _features(state: CodecState | None, tile: str, slots: int) -> list[Any]:
    """diffusers' list for a tile: what each convolution kept, its mark, or None."""
    features: list[Any] = [None] * slots
    for slot in range(slots if state is not None else 0):
        kept = (state or {}).get(f"{tile}.{slot}")
        features[slot] = kept if kept is None or kept.numel() else REPEAT
    return features


def _saved(features: list[Any], tile: str) -> CodecState:
    """The list as tensors; the mark is a tensor without elements."""
    return {
        f"{tile}.{slot}": torch.empty(0) if isinstance(kept, str) else kept
        for slot, kept in enumerate(features)
        if kept is not None
    }


def _patchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    """Squares of patch x patch pixels into channels (channel slowest, then column, row), as Wan 2.2 packs them."""
    if patch == 1:
        return x_BCTHW
    x = x_BCTHW.unflatten(4, (-1, patch)).unflatten(3, (-1, patch))  # B C T H p W q
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unpatchify(x_BCTHW: Tensor, patch: int) -> Tensor:
    if patch == 1:
        return x_BCTHW
    x = x_BCTHW.unflatten(1, (-1, patch, patch))  # B C q p T H W
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5).flatten(3, 4)


def _autoencoder(config: WanCodecConfig) -> Any:
    """diffusers' module, which is imported here and nowhere else."""
    try:
        from diffusers import AutoencoderKLWan
    except (ImportError, RuntimeError) as error:  # diffusers wraps what its own imports raise
        reason = str(error).splitlines()[0]
        raise UserError(
            f"Wan's codec needs diffusers, which does not load here ({reason}): pip install 'streamgen[wan]'"
        ) from error
    values = {name: value for name, value in asdict(config).items() if name != "tile_pixels"}
    return AutoencoderKLWan(**{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()})


def load_wan_codec(
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    tile_pixels: int | None = None,
) -> WanCodec:
    """A codec by itself, from a folder as diffusers saves it (`vae/`) or from a model folder that holds one."""
    path = Path(folder)
    path = next((path / name for name in ("codec", "vae") if (path / name).is_dir()), path)
    values, tensors = load_component(path)
    config = build_config(WanCodecConfig, values | ({"tile_pixels": tile_pixels} if tile_pixels else {}), str(path))
    codec = WanCodec(config)
    load_weights(codec, tensors, where=str(path), dtype=dtype, device=device)
    return codec.eval().requires_grad_(False)
