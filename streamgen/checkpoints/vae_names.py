"""Names of a Wan VAE's tensors: Wan's release -> diffusers' `AutoencoderKLWan`; 2.1 has flat levels, 2.2 nested."""

from __future__ import annotations

import re

ENDS = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
IN_SIDE = {
    "conv1": "conv_in",
    "head.0": "norm_out",
    "head.2": "conv_out",
    "middle.0": "mid_block.resnets.0",
    "middle.1": "mid_block.attentions.0",
    "middle.2": "mid_block.resnets.1",
}
IN_RESIDUAL = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def vae_to_diffusers(name: str, res_blocks: int = 2) -> str | None:
    """diffusers' name of a tensor of Wan's VAE; None for a name that it does not have.

    res_blocks: residual blocks of an encoder level; a decoder level has one more, then its upsampler.
    """
    stem, _, leaf = name.rpartition(".")
    if stem in ENDS:
        return f"{ENDS[stem]}.{leaf}"
    side, _, rest = name.partition(".")
    if side not in ("encoder", "decoder"):
        return None
    for ours, theirs in IN_SIDE.items():
        if rest.startswith(f"{ours}."):
            return f"{side}.{theirs}.{_residual(rest.removeprefix(f'{ours}.'))}"
    found = re.fullmatch(r"(?:down|up)samples\.(\d+)\.(.+)", rest)
    if not found:
        return None
    number, inner = int(found[1]), found[2]
    nested = re.fullmatch(r"(?:down|up)samples\.(\d+)\.(.+)", inner)
    if side == "encoder":
        if nested is None:
            return f"encoder.down_blocks.{number}.{_residual(inner)}"
        place = int(nested[1])
        part = f"resnets.{place}" if place < res_blocks else "downsampler"
        return f"encoder.down_blocks.{number}.{part}.{_residual(nested[2])}"
    if nested is None:
        level, place = divmod(number, res_blocks + 2)
        part = f"resnets.{place}" if place <= res_blocks else "upsamplers.0"
        return f"decoder.up_blocks.{level}.{part}.{_residual(inner)}"
    place = int(nested[1])
    part = f"resnets.{place}" if place <= res_blocks else "upsampler"
    return f"decoder.up_blocks.{number}.{part}.{_residual(nested[2])}"


def _residual(inner: str) -> str:
    for ours, theirs in IN_RESIDUAL.items():
        if inner.startswith(f"{ours}."):
            return f"{theirs}.{inner.removeprefix(f'{ours}.')}"
    return inner
