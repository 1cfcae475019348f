"""Checkpoints of a run: one file each, written whole or not at all.

A file is torch.save of plain containers and tensors (loaded with weights_only=True): `format`,
`step` (steps done), `modules` (module name -> state_dict, parameters as fp32 masters), `ema`
(updates, shadow), `optim`, `precision`, `newton_schulz`, `elapsed_s`, `best`. Random numbers need
no state: they are a function of (seed, step), so the data position is the step.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from streamgen.errors import UserError

FORMAT = 1
BEST = "best.pt"
_STEP_FILE = re.compile(r"step_(\d{8})\.pt")


def checkpoint_dir(run_dir: Path) -> Path:
    return run_dir / "checkpoints"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """step_*.pt of a run, oldest first."""
    folder = checkpoint_dir(run_dir)
    return sorted(p for p in folder.iterdir() if _STEP_FILE.fullmatch(p.name)) if folder.is_dir() else []


def save(run_dir: Path, state: Mapping[str, Any], *, keep: int, is_best: bool) -> Path:
    """Write step_XXXXXXXX.pt (temporary file, fsync, rename), then best.pt if asked, then drop all
    but the newest `keep`.
    """
    folder = checkpoint_dir(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    path = folder / f"step_{state['step']:08d}.pt"
    with _replacing(path) as temporary, open(temporary, "wb") as file:
        torch.save({"format": FORMAT, **state}, file)
        file.flush()
        os.fsync(file.fileno())
    if is_best:
        with _replacing(folder / BEST) as temporary:
            shutil.copyfile(path, temporary)
    for old in list_checkpoints(run_dir)[:-keep]:
        old.unlink()
    return path


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if the body succeeds and goes away if it
    does not.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU; UserError for a file that is not one."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint at {path}") from None
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a readable training checkpoint ({reason}); remove it or name another"
        ) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(f"{path} is not a training checkpoint of format {FORMAT}")
    return state


def find(path: Path) -> Path:
    """A checkpoint file from a checkpoint file or a run folder (its newest one)."""
    if path.is_file():
        return path
    found = list_checkpoints(path)
    if not found:
        raise UserError(f"no checkpoint in {path} (looked for {checkpoint_dir(path) / 'step_*.pt'})")
    return found[-1]


def load_modules(path: Path, *, ema: bool = True) -> dict[str, dict[str, Tensor]]:
    """Weights of a checkpoint file or run folder for use elsewhere: module name -> fp32 state_dict
    (EMA weights if `ema`).
    """
    state = load(find(path))
    modules: dict[str, dict[str, Tensor]] = {key: dict(tensors) for key, tensors in state["modules"].items()}
    if ema:
        for full_name, tensor in state["ema"]["shadow"].items():
            key, name = full_name.split(".", 1)
            modules[key][name] = tensor
    return modules


def load_into(path: Path, modules: Mapping[str, nn.Module]) -> None:
    """The averaged weights of a run or checkpoint into modules of the same names; other modules in it are passed over
    (a student starts without the critic of the stage before).
    """
    held = load_modules(path)
    found = {key: tensors for key, tensors in held.items() if key in modules}
    check_fits({key: module.state_dict() for key, module in modules.items()}, found, path)
    for key, module in modules.items():
        module.load_state_dict(found[key])


def check_fits(
    expected: Mapping[str, Mapping[str, Tensor]],
    found: Mapping[str, Mapping[str, Tensor]],
    path: Path,
) -> None:
    """UserError naming the first tensors that are missing, foreign or of another shape."""
    want = {f"{k}.{n}": tuple(t.shape) for k, tensors in expected.items() for n, t in tensors.items()}
    have = {f"{k}.{n}": tuple(t.shape) for k, tensors in found.items() for n, t in tensors.items()}
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
