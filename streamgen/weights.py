"""Component folders of a model: config.json beside diffusion_pytorch_model.safetensors, as diffusers lays them out.

Every failure is a UserError that names file and tensors: missing, truncated, of another model, of another shape.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from streamgen.checkpoints.tensors import LazyTensors, open_safetensors, save_safetensors, shards
from streamgen.errors import UserError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"
MAX_SHARD_BYTES = 10 * 10**9

Config = TypeVar("Config")


@contextmanager
def user_errors(what: str) -> Iterator[None]:
    """A ValueError or TypeError about what the caller gave is the caller's mistake."""
    try:
        yield
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{what}: {error}") from error


# Files.


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the body succeeds and goes away if it does not."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    finally:
        if temporary.parent.is_dir():
            temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path} is missing; the model folder is not complete") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds a JSON {type(values).__name__}; it must be an object")
    return values


def build_config(cls: Callable[..., Config], values: Mapping[str, Any], where: str) -> Config:
    """The dataclass `cls` from JSON values ("_..." keys are notes). UserError names unknown and missing keys."""
    known = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    given = {name: value for name, value in values.items() if not name.startswith("_")}
    for name in given:
        if name not in known:
            raise UserError(f"{where}: unknown key {name!r}{nearest(name, known)}")
    required = [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in given
    ]
    if required:
        raise UserError(f"{where}: missing {', '.join(required)}")
    with user_errors(where):
        return cls(**given)


def save_component(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write one component; each file appears whole or not at all."""
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt"},
        )
    write_json(folder / CONFIG_FILE, config)


def write_component(
    folder: Path, config: Mapping[str, Any], tensors: LazyTensors, *, most_bytes: int = MAX_SHARD_BYTES
) -> None:
    """The same for tensors that are read one after the other; above `most_bytes` in several files with an index."""
    groups = list(shards(tensors, most_bytes))
    if len(groups) == 1:
        with replacing(folder / WEIGHTS_FILE) as temporary:
            save_safetensors(temporary, tensors)
    else:
        stem, suffix = WEIGHTS_FILE.rsplit(".", 1)
        weight_map = {}
        for number, group in enumerate(groups, 1):
            name = f"{stem}-{number:05d}-of-{len(groups):05d}.{suffix}"
            with replacing(folder / name) as temporary:
                save_safetensors(temporary, group)
            weight_map.update(dict.fromkeys(group, name))
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": tensors.nbytes}, "weight_map": weight_map})
    write_json(folder / CONFIG_FILE, config)


def load_component(folder: Path) -> tuple[dict[str, Any], LazyTensors]:
    """(config, tensors); a tensor is read from the file when it is asked for."""
    config = read_json(folder / CONFIG_FILE)
    index = folder / INDEX_FILE
    return config, open_safetensors(index if index.is_file() else folder / WEIGHTS_FILE)


def load_tensors(path: Path) -> LazyTensors:
    """The tensors of a safetensors file; each is read when it is asked for."""
    return open_safetensors(path)


# Trees of values and tensors in one file: tensors by path ("cache/k"), the rest as JSON in the file's metadata.


def save_tree(tree: Mapping[str, Any], path: Path, mark: str) -> None:
    """Write nested mappings of JSON values and tensors to one safetensors file, whole or not at all."""
    tensors: dict[str, Tensor] = {}

    def strip(branch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        values = {}
        for name, value in branch.items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value.cpu().contiguous()
            else:
                values[name] = strip(value, f"{prefix}{name}/") if isinstance(value, Mapping) else value
        return values

    metadata = {mark: json.dumps(strip(tree, ""))}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_tree(path: Path, mark: str) -> dict[str, Any]:
    """Read a file of `save_tree`; UserError for any other file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if mark not in metadata:
                raise UserError(f"{path} is a safetensors file without {mark!r} in its metadata: something else")
            tree = json.loads(metadata[mark])
            for name in file.keys():  # noqa: SIM118 (not a dict)
                *parents, leaf = name.split("/")
                branch = tree
                for parent in parents:
                    branch = branch.setdefault(parent, {})
                branch[leaf] = file.get_tensor(name)
            return tree
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is missing, truncated or not a safetensors file: {error}") from error


# Tensors.


class Unfilled(TorchFunctionMode):
    """Modules built inside keep their memory as it comes, because their weights are loaded next.

    As quick as the meta device, without the 1.5 s that its first arithmetic spends on imports.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init" or func in _FILLS:
            return args[0] if args else named["tensor"]
        return func(*args, **named)


_FILLS = (Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_)


def load_weights(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    where: str,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Give `module` these tensors themselves (no copy), floating ones as `dtype`; lazy ones are read one by one."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    check_tensors(expected, shapes_of(tensors), where)
    placed = {}
    for name in expected:
        tensor = tensors[name]
        placed[name] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    module.load_state_dict(placed, assign=True)


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Name -> shape; lazy tensors are not read for it."""
    if isinstance(tensors, LazyTensors):
        return tensors.shapes
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str) -> None:
    """UserError that lists missing, foreign and wrong-shaped tensors, by group of layers."""
    missing = [name for name in expected if name not in found]
    foreign = [name for name in found if name not in expected]
    shapes = [
        f"{name} is {list(found[name])}, its config says {list(expected[name])}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing: {_grouped(missing)}")
    if foreign:
        problems.append(
            f"{len(foreign)} tensors belong to another model: {_grouped(foreign)}{nearest(foreign[0], expected)}"
        )
    if shapes:
        problems.append(f"{len(shapes)} tensors have another shape: {_some(shapes)}")
    if problems:
        raise UserError(f"{where}: " + "; ".join(problems))


def _grouped(names: Iterable[str]) -> str:
    """Tensors that differ in the layer's number only are one item: blocks.*.ffn.0.weight x12."""
    groups = Counter(re.sub(r"\.\d+\.", ".*.", name, count=1) for name in names)
    return _some([f"{name} x{count}" if count > 1 else name for name, count in groups.items()])


def _some(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (nearest known to {name!r}: {close[0]})" if close else ""


# Identity.

FINGERPRINTED = (".json", ".safetensors", ".pt", ".pth")
WHOLE_FILE_BYTES = 256 * 2**20
SAMPLE_BYTES = 2**20


def fingerprint(folder: Path) -> str:
    """sha256 of what a model folder computes: its JSON and weights files, by relative name (`fingerprint_files`)."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in FINGERPRINTED)
    return fingerprint_files({path.relative_to(folder).as_posix(): path for path in paths})


def fingerprint_files(files: Mapping[str, Path]) -> str:
    """sha256 of files under the names given to them, in this order.

    Files above 256 MiB count by their size, their first MiB (the header) and 64 samples of 1 MiB.
    """
    digest = hashlib.sha256()
    for name, path in files.items():
        size = path.stat().st_size
        digest.update(f"{name} {size}\n".encode())
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            for sample in range(65):
                file.seek(sample * (size - SAMPLE_BYTES) // 64)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
