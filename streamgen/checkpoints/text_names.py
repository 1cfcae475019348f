"""Names and sizes of a UMT5 encoder's tensors: Wan's own release <-> transformers' `UMT5EncoderModel`."""

from __future__ import annotations

import re
from typing import Any

from streamgen.checkpoints.detect import TEXT, Network
from streamgen.checkpoints.tensors import LazyTensors
from streamgen.errors import UserError

WHOLE = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}
IN_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
TIED = "encoder.embed_tokens.weight"
"""transformers' second name of shared.weight; some files have one, some the other, some both."""
BIAS = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def to_transformers(name: str) -> str | None:
    """Wan's name -> transformers'; None for a name that no UMT5 encoder has."""
    if name in WHOLE:
        return WHOLE[name]
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
    if not found or found[2] not in IN_BLOCK:
        return None
    return f"encoder.block.{found[1]}.{IN_BLOCK[found[2]]}.weight"


def text_tensors(network: Network, where: str) -> LazyTensors:
    """The encoder's tensors by transformers' names, the embedding under one name."""
    if network.kind != TEXT:
        raise UserError(f"{where} holds a {network.kind}, no text encoder")
    entries = {}
    for name, entry in network.tensors.entries.items():
        theirs = to_transformers(name) if network.layout == "original" else name
        entries[theirs or name] = entry
    tied = entries.pop(TIED, None)
    if tied is not None:
        entries.setdefault("shared.weight", tied)
    foreign = [name for name in entries if name.startswith(("decoder.", "lm_head."))]
    return LazyTensors({name: entry for name, entry in entries.items() if name not in foreign})


def text_sizes(tensors: LazyTensors, where: str) -> dict[str, Any]:
    """Sizes of the encoder, as fields of `UMT5TextConfig`."""
    shapes = tensors.shapes
    query, wide = (f"encoder.block.0.layer.{part}.weight" for part in ("0.SelfAttention.q", "1.DenseReluDense.wi_0"))
    needed = ("shared.weight", BIAS, query, wide)
    missing = [name for name in needed if name not in shapes]
    if missing:
        raise UserError(f"{where}: no UMT5 encoder without {', '.join(missing)}")
    biases = [name for name in shapes if name.endswith("relative_attention_bias.weight")]
    layers = 1 + max(int(n) for n in re.findall(r"^encoder\.block\.(\d+)\.", "\n".join(shapes), re.MULTILINE))
    if len(biases) != layers:
        raise UserError(
            f"{where}: {len(biases)} of {layers} layers have a table of positions; UMT5 has one in each, this is a T5"
        )
    vocabulary, width = shapes["shared.weight"]
    buckets, heads = shapes[BIAS]
    return {
        "text_dim": width,
        "vocab_size": vocabulary,
        "head_dim": shapes[query][0] // heads,
        "ffn_dim": shapes[wide][0],
        "num_layers": layers,
        "num_heads": heads,
        "num_buckets": buckets,
    }
