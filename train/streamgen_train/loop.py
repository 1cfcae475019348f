"""The training loop: one step, and everything around it that a long run needs.

After every step the order is: log row, validation, pictures, checkpoint. So a checkpoint of step N
says that all rows up to N are on disk; a run killed at any moment continues from the newest
checkpoint and makes the same numbers and weights, bit for bit, as one that was never stopped. (On
one device, with unchanged threads and code.)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from streamgen.errors import UserError
from streamgen.parallel.processes import ProcessError, joined
from streamgen_train import checkpoint
from streamgen_train.config import TrainConfig
from streamgen_train.display import Display
from streamgen_train.distributed import is_cuda
from streamgen_train.logs import RunLog
from streamgen_train.objective import Objective
from streamgen_train.provenance import write_provenance
from streamgen_train.saved import open_saved
from streamgen_train.seeds import step_seed
from streamgen_train.signals import StopSignals
from streamgen_train.trainer import NonFiniteError, Trainer

__all__ = ["NonFiniteError", "TrainResult", "Trainer", "step_seed", "train"]

OnProgress = Callable[[int, Mapping[str, float]], None]
Status = Literal["done", "interrupted", "time"]


@dataclass(frozen=True, slots=True)
class TrainResult:
    status: Status
    step: int
    """Steps done in all."""
    checkpoint: Path


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where a run writes and shows; the first process has them."""

    log: RunLog
    display: Display


def train(
    objective: Objective,
    config: TrainConfig,
    run_dir: str | Path,
    *,
    on_progress: OnProgress | None = None,
    resume: str = "auto",
    resolved: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train until max_steps, max_minutes or a signal; always ends with a checkpoint.

    Build the objective under torch.manual_seed: its initial weights are its own affair.
    `on_progress(steps done, numbers)` is called after each step. `resolved` is the whole config,
    kept in the run folder. Under torchrun every process calls this; the first one writes and shows, all evaluate and
    stop together, and ProcessError ends those that are left when one is lost.
    """
    run_dir = Path(run_dir)
    torch.set_num_threads(config.threads)
    try:
        return _train(objective, config, run_dir, on_progress, resume, resolved)
    except ProcessError as error:
        stands = [str(path) for path in checkpoint.list_checkpoints(run_dir)[-1:]] or ["no checkpoint"]
        raise ProcessError(f"{error}; {stands[0]} stands. Start again to continue") from error


def _train(
    objective: Objective,
    config: TrainConfig,
    run_dir: Path,
    on_progress: OnProgress | None,
    resume: str,
    resolved: Mapping[str, Any] | None,
) -> TrainResult:
    group_of_one = config.sharding == "fsdp2"
    with (
        joined(is_cuda(config.device), config.process_timeout_s, group_of_one=group_of_one) as processes,
        ExitStack() as stack,
    ):
        processes.first_does(lambda: stack.enter_context(checkpoint.run_lock(run_dir)))
        source = processes.first_does(lambda: _resume_from(run_dir, resume))
        saved = None if source is None else open_saved(source)
        objective.run_dir = run_dir
        trainer = Trainer(objective, config, saved, processes)
        stop = stack.enter_context(StopSignals())
        outputs: list[Outputs] = []
        processes.first_does(lambda: outputs.append(_open(stack, trainer, run_dir, resolved)))
        return _run(trainer, run_dir, outputs[0] if outputs else None, stop, on_progress)


def _open(stack: ExitStack, trainer: Trainer, run_dir: Path, resolved: Mapping[str, Any] | None) -> Outputs:
    if resolved is not None:
        write_provenance(run_dir, resolved, trainer.step)
    log = RunLog(run_dir, trainer.config.log, trainer.step, resolved or {})
    stack.callback(log.close)
    display = stack.enter_context(Display(trainer.config.max_steps, trainer.step, run_dir.name))
    for line in (*trainer.notes, *log.notes):
        display.say(line)
    return Outputs(log, display)


def _resume_from(run_dir: Path, resume: str) -> Path | None:
    own = checkpoint.list_checkpoints(run_dir)
    if resume == "auto":
        return own[-1] if own else None
    if own:
        raise UserError(
            f"{run_dir} already has checkpoints; set resume=auto to continue it, or run_dir=OTHER to start anew"
        )
    return None if resume == "never" else checkpoint.find(Path(resume))


def _run(
    trainer: Trainer, run_dir: Path, outputs: Outputs | None, stop: StopSignals, on_progress: OnProgress | None
) -> TrainResult:
    config, started, before = trainer.config, time.monotonic(), trainer.elapsed_s
    limit_s = math.inf if config.max_minutes is None else config.max_minutes * 60
    newest = checkpoint.list_checkpoints(run_dir)
    path = newest[-1] if newest else None
    while trainer.step < config.max_steps or path is None:
        numbers = trainer.train_step()
        trainer.elapsed_s = before + time.monotonic() - started
        ended = trainer.step >= config.max_steps
        status = _status(trainer, ended, stop.received, trainer.elapsed_s - before >= limit_s)
        if trainer.step % config.log.every == 0 or ended:
            row = trainer.window_means()
            if outputs is not None:
                outputs.log.write("train", trainer.step, row)
                outputs.display.row(trainer.step, config.max_steps, row)
        if outputs is not None:
            outputs.display.advance(trainer.step)
        is_best = _evaluate(trainer, outputs, ended)
        if is_best or ended or status != "done" or trainer.step % config.checkpoint.every == 0:
            path = checkpoint.save(
                run_dir,
                trainer.state(),
                keep=config.checkpoint.keep,
                is_best=is_best,
                processes=trainer.processes,
            )
        if on_progress is not None:
            on_progress(trainer.step, numbers)
        if status != "done":
            assert path is not None
            return TrainResult(status, trainer.step, path)
    return TrainResult("done", trainer.step, path)


def _status(trainer: Trainer, ended: bool, is_asked: bool, is_late: bool) -> Status:
    """Why to stop now, the same in all processes: a signal to any stops all, and the first one's clock counts."""
    own = 2 if is_asked else 1 if is_late and trainer.processes.is_first else 0
    loudest = trainer.processes.largest(own)
    if ended or loudest == 0:
        return "done"
    return "interrupted" if loudest == 2 else "time"


def _evaluate(trainer: Trainer, outputs: Outputs | None, ended: bool) -> bool:
    """Validation and pictures where they are due, by all processes (weights may be in shards); -> this is the best
    checkpoint so far.
    """
    config, is_best = trainer.config, False
    if config.validate_every and (ended or trainer.step % config.validate_every == 0):
        scores = trainer.processes.from_first(trainer.evaluate(trainer.objective.validate))
        if scores and outputs is not None:
            outputs.log.write("val", trainer.step, scores)
            told = "  ".join(f"{k} {v:.4g}" for k, v in scores.items())
            outputs.display.say(f"validation at {trainer.step}: {told}")
        is_best = trainer.is_best(scores)
    if config.sample_every and (ended or trainer.step % config.sample_every == 0):
        samples = trainer.evaluate(trainer.objective.sample)
        if outputs is not None:
            outputs.log.samples(trainer.step, samples)
    if outputs is not None and (ended or (config.validate_every and trainer.step % config.validate_every == 0)):
        outputs.log.draw_curves()
    return is_best
