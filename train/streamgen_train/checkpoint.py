"""Checkpoints of a run: a folder each, written whole or not at all, by all processes together.

`checkpoints/step_XXXXXXXX/` holds what torch.distributed.checkpoint (DCP) writes, each process its part, and
`meta.json`: format, step (steps done), what is not a tensor, and how it was made. Nothing in it depends on the number
of processes or on how they share the weights, so both may change on resume. `best/` is the best one by a validation
number (the same files, linked). saved.py says what is inside and reads it; single files of format 1 are read too.
Random numbers need no state: they are a function of (seed, step), so the data position is the step.

A folder is written under a temporary name and renamed when all processes are done; whatever a kill leaves behind is
put right when the next one is written.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from streamgen.errors import UserError
from streamgen.parallel.processes import ALONE, Processes
from streamgen_train.lora import merged
from streamgen_train.saved import BASE, FORMAT, INDEX_FILE, META_FILE, Saved, first_failure, nested, open_saved

BEST = "best"
_STEP = re.compile(r"step_(\d{8})(\.pt)?")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written (no space, no permission); those before it stand."""


@dataclass(frozen=True, slots=True)
class State:
    """What is to be kept of a run."""

    tensors: Mapping[str, Tensor]
    """By flat name (saved.py)."""
    meta: Mapping[str, Any]
    """Plain data; `step` is in it."""
    base: Mapping[str, Tensor] = field(default_factory=dict)
    """What adapters belong to, by flat name; meta["lora"]["base"] is its fingerprint. Written once for a run."""


def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """step_* of a run, oldest first."""
    folder = checkpoint_dir(run_dir)
    return sorted(p for p in folder.iterdir() if _STEP.fullmatch(p.name)) if folder.is_dir() else []


def is_checkpoint(path: Path) -> bool:
    return path.is_file() or (path / META_FILE).is_file() or (path / INDEX_FILE).is_file()


def run_folder(path: Path) -> Path:
    """The run folder of a run folder or of a checkpoint in it."""
    return path.parent.parent if is_checkpoint(path) else path


def find(path: Path) -> Path:
    """A checkpoint from a checkpoint or a run folder (its newest one)."""
    if is_checkpoint(path):
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"no checkpoint in {path} (looked for {checkpoint_dir(path) / 'step_*'})")
    return found[-1]


def save(run_dir: Path, state: State, *, keep: int, is_best: bool, processes: Processes = ALONE) -> Path:
    """Write step_XXXXXXXX (and best, if it is), then drop all but the newest `keep`. All processes call it together.

    CheckpointError when it cannot be written: nothing of it stays, and the checkpoints before it do.
    """
    folder = checkpoint_dir(run_dir)
    path = folder / f"step_{state.meta['step']:08d}"
    temporary = folder / f".{path.name}.tmp"
    with _clear_words(path, temporary, processes):
        if state.base:
            _save_base(folder, state, processes)
        processes.first_does(lambda: _make_room(folder, path, temporary))
        write_tensors(temporary, state.tensors, processes)
        processes.first_does(lambda: _finish(path, temporary, {"format": FORMAT, **state.meta}, is_best))
        processes.first_does(lambda: _drop_old(run_dir, keep))
    return path


def _save_base(folder: Path, state: State, processes: Processes) -> None:
    """The weights under the adapters, unless they are there."""
    path, temporary = folder / BASE, folder / f".{BASE}.tmp"
    meta = {"format": FORMAT, "fingerprint": state.meta["lora"]["base"]}

    def is_there() -> bool:
        if (path / META_FILE).is_file() and json.loads((path / META_FILE).read_text()) == meta:
            return True
        _make_room(folder, path, temporary)
        return False

    if not processes.first_does(is_there):
        write_tensors(temporary, state.base, processes)
        processes.first_does(lambda: _finish(path, temporary, meta))


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], processes: Processes) -> None:
    """By DCP: of a tensor in shards each process writes its own, of one that all have some process writes it."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp_save(
            {name: tensor.detach() for name, tensor in tensors.items()},
            storage_writer=FileSystemWriter(folder, overwrite=False),
            no_dist=processes.count == 1,
        )


@contextmanager
def _clear_words(path: Path, temporary: Path, processes: Processes) -> Iterator[None]:
    """Failures to write as one CheckpointError, in all processes, with the half folder gone."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (OSError, CheckpointError, CheckpointException) as error:
        if processes.is_first:
            for half in (temporary, temporary.with_name(f".{BASE}.tmp")):
                shutil.rmtree(half, ignore_errors=True)
        if isinstance(error, CheckpointError):
            raise
        raise _failed(path, error) from error


