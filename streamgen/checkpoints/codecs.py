"""The codec of a checkpoint: Wan's VAE, from diffusers' folders or Wan's release, or a small decoder (TAEHV)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch

from streamgen.checkpoints.detect import SMALL, VAE, Network, open_checkpoint
from streamgen.checkpoints.tensors import LazyTensors, in_memory
from streamgen.checkpoints.vae_names import vae_to_diffusers
from streamgen.codecs.taehv import TaehvCodec, load_taehv
from streamgen.codecs.wan import WanCodec, WanCodecConfig
from streamgen.errors import UserError
from streamgen.geometry import VideoGeometry
from streamgen.weights import CONFIG_FILE, build_config, load_weights, read_json, user_errors, write_component

MEAN_2_2 = (
    *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891),
    *(0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
    *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723),
    *(-0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
STD_2_2 = (
    *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901),
    *(0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
    *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944),
    *(0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


def open_codec(path: Path, *, trust_pickle: bool = False) -> tuple[WanCodecConfig, LazyTensors]:
    """(config, tensors by diffusers' names) of a VAE's file. UserError for a file of something else."""
    network = open_checkpoint(path, trust_pickle=trust_pickle).choose()[1]
    if network.kind != VAE:
        raise UserError(f"{path} holds a {network.kind}, no VAE")
    if network.layout == "diffusers":
        return _config_beside(path), network.tensors
    entries = {vae_to_diffusers(name) or name: entry for name, entry in network.tensors.entries.items()}
    tensors = LazyTensors(entries)
    return _config_of(network, str(path)), tensors


def _config_beside(path: Path) -> WanCodecConfig:
    file = path.parent / CONFIG_FILE
    known = {field.name for field in fields(WanCodecConfig)}
    values = {name: value for name, value in read_json(file).items() if name in known}
    return build_config(WanCodecConfig, values, str(file))


def _config_of(network: Network, where: str) -> WanCodecConfig:
    """A release's config from its structure: 2.1 or 2.2, and widths from shapes."""
    shapes: Mapping[str, tuple[int, ...]] = network.tensors.shapes
    missing = [name for name in ("encoder.conv1.weight", "decoder.conv1.weight") if name not in shapes]
    if missing:
        raise UserError(f"{where}: no Wan VAE without {' and '.join(missing)}")
    width, channels = shapes["encoder.conv1.weight"][:2]
    inner, latent = shapes["decoder.conv1.weight"][:2]
    values: dict[str, Any] = {"base_dim": width, "z_dim": latent, "in_channels": channels, "out_channels": channels}
    if any(name.startswith("decoder.upsamples.0.upsamples.") for name in shapes):
        values |= {"is_residual": True, "patch_size": 2, "scale_factor_spatial": 16, "decoder_base_dim": inner // 4}
        values |= {"latents_mean": MEAN_2_2, "latents_std": STD_2_2}
    with user_errors(where):
        return WanCodecConfig(**values)


def load_codec_file(
    path: Path, *, device: torch.device | str, dtype: torch.dtype | None, trust_pickle: bool = False
) -> WanCodec | TaehvCodec:
    """The codec with the weights of a VAE's or a small decoder's file."""
    if open_checkpoint(path, trust_pickle=trust_pickle).kind == SMALL:
        return load_taehv(path, dtype=dtype or torch.float32, device=device, trust_pickle=trust_pickle)
    config, tensors = open_codec(path, trust_pickle=trust_pickle)
    codec = WanCodec(config)
    load_weights(codec, tensors, where=str(path), dtype=dtype, device=device)
    return codec.eval().requires_grad_(False)


def write_codec(path: Path, folder: Path, geometry: VideoGeometry, *, trust_pickle: bool = False) -> list[str]:
    """Write such a file as the codec part of a model folder -> its [module, class] in model_index.json."""
    codec = load_codec_file(path, device="cpu", dtype=None, trust_pickle=trust_pickle)
    if (codec.latent_channels, codec.spatial_stride) != (geometry.latent_channels, geometry.spatial_stride):
        raise UserError(
            f"{path} makes {codec.latent_channels} channels at 1/{codec.spatial_stride}, the transformer takes "
            f"{geometry.latent_channels} at 1/{geometry.spatial_stride}: this codec belongs to another model"
        )
    name = type(codec).__name__
    write_component(folder, {"_class_name": name, **asdict(codec.config)}, in_memory(codec.state_dict()))
    return [type(codec).__module__, name]
