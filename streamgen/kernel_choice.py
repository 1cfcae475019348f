"""Which table of operations a model gets on a device: the Triton kernels where they are proven right, else plain torch.

A kernel that compiles may still be wrong with a driver, a compiler or a GPU that nobody tried. So "auto" compares every
kernel of the table with its reference on the device before the first stream, and keeps what it found on disk for that
device, those versions and those sources.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from streamgen import __version__
from streamgen.checkpoints.places import cache_dir
from streamgen.errors import UserError
from streamgen.ops import BACKENDS, Ops, kernel_cases, kernels_problem, select

OPS = ("auto", *BACKENDS)
NOT_IN_THE_TABLE = ("quantise_rows", "scaled_product")
"""Kernels that no entry of the table runs: the name before the comma of a case."""
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


def untrusted(device: torch.device) -> str:
    """Why the kernels are not to be used on a device, "" if each is right there. Found once, then read from disk."""
    if problem := kernels_problem():
        return problem
    identity = {**_versions(), "device": _device_name(device)}
    file = cache_dir("kernels") / (re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(identity.values())) + ".json")
    known = _read(file, identity)
    if known is None:
        log.info("checking the kernels on %s: once for this device and these versions", identity["device"])
        known = _failures(device)
        _write(file, {**identity, "failures": known})
    return "; ".join(f"the kernel {name} is not right here ({found})" for name, found in known.items())


def _failures(device: torch.device) -> dict[str, str]:
    """Kernel and dtype -> how it is wrong, of those that are."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,):
        for case in kernel_cases(device, dtype):
            if case.name.split(",")[0] in NOT_IN_THE_TABLE:
                continue
            right, line = case.check()
            if not right:
                found[f"{case.name} in {str(dtype).removeprefix('torch.')}"] = line
    return found


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _versions() -> dict[str, str]:
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


def _read(file: Path, identity: dict[str, str]) -> dict[str, str] | None:
    """The failures that were found, None where nothing (readable) was."""
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    same = isinstance(values, dict) and all(values.get(name) == value for name, value in identity.items())
    return values["failures"] if same and isinstance(values.get("failures"), dict) else None


def _write(file: Path, values: dict[str, object]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(values, indent=1))
        temporary.replace(file)
    except OSError as error:
        log.warning("what was found about the kernels cannot be kept (%s): they are checked at every start", error)


@cache
def _say_once(line: str) -> None:
    log.warning(line)
