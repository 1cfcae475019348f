"""Tensors of safetensors files, read when they are asked for, and files written one tensor at a time.

A file is never mapped or held whole: beside the model there is one tensor in memory, whatever the file's size.
"""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from streamgen.errors import UserError

AHEAD_BYTES = 64 * 2**20
OWN_PAGES_BYTES = 2**20
INDEX_SUFFIX = ".safetensors.index.json"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor that can be read."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    """On the CPU, in memory of its own or shared with the file's: look, do not write."""

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor, read anew each time it is asked for; shapes and dtypes are known without reading."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: entry.shape for name, entry in self.entries.items()}

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    def cast(self, dtype: torch.dtype | None) -> LazyTensors:
        """The same with floating tensors as `dtype` (None: as they are)."""
        if dtype is None:
            return self
        return LazyTensors({name: _cast(entry, dtype) for name, entry in self.entries.items()})


def _cast(entry: Entry, dtype: torch.dtype) -> Entry:
    if not entry.dtype.is_floating_point or entry.dtype == dtype:
        return entry
    return Entry(entry.shape, dtype, lambda: entry.read().to(dtype))


def in_memory(tensors: Mapping[str, Tensor]) -> LazyTensors:
    """Tensors that are there already."""
    return LazyTensors({name: Entry(tuple(t.shape), t.dtype, partial(_same, t)) for name, t in tensors.items()})


def _same(tensor: Tensor) -> Tensor:
    return tensor


# Reading.


def open_safetensors(path: Path) -> LazyTensors:
    """The tensors of one file, or of all files of an index (`...safetensors.index.json`). UserError for a bad file."""
    if path.name.endswith(INDEX_SUFFIX):
        return _open_index(path)
    if not path.is_file():
        raise UserError(f"{path} is missing; the checkpoint is not complete")
    try:
        with safe_open(path, "pt"):  # checks the header, and that the file has the size it speaks of
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}); copy or export it again") from error
    header.pop("__metadata__", None)
    return LazyTensors({name: _entry(path, name, spec, 8 + length) for name, spec in header.items()})


def _entry(path: Path, name: str, spec: Mapping[str, Any], base: int) -> Entry:
    if spec["dtype"] not in DTYPES:
        raise UserError(f"{path}: {name} is {spec['dtype']}, which is not read here; known: {', '.join(DTYPES)}")
    dtype, shape = DTYPES[spec["dtype"]], tuple(spec["shape"])
    begin, end = spec["data_offsets"]
    return Entry(shape, dtype, partial(_read, path, base + begin, end - begin, dtype, shape))


def _read(path: Path, offset: int, size: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    memory = _memory(size)
    view = memoryview(memory.numpy())  # type: ignore[arg-type]
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):  # the disk goes on with what comes next while this is copied and cast
            os.posix_fadvise(file.fileno(), offset, size + AHEAD_BYTES, os.POSIX_FADV_WILLNEED)
        file.seek(offset)
        while view:
            count = file.readinto(view)  # at most 2 GiB at once
            if not count:
                raise UserError(f"{path} ended {len(view)} bytes early: it was changed while it was read")
            view = view[count:]
    return memory.view(dtype).view(shape)


def _memory(size: int) -> Tensor:
    """Bytes for a tensor. Large ones come from the system and go back to it whole, in large pages where it has them:

    a heap from which tensors are taken and freed in turn keeps holes of a fifth of a model.
    """
    if size < OWN_PAGES_BYTES:
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _open_index(path: Path) -> LazyTensors:
    try:
        files = json.loads(path.read_text())["weight_map"]
        wanted = {str(name): str(file) for name, file in files.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{path} is no index of safetensors files ({type(error).__name__}: {error})") from error
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(wanted.values()):
        if Path(file).name != file:
            raise UserError(f"{path} names the file {file!r}; files of an index lie beside it")
        entries.update(open_safetensors(path.parent / file).entries)
    missing = [name for name in wanted if name not in entries]
    if missing:
        raise UserError(f"{path} lists {len(missing)} tensors that its files do not hold, the first is {missing[0]}")
    return LazyTensors({name: entries[name] for name in wanted})


# Writing.


def save_safetensors(path: Path, tensors: LazyTensors) -> None:
    """Write one file, one tensor after the other; `path` itself: give it a temporary name (`weights.replacing`)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in tensors.entries.items():
        if entry.dtype not in NAMES:
            raise UserError(f"{name} is {entry.dtype}, which a safetensors file cannot hold")
        header[name] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.nbytes],
        }
        offset += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in tensors.entries:
            _write(file, name, tensors.entries[name])
        file.flush()
        os.fsync(file.fileno())


def _write(file: BinaryIO, name: str, entry: Entry) -> None:
    tensor = entry.read()
    if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
        raise AssertionError(f"{name} was said to be {entry.shape} {entry.dtype}, is {tensor.shape} {tensor.dtype}")
    if tensor.numel():
        raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        file.write(memoryview(raw))  # type: ignore[arg-type]


def shards(tensors: LazyTensors, most_bytes: int) -> Iterable[LazyTensors]:
    """The same tensors in groups of at most so many bytes (a larger tensor is alone)."""
    group: dict[str, Entry] = {}
    size = 0
    for name, entry in tensors.entries.items():
        if group and size + entry.nbytes > most_bytes:
            yield LazyTensors(group)
            group, size = {}, 0
        group[name] = entry
        size += entry.nbytes
    yield LazyTensors(group)
