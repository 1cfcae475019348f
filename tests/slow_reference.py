"""Causal Wan streaming written out, slowly, from its published description; shares no line with the code it checks.

Self-Forcing's layout: per layer one buffer of `window` frames of keys (rotated at absolute positions) and values,
rolled once per block after the sink; every call overwrites the block's own slots; one more call on the clean latents
at timestep 0 leaves the context. `Rules` says all of it, so that a test can break one rule at a time.
Letters: B batch, F frames, C channels, H W latent grid, S tokens of a frame, T = F S, N heads, K head width, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Sizes, and every rule that a port can get wrong."""

    dim: int = 64
    heads: int = 2
    layers: int = 3
    ffn: int = 128
    text_dim: int = 16
    text_len: int = 6
    freq_dim: int = 32
    channels: int = 4
    height: int = 4
    width: int = 6
    frames: int = 3
    window: int = 12
    sink: int = 3
    steps: int = 4
    shift: float = 5.0
    relative: bool = False
    # what the mistakes change
    eps: float = 1e-6
    gelu: str = "tanh"
    cache_dtype: torch.dtype | None = None
    angle_dtype: torch.dtype = torch.float64
    modulation_dtype: torch.dtype | None = None
    rope: str = "pairs"
    query_offset: int = 0
    position_offset: int = 0
    qk_norm: str = "full"
    clock: Callable[[float], float] = lambda t: float(torch.tensor(t))  # timesteps are float32 everywhere
    commit_timestep: float | None = 0.0
    renoise: str = "next"
    channel_fastest: bool = True
    text_rows: int | None = None
    """Rows of the text that cross-attention looks at; all of them, padding too, by default."""

    def sigmas(self) -> list[float]:
        uniform = [1 - step / self.steps for step in range(self.steps)]
        return [self.shift * u / (1 + (self.shift - 1) * u) for u in uniform]


def random_weights(rules: Rules, seed: int = 0) -> dict[str, Tensor]:
    """Weights under Wan's original names, of such sizes that every part shows in the output."""
    D, made = rules.dim, torch.Generator().manual_seed(seed)
    patch = 4 * rules.channels

    def normal(*shape: int, std: float | None = None, mean: float = 0.0) -> Tensor:
        std = math.prod(shape[1:]) ** -0.5 if std is None else std
        return mean + std * torch.randn(shape, generator=made)

    found: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = normal(rows, columns), normal(rows, std=0.1)

    found["patch_embedding.weight"] = normal(D, rules.channels, 1, 2, 2)
    found["patch_embedding.bias"] = normal(D, std=0.1)
    linear("text_embedding.0", D, rules.text_dim)
    linear("text_embedding.2", D, D)
    linear("time_embedding.0", D, rules.freq_dim)
    linear("time_embedding.2", D, D)
    linear("time_projection.1", 6 * D, D)
    for block in (f"blocks.{layer}" for layer in range(rules.layers)):
        for attention in ("self_attn", "cross_attn"):
            for part in "qkvo":
                linear(f"{block}.{attention}.{part}", D, D)
            for part in "qk":
                found[f"{block}.{attention}.norm_{part}.weight"] = normal(D, std=0.1, mean=1.0)
        found[f"{block}.norm3.weight"], found[f"{block}.norm3.bias"] = normal(D, std=0.1, mean=1.0), normal(D, std=0.1)
        linear(f"{block}.ffn.0", rules.ffn, D)
        linear(f"{block}.ffn.2", D, rules.ffn)
        found[f"{block}.modulation"] = normal(1, 6, D, std=0.3)
    linear("head.head", patch, D)
    found["head.modulation"] = normal(1, 2, D, std=0.3)
    return found


@dataclass
class Buffer:
    """Keys and values of one layer, [B, window * S, N, K], and how far it is filled."""

    k: Tensor
    v: Tensor
    global_end: int = 0
    local_end: int = 0


