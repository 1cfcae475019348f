"""Every kernel on an example: what runs it, what it must equal, how much work it is. For tests, doctor and bench."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from streamgen_kernels import (
    attention,
    gate_residual,
    gelu,
    linear,
    noise,
    norm_modulate,
    norm_rope,
    norm_rope_store,
    quantise,
    renoise,
    ring_rope,
)

TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
"""Largest difference from the float32 reference over its largest value: a few roundings of the dtype."""
EPS = 1e-6
Run = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel on one set of arguments; every call of `kernel` and `reference` computes the same again."""

    name: str
    kernel: Run
    reference: Run
    """In float32 or better, of the same values."""
    tolerance: float
    """Largest difference allowed, over the largest value of the reference."""
    roof: Literal["bytes", "float", "int8", "float8"]
    """What limits it: memory, or products of the dtype, of int8 or of float8."""
    work: int = 0
    """Bytes that must be read and written, or floating-point operations; 0: not for timing."""

    def error(self) -> float:
        """Runs both -> the largest difference over the largest value of the reference, of the worst output."""
        worst = 0.0
        for out, wanted in zip(self.kernel(), self.reference(), strict=True):
            if out.shape != wanted.shape:
                raise ValueError(f"{self.name} made {list(out.shape)} where {list(wanted.shape)} is right")
            error = float((out.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            worst = max(worst, error if math.isfinite(error) else math.inf)
        return worst

    def check(self) -> tuple[bool, str]:
        """(is it right here?, one line that says by how much, or what it raised)."""
        try:
            error = self.error()
        except Exception as raised:  # noqa: BLE001 (a kernel that does not compile raises anything: the line says what)
            cause: BaseException = raised
            while cause.__cause__ is not None:  # Triton wraps the line that says it
                cause = cause.__cause__
            return False, f"{type(cause).__name__}: {' '.join(str(cause).split())[:300]}"
        if error <= self.tolerance:
            return True, f"differs by {error:.1e}, within {self.tolerance:.1e}"
        return False, f"differs by {error:.1e}, above {self.tolerance:.1e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Of the example; letters as in `common`."""

    batch: int
    frames: int
    grid: tuple[int, int]
    heads: int
    head_dim: int
    window_frames: int
    channels: int
    ffn_dim: int


SMALL = Sizes(batch=2, frames=2, grid=(2, 3), heads=3, head_dim=20, window_frames=5, channels=3, ffn_dim=72)
"""Odd on purpose: nothing is a power of two. Few programs, for the interpreter."""
WAN_1_3B = Sizes(batch=1, frames=3, grid=(30, 52), heads=12, head_dim=128, window_frames=21, channels=16, ffn_dim=8960)
"""One layer of Wan 1.3B at 480 x 832, a block of three latent frames before a window of 21."""


class _Example:
    """Makes the arguments of every case."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.random = torch.Generator(device).manual_seed(0)
        self.width = sizes.heads * sizes.head_dim
        self.tokens = math.prod(sizes.grid)
        self.frame_shape = (sizes.batch, sizes.frames, self.tokens, self.width)
        self.block_tokens = sizes.frames * self.tokens

    def normal(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.random, device=self.device).to(dtype or self.dtype)

    def row(self) -> Tensor:
        return self.normal(self.sizes.batch, self.sizes.frames, 1, self.width)

    def tables(self) -> tuple[Tensor, Tensor]:
        angles = self.normal(self.block_tokens, self.sizes.head_dim // 2, dtype=torch.float32)
        return angles.cos(), angles.sin()

    def ring(self) -> Tensor:
        s = self.sizes
        return self.normal(s.batch, s.heads, s.window_frames * self.tokens, s.head_dim)

    def head_rows(self) -> Tensor:
        return self.normal(self.sizes.batch, self.block_tokens, self.width)


def wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32."""
    return tuple(tensor.float() for tensor in tensors)


def _with_gradients(function: Callable[..., Tensor | tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...]) -> Run:
    """Outputs and the gradients of all inputs, for the same weights of the outputs in every call."""

    def run() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch.enable_grad():
            out = function(*leaves)
        outputs = out if isinstance(out, tuple) else (out,)
        weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view(o.shape).to(o.dtype) for o in outputs]
        return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, weights)

    return run


