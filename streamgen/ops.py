"""The table of fused operations: a name, and the function that runs it.

The transformer calls these names and nothing below them, so that a backend can bring faster ones: "reference" is plain
torch, "triton" the kernels of `streamgen_kernels`, for CUDA devices. This file is the only door to that package.
Letters: B batch, F frames, S tokens of a frame, T = F S tokens, N heads, D width, K = D / N head width.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamgen import flow, noise
from streamgen.cache.slots import Turn
from streamgen.cached_attention import AttendCached, CacheKernels, Projected, by_parts, fused
from streamgen.errors import UserError
from streamgen.rope import apply_rope

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streamgen_kernels.cases import Case


def layer_norm_modulate(x_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float) -> Tensor:
    """LN(x) (1 + scale) + shift, without affine weights; shift and scale are one row per frame, or one for all."""
    width = x_BFSD.shape[-1:]
    if scale_BF1D.numel() == width[0]:  # one row for everything: the norm's own kernel applies it in the same pass
        return F.layer_norm(x_BFSD, width, (1 + scale_BF1D).view(width), shift_BF1D.reshape(width), eps)
    return torch.addcmul(shift_BF1D, F.layer_norm(x_BFSD, width, eps=eps), 1 + scale_BF1D)


def gate_residual(x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor) -> Tensor:
    """x + gate y."""
    return torch.addcmul(x_BFSD, y_BFSD, gate_BF1D)


def residual_norm(
    x_BFSD: Tensor, y_BFSD: Tensor, gate_BF1D: Tensor, norm: nn.LayerNorm | nn.Identity
) -> tuple[Tensor, Tensor]:
    """x' = x + gate y -> (x', norm(x'))."""
    x_BFSD = gate_residual(x_BFSD, y_BFSD, gate_BF1D)
    return x_BFSD, norm(x_BFSD)


def residual_modulate(
    x_BFSD: Tensor, y_BFSD: Tensor, shift_BF1D: Tensor, scale_BF1D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x' = x + y -> (x', `layer_norm_modulate` of x')."""
    x_BFSD = x_BFSD + y_BFSD
    return x_BFSD, layer_norm_modulate(x_BFSD, shift_BF1D, scale_BF1D, eps)


def rms_norm(x_BTD: Tensor, weight_D: Tensor | None, eps: float, num_heads: int) -> Tensor:
    """RMSNorm over the whole width, all heads jointly (none if the weight is None), then heads: [B, N, T, K]."""
    if weight_D is not None:
        x_BTD = F.rms_norm(x_BTD, x_BTD.shape[-1:], weight_D, eps)
    return x_BTD.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def rms_norm_rope(
    x_BTD: Tensor, weight_D: Tensor | None, eps: float, num_heads: int, cos_TK: Tensor, sin_TK: Tensor
) -> Tensor:
    """`rms_norm`, then the rotation of `streamgen.rope.apply_rope`."""
    return apply_rope(rms_norm(x_BTD, weight_D, eps, num_heads), cos_TK, sin_TK)


def turn_keys(k_BNSK: Tensor, cos_SK: Tensor, sin_SK: Tensor, out_BNSK: Tensor) -> None:
    """Rotates stored keys into `out_BNSK`."""
    out_BNSK.copy_(apply_rope(k_BNSK, cos_SK, sin_SK))


_attend_by_parts = by_parts(rms_norm, rms_norm_rope)


def attend_cached(cache: Any, layer: int, projected: Projected, mask: Tensor | None, backend: str) -> Tensor:
    """A streamed block's self-attention over its cache, [B, N, T, K] (`streamgen.cached_attention`)."""
    return _attend_by_parts(cache, layer, projected, mask, backend)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU, tanh form: x/2 (1 + tanh(u)) = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3).

    Compiled code takes the sigmoid: a third of the time of tanh on a CPU, forward and backward, and equal to 5e-7.
    """
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(x * (1.5957691216057308 + 0.07135481627159637 * x * x))
    return F.gelu(x, approximate="tanh")


def cell_noise(seeds: Sequence[int], block: int, step: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Of one cell of each stream, float32 [B, *shape] (`streamgen.noise.cell_noise`)."""
    return torch.stack([noise.cell_noise(seed, block, step, shape, device=device) for seed in seeds])


def renoise_step(
    out_BFCHW: Tensor,
    latents_BFCHW: Tensor,
    sigma: float,
    sigma_next: float,
    prediction: flow.Prediction,
    seeds: Sequence[int],
    block: int,
    step: int,
) -> Tensor:
    """The model's output for latents at level `sigma` -> latents at `sigma_next`, with the noise of the cells
    (seed, block, step) of the rows.
    """
    x0 = flow.to_x0(out_BFCHW, latents_BFCHW, sigma, prediction)
    eps = cell_noise(seeds, block, step, tuple(latents_BFCHW.shape[1:]), latents_BFCHW.device)
    return flow.renoise(x0, eps, sigma_next)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ops:
    """One function per operation; equal signatures in every backend."""

    layer_norm_modulate: Callable[[Tensor, Tensor, Tensor, float], Tensor] = layer_norm_modulate
    gate_residual: Callable[[Tensor, Tensor, Tensor], Tensor] = gate_residual
    residual_norm: Callable[[Tensor, Tensor, Tensor, nn.LayerNorm | nn.Identity], tuple[Tensor, Tensor]] = residual_norm
    residual_modulate: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = residual_modulate
    rms_norm: Callable[[Tensor, Tensor | None, float, int], Tensor] = rms_norm
    rms_norm_rope: Callable[[Tensor, Tensor | None, float, int, Tensor, Tensor], Tensor] = rms_norm_rope
    attend_cached: AttendCached = attend_cached
    turn_keys: Turn = turn_keys
    gelu_tanh: Callable[[Tensor], Tensor] = gelu_tanh
    cell_noise: Callable[[Sequence[int], int, int, tuple[int, ...], torch.device], Tensor] = cell_noise
    renoise_step: Callable[[Tensor, Tensor, float, float, flow.Prediction, Sequence[int], int, int], Tensor] = (
        renoise_step
    )

    def active(self) -> dict[str, str]:
        """What runs: {operation: module that implements it}."""
        return {field.name: getattr(self, field.name).__module__ for field in fields(self)}

    @property
    def backend(self) -> str:
        """The name of BACKENDS that this is, roughly: "reference" where everything is plain torch."""
        return "reference" if set(self.active().values()) == {__name__} else "triton"

    @property
    def places_keys(self) -> bool:
        """Does `attend_cached` write the ring by slots that it reads on the device? (`streamgen.capture`)"""
        return self.attend_cached is not attend_cached


def kernels_problem() -> str:
    """Why the Triton kernels cannot run in this process, "" if they can. Does not import triton."""
    if find_spec("triton") is None:
        return "triton is not installed (pip install 'streamgen[cuda]'; Linux only)"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device"
    return ""


def _check_kernels(what: str, instead: str) -> None:
    if problem := kernels_problem():
        raise UserError(f"{what} cannot run here: {problem}; use {instead}")


def _triton() -> Ops:
    _check_kernels("the ops backend 'triton'", "'reference'")
    from streamgen_kernels.attention import ring_attention
    from streamgen_kernels.gate_residual import gate_residual, residual_modulate, residual_norm
    from streamgen_kernels.gelu import gelu_tanh
    from streamgen_kernels.noise import noise_of_streams
    from streamgen_kernels.norm_modulate import norm_modulate
    from streamgen_kernels.norm_rope import norm_rope
    from streamgen_kernels.norm_rope_store import norm_rope_store
    from streamgen_kernels.renoise import renoise_streams
    from streamgen_kernels.ring_rope import ring_rope

    kernels = CacheKernels(norm_rope=norm_rope, store=norm_rope_store, ring_attention=ring_attention, turn=ring_rope)
    return Ops(
        layer_norm_modulate=norm_modulate,
        gate_residual=gate_residual,
        residual_norm=residual_norm,
        residual_modulate=residual_modulate,
        rms_norm=norm_rope,
        rms_norm_rope=norm_rope,
        attend_cached=fused(kernels),
        turn_keys=ring_rope,
        gelu_tanh=gelu_tanh,
        cell_noise=noise_of_streams,
        renoise_step=renoise_streams,
    )


def kernel_attention() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The kernel of the attention backend 'triton': (q, k, v) -> softmax(q k^T / sqrt(K)) v, forward only."""
    _check_kernels("the attention backend 'triton'", "'auto' or 'sdpa'")
    from streamgen_kernels.attention import attend

    return attend


def kernel_linear() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """(rows -> codes and scales, product of rows by a weight of codes): `streamgen_kernels.quantise` and `.linear`."""
    _check_kernels("products of float8", "the weights' own dtype")
    from streamgen_kernels.linear import linear
    from streamgen_kernels.quantise import quantise_rows

    return quantise_rows, linear


def kernel_cases(device: torch.device, dtype: torch.dtype, *, large: bool = False) -> "Iterator[Case]":
    """Every kernel with its reference on an example (`streamgen_kernels.cases`), small or of one layer of Wan 1.3B."""
    _check_kernels("the Triton kernels", "another device")
    from streamgen_kernels.cases import SMALL, WAN_1_3B, cases

    return cases(device, dtype, WAN_1_3B if large else SMALL)


BACKENDS: dict[str, Callable[[], Ops]] = {"reference": Ops, "triton": _triton}


def select(backend: str = "reference") -> Ops:
    """The table of a backend. ValueError for an unknown name, UserError for one that cannot run here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: no such ops backend; choose from {', '.join(BACKENDS)}")
    return BACKENDS[backend]()
