"""Which table of operations a model gets on a device: the Triton kernels where they are proven right, else plain torch.

A kernel that compiles may still be wrong with a driver, a compiler or a GPU that nobody tried. So "auto" compares every
kernel of the table with its reference on the device before the first stream, and keeps what it found on disk for that
device, those versions and those sources.
"""

from __future__ import annotations

import hashlib
import logging
import os
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from streamgen import __version__
from streamgen.errors import UserError
from streamgen.findings import device_name, read_found, write_found
from streamgen.ops import BACKENDS, Ops, kernel_cases, kernel_linear, kernels_problem, select
from streamgen.quantised_linear import Float8Product

OPS = ("auto", *BACKENDS)
NOT_IN_THE_TABLE = ("quantise_rows", "scaled_product")
"""Kernels that no entry of the table runs: the name before the comma of a case."""
FLOAT8 = tuple(f"{name}, float8_e4m3fn" for name in NOT_IN_THE_TABLE)
"""The cases of those that weights in float8 run."""
log = logging.getLogger("streamgen")


def ops_for(name: str, device: torch.device) -> Ops:
    """The table called `name` for a model on a device. UserError for an unknown name, or for one that cannot run there.

    "auto" takes the kernels on a CUDA device, if each equals its reference there; else one line of the log says why.
    """
    if name not in OPS:
        raise UserError(f"unknown ops {name!r}; there are: {', '.join(OPS)}")
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(f"ops 'triton' needs a CUDA device, this model is on {device}; use 'auto' or 'reference'")
    if name != "auto":
        return select(name)
    if device.type != "cuda":
        return select("reference")
    why = untrusted(device)
    if why:
        _say_once(f"plain torch operations on {device}: {why}")
    return select("reference" if why else "triton")


def float8_product(table: Ops, device: torch.device) -> Float8Product | None:
    """What multiplies weights in float8 for a model with this table: the kernels beside the table's, if they are right
    there; else None, which is float32, and one line of the log. UserError where there is no float8 at all.
    """
    if device.type == "mps":
        raise UserError("weights_dtype fp8: mps has no float8; take int8")
    why = "plain torch operations" if table.backend == "reference" else ""
    if not why and device.type == "cuda":
        why = untrusted(device, float8=True)
    if why:
        _say_once(f"weights in float8 are multiplied in float32 on {device} ({why}): that saves memory, not time")
    return None if why else kernel_linear()[1]


def untrusted(device: torch.device, *, float8: bool = False) -> str:
    """Why the kernels (of the table, or of products of float8) are not to be used on a device, "" if each is right.
    Found once, then read from disk.
    """
    if problem := kernels_problem():
        return problem
    identity = {**kernel_versions(), "device": device_name(device)}
    kind = "float8" if float8 else "kernels"
    known = read_found(kind, identity)
    if known is None:
        log.info("checking the kernels on %s: once for this device and these versions", identity["device"])
        known = _failures(device, float8)
        write_found(kind, identity, known)
    return "; ".join(f"the kernel {name} is not right here ({found})" for name, found in known.items())


def _failures(device: torch.device, float8: bool) -> dict[str, str]:
    """Kernel and dtype -> how it is wrong, of those that are."""
    asked = []
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for case in kernel_cases(device, dtype):
            in_table = case.name.split(",")[0] not in NOT_IN_THE_TABLE
            if case.name in FLOAT8 if float8 else in_table:
                asked.append((f"{case.name} in {str(dtype).removeprefix('torch.')}", case))
    found = {}
    for done, (name, case) in enumerate(asked, 1):
        right, line = case.check()  # compiles the kernel: seconds, where it was never run
        if not right:
            found[name] = line
        log.info("kernels compiled and compared: %s", name, extra={"done": done, "of": len(asked)})
    return found


@cache
def kernel_versions() -> dict[str, str]:
    return {
        "streamgen": __version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "kernels": _sources_hash(),
    }


def _sources_hash() -> str:
    """Of the kernels' code: an edited one is checked again."""
    spec = find_spec("streamgen_kernels")
    assert spec is not None and spec.origin is not None, "a package of ours"
    files = sorted(Path(spec.origin).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


@cache
def _say_once(line: str) -> None:
    log.warning(line)
