"""Checkpoints in torch's own format (.pt, .pth): tensors without running what the file holds.

Such a file is a pickle, and a pickle is a program. torch's restricted reader builds tensors and plain containers and
nothing else; what it refuses is refused here, unless the caller trusts the file.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamgen.checkpoints.tensors import LazyTensors, in_memory
from streamgen.errors import UserError


def open_pickle(path: Path, *, trust: bool = False) -> LazyTensors:
    """The tensors of a .pt or .pth file; names of nested mappings are joined by dots. They are mapped, not read."""
    tree = _load(path, trust)
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds a {type(tree).__name__}; a checkpoint is a mapping of names to tensors")
    found = dict(_flat(tree, ""))
    if not found:
        raise UserError(f"{path} holds no tensors; its keys are {', '.join(map(str, list(tree)[:8])) or '(none)'}")
    return in_memory(found)


def _load(path: Path, trust: bool) -> Any:
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    mapped = zipfile.is_zipfile(path)  # older files cannot be mapped
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own storage classes
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError as error:
        if _is_refusal(error):
            raise UserError(
                f"{path} asks to run code while it is read ({_asked_for(error)}) and was not read; if you know where "
                "it comes from, `streamgen convert --trust-pickle` runs it, or ask for a safetensors file"
            ) from error
        raise UserError(f"{path} is truncated or no checkpoint ({_first_line(error)}); copy it again") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(
            f"{path} is truncated or no checkpoint ({type(error).__name__}: {_first_line(error)}); copy it again"
        ) from error


def _is_refusal(error: Exception) -> bool:
    return "Unsupported" in str(error) or "GLOBAL" in str(error)


def _asked_for(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(
        r"`?([\w.]+\.[\w.]+)`? was not an allowed", str(error)
    )
    return found[1] if found else "something that is not a tensor"


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def _flat(tree: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, Tensor]]:
    for key, value in tree.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
