"""The block-causal video transformer: Wan's, with per-frame timesteps (arXiv 2503.20314; CausVid, arXiv 2412.07772).

One class serves three uses; only mask and cache differ:
    bidirectional     model(latents, timestep, text, rope=rope)
    teacher forcing   frames [clean | noisy], timestep 0 for the clean half, rope of the same positions twice,
                      mask=teacher_forcing_mask(...), text_repeats=2
    streaming         cache=kv_cache.begin(...): the block alone, its past comes from the cache
Parameters have the original Wan names, so that Wan's weights load as they are.
Letters: B batch, F latent frames, C channels, H W latent grid, S tokens of a frame, T = F S tokens, N heads,
K head width, D model width, L text tokens, G text groups (consecutive frames that share a prompt).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from streamgen.attention import attend
from streamgen.cache.rows import RowsCache
from streamgen.cached_attention import Projected
from streamgen.capture import Captures
from streamgen.linear import Linear, fuses_gelu, linear, linear_gelu
from streamgen.ops import Ops, gelu_tanh, select
from streamgen.quantised_linear import QuantisedLinear
from streamgen.transformer_config import TransformerConfig


class BlockCache(Protocol):
    """What a forward needs of a cache for the block being made (`streamgen.cache`)."""

    def rope(self) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the query frames, each [T, K/2]."""
        ...

    def append(self, layer: int, k_BNTK: Tensor, v_BNTK: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the normed un-rotated keys and the values; returns all visible ones, keys rotated, [B, N, S, K]."""
        ...


class TextContext(NamedTuple):
    """All that the network needs of a prompt; made once per prompt version by `CausalWanModel.encode_text`."""

    kv: list[tuple[Tensor, Tensor]]
    """Per layer the keys and values of cross-attention, each [B, G, N, L, K]."""
    pooled_BGD: Tensor | None
    levels: dict[float, "Level"] | None = None
    """By timestep, what streaming under this prompt has computed of it; None: nothing is kept."""


@dataclass(frozen=True, slots=True)
class Level:
    """What every pass at one noise level under one prompt would compute anew."""

    e_BFD: Tensor
    e0_BF6D: Tensor
    rows: dict[int, tuple[Tensor, ...]]
    """Layer -> its six vectors of modulation, each [B, F, 1, D]."""


class Call(NamedTuple):
    """What one forward hands to every block."""

    rope: tuple[Tensor, Tensor]
    cache: BlockCache | RowsCache | None
    mask_TS: Tensor | None
    text_repeats: int
    ops: Ops
    attention_backend: str
    level: Level | None = None


def sinusoid(timestep: Tensor, freq_dim: int) -> Tensor:
    """[...] -> float64 [..., freq_dim]: cosines first, then sines, of t 10000^(-i / half); t may be fractional."""
    half = freq_dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angles = timestep.double()[..., None] * torch.exp(steps * (-math.log(10000.0) / half))
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


class Norm(nn.Module):
    """The weight of an RMSNorm over the full width; `Ops.rms_norm` applies it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def weight_of(norm: Norm | None) -> Tensor | None:
    return None if norm is None else norm.weight


class Attention(nn.Module):
    """The projections of one attention; q and k are normed across all heads together before the split."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_heads, self.eps = config.num_heads, config.eps
        self.q = Linear(config.dim, config.dim)
        self.k = Linear(config.dim, config.dim)
        self.v = Linear(config.dim, config.dim)
        self.o = Linear(config.dim, config.dim)
        self.norm_q = Norm(config.dim) if config.qk_norm else None
        self.norm_k = Norm(config.dim) if config.qk_norm else None


class SelfAttention(Attention):
    def forward(self, x_BTD: Tensor, layer: int, call: Call) -> Tensor:
        N, eps, ops = self.num_heads, self.eps, call.ops
        q_weight_D, k_weight_D = weight_of(self.norm_q), weight_of(self.norm_k)
        qkv = self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)
        if call.cache is None:
            q_BNTK = ops.rms_norm_rope(qkv[0], q_weight_D, eps, N, *call.rope)
            k_BNSK = ops.rms_norm_rope(qkv[1], k_weight_D, eps, N, *call.rope)
            v_BNSK = qkv[2].unflatten(-1, (N, -1)).transpose(1, 2)
            out_BNTK = attend(q_BNTK, k_BNSK, v_BNSK, call.mask_TS, call.attention_backend)
        else:
            projected = Projected(*qkv, q_weight_D, k_weight_D, eps, N, call.rope)
            out_BNTK = ops.attend_cached(call.cache, layer, projected, call.mask_TS, call.attention_backend)
        return self.o(out_BNTK.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def encode(self, text_BGLD: Tensor, ops: Ops) -> tuple[Tensor, Tensor]:
        """Keys and values of the text, each [B, G, N, L, K]."""
        B, G = text_BGLD.shape[:2]
        rows_RLD = text_BGLD.flatten(0, 1)
        k_RNLK = ops.rms_norm(self.k(rows_RLD), weight_of(self.norm_k), self.eps, self.num_heads)
        v_RNLK = self.v(rows_RLD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return k_RNLK.contiguous().unflatten(0, (B, G)), v_RNLK.contiguous().unflatten(0, (B, G))

    def forward(self, x_BTD: Tensor, kv: tuple[Tensor, Tensor], call: Call) -> Tensor:
        """Each group of tokens looks at its own text; padding is attended, as in Wan."""
        B, T, D = x_BTD.shape
        k_BGNLK, v_BGNLK = kv
        G, R = k_BGNLK.shape[1], call.text_repeats
        q_BNTK = call.ops.rms_norm(self.q(x_BTD), weight_of(self.norm_q), self.eps, self.num_heads)
        if G == 1:
            out_BNTK = attend(q_BNTK, k_BGNLK[:, 0], v_BGNLK[:, 0], None, call.attention_backend)
            return self.o(out_BNTK.transpose(1, 2).flatten(2))
        # Tokens run (repeat, group, token): the repeats of a group share one attention, so text is never copied.
        q_BGNtK = q_BNTK.unflatten(2, (R, G, -1)).permute(0, 3, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1)
        out_BGNtK = attend(q_BGNtK, k_BGNLK.flatten(0, 1), v_BGNLK.flatten(0, 1), None, call.attention_backend)
        out_BRGtNK = out_BGNtK.unflatten(2, (R, -1)).unflatten(0, (B, G)).permute(0, 3, 1, 4, 2, 5)
        return self.o(out_BRGtNK.reshape(B, T, D))


class Block(nn.Module):
    """x += gate SelfAttn(mod(LN x));  x += CrossAttn(LN_affine x);  x += gate FFN(mod(LN x))."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.self_attn = SelfAttention(config)
        self.norm3 = nn.LayerNorm(config.dim, config.eps) if config.cross_attn_norm else nn.Identity()
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(self, x_BFSD: Tensor, e0_BF6D: Tensor, kv: tuple[Tensor, Tensor], layer: int, call: Call) -> Tensor:
        shape, eps, ops = x_BFSD.shape, self.eps, call.ops
        rows = None if call.level is None else call.level.rows.get(layer)
        if rows is None:
            rows = (self.modulation + e0_BF6D).unsqueeze(3).unbind(2)
            if call.level is not None:
                call.level.rows[layer] = rows
        shift_sa, scale_sa, gate_sa, shift_ff, scale_ff, gate_ff = rows  # each [B, F, 1, D]
        y_BTD = ops.layer_norm_modulate(x_BFSD, shift_sa, scale_sa, eps).flatten(1, 2)
        y_BTD = self.self_attn(y_BTD, layer, call)
        x_BFSD, y_BFSD = ops.residual_norm(x_BFSD, y_BTD.view(shape), gate_sa, self.norm3)
        y_BTD = self.cross_attn(y_BFSD.flatten(1, 2), kv, call)
        x_BFSD, y_BFSD = ops.residual_modulate(x_BFSD, y_BTD.view(shape), shift_ff, scale_ff, eps)
        return ops.gate_residual(x_BFSD, self.ffn[2](self.widen(y_BFSD, ops)), gate_ff)

    def widen(self, y_BFSD: Tensor, ops: Ops) -> Tensor:
        """The feed-forward's first half, in one operation where no other backend of `ops` does it."""
        first = self.ffn[0]
        if ops.gelu_tanh is gelu_tanh and isinstance(first, QuantisedLinear):
            return first.gelu(y_BFSD)
        if ops.gelu_tanh is gelu_tanh and fuses_gelu(y_BFSD, first):
            return linear_gelu(y_BFSD, cast("Linear", first))
        return ops.gelu_tanh(first(y_BFSD))


class Head(nn.Module):
    """Modulated norm and projection to patches; its table is added to e itself, not to the six vectors."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.head = Linear(config.dim, math.prod(config.patch) * config.out_channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x_BFSD: Tensor, e_BFD: Tensor, ops: Ops) -> Tensor:
        shift, scale = (self.modulation + e_BFD[:, :, None]).unsqueeze(3).unbind(2)
        return self.head(ops.layer_norm_modulate(x_BFSD, shift, scale, self.eps))


class CausalWanModel(nn.Module):
    """See the module's docstring. `attention_backend` is a name of `streamgen.attention`; `ops` the table in use."""

    def __init__(self, config: TransformerConfig, *, ops: Ops | None = None, attention_backend: str = "auto") -> None:
        super().__init__()
        self.config = config
        self.ops = select() if ops is None else ops
        self.attention_backend = attention_backend
        self.captures: Captures | None = None
        """Recorded passes (`streamgen.capture`), for CUDA."""
        self.recomputed_layers = 0
        """In passes without a cache, the first so many layers keep their input alone and run again in the backward."""
        dim = config.dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch, config.patch)
        self.text_embedding = nn.Sequential(Linear(config.text_dim, dim), nn.GELU("tanh"), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(config.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.pooled_embedding = (
            nn.Sequential(Linear(config.text_dim, dim), nn.SiLU(), Linear(dim, dim)) if config.pooled_text else None
        )
        self.place_embedding = (
            nn.Parameter(torch.randn(math.prod(config.place_grid), dim) * 0.02) if config.place_grid else None
        )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Wan's initial weights: the model's output is zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        if self.pooled_embedding is not None:
            nn.init.zeros_(self.pooled_embedding.get_parameter("2.weight"))
        nn.init.zeros_(self.head.head.weight)

    def encode_text(self, text_BGLD: Tensor) -> TextContext:
        """Embeddings [B, G, text_len, text_dim], zero rows for padding -> what every forward of this prompt needs."""
        c = self.config
        if text_BGLD.ndim != 4 or text_BGLD.shape[2:] != (c.text_len, c.text_dim):
            raise ValueError(
                f"text of shape {tuple(text_BGLD.shape)}: must be [batch, groups, {c.text_len}, {c.text_dim}]"
            )
        rows = self.text_embedding(text_BGLD)
        kv = [block.cross_attn.encode(rows, self.ops) for block in cast("list[Block]", self.blocks)]
        pooled = None if self.pooled_embedding is None else self.pooled_embedding(text_BGLD.mean(2))
        return TextContext(kv, pooled, {})

    def forward(
        self,
        latents_BFCHW: Tensor,
        timestep_BF: Tensor,
        text: TextContext,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        cache: BlockCache | RowsCache | None = None,
        mask: Tensor | None = None,
        text_repeats: int = 1,
    ) -> Tensor:
        """One pass -> [B, F, out_channels, H, W] in the latents' dtype, what it stands for is `config.prediction`.

        timestep_BF: 1000 sigma, float, [B, F] or [B, 1] (one level for all frames).
        rope: cosines and sines of the frames, each [T, K/2]; the cache's own by default.
        text: its G groups divide the frames evenly and in order; with `text_repeats` = R the frames are R such
        sequences one after the other (teacher forcing: 2).
        """
        if self.captures is not None and rope is None and mask is None and text_repeats == 1:
            out = self.captures.run(self, latents_BFCHW, timestep_BF, text, cache)
            if out is not None:
                return out
        if rope is None:
            if cache is None:
                raise ValueError("rope=None: without a cache the caller gives it (streamgen.rope.rope_table)")
            rope = cache.rope()
        F_ = latents_BFCHW.shape[1]
        groups = text.kv[0][0].shape[1]
        if F_ % (groups * text_repeats):
            raise ValueError(f"{F_} frames: must be a multiple of {groups} text groups x {text_repeats} repeats")
        x_BFSD = self.embed(latents_BFCHW)
        level = self._level(timestep_BF, text)
        if level is None:
            e_BFD = self.embed_time(timestep_BF, text, F_ // (groups * text_repeats), text_repeats)
        else:
            e_BFD = level.e_BFD
        call = Call(rope, cache, mask, text_repeats, self.ops, self.attention_backend, level)
        x_BFSD = self.run_layers(x_BFSD, e_BFD, text, call, range(len(self.blocks)))
        return self.unembed(x_BFSD, e_BFD, latents_BFCHW)

    # The parts of `forward`, in order, for those that spread layers over processes.

    def embed(self, latents_BFCHW: Tensor) -> Tensor:
        """Tokens [B, F, S, D]."""
        x_BFSD = self._patchify(latents_BFCHW)
        return x_BFSD if self.place_embedding is None else x_BFSD + self.place_embedding

    def run_layers(self, x_BFSD: Tensor, e_BFD: Tensor, text: TextContext, call: Call, layers: range) -> Tensor:
        """Some consecutive layers. e_BFD: of `embed_time`."""
        e0_BF6D = self._project_time(e_BFD) if call.level is None else call.level.e0_BF6D
        again = self.recomputed_layers if call.cache is None and torch.is_grad_enabled() else 0
        for layer in layers:
            block, rest = self.blocks[layer], (e0_BF6D, text.kv[layer], layer, call)
            if layer < again:  # nothing in a layer is random
                x_BFSD = checkpoint(block, x_BFSD, *rest, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BFSD = block(x_BFSD, *rest)
        return x_BFSD

    def unembed(self, x_BFSD: Tensor, e_BFD: Tensor, latents_BFCHW: Tensor) -> Tensor:
        """The output [B, F, out_channels, H, W]; of `latents_BFCHW` only rows, columns and dtype count."""
        return self._unpatchify(self.head(x_BFSD, e_BFD, self.ops), latents_BFCHW)

    def embed_time(self, timestep_BF: Tensor, text: TextContext, group_frames: int, text_repeats: int) -> Tensor:
        """The time MLP's output e [B, F, D] ([B, 1, D] when one row serves all frames), with the pooled text."""
        e_BFD = self.time_embedding(sinusoid(timestep_BF, self.config.freq_dim).to(self.head.modulation.dtype))
        if text.pooled_BGD is None:
            return e_BFD
        pooled = text.pooled_BGD
        if pooled.shape[1] > 1:
            pooled = pooled.repeat_interleave(group_frames, 1).repeat(1, text_repeats, 1)
        return e_BFD + pooled

    def _level(self, timestep_BF: Tensor, text: TextContext) -> Level | None:
        """Kept with the prompt, for a stream alone on a CPU: on a GPU a recorded pass makes it without the host."""
        alone = timestep_BF.numel() == 1 and (text.pooled_BGD is None or text.pooled_BGD.shape[1] == 1)
        if text.levels is None or not alone or torch.compiler.is_compiling() or torch.is_grad_enabled():
            return None
        if timestep_BF.device.type != "cpu":
            return None
        timestep = float(timestep_BF)
        if timestep not in text.levels:
            e_BFD = self.embed_time(timestep_BF, text, 1, 1)
            text.levels[timestep] = Level(e_BFD, self._project_time(e_BFD), {})
        return text.levels[timestep]

    def _project_time(self, e_BFD: Tensor) -> Tensor:
        return self.time_projection(e_BFD).unflatten(2, (6, -1))

    def _patchify(self, latents_BFCHW: Tensor) -> Tensor:
        """Conv3d with stride = kernel, as one matrix product; tokens run row, column (column fastest)."""
        weight = self.patch_embedding.weight
        _, rows, columns = self.config.patch
        x = latents_BFCHW.to(weight.dtype).unflatten(4, (-1, columns)).unflatten(3, (-1, rows))
        x = x.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)  # [B, F, (row, column), (C, patch)]
        return linear(x, weight.flatten(1), self.patch_embedding.bias)

    def _unpatchify(self, out_BFSD: Tensor, latents_BFCHW: Tensor) -> Tensor:
        """A token's vector is laid out (patch row, patch column, channel), channel fastest."""
        _, rows, columns = self.config.patch
        H, W = latents_BFCHW.shape[-2:]
        x = out_BFSD.unflatten(3, (rows, columns, -1)).unflatten(2, (H // rows, W // columns))
        x = x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5).flatten(3, 4)
        return x.to(latents_BFCHW.dtype)
