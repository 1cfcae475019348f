"""Which attention backend a model gets on a device: on a GPU the fastest, for its own shapes, of those that are right.

Which one that is depends on the GPU, on what is installed and on the shapes, so it is measured: once, and kept on disk
for that device, those versions and those shapes, so that the same stream comes out the same in the next process. On a
CPU "auto" is a rule of its own (`streamgen.attention`).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch

from streamgen import __version__
from streamgen.attention import BACKENDS, attend
from streamgen.clocks import clock_of
from streamgen.errors import UserError
from streamgen.findings import device_name, read_found, write_found
from streamgen.geometry import VideoGeometry
from streamgen.kernel_choice import kernel_versions

STREAMED = ("sdpa", "cudnn", "flash3", "xformers", "triton")
"""Those that differ where nothing is masked."""
NAMES = ("auto", "math", *STREAMED)
"""What a stream may ask for; the others of `streamgen.attention` are for training."""
TOLERANCES = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
"""Largest difference from `math` in float32, over its largest value."""
REPEATS = 20
if TYPE_CHECKING:
    from streamgen.transformer_config import TransformerConfig

log = logging.getLogger("streamgen")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Of one layer's self-attention over a full cache."""

    num_heads: int
    head_dim: int
    query_tokens: int
    key_tokens: int
    dtype: torch.dtype


def streamed_shape(config: TransformerConfig, g: VideoGeometry, window_frames: int, dtype: torch.dtype) -> Shape:
    """Of a pass over a full cache."""
    return Shape(
        num_heads=config.num_heads,
        head_dim=config.head_dim,
        query_tokens=g.tokens(g.block_frames),
        key_tokens=g.tokens(window_frames),
        dtype=dtype,
    )


def check_attention(name: str, device: torch.device, dtype: torch.dtype) -> None:
    """UserError for a name that is none of NAMES, or a backend that cannot run on the device in the dtype."""
    if name not in NAMES:
        raise UserError(f"unknown attention {name!r}; there are: {', '.join(NAMES)}")
    if problem := BACKENDS[name].problem(device, dtype):
        raise UserError(f"attention {name!r} cannot run here: {problem}; use 'auto'")


def attention_for(name: str, device: torch.device, shape: Shape, *, kernels: bool = True) -> str:
    """The backend of a model on a device: `name`, or what "auto" comes to there. kernels: ours may be among them."""
    if name != "auto" or device.type != "cuda":
        return name
    return fastest(device, shape, tuple(one for one in STREAMED if kernels or one != "triton"))


def usable(device: torch.device, dtype: torch.dtype, among: Iterable[str] = STREAMED) -> list[str]:
    """The backends that can run on the device in the dtype."""
    return [name for name in among if not BACKENDS[name].problem(device, dtype)]


def fastest(device: torch.device, shape: Shape, among: tuple[str, ...] = STREAMED) -> str:
    """Of the backends that can run and are right on the device; measured once, then read from disk."""
    names = usable(device, shape.dtype, among)
    identity = {
        "streamgen": __version__,
        "torch": torch.__version__,
        "device": device_name(device),
        "attention": f"{shape.num_heads}x{shape.query_tokens}x{shape.key_tokens}x{shape.head_dim} {shape.dtype}",
        "among": " ".join(f"{name} {_version(name)}".strip() for name in names),
    }
    known = {name: ms for name, ms in (read_found("attention", identity) or {}).items() if isinstance(ms, float)}
    if not known:
        log.info("measuring attention on %s: once for this device and these shapes", identity["device"])
        known = {name: ms for name, ms in measure(device, shape, names).items() if isinstance(ms, float)}
        write_found("attention", identity, known)
    return min(known, key=lambda name: known[name], default="auto")


def _version(name: str) -> str:
    """Of what a backend runs, "" where that is torch: another one is measured again."""
    if name == "triton":
        return " ".join(kernel_versions().values())
    if not BACKENDS[name].package:
        return ""
    try:
        return version(BACKENDS[name].package)
    except PackageNotFoundError:  # installed under another name
        return ""


def measure(device: torch.device, shape: Shape, names: list[str]) -> dict[str, float | str]:
    """Median milliseconds of each, or how it is wrong."""
    q, k, v = (
        torch.randn(1, shape.num_heads, tokens, shape.head_dim, device=device, dtype=shape.dtype)
        for tokens in (shape.query_tokens, shape.key_tokens, shape.key_tokens)
    )
    found: dict[str, float | str] = {}
    for name in names:
        right, line = check(name, device, shape.dtype, shape.head_dim)
        if right:
            try:
                found[name] = _median_ms(lambda name=name: attend(q, k, v, None, name), device)  # type: ignore[misc]
                continue
            except Exception as problem:  # noqa: BLE001 (too large for it: the line says what)
                line = _said(problem)
        log.warning("attention %s is not used on %s: %s", name, device, line)
        found[name] = line
    return found


def check(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 40) -> tuple[bool, str]:
    """Does a backend equal `math` in float32, unmasked, for few tokens of odd counts? -> (right, how far off or why
    not).
    """
    random = torch.Generator(device).manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, head_dim, generator=random, device=device).to(dtype) for n in (24, 70, 70))
    with torch.no_grad():
        wanted = attend(q.float(), k.float(), v.float(), backend="math")
        try:
            error = float((attend(q, k, v, backend=name).float() - wanted).abs().max() / wanted.abs().max())
        except Exception as problem:  # noqa: BLE001 (what does not compile raises anything: the line says what)
            return False, _said(problem)
    limit = TOLERANCES[dtype]
    return error <= limit, f"differs by {error:.1e}, {'within' if error <= limit else 'above'} {limit:.1e}"


def _said(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


@torch.no_grad()
def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    clock = clock_of(device)
    times = []
    for _ in range(3 + REPEATS):
        start = clock.mark()
        run()
        end = clock.mark()
        clock.reach(end)
        times.append(clock.ms(start, end))
    return statistics.median(times[3:])
