"""A transformer's config from the shapes of its tensors.

One number cannot be seen in them, the number of heads. It comes from a config file beside the weights, else from the
head width that every Wan model has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streamgen.errors import UserError
from streamgen.transformer_config import TransformerConfig
from streamgen.weights import CONFIG_FILE, check_tensors, read_json, user_errors

HEAD_DIM = 128
TEXT_LEN = 512
Shapes = Mapping[str, tuple[int, ...]]

NEEDED = (
    "patch_embedding.weight",
    "text_embedding.0.weight",
    "time_embedding.0.weight",
    "blocks.0.ffn.0.weight",
    "head.head.weight",
)


def config_of(shapes: Shapes, where: str, *, settings: Mapping[str, Any] | None = None) -> TransformerConfig:
    """The config that a checkpoint with these original names and shapes has.

    settings: a config.json beside it (original or diffusers), for what shapes do not show: heads, eps, text length.
    """
    missing = [name for name in NEEDED if name not in shapes]
    if missing:
        raise UserError(f"{where}: no transformer without {', '.join(missing)}")
    known = settings or {}
    dim, in_channels, *patch = shapes["patch_embedding.weight"]
    if len(patch) != 3:
        raise UserError(
            f"{where}: patch_embedding.weight is {list(shapes['patch_embedding.weight'])}, must have 5 axes"
        )
    heads = known.get("num_heads", known.get("num_attention_heads"))
    if heads is None:
        if dim % HEAD_DIM:
            raise UserError(
                f"{where}: a width of {dim} is no multiple of Wan's head width {HEAD_DIM}; "
                f"put a {CONFIG_FILE} with num_heads beside it"
            )
        heads = dim // HEAD_DIM
    with user_errors(where):
        return TransformerConfig(
            dim=dim,
            ffn_dim=shapes["blocks.0.ffn.0.weight"][0],
            num_heads=int(heads),
            num_layers=1 + max(int(n) for n in re.findall(r"^blocks\.(\d+)\.", "\n".join(shapes), re.MULTILINE)),
            in_channels=in_channels,
            out_channels=shapes["head.head.weight"][0] // math.prod(patch),
            text_dim=shapes["text_embedding.0.weight"][1],
            text_len=int(known.get("text_len", TEXT_LEN)),
            patch=(patch[0], patch[1], patch[2]),
            freq_dim=shapes["time_embedding.0.weight"][1],
            eps=float(known.get("eps", 1e-6)),
            qk_norm="blocks.0.self_attn.norm_q.weight" in shapes,
            cross_attn_norm="blocks.0.norm3.weight" in shapes,
            pooled_text="pooled_embedding.0.weight" in shapes,
        )


def check_transformer(config: TransformerConfig, shapes: Shapes, where: str) -> None:
    """UserError naming what is missing, foreign or of another shape for a model of this config, all at once."""
    check_tensors(expected_shapes(config), shapes, where)
    if config.in_channels != config.out_channels:
        raise UserError(
            f"{where} takes {config.in_channels} channels and makes {config.out_channels}: it wants an image or a mask "
            "beside the noise, which is not served here; take text-to-video weights"
        )


def expected_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of such a model."""
    import torch

    from streamgen.transformer import CausalWanModel

    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in CausalWanModel(config).state_dict().items()}


def settings_beside(path: Path) -> dict[str, Any] | None:
    """The config.json beside a weights file, if it is a transformer's."""
    file = path.parent / CONFIG_FILE
    if not file.is_file():
        return None
    values = read_json(file)
    return values if "num_heads" in values or "num_attention_heads" in values else None


def original_settings(config: TransformerConfig) -> dict[str, Any]:
    """config.json as Wan's releases have it."""
    return {
        "_class_name": "WanModel",
        "model_type": "t2v" if config.in_channels == 16 else "ti2v",
        "dim": config.dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": config.text_len,
    }


def diffusers_settings(config: TransformerConfig) -> dict[str, Any]:
    """config.json of diffusers' `WanTransformer3DModel`."""
    return {
        "_class_name": "WanTransformer3DModel",
        "added_kv_proj_dim": None,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": config.cross_attn_norm,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "image_dim": None,
        "in_channels": config.in_channels,
        "num_attention_heads": config.num_heads,
        "num_layers": config.num_layers,
        "out_channels": config.out_channels,
        "patch_size": list(config.patch),
        "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads" if config.qk_norm else None,
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
