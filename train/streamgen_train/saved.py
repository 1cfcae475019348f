"""Checkpoints as they are read: folders made by torch.distributed.checkpoint (DCP), and the single files of format 1.

Both give the same: `meta` (plain data), `shapes` by flat name, and tensors on request. Flat names:
    modules/MODULE.TENSOR       state_dict of a module, its trained parameters as fp32 masters
    ema/MODULE.PARAMETER        averages, fp32
    optim/adamw/MODULE.PARAMETER/MOMENT    optim/muon/MODULE.PARAMETER
    objective/...               tensors in the state of the objective
    base/MODULE.PARAMETER       in a folder of its own: weights that LoRA leaves as they are
"""

from __future__ import annotations

import json
import pickle
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path, PosixPath
from typing import IO, Any

import torch
from torch import Tensor

from streamgen.errors import UserError
from streamgen.parallel.tensors import like
from streamgen_train.plain import decode, tensor_names

FORMAT, FILE_FORMAT = 2, 1
META_FILE, INDEX_FILE = "meta.json", ".metadata"
BASE = "base"
"""Folder beside the checkpoints of a LoRA run, with the weights that stay as they are."""


class Saved(ABC):
    """A checkpoint that was opened; nothing large is read yet (format 1: everything)."""

    path: Path
    meta: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @abstractmethod
    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill these tensors, by flat name; of one in shards each process reads its own."""

    @abstractmethod
    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, whole, on the CPU."""

    @abstractmethod
    def objective_state(self, rank: int, count: int) -> dict[Any, Any]:
        """The objective's state for one of `count` processes: of microbatches (integer keys) its own ones."""

    def base(self) -> SavedFolder | None:
        """The frozen weights (`base/...`) that adapters belong to."""
        return None

    def names(self, prefix: str) -> list[str]:
        """Flat names that begin so."""
        return [name for name in self.shapes if name.startswith(prefix)]


def of_process(key: object, rank: int, count: int) -> bool:
    """Does this entry of an objective's state go to that process?"""
    return type(key) is not int or key % count == rank


class SavedFolder(Saved):
    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.meta = json.loads((path / META_FILE).read_text())
            if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
                raise UserError(f"{path} is not a training checkpoint of format {FORMAT}")
            index = _read_index(path)
            self._dtypes = {name: entry.properties.dtype for name, entry in index.state_dict_metadata.items()}
            self.shapes = {name: tuple(entry.size) for name, entry in index.state_dict_metadata.items()}
        except UserError:
            raise
        except (OSError, ValueError, EOFError, AttributeError, pickle.UnpicklingError) as error:
            raise _unreadable(path, error) from error

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        from torch.distributed.checkpoint.api import CheckpointException
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.state_dict_loader import load

        class Reader(FileSystemReader):
            def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
                return _read_index(Path(str(self.path)))

        targets = {name: tensor.detach() for name, tensor in tensors.items()}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(targets, storage_reader=Reader(self.path), no_dist=True)
        except (CheckpointException, RuntimeError, OSError) as error:
            raise _unreadable(self.path, first_failure(error)) from error

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(self.shapes[name], dtype=self._dtypes[name]) for name in names}
        self.read_into(tensors)
        return tensors

    def base(self) -> SavedFolder | None:
        lora = self.meta.get("lora")
        if lora is None:
            return None
        path = self.path.parent / BASE
        if not path.is_dir():
            raise UserError(f"{self.path} holds LoRA adapters, and the weights that they belong to are not in {path}")
        base = SavedFolder(path)
        if base.meta["fingerprint"] != lora["base"]:
            raise UserError(f"{path} holds other weights than those that the LoRA adapters of {self.path} belong to")
        return base

    def objective_state(self, rank: int, count: int) -> dict[Any, Any]:
        data = {"dict": [entry for entry in self.meta["objective"]["dict"] if of_process(entry[0], rank, count)]}
        found = decode(data, self.read(tensor_names(data)))
        assert isinstance(found, dict)
        return found


class SavedFile(Saved):
    """Format 1: torch.save of nested containers, loaded with weights_only=True."""

    def __init__(self, path: Path) -> None:
        self.path = path
        state = _load_file(path)
        self._tensors = dict(_flat(state))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        updates = state["ema"]["updates"]
        self._objective = state.get("objective", {})
        big = ("modules", "ema", "optim", "objective")
        self.meta = {key: value for key, value in state.items() if key not in big}
        self.meta["ema_updates"] = dict(updates) if isinstance(updates, dict) else {"model": int(updates)}

    def read_into(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in tensors.items():
                tensor.copy_(like(self._tensors[name].to(tensor.device), tensor))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensors[name] for name in names}

    def objective_state(self, rank: int, count: int) -> dict[Any, Any]:
        return {key: value for key, value in self._objective.items() if of_process(key, rank, count)}


def open_saved(path: Path) -> Saved:
    """UserError for what is not a checkpoint."""
    if path.is_dir():
        return SavedFolder(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}")
    return SavedFile(path)


def nested(saved: Saved) -> dict[str, Any]:
    """All of a checkpoint as nested containers: its plain data, `modules`, `ema`, `optim` and `objective`."""
    tensors = saved.read(name for name in saved.shapes if not name.startswith("objective/"))
    modules: dict[str, dict[str, Tensor]] = {}
    adamw: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in _under(tensors, "modules/").items():
        key, name = full_name.split(".", 1)
        modules.setdefault(key, {})[name] = tensor
    for place, tensor in _under(tensors, "optim/adamw/").items():
        full_name, moment = place.rsplit("/", 1)
        adamw.setdefault(full_name, {})[moment] = tensor
    return {
        **{key: value for key, value in saved.meta.items() if key not in ("ema_updates", "objective")},
        "modules": modules,
        "ema": {"updates": saved.meta["ema_updates"], "shadow": _under(tensors, "ema/")},
        "optim": {"adamw": adamw, "muon": _under(tensors, "optim/muon/")},
        "objective": saved.objective_state(0, 1),
    }


def first_failure(error: BaseException) -> BaseException:
    """What went wrong in the process that failed, out of DCP's report about all of them."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if failures else error


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _flat(state: Mapping[str, Any]) -> Iterable[tuple[str, Tensor]]:
    for key, tensors in state["modules"].items():
        yield from ((f"modules/{key}.{name}", tensor) for name, tensor in tensors.items())
    yield from ((f"ema/{name}", tensor) for name, tensor in state["ema"]["shadow"].items())
    yield from ((f"optim/muon/{name}", tensor) for name, tensor in state["optim"]["muon"].items())
    for name, moments in state["optim"]["adamw"].items():
        yield from ((f"optim/adamw/{name}/{moment}", tensor) for moment, tensor in moments.items())


def _load_file(path: Path) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(state, dict) or state.get("format") != FILE_FORMAT:
        raise UserError(f"{path} is not a training checkpoint of format {FILE_FORMAT}")
    return state


def _unreadable(path: Path, error: BaseException) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{path} is not a readable training checkpoint ({reason}); remove it or name another")


def _read_index(path: Path) -> Any:
    """DCP's table of tensors, which is a pickle: only the types that belong in it are let in."""
    from torch.distributed.checkpoint.metadata import StorageMeta

    with open(path / INDEX_FILE, "rb") as file:
        index = _IndexUnpickler(file).load()
    index.storage_meta = StorageMeta()
    return index


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch.distributed.checkpoint.metadata" or (module, name) in (
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
        ):
            return super().find_class(module, name)
        if module.startswith("pathlib"):  # where it was written
            return PosixPath
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"{INDEX_FILE} asks for {module}.{name}, which does not belong there")