def _failed(path: Path, error: BaseException) -> CheckpointError:
    stands = [str(p) for p in list_checkpoints(path.parent.parent)][-1:]
    return CheckpointError(
        f"could not write {path} ({first_failure(error)}); "
        f"{stands[0] if stands else 'no checkpoint'} stands. Make room, and start again to continue"
    )


def _make_room(folder: Path, path: Path, temporary: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _tidy(folder)
        temporary.mkdir()
    except OSError as error:
        raise _failed(path, error) from error


def _finish(path: Path, temporary: Path, meta: Mapping[str, Any], is_best: bool = False) -> None:
    """Everything is written: give it its name."""
    folder = path.parent
    try:
        with open(temporary / META_FILE, "w") as file:
            json.dump(meta, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        if is_best:
            _link_all(temporary, folder / f".{BEST}.tmp")
            _put(folder / f".{BEST}.tmp", folder / BEST)
            (folder / f"{BEST}.pt").unlink(missing_ok=True)  # of format 1
        _put(temporary, path)
    except OSError as error:
        raise _failed(path, error) from error


def _drop_old(run_dir: Path, keep: int) -> None:
    for old in list_checkpoints(run_dir)[:-keep]:
        _remove(old)


def _put(source: Path, path: Path) -> None:
    """Rename a folder to a name that may be taken; `_tidy` ends what a kill in between leaves."""
    old = path.with_name(f".{path.name}.old")
    if path.exists():
        path.rename(old)
    source.rename(path)
    shutil.rmtree(old, ignore_errors=True)
    descriptor = os.open(path.parent, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _link_all(source: Path, target: Path) -> None:
    """The same files in another folder, without another copy where the file system can."""
    target.mkdir()
    for file in source.iterdir():
        try:
            os.link(file, target / file.name)
        except OSError:  # no hard links here
            shutil.copyfile(file, target / file.name)


def _remove(path: Path) -> None:
    """Under another name first: half a checkpoint must not look like one."""
    if path.is_file():
        path.unlink()
        return
    doomed = path.with_name(f".{path.name}.old")
    path.rename(doomed)
    shutil.rmtree(doomed)


def _tidy(folder: Path) -> None:
    """What processes that were killed left behind."""
    best, new, old = folder / BEST, folder / f".{BEST}.tmp", folder / f".{BEST}.old"
    if old.exists() and new.exists() and not best.exists():  # killed between the two renames of _put
        new.rename(best)
    for leftover in [*folder.glob(".*.tmp"), *folder.glob(".*.old")]:
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def load(path: Path) -> dict[str, Any]:
    """All of a checkpoint on the CPU as nested containers; UserError for what is not one."""
    return nested(open_saved(path))


def load_modules(path: Path, *, ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """Weights of a checkpoint or run folder for use elsewhere: module name -> fp32 state_dict (EMA weights if `ema`),
    LoRA merged into the weights that it belongs to.
    """
    saved = open_saved(find(path))
    averaged = {"modules/" + name.removeprefix("ema/"): name for name in saved.names("ema/")} if ema else {}
    source = {name: averaged.get(name, name) for name in saved.names("modules/")}
    tensors = saved.read(source.values())
    modules: dict[str, dict[str, Tensor]] = {}
    for place, name in source.items():
        key, own_name = place.removeprefix("modules/").split(".", 1)
        modules.setdefault(key, {})[own_name] = tensors[name]
    base = saved.base()
    if base is None:
        return modules
    for place, tensor in base.read(base.shapes).items():
        key, own_name = place.removeprefix("base/").split(".", 1)
        modules[key][own_name] = tensor
    settings = saved.meta["lora"]["modules"]
    return {
        key: merged(tensors, settings[key]["alpha"] / settings[key]["rank"]) if key in settings else tensors
        for key, tensors in modules.items()
    }


def load_into(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """The averaged weights of a run or checkpoint into modules of the same names."""
    fill(modules, load_modules(path), path)


def fill(modules: Mapping[str, nn.Module], held: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Put weights that were read from `path` into modules of the same names; other modules among them are passed over
    (a student starts without the critic of the stage before). UserError for weights that do not fit.
    """
    found = {key: tensors for key, tensors in held.items() if key in modules}
    check_fits({key: module.state_dict() for key, module in modules.items()}, found, path)
    for key, module in modules.items():
        module.load_state_dict(found.get(key, {}))  # a module without tensors leaves no trace in a checkpoint


def check_holds(saved: Saved, wanted: Mapping[str, Tensor]) -> None:
    """UserError when averages or moments that are to be continued are not in the checkpoint."""
    missing = [name for name, tensor in wanted.items() if saved.shapes.get(name) != tuple(tensor.shape)]
    if missing:
        raise UserError(
            f"{saved.path} lacks {len(missing)} tensors that this run would continue "
            f"({', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}): it was made with other optimisers or "
            "players; set them as they were, or start a new run from its weights (objective.init_from)"
        )


def check_modules(saved: Saved, modules: Mapping[str, nn.Module], lora: Mapping[str, Any]) -> None:
    """UserError naming the first tensors of the modules that are missing, foreign or of another shape, or the LoRA that
    is another. `lora`: module -> its settings as plain data.
    """
    held = (saved.meta.get("lora") or {}).get("modules", {})
    if held != lora:
        raise UserError(
            f"{saved.path} was made with train.lora={held or 'nothing'}, and not with {dict(lora) or 'nothing'}: "
            "set it as it was, or start a new run from the (merged) weights with objective.init_from"
        )
    want = {f"{k}.{n}": tuple(t.shape) for k, module in modules.items() for n, t in module.state_dict().items()}
    have = {n.removeprefix("modules/"): saved.shapes[n] for n in saved.names("modules/")}
    base = saved.base()
    if base is not None:
        have |= {n.removeprefix("base/"): shape for n, shape in base.shapes.items()}
    check_shapes(want, have, saved.path)


def check_fits(
    expected: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, Mapping[str, Tensor]],
    path: Path,
) -> None:
    """UserError naming the first tensors that are missing, foreign or of another shape."""
    want = {f"{k}.{n}": tuple(t.shape) for k, tensors in expected.items() for n, t in tensors.items()}
    have = {f"{k}.{n}": tuple(t.shape) for k, tensors in found.items() for n, t in tensors.items()}
    check_shapes(want, have, path)


def check_shapes(want: Mapping[str, tuple[int, ...]], have: Mapping[str, tuple[int, ...]], path: Path) -> None:
    """The same by name and shape alone."""
    missing = sorted(want.keys() - have.keys())
    foreign = sorted(have.keys() - want.keys())
    reshaped = [f"{n} {have[n]} instead of {want[n]}" for n in sorted(want.keys() & have.keys()) if have[n] != want[n]]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (
            ("missing", missing),
            ("unknown", foreign),
            ("of another shape", reshaped),
        )
        if names
    ]
    if problems:
        raise UserError(f"{path} was made by another model: tensors {'; '.join(problems)}")


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the run folder; a second process that wants it is refused. The kernel releases it
    however this one ends.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with open(run_dir / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {run_dir}; stop it or set run_dir=OTHER") from None
        yield
