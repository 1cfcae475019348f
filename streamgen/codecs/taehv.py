"""Small video codecs of the TAEHV family: a preview of Wan's latents at a hundredth of the cost of its own decoder.

A sequence of 2-D convolutions; time passes through blocks that also see the frame before (`Memory`), layers that join
two frames (`Join`) and layers that make two of one (`Split`). What the memories last saw is the stream's state. The
layers stand at the places of the published files (`taew2_1`, `taew2_2`), which load as they are; latents are the
diffusion model's own, without mean or deviation.
Letters: B batch, T time steps (pixel frames outside), F latent frames, C channels, H W grid, N = B T images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen.codec import CodecState
from streamgen.errors import UserError
from streamgen.weights import load_weights

GROWS = (7, 13, 19)
"""Places of the decoder's layers that may make two time steps of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaehvConfig:
    """Sizes; the defaults are `taew2_1`'s."""

    latent_channels: int = 16
    patch_size: int = 1
    """Pixels along the side of a square that goes into channels: 2 for Wan 2.2."""
    encoder_dim: int = 64
    decoder_dims: tuple[int, int, int, int] = (256, 128, 64, 64)

    def __post_init__(self) -> None:
        object.__setattr__(self, "decoder_dims", tuple(self.decoder_dims))  # JSON has lists only
        for name in ("latent_channels", "patch_size", "encoder_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if len(self.decoder_dims) != 4 or min(self.decoder_dims) < 1:
            raise ValueError(f"decoder_dims={self.decoder_dims}: must be four widths of at least 1")


class SoftClamp(nn.Module):
    """Latents to (-3, 3), smoothly."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class Memory(nn.Module):
    """Residual block on a frame and the one before it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * dim, dim), nn.ReLU(), _conv(dim, dim), nn.ReLU(), _conv(dim, dim)
        )  # the skip of equal widths and the last activation have no weights

    def forward(self, x_NCHW: Tensor, before_NCHW: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x_NCHW, before_NCHW], 1)) + x_NCHW)


class Join(nn.Module):
    """Each `count` time steps into one."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv = nn.Conv2d(count * dim, dim, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(x_NCHW.unflatten(0, (-1, self.count)).flatten(1, 2))


class Split(nn.Module):
    """Each time step into `count`."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.conv = nn.Conv2d(dim, count * dim, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(x_NCHW).unflatten(1, (self.count, -1)).flatten(0, 1)