class SlowReference:
    """One stream (of B rows) of a model. It computes in the weights' dtype, which noise and text have too."""

    def __init__(self, weights: dict[str, Tensor], rules: Rules, batch: int = 1) -> None:
        self.weights, self.rules = weights, rules
        self.dtype = weights["head.modulation"].dtype
        self.tokens = rules.height * rules.width // 4
        shape = (batch, rules.window * self.tokens, rules.heads, rules.dim // rules.heads)
        empty = [torch.full(shape, math.nan, dtype=rules.cache_dtype or self.dtype) for _ in range(2 * rules.layers)]
        self.buffers = [Buffer(empty[2 * layer], empty[2 * layer + 1]) for layer in range(rules.layers)]
        self.made: list[Tensor] = []
        """Clean latents of every frame, [B, C, H, W]."""

    def block(self, noise: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """The next block from its noise [steps, B, F, C, H, W] -> (latents, flows of all calls)."""
        rules, sigmas, start = self.rules, self.rules.sigmas(), len(self.made)
        x, flows = noise[0], []
        for step, sigma in enumerate(sigmas):
            flow = self.forward(x, rules.clock(1000 * sigma), text, start)
            flows.append(flow)
            x0 = x - sigma * flow
            if step + 1 < len(sigmas):
                following = sigmas[step + 1]
                if rules.renoise == "euler":
                    x = x + (following - sigma) * flow
                else:
                    level = sigma if rules.renoise == "current" else following
                    fresh = noise[0] if rules.renoise == "initial" else noise[step + 1]
                    x = (1 - level) * x0 + level * fresh
        if rules.commit_timestep is not None:
            flows.append(self.forward(x0, rules.commit_timestep, text, start))
        self.made += x0.unbind(1)
        return x0, torch.stack(flows)

    def recache(self, text: Tensor) -> None:
        """LongLive at a change of prompt: the window's clean frames in one call under the new text; the sink stays."""
        window = self.made[-self.rules.window :]
        self.forward(torch.stack(window, 1), 0.0, text, len(self.made) - len(window), protect=self.rules.sink)

    def forward(self, x_BFCHW: Tensor, timestep: float, text: Tensor, start: int, protect: int = 0) -> Tensor:
        """One call; keys and values of these frames go into the buffers, but not over the first `protect` frames."""
        w, rules = self.weights, self.rules
        B, frames = x_BFCHW.shape[:2]
        x = F.conv3d(x_BFCHW.transpose(1, 2), w["patch_embedding.weight"], w["patch_embedding.bias"], (1, 2, 2))
        x = x.flatten(2).transpose(1, 2)  # [B, T, D]
        half = rules.freq_dim // 2
        angles = timestep * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        e = torch.cat([angles.cos(), angles.sin()]).to(self.dtype)[None]
        e = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", e)))
        e0 = self.linear("time_projection.1", F.silu(e)).view(1, 6, rules.dim)
        rows = self.linear("text_embedding.2", F.gelu(self.linear("text_embedding.0", text), approximate="tanh"))
        for layer in range(rules.layers):
            name = f"blocks.{layer}"
            table = (w[f"{name}.modulation"] + e0).to(rules.modulation_dtype or self.dtype).to(self.dtype)
            shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = table.unbind(1)
            h = self.norm(x) * (1 + scale_sa) + shift_sa
            x = x + gate_sa * self.self_attention(f"{name}.self_attn", layer, h, start, frames, protect)
            h = F.layer_norm(x, (rules.dim,), w[f"{name}.norm3.weight"], w[f"{name}.norm3.bias"], rules.eps)
            x = x + self.cross_attention(f"{name}.cross_attn", h, rows.expand(B, -1, -1)[:, : rules.text_rows])
            h = self.linear(f"{name}.ffn.0", self.norm(x) * (1 + scale_ff) + shift_ff)
            x = x + gate_ff * self.linear(f"{name}.ffn.2", F.gelu(h, approximate=rules.gelu))
        shift, scale = (
            (w["head.modulation"] + e[:, None]).to(rules.modulation_dtype or self.dtype).to(self.dtype).unbind(1)
        )
        x = self.linear("head.head", self.norm(x) * (1 + scale) + shift)
        grid = (B, frames, rules.height // 2, rules.width // 2)
        if rules.channel_fastest:
            x = x.view(*grid, 2, 2, rules.channels).permute(0, 1, 6, 2, 4, 3, 5)
        else:
            x = x.view(*grid, rules.channels, 2, 2).permute(0, 1, 4, 2, 5, 3, 6)
        return x.reshape(x_BFCHW.shape)

    def self_attention(self, name: str, layer: int, h: Tensor, start: int, frames: int, protect: int) -> Tensor:
        rules, buffer, S = self.rules, self.buffers[layer], self.tokens
        q, k = (self.heads(self.qk_norm(f"{name}.norm_{part}", self.linear(f"{name}.{part}", h))) for part in "qk")
        v = self.heads(self.linear(f"{name}.v", h))
        new, end = frames * S, (start + frames) * S
        size, sink = rules.window * S, rules.sink * S
        if end > buffer.global_end and new + buffer.local_end > size:  # the roll: once, in the block's first call
            evicted = new + buffer.local_end - size
            kept = buffer.local_end - evicted - sink
            for tensor in (buffer.k, buffer.v):
                tensor[:, sink : sink + kept] = tensor[:, sink + evicted : sink + evicted + kept].clone()
            buffer.local_end += end - buffer.global_end - evicted
        else:
            buffer.local_end += max(0, end - buffer.global_end)
        buffer.global_end = max(buffer.global_end, end)
        at = buffer.local_end - new
        skipped = max(0, protect * S - at)
        slots = torch.arange(buffer.local_end // S) if rules.relative else None
        positions = torch.arange(start, start + frames) if slots is None else slots[-frames:]
        stored = self.rotate(k, positions) if slots is None else k
        buffer.k[:, at + skipped : buffer.local_end] = stored[:, skipped:]
        buffer.v[:, at + skipped : buffer.local_end] = v[:, skipped:]
        keys, values = (tensor[:, : buffer.local_end].to(self.dtype) for tensor in (buffer.k, buffer.v))
        if slots is not None:
            keys = self.rotate(keys, slots)
        q = self.rotate(q, positions + rules.query_offset)
        return self.linear(f"{name}.o", self.attention(q, keys, values))

    def cross_attention(self, name: str, h: Tensor, text: Tensor) -> Tensor:
        q = self.heads(self.qk_norm(f"{name}.norm_q", self.linear(f"{name}.q", h)))
        k = self.heads(self.qk_norm(f"{name}.norm_k", self.linear(f"{name}.k", text)))
        return self.linear(f"{name}.o", self.attention(q, k, self.heads(self.linear(f"{name}.v", text))))

    def attention(self, q_BTNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        scores = torch.einsum("btnk,bsnk->bnts", q_BTNK, k_BSNK) / q_BTNK.shape[-1] ** 0.5
        return torch.einsum("bnts,bsnk->btnk", scores.softmax(-1), v_BSNK).flatten(2)

    def rotate(self, x_BTNK: Tensor, positions: Tensor) -> Tensor:
        rules = self.rules
        if rules.rope == "off":
            return x_BTNK
        width = x_BTNK.shape[-1]
        space = width // 6
        time = width // 2 - 2 * space
        rows, columns = rules.height // 2, rules.width // 2
        places = torch.cartesian_prod(positions + rules.position_offset, torch.arange(rows), torch.arange(columns))
        angles = torch.cat(
            [
                places[:, axis, None].double() * 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
                for axis, count in enumerate((time, space, space))
            ],
            dim=1,
        )
        angles = angles.to(rules.angle_dtype).double()
        cos, sin = angles.cos().to(self.dtype)[:, None], angles.sin().to(self.dtype)[:, None]  # [T, 1, K / 2]
        if rules.rope == "halves":
            a, b = x_BTNK.chunk(2, -1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        a, b = x_BTNK[..., 0::2], x_BTNK[..., 1::2]
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + self.rules.eps).sqrt()

    def qk_norm(self, name: str, x: Tensor) -> Tensor:
        """Over all heads together."""
        groups = x if self.rules.qk_norm == "full" else self.heads(x)
        normed = groups / (groups.square().mean(-1, keepdim=True) + self.rules.eps).sqrt()
        return normed.reshape(x.shape) * self.weights[f"{name}.weight"]

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.rules.heads, -1))
