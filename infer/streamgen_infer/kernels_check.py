"""Triton kernels on this device: is each equal to its reference, and how near to the device's limit does it run.

`streamgen doctor --kernels` shows the first. A number of a kernel that failed its check is never given.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from streamgen.attention import BACKENDS
from streamgen.attention_choice import check, usable
from streamgen.errors import UserError
from streamgen.ops import kernel_cases, kernels_problem

REPEATS = 20
COPY_BYTES = 1 << 30
PRODUCT_WIDTH = 8192


@dataclass(frozen=True, slots=True)
class Row:
    """One kernel (or attention backend) in one dtype, compared with its reference."""

    name: str
    dtype: str
    ok: bool
    found: str


@dataclass(frozen=True, slots=True)
class Speed:
    """One kernel, timed, beside what the same device reached in the same process."""

    name: str
    dtype: str
    ms: float
    unit: str
    """"bytes/s" or "FLOP/s"."""
    rate: float
    roof: float

    @property
    def share(self) -> float:
        """Of the roof."""
        return self.rate / self.roof


def usable_device(name: str | None = None) -> torch.device:
    """The device that kernels are checked on: a GPU, or the CPU by Triton's interpreter.

    UserError where kernels cannot run. The interpreter is chosen by a variable that triton reads when it is first
    imported: this sets it, so it must come before anything that imports triton.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise UserError(f"--device {name!r} is no device; there are: cpu, cuda, cuda:N") from error
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= max(1, torch.cuda.device_count()):
        raise UserError(f"--device {name!r}: kernels are checked on a CUDA device that is here, or on cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name!r}: there is no CUDA device; --device cpu takes Triton's interpreter")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        if "triton" in sys.modules:
            raise UserError("triton is imported already, for a GPU: set TRITON_INTERPRET=1 and start again")
        os.environ["TRITON_INTERPRET"] = "1"
    if problem := kernels_problem():
        raise UserError(f"the Triton kernels cannot be checked: {problem}")
    return device


def check_kernels(device: torch.device) -> Iterator[Row]:
    """Every kernel and every attention backend against its reference, small, in the dtypes of the device."""
    for dtype in _dtypes(device):
        for case in kernel_cases(device, dtype):
            yield Row(case.name, _name(dtype), *case.check())
        yield from _check_attention(device, dtype)


def _dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The interpreter's float32 is torch's; its bfloat16 is truncated, which says nothing about a kernel."""
    if device.type == "cpu":
        return (torch.float32, torch.float16)
    return (torch.bfloat16, torch.float32)


def _check_attention(device: torch.device, dtype: torch.dtype) -> Iterator[Row]:
    """The backends of `streamgen.attention` that can run here, without a mask, against `math` in float32."""
    for name in usable(device, dtype, BACKENDS):
        yield Row(f"attention {name}", _name(dtype), *check(name, device, dtype))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Speed.


def measure_kernels(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Iterator[Row | Speed]:
    """Each kernel on one layer of Wan 1.3B: a `Speed` if it is right there, else the `Row` that says how it is wrong.

    Bytes are those that must be read and written, operations those of the products. Roofs are measured here: a copy of
    1 GiB, and square products of 8192 by cuBLAS in the same number format. UserError for a device other than a GPU.
    """
    if device.type != "cuda":
        raise UserError(f"kernels are timed on a CUDA device, not on {device}: Triton's interpreter has no speed")
    roofs: dict[str, float] = {}
    for case in kernel_cases(device, dtype, large=True):
        if case.work == 0:
            continue
        ok, found = case.check()
        if not ok:
            yield Row(case.name, _name(dtype), False, f"{found}: not timed")
            continue
        if case.roof not in roofs:
            roofs[case.roof] = _roof(case.roof, device, dtype)
        ms = device_ms(case.kernel, device)
        unit = "bytes/s" if case.roof == "bytes" else "FLOP/s"
        yield Speed(case.name, _name(dtype), ms, unit, 1e3 * case.work / ms, roofs[case.roof])


def device_ms(run: Callable[[], object], device: torch.device) -> float:
    """Median milliseconds between events around single calls; the level-2 cache is flushed before each."""
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    for _ in range(3):
        run()
    times = []
    for _ in range(REPEATS):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _roof(kind: str, device: torch.device, dtype: torch.dtype) -> float:
    """Bytes/s of a copy, or FLOP/s of a product."""
    if kind == "bytes":
        source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        return 2e3 * COPY_BYTES / device_ms(lambda: target.copy_(source), device)
    n = PRODUCT_WIDTH
    a, b = (torch.randn(n, n, device=device) for _ in range(2))
    product: Callable[[], object]
    if kind == "int8":
        whole_a, whole_b = (x.mul(40).clamp(-127, 127).to(torch.int8) for x in (a, b))
        product = lambda: torch._int_mm(whole_a, whole_b.t())  # noqa: E731
    elif kind == "float8":
        small_a, small_b = (x.to(torch.float8_e4m3fn) for x in (a, b))
        one = torch.ones((), device=device)
        product = lambda: torch._scaled_mm(small_a, small_b.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
    else:
        float_a, float_b = a.to(dtype), b.to(dtype)
        product = lambda: float_a @ float_b  # noqa: E731
    return 2e3 * n**3 / device_ms(product, device)