class TaehvCodec(nn.Module):
    """Video [-1, 1] <-> the latents of Wan's models, roughly and fast. The network itself works in [0, 1]."""

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        self.spatial_stride, self.temporal_stride = 8 * config.patch_size, 4
        self.first_latent_frames, self.latent_channels = 1, config.latent_channels
        pixels, e, (a, b, c, d) = 3 * config.patch_size**2, config.encoder_dim, config.decoder_dims
        self.encoder = nn.Sequential(_conv(pixels, e), nn.ReLU())
        for count in (2, 2, 1):
            self.encoder.extend([Join(e, count), _conv(e, e, stride=2, bias=False), *(Memory(e) for _ in range(3))])
        self.encoder.append(_conv(e, config.latent_channels))
        self.decoder = nn.Sequential(SoftClamp(), _conv(config.latent_channels, a), nn.ReLU())
        for dim, wider, count in ((a, b, 1), (b, c, 2), (c, d, 2)):
            grow = [nn.Upsample(scale_factor=2), Split(dim, count), _conv(dim, wider, bias=False)]
            self.decoder.extend([*(Memory(dim) for _ in range(3)), *grow])
        self.decoder.extend([nn.ReLU(), _conv(d, pixels)])

    def decode_stream(self, latents_BFCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Decode the next latents of a stream; `state` is None at its start. Returns video [B, T, 3, h, w]."""
        x = self._input(latents_BFCHW)
        start, state = state is None, dict(state or {})
        frames = [_run(self.decoder, latent, state) for latent in x.split(1, 1)]
        if start:  # the first latent is one frame: the three before it were never there
            frames[0] = frames[0][:, self.temporal_stride - 1 :]
        video = torch.cat(frames, 1)
        if self.config.patch_size > 1:
            video = F.pixel_shuffle(video, self.config.patch_size)
        return video.clamp(0, 1) * 2 - 1, state

    def encode_stream(self, video_BTCHW: Tensor, state: CodecState | None) -> tuple[Tensor, CodecState]:
        """Encode the next frames of a stream, any number -> the latents that are ready [B, F, C, H, W], F may be 0.

        A latent is ready with its fourth frame: this encoder looks three frames ahead of Wan's own, so after 1 + 4 n
        frames there are n latents, and the last comes with the next three frames. `encode` repeats the last frame.
        """
        state = dict(state or {})
        x = self._input(video_BTCHW)
        x = torch.cat([state.pop("waiting"), x], 1) if "waiting" in state else x
        ready = x.shape[1] - x.shape[1] % self.temporal_stride
        state["waiting"] = x[:, ready:].clone()
        b, _, _, h, w = x.shape
        latents = [x.new_empty(b, 0, self.latent_channels, h // self.spatial_stride, w // self.spatial_stride)]
        for frames in x[:, :ready].split(self.temporal_stride, 1) if ready else ():
            frames = F.pixel_unshuffle(frames * 0.5 + 0.5, self.config.patch_size)
            latents.append(_run(self.encoder, frames, state))
        return torch.cat(latents, 1).float(), state

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Encode a whole video: [B, T, 3, h, w] in [-1, 1] -> latents [B, F, C, H, W]; its end is padded to fours."""
        missing = -video_BTCHW.shape[1] % self.temporal_stride
        padding = video_BTCHW[:, -1:].expand(-1, missing, -1, -1, -1)
        return self.encode_stream(torch.cat([video_BTCHW, padding], 1), None)[0]

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Decode a whole video: latents [B, F, C, H, W] -> [B, T, 3, h, w] in [-1, 1]."""
        return self.decode_stream(latents_BFCHW, None)[0]

    def _input(self, x: Tensor) -> Tensor:
        weight = next(self.parameters())
        return x.to(weight.device, weight.dtype)


def _run(layers: nn.Sequential, x_BTCHW: Tensor, state: CodecState) -> Tensor:
    """The layers over the next time steps; `state` gets what each memory saw last."""
    B = x_BTCHW.shape[0]
    x = x_BTCHW.flatten(0, 1)
    for index, layer in enumerate(layers):
        if isinstance(layer, Memory):
            now = x.unflatten(0, (B, -1))
            before = state.get(f"memory{index}", torch.zeros_like(now[:, :1]))
            state[f"memory{index}"] = now[:, -1:].clone()
            x = layer(x, torch.cat([before, now[:, :-1]], 1).flatten(0, 1))
        else:
            x = layer(x)
    return x.unflatten(0, (B, -1))


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


# Files.


def taehv_config(shapes: Mapping[str, tuple[int, ...]], where: str) -> TaehvConfig:
    """The sizes of a checkpoint, from the shapes of its tensors."""
    names = ("encoder.0.weight", "decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
    missing = [name for name in names if name not in shapes]
    if missing:
        raise UserError(f"{where} is no TAEHV checkpoint: it has no {', '.join(missing)}")
    encoder_dim, pixels = shapes["encoder.0.weight"][:2]
    patch = round((pixels / 3) ** 0.5)
    if 3 * patch**2 != pixels:
        raise UserError(f"{where}: encoder.0.weight takes {pixels} channels; must be 3 times a square")
    first, *rest = (shapes[name] for name in names[1:])
    dims = (first[0], *(shape[0] for shape in rest))
    assert len(dims) == 4
    return TaehvConfig(latent_channels=first[1], patch_size=patch, encoder_dim=encoder_dim, decoder_dims=dims)


def taehv_codec(
    tensors: Mapping[str, Tensor],
    where: str,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> TaehvCodec:
    """The codec of a checkpoint's tensors. Files whose decoder could make more frames are cut to their last ones."""
    config = taehv_config({name: tuple(tensor.shape) for name, tensor in tensors.items()}, where)
    codec = TaehvCodec(config)
    cut = dict(tensors)
    for index in GROWS:
        name = f"decoder.{index}.conv.weight"
        wanted = codec.get_parameter(name).shape[0]
        if name in cut and cut[name].shape[0] > wanted:
            cut[name] = cut[name][-wanted:]
    load_weights(codec, cut, where=where, dtype=dtype, device=device)
    return codec.eval().requires_grad_(False)


def load_taehv(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trust_pickle: bool = False,
) -> TaehvCodec:
    """The codec of a published file (.pth or .safetensors), told by its tensors and not by its name."""
    from streamgen.checkpoints.detect import open_checkpoint  # which imports this package

    network = open_checkpoint(Path(path), trust_pickle=trust_pickle).choose()[1]
    return taehv_codec(network.tensors, str(path), dtype=dtype, device=device)
