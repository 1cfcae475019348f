"""What a model costs, counted from its config: parameters, products and attentions of a pass, bytes of a cache.

Nothing is built or measured here. Counts are of matrix products and attention alone; what stands between them
(norms, modulation, rotary embedding) is below 1 % of a large model's arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from streamgen.transformer_config import TransformerConfig

TRAINED = 3.0
"""A forward and a backward pass cost three forward passes (the backward makes two products for each of the forward)."""
RECOMPUTED = 4.0
"""The same with activation checkpointing of all layers, which runs the forward pass twice."""


@dataclass(frozen=True, slots=True)
class Product:
    """[m, k] times the transpose of a weight [n, k]."""

    m: int
    k: int
    n: int

    @property
    def flops(self) -> int:
        return 2 * self.m * self.k * self.n


@dataclass(frozen=True, slots=True)
class Attention:
    """softmax(q k^T) v, head-major."""

    heads: int
    queries: int
    keys: int
    width: int

    @property
    def flops(self) -> int:
        return 4 * self.heads * self.queries * self.keys * self.width


def pass_shapes(config: TransformerConfig, tokens: int, visible_tokens: int) -> list[Product | Attention]:
    """One streaming pass over a block of `tokens` that sees `visible_tokens` keys (its own included), in order.

    One noise level for the whole block; the text's keys and values exist already.
    """
    dim, patch = config.dim, math.prod(config.patch)

    def product(k: int, n: int, rows: int = tokens) -> Product:
        return Product(rows, k, n)

    def attention(keys: int) -> Attention:
        return Attention(config.num_heads, tokens, keys, config.head_dim)

    shapes: list[Product | Attention] = [
        product(config.in_channels * patch, dim),
        product(config.freq_dim, dim, rows=1),
        product(dim, dim, rows=1),
        product(dim, 6 * dim, rows=1),
    ]
    for _ in range(config.num_layers):
        shapes += [product(dim, dim)] * 3 + [attention(visible_tokens), product(dim, dim)]
        shapes += [product(dim, dim), attention(config.text_len), product(dim, dim)]
        shapes += [product(dim, config.ffn_dim), product(config.ffn_dim, dim)]
    return [*shapes, product(dim, config.out_channels * patch)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Passes of one network in a training step."""

    what: str
    passes: float
    """Clips times evaluations."""
    tokens: int
    """Tokens of a pass."""
    pairs: int
    """(query, key) pairs that self-attention computes in a pass."""
    factor: float = 1.0
    """Forward passes that a pass stands for: 1, TRAINED or RECOMPUTED."""


def work_flops(config: TransformerConfig, work: Work) -> float:
    """Floating-point operations of some passes; text keys and values are counted once per pass."""
    shapes = pass_shapes(config, work.tokens, 0)
    text = 4 * config.num_layers * config.text_len * config.dim**2
    attention = 4 * config.num_layers * config.dim * work.pairs
    return work.passes * work.factor * (sum(shape.flops for shape in shapes) + text + attention)


def cache_bytes(config: TransformerConfig, tokens: int, bytes_per_value: int = 2) -> int:
    """Keys and values of so many tokens in all layers, for one stream."""
    return 2 * config.num_layers * tokens * config.dim * bytes_per_value


def trained_factor(config: TransformerConfig, recomputed_layers: int) -> float:
    """Forward passes that a trained pass stands for: TRAINED, up to RECOMPUTED with all layers recomputed."""
    return TRAINED + (RECOMPUTED - TRAINED) * recomputed_layers / config.num_layers


def activation_bytes(
    config: TransformerConfig, tokens: int, *, recomputed_layers: int = 0, bytes_per_value: int = 2
) -> int:
    """What backward needs of a pass over `tokens`, about; scores of an attention that holds them come besides.

    A layer keeps its input, two modulated norms, q, k, v and their normed copies, the attention's output, the
    cross-attention's query and output, and two tensors of the feed-forward's width. A recomputed one (the first are)
    keeps its input, and has the rest when the backward is there, after the other layers have let go of theirs.
    """
    layer, kept_layers = 14 * config.dim + 2 * config.ffn_dim, config.num_layers - recomputed_layers
    kept = recomputed_layers * config.dim + layer * max(kept_layers, 1)
    return tokens * kept * bytes_per_value


def text_bytes(config: TransformerConfig, bytes_per_value: int = 2) -> int:
    """Keys and values of one prompt in all layers."""
    return cache_bytes(config, config.text_len, bytes_per_value)


def pass_bytes(
    config: TransformerConfig, tokens: int, past_tokens: int, *, rotates_past: bool, bytes_per_value: int = 2
) -> int:
    """What a streaming pass over `tokens` holds at its worst moment besides weights and cache, within a quarter.

    That moment is the feed-forward's two wide tensors, the rotary embedding of the queries, which is in float32, or,
    where keys are stored un-rotated (`rotates_past`), that of one layer's `past_tokens`. Attention is taken as fused;
    the backend `auto` holds at most 4 * `attention.SMALL_SCORES` bytes of scores besides, in bf16 on a CPU.
    """
    narrow = bytes_per_value < 4
    wide = tokens * (6 * config.dim + 2 * config.ffn_dim) * bytes_per_value
    queries = tokens * (14 if narrow else 10) * config.dim * bytes_per_value
    past = tokens * (10 if narrow else 6) * config.dim * bytes_per_value
    past += past_tokens * config.dim * (4 + 4 * narrow + bytes_per_value)
    return max(wide, queries, past if rotates_past else 0)


def parameters(config: TransformerConfig) -> int:
    """Number of parameters of a transformer of this config."""
    import torch

    from streamgen.transformer import CausalWanModel

    with torch.device("meta"):
        return sum(p.numel() for p in CausalWanModel(config).parameters())