def _pair(
    name: str,
    kernel: Callable[..., Tensor | tuple[Tensor, Tensor]],
    reference: Callable[..., Tensor | tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    work: int,
) -> Iterator[Case]:
    """An operation forward (timed), and with its gradients."""

    def outputs(function: Callable[..., Tensor | tuple[Tensor, Tensor]], values: tuple[Tensor, ...]) -> Run:
        def run() -> tuple[Tensor, ...]:
            out = function(*values)
            return out if isinstance(out, tuple) else (out,)

        return run

    tolerance = TOLERANCES[inputs[0].dtype]
    forward = outputs(kernel, inputs), outputs(reference, wide(*inputs))
    yield Case(name=name, kernel=forward[0], reference=forward[1], tolerance=tolerance, roof="bytes", work=work)
    yield Case(
        name=f"{name}, gradients",
        kernel=_with_gradients(kernel, inputs),
        reference=_with_gradients(reference, wide(*inputs)),
        tolerance=2 * tolerance,
        roof="bytes",
    )


def cases(device: torch.device | str, dtype: torch.dtype, sizes: Sizes = SMALL) -> Iterator[Case]:
    """Every kernel, one after the other: what one holds can be freed before the next is made."""
    example = _Example(torch.device(device), dtype, sizes)
    yield from _passes(example)
    yield from _stores(example)
    yield from _turns(example)
    yield from _attentions(example)
    yield from _products(example)
    yield from _samplers(example)


def _passes(e: _Example) -> Iterator[Case]:
    x, y = e.normal(*e.frame_shape), e.normal(*e.frame_shape)
    gate, shift, scale = e.row(), e.row(), e.row()
    yield from _pair(
        "norm_modulate",
        lambda x, shift, scale: norm_modulate.norm_modulate(x, shift, scale, EPS),
        lambda x, shift, scale: norm_modulate.reference(x, shift, scale, EPS),
        (x, shift, scale),
        2 * x.nbytes,
    )
    yield from _pair("gate_residual", gate_residual.gate_residual, gate_residual.reference, (x, y, gate), 3 * x.nbytes)
    yield from _pair(
        "gate_residual_norm",
        lambda x, y, gate, shift, scale: gate_residual.gate_residual_norm(x, y, gate, shift, scale, EPS),
        lambda x, y, gate, shift, scale: gate_residual.reference_norm(x, y, gate, shift, scale, EPS),
        (x, y, gate, shift, scale),
        4 * x.nbytes,
    )
    rows, weight, rope, heads = e.head_rows(), e.normal(e.width), e.tables(), e.sizes.heads
    yield from _pair(
        "norm_rope",
        lambda x, w: norm_rope.norm_rope(x, w, EPS, heads, *rope),
        lambda x, w: norm_rope.reference(x, w, EPS, heads, *rope),
        (rows, weight),
        2 * rows.nbytes,
    )
    wide_rows = e.normal(e.sizes.batch * e.block_tokens, e.sizes.ffn_dim)
    yield from _pair("gelu_tanh", gelu.gelu_tanh, gelu.reference, (wide_rows,), 2 * wide_rows.nbytes)


def _places(e: _Example) -> Tensor:
    """A block that wraps round the ring: its last frame first."""
    frames = torch.tensor([*range(e.sizes.window_frames - e.sizes.frames + 1, e.sizes.window_frames), 0])
    places = frames[:, None] * e.tokens + torch.arange(e.tokens)
    return places.flatten().to(e.device, torch.int32).expand(e.sizes.batch, -1)


def _stores(e: _Example) -> Iterator[Case]:
    qkv, ring = (e.head_rows(), e.head_rows(), e.head_rows()), e.ring()
    weights, rope, places = (e.normal(e.width), e.normal(e.width)), e.tables(), _places(e)

    def store(function: Callable[..., Tensor], dtype: torch.dtype, widen: bool) -> Run:
        small = dtype.itemsize == 1
        rings = tuple(torch.zeros_like(ring).to(torch.float32 if widen and not small else dtype) for _ in "kv")
        scales = tuple(torch.zeros_like(ring[..., 0], dtype=torch.float16) for _ in "kv") if small else None
        raw = torch.zeros_like(ring, dtype=torch.float32 if widen else e.dtype)
        values = (wide(*qkv), wide(*weights)) if widen else (qkv, weights)

        def run() -> tuple[Tensor, ...]:
            return function(*values, EPS, rope, places, rings, raw, scales), raw, *rings, *(scales or ())

        return run

    for dtype in (e.dtype, *quantise.LARGEST):
        # A value on the edge of two codes may go either way: one step of int8 is 1/127, of float8 1/14 at the top.
        step = {torch.int8: 1 / 127, torch.float8_e4m3fn: 1 / 14}.get(dtype, 0.0)
        yield Case(
            name="norm_rope_store" + (f", {str(dtype)[6:]}" if dtype.itemsize == 1 else ""),
            kernel=store(norm_rope_store.norm_rope_store, dtype, False),
            reference=store(norm_rope_store.reference, dtype, True),
            tolerance=TOLERANCES[e.dtype] + 1.01 * step,
            roof="bytes",
            work=5 * qkv[0].nbytes + 2 * qkv[0].numel() * dtype.itemsize,  # q, k, v; queries, raw keys; keys, values
        )


def _turns(e: _Example) -> Iterator[Case]:
    """Part of a ring, as the part before a block is."""
    tokens = (e.sizes.window_frames - e.sizes.frames) * e.tokens
    angles = e.normal(tokens, e.sizes.head_dim // 2, dtype=torch.float32)
    keys = e.ring()

    def run(function: Callable[..., None], ring: Tensor) -> Run:
        out = torch.zeros_like(ring)

        def turned() -> tuple[Tensor, ...]:
            function(ring[:, :, -tokens:], angles.cos(), angles.sin(), out[:, :, :tokens])
            return (out,)

        return turned

    yield Case(
        name="ring_rope",
        kernel=run(ring_rope.ring_rope, keys),
        reference=run(ring_rope.reference, keys.float()),
        tolerance=TOLERANCES[e.dtype],
        roof="bytes",
        work=2 * keys[:, :, -tokens:].numel() * keys.itemsize,
    )


def _attentions(e: _Example) -> Iterator[Case]:
    s = e.sizes
    q, block_k, block_v = (e.normal(s.batch, s.heads, e.block_tokens, s.head_dim) for _ in range(3))
    # Row 0 sees all that a full window leaves beside the block, in an order that wraps; later rows a frame less each.
    past = s.window_frames - s.frames
    pages = torch.tensor([[0, *range(past - 1, 0, -1)]] * s.batch, dtype=torch.int32, device=e.device)
    frames = torch.tensor([max(past - b, 0) for b in range(s.batch)], dtype=torch.int32, device=e.device)
    ring_k, ring_v = e.ring(), e.ring()
    seen = s.heads * e.block_tokens * (int(frames.sum()) * e.tokens + s.batch * e.block_tokens)
    for dtype in (e.dtype, *quantise.LARGEST):
        scales: tuple[Tensor | None, Tensor | None] = (None, None)
        rings = (ring_k, ring_v)
        if dtype.itemsize == 1:
            (k, k_scale), (v, v_scale) = (quantise.reference(x, dtype, torch.float16) for x in (ring_k, ring_v))
            rings, scales = (k, v), (k_scale, v_scale)
        yield Case(
            name="ring_attention" + (f", {str(dtype)[6:]}" if dtype.itemsize == 1 else ""),
            kernel=partial(_attend, q, rings, (frames * e.tokens, pages, e.tokens), (block_k, block_v), scales),
            reference=partial(
                _attend_plainly, q.float(), rings, (frames * e.tokens, pages, e.tokens), (block_k, block_v), scales
            ),
            tolerance=TOLERANCES[e.dtype],
            roof="float",
            work=4 * seen * s.head_dim,
        )


Pair = tuple[Tensor, Tensor]
Scales = tuple[Tensor | None, Tensor | None]


def _attend(q: Tensor, rings: Pair, seen: tuple[Tensor, Tensor, int], block: Pair, scales: Scales) -> tuple[Tensor]:
    k, v = block
    lengths, pages, page = seen
    k_scale, v_scale = scales
    out = attention.ring_attention(
        q, *rings, lengths, pages, page, block_k_BNTK=k, block_v_BNTK=v, k_scale_BNS=k_scale, v_scale_BNS=v_scale
    )
    return (out,)


def _attend_plainly(
    q: Tensor, rings: Pair, seen: tuple[Tensor, Tensor, int], block: Pair, scales: Scales
) -> tuple[Tensor]:
    lengths, pages, page = seen
    return (attention.reference(q, *rings, lengths, pages, page, *block, *scales),)


def _products(e: _Example) -> Iterator[Case]:
    x = e.normal(e.sizes.batch * e.block_tokens, e.width)
    weight, bias = e.normal(e.sizes.ffn_dim, e.width, dtype=torch.float32), e.normal(e.sizes.ffn_dim)
    roofs: dict[torch.dtype, Literal["int8", "float8"]] = {torch.int8: "int8", torch.float8_e4m3fn: "float8"}
    for dtype, roof in roofs.items():
        name = str(dtype)[6:]
        xq, x_scale = quantise.reference(x, dtype)
        wq, w_scale = quantise.reference(weight, dtype)
        yield Case(
            name=f"quantise_rows, {name}",
            kernel=partial(quantise.quantise_rows, x, dtype),
            reference=partial(tuple, (xq, x_scale)),
            tolerance=1.01 / (127 if dtype == torch.int8 else 14),
            roof="bytes",
            work=x.nbytes + xq.nbytes + x_scale.nbytes,
        )
        yield Case(
            name=f"scaled_product, {name}",
            kernel=partial(_multiply, xq, x_scale, wq, w_scale, bias, e.dtype),
            reference=partial(_multiply_plainly, xq, x_scale, wq, w_scale, bias),
            tolerance=TOLERANCES[e.dtype],
            roof=roof,
            work=2 * x.shape[0] * weight.numel(),
        )


def _multiply(
    xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor, dtype: torch.dtype
) -> tuple[Tensor]:
    return (linear.scaled_product(xq, x_scale, wq, w_scale, bias, dtype),)


def _multiply_plainly(xq: Tensor, x_scale: Tensor, wq: Tensor, w_scale: Tensor, bias: Tensor) -> tuple[Tensor]:
    return (linear.reference(xq, x_scale, wq, w_scale, bias),)


def _samplers(e: _Example) -> Iterator[Case]:
    s = e.sizes
    shape = (s.frames, s.channels, 2 * s.grid[0], 2 * s.grid[1])
    out, latents = e.normal(s.batch, *shape), e.normal(s.batch, *shape, dtype=torch.float32)
    cells = torch.tensor([[2**32 - 1 - b, 2**31 + b, 10**6 + b, b] for b in range(s.batch)], device=e.device)
    # The noise is made in float64 and rounded once: equal on every device but for a last bit.
    yield Case(
        name="cell_noise",
        kernel=lambda: (noise.cell_noise(cells, shape),),
        reference=lambda: (noise.reference(cells, shape),),
        tolerance=2e-7,
        roof="bytes",
        work=latents.nbytes,
    )
    yield Case(
        name="renoise",
        kernel=lambda: (renoise.renoise(out, latents, 0.9375, 0.8333, cells, flow=True),),
        reference=lambda: (renoise.reference(out, latents, 0.9375, 0.8333, cells, True),),
        tolerance=1e-6,
        roof="bytes",
        work=out.nbytes + 2 * latents.nbytes,
    )
